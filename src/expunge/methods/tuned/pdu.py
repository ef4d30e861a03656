"""PDU: flatten the logits where the forget answers are predicted, under a bound on the retain loss.

Paper: Entesari et al., "Constrained Entropic Unlearning: A Primal-Dual Framework for Large Language Models",
https://arxiv.org/abs/2506.05314.

    min_theta  gamma * E_{D_f} mean_t (max_v z_v - mean_v z_v)^2    subject to   CE(D_r) <= bound
    lambda <- max(0, lambda + rate (CE(D_r batch) - bound))      after every step, once `after` epochs have passed

The bound has to suit the model: a little above the retain loss that the original has (0.3 for the paper's 1B model on TOFU); the
forget loss is a square of logits and large, so that lambda starts at 50 to 100. Departures: positions are those that predict
the answer (the framework's mask is one too late: it drops the first answer token and takes in what follows the last). The
framework's other rule, one dual step per epoch over the whole loader, is not here. The step size is the 7B models'.
"""

from __future__ import annotations

from typing import Annotated

from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import Average, Gamma, finetuning
from expunge.parts.objectives import fit, flatten_logits
from expunge.parts.plan import Plan, Term
from expunge.parts.schedules import Multiplier


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="constraint",
    paper="Entesari et al., 2025, 2506.05314",
)  # fmt: skip
@finetuning()
def pdu(
    bound: Annotated[float, setting("largest retain loss, in nats", ge=0)] = 0.3,
    start: Annotated[float, setting("multiplier of the retain loss at the start", ge=0)] = 100.0,
    rate: Annotated[float, setting("step of the multiplier, per nat above the bound", gt=0)] = 5.0,
    after: Annotated[int, setting("epochs before the multiplier moves", ge=0)] = 5,
    gamma: Gamma = 1.0, average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Flat logits on forget, the retain loss kept below a bound by a multiplier."""
    return Plan(
        Term(flatten_logits(average), on="forget", weight=gamma),
        Term(fit(average), on="retain", weight=Multiplier(bound, start, rate, after)),
    )  # fmt: skip
