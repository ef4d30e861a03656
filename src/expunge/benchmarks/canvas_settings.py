"""Settings that suit the embedded toys (8x8, minutes on one core); a method's own defaults are its paper's, for Stable Diffusion.

What is to go and what stands in for it is the benchmark's to say (`concept`, `anchor`, `to`), so it is not here.
"""

from __future__ import annotations

from typing import Any

Settings = dict[str, dict[str, Any]]

TEXT: Settings = {
    "grad_ascent": {"optimizer": "adam", "lr": 1e-4, "epochs": 5, "batch_size": 32},
    "fine_tune": {"lr": 0.01, "epochs": 5, "batch_size": 64},
    "uce": {"guide": "plain", "expand": True},
    "concept_ablation": {"steps": 120, "lr": 1e-3, "batch_size": 16, "images": 200},
    "esd": {"steps": 80, "lr": 1e-3, "batch_size": 8, "sampling_steps": 20},
    "advunlearn": {
        "steps": 100, "warm_up": 30, "lr": 4e-3, "batch_size": 4, "retain_batch_size": 8, "sampling_steps": 20,
        "attack_steps": 3, "attack_lr": 1e-2, "retain_w": 0.3,
    },
    "salun_generation": {"steps": 100, "lr": 2e-4, "batch_size": 32},
    "doco": {
        "steps": 80, "warm_up": 80, "lr": 1e-3, "discriminator_lr": 5e-4, "batch_size": 16, "images": 64, "guidance": 3.0,
    },
    "erasediff": {"lam": 1.0, "lr": 3e-4, "steps": 60, "batch_size": 16},
    "scissorhands": {"lam": 1.0, "lr": 3e-4, "steps": 60, "batch_size": 16, "sparsity": 0.99, "batches": 1},
    "selective_amnesia": {
        "lam": 0.01, "samples": 40, "timesteps": 50, "images": 100, "sampling_steps": 20, "guidance": 3.0, "steps": 150,
        "lr": 3e-4, "batch_size": 32,
    },
    "sfd": {
        "g_f": 1.0, "w_f": 1.0, "lr": 1e-4, "fake_lr": 3e-4, "steps": 250, "batch_size": 24, "decay": 0.95, "guidance": 2.0,
    },
    "sld": {"preset": "medium", "warm_up": 2},
    "seot": {"start": 0.0},
    "forget_me_not": {"template": None, "use_pooler": True, "steps": 30, "lr": 1.5e-4, "batch_size": 8},
    "spm": {
        "steps": 150, "lr": 2e-2, "batch_size": 4, "anchoring": 3.0, "anchors": 1, "alpha": 4.0, "sampling_steps": 6,
        "warmup": 0.1,
    },
}  # fmt: skip
"""Text toy on MiniCanvas."""

CLASS: Settings = {
    "esd": {"scope": "all", "steps": 60, "lr": 2e-4, "batch_size": 8, "sampling_steps": 25},
    "salun_generation": {"steps": 150, "lr": 2e-4, "batch_size": 64},
    "doco": {
        "scope": "all", "steps": 150, "warm_up": 100, "lr": 1e-4, "discriminator_lr": 5e-4, "batch_size": 16, "images": 100,
        "guidance": 2.0,
    },
    "erasediff": {"lam": 1.0, "lr": 2e-4, "steps": 60, "batch_size": 32},
    "scissorhands": {"lam": 1.0, "lr": 3e-4, "steps": 100, "batch_size": 32, "sparsity": 0.99, "batches": 1},
    "selective_amnesia": {
        "lam": 0.01, "samples": 30, "timesteps": 64, "images": 80, "sampling_steps": 15, "guidance": 2.0, "steps": 100,
        "lr": 3e-4, "batch_size": 32,
    },
    "sfd": {"g_f": 1.0, "w_f": 1.0, "lr": 1e-4, "fake_lr": 3e-4, "steps": 250, "batch_size": 24, "decay": 0.95},
}  # fmt: skip
"""Class toy."""
