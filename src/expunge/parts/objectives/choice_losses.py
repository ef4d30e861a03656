"""Losses of a single choice among K, as pure functions: (logits (N, K), answers (N,)) -> (N,), each row for itself.

A classifier makes one choice per example, a language model one per answer token, so every loss below serves both. Lower is
what unlearning wants. With l = -log p(y), the gradient of every reference-free one that only pushes the answer down is
-w grad l, ascent with a weight per choice:

    ascent 1      weighted_ascent p^beta      satimp p^b1 (1-p)^b2      ceu and unlikelihood p / (1-p)

Importable alone; `choices.py` makes objectives of them.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _log_probability(logits: Tensor, answers: Tensor) -> Tensor:
    return -F.cross_entropy(logits, answers, reduction="none")


def _without_answer(logits: Tensor, answers: Tensor) -> Tensor:
    """(N, K) the logits with the answer's at -inf."""
    return logits.scatter(1, answers[:, None], float("-inf"))


def probability(logits: Tensor, answers: Tensor) -> Tensor:
    """p(y), in 0..1. Its mean over an answer's tokens is FLAT's P (2410.11143)."""
    return _log_probability(logits, answers).exp()


def inverted_hinge(logits: Tensor, answers: Tensor) -> Tensor:
    """1 + p(y) - max_{v != y} p(v), in 0..2 (Cha et al., LoKU, 2408.06621, IHL).

    Pulls the answer down and the runner-up alone up; ascent raises the whole rest of the vocabulary instead."""
    p = logits.softmax(-1)
    own = p.gather(1, answers[:, None]).squeeze(1)
    return 1 + own - p.scatter(1, answers[:, None], -1.0).amax(1)


def weighted_ascent(logits: Tensor, answers: Tensor, beta: float = 1.0) -> Tensor:
    """-sg(p)^beta l (WGA; Wang et al., 2502.19301): ascent that lets go of a token once it is unlikely. beta = 0 is ascent,
    beta = 1 has the gradient of p itself."""
    log_p = _log_probability(logits, answers)
    return (beta * log_p.detach()).exp() * log_p


def satimp(logits: Tensor, answers: Tensor, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """-sg(p^beta1 (1 - p)^beta2) l (SatImp; Yang et al., 2505.11953): saturation times importance."""
    log_p = _log_probability(logits, answers)
    fixed = log_p.detach()
    return (beta1 * fixed).exp() * (-torch.expm1(fixed)).pow(beta2) * log_p


def ceu(logits: Tensor, answers: Tensor) -> Tensor:
    """CE(z, sg softmax(z with z_y = -inf)) (CE-U; Yang, 2503.01224): towards the model's own choice among the rest.

    Its gradient is exactly `unlikelihood`'s, softmax(z) minus the target; the value differs by the target's entropy."""
    target = _without_answer(logits.detach(), answers).softmax(-1)
    return F.cross_entropy(logits, target, reduction="none")


def unlikelihood(logits: Tensor, answers: Tensor, threshold: float = -math.inf) -> Tensor:
    """-log(1 - p(y)), as logsumexp - logsumexp without y, which stays finite at p = 1 up to rounding.

    threshold: choices with log p(y) below it count as 0 (LAT's `away` has -5; Sheshadri et al., 2407.15549)."""
    rest = _without_answer(logits, answers).logsumexp(-1)
    value = logits.logsumexp(-1) - rest
    if threshold == -math.inf:
        return value
    return torch.where(_log_probability(logits.detach(), answers) < threshold, torch.zeros_like(value), value)


def undial(logits: Tensor, answers: Tensor, reference: Tensor, beta: float = 10.0) -> Tensor:
    """CE(z, softmax(z_reference - beta onehot(y))) (UNDIAL; Dong et al., 2402.10052): the frozen model's choice with the
    answer's logit lowered. Stable: the target is fixed. At beta = 0 and z = z_reference the gradient is zero."""
    lowered = reference.detach().scatter_add(1, answers[:, None], logits.new_full((len(answers), 1), -float(beta)))
    return F.cross_entropy(logits, lowered.softmax(-1), reduction="none")


def flatness(logits: Tensor, answers: Tensor) -> Tensor:
    """(max_v z_v - mean_v z_v)^2, zero where all logits are equal (PDU's forget loss; 2506.05314). Reads no answer."""
    return (logits.amax(-1) - logits.mean(-1)).square()


def from_uniform(logits: Tensor, answers: Tensor) -> Tensor:
    """KL(U || p) = -log K - mean_v log p_v, in nats (ULD's retain term; a forget loss as well). Reads no answer."""
    return -math.log(logits.shape[-1]) - F.log_softmax(logits, dim=-1).mean(-1)
