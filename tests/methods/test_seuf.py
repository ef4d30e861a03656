"""SEUF on a mixture-of-experts classifier: the expert that is found, the anchor, and what both are good for."""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from expunge import Case, Optimizer, Plan, TensorData, Term, Training, requests, unlearn
from expunge.engine import Workbench, fit, run_plan
from expunge.errors import UnmetNeed
from expunge.parts import ascend
from expunge.parts.mixture import affinities, most_used
from expunge.parts.objectives.routing import router_anchor
from expunge.parts.scopes import experts
from expunge.parts.stops import Halt, Progress, Stop
from tiny_language import language_case, llama, mixtral
from toys import digits, mixture_mlp, toy


# -- the anchor --------------------------------------------------------------------------------------------------------
def anchored(gate: Tensor, chosen: int) -> tuple[Tensor, nn.Module]:
    """(B,) the anchor's value on three rows whose hidden state is a unit vector, with the router's weight set."""
    model = mixture_mlp()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.copy_(torch.eye(32)[0])
        model[2].gate.weight.zero_()
        model[2].gate.weight[:, 0] = gate
    case = Case(model, TensorData(inputs=torch.rand(9, 64), labels=torch.arange(9)), requests.samples(range(3)))
    objective = router_anchor((("2", chosen),))
    bench = Workbench(case, model)
    batch = next(bench.batches("forget"))
    return objective(bench.step(batch, "forget", objective)), model


def test_the_anchor_is_zero_only_at_one_hot_and_is_the_mean_over_all_experts():
    sure = torch.zeros(8)
    sure[3] = 200.0
    assert anchored(sure, 3)[0].abs().max() < 1e-12
    assert torch.allclose(anchored(sure, 1)[0], torch.full((3,), 2 / 8))
    # uniform: ((1 - 1/8)^2 + 7 / 64) / 8
    assert torch.allclose(anchored(torch.zeros(8), 0)[0], torch.full((3,), ((7 / 8) ** 2 + 7 / 64) / 8))


def test_the_anchor_has_a_gradient_for_experts_outside_the_top_k():
    value, model = anchored(torch.tensor([3.0, 2.0, 1.0, 0.0, 0.0, 0.0, 0.0, 0.0]), chosen=5)
    gradient = torch.autograd.grad(value.sum(), model[2].gate.weight)[0]
    assert gradient[5].abs().max() > 1e-4  # top-k gates would leave it at zero, for good


def test_the_anchor_averages_over_a_rows_own_tokens():
    case = language_case(mixtral())
    bench = Workbench(case, case.model)
    objective = router_anchor((("model.layers.1.mlp", 2),))
    batch = bench.fill(case.data.fetch(torch.arange(5)))
    together = objective(bench.step(batch, "forget", objective))
    for i in range(5):
        alone = bench.fill(case.data.fetch(torch.tensor([i])))  # no padding
        assert torch.allclose(objective(bench.step(alone, "forget", objective)), together[i], atol=1e-6)


# -- the method --------------------------------------------------------------------------------------------------------
def test_a_dense_model_is_refused_before_any_compute():
    for case in (toy("class").case, language_case(llama(2))):
        with pytest.raises(UnmetNeed, match="mixture-of-experts"):
            unlearn(case, "seuf")


def test_on_a_language_model_only_the_chosen_rows_and_the_router_move():
    case = language_case(mixtral())
    (layer, expert), *_ = most_used(affinities(case.task, case.model, case.split("forget").batches()))
    outcome = unlearn(case, "seuf", floor=None, lr=1e-2, epochs=2, batch_size=4)
    assert outcome.record["notes"]["experts"] == [f"{layer}:{expert}"]
    for name, before in case.model.state_dict().items():
        changed = (outcome.model.state_dict()[name] != before).reshape(len(before), -1).any(1)
        if name.startswith(f"{layer}.experts."):
            assert changed.nonzero().flatten().tolist() == [expert]
        else:
            assert changed.any() == (name == f"{layer}.gate.weight"), name


def test_npo_compares_with_the_frozen_original():
    """Against itself the ratio is 1 at every step and the loss constant: the repository's NPO is ascent."""
    case = language_case(mixtral())
    outcome = unlearn(case, "seuf", floor=None, inner="npo", lr=2e-2, epochs=4, batch_size=8, anchor=0.0)
    losses = [v for h in outcome.record["history"] for k, v in h["losses"].items() if k.startswith("npo")]
    assert losses[0] == pytest.approx(2 / 0.1 * torch.log(torch.tensor(2.0)).item(), rel=1e-4)
    assert losses[-1] < losses[0] - 1e-2


# -- the card's experiment, in small -------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Forgotten(Stop):
    def after_epoch(self, progress: Progress) -> Halt | None:
        return Halt("forgotten") if progress.measure("holdout", "accuracy") <= 0.05 else None


@functools.cache
def arms() -> dict[str, list[tuple[float, float]]]:
    """arm -> (test accuracy, share of forget inputs whose first expert changed) at 5% forget accuracy, two classes."""
    found: dict[str, list[tuple[float, float]]] = {"all": [], "target": [], "anchor": [], "random": []}
    x, y, x_test, y_test = digits()
    recipe = Training(epochs=40, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9, schedule="cosine"))
    for digit in (3, 8):
        case = Case(mixture_mlp(), TensorData(inputs=x, labels=y), requests.label(digit), recipe=recipe,
                    test=TensorData(inputs=x_test, labels=y_test), build=mixture_mlp)  # fmt: skip
        case = case.with_(model=fit(case, "train", 0))
        affinity = affinities(case.task, case.model, case.split("forget").batches())
        target = most_used(affinity)
        assert float(affinity["2"].max()) >= 2 / 8, "the premise: the class has an expert"
        other = (("2", next(i for i in range(8) if i != target[0][1])),)
        inputs = x[case.split("forget").ids]

        def first(model: nn.Module, inputs: Tensor = inputs) -> Tensor:
            with torch.no_grad():
                return model[2].gate(model[1](model[0](inputs))).argmax(1)

        before = first(case.model)
        for arm, scope, anchor in (("all", None, ()), ("target", experts(chosen=target), ()),
                                   ("anchor", experts(chosen=target), target),
                                   ("random", experts(chosen=other), other)):  # fmt: skip
            terms = [Term(ascend(), "forget"), *([Term(router_anchor(anchor), "forget")] if anchor else [])]
            bench = Workbench(case, copy.deepcopy(case.model))
            run_plan(Plan(*terms, scope=scope, optimizer=Optimizer("adam", lr=2e-3), epochs=30, batch_size=32,
                          stop=Forgotten()), bench)  # fmt: skip
            kept = case.task.evaluate(bench.model, case.split("test").batches())["accuracy"]
            found[arm].append((kept, float((first(bench.model) != before).float().mean())))
    return found


def mean(arm: str, which: int) -> float:
    return sum(pair[which] for pair in arms()[arm]) / len(arms()[arm])


def test_the_target_expert_costs_less_than_another():
    assert mean("target", 0) > mean("random", 0) + 0.05
    assert mean("anchor", 0) > mean("random", 0) + 0.05


def test_the_anchor_keeps_the_tokens_where_they_were():
    assert mean("anchor", 1) < mean("target", 1) < mean("all", 1)
