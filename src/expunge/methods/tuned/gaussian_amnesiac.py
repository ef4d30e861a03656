"""Gaussian-Amnesiac: give every forget row a random target of the training targets' distribution, and fine-tune on all.

Paper: "Deep Regression Unlearning", Tarun et al., ICML 2023, https://arxiv.org/abs/2210.08196.

    y'_i ~ N(mu, s^2) once for each i in D_f,   mu, s = mean and standard deviation of ALL training targets
    min_theta  mean over D_r and D_f together of loss(f(x), y or y')

The targets are drawn once, not anew per epoch (that would be a weaker method), and are not clipped to a valid range.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.parts.objectives import fit, relabel
from expunge.parts.plan import Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), kinds=("regression",), intention="removal", mechanism="relabel",
    paper="Tarun et al., ICML 2023, 2210.08196",
)  # fmt: skip
def gaussian_amnesiac(
    lr: Annotated[float, setting("Adam's step size", gt=0)] = 1e-3,
    epochs: Annotated[int, setting("passes over all training data", ge=1)] = 1,
    batch_size: Annotated[int, setting("rows per step", ge=1)] = 256,
) -> Plan:
    """Fine-tune on true retain targets and random forget targets, rows mixed."""
    return Plan(
        Term(relabel("marginal", draw="once"), on="forget"),
        Term(fit(), on="retain"),
        rhythm="mixed", optimizer=Optimizer("adam", lr=lr), epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
