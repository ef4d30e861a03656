"""Blindspot: on the forget rows, imitate a proxy that never saw them; on the others, keep fitting.

Paper: "Deep Regression Unlearning", Tarun et al., ICML 2023, https://arxiv.org/abs/2210.08196. The proxy B is a
fresh model trained on the retain data for a few epochs, then frozen. All rows are passed shuffled together; with c
the share of forget rows in a batch:

    L_r = loss(M(x_r), y_r)
    L_f = loss(M(x_f), B(x_f)) + lam sum_l d(a_l^M(x_f), a_l^B(x_f)),   d(a, b) = mean( (A(a) - A(b))^2 )
    L   = (1 - c) L_r + c L_f

A(a) is the attention map: squares, averaged over channels, normalised. The forget rows' labels are not used. The
batch weights c and 1 - c are in the code, not in the paper. Departure: the layers compared are all hidden
activations, found by running the model; the official models return the list by hand. On other kinds of model the
task's own divergence stands for `loss`.
"""

from __future__ import annotations

from typing import Annotated

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.parts.architecture import hidden_layers
from expunge.parts.objectives import fit, match, match_features
from expunge.parts.plan import Auxiliary, Optimizer, Plan, Term


@method(
    family="tuned", needs=("retain", "labels"), intention="removal", mechanism="distillation",
    paper="Tarun et al., ICML 2023, 2210.08196",
)  # fmt: skip
def blindspot(
    case: Case,
    lam: Annotated[float, setting("weight of the attention distance", ge=0)] = 50.0,
    lr: Annotated[float, setting("Adam's step size", gt=0)] = 1e-3,
    epochs: Annotated[int, setting("passes over all training data", ge=1)] = 1,
    batch_size: Annotated[int, setting("rows per step", ge=1)] = 256,
    proxy_epochs: Annotated[int, setting("passes that train the proxy on retain data", ge=1)] = 2,
    proxy_lr: Annotated[float, setting("Adam's step size for the proxy", gt=0)] = 1e-2,
    layers: Annotated[tuple[str, ...] | None, setting("layers compared; default: all hidden activations")] = None,
) -> Plan:
    """Distil a proxy that is blind to the forget rows into the model, on those rows."""
    compared = hidden_layers(case.task, case.model, case.data) if layers is None else layers
    attention = (
        (Term(match_features(compared, "proxy", "attention"), on="forget", weight=lam),) if compared and lam else ()
    )
    proxy = Plan(
        Term(fit(), on="retain"), trains=Auxiliary("proxy", lambda case, seed: case.fresh(seed)),
        optimizer=Optimizer("adam", lr=proxy_lr), epochs=proxy_epochs, batch_size=batch_size,
    )  # fmt: skip
    student = Plan(
        Term(fit(), on="retain"), Term(match("proxy"), on="forget"), *attention,
        rhythm="mixed", optimizer=Optimizer("adam", lr=lr), epochs=epochs, batch_size=batch_size,
    )  # fmt: skip
    return Plan(phases=(proxy, student))
