"""The committed tables of language methods on the embedded model: every method at one budget, and again at one forget level.

    python -m expunge.benchmarks.language_tables fixed      # 80 updates each (or what a row says), 3 seeds
    python -m expunge.benchmarks.language_tables matched    # each method stopped where forget probability reaches 0.05
    python -m expunge.benchmarks.language_tables attacks    # what each attack brought back in the runs of `fixed`; reads them alone
    python -m expunge.benchmarks.language_tables muse       # MUSE on two embedded plays, one budget; written to muse.md
    python -m expunge.benchmarks.language_tables scaling    # MUSE's scalability and sustainability there; written to muse.md
    python -m expunge.benchmarks.language_tables sam        # NPO with and without SAM, relearned; 5 seeds, sign test
    python -m expunge.benchmarks.language_tables cost       # processor time of every row of `fixed` over retraining's, without audits
    python -m expunge.benchmarks.language_tables matched --only 'npo;wga' --seed 1 --run-only    # a share of the work, for one process

A row is a triple: forget, retain, relearned (the score on unseen nine tenths of the forget rows after a few updates on the other
tenth), beside `original` and `retrained`. Settings are the cards' calibration for a model of this size (step 3e-4, 8 + 8 rows),
not chosen per method: the tables show what methods do at one budget, not which is best at its best. Finished runs are kept under
runs/language and read back, so that a killed bench goes on.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from expunge.audits.attacks.budget import Budget
from expunge.benchmarks import table_file
from expunge.benchmarks.measuring import kept
from expunge.benchmarks.muse import HEADINGS, MEASURES, nano_muse, scaling
from expunge.benchmarks.nano import nano_tofu
from expunge.benchmarks.table_file import spread
from expunge.benchmarks.tables import heading
from expunge.benchmarks.tofu import NANO_SETTINGS
from expunge.benchmarks.trained import cache_home
from expunge.engine import fit
from expunge.errors import BadData
from expunge.files import write_atomic
from expunge.methods import find
from expunge.methods.outcome import unlearn
from expunge.parts.plan import Plan
from expunge.parts.stops import reaches
from expunge.records.audit import Auditor
from expunge.records.comparison import Comparison
from expunge.records.results import Results
from expunge.records.terminal import markdown

SLOW = {"lr": 2e-4, "epochs": 20, "schedule": "constant"}
"""The longer, gentler budget of the cards: 160 updates."""

FIXED: dict[str, tuple[str, dict[str, Any]]] = {
    "fine_tune": ("fine_tune", {"lr": 0.05, "epochs": 5, "batch_size": 16}),
    "grad_ascent": ("grad_ascent", {}),
    "grad_diff": ("grad_diff", {}),
    "kl_min": ("kl_min", {}),
    "npo": ("npo", {}),
    "npo, gentle": ("npo", {"beta": 0.03, **SLOW}),
    "simnpo": ("simnpo", {"gamma": 1.0}),
    "dpo": ("dpo", {}),
    "idk": ("idk", {}),
    "undial": ("undial", {"alpha": 1.0}),
    "ceu": ("ceu", {}),
    "wga": ("wga", {}),
    "satimp": ("satimp", {}),
    "pdu": ("pdu", {"bound": 0.05, "after": 0}),
    "rmu": ("rmu", {}),
    "llmu": ("llmu", {}),
    "flat, total variation": ("flat", {"lr": 1e-4}),
    "flat, kl": ("flat", {"lr": 1e-4, "divergence": "kl"}),
    "flat, jensen-shannon": ("flat", {"lr": 1e-4, "divergence": "jensen_shannon"}),
    "flat, pearson": ("flat", {"lr": 1e-4, "divergence": "pearson"}),
    "loku": ("loku", {"rank": 8}),
    "sha256": ("sha256", {"lr": 1e-3, "blocks": (0, 1)}),
    "npo, for sam": ("npo", {"beta": 0.05, **SLOW}),
    "smooth_npo, sam": ("smooth_npo", {"smoother": "sam", "rho": 0.05, "beta": 0.05, **SLOW}),
    "smooth_npo, rs": ("smooth_npo", {"smoother": "rs", "sigma": 1e-3, "beta": 0.05, **SLOW}),
    "smooth_npo, gp": ("smooth_npo", {"smoother": "gp", "lam": 0.1, "mu": 0.05, "beta": 0.05, **SLOW}),
    "smooth_npo, cr": ("smooth_npo", {"smoother": "cr", "lam": 0.05, "mu": 0.05, "beta": 0.05, **SLOW}),
    "smooth_npo, wa": ("smooth_npo", {"smoother": "wa", "beta": 0.05, **SLOW}),
    "altpo": ("altpo", {"new_tokens": 64}),
    "lat": ("lat", {"steps": 8, "repeats": 1}),
    "task_vector": ("task_vector", {"alpha": 1.0}),
    "uld": ("uld", {"blocks": 1, "lr": 1e-3, "batch_size": 8, "schedule": "linear", "warmup": 0.1}),
    "whp": ("whp", {}),
}  # fmt: skip
"""label -> method and what it has of its own beside the shared budget."""

LONGER = (
    "npo", "simnpo", "dpo", "idk", "undial", "llmu", "loku", "lat", "flat, total variation", "flat, kl", "flat, jensen-shannon",
    "flat, pearson",
)  # fmt: skip
"""Rows that may go on for `LONG` passes in the search of the level: at the fixed budget some seed of theirs does not reach it."""

LONG = 30

REACHING: dict[str, dict[str, Any]] = {
    "npo": {"schedule": "constant"}, "simnpo": {"schedule": "constant", "beta": 0.5}, "dpo": {"schedule": "constant", "beta": 0.05},
    "idk": {"schedule": "constant", "lr": 1e-3}, "undial": {"schedule": "constant", "lr": 1e-3, "beta": 20.0},
}  # fmt: skip
"""What rows of the search of the level have of their own: with the fixed budget's settings no seed of theirs reaches it in `LONG`
passes."""

MUSE = (
    "fine_tune", "grad_ascent", "grad_diff", "kl_min", "npo", "npo, gentle", "simnpo", "undial", "wga", "satimp", "rmu", "task_vector",
    "whp",
)  # fmt: skip
"""Rows of MUSE's table: the benchmark's own methods and those that are strong on the other."""

UNLIMITED = (
    "fine_tune",
    "task_vector",
    "uld",
    "whp",
    "smooth_npo, rs",
    "smooth_npo, gp",
    "smooth_npo, cr",
    "smooth_npo, wa",
)
"""Rows that are not stopped at a level: without an update-by-update path from original to unlearned, or smoothers, whose card compares
them at equal steps (SAM alone is in both tables)."""

LEVEL = 0.05
CHECKS = [
    "probability", "exact_memorisation", "extraction_strength", "truth_ratio", "forget_quality", "model_utility", "privleak",
    "benign_relearning", "relearning", "quantisation_8", "quantisation_4", "logit_lens", "prompt_templates",
]  # fmt: skip
ATTACKS = ["benign_relearning", "relearning", "quantisation_8", "quantisation_4", "logit_lens", "prompt_templates"]
MATCHED_CHECKS, MATCHED_ATTACKS = ["probability", "exact_memorisation", "privleak", "relearning"], ["relearning"]
"""The triple alone: its verdict rests on relearning and membership."""
BUDGET = Budget(steps=6, examples=0.1, learning_rate=5e-4, batch_size=16)
"""Relearning as on the attacks card: a few updates at 5e-4 on 6 of the 60 forgotten rows; more updates harm `retrained` as well."""

FOLDER = Path("runs/language")


def settings(label: str) -> tuple[str, dict[str, Any]]:
    """The method of a row and all its settings."""
    name, own = FIXED[label]
    known = find(name).settings.model_fields
    return name, {k: v for k, v in NANO_SETTINGS.items() if k in known} | own


def one(label: str, seed: int, auditor: Auditor, folder: Path, level: float | None = None) -> Results:
    """One row of one seed, from its folder where it is kept."""
    file = folder / _folder(label) / f"seed{seed}.json"
    if file.exists():
        return Results.load(file)
    name, chosen = settings(label)
    case = auditor.case
    if level is None:
        outcome = unlearn(case, name, seed=seed, floor=None, **chosen)
    else:
        if label in LONGER:
            chosen |= {"epochs": max(LONG, chosen["epochs"])}
        chosen |= REACHING.get(label, {})
        configured = find(name).configure(**chosen)
        action = configured.action(case)
        assert isinstance(action, Plan)
        stop = reaches(level, key="probability", split="forget", every=2)
        outcome = unlearn(
            case, action.with_(stop=stop if action.stop is None else action.stop | stop), seed=seed, floor=None
        )
        outcome.record["method"] |= {
            "name": name,
            "settings": {**configured.values, "until": f"forget probability {level}"},
        }
    results = auditor.audit(outcome).results
    results.save(file)
    return results


def auditor_of(seed: int, kind: str) -> Auditor:
    if kind == "muse":
        return Auditor(nano_muse(seed), seed=seed, cache=cache_home() / "muse", checks=[*MEASURES, *ATTACKS], attacks=ATTACKS,
                       budget=BUDGET)  # fmt: skip
    testbed = nano_tofu(seed)
    checks, attacks = (CHECKS, ATTACKS) if kind == "fixed" else (MATCHED_CHECKS, MATCHED_ATTACKS)
    return Auditor(testbed.case, seed=seed, cache=testbed.cache, checks=checks, attacks=attacks, budget=BUDGET)


def table(kind: str, seeds: Sequence[int], labels: Sequence[str], folder: Path) -> Comparison:
    """All rows and seeds of one table."""
    found = []
    for seed in seeds:
        auditor = auditor_of(seed, kind)
        for label in labels:
            began = time.perf_counter()
            found.append(one(label, seed, auditor, folder / kind, LEVEL if kind == "matched" else None))
            print(f"{kind} seed {seed} {label}: {time.perf_counter() - began:.0f} s", file=sys.stderr, flush=True)
    return Comparison.of(found, command=f"python -m expunge.benchmarks.language_tables {kind}")


def attacked(folder: Path = FOLDER / "fixed", labels: Sequence[str] = tuple(FIXED)) -> str:
    """Mean forget score after each attack in the kept runs of `fixed`, the claimed intention and what was measured."""
    files = [f for label in labels for f in sorted((folder / _folder(label)).glob("seed*.json"))]
    if not files:
        raise BadData(
            f"expected runs in {folder}, found none; make them: python -m expunge.benchmarks.language_tables fixed"
        )
    found = Comparison.of(files)
    keys = {key[0]: key for key in found.keys() if key[1] == "forget_score"}  # noqa: SIM118
    shown = [name for name in ATTACKS if name in keys]
    lines = ["| model | " + " | ".join(name.replace("_", " ") for name in shown) + " | claims | verdict |"]
    lines.append("|---" * (len(shown) + 3) + "|")
    for subject in ("original", "retrained"):
        values = found.shared(subject)
        lines.append("| " + " | ".join([subject, *(_cell(values.get(keys[name])) for name in shown), "", ""]) + " |")
    for row in found.rows():
        cells = [_cell(row.values.get(keys[name], {}).get("unlearned")) for name in shown]
        verdicts = [f"{word} {n}/{len(row.runs)}" if n < len(row.runs) else word for word, n in row.verdicts.items()]
        claim = find(row.runs[0].method.name).intention  # as the registry has it, whatever it was when the run was made
        lines.append("| " + " | ".join([row.label, *cells, claim, ", ".join(verdicts)]) + " |")
    return "\n".join(lines) + "\n"


def _cell(summary: Any) -> str:
    if summary is None:
        return ""
    half = "" if summary.high is None else f" ±{summary.high - summary.mean:.3f}"
    return f"{summary.mean:.3f}{half}"


def _folder(label: str) -> str:
    return label.replace(", ", "-").replace(" ", "-")


def rows_of(kind: str) -> list[str]:
    """The rows of a table."""
    if kind == "muse":
        return list(MUSE)
    return [label for label in FIXED if kind == "fixed" or label not in UNLIMITED]


def sam(seeds: Sequence[int] = range(5)) -> tuple[str, str]:
    """NPO (beta 0.05, 160 updates) with and without SAM (rho 0.05) on forget, then relearned: a table and its sign test.

    Originals of seeds 0, 1, 2, 0, 1; five seeds of unlearning and relearning.
    """
    from scipy.stats import binomtest

    budget = Budget(steps=24, examples=0.2, learning_rate=1e-4, batch_size=4)
    lines = ["| model | P forget | P retain | relearned |", "|---|---|---|---|"]
    wins, pairs = 0, []
    for seed in seeds:
        testbed = nano_tofu(seed % 3)
        case = testbed.case
        attack = [a for a in _relearning() if a.name == "relearning"][0]
        golds = attack.scores(testbed.retrained.model, case, budget, seed)  # type: ignore[arg-type]
        lines.append(f"| seed {seed}, retrained | {_p(case, testbed.retrained.model, 'forget')} | "
                     f"{_p(case, testbed.retrained.model, 'retain')} | {golds.mean():.3f} |")  # fmt: skip
        back = {}
        for label in ("npo, for sam", "smooth_npo, sam"):
            name, chosen = settings(label)
            model = unlearn(case, name, seed=seed, floor=None, **chosen).model
            back[label] = float(attack.scores(model, case, budget, seed).mean())
            arm = "npo" if name == "npo" else "npo + sam"
            lines.append(
                f"| seed {seed}, {arm} | {_p(case, model, 'forget')} | {_p(case, model, 'retain')} | {back[label]:.3f} |"
            )
        wins += back["smooth_npo, sam"] < back["npo, for sam"]
        pairs.append((back["npo, for sam"], back["smooth_npo, sam"]))
        print(f"sam seed {seed}: {pairs[-1]}", file=sys.stderr, flush=True)
    ratio = float(np.mean([b / a for a, b in pairs]))
    p = binomtest(wins, len(pairs), alternative="greater").pvalue
    said = f"SAM came back less in {wins} of {len(pairs)} seeds (sign test p = {p:.3g}); mean ratio {ratio:.2f}."
    return "\n".join(lines) + "\n", said


SCALED = ("grad_ascent", "grad_diff", "npo, gentle")
"""Rows of MUSE's scalability and sustainability: destroys, destroys later, keeps."""


def scaled(
    seeds: Sequence[int], labels: Sequence[str] = SCALED, folds: int = 4, folder: Path = FOLDER / "scaling"
) -> str:
    """A row for each method, way of asking and step: mean over seeds, ± half a 95% t-interval, of MUSE's four scores."""
    shown: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        case = nano_muse(seed)
        for label in labels:
            name, chosen = settings(label)
            file = folder / _folder(label) / f"seed{seed}.json"
            for way, steps in kept(file, partial(scaling, case, name, chosen, seed, folds)).items():
                for step in steps:
                    row = shown.setdefault(f"{label}, {way} {step['step']}", {key: [] for key in HEADINGS})
                    gold = shown.setdefault(
                        f"retrained without {step['step']} of {folds}", {key: [] for key in HEADINGS}
                    )
                    for key, score in step["scores"].items():
                        row[key].append(score["unlearned"][0])
                        if (label, way) == (labels[0], "scalability"):
                            gold[key].append(score["retrained"][0])
            print(f"scaling seed {seed} {label}", file=sys.stderr, flush=True)
    lines = ["| model | " + " | ".join(HEADINGS.values()) + " |", "|---" * (len(HEADINGS) + 1) + "|"]
    ordered = sorted(shown, key=lambda row: not row.startswith("retrained"))
    lines += [
        f"| {row} | " + " | ".join(spread(shown[row][key]) for key in HEADINGS) + " |" for row in ordered
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def costs(seeds: Sequence[int], labels: Sequence[str] = tuple(FIXED), folder: Path = FOLDER / "cost") -> str:
    """Processor time of each row's request over that of the recipe on the retain rows: mean over seeds, ± half a 95% t-interval."""

    def timed(seed: int, label: str) -> float:
        case = nano_tofu(seed).case
        began = time.process_time()
        if label == "retrained":
            fit(case, "retain", seed + 1001)
        else:
            name, chosen = settings(label)
            unlearn(case, name, seed=seed, floor=None, **chosen)
        return time.process_time() - began

    spent: dict[str, list[float]] = {label: [] for label in ("retrained", *labels)}
    for seed in seeds:
        for label, seconds in spent.items():
            seconds.append(kept(folder / _folder(label) / f"seed{seed}.json", partial(timed, seed, label)))
            print(f"cost seed {seed} {label}: {seconds[-1]:.1f} s", file=sys.stderr, flush=True)
    lines = ["| model | seconds | cost |", "|---|---|---|"]
    lines += [
        f"| {label} | {spread(seconds)} | {spread([s / r for s, r in zip(seconds, spent['retrained'], strict=True)])} |"
        for label, seconds in spent.items()
    ]
    return "\n".join(lines) + "\n"


def _relearning() -> Any:
    from expunge.audits.battery import default_attacks

    return default_attacks("language")


def _p(case: Any, model: Any, split: str) -> str:
    return f"{case.task.evaluate(model, case.split(split).batches())['probability']:.3f}"


def told(label: str, own: dict[str, Any]) -> str:
    """`npo, gentle: beta=0.03, lr=0.0002`."""
    return f"{label}: " + ", ".join(f"{key}={value}" for key, value in own.items())


OWN = "; ".join(told(label, own) for label, (_, own) in FIXED.items() if own)
NOTES = {
    "fixed": "All rows at one budget: AdamW 3e-4, 10 passes of the 60 forget rows in batches of 8 with 8 retain rows (80 updates), "
    f"linear decay, clip 1; what rows have of their own: {OWN}. Not ranked by forget quality: grad_diff-like rows reach it "
    "while the model is destroyed.",
    "matched": f"Each method stopped where the mean forget probability first reaches {LEVEL}, looked at every second update. At the "
    f"first crossing the shortest path dominates; read it beside the fixed budget. Up to 240 updates: {'; '.join(LONGER)}; the others "
    f"as there. Of their own, since at the fixed budget's settings they do not come that far: "
    f"{'; '.join(told(label, own) for label, own in REACHING.items())}. Verdicts rest on relearning and membership alone.",
    "muse": "Two of Shakespeare's plays (60 windows of 64 tokens to forget, 240 to keep, every second forget window held out), the "
    "embedded model; one budget as in language.md's `fixed`. Questions are clozes (the model answers no few-shot prompt), so KnowMem is "
    "the F1 of a passage's next 8 tokens. Aims: VerbMem and KnowMem f at retrained's, PrivLeak at 0, KnowMem r high.",
    "scaling": "One request for the first 1 to 4 quarters of the forget texts (scalability), and a request for each quarter in turn, from "
    "the model that the last one left (sustainability), on the texts and at the budget of `muse`; measured on all that is to be gone by "
    "then, beside a model retrained without it.",
    "attacks": "Mean probability of the forgotten answers after each attack, in the runs of `fixed`: an epoch on kept rows, six updates on "
    "six forgotten rows, rounding to 8 and 4 bits, the best layer's logit lens, other wordings of the prompt. Verdict: of the whole audit.",
    "cost": "Processor time of a request alone (no audit, one thread), in seconds and over that of retraining, in one process: settings "
    "as in `fixed`. Whatever a method prepares is in it: reference log-likelihoods, generated alternatives, a reinforced or assistant "
    "model, traced layers.",
    "sam": "Relearning on 12 forget rows (AdamW 1e-4, batches of 4, 24 updates), scored on the other 48.",
}


def main(arguments: list[str] | None = None) -> None:
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(prog="python -m expunge.benchmarks.language_tables", description=__doc__)
    parser.add_argument("kind", choices=("fixed", "attacks", "matched", "muse", "scaling", "cost", "sam"))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seed", type=int, help="this seed alone")
    parser.add_argument("--only", default="", help="labels with semicolons between; default: all")
    parser.add_argument("--run-only", action="store_true", help="keep the runs, write no table")
    chosen = parser.parse_args(arguments)
    began = time.perf_counter()
    note, of_muse = NOTES[chosen.kind], chosen.kind in ("muse", "scaling")
    seeds = range(chosen.seeds) if chosen.seed is None else [chosen.seed]
    if chosen.kind == "sam":
        body, said = sam()
        note = f"{note} {said}"
    elif chosen.kind == "attacks":
        body = attacked()
    elif chosen.kind == "scaling":
        body = scaled(seeds)
    elif chosen.kind == "cost":
        body = costs(seeds)
    else:
        labels = [x.strip() for x in chosen.only.split(";") if x.strip()] or rows_of(chosen.kind)
        body = markdown(table(chosen.kind, seeds, labels, FOLDER))
    if chosen.run_only:
        return
    out = Path("benchmarks-results") / ("muse.md" if of_muse else "language.md")
    told = f"{chosen.kind} --only '{chosen.only}'" if chosen.only else chosen.kind
    made = f"`python -m expunge.benchmarks.language_tables {told}` in {time.perf_counter() - began:.0f} s"
    section = table_file.Section.of(note, body, made)
    old = out.read_text("utf-8") if out.exists() else ""
    sections = table_file.merge(old, {chosen.kind: section}, False, {})
    title = "language: MUSE on two plays" if of_muse else "language: nano-TOFU"
    write_atomic(out, table_file.write(heading(title), sections))
    print(body)


if __name__ == "__main__":
    main()
