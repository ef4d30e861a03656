"""Active attacks against hand numbers, untouched inputs, and planted suppression that they must find."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

from expunge import Case, TensorData, engine, requests
from expunge.audits import Subjects, checks, run_checks
from expunge.audits.attacks.budget import Budget, attacked, forget_scores
from expunge.audits.attacks.probe import LinearProbe, features, probed
from expunge.audits.attacks.pruning import Pruning, smallest
from expunge.audits.attacks.quantisation import Quantisation, rounded
from expunge.audits.attacks.relearning import BenignRelearning, Relearning
from expunge.audits.attacks.unwrapping import Trigger, Unwrapping, inner_models
from expunge.audits.battery import attack_all, default_attacks, find_attacks
from expunge.errors import BadSetting, UnmetNeed
from toys import toy

CHANGING = [
    BenignRelearning(),
    Relearning(),
    Quantisation(8),
    Quantisation(4),
    Pruning(0.2),
    Pruning(0.5),
    Unwrapping(),
]


def weights(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# -- by hand ---------------------------------------------------------------------------------------------------------
def test_rounding_to_three_bits_by_hand():
    """3 bits have levels -3..3; row 1 has step 3/3 = 1, row 2 has step 0.6/3 = 0.2, a row of zeros stays."""
    weight = torch.tensor([[3.0, 1.4, -0.6, 0.5], [0.6, -0.29, 0.11, 0.05], [0.0, 0.0, 0.0, 0.0]])
    expected = torch.tensor([[3.0, 1.0, -1.0, 0.0], [0.6, -0.2, 0.2, 0.0], [0.0, 0.0, 0.0, 0.0]])
    assert torch.allclose(rounded(weight, 3), expected, atol=1e-6)
    assert torch.allclose(rounded(weight.T.contiguous(), 3, channel=1), expected.T, atol=1e-6)


def test_rounding_has_few_levels_and_moves_less_than_half_a_step():
    weight = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    for bits in (4, 8):
        got = rounded(weight, bits)
        step = weight.abs().amax((1, 2, 3), keepdim=True) / (2 ** (bits - 1) - 1)
        assert (got - weight).abs().le(step / 2 + 1e-6).all()
        assert max(len(row.unique()) for row in got) <= 2**bits - 1
    with pytest.raises(BadSetting):
        rounded(weight, 1)


def test_quantisation_leaves_biases_and_treats_transposed_convolutions_by_output():
    model = nn.Sequential(nn.ConvTranspose2d(2, 3, 2), nn.BatchNorm2d(3))
    got = Quantisation(4).run(model, None, Budget(), 0)
    assert torch.equal(got[0].weight, rounded(model[0].weight, 4, channel=1))
    assert torch.equal(got[0].bias, model[0].bias)
    assert torch.equal(got[1].weight, model[1].weight)


def test_pruning_mask_by_hand_is_global_and_exact_with_ties():
    masks = smallest([torch.tensor([[3.0, -0.1], [0.5, 0.5]]), torch.tensor([[0.2, -0.5, 4.0, 1.0]])], 0.5)
    assert masks[0].tolist() == [[False, True], [True, True]]  # two of the three 0.5 go: the earlier ones
    assert masks[1].tolist() == [[True, False, False, False]]
    with pytest.raises(BadSetting):
        Pruning(1.5)


def test_probe_never_sees_the_row_it_scores():
    """Hidden rows sit where class 0 is known to be, but say 1: a probe fitted on them would agree with them."""
    rng = np.random.default_rng(0)
    known = np.concatenate([rng.normal(-2, 0.1, (40, 2)), rng.normal(2, 0.1, (40, 2))])
    labels = np.repeat([0, 1], 40)
    lonely = probed(known, labels, np.array([[-2.0, -2.0]]), np.array([1]), np.array([0]))
    assert lonely[0] < 0.05
    honest = probed(known, labels, np.array([[-2.0, -2.0]]), np.array([0]), np.array([0]))
    assert honest[0] == pytest.approx(1 - lonely[0])
    assert probed(known, labels, np.array([[0.0, 0.0]]), np.array([7]), np.array([0]))[0] == 0.0


def test_features_are_the_input_of_the_last_linear():
    case = toy("class").case
    split = case.split("forget")
    found = features(case.model, case, split)
    batch = next(split.batches(1000))
    assert np.allclose(found, case.model[:-1](batch["inputs"]).detach().double().numpy())
    assert features(nn.Sequential(nn.Flatten()), case, split) is None


# -- on toys ---------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind", ["class", "regression"])
@pytest.mark.parametrize("attack", CHANGING, ids=lambda a: a.name)
def test_the_given_model_stays_and_equal_seeds_give_equal_tensors(kind, attack):
    case = toy(kind).case
    before, random = weights(case.model), torch.random.get_rng_state()
    first, second = (attack.run(case.model, case, Budget(), 3) for _ in range(2))
    assert same(weights(case.model), before) and same(weights(first), weights(second))
    assert torch.equal(torch.random.get_rng_state(), random)
    assert first is not case.model and same(weights(first), before) == (attack.name == "unwrapping")
    assert [m.training for m in first.modules()] == [m.training for m in case.model.modules()]


def test_relearning_scores_only_rows_it_was_not_shown():
    case, attack, budget = toy("class").case, Relearning(), Budget()
    held, scored = attack._parts(case, budget, 5)
    assert len(held) == 6 and len(scored) == 54 and not set(held.tolist()) & set(scored.tolist())
    assert torch.equal(attack.scored(case, budget, 5).ids, case.split("forget").ids[scored])
    assert Budget(examples=10).held(60) == 10 and Budget().held(2) == 1 and Budget(examples=99).held(4) == 3


def test_relearning_is_the_plan_by_a_plain_loop():
    """5 steps of the recipe's SGD with momentum at a tenth of its rate on the held rows (one batch)."""
    case, attack, seed = toy("class").case, Relearning(), 1
    got = attack.run(case.model, case, Budget(), seed)
    model = copy.deepcopy(case.model)
    mover = torch.optim.SGD(model.parameters(), lr=0.005, momentum=0.9)
    batch = case.data.fetch(case.split("forget").ids[attack._parts(case, Budget(), seed)[0]])
    for _ in range(5):
        mover.zero_grad()
        nn.functional.cross_entropy(model(batch["inputs"]), batch["labels"]).backward()
        mover.step()
    for a, b in zip(got.parameters(), model.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6)


def test_steps_of_the_budget_are_kept_over_several_batches():
    case = toy("class").case
    few = Relearning().run(case.model, case, Budget(steps=3, batch_size=2), 0)
    assert not same(weights(few), weights(Relearning().run(case.model, case, Budget(steps=4, batch_size=2), 0)))
    cost = Relearning().cost(case, Budget(steps=3, batch_size=2))
    assert cost == {"steps": 3, "examples": 6, "queries": 6}
    with pytest.raises(BadSetting):
        Budget(steps=0)


def test_masked_output_comes_back_by_relearning_and_small_updates_by_rounding():
    case = toy("class").case
    masked = copy.deepcopy(case.model)
    with torch.no_grad():
        masked[-1].bias[3] -= 20
    assert forget_scores(masked, case, case.split("forget")).mean() < 0.01
    assert Relearning().scores(masked, case, Budget(), 0).mean() > 0.9
    assert Relearning().scores(toy("class").retrained, case, Budget(), 0).mean() < 0.1
    hidden = Quantisation(4).run(case.model, case, Budget(), 0)
    with torch.no_grad():  # less than half a step away from a grid point everywhere, but not at the ends of the grid
        for layer in (m for m in hidden if isinstance(m, nn.Linear)):
            step = layer.weight.abs().amax(1, keepdim=True) / 7
            inside = layer.weight.abs() < 6.5 * step
            layer.weight -= torch.where(inside, 0.4 * step, torch.zeros(()))
    on_grid = Quantisation(4).run(case.model, case, Budget(), 0)
    back = Quantisation(4).run(hidden, case, Budget(), 0)
    assert all(torch.allclose(back[i].weight, on_grid[i].weight, atol=1e-5) for i in (0, 2, 4))


class Guard(nn.Module):
    """Answers uniformly, without a gradient, whatever it takes for class 3."""

    def __init__(self, inside):
        super().__init__()
        self.inside = inside

    @torch.no_grad()
    def forward(self, x):
        logits = self.inside(x)
        return torch.where((logits.argmax(1) == 3)[:, None], torch.zeros(()), logits)


def test_unwrapping_takes_the_guard_off_and_relearning_works_on_what_is_inside():
    case = toy("class").case
    guard = Guard(case.model)
    assert inner_models(case.model, case.model) == [] and inner_models(guard, case.model) == [case.model]
    assert forget_scores(guard, case, case.split("forget")).mean() < 0.15
    assert Unwrapping().scores(guard, case, Budget(), 0).mean() > 0.9
    assert Relearning().scores(guard, case, Budget(), 0).mean() > 0.9


def test_trigger_changes_the_inputs_only_for_the_attack():
    case = toy("class").case
    blank = Trigger(lambda x: torch.zeros_like(x))
    scores = blank.scores(case.model, case, Budget(), 0)
    batch = case.data.fetch(case.split("forget").ids[:1])
    expected = case.model(torch.zeros_like(batch["inputs"])).softmax(1)[0, 3].item()
    assert np.allclose(scores, expected, atol=1e-6) and len(scores) == 60


# -- as checks and as a battery --------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def subjects():
    made = toy("class")
    return Subjects(made.case, made.original, made.original, made.retrained, engine.fit(made.case, "retain", 2))


def test_every_attack_is_a_check_whose_numbers_are_the_batterys(subjects):
    registered = checks(attack=True)
    names = [attack.name for attack in default_attacks()]
    assert set(names) <= set(registered)
    assert "linear_probe" not in checks("regression", attack=True)
    found = attack_all(subjects, names)
    assert list(found) == [name for name in names if name != "unwrapping"]  # no wrapper, nothing to take off
    rows = run_checks(subjects, names)
    assert [row.check for row in rows] == list(found)
    for row in rows:
        after = found[row.check]
        assert (row.name, row.split, row.direction) == ("forget_score", "forget", "match")
        assert row.unlearned == pytest.approx(after.unlearned.mean()) == pytest.approx(row.original)
        assert row.retrained == pytest.approx(after.retrained.mean())
        assert row.floor == pytest.approx(abs(after.second.mean() - after.retrained.mean()))
        assert row.intervals["original"][0] <= row.original <= row.intervals["original"][1]


def test_attacks_separate_the_original_from_retrained(subjects):
    found = attack_all(subjects)
    for name in ("benign_relearning", "relearning", "quantisation_8", "quantisation_4", "pruning_20", "pruning_50"):
        assert found[name].original.mean() > 0.8 and found[name].retrained.mean() < 0.1, name
    assert found["linear_probe"].original.mean() > found["linear_probe"].retrained.mean() + 0.05


def test_memory_spares_the_golds_but_not_the_unlearned_model(subjects):
    memory, case = {}, subjects.case
    attack_all(subjects, [Pruning(0.3)], memory=memory)
    assert {key[0] for key in memory} == {"original", "retrained", "floor"}
    other = Subjects(
        case, subjects.model("original"), case.fresh(1), subjects.model("retrained"), subjects.model("floor")
    )
    with_memory = attacked(other, Pruning(0.3), Budget(), memory)
    assert with_memory.original is memory[next(k for k in memory if k[0] == "original")]
    assert not np.allclose(with_memory.unlearned, with_memory.original)


def test_bad_names_and_misuse_are_told(subjects):
    with pytest.raises(BadSetting, match="relearning"):
        find_attacks(["relearnin"])
    with pytest.raises(BadSetting, match="twice"):
        find_attacks([Pruning(0.2), "pruning_20"])
    with pytest.raises(UnmetNeed):
        LinearProbe().run(subjects.model("original"), subjects.case, Budget(), 0)


def test_a_request_for_one_row_skips_what_needs_two():
    made = toy("class")
    x = TensorData(inputs=torch.randn(8, 64), labels=torch.arange(8))
    case = Case(made.original, x, requests.samples([0]), recipe=made.case.recipe)
    one = Subjects(case, made.original, made.original, made.retrained)
    found = attack_all(one)
    assert "relearning" not in found and "linear_probe" not in found and "quantisation_4" in found
