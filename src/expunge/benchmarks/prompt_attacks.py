"""Prompt attacks on the embedded text toy: success before and after for some erasers, the original and the retrained model.

    python -m expunge.benchmarks.prompt_attacks --target red --methods uce,concept_ablation --prompts 10     one table
    python -m expunge.benchmarks.prompt_attacks speed                                                        one loss pass, two ways

The table: UnlearnDiffAtk (k words, N timesteps of some iterations) beside random words, new seeds and other wordings at as many
images, on the same prompts, seeds and draws; `retrained` is the noise floor of every column.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

from expunge.audits.attacks.drawing import NewSeeds, OtherWordings, RandomPrefix, asked
from expunge.audits.attacks.unlearndiffatk import EmbeddingSearch, UnlearnDiffAtk
from expunge.benchmarks.canvas_settings import TEXT
from expunge.benchmarks.unlearncanvas import Bench, configured, mini
from expunge.methods.outcome import unlearn
from expunge.parts.prompts import denoising_errors, word_table
from expunge.tasks.denoiser import Denoiser


def table(
    target: str, methods: Sequence[str], prompts: int, attack: UnlearnDiffAtk, seed: int = 0, p4d: bool = False,
    bench: Bench | None = None, references: bool = True,
) -> list[dict[str, Any]]:  # fmt: skip
    """One row per model: success rates (shares of the prompts), the words that won, seconds of the search."""
    bench = bench or mini()
    case = bench.case(target, seed)
    tries = attack.allowed(case.model, case)
    models: list[tuple[str, Any]] = []
    if references:
        models = [("original", case.model), ("retrained", bench.retrained(seed, target))]
    for name in methods:
        ((_, settings),) = configured(bench, target, [(name, TEXT.get(name, {}))])
        models.append((name, unlearn(case, name, seed=seed, floor=None, **settings).model))
    controls = [RandomPrefix(prompts, tries, attack.tokens), NewSeeds(prompts, tries), OtherWordings(prompts)]
    if p4d:
        controls.append(EmbeddingSearch(prompts, tries, attack.timesteps, attack.iterations, 1, attack.tokens))  # type: ignore[arg-type]
    rows = []
    for name, model in models:
        start = time.process_time()
        found = attack.attempts(model, case, seed)
        row: dict[str, Any] = {
            "model": name, "n": len(asked(case, prompts)), "pre": found.before.mean(), "UnlearnDiffAtk": found.after.mean(),
            "seconds": time.process_time() - start, "won by": [p for p in found.prompts if p],
        }  # fmt: skip
        row |= {control.name: control.attempts(model, case, seed).after.mean() for control in controls}
        print({k: round(float(v), 3) if hasattr(v, "__float__") else v for k, v in row.items()}, flush=True)
        rows.append(row)
    return rows


def speed(model: Any | None = None, timesteps: int = 7, repeats: int = 5) -> float:
    """Seconds of one loss pass and its gradient over all timesteps in one batch, over those of a loop over them; least of some
    repeats in turn. Both give the same errors and gradient."""
    from expunge.benchmarks.image_models import text_toy

    model = model or Denoiser(text_toy()).eval().requires_grad_(False)
    rng = torch.Generator().manual_seed(0)
    clean, noise = torch.randn(1, *model.shape, generator=rng), torch.randn(1, timesteps, *model.shape, generator=rng)
    times = torch.linspace(70, 930, timesteps).long()
    asked_, start = model.conditions.of(["a red three"]), word_table(model).weight[[20, 30]].detach()

    def batched() -> tuple[torch.Tensor, torch.Tensor]:
        words = start.clone().requires_grad_()
        errors = denoising_errors(model, clean, noise, times, model.encode(asked_, words))
        return errors.detach(), torch.autograd.grad(errors.mean(), words)[0]

    def looped() -> tuple[torch.Tensor, torch.Tensor]:
        words, total, found = start.clone().requires_grad_(), torch.zeros_like(start), []
        for i in range(timesteps):
            error = denoising_errors(model, clean, noise[:, i : i + 1], times[i : i + 1], model.encode(asked_, words))
            total += torch.autograd.grad(error.mean(), words)[0] / timesteps
            found.append(error.detach())
        return torch.cat(found, 1), total

    (e, g), (f, h) = batched(), looped()
    assert torch.allclose(e, f, rtol=1e-4) and torch.allclose(g, h, atol=1e-6), "the two ways disagree"
    best = [float("inf"), float("inf")]
    for _ in range(repeats):
        for place, run in enumerate((batched, looped)):
            began = time.process_time()
            run()
            best[place] = min(best[place], time.process_time() - began)
    return best[0] / best[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", default="table", choices=("table", "speed"))
    parser.add_argument("--target", default="red")
    parser.add_argument("--methods", default="uce,concept_ablation")
    parser.add_argument("--prompts", type=int, default=10)
    parser.add_argument("--tokens", type=int, default=2)
    parser.add_argument("--timesteps", type=int, default=7)
    parser.add_argument("--iterations", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--p4d", action="store_true")
    parser.add_argument("--erasers-only", action="store_true", help="leave out original and retrained")
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.what == "speed":
        print(f"batched over timesteps / loop: {speed():.2f}")
        return
    attack = UnlearnDiffAtk(given.prompts, timesteps=given.timesteps, iterations=given.iterations, tokens=given.tokens)
    methods = [name for name in given.methods.split(",") if name]
    table(given.target, methods, given.prompts, attack, given.seed, given.p4d, references=not given.erasers_only)


if __name__ == "__main__":
    main()
