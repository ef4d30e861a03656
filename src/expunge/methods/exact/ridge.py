"""The algebra of a ridge head that learns and forgets blocks: pure functions of tensors (see `analytic.py`).

X (m, d) features, Y (m, K) targets, W (d, K) head, A = Z'Z + gI and R = A^-1 (d, d) of the live samples Z. All float64.
"""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor

from expunge.errors import BadData, BadRequest

SLACK = 1e-6
"""Smallest eigenvalue of I - X R X' under which rounding decides: recursion is unsafe; under minus it, X is alien."""


def solve_head(A: Tensor, C: Tensor) -> Tensor:
    """W (d, K) = A^-1 C by Cholesky; A (d, d) symmetric positive definite."""
    return torch.cholesky_solve(C, torch.linalg.cholesky(A))


def ridge_head(X: Tensor, Y: Tensor, ridge: float) -> Tensor:
    """W (d, K) trained from scratch on features X (n, d) and targets Y (n, K): what every stream must equal."""
    return solve_head(X.T @ X + ridge * torch.eye(X.shape[1], dtype=X.dtype, device=X.device), X.T @ Y)


def learn_block(R: Tensor, W: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(R, W) after learning X (m, d), Y (m, K)."""
    return move_block(R, W, X, Y, +1.0)


def forget_block(R: Tensor, W: Tensor, X: Tensor, Y: Tensor) -> tuple[Tensor, Tensor]:
    """(R, W) after forgetting a block that was learned; raises `BadRequest` where the block cannot be in R."""
    refuse_alien(block_margin(X @ R @ X.T), tolerance=0.0)
    return move_block(R, W, X, Y, -1.0)


def move_block(R: Tensor, W: Tensor, X: Tensor, Y: Tensor, sign: float) -> tuple[Tensor, Tensor]:
    """(R, W) after one block, without any check; sign +1 learns, -1 forgets. The last product reads the NEW R."""
    XR = X @ R
    inner = torch.eye(len(X), dtype=X.dtype, device=X.device) + sign * (XR @ X.T)
    moved = R - sign * XR.T @ torch.cholesky_solve(XR, torch.linalg.cholesky((inner + inner.T) / 2))
    moved = (moved + moved.T) / 2
    return moved, W + sign * moved @ (X.T @ (Y - X @ W))


def block_margin(gram: Tensor) -> float:
    """Smallest eigenvalue of I - X R X', given X R X'. Within (0, 1) for a block that is in the live sums."""
    if len(gram) == 0:
        return 1.0
    return float(1.0 - torch.linalg.eigvalsh((gram + gram.T) / 2)[-1])


def refuse_alien(margin: float, tolerance: float = SLACK) -> None:
    """Raise `BadRequest` for a block whose removal would leave something that is not a sum of squares."""
    if margin <= -tolerance:
        raise BadRequest(
            "expected a block that this head has learned (smallest eigenvalue of I - XRX' above 0), found "
            f"{margin:.3g}; pass the samples exactly as they were learned (same backbone, buffer and preprocessing, "
            "no augmentation), once"
        )


def sample_digests(*columns: Tensor) -> list[str]:
    """sha256 of each row over the given (m, ...) tensors: how the ledger knows samples without keeping them."""
    if len({len(c) for c in columns}) != 1:
        raise BadData(
            f"expected one target per sample, found columns of lengths {[len(c) for c in columns]}; pass equally many"
        )
    hashers = [hashlib.sha256() for _ in range(len(columns[0]))]
    for column in columns:
        rows = column.detach().cpu().contiguous()
        for hasher, row in zip(hashers, rows, strict=True):
            hasher.update(row.reshape(-1).view(torch.uint8).numpy().tobytes())
    return [h.hexdigest() for h in hashers]
