"""What image models cost here, beside the usual way: batched guided sampling, UnlearnDiffAtk's loss pass, a step of ESD.

    python -m expunge.benchmarks.generation_cost                       # goals: sampling <= 0.7, loss pass <= 0.5
    git clone https://github.com/rohitgandikota/erasing PEER
    python -m expunge.benchmarks.generation_cost --peer PEER           # goal: ESD's step / its official code's <= 1.0

sampling: `sample` on all prompts at once against a call of the very pipeline for each prompt, on the text toy; images must agree
to 1e-4. loss pass: the errors of one prompt at seven timesteps and their gradient at its words, in one batch against a loop over
the timesteps. esd: esd_sd.py is run as it is, but for the places that name Stable Diffusion: it is given the toy's folder, the toy's
picture size for 1024, float32 for bfloat16. A step is the difference of a long and a short run over the steps between, so that
loading and saving count on neither side. Both sample with the frozen original (its second version), guidance 3, 50 steps, batch 1;
its eta of 2 counts from the concept's own prediction, which is the paper's eta of 1.
"""

from __future__ import annotations

import contextlib
import io
import random
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from expunge.benchmarks.canvas import mini_canvas
from expunge.benchmarks.image_models import TextToy, load, toy_folder
from expunge.benchmarks.measuring import Times, clock_of, in_turns, options, publish, spelled, table
from expunge.cases import Case, requests
from expunge.cases.pictures import pictures
from expunge.errors import BadSetting
from expunge.methods.outcome import unlearn
from expunge.parts.prompts import denoising_errors, word_table
from expunge.tasks.denoiser import Denoiser
from expunge.tasks.sampling import Sampling, sample

NAME = "generation_cost"
SAMPLING_GOAL, LOSS_PASS_GOAL, ESD_GOAL = 0.7, 0.5, 1.0


def sampling(pipeline: Any, prompts: Sequence[str], plan: Sampling, rounds: int) -> tuple[Times, float]:
    """Both ways in turns, and the largest difference of any pixel in [-1, 1]."""
    model, seeds = Denoiser(pipeline).eval(), list(range(len(prompts)))
    conditions = model.conditions.of(prompts)

    def one_by_one() -> torch.Tensor:
        images = [
            pipeline(prompt, num_inference_steps=plan.steps, guidance_scale=plan.scale, output_type="pt",
                     generator=torch.Generator().manual_seed(seed)).images
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]  # fmt: skip
        return torch.cat(images) * 2 - 1

    def together() -> torch.Tensor:
        return sample(model, conditions, plan, seeds).images

    difference = float((one_by_one() - together()).abs().max())
    return in_turns({"pipeline": one_by_one, "batched": together}, rounds, clock=clock_of("cpu")), difference


def loss_pass(pipeline: Any, prompt: str, timesteps: int, rounds: int) -> tuple[Times, float]:
    """Both ways in turns, and the largest difference of an error or of a gradient's number, over the largest such number."""
    model = Denoiser(pipeline).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(1, *model.shape, generator=rng), torch.randn(1, timesteps, *model.shape, generator=rng)
    times = torch.linspace(70, 930, timesteps).long()
    condition, start = model.conditions.of([prompt]), word_table(model).weight[[20, 30]].detach()

    def batched() -> tuple[torch.Tensor, torch.Tensor]:
        words = start.clone().requires_grad_()
        errors = denoising_errors(model, clean, noise, times, model.encode(condition, words))
        return errors.detach(), torch.autograd.grad(errors.mean(), words)[0]

    def looped() -> tuple[torch.Tensor, torch.Tensor]:
        words, gradient, errors = start.clone().requires_grad_(), torch.zeros_like(start), []
        for i in range(timesteps):
            error = denoising_errors(
                model, clean, noise[:, i : i + 1], times[i : i + 1], model.encode(condition, words)
            )
            gradient += torch.autograd.grad(error.mean(), words)[0] / timesteps
            errors.append(error.detach())
        return torch.cat(errors, 1), gradient

    difference = max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(batched(), looped(), strict=True))
    return in_turns({"loop": looped, "batched": batched}, rounds, clock=clock_of("cpu")), difference


@contextlib.contextmanager
def _given(folder: Path) -> Iterator[None]:
    """Within it the two classes load the toy, whatever they are asked for."""
    from diffusers import StableDiffusionPipeline, UNet2DConditionModel

    saved = [(kind, kind.__dict__.get("from_pretrained")) for kind in (UNet2DConditionModel, StableDiffusionPipeline)]
    call = StableDiffusionPipeline.__call__
    plain = {kind: kind.from_pretrained for kind, _ in saved}
    for kind, _ in saved:

        def from_toy(_name: str, kind: Any = kind, **settings: Any) -> Any:
            return plain[kind](folder, local_files_only=True, **settings)

        kind.from_pretrained = staticmethod(from_toy)  # type: ignore[method-assign]
    try:
        yield
    finally:
        StableDiffusionPipeline.__call__ = call
        for kind, own in saved:
            if own is None:
                del kind.from_pretrained
            else:
                kind.from_pretrained = own


def official(checkout: Path, folder: Path, size: int, concept: str, steps: int) -> None:
    """`steps` iterations of the checkout's esd_sd.py on the toy."""
    script = checkout / "esd_sd.py"
    if not script.exists():
        raise BadSetting(f"expected a checkout of the official ESD at {checkout}, found no esd_sd.py there; clone it")
    code = script.read_text().replace("height=width=1024", f"height=width={size}").replace("bfloat16", "float32")
    argv, path = sys.argv, list(sys.path)
    with tempfile.TemporaryDirectory() as out, _given(folder), contextlib.redirect_stderr(io.StringIO()):
        sys.argv = [
            "esd_sd.py", "--erase_concept", concept, "--train_method", "esd-x", "--iterations", str(steps), "--device", "cpu",
            "--save_path", out,
        ]  # fmt: skip
        sys.path.insert(0, str(checkout))
        random.seed(0)
        try:
            exec(compile(code, str(script), "exec"), {"__name__": "__main__"})
        finally:
            sys.argv, sys.path[:] = argv, path


def esd_case(pipeline: Any, concept: str) -> Case:
    """One forget row in words alone: its picture is never read."""
    model, canvas = Denoiser(pipeline).eval(), mini_canvas("train")
    data = pictures(
        model, canvas.images[:2], prompts=[f"a {concept} three", "a plain three"], style=torch.tensor([0, 1])
    )
    return Case(model, data, requests.where("style", "==", 0), task="diffusion")


def esd(folder: Path, checkout: Path, size: int, short: int, long: int, rounds: int) -> Times:
    """Seconds of a step of either side, in turns."""
    case = esd_case(load(folder), "red")

    def ours(steps: int) -> None:
        unlearn(case, "esd", concept="red", latents="original", steps=steps, lr=5e-5, eta=1.0, floor=None)

    def step(run: Callable[[int], None]) -> float:
        clock = clock_of("cpu")
        marks = []
        for steps in (short, long):
            start = clock()
            run(steps)
            marks.append(clock() - start)
        return (marks[1] - marks[0]) / (long - short)

    seconds: dict[str, list[float]] = {"official": [], "ours": []}
    for _ in range(rounds):
        seconds["official"].append(step(lambda steps: official(checkout, folder, size, "red", steps)))
        seconds["ours"].append(step(ours))
    return Times(seconds)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options(NAME, __doc__)
    parser.add_argument("--peer", type=Path, help="a checkout of rohitgandikota/erasing")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, nargs=2, default=(5, 45), metavar=("SHORT", "LONG"))
    parser.add_argument(
        "--untrained", action="store_true", help="the toy after one step: what it draws does not change its cost"
    )
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    start = time.perf_counter()
    folder = toy_folder(TextToy(steps=1) if given.untrained else TextToy())
    canvas = mini_canvas("train")
    prompts = (canvas.captions() * given.prompts)[: given.prompts]
    lines = [
        _line(f"{given.prompts} prompts, 20 steps, guidance 3", "the pipeline, prompt by prompt", "batched", "pipeline", SAMPLING_GOAL,
              *sampling(load(folder), prompts, Sampling(20, 3.0), given.rounds)),
        _line("loss pass at 7 timesteps, with gradient", "a loop over the timesteps", "batched", "loop", LOSS_PASS_GOAL,
              *loss_pass(load(folder), prompts[0], 7, 10 * given.rounds)),
    ]  # fmt: skip
    if given.peer is not None:
        times = esd(folder, given.peer, TextToy().size, *given.steps, given.rounds)
        lines.append(_line("one step of ESD-x", "its official code", "ours", "official", ESD_GOAL, times))
    publish(NAME, spelled(NAME, arguments), time.perf_counter() - start, table(lines), given.out or None)


def _line(
    what: str, beside: str, ours: str, theirs: str, goal: float, times: Times, difference: float | None = None
) -> dict[str, Any]:
    ratio, (least, most) = times.ratio(ours, theirs), times.range(ours, theirs)
    return {
        "what": what, "beside": beside, "theirs, s": times.median(theirs), "ours, s": times.median(ours), "ratio": ratio,
        "from": least, "to": most, "goal": goal, "met": ratio <= goal, "largest difference": difference,
    }  # fmt: skip


if __name__ == "__main__":
    main()
