"""Devices, mixed precision and several processes, by accelerate.

Several processes share each batch: process r takes rows r, r+n, r+2n, ... of it and the gradients are averaged with the
weight of their rows, so that n processes make the update that one would. Done on gradients rather than by wrapping the model,
because balances and adversaries take several gradients per update.

Where FSDP2 is asked for (accelerate's config or `ACCELERATE_USE_FSDP=true FSDP_VERSION=2`), the network under training is sharded
in place by torch's `fully_shard`: block by block, and the rest with the root. Weights, gradients, masks and optimizer state
are then DTensors; snapshots stay sharded, checkpoints and the result are whole.
"""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadSetting

PRECISIONS = {"bf16": torch.bfloat16, "fp16": torch.float16}


class Distribution:
    """One process on one device unless an accelerator is given."""

    def __init__(self, accelerator: Any = None, precision: str | None = None):
        self.accelerator = accelerator
        self.precision = precision
        self.count = 1 if accelerator is None else int(accelerator.num_processes)
        self.rank = 0 if accelerator is None else int(accelerator.process_index)
        self.sharded = accelerator is not None and _asks_for_shards(accelerator)
        self._whole: dict[int, tuple[nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]] = {}
        self._current: dict[int, nn.Parameter] = {}

    @classmethod
    def make(cls, device: str | None = None, mixed_precision: str | None = None, trackers: list[Any] | None = None,
             folder: str | None = None) -> Distribution:  # fmt: skip
        """By accelerate's own rules (environment, launch command). device="cpu" forces the CPU. trackers: names that
        accelerate knows, or `accelerate.tracking.GeneralTracker` objects.

        The precision asked for is entered by torch's autocast and not handed to accelerate, which keeps one for the whole
        process and refuses a second; without one, accelerate's config file holds."""
        from accelerate import Accelerator

        if mixed_precision not in (None, "no", *PRECISIONS):
            raise BadSetting(
                f"expected mixed_precision, one of no, {', '.join(PRECISIONS)}, found {mixed_precision!r}; use one of them"
            )
        # accelerate joins processes over gloo only where it is told that they run on CPUs; else each would do the whole work alone
        cpu = device == "cpu" or (device is None and launched() > 1 and not _devices())
        accelerator = Accelerator(cpu=cpu, log_with=trackers or None, project_dir=folder)
        if accelerator.num_processes != launched():
            raise BadSetting(
                f"expected {launched()} processes to work together, found {accelerator.num_processes} joined on "
                f"{accelerator.device}; launch with one of configs/accelerate, or run in one process"
            )
        if device is not None and torch.device(device).type != accelerator.device.type:
            raise BadSetting(
                f"expected the device {device}, found {accelerator.device.type} alone; leave the device out to run there"
            )
        return cls(accelerator, mixed_precision)

    @property
    def device(self) -> torch.device:
        if self.accelerator is None or self.accelerator.device.type == "cpu":
            return torch.device("cpu")  # accelerate says "cpu:0", which torch takes for another device
        return self.accelerator.device

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> Any:
        """Mixed precision, where it was asked for."""
        if self.precision in PRECISIONS:
            return torch.autocast(self.device.type, dtype=PRECISIONS[self.precision])
        if self.precision == "no" or self.accelerator is None or self.accelerator.mixed_precision == "no":
            return contextlib.nullcontext()
        return self.accelerator.autocast()

    # -- rows ------------------------------------------------------------------------------------------------------
    def mine(self, ids: Tensor) -> Tensor:
        """This process's rows of a batch."""
        if self.count == 1:
            return ids
        own = ids[self.rank :: self.count]
        return own if len(own) else ids[:1]  # a batch smaller than the process count: weight 0, see local_weights

    def local_weights(self, sizes: dict[str, int]) -> dict[str, float]:
        """What a local batch mean counts in the global one, times the process count (the reduction takes the mean)."""
        if self.count == 1:
            return dict.fromkeys(sizes, 1.0)
        return {n: len(range(self.rank, size, self.count)) * self.count / size for n, size in sizes.items()}

    # -- numbers ---------------------------------------------------------------------------------------------------
    def reduce(self, gradients: list[Tensor]) -> None:
        """Average in place over the processes; shards are averaged by the backward pass itself."""
        if self.count > 1 and not self.sharded:
            for g in gradients:
                g.copy_(self.accelerator.reduce(g, reduction="mean"))

    def gradients(self, value: Tensor, parameters: Sequence[Tensor], retain_graph: bool) -> Sequence[Tensor | None]:
        """d value / d parameters. Shards get theirs from a backward pass only: their hooks fill `.grad`."""
        if not self.sharded:
            return torch.autograd.grad(value, parameters, allow_unused=True, retain_graph=retain_graph)
        saved = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        value.backward(retain_graph=retain_graph)
        found = [p.grad for p in parameters]
        for p, g in zip(parameters, saved, strict=True):
            p.grad = g
        return found

    def mean(self, value: float, weight: float) -> float:
        """The global mean of a local batch mean."""
        if self.count == 1:
            return value
        local = torch.tensor(
            value * weight, device=self.device, dtype=torch.float64 if self.device.type == "cpu" else None
        )
        return float(self.accelerator.reduce(local, reduction="mean"))

    def mean_of(self, values: Tensor, weight: float) -> Tensor:
        """() the global mean of local values (B,), without gradient."""
        own = values.mean()
        return own if self.count == 1 else self.accelerator.reduce(own.detach() * weight, reduction="mean")

    def agreed(self, choice: bool) -> bool:
        """The first process's choice, for all (clocks differ)."""
        if self.count == 1:
            return choice
        return bool(self.mean(float(choice and self.is_main), 1.0) > 0)

    # -- shards ----------------------------------------------------------------------------------------------------
    def shard(self, model: nn.Module) -> nn.Module:
        """Cut the network's weights over the processes, in place."""
        if not self.sharded:
            return model
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        whole, pairs = _skeleton(model)
        settings = getattr(self.accelerator.state, "fsdp_plugin", None)
        common: dict[str, Any] = {
            "mesh": init_device_mesh(self.device.type, (self.count,)),
            "reshard_after_forward": getattr(settings, "reshard_after_forward", True) is not False,
            "offload_policy": CPUOffloadPolicy() if getattr(settings, "cpu_offload", None) else OffloadPolicy(),
        }
        for block in _blocks(model):
            fully_shard(block, **common)
        # torch keeps the root's own weights whole between forward and backward, where they are needed first
        fully_shard(model, mesh=common["mesh"], offload_policy=common["offload_policy"])
        for old, _ in pairs:
            old.data = old.data.new_empty(0)  # whoever still knows the old parameter must not keep its numbers alive
        self._whole[id(model)] = whole, pairs
        self._current |= {id(old): new for old, new in pairs}
        return model

    def gather(self, model: nn.Module) -> nn.Module:
        """The network as it was before `shard`, same class and keys, with the weights of now."""
        if id(model) not in self._whole:
            return model
        whole, _ = self._whole.pop(id(model))
        state = {name: complete(value) for name, value in model.state_dict(keep_vars=True).items()}
        trains = {name: p.requires_grad for name, p in model.named_parameters()}
        for name, p in whole.named_parameters():
            torch.utils.swap_tensors(p, nn.Parameter(state[name].to(self.device), requires_grad=trains[name]))
        with torch.no_grad():
            for name, value in whole.named_buffers():
                if name in state:
                    value.copy_(state[name])
        return whole

    def now(self, parameter: nn.Parameter) -> nn.Parameter:
        """The parameter that stands where this one stood before its network was sharded and gathered."""
        return self._current.get(id(parameter), parameter)

    @torch.no_grad()
    def load(self, model: nn.Module, state: Mapping[str, Tensor]) -> None:
        """Copy values (whole ones, or a snapshot's shards) into the network; what is frozen need not be among them."""
        if not self.sharded:
            model.load_state_dict(state, strict=False)
            return
        for name, value in model.state_dict(keep_vars=True).items():
            if name in state:
                value.copy_(fitted(state[name], value))


def complete(tensor: Tensor) -> Tensor:
    """A tensor in whole; of a shard's, by all processes together."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.to(tensor.device_mesh.device_type).full_tensor()  # type: ignore[attr-defined] # a snapshot is on the CPU


def fitted(value: Tensor, like: Tensor) -> Tensor:
    """A value on the device, and cut the way, of `like`, a tensor of its shape."""
    if not hasattr(like, "device_mesh") or hasattr(value, "device_mesh"):
        return value.to(like.device)
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements)


def launched() -> int:
    """How many processes a launch command started; 1 without one."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _devices() -> bool:
    """Whether there are accelerators that several processes can share out (one of Apple's is not)."""
    found = getattr(torch, "accelerator", None)  # from torch 2.6 on
    if found is None:
        return torch.cuda.is_available()
    return found.is_available() and found.current_accelerator().type != "mps"


def follows() -> bool:
    """Whether this process is one of several and not the first: it computes, and leaves files and words to the first."""
    return int(os.environ.get("RANK", "0")) > 0


def together() -> None:
    """Wait until every process has come this far, so that all of them see what the first has written."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.barrier()


def disband() -> None:
    """After the run of several processes: the first goes on alone (audits, reports), the others have nothing left to do."""
    if launched() == 1:
        return
    from accelerate.state import AcceleratorState, GradientState

    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    os.environ["WORLD_SIZE"] = "1"
    os.environ.pop("ACCELERATE_USE_FSDP", None)


def _asks_for_shards(accelerator: Any) -> bool:
    stage = getattr(getattr(accelerator.state, "deepspeed_plugin", None), "zero_stage", 0)
    if stage:
        raise BadSetting(
            f"expected DeepSpeed without ZeRO (zero_stage: 0), found stage {stage}: the loop takes several gradients per update, "
            "which ZeRO's engine does not give; to cut weights over processes use configs/accelerate/fsdp2.yaml"
        )
    plugin = getattr(accelerator.state, "fsdp_plugin", None)
    # accelerate looks at these only on accelerators; on CPUs they are ours to read
    asked = plugin is not None or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    version = int(getattr(plugin, "fsdp_version", None) or os.environ.get("FSDP_VERSION", "1"))
    if asked and version != 2:
        raise BadSetting(
            f"expected FSDP version 2, found version {version}; set fsdp_version: 2 in accelerate's config (configs/accelerate)"
        )
    return asked and int(accelerator.num_processes) > 1


def _blocks(model: nn.Module) -> list[nn.Module]:
    """What is sharded as a unit: the blocks that transformers names, else the largest repeated class of modules."""
    names = {n for m in model.modules() for n in (getattr(m, "_no_split_modules", None) or ())}
    found = [m for m in model.modules() if type(m).__name__ in names]
    if found:
        return found
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=len, default=[])


def _skeleton(model: nn.Module) -> tuple[nn.Module, list[tuple[nn.Parameter, nn.Parameter]]]:
    """A copy of the module whose parameters are empty (on no device), and which of them stands for which."""
    pairs = [(p, nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad)) for p in model.parameters()]
    return copy.deepcopy(model, {id(old): new for old, new in pairs}), pairs
