"""ULD: teach a small assistant nothing but what must go, and subtract its logits from the model's.

Paper: Ji et al., "Reversing the Forget-Retain Objectives: An Efficient LLM Unlearning Framework from Logit Difference",
NeurIPS 2024, https://arxiv.org/abs/2406.08607.

    g      the first K blocks of f with its embedding, norm and head, of which only the blocks move
    min_g  CE(D_f and paraphrases) + w_r KL(uniform || g)(D_r [and wrong answers])       both bounded below
    serve  z = z_f + weight * z_g on tokens that f finds plausible, z_f elsewhere        (weight < 0)

Where g is uniform it subtracts a constant and f is as it was. Departures: the uniform loss counts answer tokens only (the
code's mean runs over prompts and padding, which would dominate); z_g is centred before it is filtered; the blocks move as a
whole unless `rank` is given (the paper: LoRA of rank 16). On a model that is no transformer g is f with its last layer free.
The weights of f stay as they are and so does what they know: suppression.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import torch
from torch import nn

from expunge.cases.case import Case
from expunge.cases.data import Split
from expunge.errors import BadData
from expunge.methods.registry import method, setting
from expunge.methods.tuned.common import BatchSize, Epochs, Lr, Schedule, WeightDecay
from expunge.parts.blocks import block_stack
from expunge.parts.combined import CombinedLogits, Difference
from expunge.parts.guarded import companion
from expunge.parts.objectives import fit, from_uniform
from expunge.parts.plan import Auxiliary, Guard, Optimizer, Plan, Term
from expunge.parts.scopes import low_rank

if TYPE_CHECKING:
    from expunge.engine.workbench import Workbench

ASSISTANT = "assistant"
PARAPHRASE, WRONG = 1, 2
"""Values of the column `role` of a probe with several answers to each question (`cases.tofu.candidates`)."""


def depth_of(case: Case, blocks: int | None) -> int | None:
    """How many blocks the assistant has: a quarter of the model's unless told; None for a model without blocks."""
    stack = block_stack(case.model)
    return None if stack is None else min(blocks or max(1, len(stack[1]) // 4), len(stack[1]))


def assistant_of(case: Case, seed: int, blocks: int | None) -> nn.Module:
    """A copy of the model (of its first blocks) of which only the blocks may move, or, without blocks, the last layer."""
    model = companion(case.model, blocks).requires_grad_(False)
    stack = block_stack(model)
    if stack is not None:
        stack[1].requires_grad_(True)
    else:
        [m for m in model.modules() if any(True for _ in m.parameters(recurse=False))][-1].requires_grad_(True)
    return model


def further_rows(bench: Workbench, probe: str | None, role: int, name: str) -> bool:
    """Make the probe's rows of a role a split of their own; False where none are asked for."""
    if probe is None:
        return False
    data = bench.case.probe(probe)
    if "role" not in data.names:
        raise BadData(
            f"expected a column 'role' in the probe '{probe}' (1 paraphrase, 2 wrong answer), found {', '.join(data.names)}; "
            "make it with expunge.cases.tofu.candidates, or leave the setting out"
        )
    rows = torch.as_tensor(data.column("role")).eq(role).nonzero().flatten()
    bench.splits[name] = Split(name, data, rows)
    return len(rows) > 0


@method(
    family="guarded", needs=("retain", "labels"), kinds=("classification", "language"), intention="suppression",
    mechanism="logit difference", paper="Ji et al., NeurIPS 2024, 2406.08607",
)  # fmt: skip
def uld(
    case: Case,
    weight: Annotated[float, setting("of the assistant's logits at inference; below 0 it subtracts")] = -0.8,
    threshold: Annotated[float, setting("share of the largest probability below which a token is left alone", ge=0, lt=1)] = 0.01,
    blocks: Annotated[int | None, setting("the assistant's blocks; none: a quarter of the model's", ge=1)] = None,
    rank: Annotated[int | None, setting("of adapters that move instead of the blocks' weights; none: no adapters", ge=1)] = None,
    uniform: Annotated[float, setting("weight of the uniform loss on retain", ge=0)] = 5.0,
    paraphrases: Annotated[str | None, setting("probe whose paraphrased answers are learned as well")] = None,
    wrong: Annotated[str | None, setting("probe whose wrong answers join the uniform side")] = None,
    lr: Lr = 1e-3,
    epochs: Epochs = 10,
    batch_size: BatchSize = 16,
    retain_batch_size: BatchSize = 16,
    weight_decay: WeightDecay = 0.01,
    schedule: Schedule = "linear",
    warmup: Annotated[float, setting("share of the steps in which the step size rises", ge=0, le=1)] = 0.1,
) -> Guard:  # fmt: skip
    """Subtract the logits of an assistant that knows the forget rows and is uniform elsewhere."""
    rule, depth = Difference(weight, threshold), depth_of(case, blocks)
    settings: dict[str, Any] = {
        "trains": Auxiliary(ASSISTANT, partial(assistant_of, blocks=depth)), "mode": "eval", "epochs": epochs,
        "batch_size": batch_size, "epoch_of": "forget", "name": ASSISTANT,
        "optimizer": Optimizer("adamw", lr=lr, weight_decay=weight_decay, schedule=schedule, warmup=warmup),
        "scope": None if rank is None else low_rank(rank, 2.0 * rank),
    }  # fmt: skip
    terms = [Term(fit(), "forget"), Term(from_uniform(), "retain", uniform, batch_size=retain_batch_size)]

    def train(bench: Workbench) -> Plan:
        own = list(terms)
        if further_rows(bench, paraphrases, PARAPHRASE, "paraphrases"):
            own.append(Term(fit(), "paraphrases"))
        if further_rows(bench, wrong, WRONG, "wrong answers"):
            own.append(Term(from_uniform(), "wrong answers", uniform))
        return Plan(*own, **settings)

    def wrap(bench: Workbench) -> nn.Module:
        return CombinedLogits(bench.model, bench.networks[ASSISTANT], rule, depth)

    return Guard(wrap, f"{rule}, {Plan(*terms, **settings)}", train)
