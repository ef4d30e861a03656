"""References at the least cost that serves: numbers on disk, adapters that are off, views, and frozen copies last."""

from __future__ import annotations

import copy

import pytest
import torch

import expunge.parts.references as module
from expunge import Optimizer, Plan, TensorData, Term
from expunge.engine import RunDirectory, Workbench, execute, run_plan
from expunge.parts import fit as likelihood
from expunge.parts import low_rank, match, match_features, npo
from expunge.parts.references import frozen_view
from expunge.parts.scalars import Scalars
from expunge.parts.step import capturing
from tiny_language import language_case, rows

ADAM = Optimizer("adamw", lr=5e-3)


def counting(monkeypatch) -> dict[str, int]:
    made = {"frozen_copy": 0, "frozen_view": 0}
    for how in made:
        real = getattr(module, how)

        def counted(model, how=how, real=real):
            made[how] += 1
            return real(model)

        monkeypatch.setattr(module, how, counted)
    return made


def passes(case, split: str = "forget") -> list[int]:
    """Counts forwards of the original."""
    seen: list[int] = []
    case.model.register_forward_hook(lambda *_: seen.append(1))
    return seen


# -- numbers on disk ---------------------------------------------------------------------------------------------------
def test_numbers_come_from_disk_and_are_the_same(tmp_path):
    case, store = language_case(), Scalars(tmp_path)
    found = []
    for _ in range(2):
        seen = passes(case)
        bench = Workbench(case, copy.deepcopy(case.model), scalars=store)
        bench.references.prepare({"original": {"forget": {"log_likelihood"}}}, bench.splits)
        found.append((bench.references._likelihoods["original", "forget"], len(seen)))
    (first, runs), (second, none) = found
    assert runs > 0 and none == 0
    ids = case.split("forget").ids
    assert torch.equal(first[ids], second[ids])
    with torch.no_grad():
        batch = case.data.fetch(ids)
        assert torch.allclose(
            first[ids], case.task.log_likelihood(case.task.forward(case.model, batch), batch), atol=1e-5
        )
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("change", ["model", "data", "rows", "task"])
def test_numbers_are_of_this_model_this_data_these_rows_and_this_task(tmp_path, change):
    case, store = language_case(), Scalars(tmp_path)
    split = case.split("forget")
    mark = store.mark(case.model, split, case.task)
    assert mark == store.mark(copy.deepcopy(case.model), split, case.task)
    if change == "model":
        other = copy.deepcopy(case.model)
        with torch.no_grad():
            other.lm_head.weight[3, 5] += 1e-3
        changed = store.mark(other, split, case.task)
    elif change == "data":
        changed = store.mark(case.model, language_case(seed=7).split("forget"), case.task)
    elif change == "rows":
        changed = store.mark(case.model, split.subset(torch.arange(3)), case.task)
    else:
        changed = store.mark(case.model, split, type(case.task)(chunk=7))
    assert changed != mark


def test_a_damaged_file_is_made_again(tmp_path):
    case, store = language_case(), Scalars(tmp_path)
    bench = Workbench(case, copy.deepcopy(case.model), scalars=store)
    needs = {"original": {"forget": {"log_likelihood"}}}
    bench.references.prepare(needs, bench.splits)
    file = next(tmp_path.iterdir())
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    again = Workbench(case, copy.deepcopy(case.model), scalars=store)
    again.references.prepare(needs, again.splits)
    assert file.read_bytes() == whole


def test_a_run_in_a_folder_keeps_them(tmp_path):
    case = language_case()
    with RunDirectory(tmp_path / "run") as run:
        execute(Plan(Term(npo(0.1)), optimizer=ADAM), case, run=run)
    assert len(list((tmp_path / "run" / "references").glob("*.safetensors"))) == 1


# -- adapters that are off ---------------------------------------------------------------------------------------------
PLAN = Plan(Term(match("original"), "forget"), Term(likelihood(), "retain", 0.5), scope=low_rank(2), optimizer=ADAM, epochs=3,
            batch_size=5)  # fmt: skip


def test_adapters_off_are_the_original_without_a_copy(monkeypatch):
    """In place, where the original's weights are being trained around: equal to a run that compares with a frozen copy."""
    case = language_case()
    frozen = execute(PLAN, case, seed=1).model
    made = counting(monkeypatch)
    own = case.with_(model=copy.deepcopy(case.model))
    lent = execute(PLAN, own, seed=1, in_place=True).model
    assert made == {"frozen_copy": 0, "frozen_view": 0}
    assert lent is own.model
    for (name, a), (_, b) in zip(frozen.named_parameters(), lent.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-6), name
    assert any(not torch.equal(a, b) for a, b in zip(lent.parameters(), case.model.parameters(), strict=True))


def test_lent_features_and_answers_are_the_originals(monkeypatch):
    case = language_case()
    bench = Workbench(case, copy.deepcopy(case.model))
    bench.references.steady = False  # as on another device: nothing but a copy would serve
    adapted = low_rank(2).enter(bench.model, bench)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            if "lora_B" in name:
                p.normal_()
    made = counting(monkeypatch)
    batch = case.data.fetch(torch.arange(5))
    layers = ("model.layers.1.mlp",)
    seen = bench.references.features("original", batch, layers)
    said = bench.references.fresh("original", batch)
    with torch.no_grad(), capturing(case.model, layers) as expected:
        truth = case.task.forward(case.model, batch)
    assert torch.allclose(seen[layers[0]], expected[layers[0]], atol=1e-6)
    assert torch.allclose(said.prediction, truth.prediction, atol=1e-6)
    assert not torch.allclose(case.task.forward(adapted, batch).prediction, truth.prediction, atol=1e-2)
    assert made == {"frozen_copy": 0, "frozen_view": 0}
    bench.references.give_back()
    assert bench.references._lent == {}


def test_a_later_phase_does_not_lend():
    """After a phase that moved the base, adapters off are no longer the original."""
    case = language_case()
    first = Plan(Term(npo(0.1)), optimizer=Optimizer("adamw", lr=0.05))
    bench = Workbench(case, copy.deepcopy(case.model))
    lent = []
    bench.references.steady = False
    real = bench.references.lend
    bench.references.lend = lambda *a: lent.append(a) or real(*a)  # type: ignore[method-assign]
    run_plan(Plan(phases=(first, PLAN)), bench)
    assert lent == []


# -- views and copies --------------------------------------------------------------------------------------------------
def test_a_view_shares_memory_and_never_moves():
    case = language_case()
    before = {k: v.clone() for k, v in case.model.state_dict().items()}
    view = frozen_view(case.model)
    assert all(a.data_ptr() == b.data_ptr() for a, b in zip(view.parameters(), case.model.parameters(), strict=True))
    assert not view.training and not any(p.requires_grad for p in view.parameters())
    result = execute(Plan(Term(match_features(["model.layers.1"])), optimizer=ADAM, epochs=2), case)
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    assert all(p.requires_grad for p in case.model.parameters())
    del result


def test_in_place_keeps_the_original_on_disk(tmp_path):
    case = language_case()
    before = copy.deepcopy(case.model.state_dict())
    result = execute(Plan(Term(npo(0.1)), Term(match(), "retain"), optimizer=ADAM, epochs=2), case, in_place=True)
    assert result.model is case.model and any(not torch.equal(before[k], v) for k, v in case.model.state_dict().items())
    assert all(torch.equal(before[k], v) for k, v in result.original.state_dict().items())
    copied = language_case()
    same = execute(Plan(Term(npo(0.1)), Term(match(), "retain"), optimizer=ADAM, epochs=2), copied)
    assert all(
        torch.allclose(a, b, atol=1e-6) for a, b in zip(same.model.parameters(), case.model.parameters(), strict=True)
    )


def test_in_place_rolls_back_to_the_original():
    case = language_case()
    before = copy.deepcopy(case.model.state_dict())
    result = execute(
        Plan(Term(npo(0.1)), optimizer=Optimizer("sgd", lr=1e30), epochs=3, batch_size=4), case, in_place=True
    )
    assert result.trace.restored
    assert all(torch.equal(before[k], v) for k, v in case.model.state_dict().items())


# -- batches of about one length ---------------------------------------------------------------------------------------
def test_batches_of_one_length_hold_every_row_once():
    data = rows(50)
    split = language_case(n=50).split("train")
    lengths = torch.tensor(data.lengths)
    orders = [split.order(torch.Generator().manual_seed(s), 4) for s in (0, 1)]
    assert sorted(torch.cat(orders[0]).tolist()) == list(range(50))
    assert [len(b) for b in orders[0]] == [4] * 12 + [2]
    assert not torch.equal(torch.cat(orders[0]), torch.cat(orders[1]))

    def padding(batches) -> int:
        return sum(int(lengths[b].max()) * len(b) - int(lengths[b].sum()) for b in batches)

    plain = torch.randperm(50, generator=torch.Generator().manual_seed(0)).split(4)
    assert padding(orders[0]) < 0.6 * padding(plain)
    means = torch.tensor([float(lengths[b].float().mean()) for b in orders[0][:-1]])
    assert abs(torch.corrcoef(torch.stack([means, torch.arange(12.0)]))[0, 1]) < 0.9  # no drift from short to long


def test_rows_of_one_length_are_shuffled_as_ever():
    data = TensorData(inputs=torch.zeros(10, 2), labels=torch.arange(10) % 2)
    split = type(language_case().split("train"))("train", data, torch.arange(10))
    drawn = torch.randperm(10, generator=torch.Generator().manual_seed(3))
    assert torch.equal(torch.cat(split.order(torch.Generator().manual_seed(3), 3)), drawn)
