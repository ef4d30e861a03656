"""AltPO: prefer a plausible other answer to the true one, so that the model goes on answering.

Paper: Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", COLING
2025, https://arxiv.org/abs/2409.13474.

    the loss of `dpo`, with y_a one of the row's alternative answers in place of a refusal

The alternatives (five per question in the paper) are written by the model that is to forget, asked for plausible wrong answers;
they come with the data (`question_answer(..., alternates=...)`), and one is drawn for every row at every step. The paper
searches beta in .05, .1, .5, lr in 1e-5, 2e-5, 5e-5, alpha in 1, 2, 5, for two epochs; the defaults are the middle of the
first two and the least alpha.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.objectives import dpo as preference
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "alternates"), kinds=("language",), intention="suppression",
    mechanism="preference", paper="Mekala et al., COLING 2025, 2409.13474",
)  # fmt: skip
@finetuning(lr=2e-5, epochs=2)
def altpo(
    beta: Annotated[float, setting("inverse temperature", gt=0)] = 0.1,
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Prefer the row's alternative answers to the true one, and the retain loss."""
    return Plan(Term(preference(beta, "alternates"), on="forget", weight=gamma), *stay(alpha, average))
