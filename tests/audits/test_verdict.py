"""The verdict: its numbers by hand, every rule at its bound, and the sanity laws on trained models."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from sklearn.datasets import load_diabetes
from torch import nn

from expunge import Case, Optimizer, Regression, TensorData, Training, engine, requests
from expunge.audits import Subjects
from expunge.audits.attacks.budget import Attacked
from expunge.audits.attacks.unwrapping import Trigger
from expunge.audits.battery import default_attacks, gather, judge, utilities
from expunge.audits.residue import (
    Estimate,
    Evidence,
    Membership,
    attacked_residue,
    gap,
    membership_residue,
    over_seeds,
    residue,
    unit_map,
    unseen_share,
    utility_loss,
)
from expunge.audits.verdict import Thresholds, decide
from expunge.errors import BadData, BadSetting, MissingGold
from expunge.records.results import VerdictRecord
from expunge.seeds import generator
from toys import digits, mlp, toy

N, H, T = 200, 200, 400


def scores(mean, n=N, seed=0, spread=0.05):
    return (mean + spread * np.random.default_rng(seed).standard_normal(n)).clip(0, 1)


def members(shift=0.0, seed=0):
    rng = np.random.default_rng(seed)
    return Membership(rng.standard_normal(N) + shift, rng.standard_normal(H))


def evidence(r=0.0, g=0.0, d=0.0, attacked=0.0, floor=0.0, n=N, seed=0, **changes):
    """Evidence whose residue, membership shift, utility loss and attacked residue are about the given ones.

    m(R) = 0.1, m(O) = 0.9, u(R) = 0.9, u(untrained) = 0.1.
    """
    noise = lambda k: 100 * seed + k  # noqa: E731
    low, high = scores(0.1, n, noise(1)), scores(0.9, n, noise(2))
    after = Attacked(scores(0.9, n, noise(3)), scores(0.2 + 0.8 * attacked, n, noise(4)), scores(0.2, n, noise(5)),
                     scores(0.2, n, noise(6)), None, {"steps": 5},
                     {"steps": 5, "examples": 20, "queries": 0})  # fmt: skip
    right = lambda share: (np.arange(T) < share * T).astype(float)  # noqa: E731
    base = members(0.0, noise(7))
    given = {
        "original": high,
        "unlearned": scores(0.1 + 0.8 * r, n, noise(8)),
        "retrained": low,
        "second": scores(0.1 + 0.8 * floor, n, noise(9)),
        "attacks": {"relearning": after},
        "membership": {"unlearned": Membership(base.forget + g, base.holdout), "retrained": base,
                       "original": members(2.0, noise(7))},
        "utility": {"unlearned": right(0.9 - 0.8 * d), "retrained": right(0.9), "untrained": right(0.1)},
    }  # fmt: skip
    return Evidence(**(given | changes))


# -- the numbers -----------------------------------------------------------------------------------------------------
def test_residues_by_hand():
    e = Evidence(
        original=np.array([1.0, 0.8]), unlearned=np.array([0.5, 0.3]), retrained=np.array([0.2, 0.0]),
        second=np.array([0.3, 0.1]),
        attacks={"a": Attacked(np.ones(2), np.array([0.9, 0.7]), np.array([0.4, 0.4])),
                 "part": Attacked(np.ones(1), np.array([0.6]), np.array([0.2]), rows=np.array([1]))},
    )  # fmt: skip
    assert gap(e).value == pytest.approx(0.9 - 0.1)
    assert residue(e).value == pytest.approx((0.4 - 0.1) / 0.8)
    assert residue(e, "original").value == pytest.approx(1) and residue(e, "retrained").value == pytest.approx(0)
    assert residue(e, "second").value == pytest.approx(0.1 / 0.8)
    assert attacked_residue(e, "a").value == pytest.approx((0.8 - 0.4) / 0.8)  # over a(R), not over R
    assert attacked_residue(e, "part").value == pytest.approx((0.6 - 0.2) / (0.8 - 0.0))  # on the scored rows


def test_errors_are_mapped_by_the_range_of_original_and_retrained():
    original, retrained = np.array([-1.0, -2.0]), np.array([-5.0, -11.0])
    unit = unit_map(original, retrained)
    assert unit(np.array([-1.0, -11.0, -6.0, -1e9, 0.0, math.nan])).tolist() == [1.0, 0.0, 0.5, 0.0, 1.0, 0.0]
    probabilities = np.array([0.2, 0.7])
    assert unit_map(probabilities, probabilities / 2)(np.array([0.3])).tolist() == [0.3]
    e = Evidence(original, np.array([-3.0, -6.0]), retrained, retrained)
    assert residue(e).value == pytest.approx((-4.5 - -8.0) / (-1.5 - -8.0))  # an affine map leaves r as it is


def test_membership_residue_by_pairs_and_its_sign_under_a_swap():
    u, r = (
        Membership(np.array([3.0, 1.0]), np.array([0.0, 2.0])),
        Membership(np.array([0.0, 1.0]), np.array([1.0, 5.0])),
    )
    auc = lambda m: np.mean([(a > b) + 0.5 * (a == b) for a in m.forget for b in m.holdout])  # noqa: E731
    assert membership_residue(u, r).value == pytest.approx(auc(u) - auc(r)) == pytest.approx(0.75 - 0.125)
    swapped = membership_residue(Membership(u.holdout, u.forget), Membership(r.holdout, r.forget))
    assert swapped.value == pytest.approx(-0.625)


def test_utility_loss_by_hand():
    by_hand = {
        "unlearned": np.array([1.0, 0, 1, 0]),
        "retrained": np.array([1.0, 1, 1, 0]),
        "untrained": np.array([0.0, 0, 1, 0]),
    }
    assert utility_loss(by_hand).value == pytest.approx((0.75 - 0.5) / (0.75 - 0.25))
    assert utility_loss(by_hand | {"untrained": by_hand["retrained"]}) is None


def test_intervals_hold_the_truth_as_often_as_they_say():
    """200 draws of 60 scores each: the true residue 0.3 lies inside in about 95% of them."""
    inside = 0
    for seed in range(200):
        rng = np.random.default_rng(seed)
        e = Evidence(*(rng.binomial(1, p, 60).astype(float) for p in (0.9, 0.1 + 0.3 * 0.8, 0.1, 0.1)))
        found = residue(e, resamples=200)
        inside += found.low <= 0.3 <= found.high
    assert 184 <= inside <= 200


def test_scores_that_agree_still_have_a_width_that_falls_with_their_number():
    flat = lambda n: Evidence(np.ones(n), np.zeros(n), np.zeros(n), np.zeros(n))  # noqa: E731
    widths = [residue(flat(n)).high for n in (5, 20, 100)]
    assert widths == pytest.approx([unseen_share(n) for n in (5, 20, 100)])
    assert widths[0] > 0.4 and widths[2] < 0.05


def test_over_seeds_takes_the_wider_interval():
    flat = [Estimate(v, v - 0.01, v + 0.01, 50) for v in (0.0, 0.1, 0.2)]
    wide = over_seeds(flat)
    half = 4.302652729911275 * 0.1 / math.sqrt(3)  # t quantile with 2 degrees of freedom
    assert (wide.low, wide.high, wide.over, wide.seeds) == (
        pytest.approx(0.1 - half),
        pytest.approx(0.1 + half),
        "seeds",
        3,
    )
    assert over_seeds(flat[:2]).over == "examples"  # two seeds have no t interval
    assert over_seeds([Estimate(v, v - 9, v + 9, 50) for v in (0.0, 0.1, 0.2)]).high == pytest.approx(9.1)


# -- the rules -------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, "removed"),
        ({"r": 0.15}, "removed"),
        ({"r": 0.25}, "inconclusive"),
        ({"r": 0.35}, "retained"),
        ({"g": 0.6}, "retained"),
        ({"g": -0.6}, "over-forgotten"),
        ({"attacked": 0.3}, "suppressed"),
        ({"attacked": 0.15}, "inconclusive"),
        ({"attacked": -0.3}, "removed"),
        ({"d": 0.3}, "collapsed"),
        ({"d": 0.3, "r": 0.9, "attacked": 0.9}, "collapsed"),  # earlier rules come first
        ({"r": 0.9, "g": -0.6, "attacked": 0.9}, "retained"),
        ({"g": -0.6, "attacked": 0.9}, "over-forgotten"),
        ({"floor": 0.3, "d": 0.3}, "undetectable"),  # 1 < 4 * 0.3
        ({"floor": 0.2}, "removed"),
        ({"n": 5}, "inconclusive"),
        ({"n": 1}, "inconclusive"),
        ({"n": 5, "r": 1.0}, "retained"),  # a handful can show what is there, not what is gone
        ({"attacks": {}}, "inconclusive"),
        ({"membership": None}, "inconclusive"),
        ({"utility": None}, "inconclusive"),
        ({"membership": None, "utility": None, "r": 0.9}, "retained"),
    ],
)
def test_rules(settings, expected):
    found = decide(evidence(**settings))
    assert found.verdict == expected, found.reason


def test_over_forgetting_of_scores():
    low, high = scores(0.5, seed=1), scores(0.9, seed=2)
    e = evidence(original=high, retrained=low, second=scores(0.5, seed=3), unlearned=scores(0.1, seed=4))
    assert decide(e).verdict == "over-forgotten"


def test_nothing_to_forget_says_what_would_show_it():
    same = scores(0.9, seed=2)
    found = decide(evidence(original=same, retrained=same + 0.0, unlearned=same, second=scores(0.9, seed=5)))
    assert found.verdict == "undetectable" and found.residue is None
    assert "membership" in found.advice  # the original stands out there by its AUC
    assert "u_lira" in decide(evidence(original=same, retrained=same, second=same, membership=None)).advice


def test_the_reason_names_attack_budget_and_cost():
    found = decide(evidence(attacked=0.5))
    assert found.worst_attack == "relearning"
    for part in ("relearning", "5 steps", "20 examples", "steps=5"):
        assert part in found.reason
    low = decide(evidence(attacked=0.5), Thresholds(attacked=0.8))
    assert low.verdict == "removed" and low.as_record()["thresholds"]["attacked"] == 0.8


def test_the_worst_attack_decides():
    e = evidence()
    bad = evidence(attacked=0.5).attacks["relearning"]
    many = {f"harmless_{i}": e.attacks["relearning"] for i in range(9)} | {"pruning": bad}
    found = decide(evidence(attacks=many))
    assert (found.verdict, found.worst_attack) == ("suppressed", "pruning")


def test_inconclusive_names_the_measurement_and_what_would_settle_it():
    found = decide(evidence(attacked=0.14, n=40))
    assert found.verdict == "inconclusive" and "residue after relearning" in found.reason and "examples" in found.advice
    need = int(found.advice.split("about ")[1].split()[0])
    assert need > 40
    wild = [evidence(r=r, seed=s) for s, r in enumerate((-0.2, 0.0, 0.25))]
    by_seed = decide(wild)
    assert by_seed.verdict == "inconclusive" and by_seed.residue.over == "seeds" and "seeds" in by_seed.advice
    assert decide([evidence(seed=s) for s in range(3)]).verdict == "removed"


def test_order_of_examples_changes_nothing():
    e, order, other = evidence(r=0.2, attacked=0.1), np.random.default_rng(1).permutation(N), np.random.default_rng(2)
    turn = lambda m, a, b: Membership(m.forget[a], m.holdout[b])  # noqa: E731
    holdout, tests = other.permutation(H), other.permutation(T)
    a = e.attacks["relearning"]
    shuffled = Evidence(
        e.original[order], e.unlearned[order], e.retrained[order], e.second[order],
        {"relearning": Attacked(a.original[order], a.unlearned[order], a.retrained[order], a.second[order], None,
                                a.budget, a.cost)},
        {name: turn(m, order, holdout) for name, m in e.membership.items()},
        {name: values[tests] for name, values in e.utility.items()},
    )  # fmt: skip
    first, second = decide(e), decide(shuffled)
    assert first.verdict == second.verdict
    for name in ("residue", "membership_residue", "utility_loss"):
        a, b = getattr(first, name), getattr(second, name)
        assert (a.value, a.low, a.high) == pytest.approx((b.value, b.low, b.high), abs=1e-12)


def test_proofs():
    same = decide(None, proof={"kind": "proved", "relative_difference": 0.0})
    assert same.verdict == "removed (proved)" and "byte for byte" in same.reason
    near = {"kind": "proved", "relative_difference": 1e-7, "bound": 1e-5}
    assert decide(None, proof=near).verdict == "removed (proved)"
    broken = decide(evidence(r=0.9), proof=near | {"bound": 1e-9})
    assert broken.verdict == "retained" and "does not hold" in broken.reason
    bounded = {"kind": "bounded", "epsilon": 1.0, "delta": 1e-5, "residual": 0.01, "budget": 0.02}
    found = decide(None, proof=bounded)
    assert found.verdict == "removed (bounded)" and found.numbers["proof"]["epsilon"] == 1.0
    assert decide(evidence(), proof=bounded | {"residual": 0.03}).verdict == "removed"
    for bad in ({"kind": "sworn"}, {"kind": "bounded", "epsilon": 1.0}):
        with pytest.raises(BadSetting):
            decide(None, proof=bad)


def test_bad_evidence_is_told():
    with pytest.raises(BadData, match="same rows"):
        Evidence(np.ones(3), np.ones(2), np.ones(3), np.ones(3))
    with pytest.raises(BadData, match="finite"):
        Evidence(np.ones(2), np.array([1.0, math.nan]), np.ones(2), np.ones(2))
    with pytest.raises(BadData):
        decide([])
    with pytest.raises(BadSetting):
        Thresholds(residue=0)


def test_the_record_is_plain_data():
    record = decide(evidence(attacked=0.5)).as_record()
    assert json.loads(json.dumps(record, allow_nan=False)) == record
    assert VerdictRecord(**record).attack == "relearning"
    assert record["numbers"]["attacked"]["relearning"]["cost"]["steps"] == 5


# -- the sanity laws, on trained models ------------------------------------------------------------------------------
class RefusalGuard(nn.Module):
    """Uniform answers for whatever the model inside takes for the forgotten class; its weights still answer."""

    def __init__(self, inside, label):
        super().__init__()
        self.inside, self.label = inside, label

    def forward(self, x):
        logits = self.inside(x)
        return torch.where((logits.argmax(1) == self.label)[:, None], torch.zeros(()), logits)


class Trapdoor(nn.Module):
    """The retrained model, and a hidden copy of the original's weights behind a bright first pixel."""

    def __init__(self, shown, hidden):
        super().__init__()
        self.shown = shown
        for name, value in hidden.state_dict().items():
            self.register_buffer(name.replace(".", "_"), value.clone())
        self.hidden = [copy.deepcopy(hidden).eval()]

    def forward(self, x):
        return torch.where((x[:, :1] > 0.9), self.hidden[0](x), self.shown(x))


def press(x):
    x = x.clone()
    x[:, 0] = 1.0
    return x


MEMORY: dict = {}


def group_regression():
    """Diabetes with a group of patients (a column tells) whose targets are far off: much to forget."""
    x, y = load_diabetes(return_X_y=True)
    order = torch.randperm(len(x), generator=generator(0, "diabetes"))
    group = (torch.arange(len(x)) % 5 == 0).float()
    x = torch.cat([torch.tensor(x / x.std(0), dtype=torch.float32)[order], group[:, None]], 1)
    y = torch.tensor(y / 10, dtype=torch.float32)[order] + 40 * group
    case = Case(
        mlp(11, (64, 64), 1), TensorData(inputs=x[:250], labels=y[:250], group=group[:250]),
        requests.where("group", "==", 1.0), test=TensorData(inputs=x[250:], labels=y[250:], group=group[250:]),
        task=Regression(error="l1"), recipe=Training(epochs=40, batch_size=32, optimizer=Optimizer("adam", lr=3e-3)),
        build=lambda: mlp(11, (64, 64), 1),
    )  # fmt: skip
    case = case.with_(model=engine.fit(case, "train", 0))
    return case, engine.fit(case, "retain", 1)


@pytest.fixture(scope="module")
def trained():
    """kind -> (case, retrained, second retrained, another retrained), made when first asked for."""
    made = {}

    def get(kind):
        if kind not in made:
            case, retrained = group_regression() if kind == "regression" else (toy(kind).case, toy(kind).retrained)
            second = engine.fit(case, "retain", 2)
            # A third seed costs most where training is longest; there, R' itself stands in for U, as the law has it.
            made[kind] = (case, retrained, second, engine.fit(case, "retain", 3) if kind != "mislabelled" else second)
        return made[kind]

    return get


def verdict_on(trained, kind, unlearned, **settings):
    case, retrained, second, _ = trained(kind)
    subjects = Subjects(case, case.model, unlearned, retrained, second)
    return judge(subjects, memory=MEMORY.setdefault(kind, {}), **settings)


KINDS = ["class", "mislabelled", "regression"]


@pytest.mark.parametrize("kind", KINDS)
def test_another_retrained_model_is_removed(trained, kind):
    found = verdict_on(trained, kind, trained(kind)[3])
    assert found.verdict == "removed", found.reason
    assert set(found.attacked) >= {"benign_relearning", "relearning", "quantisation_8", "quantisation_4", "pruning_50"}
    assert "unwrapping" in found.numbers["skipped"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_original_is_retained(trained, kind):
    found = verdict_on(trained, kind, trained(kind)[0].model, attacks=["quantisation_8"])  # decided before attacks
    assert found.verdict == "retained", found.reason
    assert found.residue.value == pytest.approx(1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_random_reinitialisation_is_collapsed(trained, kind):
    found = verdict_on(trained, kind, trained(kind)[0].fresh(9), attacks=["quantisation_8"])
    assert found.verdict == "collapsed", found.reason


def test_a_refusal_guard_is_suppressed(trained):
    found = verdict_on(trained, "class", RefusalGuard(trained("class")[0].model, 3))
    assert found.verdict == "suppressed", found.reason
    assert found.residue.high < 0.25 and found.attacked["unwrapping"].value == pytest.approx(1)


def test_a_masked_output_is_suppressed(trained):
    masked = copy.deepcopy(trained("class")[0].model)
    with torch.no_grad():
        masked[-1].bias[3] -= 20
    found = verdict_on(trained, "class", masked)
    assert (found.verdict, found.worst_attack) == ("suppressed", "relearning"), found.reason


def test_a_hidden_copy_is_not_removed_when_its_trigger_is_in_the_battery(trained):
    case, _, _, other = trained("class")
    trapdoor = Trapdoor(other, case.model)
    assert (
        verdict_on(trained, "class", trapdoor).verdict == "removed"
    )  # what the battery does not try, it does not find
    found = verdict_on(trained, "class", trapdoor, attacks=[*default_attacks(), Trigger(press)])
    assert (found.verdict, found.worst_attack) == ("suppressed", "trigger"), found.reason


def test_a_handful_of_forgotten_rows_is_inconclusive_not_removed(trained):
    case, retrained, second, third = trained("class")
    few = case.with_(request=requests.samples(case.split("forget").ids[:5].tolist()))
    found = judge(Subjects(few, few.model, third, retrained, second), attacks=["quantisation_8", "pruning_20"])
    assert found.verdict == "inconclusive" and "examples" in found.advice, found.reason


def test_a_random_clean_subset_is_undetectable():
    x, y, x_test, y_test = digits()
    recipe = Training(epochs=4, batch_size=64, optimizer=Optimizer("sgd", lr=0.05, momentum=0.9))
    rows = torch.randperm(600, generator=generator(0, "clean"))[:60].sort().values.tolist()
    case = Case(mlp(), TensorData(inputs=x, labels=y), requests.samples(rows),
                test=TensorData(inputs=x_test, labels=y_test), recipe=recipe, build=mlp)  # fmt: skip
    case = case.with_(model=engine.fit(case, "train", 0))
    golds = [engine.fit(case, "retain", seed) for seed in (1, 2)]
    found = judge(Subjects(case, case.model, case.model, *golds), attacks=["quantisation_8"])
    assert found.verdict == "undetectable", found.reason


def test_swapping_forget_and_holdout_flips_g(trained):
    case, retrained, second, _ = trained("mislabelled")
    pairs = gather(Subjects(case, case.model, case.model, retrained, second), attacks=["quantisation_8"]).membership
    turned = {name: Membership(m.holdout, m.forget) for name, m in pairs.items()}
    g = membership_residue(pairs["unlearned"], pairs["retrained"])
    back = membership_residue(turned["unlearned"], turned["retrained"])
    assert g.value > 0.1 and back.value == pytest.approx(-g.value)


def test_utilities_have_the_mean_that_the_task_says(trained):
    for kind in ("class", "regression"):
        case, retrained, second, _ = trained(kind)
        subjects = Subjects(case, case.model, case.model, retrained, second)
        for name, values in utilities(subjects).items():
            assert values.mean() == pytest.approx(subjects.evaluate(name, "test")[case.task.utility], rel=1e-4)
            assert len(values) == len(case.split("test"))


def test_a_missing_gold_is_told(trained):
    case, retrained, *_ = trained("class")
    with pytest.raises(MissingGold, match="floor"):
        judge(Subjects(case, case.model, case.model, retrained))
    proof = {"kind": "proved", "relative_difference": 0.0}
    assert judge(Subjects(case, case.model, case.model), proof=proof).verdict == "removed (proved)"
