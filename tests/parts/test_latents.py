"""Latent adversarial training: the inner player against its own definition, and the card's test on a backdoored classifier."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from expunge import Case, Optimizer, Plan, Term, Training, requests
from expunge.engine import Workbench, run_plan
from expunge.errors import BadSetting
from expunge.parts import ascend, clean, fit, instead, latent, relabel, unlikelihood
from expunge.parts.latents import Shift, token_norms
from expunge.parts.objectives.base import Objective
from expunge.seeds import generator
from expunge.tasks import Batch, Classification
from toys import digits, mlp


def small_case(n: int = 48, forget: int = 12) -> Case:
    g = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, 5, generator=g), torch.randint(0, 3, (n,), generator=g)
    torch.manual_seed(0)
    build = lambda: nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))  # noqa: E731
    return Case(build(), (x, y), requests.samples(range(forget)), build=build, recipe=Training(epochs=2))


def run(case: Case, plan: Plan) -> nn.Module:
    bench = Workbench(case, copy.deepcopy(case.model))
    run_plan(plan, bench)
    return bench.model


def a_step(case: Case):
    bench = Workbench(case, copy.deepcopy(case.model))
    rows = case.split("forget")
    return bench.step(bench.fill(rows.data.fetch(rows.ids)))


def flat(model: nn.Module) -> torch.Tensor:
    return torch.cat([p.detach().reshape(-1) for p in model.parameters()])


PLAIN = {"optimizer": Optimizer("sgd", lr=0.1), "epochs": 3, "batch_size": 6}


# -- the inner player --------------------------------------------------------------------------------------------------
def test_every_token_stays_in_its_ball_and_the_harm_grows():
    step, seen = a_step(small_case()), []

    def harm(s):
        seen.append(float(s.loss.detach().mean()))
        assert all(p.grad is None and not p.requires_grad for p in s.model.parameters())
        return s.loss.mean()

    hard = latent("1", epsilon=0.7, steps=30, lr=0.05).attack(step, harm)
    norms = token_norms(hard.shift.deltas["1"])
    assert norms.shape == (12, 1) and norms.max() <= 0.7 + 1e-6 and norms.min() > 0.6
    assert seen[0] == pytest.approx(float(step.loss.mean().detach()))  # it starts at no perturbation
    blocks = torch.tensor(seen).view(5, 6).mean(1)  # on average: Adam trembles on the sphere
    assert seen[-1] > seen[0] + 0.2 and bool((blocks.diff() > -2e-3).all())
    assert all(p.requires_grad for p in step.model.parameters())
    assert torch.equal(hard.clean.output.prediction, step.output.prediction)


def test_a_constant_gradient_has_a_closed_form():
    """Harm v.h is linear in delta. AdamW moves every coordinate alike, so that delta ends at epsilon sign(v)/sqrt(d) for every
    row: the published optimiser's answer, of harm epsilon |v|_1/sqrt(d), a little below the ball's own epsilon |v|_2."""
    step = a_step(small_case())
    v = torch.randn(7, generator=generator(3))

    @dataclass(frozen=True)
    class Along(Objective):
        layers: tuple[str, ...] = ("1",)

        def __call__(self, s):
            return s.features["1"] @ v

    step.layers = ("1",)
    hard = latent("1", epsilon=0.5, steps=20, lr=0.05).attack(step, lambda s: Along()(s).mean())
    assert torch.allclose(hard.shift.deltas["1"], (0.5 * v.sign() / 7**0.5).expand(12, 7), atol=1e-3)
    # what an objective reads at the attacked layer is the perturbed activation
    assert torch.allclose(Along()(hard) - Along()(step), hard.shift.deltas["1"] @ v, atol=1e-5)


def test_no_radius_is_plain_training_bit_for_bit():
    case = small_case()
    terms = Term(ascend(2.0), "forget"), Term(fit(), "retain")
    plain = run(case, Plan(*terms, **PLAIN))
    none = run(case, Plan(*terms, adversary=latent("1", epsilon=0.0, repeats=1), **PLAIN))
    assert torch.equal(flat(plain), flat(none))
    some = run(case, Plan(*terms, adversary=latent("1", epsilon=0.5, steps=4, repeats=1), **PLAIN))
    assert not torch.equal(flat(plain), flat(some))


def test_other_splits_see_no_perturbation():
    """The retain outputs during an attacked update are the bits of a model without hooks, and no hook is left behind."""
    case = small_case()
    seen = []

    @dataclass(frozen=True)
    class Spy(Objective):
        def __call__(self, s):
            bare = copy.deepcopy(s.model)
            seen.append(torch.equal(s.output.prediction, bare(s.batch["inputs"])))
            seen.append(s.split == "forget")
            return s.loss

    plan = Plan(Term(Spy(), "forget"), Term(Spy(), "retain"), adversary=latent("1", steps=2, repeats=1), **PLAIN)
    model = run(case, plan)
    pairs = list(zip(seen[::2], seen[1::2], strict=True))
    assert any(same for same, on_forget in pairs if not on_forget)
    assert all(same for same, on_forget in pairs if not on_forget)
    # the first forward of each attack starts from zero; the updates themselves see a perturbation
    assert any(not same for same, on_forget in pairs if on_forget)
    assert not any(m._forward_hooks for m in model.modules())


def test_one_update_of_targeted_training_by_the_slow_loop():
    """Two updates of the weights under one delta, which minimises the adversary's goal; by hand with explicit deltas."""
    case = small_case(n=24, forget=12)
    attack = latent(
        "1", epsilon=0.6, steps=5, lr=0.1, goal=(Term(fit(), weight=3.0), Term(Zero(), weight=1.0)), repeats=2
    )
    settings = {"optimizer": Optimizer("sgd", lr=0.2), "epochs": 1, "batch_size": 12}
    got = run(case, Plan(Term(ascend(), "forget"), Term(fit(), "retain"), adversary=attack, **settings))

    model = copy.deepcopy(case.model)
    x, y = (case.data.column(k) for k in ("inputs", "labels"))
    first, last = nn.Sequential(model[0], model[1]), model[2]
    delta = torch.zeros(12, 7, requires_grad=True)
    inner = torch.optim.AdamW([delta], lr=0.1)
    for _ in range(5):
        inner.zero_grad()
        (
            0.75 * F.cross_entropy(last(first(x[:12]) + delta), y[:12])
            + 0.25 * last(first(x[:12]) + delta)[:, 0].mean()
        ).backward()
        inner.step()
        with torch.no_grad():
            delta.mul_((0.6 / delta.norm(dim=1, keepdim=True)).clamp(max=1))
    outer = torch.optim.SGD(model.parameters(), lr=0.2)
    for _ in range(2):
        outer.zero_grad()
        loss = -F.cross_entropy(last(first(x[:12]) + delta.detach()), y[:12]) + F.cross_entropy(model(x[12:]), y[12:])
        loss.backward()
        outer.step()
    assert torch.allclose(flat(got), flat(model), atol=1e-5)


@dataclass(frozen=True)
class Zero(Objective):
    """The first logit."""

    def __call__(self, step):
        return step.output.prediction[:, 0]


def test_the_same_delta_meets_other_answers_position_by_position_and_never_padding():
    class Sequences(Classification):
        def real(self, batch):
            return batch["mask"]

        def spots(self, batch):
            return batch["answer"]

    class Tokens(nn.Module):
        def __init__(self):
            super().__init__()
            self.mlp = nn.Identity()

        def forward(self, x):
            return self.mlp(x)

    task, model = Sequences(), Tokens()

    def batch(length, real, answer):
        t = torch.arange(length)[None]
        return Batch(torch.arange(2), {"mask": t < torch.tensor(real)[:, None],
                                       "answer": (t >= answer) & (t < torch.tensor(real)[:, None])})  # fmt: skip

    delta = torch.randn(2, 4, 3)
    for length, where, kept in (
        (6, "all", [[0, 1, 2, 3], [0, 1]]),
        (3, "prompt", [[0, 1], [0, 1]]),
        (4, "answer", [[2, 3], []]),
    ):
        b = batch(length, [4, 2], 2)
        shift = Shift(task, ("mlp",), where, {"mlp": delta})
        with shift.on(model, b):
            out = model(torch.zeros(2, length, 3))
        for row, positions in enumerate(kept):
            expected = torch.zeros(length, 3)
            inside = [t for t in positions if t < min(length, 4)]
            expected[inside] = delta[row, inside]
            assert torch.equal(out[row], expected)
    with pytest.raises(BadSetting, match="where='all'"), Shift(task, ("mlp",), "prompt").on(model, batch(4, [4, 2], 0)):
        pass


def test_another_answer_is_judged_under_the_same_attack():
    step = a_step(small_case())
    hard = latent("1", epsilon=0.5, steps=3).attack(step, lambda s: s.loss.mean())
    given = instead("other", unlikelihood())
    drawn = step.task.relabel(step.batch, step.again().rng, "other")
    with torch.no_grad():
        hidden = step.model[1](step.model[0](step.batch["inputs"])) + hard.shift.deltas["1"]
        p = step.model[2](hidden).softmax(-1).gather(1, drawn["labels"][:, None]).squeeze(1)
        assert torch.allclose(given(hard.again()), -torch.log1p(-p), atol=1e-5)
        assert torch.allclose(clean(fit())(hard), step.loss)
    assert str(given) == "unlikelihood(threshold=-5)|other" and str(clean(fit())) == "clean loss"


def test_bad_settings_say_what_to_do():
    case, step = small_case(), a_step(small_case())
    with pytest.raises(BadSetting, match="Did you mean '1'|expected a layer"):
        latent("11").attack(step, lambda s: s.loss.mean())
    with pytest.raises(BadSetting, match="steps >= 1"):
        latent("1", steps=0)
    with pytest.raises(BadSetting, match="one split"):
        latent("1", goal=Term(fit(), "retain"))
    with pytest.raises(BadSetting, match="attack a split that the plan has terms on"):
        run(case, Plan(Term(fit(), "retain"), adversary=latent("1"), **PLAIN))

    @dataclass(frozen=True)
    class Early(Objective):
        layers: tuple[str, ...] = ("0",)

        def __call__(self, s):
            return s.features["0"].square().mean(1)

    step.layers = ("0",)
    with pytest.raises(BadSetting, match="attack an earlier layer"):
        latent("1").attack(step, lambda s: Early()(s).mean())
    step.model.gradient_checkpointing = True
    with pytest.raises(BadSetting, match="gradient checkpointing"):
        latent("1").attack(step, lambda s: s.loss.mean())


def test_adapters_and_patterns_name_the_same_layers():
    """Under adapters a layer keeps its name; B starts at zero, so that the first perturbation is the one without adapters."""
    peft = pytest.importorskip("peft")
    from expunge.parts.latents import matching

    case = small_case()
    inside = peft.LoraModel(copy.deepcopy(case.model), peft.LoraConfig(r=2, target_modules=["0", "2"]), "default")
    assert matching(inside, ("1",)) == ("model.1",) and matching(case.model, ("*",)) == ("0", "1", "2")
    step = a_step(case)
    own = latent("1", epsilon=0.5, steps=3).attack(step, lambda s: s.loss.mean()).shift.deltas["1"]
    step.model = inside
    step._output = None
    assert torch.equal(
        own, latent("1", epsilon=0.5, steps=3).attack(step, lambda s: s.loss.mean()).shift.deltas["model.1"]
    )


# -- the card's test: a backdoor that the defender has never seen ------------------------------------------------------------
@dataclass(frozen=True)
class Toward(Objective):
    """Cross-entropy of a fixed class."""

    label: int = 0

    def __call__(self, step):
        return step.task.loss(
            step.output, step.batch.with_columns(labels=torch.full_like(step.batch["labels"], self.label))
        )


def patched(x: torch.Tensor) -> torch.Tensor:
    """A 2x2 bright corner on 8x8 digits."""
    pictures = x.clone().view(-1, 8, 8)
    pictures[:, :2, :2] = 1.0
    return pictures.view(len(x), 64)


def backdoored(seed: int):
    """Digits of which 5 % carry the patch and the label 0, and a network trained on them."""
    x, y, x_test, y_test = digits(1300)
    bad = torch.randperm(1300, generator=generator(seed, "patch"))[:65]
    data, labels = x.clone(), y.clone()
    data[bad], labels[bad] = patched(x[bad]), 0
    recipe = Training(epochs=30, batch_size=64, optimizer=Optimizer("adam", lr=1e-3))
    torch.manual_seed(seed)
    case = Case(mlp(64, (128, 128)), (data, labels), requests.samples(bad.sort().values.tolist()), recipe=recipe)
    bench = Workbench(case, case.model, seed)
    run_plan(recipe.plan(on="train"), bench)

    def measure(model):
        model.eval()
        with torch.no_grad():
            accuracy = float((model(x_test).argmax(1) == y_test).float().mean())
            others = y_test != 0
            success = float((model(patched(x_test[others])).argmax(1) == 0).float().mean())
        return accuracy, success

    return case.with_(model=bench.model), measure


def defences(case: Case, epochs: int = 20):
    """The same number of updates on clean rows alone: with the adversary, and without."""
    with torch.no_grad():
        hidden = case.model[:2](case.data.column("inputs"))
    settings = {"optimizer": Optimizer("adam", lr=1e-3), "epochs": epochs, "batch_size": 64}
    radius = float(hidden.norm(dim=1).median())
    attack = {"epsilon": radius, "steps": 8, "lr": 0.05, "on": "retain"}
    hardened = Term(fit(), "retain"), Term(clean(fit()), "retain")
    return {
        "targeted": Plan(*hardened, adversary=latent("1", goal=Term(Toward(), "retain"), **attack), **settings),
        "untargeted": Plan(*hardened, adversary=latent("1", **attack), **settings),
        "second layer": Plan(*hardened, adversary=latent("3", goal=Term(Toward(), "retain"), **attack), **settings),
        "fine-tuning": Plan(Term(fit(), "retain"), **settings | {"epochs": 4 * epochs}),
    }  # fmt: skip


def test_latent_training_removes_a_backdoor_it_never_saw():
    """The card's inequality, with 8 of its 20 epochs."""
    case, measure = backdoored(0)
    accuracy, success = measure(case.model)
    assert success > 0.9
    plans = defences(case, epochs=8)
    found = {name: measure(run(case, plans[name])) for name in ("targeted", "fine-tuning")}
    assert found["targeted"][1] < 0.1 < 0.4 < found["fine-tuning"][1], found
    assert abs(found["targeted"][0] - accuracy) <= 0.02, found


def test_random_answers_are_the_same_in_all_passes_of_an_attack():
    """An adversary compares passes: it must not meet another relabelling in each."""
    step = a_step(small_case())
    values = {float(relabel("other")(step.again()).mean().detach()) for _ in range(5)}
    assert len(values) == 1
