"""Checkpoints: one safetensors file, written whole or not at all, that a killed run continues from to the same tensors."""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from expunge.engine.distribution import complete, fitted, together
from expunge.errors import BadCheckpoint
from expunge.files import digest_weights, write_atomic

if TYPE_CHECKING:
    from expunge.engine.loop import Phase, Position
    from expunge.engine.workbench import Workbench
    from expunge.parts.plan import Plan

FORMAT = "expunge.checkpoint/1"


@dataclass
class Resumed:
    """What a checkpoint held."""

    position: Position
    history: list[dict[str, Any]]
    tensors: dict[str, Tensor]
    optimizer_steps: list[int]

    def part(self, prefix: str) -> dict[str, Tensor]:
        return {k[len(prefix) :]: v for k, v in self.tensors.items() if k.startswith(prefix)}

    def restore(self, phase: Phase) -> None:
        """Put weights, optimizer state and averages back into a prepared phase."""
        phase.distribution.load(phase.trained, self.part("trained/"))
        for i, optimizer in enumerate(phase.all_optimizers):
            optimizer.load(self.part(f"optimizer{i}/"), self.optimizer_steps[i])
        now = phase.trained.state_dict()

        def cut(state: dict[str, Tensor]) -> dict[str, Tensor]:
            return {k: fitted(v, now[k]).cpu() if k in now else v for k, v in state.items()}

        means = [v for _, v in sorted(self.part("mean/").items())]
        parameters = phase.optimizers[0].parameters if phase.optimizers else []
        phase.resumed_mean = [fitted(v, p) for v, p in zip(means, parameters, strict=False)]
        phase.resumed_best = cut(self.part("best/")) or None
        phase.kept = [cut(self.part(f"kept{i}/")) for i in range(len(self.position.kept_values))]
        for name in {k.split("/")[1] for k in self.tensors if k.startswith("network/")}:
            if name in phase.networks and name != phase.trained_name:
                phase.networks[name].load_state_dict(self.part(f"network/{name}/"))

    def restore_entry(self, plan: Plan, workbench: Workbench) -> None:
        """Put back the weights that a later phase began with, before it is prepared."""
        state = self.part("entry/")
        if state and isinstance(plan.trains, str):
            workbench.networks[plan.trains].load_state_dict(state)

    def restore_network(self, name: str, workbench: Workbench) -> None:
        state = self.part(f"network/{name}/")
        if state:
            workbench.networks[name].load_state_dict(state)


class Checkpointer:
    """Saves every `seconds` (or every `steps` updates, for tests) and when a phase ends an epoch past that age.

    identity: a digest of what the run is (plan, case, seed); a checkpoint of another run is refused.
    """

    def __init__(self, folder: Path, identity: str, seconds: float = 30.0, steps: int | None = None):
        self.path, self.identity, self.seconds, self.steps = folder / "checkpoint.safetensors", identity, seconds, steps
        self.last = time.monotonic()

    def maybe_save(self, phase: Phase) -> None:
        due = phase.position.step % self.steps == 0 if self.steps else time.monotonic() - self.last >= self.seconds
        if phase.distribution.agreed(due):
            self.save(phase)

    def save(self, phase: Phase) -> None:
        tensors: dict[str, Tensor] = {f"trained/{k}": v for k, v in phase.trained.state_dict().items()}
        for i, optimizer in enumerate(phase.all_optimizers):
            tensors |= {f"optimizer{i}/{k}": v for k, v in optimizer.tensors().items()}
        tensors |= {f"mean/{i:06d}": v for i, v in enumerate(phase.mean)}
        tensors |= {f"best/{k}": v for k, v in (phase.best or {}).items()}
        tensors |= {f"entry/{k}": v for k, v in (phase.entry or {}).items()}
        tensors |= {f"kept{i}/{k}": v for i, kept in enumerate(phase.kept) for k, v in kept.items()}
        for name, network in phase.bench.networks.items():
            if name != phase.trained_name:
                tensors |= {f"network/{name}/{k}": v for k, v in network.state_dict().items()}
        self.last = time.monotonic()
        # shards are put together by all processes; the first one writes. clone: tied weights share memory, which the
        # format refuses
        tensors = {k: complete(v.detach()).cpu().contiguous().clone() for k, v in tensors.items()}
        if phase.distribution.is_main:
            self._write(phase, tensors)
        together()  # who reads an older checkpoint than the first process makes other collectives than it

    def _write(self, phase: Phase, tensors: dict[str, Tensor]) -> None:
        position = asdict(phase.position)
        meta = {
            "format": FORMAT,
            "identity": self.identity,
            "position": json.dumps(position),
            "optimizer_steps": json.dumps([o.steps for o in phase.all_optimizers]),
            "history": json.dumps(phase.trace.history),
            "digest": digest_weights(tensors),
        }
        write_atomic(self.path, save(tensors, metadata=meta))

    def load(self) -> Resumed | None:
        """What was saved, or None when nothing was; `BadCheckpoint` when it is damaged or of another run."""
        from expunge.engine.loop import Position

        if not self.path.exists():
            return None
        advice = f"delete {self.path.name} in the run directory to start again, or use another run directory"
        try:
            with safe_open(str(self.path), framework="pt") as file:
                meta = file.metadata() or {}
                tensors = {k: file.get_tensor(k) for k in file.keys()}  # noqa: SIM118 (not a dict)
        except (SafetensorError, OSError, ValueError) as error:
            raise BadCheckpoint(f"expected a whole checkpoint, found a damaged one ({error}); {advice}") from error
        if meta.get("format") != FORMAT:
            raise BadCheckpoint(f"expected the format {FORMAT}, found {meta.get('format')}; {advice}")
        if meta["digest"] != digest_weights(tensors):
            raise BadCheckpoint(
                f"expected the checkpoint's content to match its digest, found that it does not; {advice}"
            )
        if meta["identity"] != self.identity:
            raise BadCheckpoint(
                "expected a checkpoint of this very run (same case, method, settings and seed), found one of another; "
                + advice
            )
        return Resumed(
            Position(**json.loads(meta["position"])), json.loads(meta["history"]), tensors,
            json.loads(meta["optimizer_steps"]),
        )  # fmt: skip

    def clear(self) -> None:
        self.path.unlink(missing_ok=True)
