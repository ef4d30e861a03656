"""ACU's engine against a head trained from scratch on what is left (numbers of the method's card)."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load, save
from sklearn.datasets import load_diabetes, load_digits
from torch import nn

from expunge.errors import BadData, BadModel, BadRequest, BadSetting
from expunge.methods.exact.analytic import (
    REMOVED,
    AnalyticClassifier,
    AnalyticHead,
    RandomBuffer,
    block_margin,
    forget_block,
    learn_block,
    ridge_head,
    sample_digests,
)

RIDGE = 0.1
PIXELS, LABELS = (torch.tensor(a) for a in load_digits(return_X_y=True))
PIXELS = PIXELS / 16


def features(width: int) -> torch.Tensor:
    return RandomBuffer(64, width, seed=0)(PIXELS)


Z = features(300)
Y = nn.functional.one_hot(LABELS, 10).double()


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max())


def learned(form: str, rows: torch.Tensor, **options: object) -> AnalyticHead:
    head = AnalyticHead(300, RIDGE, form, **options)  # type: ignore[arg-type]
    for block in rows.split(100):
        head.learn(Z[block], LABELS[block])
    return head


def from_scratch(head: AnalyticHead, rows: torch.Tensor) -> torch.Tensor:
    return ridge_head(Z[rows], Y[rows], RIDGE)[:, head.classes]


@pytest.mark.parametrize("form", ["statistics", "recursive"])
def test_the_cards_stream_on_digits(form: str) -> None:
    """5 tasks of 2 classes, 20 requests of 20 samples, then all of class 3: equal to the head without them."""
    wide = features(1000)
    train, test = torch.arange(1200), torch.arange(1200, 1797)
    head = AnalyticHead(1000, RIDGE, form, refactorise_every=1000)
    for task in range(5):
        rows = train[(LABELS[train] // 2) == task]
        head.learn(wide[rows], LABELS[rows])
    assert relative(head.W, ridge_head(wide[train], Y[train], RIDGE)) < 1e-6
    assert float((head.predict(wide[test]) == LABELS[test]).double().mean()) > 0.95

    order = torch.randperm(1200, generator=torch.Generator().manual_seed(0))
    for block in order[:400].split(20):
        head.forget(wide[block], LABELS[block])
    left = order[400:]
    truth = ridge_head(wide[left], Y[left], RIDGE)
    assert relative(head.W, truth) < 1e-6
    assert torch.equal(head.predict(wide[test]), (wide[test] @ truth).argmax(1))
    assert head.live == 800 and head.counts.tolist() == torch.bincount(LABELS[left]).tolist()

    threes = left[LABELS[left] == 3]
    head.forget(wide[threes], LABELS[threes])
    rest = left[LABELS[left] != 3]
    assert relative(head.W, ridge_head(wide[rest], Y[rest], RIDGE)) < 1e-6
    assert float(head.W[:, 3].norm()) == 0.0 and bool(head.masked[3])
    found = head.predict(wide[test])
    others = LABELS[test] != 3
    assert int((found == 3).sum()) == 0
    assert float((found == LABELS[test])[others].double().mean()) > 0.95


@pytest.mark.parametrize("form", ["statistics", "recursive"])
def test_round_trip_and_order(form: str) -> None:
    rows = torch.arange(400)
    head = learned(form, rows)
    before = head.W.clone()
    extra = torch.arange(400, 450)
    head.learn(Z[extra], LABELS[extra])
    assert relative(head.W, before) > 1e-3
    head.forget(Z[extra], LABELS[extra])
    assert relative(head.W, before) < 1e-8

    shuffled = rows[torch.randperm(400, generator=torch.Generator().manual_seed(1))]
    other = learned(form, shuffled)
    blocks = list(torch.arange(0, 120).split(30))
    for block in blocks:
        head.forget(Z[block], LABELS[block])
    for block in blocks[::-1]:
        other.forget(Z[block], LABELS[block])
    to = [other.classes.tolist().index(c) for c in head.classes.tolist()]
    assert relative(other.W[:, to], head.W) < 1e-8
    assert relative(head.W, from_scratch(head, torch.arange(120, 400))) < 1e-8


def test_pure_recursion_equals_the_inverse() -> None:
    X, targets = Z[:80], Y[:80]
    R, W = torch.eye(300, dtype=torch.float64) / RIDGE, torch.zeros(300, 10, dtype=torch.float64)
    for block in torch.arange(80).split(16):
        R, W = learn_block(R, W, X[block], targets[block])
    assert relative(R, torch.linalg.inv(X.T @ X + RIDGE * torch.eye(300).double())) < 1e-9
    assert relative(W, ridge_head(X, targets, RIDGE)) < 1e-9
    R, W = forget_block(R, W, X[:16], targets[:16])
    assert relative(W, ridge_head(X[16:], targets[16:], RIDGE)) < 1e-9
    with pytest.raises(BadRequest, match="eigenvalue"):
        forget_block(R, W, 10 * X[16:32], targets[16:32])


def test_recursion_is_remade_from_the_sums() -> None:
    head = learned("recursive", torch.arange(300), refactorise_every=3)
    head.R = head.R * (1 + 1e-3)  # damage that only re-factorising repairs
    for block in torch.arange(60).split(20):
        head.forget(Z[block], LABELS[block])
    assert int(head.since) == 0
    assert relative(head.W, from_scratch(head, torch.arange(60, 300))) < 1e-9
    assert head.refactorise() < 1e-9


@pytest.mark.parametrize("form", ["statistics", "recursive"])
def test_forgetting_nearly_everything_stays_exact(form: str) -> None:
    head = learned(form, torch.arange(300))
    head.forget(Z[:290], LABELS[:290])
    assert relative(head.W, from_scratch(head, torch.arange(290, 300))) < 1e-6
    head.forget(Z[290:300], LABELS[290:300])
    assert float(head.W.abs().max()) == 0.0 and head.live == 0 and bool(head.masked.all())


@pytest.mark.parametrize("form", ["statistics", "recursive"])
def test_alien_blocks_are_refused_and_change_nothing(form: str) -> None:
    head = learned(form, torch.arange(300))
    state = {k: v.clone() for k, v in head.state_dict().items()}
    block = torch.arange(20)
    digests = sample_digests(Z[block], LABELS[block])
    with pytest.raises(BadRequest, match="eigenvalue"):
        head.forget(10 * Z[block], LABELS[block], digests)  # the ledger alone would let it pass
    with pytest.raises(BadRequest, match="never learned or are already forgotten"):
        head.forget(Z[300:301], LABELS[300:301])
    with pytest.raises(BadRequest, match="3 of 4"):
        head.forget(Z[[0, 0, 0, 0]], LABELS[[0, 0, 0, 0]])
    with pytest.raises(BadRequest, match="never learned"):
        head.forget(Z[block], (LABELS[block] + 1) % 10)
    assert all(torch.equal(v, state[k]) for k, v in head.state_dict().items())
    head.forget(Z[block], LABELS[block])
    with pytest.raises(BadRequest, match="already forgotten"):
        head.forget(Z[block], LABELS[block])


def test_without_ledger_an_unseen_neighbour_passes() -> None:
    """Why there is a ledger: the eigenvalue check alone lets an unseen sample of the same kind through."""
    head = learned("statistics", torch.arange(1200), ledger=False)
    assert head._margin(Z[1300:1301]) > 0
    head.forget(Z[1300:1301], LABELS[1300:1301])
    assert head.live == 0


def test_margin_is_the_smallest_eigenvalue() -> None:
    head = learned("statistics", torch.arange(350))
    for rows in (torch.arange(5), torch.arange(340)):  # fewer and more samples than features
        X = Z[rows]
        slow = torch.linalg.eigvalsh(torch.eye(len(X)).double() - X @ torch.linalg.inv(head.A) @ X.T)[0]
        assert abs(head._margin(X) - float(slow)) < 1e-8
    assert block_margin(torch.zeros(0, 0)) == 1.0


def test_single_precision_and_bad_input_are_refused() -> None:
    head = AnalyticHead(300)
    with pytest.raises(BadData, match="float64"):
        head.learn(Z[:5].float(), LABELS[:5])
    with pytest.raises(BadData, match="shape"):
        head.learn(Z[:5, :7], LABELS[:5])
    with pytest.raises(BadData, match="NaN"):
        head.learn(Z[:5] * float("nan"), LABELS[:5])
    with pytest.raises(BadData, match="one target per sample"):
        head.learn(Z[:5], LABELS[:4])
    with pytest.raises(BadSetting, match="form"):
        AnalyticHead(3, form="magic")
    with pytest.raises(BadSetting, match="ridge"):
        AnalyticHead(3, ridge=0.0)


def test_masking_and_dropping_classes() -> None:
    head = learned("statistics", torch.arange(300))
    head.mask_class(4)
    assert int((head.predict(Z) == 4).sum()) == 0 and float(head(Z)[0, 4]) == REMOVED
    with pytest.raises(BadRequest, match="live samples"):
        head.drop_class(7)
    sevens = torch.arange(300)[LABELS[:300] == 7]
    head.forget(Z[sevens], LABELS[sevens])
    head.drop_class(7)
    assert head.classes.tolist() == [0, 1, 2, 3, 4, 5, 6, 8, 9]
    rest = torch.arange(300)[LABELS[:300] != 7]
    assert relative(head.W, from_scratch(head, rest)) < 1e-8
    head.learn(Z[sevens], LABELS[sevens])
    assert head.classes.tolist()[-1] == 7
    assert relative(head.W, from_scratch(head, torch.arange(300))) < 1e-8


def test_values_as_targets() -> None:
    X, y = (torch.tensor(a) for a in load_diabetes(return_X_y=True))
    head = AnalyticHead(10, ridge=0.5)
    head.learn(X[:300], y[:300])
    head.forget(X[:100], y[:100])
    assert relative(head(X[300:]), X[300:] @ ridge_head(X[100:300], y[100:300, None], 0.5)) < 1e-9
    with pytest.raises(BadData, match="do not mix"):
        head.learn(X[:5], torch.zeros(5, dtype=torch.int64))


def small_backbone() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.5))


def test_classifier_streams_forgets_and_survives_saving() -> None:
    inputs = PIXELS.float()
    model = AnalyticClassifier(small_backbone(), features=32, width=200, seed=1)
    model.learn_stream((inputs[b], LABELS[b]) for b in torch.arange(600).split(150)).train()
    model.forget(inputs[:50], LABELS[:50])

    other = AnalyticClassifier(small_backbone(), features=32, width=200, seed=1)
    other.load_state_dict(load(save({k: v.contiguous() for k, v in model.state_dict().items()})))
    for each in (model, other):
        each.forget(inputs[50:80], LABELS[50:80])
    assert torch.equal(model.head.W, other.head.W) and other.head.live == 520
    with pytest.raises(BadRequest, match="already forgotten"):
        other.forget(inputs[:1], LABELS[:1])

    truth = AnalyticClassifier(small_backbone(), features=32, width=200, seed=1)
    truth.learn(inputs[80:600], LABELS[80:600])
    to = [model.head.classes.tolist().index(c) for c in truth.head.classes.tolist()]
    assert relative(model.head.W[:, to], truth.head.W) < 1e-6
    logits = model(inputs[600:])
    assert logits.dtype == torch.float32 and logits.shape == (1197, 10)
    assert float((model.head.classes[logits.argmax(1)] == LABELS[600:]).double().mean()) > 0.8
    assert not any(p.requires_grad for p in model.parameters())


def test_a_moved_backbone_is_refused() -> None:
    model = AnalyticClassifier(small_backbone(), features=32, width=50)
    model.learn(PIXELS[:40].float(), LABELS[:40])
    model.backbone[0].weight.data[0, 0] += 1e-3
    with pytest.raises(BadModel, match="other weights"):
        model.forget(PIXELS[:5].float(), LABELS[:5])
