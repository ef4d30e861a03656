"""EraseDiff: keep denoising the rest, under the constraint that the forget condition is answered as another.

Paper: "EraseDiff: Erasing Data Influence in Diffusion Models", Wu et al., 2401.05779; the solver is BOME (Ye et al., 2209.08709).

    min L_r(theta)   s.t.  q(theta) = L_f(theta) - L_f* <= 0,        L_f = || o(x_t, c_f) - sg o(x_t, c') ||^2
    theta <- theta - lr ( grad L_r + lambda grad q ),    lambda fixed, or max(0, eta - cos(grad L_r, grad q)) for `lam=None`

The official code finds L_f* as the loss after K steps on L_f and puts the weights back. It is a number: grad q = grad L_f whatever K,
in the dynamic form too, so the inner steps are left out (the official ones act only through Adam's moments, which are not put back).
Means over elements throughout; the official code for DDPM sums L_r over the image's values. c' of a class model is one class
for a whole batch, drawn among those that are kept. With fixed lambda this is `grad L_r + lambda grad L_f`.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip, Lr, Steps, counted, kept_classes
from expunge.parts.constrained import value_bound
from expunge.parts.objectives import fit, one_of, redirect
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes import component

ERASEDIFF_SCOPES = {
    "all": "network", "cross_attention": "cross_attention", "not_cross_attention": "not_cross_attention",
}  # fmt: skip


@method(
    family="tuned", needs=("retain",), kinds=("diffusion",), intention="removal", mechanism="redirect",
    paper="Wu et al., 2401.05779",
)  # fmt: skip
def erasediff(
    case: Case,
    to: Annotated[
        str,
        setting(
            "the condition that stands in: another (classes: drawn for each batch), next, 'red -> plain', a prompt"
        ),
    ] = "another",
    lam: Annotated[float | None, setting("weight of the forget loss; none: the dynamic multiplier", ge=0)] = 0.1,
    eta: Annotated[float, setting("of the dynamic multiplier: the cosine up to which it acts", ge=0)] = 0.1,
    scope: Annotated[
        Literal["all", "cross_attention", "not_cross_attention"], setting("which weights of the network move")
    ] = "all",
    steps: Steps = 1000,
    lr: Lr = 1e-5,
    batch_size: BatchSize = 16,
    clip: Clip = None,
) -> Plan:
    """Answer the forget condition as another, as far as keeping the rest allows."""
    rules = [str(c) for c in kept_classes(case)] if to == "another" else [to]
    return Plan(
        Term(one_of(*(redirect(rule) for rule in rules)), on="forget", weight=1.0 if lam is None else lam),
        Term(fit(), on="retain"),
        scope=component(ERASEDIFF_SCOPES[scope]), balance=value_bound(eta) if lam is None else None,
        optimizer=Optimizer("adam", lr=lr, clip=clip), **counted(case, steps, batch_size),
    )  # fmt: skip
