"""AltPO: prefer a plausible other answer to the true one, so that the model goes on answering.

Paper: Mekala et al., "Alternate Preference Optimization for Unlearning Factual Knowledge in Large Language Models", COLING
2025, https://arxiv.org/abs/2409.13474.

    the loss of `dpo`, with y_a one of the row's alternative answers in place of a refusal

The alternatives (five per question) are written by the model that is to forget, asked for a plausible answer with other facts and
sampled at temperature 1 (`parts.alternates`), or are the data's own (`question_answer(..., alternates=...)`); one is drawn for
every row at every step. The request's wording is ours; sampling is plain, where the official code leaves top-p and top-k to
the model's configuration. The paper searches beta in .05, .1, .5, lr in 1e-5, 2e-5, 5e-5, alpha in 1, 2, 5, for two epochs;
the defaults are the middle of the first two and the least alpha.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.errors import UnmetNeed
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Alpha, Average, Gamma, finetuning, stay
from expunge.parts.alternates import Writing
from expunge.parts.objectives import dpo as preference
from expunge.parts.plan import Plan, Term

Source = Literal["auto", "given", "written"]


@method(
    family="tuned", needs=("retain", "labels", "alternates"), kinds=("language",), intention="suppression",
    mechanism="preference", paper="Mekala et al., COLING 2025, 2409.13474",
)  # fmt: skip
@finetuning(lr=2e-5, epochs=2)
def altpo(
    case: Case,
    beta: Annotated[float, setting("inverse temperature", gt=0)] = 0.1,
    answers: Annotated[Source, setting("the data's own alternatives, written ones, or (auto) written where the data has none")] = "auto",
    count: Annotated[int, setting("answers to write for each question", ge=1)] = 5,
    temperature: Annotated[float, setting("of their sampling", gt=0)] = 1.0,
    new_tokens: Annotated[int, setting("of a written answer, at most", ge=1)] = 200,
    folder: Annotated[str | None, setting("where written answers are kept; they are made from forget data")] = None,
    gamma: Gamma = 1.0, alpha: Alpha = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Prefer alternative answers to the true one, and the retain loss."""
    own = getattr(case.data, "alternates", None) is not None
    if answers == "given" and not own:
        raise UnmetNeed(
            "expected data with alternative answers, found none; pass question_answer(..., alternates=[[...], ...]) or "
            "answers='written'"
        )
    write = answers == "written" or (answers == "auto" and not own)
    how = Writing(count, temperature, new_tokens, folder=folder) if write else None
    return Plan(Term(preference(beta, "alternates", writing=how), on="forget", weight=gamma), *stay(alpha, average))
