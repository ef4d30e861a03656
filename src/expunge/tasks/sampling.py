"""Sampling: images from conditions and seeds, batched, guided, reproducible image by image.

Every image has a seed of its own, so it does not depend on what else is in its batch: 64 prompts in one batch give the images
that 64 calls of the pipeline would give. The model's own scheduler steps; `partial` stops on the way and hands out x_t.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.errors import BadSetting
from expunge.seeds import derive
from expunge.tasks.base import evaluating

SCHEDULERS = ("own", "ddim", "ddpm")


@dataclass(frozen=True)
class Sampling:
    """How images are drawn; a change in any makes numbers incomparable, so it is part of every record.

    guidance: scale w. convention: `diffusers` is o_0 + w (o_c - o_0), so 1 is no guidance; `ddpm` is (1 + w) o_c - w o_0
        (SalUn, Selective Amnesia), so 0 is none: the two differ by one.
    scheduler: the pipeline's own, or DDIM / DDPM made from its config. eta: DDIM's noise, 0 for none.
    """

    steps: int = 25
    guidance: float = 2.0
    convention: str = "diffusers"
    scheduler: str = "own"
    eta: float = 0.0

    def __post_init__(self) -> None:
        if self.convention not in ("diffusers", "ddpm"):
            raise BadSetting(
                f"expected a guidance convention, diffusers or ddpm, found {self.convention!r}; choose one"
            )
        if self.scheduler not in SCHEDULERS:
            raise BadSetting(f"expected a scheduler, one of {SCHEDULERS}, found {self.scheduler!r}; choose one")
        if self.steps < 1:
            raise BadSetting(f"expected at least one sampling step, found {self.steps}; use 20 or more for DDIM")

    @property
    def scale(self) -> float:
        """The guidance scale in diffusers' convention."""
        return self.guidance + 1 if self.convention == "ddpm" else self.guidance

    def describe(self) -> dict[str, Any]:
        return asdict(self)

    def stepper(self, model: Any) -> Any:
        """A scheduler of its own for one sampling, its timesteps set."""
        if self.scheduler == "own" or model.flow:
            stepper = copy.deepcopy(model.scheduler)
        else:
            from diffusers import DDIMScheduler, DDPMScheduler

            kind = DDIMScheduler if self.scheduler == "ddim" else DDPMScheduler
            stepper = kind.from_config(model.scheduler.config)
        stepper.set_timesteps(self.steps, device=model.device)
        return stepper


@dataclass(frozen=True)
class Samples:
    """images: (N, C, H, W) in [-1, 1] on the CPU. finite: (N,) bool; rows with NaN are zeroed there and counted out."""

    images: Tensor
    finite: Tensor

    @property
    def dropped(self) -> int:
        return int((~self.finite).sum())

    def __len__(self) -> int:
        return len(self.images)


def noises(seeds: Sequence[int], shape: Sequence[int]) -> Tensor:
    """(N, *shape) float32, each row from a CPU generator of its own: what a pipeline draws for this seed and one prompt."""
    return torch.cat([torch.randn((1, *shape), generator=torch.Generator().manual_seed(s)) for s in seeds])


def seeds_of(seed: int, count: int) -> list[int]:
    """`count` seeds of images from one seed."""
    return [derive(seed, "image", i) for i in range(count)]


@dataclass
class Trajectory:
    """Latents on their way from noise to an image. noisy: (B, C, H, W). rest: what the scheduler's step takes beside them."""

    stepper: Any
    noisy: Tensor
    rest: dict[str, Any]

    @classmethod
    def begun(cls, model: Any, noise: Tensor, sampling: Sampling, seeds: Sequence[int]) -> Trajectory:
        stepper = sampling.stepper(model)
        rest: dict[str, Any] = {}
        takes = stepper.step.__code__.co_varnames[: stepper.step.__code__.co_argcount]
        if "eta" in takes:
            rest["eta"] = sampling.eta
        if "generator" in takes:
            rest["generator"] = [torch.Generator().manual_seed(derive(s, "steps")) for s in seeds]
        return cls(stepper, noise.to(model.device) * getattr(stepper, "init_noise_sigma", 1.0), rest)

    def given(self, timestep: Tensor) -> Tensor:
        """The latents as the network takes them."""
        scaled = getattr(self.stepper, "scale_model_input", None)
        return self.noisy if scaled is None else scaled(self.noisy, timestep)

    def advance(self, output: Tensor, timestep: Tensor) -> None:
        self.noisy = self.stepper.step(output.float(), timestep, self.noisy, **self.rest, return_dict=False)[0]

    def fork(self) -> Trajectory:
        """Another that starts here and sees the same noise."""
        rest = dict(self.rest)
        if "generator" in rest:
            rest["generator"] = [torch.Generator().set_state(g.get_state()) for g in rest["generator"]]
        return Trajectory(copy.deepcopy(self.stepper), self.noisy, rest)


def denoised(
    model: Any,
    encoded: Tensor,
    null: Tensor | None,
    noise: Tensor,
    sampling: Sampling,
    seeds: Sequence[int],
    stop_at: int | None = None,
    watch: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:
    """Latents (B, C, H, W) after `stop_at` steps (all of them), and the next timestep () (of the last step at the end)."""
    trajectory = Trajectory.begun(model, noise, sampling, seeds)
    memory: dict[str, Any] = {"total": sampling.steps, "trajectory": trajectory}
    timesteps = trajectory.stepper.timesteps
    last = len(timesteps) if stop_at is None else stop_at
    for number, timestep in enumerate(timesteps[:last]):
        memory["step"] = number
        output = model.guided(trajectory.given(timestep), timestep, encoded, null, sampling.scale, memory)
        trajectory.advance(output, timestep)
        if watch is not None:
            watch(number, trajectory.noisy)
    return trajectory.noisy, timesteps[min(last, len(timesteps) - 1)]


def sample(
    model: Any,
    condition: Tensor,
    sampling: Sampling | None = None,
    seeds: Sequence[int] | int = 0,
    batch_size: int = 64,
    prefix: Tensor | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Samples:
    """One image for each condition.

    condition: (N,) class ids or (N, L) token ids (`model.conditions.of(...)`). seeds: one for each, or one for all of them from
    which theirs are derived. prefix: (k, d) or (N, k, d) word embeddings before each prompt. A model with a `draw` of its own
    (a one-step generator) is asked for it.
    """
    sampling = sampling or Sampling()
    own = seeds_of(seeds, len(condition)) if isinstance(seeds, int) else list(seeds)
    if len(own) != len(condition):
        raise BadSetting(f"expected one seed for each of {len(condition)} conditions, found {len(own)}; give as many")
    images: list[Tensor] = []
    with evaluating(model):
        for start in range(0, len(condition), batch_size):
            rows = slice(start, start + batch_size)
            some = condition[rows].to(model.device)
            ahead = None if prefix is None else (prefix if prefix.dim() == 2 else prefix[rows])
            noise = noises(own[rows], model.shape)
            if hasattr(model, "draw"):
                latents = model.draw(noise.to(model.device), model.encode(some, ahead))
            else:
                free = sampling.scale == 1.0
                null = None if free else model.encode(model.conditions.like(some))
                latents, _ = denoised(model, model.encode(some, ahead), null, noise, sampling, own[rows])
            images.append(model.images(latents).cpu())
            if report is not None:
                report(min(start + batch_size, len(condition)), len(condition))
    found = torch.cat(images) if images else torch.zeros(0, *model.shape)
    finite = torch.isfinite(found.flatten(1)).all(1)
    return Samples(torch.where(finite[:, None, None, None], found, torch.zeros_like(found)), finite)


@torch.no_grad()
def partial(
    model: Any, condition: Tensor, sampling: Sampling, stop_at: int, rng: torch.Generator
) -> tuple[Tensor, Tensor]:
    """x_t (B, C, H, W) after `stop_at` of the sampling's steps from fresh noise, and its timestep t (B,): what ESD, SPM and
    AdvUnlearn take their noisy latents from. The model's mode is left as it is (eval mode is the caller's to choose)."""
    size = len(condition)
    noise = torch.randn((size, *model.shape), generator=rng)
    seeds = torch.randint(0, 2**31, (size,), generator=rng).tolist()
    some = condition.to(model.device)
    null = None if sampling.scale == 1.0 else model.encode(model.conditions.like(some))
    noisy, timestep = denoised(model, model.encode(some), null, noise, sampling, seeds, stop_at)
    return noisy, timestep.to(model.device).expand(size)
