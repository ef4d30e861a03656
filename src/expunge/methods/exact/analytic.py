"""A ridge head in closed form that learns and forgets exactly: the engine of ACU.

ACU: Analytic Continual Unlearning for Efficient and Exact Forgetting with Privacy Preservation (arXiv 2505.12239).

With buffered features Z (n, d) and targets Y (n, K) of the live samples, the head is W = (Z'Z + gI)^-1 Z'Y. It depends
on the data through two sums only, A = Z'Z + gI and C = Z'Y; learning a block adds its part, forgetting subtracts it:

    learn  (X, Y):  A += X'X,  C += X'Y          forget (X, Y):  A -= X'X,  C -= X'Y

The paper's recursive form keeps R = A^-1 instead (Woodbury; X W uses the OLD W, the last product the NEW R):

    learn:   R <- R - R X'(I + X R X')^-1 X R,   W <- W + R X'(Y - X W)
    forget:  R <- R + R X'(I - X R X')^-1 X R,   W <- W - R X'(Y - X W)

Where we differ: sums with a Cholesky solve are the default (`form="statistics"`), because errors do not build up in
them; the recursion is there (`form="recursive"`) and is re-made from A every k requests. Everything is float64 (in
float32 a stream of requests drifts to a useless head, so it is refused). A block is forgotten only if the ledger has
its samples: positive definiteness of I - X R X' is necessary for "was learned", not sufficient. R, A and W before and
after a request reveal the request by differencing: keep them private. Exactness is the head's alone:
a backbone trained on the same data keeps what it knows.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from expunge.errors import BadData, BadModel, BadRequest, BadSetting
from expunge.methods.exact.ridge import (
    SLACK,
    block_margin,
    forget_block,
    learn_block,
    move_block,
    refuse_alien,
    ridge_head,
    sample_digests,
    solve_head,
)
from expunge.seeds import generator
from expunge.tasks.base import evaluating

__all__ = [
    "AnalyticClassifier",
    "AnalyticHead",
    "RandomBuffer",
    "block_margin",
    "forget_block",
    "learn_block",
    "ridge_head",
    "sample_digests",
    "solve_head",
]

REMOVED = -1e4
"""Logit of a class without live samples: probability 0 in every precision, and finite, so that 0 * log 0 stays 0."""
FORMS = ("statistics", "recursive")


class RandomBuffer(nn.Module):
    """z = ReLU(x W_B), W_B (p, d) random normal / sqrt(p), fixed by its seed and never trained. Returns float64."""

    def __init__(self, inputs: int, width: int, seed: int):
        super().__init__()
        rng = generator(seed, "analytic", "buffer")
        weight = torch.randn(inputs, width, generator=rng, dtype=torch.float64) / inputs**0.5
        self.register_buffer("weight", weight)

    def forward(self, features: Tensor) -> Tensor:
        """(B, p) any float type -> (B, d) float64."""
        return torch.relu(features.to(torch.float64) @ self.weight)


class AnalyticHead(nn.Module):
    """The ridge head with its live sums, its ledger and its requests.

    Targets are class numbers (m,) int64, whose columns appear as classes are met, or values (m, K) float64.

    Args:
        width: d, features per sample. ridge: g. form: "statistics" or "recursive" (see the file's text).
        refactorise_every: requests after which the recursive form is re-made from the sums.
        ledger: keep digests of live samples and refuse to forget others. Off, only the eigenvalue check guards.

    State (all tensors, in `state_dict`): A (d, d), C (d, K), R (d, d) or (0, 0), W (d, K), classes (K,), counts (K,),
    masked (K,) bool, digests (live, 32) uint8: the ledger, since (requests since R was re-made), values (regression?).
    """

    GROWING = ("C", "R", "W", "classes", "counts", "masked", "digests")

    def __init__(
        self, width: int, ridge: float = 0.1, form: str = "statistics", refactorise_every: int = 10, ledger: bool = True
    ):
        super().__init__()
        if form not in FORMS:
            raise BadSetting(f"expected a form, one of {', '.join(FORMS)}, found {form!r}; use one of them")
        if not ridge > 0 or width < 1 or refactorise_every < 1:
            raise BadSetting(
                f"expected ridge > 0, width >= 1 and refactorise_every >= 1, found {ridge}, {width} and "
                f"{refactorise_every}; correct them"
            )
        self.width, self.ridge, self.form = width, ridge, form
        self.refactorise_every, self.keeps_ledger = refactorise_every, ledger
        eye = torch.eye(width, dtype=torch.float64)
        for name, value in {
            "A": ridge * eye,
            "C": torch.zeros(width, 0, dtype=torch.float64),
            "R": eye / ridge if form == "recursive" else torch.zeros(0, 0, dtype=torch.float64),
            "W": torch.zeros(width, 0, dtype=torch.float64),
            "classes": torch.zeros(0, dtype=torch.int64),
            "counts": torch.zeros(0, dtype=torch.int64),
            "masked": torch.zeros(0, dtype=torch.bool),
            "digests": torch.zeros(0, 32, dtype=torch.uint8),
            "since": torch.zeros((), dtype=torch.int64),
            "values": torch.zeros((), dtype=torch.bool),
        }.items():
            self.register_buffer(name, value)

    # -- reading ---------------------------------------------------------------------------------------------------
    def forward(self, X: Tensor) -> Tensor:
        """(B, d) float64 -> (B, K) scores in the order of `classes`; classes without live samples get `REMOVED`."""
        scores = self._checked(X) @ self.W
        return scores if bool(self.values) else scores.masked_fill(self.masked, REMOVED)

    def predict(self, X: Tensor) -> Tensor:
        """(B,) class numbers."""
        return self.classes[self(X).argmax(1)]

    @property
    def live(self) -> int:
        """Samples in the ledger (0 where none is kept)."""
        return len(self.digests)

    # -- requests --------------------------------------------------------------------------------------------------
    def learn(self, X: Tensor, Y: Tensor, digests: Sequence[str] | None = None) -> None:
        """Add X (m, d) with targets. digests: one hex sha256 per sample; default: of features and target."""
        X, own = self._checked(X), self._digests(X, Y, digests)
        targets = self._targets(X, Y, grow=True)
        if self.keeps_ledger:
            self.digests = torch.cat([self.digests, _as_tensor(own).to(self.digests.device)])
        self._request(X, targets, Y, +1)

    def forget(self, X: Tensor, Y: Tensor, digests: Sequence[str] | None = None) -> None:
        """Subtract samples that were learned. Nothing changes if the request is refused."""
        X, own = self._checked(X), self._digests(X, Y, digests)
        keep = self._ledger_without(own) if self.keeps_ledger else self.digests
        targets = self._targets(X, Y, grow=False)
        refuse_alien(self._margin(X))
        self.digests = keep
        self._request(X, targets, Y, -1)

    def _request(self, X: Tensor, targets: Tensor, Y: Tensor, sign: int) -> None:
        if len(X) == 0:
            return
        unsafe = self.form == "recursive" and sign < 0 and self._margin(X) < SLACK
        self.A = self.A + sign * (X.T @ X)
        self.C = self.C + sign * (X.T @ targets)
        if not bool(self.values):
            self.counts = self.counts + sign * targets.sum(0).round().to(torch.int64)
            touched = targets.any(0)
            self.masked = torch.where(touched, self.counts <= 0, self.masked)
            self.C[:, self.counts <= 0] = 0.0  # exactly, where subtraction leaves rounding
        self.since += 1
        if self.form == "statistics":
            self.W = solve_head(self.A, self.C)
        elif unsafe or int(self.since) >= self.refactorise_every:
            self.refactorise()
        else:
            self.R, self.W = move_block(self.R, self.W, X, targets, float(sign))
            if not bool(self.values):
                self.W[:, self.counts <= 0] = 0.0

    def refactorise(self) -> float:
        """Re-make R and W from the sums; returns the largest change of W relative to its largest entry."""
        before = self.W
        factor = torch.linalg.cholesky(self.A)
        if self.form == "recursive":
            self.R = torch.cholesky_inverse(factor)
        self.W = torch.cholesky_solve(self.C, factor)
        self.since.zero_()
        return float((self.W - before).abs().max() / self.W.abs().max().clamp(min=1e-300)) if self.W.numel() else 0.0

    # -- classes ---------------------------------------------------------------------------------------------------
    def mask_class(self, label: int) -> None:
        """The class is never predicted; its column stays (and a zero column could otherwise win an argmax)."""
        self.masked = self.masked.clone()
        self.masked[self._column(label)] = True

    def drop_class(self, label: int) -> None:
        """Remove the class's column. `classes` keeps the meaning of those that remain."""
        column = self._column(label)
        if int(self.counts[column]) > 0:
            raise BadRequest(
                f"expected a class without live samples to drop, found {int(self.counts[column])} of class {label}; "
                "forget its samples first, or use mask_class"
            )
        keep = torch.arange(len(self.classes), device=self.classes.device) != column
        self.C, self.W = self.C[:, keep], self.W[:, keep]
        self.classes, self.counts, self.masked = self.classes[keep], self.counts[keep], self.masked[keep]

    def _column(self, label: int) -> int:
        found = (self.classes == label).nonzero()
        if len(found) == 0:
            raise BadRequest(
                f"expected a class among {self.classes.tolist()}, found {label}; use one the head has learned"
            )
        return int(found[0])

    # -- checks ----------------------------------------------------------------------------------------------------
    def _checked(self, X: Tensor) -> Tensor:
        if X.dtype != torch.float64:
            raise BadData(
                f"expected float64 features, found {X.dtype}; in single precision the sums drift to a useless head: "
                "pass features.double(), or use RandomBuffer, which returns float64"
            )
        if X.dim() != 2 or X.shape[1] != self.width:
            raise BadData(
                f"expected features of shape (samples, {self.width}), found {tuple(X.shape)}; pass matching ones"
            )
        if not bool(torch.isfinite(X).all()):
            raise BadData("expected finite features, found NaN or infinity; one such row would ruin the sums for good")
        return X

    def _targets(self, X: Tensor, Y: Tensor, grow: bool) -> Tensor:
        """(m, K) float64 targets; new classes get zero columns when learning."""
        if len(Y) != len(X):
            raise BadData(
                f"expected one target per sample, found {len(X)} samples and {len(Y)} targets; pass equally many"
            )
        if Y.is_floating_point():
            if self.C.shape[1] == 0:
                self.values.fill_(True)
                self._grow(Y.shape[1] if Y.dim() == 2 else 1)
            Y = Y.reshape(len(Y), -1).to(torch.float64)
            if not bool(self.values) or Y.shape[1] != self.C.shape[1]:
                raise BadData(f"expected targets like those learned before, found {tuple(Y.shape)}; do not mix kinds")
            return Y
        if bool(self.values) or Y.dim() != 1:
            raise BadData(
                f"expected targets like those learned before, found {Y.dtype} {tuple(Y.shape)}; do not mix kinds"
            )
        known = set(self.classes.tolist())
        new = sorted(set(Y.tolist()) - known)
        if new and not grow:
            raise BadRequest(f"expected classes that were learned, found {new}; this block was never learned")
        if new:
            self.classes = torch.cat([self.classes, torch.tensor(new, device=self.classes.device)])
            self.counts = torch.cat([self.counts, self.counts.new_zeros(len(new))])
            self.masked = torch.cat([self.masked, self.masked.new_zeros(len(new))])
            self._grow(len(new))
        return (Y[:, None].to(self.classes.device) == self.classes).to(torch.float64)

    def _grow(self, columns: int) -> None:
        zeros = self.C.new_zeros(self.width, columns)
        self.C, self.W = torch.cat([self.C, zeros], 1), torch.cat([self.W, zeros], 1)

    def _margin(self, X: Tensor) -> float:
        if self.form == "recursive":
            return block_margin(X @ self.R @ X.T)
        V = torch.linalg.solve_triangular(torch.linalg.cholesky(self.A), X.T, upper=False)  # (d, m)
        return block_margin(V.T @ V if V.shape[1] <= V.shape[0] else V @ V.T)  # the same largest eigenvalue

    def _digests(self, X: Tensor, Y: Tensor, digests: Sequence[str] | None) -> list[str]:
        if not self.keeps_ledger:
            return []
        own = sample_digests(X, Y) if digests is None else list(digests)
        if len(own) != len(X):
            raise BadData(f"expected one digest per sample, found {len(own)} for {len(X)} samples; pass equally many")
        return own

    def _ledger_without(self, own: list[str]) -> Tensor:
        asked = Counter(bytes.fromhex(d) for d in own)
        keep = torch.ones(len(self.digests), dtype=torch.bool)
        for i, row in enumerate(self.digests.cpu().numpy()):
            if asked.get(key := row.tobytes(), 0):
                asked[key] -= 1
                keep[i] = False
        missing = sum(asked.values())
        if missing:
            raise BadRequest(
                f"expected samples that the ledger holds, found {missing} of {len(own)} that were never learned or are "
                "already forgotten; remove them from the request (features and labels must be those of learning)"
            )
        return self.digests[keep.to(self.digests.device)]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name in self.GROWING:  # these have the shapes of what was learned, not of a new head
            if prefix + name in state_dict:
                value = state_dict[prefix + name]
                setattr(self, name, torch.empty_like(value, device=self.A.device))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _as_tensor(digests: list[str]) -> Tensor:
    return torch.tensor([list(bytes.fromhex(d)) for d in digests], dtype=torch.uint8).reshape(-1, 32)


class AnalyticClassifier(nn.Module):
    """Frozen backbone, random buffer, analytic head: learns from a stream of (inputs, labels), forgets on request.

    backbone: inputs -> (B, p) features (flattened), or None to use the inputs themselves. It runs in eval mode, is
    frozen, and must not change between learning and forgetting: its digest is checked. Outputs are (B, K) scores in the
    order of `head.classes`, in the inputs' float type.
    """

    def __init__(
        self, backbone: nn.Module | None, features: int, width: int = 1000, ridge: float = 0.1, seed: int = 0,
        form: str = "statistics", refactorise_every: int = 10,
    ):  # fmt: skip
        super().__init__()
        self.backbone = nn.Identity() if backbone is None else backbone.requires_grad_(False)
        self.buffer = RandomBuffer(features, width, seed)
        self.head = AnalyticHead(width, ridge, form, refactorise_every)
        self.register_buffer("frozen", torch.zeros(32, dtype=torch.uint8))

    def features(self, inputs: Tensor) -> Tensor:
        """(B, d) float64 buffered features, without gradient, the same whatever mode the module is in."""
        with evaluating(self.backbone):
            return self.buffer(self.backbone(inputs).flatten(1))

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.features(inputs)).to(inputs.dtype if inputs.is_floating_point() else torch.float32)

    def learn(self, inputs: Tensor, labels: Tensor) -> None:
        self._check_backbone(first=not bool(self.frozen.any()))
        self.head.learn(self.features(inputs), labels, sample_digests(inputs, labels))

    def forget(self, inputs: Tensor, labels: Tensor) -> None:
        """The samples as they were learned; nothing else of the history is needed."""
        self._check_backbone(first=False)
        self.head.forget(self.features(inputs), labels, sample_digests(inputs, labels))

    def learn_stream(self, blocks: Iterable[tuple[Tensor, Tensor]]) -> AnalyticClassifier:
        """Learn blocks of (inputs, labels) in order; returns itself."""
        for inputs, labels in blocks:
            self.learn(inputs, labels)
        return self

    def _check_backbone(self, first: bool) -> None:
        state = {**self.backbone.state_dict(), "buffer": self.buffer.weight}
        digest = hashlib.sha256(
            "".join(k + sample_digests(v[None])[0] for k, v in sorted(state.items())).encode()
        ).digest()
        found = torch.tensor(list(digest), dtype=torch.uint8, device=self.frozen.device)
        if first:
            self.frozen = found
        elif not torch.equal(found, self.frozen):
            raise BadModel(
                "expected the backbone and buffer with which the live samples were learned, found other weights; "
                "restore them: subtracting other features than were added corrupts the head silently"
            )
