"""Membership of texts: who was in the training data, by scores of tokens (language attacks card, section 1).

Members are the forget rows, others the holdout, which must be of the same kind: against a holdout of another topic or time
the numbers measure the topic. The aim is the retrained model's value, not 0.5. Six scores come from the one pass that all
checks share; `membership_passes` adds those that need more.

    privleak = 100 ((1 - A) - (1 - A_r)) / (1 - A_r),  A = AUC of Min-40%, A_r the retrained model's

-100: the forget rows are as visible as can be; above 0: they are less familiar than rows never seen, which leaks as well.
MUSE (arXiv 2407.06460) reports 1 - A for A, and hard-codes A_r of its released models; here A_r is always measured.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

from expunge.audits.attacks import membership as rules
from expunge.audits.base import Measured, Measurement, check
from expunge.audits.metrics import token_statistics as stats
from expunge.audits.metrics.intervals import bootstrap, wilson
from expunge.audits.metrics.tofu import privleak as leak
from expunge.cases.data import Split
from expunge.errors import BadSetting, nearest
from expunge.seeds import generator

if TYPE_CHECKING:
    from expunge.audits.subjects import Subjects

ONE_PASS = ("loss", "zlib", "min_k_20", "min_k_40", "min_k_pp_20", "min_k_pp_40")
MORE_PASSES = ("reference", "lower_case", "recall", "gradnorm")
RATES = {0.001: "01pct", 0.01: "1pct", 0.05: "5pct"}
FACTS: dict[str, Any] = {
    "direction": "match", "range": (0.0, 1.0), "attack": True, "kinds": ("language",),
    "needs": ("retrained", "forget", "holdout"),
}  # fmt: skip

Scores = Callable[[str, str], np.ndarray]
"""(subject, split) -> (n,), higher = more likely a member."""


@check(
    "token_membership", source="Min-K%, arXiv 2310.16789; Min-K%++, arXiv 2404.02936; zlib, arXiv 2012.07805", **FACTS
)
def token_membership(subjects: Subjects, scores: Sequence[str] = ONE_PASS) -> list[Measurement]:
    """AUC and true positive rates at 0.1, 1 and 5% false positives of six scores from one pass, forget against holdout."""
    have = subjects.signals("original", "forget")
    return [
        row
        for name in scores
        if name in have or name != "zlib"  # rows made from tokens alone have no compressed text
        for row in _suite(subjects, name, lambda subject, split, name=name: subjects.signal(subject, split, name))
    ]


@check("membership_passes", source="arXiv 2012.07805; ReCaLL, arXiv 2406.15968; arXiv 2402.17012", **FACTS)
def membership_passes(
    subjects: Subjects,
    scores: Sequence[str] = MORE_PASSES,
    reference: str = "floor",
    shots: int = 12,
    norm: float = 2.0,
) -> list[Measurement]:
    """The same of scores that need a pass of their own: against a reference model, lower-cased, after context, gradients.

    reference: the subject that serves as reference model; the second retrained seed where there is one, else `retrained`
    (whose own AUC is then 0.5 by construction). shots: non-members before each text of `recall`, drawn from the holdout and
    taken out of its scores, as many as the context holds. norm: of gradients, 1, 2 or infinity.
    """
    wrong = [name for name in scores if name not in MORE_PASSES]
    if wrong:
        raise BadSetting(
            f"expected scores among {', '.join(MORE_PASSES)}, found '{wrong[0]}'.{nearest(wrong[0], MORE_PASSES)} Use them."
        )
    made = {
        "reference": lambda: _reference(subjects, reference if reference in subjects.models else "retrained"),
        "lower_case": lambda: _lower_case(subjects),
        "recall": lambda: _recall(subjects, shots),
        "gradnorm": lambda: _gradnorm(subjects, norm),
    }
    return [row for name in scores for row in _suite(subjects, name, *made[name]())]


@check(
    "privleak", unit="%", direction="match", range=(-100.0, None), attack=True, kinds=("language",),
    needs=("retrained", "forget", "holdout"), source="MUSE, arXiv 2407.06460; TOFU as open-unlearning computes it",
)  # fmt: skip
def privleak(subjects: Subjects, signal: str = "min_k_40") -> list[Measurement]:
    """Privacy leakage: how far the AUC of Min-40% is from the retrained model's, relative to it; 0 ideal.

    Of the rows to forget and of the holdout; of the probes `privleak_forget` and `privleak_holdout` where the benchmark gives them."""
    given = all(subjects.unmet(f"probe:privleak_{split}") is None for split in ("forget", "holdout"))
    splits = [f"probe:privleak_{split}" if given else split for split in ("forget", "holdout")]

    def beside(subject: str) -> list[np.ndarray]:
        """Rows of forget and of holdout, each with the subject's score and the retrained model's."""
        return [
            np.stack([subjects.signal(subject, split, signal), subjects.signal("retrained", split, signal)], axis=1)
            for split in splits
        ]

    def statistic(members: np.ndarray, others: np.ndarray) -> float:
        return leak(rules.auc(members[:, 0], others[:, 0]), rules.auc(members[:, 1], others[:, 1]))

    area = rules.auc(*(part[:, 1] for part in beside("retrained")))
    note = f"retrained AUC {area:.3f}; below 0 the forget rows stand out as members, above 0 as strangers"
    return [privleak.measurement(subjects.measure(beside, statistic), split="forget", note=note)]


def _suite(subjects: Subjects, name: str, scores: Scores, note: str = "") -> list[Measurement]:
    def pair(subject: str) -> list[np.ndarray]:
        return [scores(subject, "forget"), scores(subject, "holdout")]

    area = subjects.measure(
        pair, rules.auc, lambda members, others: rules.auc_interval(members, others, subjects.seed, subjects.resamples)
    )
    lists = {subject: pair(subject)[0].tolist() for subject in subjects.compared}
    area = Measured(area.values, area.intervals, lists)
    found = [token_membership.measurement(area, name=f"membership_{name}_auc", split="forget", unit="auc", note=note)]
    for limit, rate in RATES.items():
        holdout = len(pair("original")[1])
        coarse = f"{holdout} holdout examples cannot resolve this rate: no false positive allowed"
        said = "; ".join(part for part in (note, "" if holdout * limit >= 1 else coarse) if part)
        measured = subjects.measure(
            pair,
            lambda members, others, limit=limit: rules.tpr_at_fpr(members, others, limit),
            lambda members, others, limit=limit: _rate_interval(members, others, limit, subjects),
        )
        found.append(
            token_membership.measurement(
                measured, name=f"membership_{name}_tpr_at_{rate}_fpr", split="forget", unit="rate", note=said
            )
        )
    return found


def _rate_interval(members: np.ndarray, others: np.ndarray, limit: float, subjects: Subjects) -> tuple[float, float]:
    """The wider end, on each side, of the bootstrap and of Wilson's interval, which has a width where all members are found."""

    def rate(a: np.ndarray, b: np.ndarray) -> float:
        return rules.tpr_at_fpr(a, b, limit)

    drawn, share = bootstrap((members, others), rate, subjects.seed, subjects.resamples), rate(members, others)
    own = wilson(share, len(members))
    return min(drawn[0], own[0]), max(drawn[1], own[1])


def _mean_log_likelihood(subjects: Subjects, what: str, subject: str, split: str, change: Callable[[Split], Split]):
    def run(model: nn.Module, rows: Split) -> np.ndarray:
        return stats.token_statistics(subjects.task, model, change(rows)).log_likelihood

    return subjects.over(what, subject, split, run)


def _reference(subjects: Subjects, reference: str) -> tuple[Scores, str]:
    def scores(subject: str, split: str) -> np.ndarray:
        return stats.reference_score(subjects.signal(subject, split, "loss"), subjects.signal(reference, split, "loss"))

    return scores, f"reference model: {reference}, whose own AUC is 0.5 by construction"


def _lower_case(subjects: Subjects) -> tuple[Scores, str]:
    def scores(subject: str, split: str) -> np.ndarray:
        lowered = _mean_log_likelihood(subjects, "lower case", subject, split, stats.lower_cased)
        return stats.lower_case_score(subjects.signal(subject, split, "loss"), lowered)

    return scores, ""


def _recall(subjects: Subjects, shots: int) -> tuple[Scores, str]:
    """The shots are drawn once and no longer count among the non-members."""
    forget, holdout = subjects.split("forget"), subjects.split("holdout")
    order = torch.randperm(len(holdout), generator=generator(subjects.seed, "recall"))[: min(shots, len(holdout) // 2)]
    texts = [holdout.data.column("input_ids")[i] for i in holdout.ids[order].tolist()]
    longest = max(len(part.data.column("input_ids")[i]) for part in (forget, holdout) for i in part.ids.tolist())
    context = getattr(getattr(subjects.model("original"), "config", None), "max_position_embeddings", None)
    kept = stats.shots_that_fit(texts, longest, context)
    rest = torch.ones(len(holdout), dtype=torch.bool)
    rest[order] = False
    prefix = [token for text in kept for token in text]

    def scores(subject: str, split: str) -> np.ndarray:
        after = _mean_log_likelihood(
            subjects,
            ("recall", len(prefix), subjects.seed),
            subject,
            split,
            lambda rows: stats.after_prefix(rows, prefix),
        )
        found = stats.recall_score(after, subjects.signal(subject, split, "loss"))
        return found[rest.numpy()] if split == "holdout" else found

    return scores, f"{len(kept)} of {shots} shots fit into the context, {len(prefix)} tokens"


def _gradnorm(subjects: Subjects, norm: float) -> tuple[Scores, str]:
    def scores(subject: str, split: str) -> np.ndarray:
        return -subjects.over(
            ("gradnorm", norm), subject, split,
            lambda model, rows: stats.gradient_norms(subjects.task, model, rows, norm),
        )  # fmt: skip

    return scores, ""
