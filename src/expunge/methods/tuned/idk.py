"""Refusal tuning: fine-tune on "I don't know" for what goes, beside the true answers of what stays.

Paper: Maini et al., "TOFU: A Task of Fictitious Unlearning for LLMs", COLM 2024, https://arxiv.org/abs/2401.06121.

    min_theta  gamma * E_{x in D_f} CE(refusal|x) + alpha * CE(D_r)

A refusal is drawn anew for every row at every step. The knowledge is covered, not removed: the true answer's probability hardly
falls (0.45 on a small model). Departure: two means over tokens, weighted; the legacy code concatenates both batches in ONE
mean over tokens, where a refusal counts by its few tokens: gamma = (refusal tokens) / (answer tokens) has its balance. On
other kinds of model `answers` names the task's own way to draw another answer.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import relabel
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "refusals"), intention="suppression", mechanism="relabel",
    paper="Maini et al., COLM 2024, 2401.06121",
)  # fmt: skip
@finetuning()
def idk(
    answers: Annotated[str, setting("the answers to learn: a relabel policy of the task")] = "refusal",
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Learn to refuse on forget, and the retain loss."""
    return Plan(Term(relabel(answers, average=average), on="forget", weight=gamma), *stay(alpha, average))
