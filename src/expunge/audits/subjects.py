"""The models under audit side by side, each run once over each split.

A pass runs one model over one split, in eval mode and without augmentation, and keeps what every check reads:
membership signals, losses, forget scores, predictions and the task's own utility. Whatever a stochastic task draws
(`task.prepare`) is drawn from the audit's seed and the split, so that all models see the same draws.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.audits.base import Measured
from expunge.audits.metrics.intervals import RESAMPLES, bootstrap, mean, wilson
from expunge.audits.passes import Pass, run_pass
from expunge.cases.data import Split
from expunge.errors import BadSetting, ExpungeError, MissingGold, UnmetNeed, nearest

if TYPE_CHECKING:
    from expunge.cases.case import Case

SUBJECTS = ("original", "unlearned", "retrained", "floor", "untrained")
COMPARED = ("original", "unlearned", "retrained", "floor")
PROBE = "probe:"
"""Before the name of a probe table, as a need and as a split: `probe:forget_perturbed`."""
PROBE_NEED = (
    "expected the case to have the probe table '{probe}', found {probes}; pass Case(probes={{'{probe}': data}})"
)

NEEDS: dict[str, str] = {
    "retrained": "expected a model retrained without the forget data, found none; pass Subjects(..., retrained=...), "
    "made by audits.make_gold('retrain', case) or another gold",
    "floor": "expected a second retrained model with another seed (the noise floor), found none; pass Subjects(..., "
    "floor=...), made by audits.make_gold('retrain', case, seed=another)",
    "untrained": "expected an untrained model, found none and the case cannot make one ({why}); pass Subjects(..., "
    "untrained=...) or Case(build=function that makes a fresh model)",
    "forget": "expected rows to forget, found an empty request; audit a request that names rows",
    "retain": "expected rows to keep, found none; audit a request that leaves some",
    "holdout": "expected data never seen but of the forget kind, found none; pass Case(holdout=...) or Case(test=...)",
    "test": "expected data never seen, found none; pass Case(test=...)",
    "kind_holdout": "expected a request that defines a kind (a class, a predicate) and unseen data of it, found none; "
    "request label(c) or where(...), and pass Case(test=...)",
    "exam": "expected questions to the model and judges of its answers, found none; pass Case(exam=Exam(cells, target, judges))",
    "exam_features": "expected a network of image features, found none; pass Exam(features=...)",
    "exam_reference": "expected real images without the target and a network of features, found none; pass "
    "Exam(features=..., reference=...)",
    "exam_clip": "expected the folder of a CLIP model, found none; pass Exam(clip=...)",
    "original_ensemble": "expected many models trained with the forget data, found none; pass Subjects(..., "
    "ensembles={{'original': ...}}), made by engine.ensemble",
    "unlearned_ensemble": "expected many unlearned models, found none; pass Subjects(..., "
    "ensembles={{'unlearned': ...}}), one unlearned from each model of an ensemble",
    "retrained_ensemble": "expected many models retrained without the forget data, found none; pass Subjects(..., "
    "ensembles={{'retrained': ...}}), made by engine.ensemble on the retain split",
}


class Subjects:
    """The compared models of one case.

    Args:
        case: the request, its splits and its task.
        original, unlearned: before and after. retrained: trained without the forget data (a model or a `Gold`).
        floor: a second retrained seed. untrained: default `case.fresh(seed)`, made when first asked for.
        ensembles: "original" | "unlearned" | "retrained" | "floor" -> many models' signals, models x examples: a
        mapping
            `{split: margins (M, n)}` or `{(split, signal): (M, n)}`, or an object with `.signals(split, signal)`.
        seed: of all draws of the audit (subsamples, attackers, bootstrap).
    """

    def __init__(
        self,
        case: Case,
        original: nn.Module,
        unlearned: nn.Module,
        retrained: Any = None,
        floor: Any = None,
        untrained: nn.Module | None = None,
        seed: int = 0,
        *,
        ensembles: Mapping[str, Any] | None = None,
        batch_size: int = 512,
        resamples: int = RESAMPLES,
    ):
        self.case, self.task, self.seed = case, case.task, seed
        self.batch_size, self.resamples = batch_size, resamples
        self.ensembles = dict(ensembles or {})
        given = {
            "original": original,
            "unlearned": unlearned,
            "retrained": retrained,
            "floor": floor,
            "untrained": untrained,
        }
        self.models: dict[str, nn.Module] = {}
        for name, model in given.items():
            model = model if isinstance(model, nn.Module) or model is None else getattr(model, "model", model)
            if model is not None:
                if not isinstance(model, nn.Module):
                    raise BadSetting(
                        f"expected '{name}' as a torch.nn.Module or a Gold, found {type(model).__name__}; pass one"
                    )
                self.models[name] = model
        self._memory: dict[Any, Any] = {}
        self._untrained_problem = ""

    # -- what there is ---------------------------------------------------------------------------------------------
    @property
    def compared(self) -> list[str]:
        """The subjects that a measurement compares and that are there."""
        return [name for name in COMPARED if name in self.models]

    def model(self, subject: str) -> nn.Module:
        """The model of a subject; `MissingGold` or `UnmetNeed` with the remedy where it is absent."""
        if subject not in SUBJECTS:
            raise BadSetting(
                f"expected a subject, one of {', '.join(SUBJECTS)}, found '{subject}'.{nearest(subject, SUBJECTS)} "
                "Use one of them."
            )
        text = self.unmet(subject)
        if text:
            raise (UnmetNeed if subject == "untrained" else MissingGold)(text)
        return self.models[subject]

    def unmet(self, need: str) -> str | None:
        """A sentence with the remedy if the need is not met, else None."""
        if need in ("original", "unlearned"):
            return None
        if need.startswith(PROBE):
            probe, probes = need.removeprefix(PROBE), self.case.probes
            met = probe in probes and len(probes[probe]) > 0
            return None if met else PROBE_NEED.format(probe=probe, probes=", ".join(probes) or "none")
        if need not in NEEDS:
            raise BadSetting(
                f"expected a need, one of {', '.join(NEEDS)}, probe:NAME, found '{need}'.{nearest(need, NEEDS)} Use one of them."
            )
        if need == "untrained":
            met = self._make_untrained()
        elif need in ("retrained", "floor"):
            met = need in self.models
        elif need.endswith("_ensemble"):
            met = need.removesuffix("_ensemble") in self.ensembles
        elif need.startswith("exam"):
            exam = self.case.exam
            parts = {"exam": (), "exam_features": ("features",), "exam_reference": ("features", "reference"),
                     "exam_clip": ("clip",)}[need]  # fmt: skip
            met = exam is not None and all(getattr(exam, part, None) is not None for part in parts)
        elif need == "kind_holdout":
            data = self.case.holdout if self.case.test is None else self.case.test
            met = self._rows("holdout") > 0 and self.case.request.kind(data) is not None
        else:
            met = self._rows(need) > 0
        return None if met else NEEDS[need].format(why=self._untrained_problem or "unknown")

    def _rows(self, split: str) -> int:
        try:
            return len(self.case.split(split))
        except ExpungeError:
            return 0

    def _make_untrained(self) -> bool:
        if "untrained" not in self.models and not self._untrained_problem:
            try:
                self.models["untrained"] = self.case.fresh(self.seed)
            except ExpungeError as error:
                self._untrained_problem = str(error)
        return "untrained" in self.models

    # -- passes ----------------------------------------------------------------------------------------------------
    def split(self, name: str) -> Split:
        """A split of the case, or all rows of a probe table (`probe:forget_perturbed`)."""
        if not name.startswith(PROBE):
            return self.case.split(name)
        data = self.case.probe(name.removeprefix(PROBE))
        return Split(name, data, torch.arange(len(data)))

    def over(self, what: Any, subject: str, split: str | Split, run: Callable[[nn.Module, Split], Any]) -> Any:
        """`run(model, split)` of a subject over a split (by name, or any `Split`), once and kept under the name `what`."""

        def make() -> Any:
            return run(self.model(subject), self.split(split) if isinstance(split, str) else split)

        return self.memo(("over", what, subject, split if isinstance(split, str) else _Same(split)), make)

    def over_all(
        self, what: Any, subject: str, splits: Sequence[str], run: Callable[[nn.Module, list[Split]], Sequence[Any]]
    ) -> list[Any]:
        """`over` for several splits by name that run together: `run(model, splits)` gives one result for each of them.
        Those already known under the name `what` are not run again."""
        keys = {split: ("over", what, subject, split) for split in splits}
        missing = [split for split, key in keys.items() if key not in self._memory]
        if missing:
            found = run(self.model(subject), [self.split(split) for split in missing])
            self._memory |= {keys[split]: value for split, value in zip(missing, found, strict=True)}
        return [self._memory[key] for key in keys.values()]

    def passed(self, subject: str, split: str | Split) -> Pass:
        """The pass of a subject over a split (by name, or any `Split`), run once and kept."""
        return self.over(
            "pass", subject, split, lambda model, rows: run_pass(self.task, model, rows, self.seed, self.batch_size)
        )

    def signals(self, subject: str, split: str | Split) -> dict[str, np.ndarray]:
        """Signal -> (n,), higher means more likely a member."""
        return self.passed(subject, split).signals

    def signal(self, subject: str, split: str | Split, name: str) -> np.ndarray:
        """One signal (n,); an error lists those the task has."""
        found = self.signals(subject, split)
        if name not in found:
            raise BadSetting(
                f"expected a signal of {self.task.name}, one of {', '.join(found)}, found "
                f"'{name}'.{nearest(name, found)} Use one of them."
            )
        return found[name]

    def forget_scores(self, subject: str, split: str | Split = "forget") -> np.ndarray:
        """(n,) higher means the model knows the example better; of a case with an exam: of each answer to the target's cells."""
        exam = self.case.exam
        if exam is not None and split == "forget":
            return self.over("recalled", subject, split, lambda model, _: exam.recalled(model))
        return self.passed(subject, split).forget_score

    def losses(self, subject: str, split: str | Split) -> np.ndarray:
        """(n,) the task's loss, lower is better fit."""
        return self.passed(subject, split).loss

    def evaluate(self, subject: str, split: str | Split) -> dict[str, float]:
        """The task's own metrics over the split."""
        return self.passed(subject, split).utility

    def answers(self, split: str | Split) -> np.ndarray:
        """(n,) true answers, where the task has them as one column."""
        found = self.passed("original", split).answers
        if found is None:
            raise UnmetNeed(
                f"expected true answers in one column, found none for {self.task.name}; leave this check out"
            )
        return found

    def predictions(self, subject: str, split: str | Split) -> np.ndarray:
        """Class probabilities (n, K) for classification, values (n,) or (n, D) for the other kinds."""
        found = self.passed(subject, split).predictions
        if found is None:
            raise UnmetNeed(
                f"expected one row of predictions for each example, found larger outputs from {self.task.name}; use "
                "checks on signals or losses instead"
            )
        return found

    def matrix(self, subject: str, split: str, signal: str = "margin") -> np.ndarray:
        """(M, n) a signal of an ensemble's M models on the n examples of a split."""
        source = self.ensembles.get(subject)
        if source is None:
            raise UnmetNeed(NEEDS.get(f"{subject}_ensemble", NEEDS["retrained_ensemble"]).format())
        if isinstance(source, Mapping):
            found = source.get((split, signal), source.get(split) if signal == "margin" else None)
            if found is None:
                raise UnmetNeed(
                    f"expected the ensemble '{subject}' to have ('{split}', '{signal}'), found "
                    f"{sorted(map(str, source))}; add it"
                )
        else:
            found = self.memo(
                ("matrix", subject, split, signal), lambda: source.signals(self.case.split(split), signal)
            )
        found = found.detach().cpu().numpy() if isinstance(found, torch.Tensor) else np.asarray(found)
        if found.ndim != 2 or found.shape[1] != len(self.case.split(split)):
            raise BadSetting(
                f"expected the ensemble '{subject}' as (models, {len(self.case.split(split))}) on {split}, found "
                f"{found.shape}; give one row per model and one column per example of the split"
            )
        return found.astype(np.float64)

    # -- measuring -------------------------------------------------------------------------------------------------
    def measure(
        self,
        sample: Callable[[str], np.ndarray | Sequence[np.ndarray]],
        statistic: Callable[..., float] = mean,
        interval: Callable[..., tuple[float, float]] | None = None,
    ) -> Measured:
        """`statistic` of each compared subject, with 95% intervals over examples.

        sample: subject -> one array, or several that are resampled apart (forget and holdout scores), rows are
        examples.
        interval: the same arguments as `statistic` -> (low, high); default: `bootstrap`.
        """
        values, intervals = {}, {}
        for subject in self.compared:
            groups = sample(subject)
            groups = (groups,) if isinstance(groups, np.ndarray) else tuple(groups)
            values[subject] = float(statistic(*groups))
            intervals[subject] = (
                bootstrap(groups, statistic, self.seed, self.resamples) if interval is None else interval(*groups)
            )
        return self._against_floor(values, intervals)

    def proportion(self, right: Callable[[str], np.ndarray], scale: float = 1.0, flip: bool = False) -> Measured:
        """Share of examples where `right(subject)` (n,) is 1, times `scale`, with Wilson's interval; `flip`: 1 -
        share."""
        values, intervals = {}, {}
        for subject in self.compared:
            hits = np.asarray(right(subject), dtype=np.float64)
            share = float(1 - hits.mean() if flip else hits.mean())
            values[subject] = scale * share
            low, high = wilson(share, len(hits))
            intervals[subject] = (scale * low, scale * high)
        return self._against_floor(values, intervals)

    def compute(self, value: Callable[[str], float]) -> Measured:
        """A number of each compared subject that has no examples to resample."""
        return self._against_floor({subject: float(value(subject)) for subject in self.compared}, {})

    def _against_floor(self, values: dict[str, float], intervals: dict[str, tuple[float, float]]) -> Measured:
        if "floor" in values:
            values = values | {"floor": abs(values["floor"] - values["retrained"])} if "retrained" in values else values
            intervals.pop("floor", None)
        return Measured(values, intervals)

    def share(self, other: Subjects) -> None:
        """Take over what ran over splits of all models but the unlearned one, from an audit of the same references."""
        for key, value in other._memory.items():
            ran = isinstance(key, tuple) and key[0] == "over" and key[2] != "unlearned"
            if ran and self.models.get(key[2]) is other.models.get(key[2]):
                self._memory[key] = value

    def memo(self, key: Any, make: Callable[[], Any]) -> Any:
        """`make()`, once for each key."""
        if key not in self._memory:
            self._memory[key] = make()
        return self._memory[key]


class _Same:
    """A key that is equal only for the very same object, and keeps it alive."""

    def __init__(self, thing: Any):
        self.thing = thing

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and other.thing is self.thing

    def __hash__(self) -> int:
        return id(self.thing)
