"""The losses of language unlearning against slow loops, each other's gradients, and open-unlearning's own numbers.

`OFFICIAL` holds what the functions of locuslab/open-unlearning@d3d7cf9 return on the tensors below, in float64; none of its
code is here. Its known faults (the card `baselines.md` names them) have tests that would catch them.
"""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from expunge.errors import BadSetting
from expunge.parts import (
    Multiplier,
    ascend,
    at_choices,
    ceu,
    dpo,
    fit,
    flat,
    flatten_logits,
    from_uniform,
    hold,
    inverted_hinge,
    kto,
    match,
    npo,
    relabel,
    satimp,
    simnpo,
    steer,
    undial,
    unlikelihood,
    weighted_ascent,
)
from expunge.parts.objectives import choice_losses as losses
from expunge.parts.objectives.pairs import DIVERGENCES, MISCODED, flat_loss
from expunge.parts.objectives.preference import npo_loss
from expunge.parts.objectives.steering import activation_distance
from expunge.parts.references import References
from expunge.parts.step import Step
from expunge.tasks import Batch, Classification, Language, Output
from expunge.tasks.language import padded

V = 7
ROWS = [([1, 2, 3, 4, 5, 0], 2), ([2, 2, 6, 1], 1), ([3, 5, 4, 1, 0], 3)]
"""(tokens, where the answer begins)."""
OTHER = [([1, 2, 6, 6, 0], 2), ([2, 5, 0], 1), ([3, 5, 4, 3, 2, 1, 0], 3)]
OFFICIAL = {
    "ce": 2.29393731551907,
    "weighted_ascent": -0.237373296804553,
    "weighted_ascent_half": -0.703295449636685,
    "satimp": -0.000133475326534672,
    "npo": 13.5784146355002,
    "dpo": 12.6779533557224,
    "simnpo": 5.28300262723973e-05,
    "simnpo_delta": 0.0115667407687164,
    "ceu": 1.73403003572845,
    "ceu_skips_none": 1.76638443757456,
    "undial": 1.80401442997637,
    "kl": 0.09622912105118707,
    "kl_of_everything": 0.09872292275808175,
    "pdu_unshifted": 0.698885110671134,
    "rmu_mixed": 1.1037870523451,
    "rmu_one_row_at_a_time": 1.03175362342959,
}


class Bigram(nn.Module):
    """logits[t] = table[token t], float64: a language model whose every number can be written down."""

    def __init__(self, phase: float):
        super().__init__()
        k = torch.arange(V * V, dtype=torch.float64).view(V, V)
        self.table = nn.Parameter(torch.sin(1.7 * k + phase * (1 + k % 5)))

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.table[input_ids]


def text(rows: list[tuple[list[int], int]], **shared: object) -> Batch:
    columns = padded([r for r, _ in rows], [s for _, s in rows], 0)
    return Batch(torch.arange(len(rows)), {**columns, "_pad": 0, **shared})


class Given(Language):
    """Language whose relabelling answers with OTHER, so that preferences can be computed by hand."""

    def relabel(self, batch: Batch, rng: torch.Generator, policy: str = "other") -> Batch:
        return batch.with_columns(**text(OTHER).columns)


def step_of(
    model: nn.Module, batch: Batch, task: object = None, original: nn.Module | None = None, **rest: object
) -> Step:
    task = task or Given()
    references = References(task, make={"original": lambda: original if original is not None else model})
    return Step(model, task, batch, references, torch.Generator().manual_seed(0), **rest)  # type: ignore[arg-type]


@pytest.fixture
def model() -> Bigram:
    return Bigram(0.3)


@pytest.fixture
def step(model) -> Step:
    return step_of(model, text(ROWS), original=Bigram(0.5))


def positions(model: Bigram, rows=ROWS) -> list[list[tuple[Tensor, int]]]:
    """The slow way: for each row, (logits that predict it, token) of every answer token."""
    return [[(model.table[r[t - 1]], r[t]) for t in range(s, len(r))] for r, s in rows]


def by_hand(model: Bigram, one, average: str = "examples", skip: int = 0, rows=ROWS) -> Tensor:
    """The batch mean of a function of (logits (V,), token), looped."""
    per_row = [[one(z, y) for z, y in row[skip:]] for row in positions(model, rows)]
    if average == "examples":
        return torch.stack([torch.stack(row).mean() for row in per_row]).mean()
    return torch.stack([value for row in per_row for value in row]).mean()


def log_p(z: Tensor, y: int) -> Tensor:
    return torch.log(z.exp()[y] / z.exp().sum())


def _others(z: Tensor, y: int) -> Tensor:
    return torch.cat([z[:y], z[y + 1 :]])


def _hinge(z, y):
    p = z.exp() / z.exp().sum()
    return 1 + p[y] - _others(p, y).max()


def _ceu(z, y):
    q = _others(z, y).detach().exp()
    p = _others(z.exp() / z.exp().sum(), y)
    return -(q / q.sum() * p.log()).sum()


SLOW = {
    "fit": (fit, {}, lambda z, y: -log_p(z, y)),
    "ascend": (ascend, {}, lambda z, y: log_p(z, y)),
    "inverted_hinge": (inverted_hinge, {}, _hinge),
    "weighted_ascent": (weighted_ascent, {"beta": 0.7}, lambda z, y: log_p(z, y).exp().detach() ** 0.7 * log_p(z, y)),
    "satimp": (
        satimp, {"beta1": 5.0, "beta2": 1.5},
        lambda z, y: (log_p(z, y).exp() ** 5 * (1 - log_p(z, y).exp()) ** 1.5).detach() * log_p(z, y),
    ),
    "ceu": (ceu, {"skip": 0}, _ceu),
    "unlikelihood": (unlikelihood, {"threshold": -math.inf}, lambda z, y: -torch.log(1 - log_p(z, y).exp())),
    "flatten_logits": (flatten_logits, {}, lambda z, y: (z.max() - z.sum() / V) ** 2),
    "from_uniform": (
        from_uniform, {}, lambda z, y: sum((1 / V) * (math.log(1 / V) - torch.log_softmax(z, 0)[v]) for v in range(V)),
    ),
}  # fmt: skip
"""name -> (objective, its settings, the card's formula at one answer token)."""


@pytest.mark.parametrize("average", ["examples", "tokens"])
@pytest.mark.parametrize("name", SLOW)
def test_value_and_gradient_are_the_formulas_looped(name, average, model, step):
    make, settings, one = SLOW[name]
    value = make(average=average, **settings)(step)
    assert value.shape == (3,)
    expected = by_hand(model, one, average)
    assert float(value.mean().detach()) == pytest.approx(float(expected.detach()), abs=1e-10)
    got = torch.autograd.grad(value.mean(), model.table)[0]
    assert torch.allclose(got, torch.autograd.grad(expected, model.table)[0], atol=1e-10)


def test_undial_is_the_formula_looped(model, step):
    frozen = Bigram(0.5)

    def one(z, y, target):
        lowered = target.detach().clone()
        lowered[y] -= 10.0
        return -(torch.softmax(lowered, 0) * torch.log_softmax(z, 0)).sum()

    rows = zip(positions(model), positions(frozen), strict=True)
    values = [torch.stack([one(z, y, r) for (z, y), (r, _) in zip(a, b, strict=True)]).mean() for a, b in rows]
    assert torch.allclose(undial(10.0)(step), torch.stack(values), atol=1e-10)


def test_ceu_leaves_out_the_first_answer_tokens_but_never_the_last(model, step):
    assert float(ceu(skip=1)(step).detach().mean()) == pytest.approx(
        float(by_hand(model, _ceu, skip=1).detach()), abs=1e-10
    )
    tokens = by_hand(model, _ceu, "tokens", skip=1)
    assert float(ceu(skip=1, average="tokens")(step).detach().mean()) == pytest.approx(
        float(tokens.detach()), abs=1e-10
    )
    last = torch.stack([_ceu(*row[-1]) for row in positions(model)])
    assert torch.allclose(ceu(skip=99)(step), last, atol=1e-10)
    with pytest.raises(BadSetting, match="skip"):
        ceu(skip=-1)


# -- one family: weights of ascent -------------------------------------------------------------------------------------
WEIGHTS = {
    "ascent": (lambda z, y: -F.cross_entropy(z, y, reduction="none"), lambda p: torch.ones_like(p)),
    "weighted_ascent": (lambda z, y: losses.weighted_ascent(z, y, 0.6), lambda p: p**0.6),
    "satimp": (lambda z, y: losses.satimp(z, y, 5.0, 1.0), lambda p: p**5 * (1 - p)),
    "ceu": (losses.ceu, lambda p: p / (1 - p)),
    "unlikelihood": (losses.unlikelihood, lambda p: p / (1 - p)),
    "probability": (losses.probability, lambda p: p),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_gradient_is_minus_weight_times_the_gradient_of_the_loss(name):
    function, weight = WEIGHTS[name]
    z = (3 * torch.randn(40, V, dtype=torch.float64, generator=torch.Generator().manual_seed(0))).requires_grad_()
    y = torch.arange(40) % V
    nll = F.cross_entropy(z, y, reduction="none")
    w = weight((-nll).exp()).detach()
    expected = torch.autograd.grad((-w * nll).sum(), z)[0]
    assert torch.allclose(torch.autograd.grad(function(z, y).sum(), z)[0], expected, atol=1e-10)


def test_weighted_ascent_at_beta_one_has_the_gradient_of_the_probability_and_at_zero_is_ascent(step, model):
    def gradient(objective):
        return torch.autograd.grad(objective(step).mean(), model.table, retain_graph=True)[0]

    assert torch.allclose(gradient(weighted_ascent(1.0)), gradient(at_choices(losses.probability)), atol=1e-12)
    assert torch.allclose(gradient(weighted_ascent(0.0)), gradient(ascend()), atol=1e-12)


def test_ceu_differs_from_unlikelihood_by_the_targets_entropy():
    z, y = torch.randn(20, V, dtype=torch.float64, generator=torch.Generator().manual_seed(1)), torch.arange(20) % V
    q = z.scatter(1, y[:, None], -torch.inf).softmax(-1)
    entropy = -torch.special.xlogy(q, q).sum(-1)
    assert torch.allclose(losses.ceu(z, y) - losses.unlikelihood(z, y), entropy, atol=1e-10)


def test_inverted_hinge_lies_in_zero_to_two_and_has_the_cards_gradient():
    z = (2 * torch.randn(50, V, dtype=torch.float64, generator=torch.Generator().manual_seed(2))).requires_grad_()
    y = torch.arange(50) % V
    value = losses.inverted_hinge(z, y)
    assert ((value >= 0) & (value <= 2)).all()
    sure = torch.full((1, V), -80.0, dtype=torch.float64).index_fill(1, torch.tensor([3]), 80.0)
    assert float(losses.inverted_hinge(sure, torch.tensor([3]))) == pytest.approx(2.0, abs=1e-12)
    p = z.softmax(-1).detach()
    own = p.gather(1, y[:, None])
    runner_up = p.scatter(1, y[:, None], -1).argmax(1, keepdim=True)
    best = p.gather(1, runner_up)
    expected = p * (best - own)  # every other token
    expected = expected.scatter(1, y[:, None], own * (1 - own + best)).scatter(1, runner_up, -best * (1 - best + own))
    assert torch.allclose(torch.autograd.grad(value.sum(), z)[0], expected, atol=1e-12)


def test_unlikelihood_drops_tokens_below_the_threshold_but_counts_them():
    z = torch.tensor([[0.0, -6.0, -9.0], [0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    y = torch.tensor([1, 2])  # log p(y) is about -6.0 and -0.41
    value = losses.unlikelihood(z, y, threshold=-5.0)
    assert value[0] == 0 and value[1] == losses.unlikelihood(z, y)[1]
    gradient = torch.autograd.grad(value.mean(), z)[0]
    whole = torch.autograd.grad(losses.unlikelihood(z, y)[1] / 2, z)[0]
    assert (gradient[0] == 0).all() and torch.allclose(gradient, whole)


def test_losses_stay_finite_where_the_model_is_certain():
    z = torch.tensor([[60.0, 0.0, 0.0], [-60.0, 0.0, 0.0]], requires_grad=True)
    y = torch.tensor([0, 0])
    for function in (losses.inverted_hinge, losses.weighted_ascent, losses.satimp, losses.ceu, losses.unlikelihood,
                     losses.flatness, losses.from_uniform, losses.probability):  # fmt: skip
        value = function(z, y)
        assert torch.isfinite(value).all(), function
        assert torch.isfinite(torch.autograd.grad(value.sum(), z)[0]).all(), function


def test_a_token_average_of_one_choice_each_is_the_mean_over_examples():
    batch = Batch(torch.arange(4), {"inputs": torch.eye(4, 3), "labels": torch.tensor([0, 1, 2, 0])})
    net = nn.Linear(3, 3)
    one = step_of(net, batch, Classification())
    for make in (fit, ascend, inverted_hinge, weighted_ascent, satimp, ceu, unlikelihood, flatten_logits, from_uniform):
        assert torch.equal(make(average="examples")(one), make(average="tokens")(one)), make
    with pytest.raises(BadSetting, match="average"):
        fit(average="rows")


# -- preferences -------------------------------------------------------------------------------------------------------
def sums(model: Bigram, rows) -> Tensor:
    return torch.stack([torch.stack([log_p(z, y) for z, y in row]).sum() for row in positions(model, rows)])


def test_npo_weighs_ascent_by_one_at_the_start_and_less_with_every_nat():
    loss = torch.linspace(0.0, 80.0, 9, dtype=torch.float64).requires_grad_()
    reference = torch.full_like(loss, 20.0)
    gradient = -torch.autograd.grad(npo_loss(-loss, -reference, 0.1).sum(), loss)[0]
    assert torch.allclose(gradient, 2 * torch.sigmoid(-0.1 * (loss - reference)), atol=1e-12)
    assert float(gradient[2]) == pytest.approx(1.0, abs=1e-12)  # S = S_reference
    assert (gradient.diff() < 0).all()


def test_npo_at_the_reference_is_two_over_beta_log_two_with_the_gradient_of_ascent_on_sums(model):
    own = step_of(model, text(ROWS), original=copy.deepcopy(model))
    value = npo(0.1)(own)
    assert torch.allclose(value, torch.full((3,), 20 * math.log(2), dtype=torch.float64), atol=1e-10)
    expected = torch.autograd.grad(sums(model, ROWS).mean(), model.table)[0]
    assert torch.allclose(torch.autograd.grad(value.mean(), model.table)[0], expected, atol=1e-10)


@pytest.mark.parametrize("make", [lambda: npo(1e-4), lambda: simnpo(1e-4)])
def test_beta_towards_zero_is_ascent(make, model, step):
    ascent = sums(model, ROWS).mean() if make().__class__.__name__ == "NPO" else -step.loss.mean()
    expected = torch.autograd.grad(ascent, model.table, retain_graph=True)[0]
    got = torch.autograd.grad(make()(step).mean(), model.table)[0]
    assert float((got - expected).norm() / expected.norm()) < 1e-3


def test_simnpo_divides_by_the_answers_length_and_keeps_delta_inside(step, model):
    mean = torch.stack([-torch.stack([log_p(z, y) for z, y in row]).mean() for row in positions(model)])
    expected = -(2 / 2.5) * torch.log(torch.sigmoid(2.5 * (mean - 0.4)))
    assert torch.allclose(simnpo(2.5, 0.4)(step), expected, atol=1e-10)


def test_dpo_reads_the_other_answers_and_is_npo_where_they_have_not_moved(model, step):
    frozen = Bigram(0.5)
    chosen, rejected = sums(model, OTHER) - sums(frozen, OTHER), sums(model, ROWS) - sums(frozen, ROWS)
    expected = -(2 / 0.3) * torch.log(torch.sigmoid(0.3 * (chosen - rejected)))
    value = dpo(0.3)(step)
    assert torch.allclose(value, expected, atol=1e-10)
    assert torch.allclose(
        torch.autograd.grad(value.sum(), model.table)[0], torch.autograd.grad(expected.sum(), model.table)[0]
    )


def test_kto_trains_the_forget_answers_alone(model, step):
    frozen = Bigram(0.5)
    centre = (sums(model, OTHER) - sums(frozen, OTHER)).mean().detach()
    expected = 1 - (2 / 0.3) * torch.sigmoid(centre - 0.3 * (sums(model, ROWS) - sums(frozen, ROWS)))
    value = kto(0.3)(step)
    assert torch.allclose(value, expected, atol=1e-10)
    assert torch.allclose(
        torch.autograd.grad(value.sum(), model.table)[0], torch.autograd.grad(expected.sum(), model.table)[0]
    )


def test_relabel_runs_the_model_on_the_new_answers(model, step):
    assert torch.allclose(relabel("other")(step), -sums(model, OTHER) / torch.tensor([3.0, 2.0, 4.0]), atol=1e-10)
    tokens = by_hand(model, lambda z, y: -log_p(z, y), "tokens", rows=OTHER)
    assert float(relabel("other", average="tokens")(step).mean().detach()) == pytest.approx(
        float(tokens.detach()), abs=1e-10
    )


# -- FLAT ---------------------------------------------------------------------------------------------------------------
CONJUGATES = {
    "total_variation": lambda t: t,
    "kl": lambda t: (t - 1).exp(),
    "pearson": lambda t: t.square() / 4 + t,
    "jensen_shannon": lambda t: -torch.log(2 - t.exp()),
}


@pytest.mark.parametrize("name", CONJUGATES)
def test_flats_second_function_is_the_conjugate_at_the_first(name):
    activation, conjugate = DIVERGENCES[name]
    v = torch.linspace(0, 1, 101, dtype=torch.float64)
    assert torch.allclose(conjugate(v), CONJUGATES[name](activation(v)), atol=1e-12)


@pytest.mark.parametrize("name", [*DIVERGENCES, *MISCODED])
def test_flat_falls_with_the_template_and_rises_with_the_true_answer_except_as_miscoded(name):
    form = (DIVERGENCES | MISCODED)[name]
    v, fixed = torch.linspace(0, 0.99, 100, dtype=torch.float64), torch.full((100,), 0.5, dtype=torch.float64)
    template = -1 if name in DIVERGENCES else 1
    assert (template * flat_loss(v, fixed, form).diff() > 0).all()
    true = (
        -1 if name in ("squared_hellinger", "reverse_kl") else 1
    )  # the card has Neyman here too; its own table does not
    assert (true * flat_loss(fixed, v, form).diff() > 0).all()


def test_flat_is_bounded_and_refuses_the_miscoded_forms_unless_asked():
    corners = torch.cartesian_prod(torch.linspace(0, 1, 21), torch.linspace(0, 1, 21)).double()
    for name in CONJUGATES:
        assert flat_loss(corners[:, 0], corners[:, 1], DIVERGENCES[name]).abs().max() < 1.3, name
    for name in MISCODED:
        with pytest.raises(BadSetting, match="as_coded=True"):
            flat(name)
        assert name in str(flat(name, as_coded=True))
    with pytest.raises(BadSetting, match="jeffrey"):
        flat("jefrey")


def test_flat_averages_probabilities_over_the_answer_and_has_the_cards_weights(model, step):
    def mean_probability(rows):
        return torch.stack([torch.stack([log_p(z, y).exp() for z, y in row]).mean() for row in positions(model, rows)])

    true, template = mean_probability(ROWS).mean(), mean_probability(OTHER).mean()
    value = flat("total_variation")(step)
    assert torch.allclose(value, (torch.tanh(true) / 2 - torch.tanh(template) / 2).expand(3), atol=1e-10)
    pull = 0.5 / torch.cosh(true.detach()) ** 2 * true - 0.5 / torch.cosh(template.detach()) ** 2 * template
    got = torch.autograd.grad(value.mean(), model.table)[0]
    assert torch.allclose(got, torch.autograd.grad(pull, model.table)[0], atol=1e-12)
    alone = torch.tanh(mean_probability(ROWS)) / 2 - torch.tanh(mean_probability(OTHER)) / 2
    assert torch.allclose(flat("total_variation", over="examples")(step), alone, atol=1e-10)


# -- activations --------------------------------------------------------------------------------------------------------
class Tiny(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.mix, self.head = nn.Embedding(V, 4), nn.Linear(4, 4), nn.Linear(4, V)
        self.double()

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.head(torch.tanh(self.mix(self.embed(input_ids))))


class Bench:
    """What `prepare` reads of a workbench."""

    seed, task = 0, Language()

    def __init__(self, model: nn.Module):
        self.model, self.splits = model, {"forget": "forget"}

    def batches(self, split: str, size: int):
        yield text(ROWS[:1])


def test_steering_keeps_one_positive_direction_of_the_given_length_and_reads_answers_only():
    net, objective = Tiny(), steer("mix", 6.5)
    u = objective.prepare(Bench(net), "forget")
    assert u.shape == (4,) and float(u.norm()) == pytest.approx(6.5) and (u >= 0).all()
    assert torch.equal(
        u, objective.prepare(Bench(net), "forget")
    )  # drawn from the run's seed: a resumed run has it again
    own = step_of(net, text(ROWS), layers=objective.layers)
    own.scratch["memory"] = u
    h = net.mix(net.embed(text(ROWS)["input_ids"]))
    expected = [
        torch.stack([(h[i, t] - u).square().mean() for t in range(s, len(r))]).mean() for i, (r, s) in enumerate(ROWS)
    ]
    assert torch.allclose(objective(own), torch.stack(expected), atol=1e-10)


def test_steering_one_example_does_not_move_with_another():
    net, objective = Tiny(), steer("mix")
    u = objective.prepare(Bench(net), "forget")

    def value(rows):
        own = step_of(net, text(rows), layers=objective.layers)
        own.scratch["memory"] = u
        return objective(own)

    together = value(ROWS)
    assert torch.allclose(together, torch.cat([value([row]) for row in ROWS]), atol=1e-12)


def test_hold_is_zero_at_the_original_and_a_distance_elsewhere():
    net, original = Tiny(), Tiny()
    objective = hold("mix")
    assert (objective(step_of(net, text(ROWS), original=original, layers=objective.layers)) == 0).all()
    with torch.no_grad():
        net.mix.bias.add_(0.5)
    moved = objective(step_of(net, text(ROWS), original=original, layers=objective.layers))
    assert torch.allclose(moved, torch.full((3,), 0.25, dtype=torch.float64), atol=1e-10)


# -- the duals and the numbers of the framework --------------------------------------------------------------------------
def test_a_multiplier_waits_out_its_warm_up():
    rule = Multiplier(bound=0.3, start=100.0, rate=5.0, after=5)
    assert rule.next(100.0, 0.9, epoch=4) == 100.0
    assert rule.next(100.0, 0.9, epoch=5) == pytest.approx(103.0)
    assert rule.next(1.0, 0.0, epoch=9) == 0.0


def test_the_frameworks_numbers(model, step):
    def same(objective, name, on=None):
        assert float(objective(on or step).mean().detach()) == pytest.approx(OFFICIAL[name], rel=1e-9), name

    same(fit("tokens"), "ce")
    same(weighted_ascent(1.0, "tokens"), "weighted_ascent")
    same(weighted_ascent(0.5, "tokens"), "weighted_ascent_half")
    same(satimp(average="tokens"), "satimp")
    same(npo(0.1), "npo")
    same(dpo(0.1), "dpo")
    same(simnpo(4.5), "simnpo")
    same(simnpo(2.5, 0.4), "simnpo_delta")
    same(ceu(1, "tokens"), "ceu")
    same(ceu(0, "tokens"), "ceu_skips_none")
    # its undial is right only where nothing is masked or padded: rows of equal length that are all answer
    square = step_of(model, text([(r[:4], 0) for r, _ in ROWS]), original=Bigram(0.5))
    same(undial(10.0, average="tokens"), "undial", square)
    # its KL (kl_min's retain term) is right only where every position that it is given predicts an answer: rows without their last
    same(match("original"), "kl", square)


def test_the_frameworks_faults_are_not_ours(model, step):
    # UNDIAL: masked positions indexed token V-100 and entered the mean; ours at beta 0 has no gradient at the start
    start = step_of(model, text(ROWS), original=copy.deepcopy(model))
    gradient = torch.autograd.grad(undial(0.0)(start).mean(), model.table)[0]
    assert gradient.abs().max() < 1e-12
    # PDU: it flattens at the answer's own positions, one too late; ours where the answer is predicted
    unshifted = [(model.table[r[t]], 0) for r, s in ROWS for t in range(s, len(r))]
    theirs = torch.stack([(z.max() - z.mean()) ** 2 for z, _ in unshifted]).mean()
    assert float(theirs.detach()) == pytest.approx(OFFICIAL["pdu_unshifted"], rel=1e-9)
    assert abs(float(flatten_logits("tokens")(step).mean().detach()) - OFFICIAL["pdu_unshifted"]) > 0.01
    # KL: its mean is over prompts, padding and the position after the last token too; ours where answers are predicted
    longest = max(len(r) for r, _ in ROWS)
    seen = torch.tensor([r + [0] * (longest - len(r)) for r, _ in ROWS])
    logp, logq = Bigram(0.5)(seen).log_softmax(-1), model(seen).log_softmax(-1)
    theirs = (logp.exp() * (logp - logq)).sum(-1).mean()
    assert float(theirs.detach()) == pytest.approx(OFFICIAL["kl_of_everything"], rel=1e-9)
    assert abs(float(match("original")(step).mean().detach()) - OFFICIAL["kl_of_everything"]) > 1e-3
    # RMU: a (B,) sum over (B, 1) counts is a (B, B) table that divides every example by every other's length
    grid = torch.arange(3 * 6 * 4, dtype=torch.float64).view(3, 6, 4)
    ours = activation_distance(torch.sin(grid), torch.cos(0.3 * grid), Language().spots(text(ROWS))).mean()
    assert float(ours) == pytest.approx(OFFICIAL["rmu_one_row_at_a_time"], rel=1e-9)
    assert abs(float(ours) - OFFICIAL["rmu_mixed"]) > 0.05


def test_a_classifiers_answer_is_no_input_and_its_forward_is_shared():
    calls = []

    class Counting(nn.Linear):
        def forward(self, x):
            calls.append(1)
            return super().forward(x)

    net = Counting(3, 3)
    batch = Batch(torch.arange(4), {"inputs": torch.eye(4, 3), "labels": torch.tensor([0, 1, 2, 0]), "_classes": 3})
    one = step_of(net, batch, Classification())
    for objective in (relabel("other"), flat("kl", "other"), ceu()):
        assert objective(one).shape == (4,)
    assert len(calls) == 1
    assert isinstance(one.output, Output)


def test_other_answers_drawn_once_are_kept_for_every_row_whatever_their_length():
    """Epoch after epoch the same answers, the loss is theirs, and prompts stay."""
    import copy as copies

    from expunge.engine import Workbench
    from expunge.parts.step import Step
    from expunge.seeds import generator
    from tiny_language import language_case

    case = language_case()
    bench = Workbench(case, copies.deepcopy(case.model), 5)
    objective = relabel("other", draw="once")
    kept = objective.prepare(bench, "forget")
    assert kept == objective.prepare(bench, "forget") and sorted(kept) == case.split("forget").ids.tolist()
    own = {i: case.data.tokens[i][case.data.starts[i] :] for i in kept}
    assert any(len(kept[i]) != len(own[i]) for i in kept) and all(kept[i] in own.values() for i in kept)
    batch = next(iter(bench.batches("forget", 3)))
    step = Step(bench.model, case.task, batch, bench.references, generator(0, "step"), scratch={"memory": kept})
    found = objective(step)
    for place, row in enumerate(batch.ids.tolist()):
        prompt = case.data.tokens[row][: case.data.starts[row]]
        logits = bench.model(input_ids=torch.tensor([prompt + kept[row]])).logits[0, len(prompt) - 1 : -1]
        assert torch.allclose(found[place], F.cross_entropy(logits, torch.tensor(kept[row])), atol=1e-6)
