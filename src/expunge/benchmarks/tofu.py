"""TOFU from one command: methods x seeds on forget01/05/10, with `original` and `retrained` beside them.

    expunge bench tofu --methods npo,simnpo --seeds 3                        the embedded small Llama, minutes on two cores
    expunge bench tofu --model FOLDER --retrained FOLDER --split forget10    your own model, fine-tuned on TOFU's `full`

The protocol is open-unlearning's (2506.12618): `original` has learned all authors, `retrained` all but the last ones, and
probability, ROUGE-L recall, truth ratio, model utility, forget quality, privleak, extraction strength and exact
memorisation say how far the unlearned model is from either. No method is ranked by forget quality alone: a model that is
on its way to ruin passes through it.

The embedded model is `nano.py`'s: it knows only its slice of TOFU, so that general knowledge (real authors, world facts) is left
out and model utility has three components of nine.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from expunge.audits import find_check
from expunge.audits.battery import find_attacks
from expunge.benchmarks.nano import FORGET_AUTHORS, nano_tofu
from expunge.cases import Case, requests
from expunge.cases.loading import load_model, load_tokenizer
from expunge.cases.text import Template
from expunge.cases.tofu import PER_AUTHOR, SIZES, candidates, refusals, tofu, tofu_table
from expunge.errors import BadData, BadSetting, nearest
from expunge.methods import find
from expunge.parts.plan import Optimizer, Training
from expunge.records.compare import MethodSpec, compare
from expunge.records.comparison import Comparison

AUTHORS = 200
RECIPE = Training(
    epochs=5,
    batch_size=32,
    optimizer=Optimizer("adamw", lr=1e-5, weight_decay=0.01, clip=1.0, schedule="linear", warmup=0.2),
)
"""How TOFU's targets and golds are fine-tuned (open-unlearning's configuration), from the pre-trained model."""

NANO_SPLITS = {"nano": FORGET_AUTHORS, "forget01": FORGET_AUTHORS[1:]}
NANO_SETTINGS: dict[str, Any] = {
    "optimizer": "adamw", "lr": 3e-4, "epochs": 10, "batch_size": 8, "weight_decay": 0.01, "clip": 1.0, "schedule": "linear",
    "warmup": 1.25,
}  # fmt: skip
"""80 steps on the 60 forget rows: the fixed budget of the cards' calibration (baselines card), where a method has the setting."""

MEASURES = (
    "probability", "exact_memorisation", "extraction_strength", "truth_ratio", "forget_quality", "model_utility", "rouge",
    "token_membership", "privleak", "weight_difference",
)  # fmt: skip
"""What TOFU's table is made of. Those that the case cannot meet (no holdout) are left out."""


def tofu_case(
    model: str | Path,
    split: str = "forget10",
    *,
    tokenizer: str | Path | None = None,
    template: Template = None,
    max_length: int | None = None,
    recipe: Training | None = RECIPE,
) -> Case:
    """TOFU on a model of your own (a folder or a hub id), fine-tuned on `full`; the forget rows are the last of it.

    Holdout (rows of the forget kind never trained on) is TOFU's holdout split where it is at hand; without it privleak and
    membership have nothing to compare with and are left out.
    """
    if split not in SIZES:
        raise BadSetting(f"expected a TOFU split, one of {', '.join(SIZES)}, found '{split}'.{nearest(split, SIZES)}")
    words, network = load_tokenizer(tokenizer or model), load_model(model)
    table = partial(tofu_table, words, template=template, max_length=max_length)
    probe = partial(candidates, words, template=template, max_length=max_length)
    try:
        holdout = table(tofu(split.replace("forget", "holdout")), first_author=AUTHORS)
    except BadData:
        holdout = None
    return Case(
        network, table(tofu("full"), decline=refusals()),
        requests.where("author", ">=", AUTHORS - SIZES[split] // PER_AUTHOR), task="language", holdout=holdout, recipe=recipe,
        name=f"tofu-{split}", probes={
            "forget_perturbed": probe(tofu(f"{split}_perturbed")), "retain_perturbed": probe(tofu("retain_perturbed")),
            "real_authors": probe(tofu("real_authors_perturbed")), "world_facts": probe(tofu("world_facts_perturbed")),
        },
    )  # fmt: skip


def nano(split: str = "nano") -> Callable[[int], Case]:
    """The embedded testbed as a function of the seed."""
    if split not in NANO_SPLITS:
        raise BadSetting(
            f"expected a split of the embedded model, one of {', '.join(NANO_SPLITS)}, found '{split}'; its slice of TOFU has "
            "three authors to forget. Pass --model FOLDER for the larger splits"
        )
    return lambda seed: nano_tofu(seed, authors=NANO_SPLITS[split]).case


def configured(methods: Iterable[MethodSpec], shared: Mapping[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """Each method with the shared settings that it has; its own given ones come first."""
    found = []
    for item in methods:
        name, own = (item, {}) if isinstance(item, str) else (item[0], dict(item[1])) if isinstance(item, tuple) else (
            item["name"], {k: v for k, v in item.items() if k != "name"})  # fmt: skip
        known = find(name).settings.model_fields
        found.append((name, {k: v for k, v in shared.items() if k in known} | own))
    return found


def run(
    methods: Sequence[MethodSpec],
    split: str = "nano",
    seeds: Sequence[int] = (0,),
    *,
    model: str | Path | None = None,
    retrained: str | Path | None = None,
    second: str | Path | None = None,
    folder: str | Path = "runs/tofu",
    checks: Sequence[str] | None = None,
    attacks: bool | Sequence[str] | None = None,
    workers: int = 1,
    command: str = "",
    report: Callable[[str, int, int], None] | None = None,
    **settings: Any,
) -> Comparison:
    """The comparison of all methods and seeds, kept with its report in `folder`.

    attacks: the battery of language models by default (None); False for none; or names.

    model: a folder or hub id; default: the embedded testbed, one original for each seed. retrained, second: two seeds of the
        model that never learned the forget authors; default: trained by the recipe (hours for a large model).
    settings: of `tofu_case`, for a model of your own.
    """
    golds: dict[str, Any] = {}
    if model is None:
        case: Case | Callable[[int], Case] = nano(split)
        golds["cache"] = nano_tofu(seeds[0], authors=NANO_SPLITS[split]).cache
        methods = configured(methods, NANO_SETTINGS)
    else:
        case = tofu_case(model, split, **settings)
        golds["cache"] = Path(folder) / ".golds"
        for name, place in (("gold", retrained), ("second", second)):
            if place is not None:
                golds[name] = load_model(place)
    some = case if isinstance(case, Case) else case(seeds[0])
    return compare(
        case, methods, seeds, workers=workers, folder=folder, report=report, floor=None, command=command,
        checks=wanted(some, checks or MEASURES, attacks), attacks=attacks, **golds,
    )  # fmt: skip


def wanted(case: Case, checks: Sequence[str], attacks: bool | Sequence[str] | None) -> list[str]:
    """The checks that the case can meet, and those of the attacks that are run."""
    met = [name for name in checks if "holdout" in case.splits or "holdout" not in find_check(name).needs]
    battery = () if attacks is False else find_attacks(None if attacks in (None, True) else attacks, case.task.name)  # type: ignore[arg-type]
    serving = [a.name for a in battery if case.task.name in (find_check(a.name).kinds or (case.task.name,))]
    return met + [name for name in serving if name not in met]
