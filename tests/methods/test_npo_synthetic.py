"""NPO's own synthetic test (2404.05868, section 4): logistic regression on random features, where collapse can be watched.

Retain points x ~ N(-a 1, I_16), forget points x ~ N(+a 1, I_16) with the label rule turned round; 128 fixed ReLU features, a last
layer trained by gradient descent from zero. Everything is full batch, so that a run is its equations and nothing else. Inequalities
and their margins are the card's (three seeds there).
"""

from __future__ import annotations

import copy
import functools

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge import Case, Optimizer, Plan, TensorData, Term, requests
from expunge.engine import Workbench, run_plan
from expunge.parts import ascend, fit, npo
from expunge.seeds import generator

DIMENSION, FEATURES, RETAIN, FORGET, FRESH = 16, 128, 1000, 200, 1000


class Logistic(nn.Module):
    """Logits (0, a.h) of the two classes, from features h (B, 128)."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(FEATURES, 1, bias=False)
        nn.init.zeros_(self.last.weight)

    def forward(self, h: Tensor) -> Tensor:
        z = self.last(h)
        return torch.cat([torch.zeros_like(z), z], dim=1)


def descend(h: Tensor, y: Tensor, steps: int = 6667, lr: float = 0.15) -> Tensor:
    """(128,) logistic regression by full-batch gradient descent from zero (the paper's 20,000 steps of .05, as a third of them
    three times as long)."""
    a, n = torch.zeros(FEATURES, dtype=h.dtype), len(h)
    target = h.T @ y.to(h.dtype) / n
    for _ in range(steps):
        a += lr * (target - h.T @ torch.sigmoid(h @ a) / n)
    return a


@functools.cache
def world(gap: float, seed: int):
    """The case, the retrained weights, and features of fresh forget and retain points."""
    rng = generator(seed, "npo synthetic", gap)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    w = normal(DIMENSION, FEATURES) / DIMENSION**0.5

    def points(count: int, sign: float) -> tuple[Tensor, Tensor]:
        noise = normal(count, DIMENSION)
        of_its_class = 1 + noise.sum(1) / DIMENSION**0.5  # class 0 of retain points, class 1 of forget points
        hit = torch.rand(count, generator=rng, dtype=torch.float64) < torch.sigmoid(of_its_class)
        y = hit if sign > 0 else ~hit
        return F.relu((noise + sign * gap) @ w), y.long()

    (h_retain, y_retain), (h_forget, y_forget) = points(RETAIN, -1), points(FORGET, +1)
    fresh = {"retain": points(FRESH, -1)[0], "forget": points(FRESH, +1)[0]}
    data = TensorData(inputs=torch.cat([h_forget, h_retain]), labels=torch.cat([y_forget, y_retain]))
    model = Logistic().double()
    with torch.no_grad():
        model.last.weight.copy_(descend(data.column("inputs"), data.column("labels"))[None])
    case = Case(model, data, requests.samples(range(FORGET)))
    return case, descend(h_retain, y_retain), fresh


def divergence(retrained: Tensor, weights: Tensor, h: Tensor) -> float:
    """KL(retrained || model), mean over points, nats."""
    p, q = h @ retrained, h @ weights
    chance = torch.sigmoid(p)
    return float(
        (chance * (F.logsigmoid(p) - F.logsigmoid(q)) + (1 - chance) * (F.logsigmoid(-p) - F.logsigmoid(-q))).mean()
    )


def unlearned(case: Case, forget, lr: float, keeping: bool = False, steps: int = 2000, look: int = 0) -> list[Tensor]:
    """Weights after `steps` full-batch updates; with `look`, also after each so many."""
    terms = [Term(forget, "forget")] + ([Term(fit(), "retain")] if keeping else [])
    bench = Workbench(case, copy.deepcopy(case.model))
    seen: list[Tensor] = []

    def log(record) -> None:
        if look and record["step"] % look == 0:
            seen.append(bench.model.last.weight.detach()[0].clone())

    plan = Plan(*terms, optimizer=Optimizer("sgd", lr=lr), epochs=steps, batch_size=RETAIN)
    run_plan(plan, bench, log=log)
    return [*seen, bench.model.last.weight.detach()[0].clone()]


METHODS = {
    "ga": (ascend(), 5e-4, False),
    "grad_diff": (ascend(), 5e-4, True),
    "npo": (npo(1.0), 5e-3, False),
    "npo_gd": (npo(1.0), 5e-3, True),
}
"""Step sizes and beta of the paper's runs at gap 1."""


def at_gap_one(seed: int) -> dict[str, dict[str, float]]:
    case, retrained, fresh = world(1.0, seed)
    start = case.model.last.weight.detach()[0]
    found = {}
    for name, (forget, lr, keeping) in METHODS.items():
        early, *_, end = unlearned(case, forget, lr, keeping, look=200)
        found[name] = {split: divergence(retrained, end, h) for split, h in fresh.items()}
        found[name]["growth"] = float((end - start).norm() / (early - start).norm())
    return found


def test_where_the_points_stand_after_two_thousand_steps_and_how_far_the_weights_ran():
    """The paper's theorem: the weights move linearly with the steps under ascent, logarithmically under NPO."""
    found = at_gap_one(0)
    case, retrained, fresh = world(1.0, 0)
    start = divergence(retrained, case.model.last.weight.detach()[0], fresh["forget"])
    assert all(row["forget"] < 0.5 * start for row in found.values())  # all of them forget
    assert found["npo"]["retain"] < 0.5 * found["ga"]["retain"]
    assert found["npo_gd"]["retain"] < 0.5 * found["grad_diff"]["retain"]
    assert found["npo"]["growth"] < 5 < 50 < found["ga"]["growth"], found


def test_without_a_gap_npo_comes_nearer_to_retraining():
    case, retrained, fresh = world(0.0, 0)

    def best(forget, lr):
        return min(divergence(retrained, w, fresh["forget"]) for w in unlearned(case, forget, lr, look=20))

    start = divergence(retrained, case.model.last.weight.detach()[0], fresh["forget"])
    assert best(npo(10.0), 5e-2) < best(ascend(), 1e-4) < start


def test_the_world_is_the_papers():
    """Before unlearning: far from retrained on forget points, near it on retain points (card: 1.3 to 2.1, and about .02)."""
    case, retrained, fresh = world(1.0, 0)
    weights = case.model.last.weight.detach()[0]
    assert (
        0.8 < divergence(retrained, weights, fresh["forget"]) < 3
        and divergence(retrained, weights, fresh["retain"]) < 0.05
    )
