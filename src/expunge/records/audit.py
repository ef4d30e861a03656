"""`audit(case, outcome)`: measure, attack, judge, and write it down.

An `Auditor` holds what all audits of one case share: the gold and its second seed (the noise floor), the passes of
`original` and `retrained` over the splits, and what each attack makes of them. Auditing ten methods attacks the references
once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from expunge.audits.asked import Spec, asked
from expunge.audits.attacks.budget import Attack, Budget
from expunge.audits.base import Measurement as Measured
from expunge.audits.base import checks as known_checks
from expunge.audits.base import run_checks
from expunge.audits.battery import attack_all, judge
from expunge.audits.golds import Gold, make_gold
from expunge.audits.intention import ObservedIntention, observed_intention
from expunge.audits.profiles import ProfileReport, find_profile, run_profile
from expunge.audits.subjects import Subjects
from expunge.audits.verdict import Thresholds, Verdict, proved
from expunge.cases.case import Case
from expunge.engine.rundir import machine, save_model, versions
from expunge.errors import BadModel, BadSetting
from expunge.files import write_atomic
from expunge.records.canonical import digest_ids, plain
from expunge.records.results import Results
from expunge.seeds import generator
from expunge.tasks.base import evaluating, move_to_model

if TYPE_CHECKING:
    from rich.table import Table

    from expunge.methods.outcome import Outcome

Report = Callable[[str, int, int], None]

EXPENSIVE = (
    "ain", "relearn_time", "extraction_likelihood", "prompt_generation", "worst_of_n", "odd_answers", "lm_eval",
)  # fmt: skip
"""Checks that train further models or write many answers; asked for by name, or run by a profile."""


WITHOUT_GOLD = Verdict(
    "inconclusive", "no retrained model to compare with, so nobody can say what a model would do that never saw it",
    advice="give the folder of a model trained without the data as gold, and another seed of it as the noise floor, or a recipe",
)  # fmt: skip


@dataclass(frozen=True)
class Audit:
    """results: everything measured, as `results.json` holds it. outcome: what was audited. intention: what the attacks say
    of the method's claim; None where none ran. profile: the checklist, where one was asked for."""

    results: Results
    verdict: Verdict
    outcome: Outcome
    gold: Gold
    intention: ObservedIntention | None = None
    profile: ProfileReport | None = None

    def table(self) -> Table:
        """Original, unlearned, retrained, floor and gap of every measurement, for a terminal."""
        from expunge.records.terminal import results_table

        return results_table(self.results)

    def __str__(self) -> str:
        from expunge.records.terminal import as_text

        lines = [
            f"{self.verdict.verdict}: {self.verdict.reason}",
            *map(str, filter(None, (self.intention, self.profile))),
        ]
        return as_text(self.table(), *lines)

    def report(self, path: str | Path) -> Path:
        """Write the page a person reads."""
        from expunge.records.report import write_report

        return write_report(path, self.results)

    def save(self, folder: str | Path, key: str | Path | None = None) -> Path:
        """results.json, report.html, model/ and certificate.json in one folder, and profile.json where there is one.

        key: the private key that signs the certificate; default: `signing-key.pem` beside the folder, made if missing.
        """
        from expunge.records.certificate import certify
        from expunge.records.keys import new_key

        folder = Path(folder)
        self.results.save(folder / "results.json")
        self.report(folder / "report.html")
        if self.profile is not None:
            write_atomic(folder / "profile.json", json.dumps(plain(self.profile.as_dict()), indent=1) + "\n")
        save_model(self.outcome.model, folder / "model")
        self.outcome.case.data.save_beside(folder / "model")
        key = Path(key) if key is not None else folder.parent / "signing-key.pem"
        if not key.exists():
            new_key(key)
        forget = self.outcome.case.split("forget")
        certify(
            self.results, folder / "certificate.json", key, config=self.outcome.record["method"],
            ids=forget.ids.tolist(), row_digests=forget.data.row_digests(forget.ids),
            weight_files=sorted((folder / "model").glob("*.safetensors")), gold=_about(self.gold),
        )  # fmt: skip
        return folder

    def enter(self, url: str, folder: str | Path | None = None) -> str:
        """Write the request, this run and the model's lineage into a ledger (any SQLAlchemy URL); returns the run's id.

        A request of the same rows of the same data that is still open is served by this run instead of being entered twice.
        """
        from expunge.errors import BadRequest
        from expunge.records.ledger import Ledger

        case, results, forget = self.outcome.case, self.results, self.outcome.case.split("forget")
        request, before, after = case.describe()["request"], results.weights.before, results.weights.after
        if before is None or after is None:
            raise BadRequest(
                "expected the digests of the weights in the results, found none; audit an outcome of unlearn()"
            )
        fingerprint, ids = case.data.fingerprint(), forget.ids.tolist()
        with Ledger(url) as ledger:
            digest = digest_ids(ids)
            known = next((r.id for r in ledger.open_requests(fingerprint) if r.ids_digest == digest), None)
            if known is None:
                rows = case.data.row_digests(forget.ids)
                known = ledger.record_request(fingerprint, request["kind"], request["summary"], ids, rows).id
            run = ledger.record_run(
                known, results.method.name, results.method.settings, results.seeds.model_dump(), self.verdict.verdict,
                results.cost.model_dump(), None if folder is None else str(Path(folder) / "results.json"),
                closes=self.verdict.verdict.startswith("removed"),
            )  # fmt: skip
            ledger.record_model(before, fingerprint)
            if after != before:
                ledger.record_model(after, fingerprint, before, run)
        return run


class Auditor:
    """Audits of one case against one gold.

    Args:
        gold: "retrain", "clean_label", "ensemble", "closed_form", "residual"; or a `Gold`, or a retrained model; or "none": then
            nothing is attacked, and the verdict is inconclusive unless the method brings a proof.
        floor: a second gold of another seed, where `gold` was given as a model.
        checks: names, or {"name": ..., **settings} (or a mapping name -> settings); "default" among them, and the default,
            stands for all that serve the task and whose needs the case meets, but those that train further models.
        attacks: active attacks by name, as {"name": ..., **settings} or as objects; default (or True): the whole battery;
            False: none, and then nothing can be called removed. budget: what each may spend, a `Budget` or its fields; an
            attack's or a check's own `budget` goes before it.
        thresholds: of the verdict. seed: of gold, attacks and bootstrap. cache: a folder where golds are kept.
        shadows: models per ensemble for the checks that need distributions (U-LiRA, RMIA, KLoM, challenge score); 0 for
            none. The method is then run on as many originals. ensembles: your own, see `Subjects`.
        profile: a named checklist to run as well ("open_problems"), with the audit's budget. facts: what it cannot measure,
            such as `group` or `guard` (see `run_profile`). reruns: requests, sizes, seeds and hostile requests that its rows
            on streams try; 0 for none. Each is a further run of the method.
    """

    def __init__(
        self,
        case: Case,
        *,
        gold: str | Gold | nn.Module = "retrain",
        floor: Gold | nn.Module | None = None,
        gold_settings: Mapping[str, Any] | None = None,
        checks: Iterable[Spec] | Mapping[str, Mapping[str, Any] | None] | None = None,
        attacks: bool | Sequence[Spec | Attack] | None = None,
        budget: Budget | Mapping[str, Any] | None = None,
        thresholds: Thresholds | None = None,
        seed: int = 0,
        cache: str | Path | None = None,
        shadows: int = 0,
        ensembles: Mapping[str, Any] | None = None,
        report: Report | None = None,
        profile: str | None = None,
        facts: Mapping[str, Any] | None = None,
        reruns: int = 0,
    ):
        if profile is not None:
            find_profile(profile)
        self.profile, self.facts, self.reruns = profile, dict(facts or {}), reruns
        self.case, self.seed, self.thresholds, self.report = case, seed, thresholds or Thresholds(), report
        self.asked = asked(checks, attacks, budget, case.task.name)
        self.attacks, self.budget = self.asked.attacks, self.asked.budget
        self.ensembles, self.shadows = dict(ensembles or {}), shadows
        if shadows:
            from expunge.records.shadows import reference_ensembles

            self._tell(f"training {3 * shadows} shadow models at once", 0, 1)
            self.ensembles |= reference_ensembles(case, shadows, seed)
        self.gold, self.floor = self._golds(gold, floor, dict(gold_settings or {}), cache)
        self._shared: Subjects | None = None
        self._attacked: dict[Any, Any] = {}

    def _golds(self, gold: Any, floor: Any, settings: dict[str, Any], cache: Any) -> tuple[Gold, Gold | None]:
        for name, given in (("gold", gold), ("floor", floor)):
            model = given.model if isinstance(given, Gold) else given
            if isinstance(model, nn.Module):
                self._fits(name, model)
        if gold == "none":
            return Gold("none"), None
        if isinstance(gold, str):
            self._tell("retraining the gold", 0, 2)
            first = make_gold(gold, self.case, self.seed + 1001, cache, **settings)
            second = floor
            if second is None and first.model is not None and gold in ("retrain", "clean_label", "ensemble"):
                self._tell("retraining the gold's second seed", 1, 2)
                # the next seed's gold, so that audits of consecutive seeds share trainings through the cache
                second = make_gold(gold, self.case, self.seed + 1002, cache, **settings)
            return first, _as_gold(second)
        return _as_gold(gold), _as_gold(floor)  # type: ignore[return-value]

    def _fits(self, name: str, model: nn.Module) -> None:
        """A given reference must answer the case's rows as the original does: the same outputs, one by one."""
        task, batch = self.case.task, self.case.data.fetch(self.case.data.telling_rows())
        problems = task.problems(model, batch)
        if not problems:
            here, there = (self._shape(m) for m in (self.case.model, model))
            problems = [] if here == there else [f"expected outputs of shape {here} for a row, found {there}"]
        if problems:
            raise BadModel(
                f"expected as {name} a model of the same kind as the case's, found one that does not fit its rows: "
                + "; ".join(problems)
                + "; give a model retrained from the same architecture and vocabulary"
            )

    def _shape(self, model: nn.Module) -> tuple[int, ...]:
        """What a model says about one row."""
        with evaluating(model):
            batch = self.case.task.prepare(
                self.case.data.fetch(self.case.data.telling_rows()), generator(self.seed, "shape")
            )
            batch = move_to_model(batch, model)
            return tuple(self.case.task.forward(model, batch).prediction.shape[1:])

    def subjects(self, unlearned: nn.Module) -> Subjects:
        """The compared models; passes of all but the unlearned one are shared between audits."""
        made = Subjects(
            self.case, self.case.model, unlearned, self.gold, self.floor, seed=self.seed, ensembles=self.ensembles
        )
        if self._shared is not None:
            made.share(self._shared)
        self._shared = made
        return made

    def chosen(self, subjects: Subjects) -> list[str]:
        """The checks that will run: those asked for; by default every one whose needs are met."""
        found, battery = known_checks(kind=self.case.task.name), {attack.name for attack in self.attacks}
        return self.asked.wanted(
            name
            for name, item in found.items()
            if name not in EXPENSIVE
            and (name in battery or "budget" not in item.settings)
            and all(subjects.unmet(need) is None for need in item.needs)
        )

    def _settings(self, name: str) -> dict[str, Any]:
        """A check's settings: the audit's budget, the attack as it was asked for, and what was set for the check itself."""
        known = known_checks()[name].settings
        found: dict[str, Any] = {}
        if "budget" in known:
            found["budget"] = self.budget.of(name)
        own = [attack for attack in self.attacks if attack.name == name]
        if "attack" in known and own:
            found["attack"] = own[0]
        return found | self.asked.settings.get(name, {})

    def audit(self, outcome: Outcome) -> Audit:
        """Measure, attack and judge one outcome of this case."""
        if outcome.case.request != self.case.request or outcome.case.data is not self.case.data:
            raise BadSetting(
                "expected an outcome of the auditor's own case, found one of another request or other data; "
                "make an Auditor for that case"
            )
        subjects = self.subjects(outcome.model)
        if self.shadows:
            from expunge.records.shadows import unlearned_ensemble

            subjects.ensembles["unlearned"] = unlearned_ensemble(
                self.case, outcome, self.ensembles["original"], self.seed
            )
        names = self.chosen(subjects)
        settings = {name: self._settings(name) for name in names}
        attacks = attack_all(
            subjects,
            self.attacks if subjects.unmet("retrained") is None else (),
            self.budget,
            lambda a: self._tell(a.name, 0, len(self.attacks)),
            memory=self._attacked,
        )
        measured = run_checks(
            subjects, names, settings, progress=lambda c: self._tell(c.name, names.index(c.name), len(names))
        )
        if self.gold.kind == "none":
            verdict = (proved(outcome.proof, self.thresholds) if outcome.proof else None) or WITHOUT_GOLD
        else:
            verdict = judge(subjects, self.attacks, self.budget, self.thresholds, outcome.proof)
        intention = profile = None
        if attacks and subjects.unmet("retrained") is None:
            intention = observed_intention(subjects, outcome.record["method"]["intention"], attacks)
        if self.profile is not None:
            facts = {"seconds": outcome.record["cost"]["seconds"], "retrain_seconds": self.gold.seconds or None,
                     "weights": outcome.record["weights"], "again": self._again(outcome), "reruns": self.reruns}  # fmt: skip
            profile = run_profile(
                self.profile,
                subjects,
                self.budget,
                settings=self.asked.settings,
                facts=facts | self.facts,
                progress=lambda q: self._tell(f"{q.id} {q.text}", 0, 1),
            )
        results = self._results(outcome, subjects, measured, verdict, intention)
        return Audit(results, verdict, outcome, self.gold, intention, profile)

    def _again(self, outcome: Outcome) -> Callable[[Case, int, Any], Outcome]:
        """The outcome's method on another case, seed or state."""
        from expunge.methods.outcome import unlearn

        which: Any = outcome.method or outcome.action
        return lambda case, seed, state: unlearn(case, which, seed=seed, state=state)

    def _results(
        self,
        outcome: Outcome,
        subjects: Subjects,
        measured: list[Measured],
        verdict: Verdict,
        intention: ObservedIntention | None,
    ) -> Results:
        told = verdict.as_record()
        if intention is not None:
            told["numbers"] |= {"observed_intention": {"observed": intention.observed, "sentence": str(intention)}}
        record, registry = outcome.record, known_checks()
        attacks = {name for name, item in registry.items() if item.attack}
        retrain = self.gold.seconds or None
        return Results.from_dict(
            {
                "schema": "expunge.results/1",
                "case": record["case"],
                "method": record["method"],
                "seeds": {"training": None, "unlearning": record["seeds"]["unlearning"], "audit": self.seed},
                "versions": versions(),
                "machine": {k: v for k, v in machine().items() if v is not None},
                "cost": {
                    "seconds": record["cost"]["seconds"],
                    "retrain_seconds": retrain,
                    "peak_memory_mb": record["cost"]["peak_memory_mb"],
                },
                "measurements": [m.as_dict() for m in measured if m.check not in attacks],
                "attacks": [m.as_dict() for m in measured if m.check in attacks],
                "verdict": told,
                "history": record["history"],
                "warnings": record["warnings"],
                "weights": record["weights"],
                "plots": _plots(subjects, measured, record["history"]),
            },
            "the audit",
        )

    def _tell(self, text: str, done: int, total: int) -> None:
        if self.report is not None:
            self.report(text, done, total)


def audit(case: Case, outcome: Outcome, **settings: Any) -> Audit:
    """Measure, attack and judge one outcome. settings: those of `Auditor`; make one yourself to audit several outcomes."""
    return Auditor(case, **settings).audit(outcome)


def _as_gold(which: Any) -> Gold | None:
    if which is None or isinstance(which, Gold):
        return which
    if isinstance(which, nn.Module):
        return Gold("closed_form", which)
    raise BadSetting(
        f"expected a gold's name, a Gold or a retrained model, found {type(which).__name__}; pass one of these"
    )


def _about(gold: Gold) -> str:
    seed = "" if gold.seed is None else f", seed {gold.seed}"
    return f"{gold.kind}{seed}" + (f", {gold.seconds:.1f} s" if gold.seconds else "")


def _plots(subjects: Subjects, measured: list[Measured], history: list[dict[str, Any]]) -> dict[str, Any]:
    """Arrays for the report: losses by split, ROC curves, accuracy by class, training curves."""
    import numpy as np

    shown = [s for s in ("original", "unlearned", "retrained") if s in subjects.models]
    splits = [s for s in ("forget", "retain", "holdout", "test") if subjects.unmet(s) is None]
    rng = np.random.default_rng(0)

    def sample(values: np.ndarray) -> list[float]:
        few = values if len(values) <= 1000 else rng.choice(values, 1000, replace=False)
        return [float(f"{v:.5g}") for v in few]

    plots: dict[str, Any] = {
        "loss_histograms": {split: {s: sample(subjects.losses(s, split)) for s in shown} for split in splits},
        "roc": {
            f"{m.check}: {m.name}" if m.name != m.check else m.check: {
                s: {"fpr": c["fpr"], "tpr": c["tpr"]} for s, c in m.curves.items() if s in shown and "fpr" in c
            }
            for m in measured
            if m.curves and any(isinstance(c, Mapping) and "fpr" in c for c in m.curves.values())
        },
        "curves": [
            {"step": h["step"], "epoch": h["epoch"], **h["losses"], **h.get("measured", {})}
            for h in _thin(history, 400)
        ],
    }
    if subjects.task.name == "classification" and "test" in splits:
        unseen = [s for s in ("test", "holdout") if s in splits]
        answers = np.concatenate([subjects.answers(s) for s in unseen])
        count = int(subjects.predictions("original", "test").shape[1])
        plots["per_class"] = {
            s: [
                float(hits[answers == c].mean()) if (answers == c).any() else None
                for hits in [np.concatenate([subjects.predictions(s, u).argmax(1) for u in unseen]) == answers]
                for c in range(count)
            ]
            for s in shown
        }
    return plots


def _thin(history: list[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    stride = max(1, len(history) // most)
    return [h for i, h in enumerate(history) if i % stride == 0 or "measured" in h]
