"""LAT: forget under the worst perturbation of hidden activations, so that what a probe, a jailbreak or a few steps of fine-tuning
could bring back is already trained against.

Paper: Sheshadri et al., "Latent Adversarial Training Improves Robustness to Persistent Harmful Behaviors in LLMs", TMLR 2025,
https://arxiv.org/abs/2407.15549.

    delta*     = argmin_{||delta_t|| <= eps}  CE(D_f; delta) + away(D_f', delta)                        (weights still)
    min_theta    toward * CE(D_f'; delta*) + push * away(D_f; delta*) + alpha * CE(D_r)                 (`repeats` updates)
    away(y)    = -mean log(1 - p(y)) over tokens with log p(y) >= -5;   D_f': another answer to the same question

The adversary wants the true answers back and the others gone; the defender the opposite, on retain rows without perturbation.
Coefficients are taken relative to their sum, as in the official code. `defence` puts another forget term in the place of the
pair: npo, simnpo, grad_diff, or rmu (the paper's RMU-LAT), each under the same adversary.

Defaults are the paper's for unlearning WMDP (16 inner and 4 outer updates, retain weight 4, AdamW 5e-5, clip 0.5), whose attacked
layer is the MLP at 7/32 of the depth. Where we differ: the radius is the median norm of a token there (published: 2 on Zephyr),
the inner step follows the radius (5e-2 on a width of 4096 spans it at once), the optimizer's state is kept between steps, RMU
keeps one direction (the paper redraws it for every batch), and D_f' is an answer to the same question, where the WMDP runs take
unrelated text in the same slot.
"""

from __future__ import annotations

from typing import Annotated, Literal

from expunge.cases.case import Case
from expunge.methods.registry import method, setting
from expunge.methods.tuned.bases import base_terms
from expunge.methods.tuned.common import Alpha, Average, finetuning, stay
from expunge.parts.architecture import hidden_layers, representation
from expunge.parts.blocks import block_parts, block_stack
from expunge.parts.latents import latent, usual_norm
from expunge.parts.objectives import fit, instead, relabel, unlikelihood
from expunge.parts.plan import Plan, Term


@method(
    family="tuned", needs=("retain", "labels", "refusals"), intention="removal", mechanism="adversarial training",
    paper="Sheshadri et al., TMLR 2025, 2407.15549",
)  # fmt: skip
@finetuning(lr=5e-5, batch_size=4, clip=0.5, weight_decay=0.0, schedule="constant", warmup=0.0)
def lat(
    case: Case,
    layer: Annotated[tuple[str, ...], setting("modules whose outputs are perturbed; none: one early in the model")] = (),
    epsilon: Annotated[float | None, setting("radius of each token's ball; none: the median norm there", ge=0)] = None,
    steps: Annotated[int, setting("inner updates of the perturbation", ge=1)] = 16,
    inner_lr: Annotated[float | None, setting("inner step size; none: half the radius per step", gt=0)] = None,
    repeats: Annotated[int, setting("updates of the weights under one perturbation", ge=1)] = 4,
    where: Annotated[Literal["all", "prompt", "answer"], setting("which tokens are perturbed")] = "all",
    targeted: Annotated[bool, setting("the adversary has a goal; else it maximises the defender's loss")] = True,
    defence: Annotated[
        Literal["pair", "npo", "simnpo", "grad_diff", "rmu"], setting("what the weights learn under attack")
    ] = "pair",
    answers: Annotated[str, setting("the answers to give instead: a relabel policy of the task")] = "refusal",
    toward: Annotated[float, setting("weight of the other answers (pair)", ge=0)] = 1.0,
    push: Annotated[float, setting("weight of the forget term", gt=0)] = 1.0,
    alpha: Alpha = 4.0,
    beta: Annotated[float, setting("inverse temperature of npo and simnpo", gt=0)] = 0.1,
    average: Average = "tokens",
) -> Plan:  # fmt: skip
    """Forget under worst-case hidden activations."""
    names = layer or (attacked_layer(case),)
    radius = usual_norm(case.task, case.model, case.split("forget"), names[0]) if epsilon is None else epsilon
    away = unlikelihood(average=average)
    total = toward + push + alpha if defence == "pair" else push + alpha
    if defence == "pair":
        pair = [Term(relabel(answers, average=average), weight=toward / total)] if toward else []
        terms = (*pair, Term(away, weight=push / total), *stay(alpha / total, average))
    else:
        terms = base_terms(case, defence, beta, push / total, alpha / total, average)
    goal = (Term(fit(average)), Term(instead(answers, away))) if targeted else ()
    return Plan(*terms, adversary=latent(names, radius, steps, inner_lr, goal, where, repeats))


def attacked_layer(case: Case) -> str:
    """The MLP of the block at 7/32 of the depth; without blocks, the first hidden activation."""
    if block_stack(case.model) is not None:
        parts = block_parts(case.model, "mlp")
        return parts[round(len(parts) * 7 / 32)]
    hidden = hidden_layers(case.task, case.model, case.data)
    return hidden[0] if hidden else representation(case.task, case.model, case.data)
