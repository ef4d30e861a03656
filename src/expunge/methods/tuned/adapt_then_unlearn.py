"""Adapt-then-Unlearn: make copies of a GAN that show what must go, then train it on what may stay, away from the copies' weights.

Paper: "Adapt-then-Unlearn: Exploring Parameter Space Semantics for Unlearning in Generative Adversarial Networks", TMLR 2025,
https://arxiv.org/abs/2309.14054. S_n and S_p are the model's own samples, judged (`cases.feedback`): no training data is read.

    stage 1, M times: theta_N = argmin L_adv(S_n) + lambda/2 sum_k F_k (theta_k - theta_G,k)^2       F: Fisher of D's logits
    stage 2:          min L_adv(S_p) + gamma R(theta),   R = 1/d (il2), -d (nl2), exp(-alpha d) (el2),   d = ||theta - theta_N||^2

L_adv is StyleGAN2's: non-saturating logistic losses, lazy R1, and lazy path length where the generator has styles. What comes out
is a moving average of the generator of stage 2; repulsion acts on the generator that is trained.

Departures. d is the mean over tensors and copies of a tensor's mean squared difference, so that its value does not depend on size or
copies; "sum" is the paper's formula, "official" the released code's, whose weights for el2 are gamma=100 and alpha=its --gamma.
A case holds the model that ships and no optimizer states, so training starts from the averaged generator with fresh Adams. No style
mixing. `steps` counts generator updates; epochs are rounded to them.
"""

from __future__ import annotations

from dataclasses import replace
from math import ceil
from typing import Annotated, Any, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Clip
from expunge.parts.adversaries import moving_average
from expunge.parts.guarded import companion
from expunge.parts.objectives.adversarial import deceive, discriminator, discriminator_logit, lazily, path_length
from expunge.parts.objectives.penalties import ewc, repel
from expunge.parts.plan import Auxiliary, Optimizer, Plan, Term

Steps = Annotated[int, setting("generator updates on the positives", ge=1)]
AdaptSteps = Annotated[int, setting("generator updates of each copy on the negatives", ge=1)]
Lr = Annotated[float, setting("Adam's step size, of both networks", gt=0)]
Negatives = Annotated[int | None, setting("negatives drawn for each copy; none: all", ge=1)]
Ewc = Annotated[float, setting("lambda, on the Fisher of raw logits as it is; 0: none", ge=0)]
FisherOver = Annotated[str, setting("pattern of the parameters that the Fisher penalty holds")]
R1 = Annotated[float, setting("weight of the gradient penalty, every 16 steps; 0: none", ge=0)]
PathLength = Annotated[
    float, setting("weight of the path-length penalty, every 4 steps, where there are styles; 0: none", ge=0)
]
HalfLife = Annotated[float, setting("of the generator's moving average, in images; 0: no average", ge=0)]

PAPER = "TMLR 2025, 2309.14054"


def adversarial(
    case: Case, on: str, *more: Term, steps: int, rows: int | None, batch_size: int, lr: float, r1: float, path: float = 0.0,
    **settings: Any,
) -> Plan:  # fmt: skip
    """GAN training on a split of the case for about so many generator updates; `more` terms are the generator's."""
    have = len(case.split(on))
    size = have if rows is None else min(rows, have)
    net, optimizer, terms = getattr(case.model, "generator", None), Optimizer("adam", lr=lr, betas=(0.0, 0.99)), [*more]
    if path and hasattr(net, "mapping") and hasattr(net, "synthesis"):
        optimizer = lazily(optimizer, 4)
        terms.append(Term(path_length(), on=on, weight=4 * path, every=4))
    return Plan(
        Term(deceive(), on=on), *terms, adversary=discriminator(on, lr, r1), optimizer=optimizer, batch_size=batch_size,
        epochs=max(1, round(steps / max(ceil(size / batch_size), 1))), pool=((on, size),) if size < have else (), **settings,
    )  # fmt: skip


def negative_adaptation(
    case: Case,
    number: int,
    *,
    adapt_steps: int,
    negatives: int | None,
    ewc_weight: float,
    fisher_over: str,
    **settings: Any,
) -> Plan:
    """Stage 1: a copy of the pair, trained to show what must go; afterwards the frozen network `negative_<number>`."""
    hold = ewc(32, "train", fisher_over, discriminator_logit)
    terms = (Term(hold, on="forget", weight=ewc_weight),) if ewc_weight else ()
    name = f"negative_{number}"
    return adversarial(
        case, "forget", *terms, steps=adapt_steps, rows=negatives, trains=Auxiliary(name, lambda case, seed: companion(case.model)),
        name=f"copy {number + 1}", **settings,
    )  # fmt: skip


@method(family="tuned", needs=("retain",), kinds=("gan",), intention="removal", mechanism="repulsion", paper=PAPER)
def adapt_then_unlearn(
    case: Case,
    form: Annotated[
        Literal["el2", "il2", "nl2"], setting("how repulsion falls off with distance; nl2 may diverge")
    ] = "el2",
    gamma: Annotated[float, setting("weight of the repulsion; 0: the positives alone, no copies", ge=0)] = 1.0,
    alpha: Annotated[float, setting("of el2: how fast it falls off", gt=0)] = 1.0,
    distance: Annotated[Literal["mean", "sum", "official"], setting("what d is; see the method's text")] = "mean",
    copies: Annotated[int, setting("adapted copies", ge=1)] = 2,
    adapt_steps: AdaptSteps = 2000,
    steps: Steps = 1000,
    negatives: Negatives = None,
    batch_size: BatchSize = 16,
    lr: Lr = 2e-3,
    ewc: Ewc = 5e8,
    fisher_over: FisherOver = "generator.*conv*",
    r1: R1 = 10.0,
    path: PathLength = 2.0,
    half_life: HalfLife = 10_000,
    clip: Clip = None,
) -> Plan:
    """Adapt copies of a GAN to what must go, then train it on what may stay, away from the copies' weights."""
    shared = {"batch_size": batch_size, "lr": lr, "r1": r1, "path": path}
    numbers = range(copies if gamma else 0)
    stages = [
        negative_adaptation(
            case, i, adapt_steps=adapt_steps, negatives=negatives, ewc_weight=ewc, fisher_over=fisher_over, **shared
        )
        for i in numbers
    ]
    push = repel(tuple(f"negative_{i}" for i in numbers), form, alpha, distance) if gamma else None
    terms = (Term(push, on="retain", weight=gamma),) if push else ()
    average = moving_average(half_life=half_life / batch_size) if half_life else None
    last = adversarial(case, "retain", *terms, steps=steps, rows=None, average=average, **shared)
    last = last.with_(optimizer=replace(last.optimizer, clip=clip))
    return Plan(phases=(*stages, last)) if stages else last


@method(family="tuned", needs=("retain",), kinds=("gan",), intention="baseline", mechanism="fine-tuning", paper=PAPER)
def fine_tune_positives(
    case: Case, steps: Steps = 1000, batch_size: BatchSize = 16, lr: Lr = 2e-3, r1: R1 = 10.0, path: PathLength = 2.0,
    half_life: HalfLife = 10_000, clip: Clip = None,
) -> Plan:  # fmt: skip
    """Train a GAN further on what may stay: the paper's baseline without repulsion."""
    return adapt_then_unlearn(
        case, gamma=0.0, steps=steps, batch_size=batch_size, lr=lr, r1=r1, path=path, half_life=half_life, clip=clip
    )
