"""Prompts that are searched for, on the embedded TOFU model: what each search brings back of the forgotten answers.

    python -m expunge.benchmarks.prompt_search                       # three seeds (EXPUNGE_DATA)
    python -m expunge.benchmarks.prompt_search --seeds 0 --out ''

GCG suffixes and soft prompts, found on a tenth of the forget rows and scored on the rest (a prompt that opens the model), and soft
prompts found and scored on each row (an upper bound: it may write the answer itself). One budget on `original`, unlearned models
(settings of language.md's `fixed`), `retrained` and another seed of it. A number is the mean probability of the forgotten
answers; `brought back` is what a search adds to a model less what it adds to `retrained` on the same rows.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from expunge.audits.attacks.budget import Attack, forget_scores
from expunge.audits.attacks.soft_prompt import SoftPrompt
from expunge.audits.attacks.suffix import SuffixSearch
from expunge.benchmarks.language_tables import BUDGET, settings
from expunge.benchmarks.measuring import kept, options, publish, spelled, table
from expunge.benchmarks.nano import nano_tofu
from expunge.benchmarks.table_file import spread
from expunge.methods.outcome import unlearn

ATTACKS: tuple[Attack, ...] = (SuffixSearch(), SoftPrompt(), SoftPrompt(each=True))
METHODS = ("npo", "npo, gentle", "grad_diff", "wga", "idk")
PLAIN = "no attack"

Found = dict[str, dict[str, tuple[np.ndarray, np.ndarray]]]
"""attack -> model -> (before, after), each (m,) on the same rows."""


def brought_back(scores: Mapping[str, tuple[np.ndarray, np.ndarray]], name: str) -> float:
    """What the attack adds to a model less what it adds to `retrained`, mean over rows."""
    (before, after), (base, gold) = scores[name], scores["retrained"]
    return float(((after - before) - (gold - base)).mean())


def measure(seed: int, methods: Sequence[str] = METHODS, attacks: Sequence[Attack] = ATTACKS) -> Found:
    """Scores of one seed."""
    testbed = nano_tofu(seed)
    case, models = testbed.case, {"original": testbed.case.model}
    for label in methods:
        name, chosen = settings(label)
        models[label] = unlearn(case, name, seed=seed, floor=None, **chosen).model
    models |= {"retrained": testbed.retrained.model, "second retrained": testbed.second.model}
    plain = {name: forget_scores(model, case, case.split("forget"), seed) for name, model in models.items()}
    found: Found = {PLAIN: {name: (scores, scores) for name, scores in plain.items()}}
    for attack in attacks:
        places, began = attack.places(case, BUDGET, seed), time.perf_counter()
        found[attack.name] = {
            name: (plain[name] if places is None else plain[name][places], attack.scores(model, case, BUDGET, seed))
            for name, model in models.items()
        }
        print(f"seed {seed} {attack.name}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return found


def seed_of(seed: int, folder: Path) -> Found:
    """`measure`, kept in the folder."""

    def lists() -> dict[str, dict[str, list[list[float]]]]:
        found = measure(seed)
        return {attack: {m: [s.tolist() for s in pair] for m, pair in rows.items()} for attack, rows in found.items()}

    read = kept(folder / f"seed{seed}.json", lists)
    return {attack: {m: (np.array(b), np.array(a)) for m, (b, a) in rows.items()} for attack, rows in read.items()}


def markdown(seeds: Sequence[Found]) -> tuple[str, str]:
    """The table of probabilities, and of what was brought back: means over seeds, ± half a 95% t-interval."""
    first = seeds[0]
    shown = [
        {"model": name}
        | {attack: spread([float(found[attack][name][1].mean()) for found in seeds]) for attack in first}
        for name in first[PLAIN]
    ]
    back = [
        {"model": name}
        | {
            attack: spread([brought_back(found[attack], name) for found in seeds])
            for attack in first
            if attack != PLAIN
        }
        for name in first[PLAIN]
        if name != "retrained"
    ]
    return table(shown), table(back)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = options("prompt_search", __doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--folder", type=Path, default=Path("runs/prompt_search"), help="where each seed's scores are kept"
    )
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(1)
    began = time.perf_counter()
    shown, back = markdown([seed_of(seed, chosen.folder) for seed in chosen.seeds])
    body = (
        f"Mean probability of the forgotten answers after each search; {len(chosen.seeds)} seeds, mean ± half a 95% t-interval. GCG: 10 "
        "tokens, 20 steps of 64 candidates; soft prompt: 8 vectors, 50 steps of Adam; both are found on 6 of the 60 forget rows and "
        f"scored on the other 54, `_each` is found and scored on every row.\n\n{shown}\n"
        f"Brought back: what the search adds, less what it adds to `retrained`.\n\n{back}"
    )
    publish("prompt_search", spelled("prompt_search", arguments), time.perf_counter() - began, body, chosen.out or None)


if __name__ == "__main__":
    main()
