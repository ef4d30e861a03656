"""SFD: distil the model into a one-step generator whose drawings for the forgotten condition follow the teacher's for another.

Paper: "Score Forgetting Distillation: A Swift, Data-Free Method for Machine Unlearning in Diffusion Models", Chen et al., ICLR 2025,
https://arxiv.org/abs/2409.11219.

    G(z, c) = x(o_theta(b z, t0, c)) at noise-to-signal sigma0 = 2.5;   psi: fake score;   phi: the frozen original
    psi:    min  w_r E_c ||o_psi(x_t, c) - e||^2  +  w_f E ||o_psi(x_t, c_f) - e||^2                      x = G(z, .)
    theta:  min  E_c l(c, c)  +  g_f l(c_s, c_f),    l(c_phi, c_psi) = SiD's loss (see parts.objectives.scores)

t between sigma 0.137 and 13.1 on any schedule. No image is read: the rows' conditions alone. Two stages: first distil all conditions,
then forget from that generator; here the fake score goes on from the first stage. What comes back is a `OneStep` (one call per image,
no guidance), saved as an ordinary pipeline folder beside one small file. Its weights are their moving average.
"""

from __future__ import annotations

from typing import Annotated, Any

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Lr, Steps, counted
from expunge.parts.adversaries import moving_average
from expunge.parts.objectives.scores import fake_score, score_distance
from expunge.parts.plan import Optimizer, Plan, Term
from expunge.parts.scopes.one_step import as_one_step


@method(
    family="tuned", needs=("retain",), kinds=("diffusion",), intention="removal", mechanism="distillation",
    paper="Chen et al., ICLR 2025, 2409.11219",
)  # fmt: skip
def sfd(
    case: Case,
    to: Annotated[str, setting("the condition drawn instead: next, a class, 'red -> plain', or a prompt")] = "next",
    g_f: Annotated[float, setting("weight of the generator's forget loss; 0: distillation alone", ge=0)] = 0.01,
    w_f: Annotated[float, setting("weight of the fake score's forget loss", ge=0)] = 0.01,
    alpha: Annotated[float, setting("of SiD's loss; 1 for Stable Diffusion")] = 1.2,
    guidance: Annotated[float, setting("of both scores, diffusers' convention; 4.5 for Stable Diffusion", ge=1)] = 1.0,
    distil_steps: Annotated[int, setting("updates of a first stage that only distils; 0: one stage", ge=0)] = 0,
    steps: Steps = 50000,
    lr: Lr = 1e-5,
    fake_lr: Annotated[float, setting("step size of the fake score", gt=0)] = 1e-5,
    batch_size: BatchSize = 128,
    clip_value: Annotated[float | None, setting("largest size of a gradient's element", gt=0)] = 1.0,
    decay: Annotated[float, setting("of the generator's moving average", ge=0, lt=1)] = 0.9999,
    sigma: Annotated[float, setting("noise-to-signal ratio at which the generator is asked", gt=0)] = 2.5,
) -> Plan:
    """One network call per image, and the forgotten condition draws another's images; no image is read."""

    def stage(*terms: Term, fakes: tuple[tuple[str, float], ...], **settings: Any) -> Plan:
        return Plan(
            *terms, scope=as_one_step(sigma), average=moving_average(decay),
            adversary=fake_score(*fakes, lr=fake_lr, guidance=guidance, clip_value=clip_value),
            optimizer=Optimizer("adam", lr=lr, betas=(0.0, 0.999), clip_value=clip_value), **settings,
        )  # fmt: skip

    stay = Term(score_distance(None, alpha, guidance=guidance), on="retain")
    move = Term(score_distance(to, alpha, guidance=guidance), on="forget", weight=g_f)
    last = stage(
        stay, *((move,) if g_f else ()), fakes=(("retain", 1.0), *((("forget", w_f),) if w_f else ())),
        **counted(case, steps + distil_steps, batch_size, "retain"),
    )  # fmt: skip
    if not distil_steps:
        return last
    everything = Term(score_distance(None, alpha, guidance=guidance), on="train")
    first = counted(case, distil_steps, batch_size, "train")
    return Plan(phases=(stage(everything, fakes=(("train", 1.0),), **first), last))
