"""Task vector: train the model further on what must go, and walk the other way.

Paper: Ilharco et al., "Editing Models with Task Arithmetic", ICLR 2023, https://arxiv.org/abs/2212.04089; as a baseline of
MUSE (Shi et al., 2407.06460).

    theta_reinf = theta fine-tuned on D_f
    theta       <- theta - alpha (theta_reinf - theta)

No retain data is read. Weights that are frozen, and buffers, stay. MUSE's settings: alpha 5, ten epochs of AdamW at 1e-5.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import torch

from expunge.engine.loop import run_plan
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Epochs, Lr, OptimizerName
from expunge.parts.guarded import companion
from expunge.parts.objectives import fit
from expunge.parts.plan import Auxiliary, Edit, Optimizer, Plan, Term

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench

REINFORCED = "reinforced"


def reinforcing(lr: float, epochs: int, batch_size: int, optimizer: str = "adamw", clip: float | None = 1.0) -> Plan:
    """Train a copy of the model, the network "reinforced", further on the forget rows."""
    copied = Auxiliary(REINFORCED, lambda case, seed: companion(case.model))
    return Plan(
        Term(fit(), on="forget"), trains=copied, mode="eval", optimizer=Optimizer(optimizer, lr=lr, clip=clip), epochs=epochs,
        batch_size=batch_size, name=REINFORCED,
    )  # fmt: skip


def reinforced(bench: Workbench, plan: Plan) -> Any:
    """The trained network; its last forget loss is noted."""
    trace = run_plan(plan, bench)
    if trace.history:
        bench.note("reinforced_loss", next(iter(trace.history[-1]["losses"].values())))
    return bench.networks[REINFORCED]


@method(
    family="edited", needs=("labels",), intention="removal", mechanism="task arithmetic",
    paper="Ilharco et al., ICLR 2023, 2212.04089",
)  # fmt: skip
def task_vector(
    alpha: Annotated[float, setting("how far to walk away, in lengths of the vector", ge=0)] = 5.0,
    lr: Lr = 1e-5,
    epochs: Epochs = 10,
    batch_size: BatchSize = 32,
    optimizer: OptimizerName = "adamw",
    clip: Clip = 1.0,
) -> Edit:
    """Subtract the change that more training on the forget rows would make."""
    plan = reinforcing(lr, epochs, batch_size, optimizer, clip)

    def apply(bench: Workbench) -> None:
        other = dict(reinforced(bench, plan).named_parameters())
        length = 0.0
        with torch.no_grad():
            for name, theta in bench.model.named_parameters():
                if theta.requires_grad and theta.is_floating_point():
                    vector = other[name].to(theta) - theta
                    length += float(vector.double().square().sum())
                    theta.sub_(alpha * vector)
        bench.note("task_vector_length", length**0.5)

    return Edit(apply, f"θ ← θ - {alpha:g}·(θ_r - θ), {plan}", {"passes": {"forget": epochs}})
