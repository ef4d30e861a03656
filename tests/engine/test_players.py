"""Two players in one loop: the trajectory of a quadratic game in closed form, whose turn moves what, and a killed game."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import pytest
import torch
from torch import nn

from expunge import Case, Optimizer, Plan, Term, requests
from expunge.engine import RunDirectory, execute
from expunge.errors import BadSetting
from expunge.parts import Auxiliary, Multiplier, fit, player
from expunge.parts.objectives.base import Objective

A, B, C, LR_MODEL, LR_PLAYER = 0.7, 1.3, 0.4, 0.05, 0.1
UPDATES = 12


class Scalar(nn.Module):
    """One number, times the inputs."""

    def __init__(self, value: float):
        super().__init__()
        self.value = nn.Parameter(torch.tensor([[value]], dtype=torch.float64))

    def forward(self, inputs):
        return inputs * self.value


class Pair(nn.Module):
    """Both players' numbers in one module."""

    def __init__(self):
        super().__init__()
        self.mine, self.other = Scalar(1.0), Scalar(-2.0)

    def forward(self, inputs):
        return self.mine(inputs)


@dataclass(frozen=True)
class Game(Objective):
    """A/2 theta^2 + B theta phi for the model, C/2 phi^2 - B theta phi for the player, the same for every row; noise: times one
    draw per turn, so that a wrong random state shows."""

    whose: str
    noise: float = 0.0
    inside: bool = False

    def __call__(self, step):
        def number(network, part):
            return (getattr(network, part) if self.inside else network).value.squeeze()

        mine = step.networks["model"]
        other = mine if self.inside else step.networks["other"]
        theta, phi = number(mine, "mine"), number(other, "other")
        draw = 1 + self.noise * torch.randn((), generator=step.rng, dtype=torch.float64)
        value = A / 2 * theta**2 + B * theta * phi if self.whose == "model" else C / 2 * phi**2 - B * theta * phi
        return (value * draw).expand(len(step.batch))


def make_case(model: nn.Module) -> Case:
    x = torch.ones(8, 1, dtype=torch.float64)
    return Case(model, (x, x[:, 0]), requests.samples([0, 1]), task="regression")


def game(inside: bool = False, noise: float = 0.0, epochs: int = UPDATES, model_terms=(), **settings) -> Plan:
    optimizer = settings.pop("optimizer", Optimizer("sgd", lr=LR_PLAYER))
    other = player(
        "other", Term(Game("player", noise, inside), on="retain"), network="other" if inside else lambda case, seed: Scalar(-2.0),
        optimizer=optimizer, **settings,
    )  # fmt: skip
    terms = model_terms or (Term(Game("model", noise, inside), on="retain"),)
    return Plan(*terms, adversary=other, optimizer=Optimizer("sgd", lr=LR_MODEL), epochs=epochs, batch_size=6)


def closed_form(steps=1, every=1, warm_up=0, after=False, updates=UPDATES) -> tuple[float, float]:
    """The linear map of the two updates, iterated."""
    theta, phi = 1.0, -2.0
    for _ in range(warm_up):
        phi -= LR_PLAYER * (C * phi - B * theta)
    for t in range(updates):
        turns = steps if t % every == 0 else 0
        if after:
            theta -= LR_MODEL * (A * theta + B * phi)
        for _ in range(turns):
            phi -= LR_PLAYER * (C * phi - B * theta)
        if not after:
            theta -= LR_MODEL * (A * theta + B * phi)
    return theta, phi


def kept(plan: Plan, model: nn.Module):
    """The run, with the player's network as it was at the end."""
    found = {}
    inner = plan.adversary.network

    def build(case, seed):
        found["other"] = inner(case, seed)
        return found["other"]

    if not isinstance(inner, str):
        plan = plan.with_(adversary=dataclasses.replace(plan.adversary, network=build))
    result = execute(plan, make_case(model), floor=None)
    return result, found.get("other")


@pytest.mark.parametrize(
    "settings", [{}, {"steps": 3}, {"every": 4}, {"steps": 2, "every": 3}, {"warm_up": 5}, {"after": True}], ids=str
)
def test_the_trajectory_of_a_quadratic_game_is_the_closed_form(settings):
    result, other = kept(game(**settings), Scalar(1.0))
    theta, phi = closed_form(**settings)
    assert float(result.model.value.detach()) == pytest.approx(theta, rel=1e-12)
    assert float(other.value.detach()) == pytest.approx(phi, rel=1e-12)
    assert not other.training or settings.get("mode", "train") == "train"


def test_a_part_of_the_model_may_be_the_player():
    result, _ = kept(game(inside=True, steps=2), Pair())
    theta, phi = closed_form(steps=2)
    assert float(result.model.mine.value.detach()) == pytest.approx(theta, rel=1e-12)
    assert float(result.model.other.value.detach()) == pytest.approx(phi, rel=1e-12)
    assert all(p.requires_grad and p.grad is None for p in result.model.parameters())


def test_the_game_ends_at_its_saddle():
    result, other = kept(game(epochs=400), Scalar(1.0))
    assert abs(float(result.model.value.detach())) < 1e-4 and abs(float(other.value.detach())) < 1e-4


def test_nobody_moves_the_others_weights():
    still = Optimizer("sgd", lr=0.0)
    result, other = kept(game(optimizer=still), Scalar(1.0))
    assert float(other.value.detach()) == -2.0 and float(result.model.value.detach()) != 1.0
    plan = game().with_(optimizer=Optimizer("sgd", lr=0.0, weight_decay=0.1))
    result, other = kept(plan, Scalar(1.0))
    assert float(result.model.value.detach()) == 1.0 and float(other.value.detach()) != -2.0
    # weight decay of the model's optimizer must not reach the player's part
    plan = game(inside=True, optimizer=still).with_(optimizer=Optimizer("sgd", lr=LR_MODEL, weight_decay=0.1))
    assert float(kept(plan, Pair())[0].model.other.value) == -2.0


def test_what_the_caller_froze_the_player_does_not_move():
    pair = Pair()
    pair.other.value.requires_grad_(False)
    result, _ = kept(game(inside=True), pair)
    assert float(result.model.other.value.detach()) == -2.0 and not result.model.other.value.requires_grad


def test_a_lazy_term_has_updates_of_its_own_and_the_same_optimizer():
    terms = (Term(Game("model"), on="retain"), Term(Game("model"), on="retain", weight=0.5, every=4))
    result, _ = kept(game(model_terms=terms), Scalar(1.0))
    theta, phi = 1.0, -2.0
    for t in range(UPDATES):
        phi -= LR_PLAYER * (C * phi - B * theta)
        theta -= LR_MODEL * (A * theta + B * phi)
        if t % 4 == 0:
            theta -= LR_MODEL * 0.5 * (A * theta + B * phi)
    assert float(result.model.value.detach()) == pytest.approx(theta, rel=1e-12)


def test_losses_of_both_are_in_the_history():
    result, _ = kept(game(), Scalar(1.0))
    assert len(result.trace.history) == UPDATES
    assert {k.split(":")[0] for k in result.trace.history[0]["losses"]} == {"game[retain]", "other"}


class Killed(Exception):
    pass


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("at", [3, 9])
def test_a_killed_game_resumes_to_the_same_tensors(inside, at, tmp_path):
    """Adam on both sides, a multiplier on the player's term, noise, warm-up, two phases of one player."""
    adam = Optimizer("adam", lr=0.05, betas=(0.0, 0.99))
    one = game(inside, 0.3, epochs=6, optimizer=adam, steps=2, warm_up=2).with_(optimizer=adam)
    weighted = Term(Game("player", 0.3, inside), on="retain", weight=Multiplier(0.1, 1.0))
    other = player("other", weighted, network="other" if inside else one.adversary.network, optimizer=adam)
    plan = Plan(phases=(one, one.with_(adversary=other)))
    case = make_case(Pair() if inside else Scalar(1.0))
    whole = execute(plan, case, floor=None)
    calls = []

    def kill(*_):
        calls.append(1)
        if len(calls) == at:
            raise Killed

    with RunDirectory(tmp_path) as run, pytest.raises(Killed):
        execute(plan, case, floor=None, run=run, identity="x", checkpoint_steps=2, report=kill)
    with RunDirectory(tmp_path) as run:
        rest = execute(plan, case, floor=None, run=run, identity="x", checkpoint_steps=100)
    assert all(torch.equal(a, b) for a, b in zip(whole.model.parameters(), rest.model.parameters(), strict=True))
    assert whole.trace.history == rest.trace.history


def test_a_player_goes_on_with_a_network_that_a_phase_has_trained():
    first = Plan(Term(fit(), on="retain"), trains=Auxiliary("other", lambda case, seed: Scalar(-2.0)),
                 optimizer=Optimizer("sgd", lr=0.1), epochs=3)  # fmt: skip
    built, second = [], game(epochs=2)
    second = second.with_(
        adversary=dataclasses.replace(second.adversary, network=lambda case, seed: built.append(1) or Scalar(9.0))
    )
    result = execute(Plan(phases=(first, second)), make_case(Scalar(1.0)), floor=None)
    assert not built  # the trained one was there
    losses = [h["losses"]["other: game[retain]"] for h in result.trace.history if h["phase"] == 1]
    assert losses[0] != losses[1]


def test_bad_players_are_refused_with_what_to_do():
    with pytest.raises(BadSetting, match="pass what it minimises"):
        player("other", network="other")
    with pytest.raises(BadSetting, match="rename it"):
        player("model", Term(fit()), network="other")
    with pytest.raises(BadSetting, match="expected a submodule 'critic'"):
        execute(
            game(inside=True).with_(adversary=player("c", Term(fit(), "retain"), network="critic")),
            make_case(Pair()),
            floor=None,
        )
    with pytest.raises(BadSetting, match="every >= 1"):
        Term(fit(), every=0)
