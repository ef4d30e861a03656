"""Certified removal from regularised linear classifiers: one Newton step, with a bound on what is left.

Certified Data Removal from Machine Learning Models (Guo et al., ICML 2020, arXiv 1911.03030).

    train   L_b(w) = sum_i l(y_i x_i.w) + (lam n / 2) ||w||^2 + b.w,   b ~ N(0, sigma^2 I),   to zero gradient
    remove  w <- w + H^-1 Delta,   Delta = lam m w + sum_removed grad l,   H = Hessian of the remaining loss at w
    bound   beta += g2 ||X_r||_2 ||H^-1 Delta|| ||X_r H^-1 Delta||   at every removal; X_r are the remaining rows

beta bounds the norm of the remaining loss's gradient at w, which the noise b hides: removal is (epsilon, delta)-
certified while beta <= sigma epsilon / c, c = sqrt(2 log(1.5 / delta)). Beyond that the model is retrained with a fresh
b. The step is always taken as if the gradient before it were zero; what was left before stays, so the bounds add up.

Choices: g2 = 1/4 for the logistic loss as in the paper (its l'' is in fact Lipschitz with 0.097); the quadratic loss
has g2 = 0 and is removed exactly. beta starts at the gradient norm that training left, not at 0. With K one-vs-rest
heads the budget is by default spent on the joint vector, sqrt(sum beta_k^2), because all heads are released together;
`accounting="per_class"` is the looser rule in which each head alone is (epsilon, delta)-certified. Inputs must have
norm at most 1, by `unit_rows` (each row by itself) or a constant fixed beforehand: a scale learned from the data would
depend on what is removed. Publish neither b nor earlier weights.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from expunge.errors import BadData, BadSetting, UnmetNeed
from expunge.seeds import generator

LIPSCHITZ = {"logistic": 0.25, "quadratic": 0.0}
"""g2: Lipschitz constant of l'' per loss."""
ACCOUNTINGS = ("joint", "per_class")
WHEN_SPENT = ("retrain", "refuse")


# -- pure functions: one binary head, signs y in {-1, +1} --------------------------------------------------------------
def unit_rows(X: Tensor) -> Tensor:
    """Rows longer than 1 scaled to norm 1; (n, d) float64."""
    X = X.to(torch.float64)
    return X / X.norm(dim=1, keepdim=True).clamp(min=1.0)


def loss_gradient(X: Tensor, y: Tensor, w: Tensor, loss: str = "logistic") -> Tensor:
    """(d,) sum_i grad l(x_i.w, y_i), without regulariser. quadratic: l = (x.w - y)^2 / 2."""
    z = X @ w
    return X.T @ (-y * torch.sigmoid(-y * z) if loss == "logistic" else z - y)


def objective_gradient(X: Tensor, y: Tensor, w: Tensor, lam: float, b: Tensor, loss: str = "logistic") -> Tensor:
    """(d,) gradient of L_b at w; its norm is the true residual that beta bounds."""
    return loss_gradient(X, y, w, loss) + lam * len(X) * w + b


def hessian(X: Tensor, w: Tensor, lam: float, loss: str = "logistic") -> Tensor:
    """(d, d) of the loss with regulariser; b does not enter."""
    eye = torch.eye(X.shape[1], dtype=X.dtype, device=X.device)
    if loss == "quadratic":
        return X.T @ X + lam * len(X) * eye
    p = torch.sigmoid(X @ w)
    return (X * (p * (1 - p))[:, None]).T @ X + lam * len(X) * eye


def objective(X: Tensor, y: Tensor, w: Tensor, lam: float, b: Tensor, loss: str = "logistic") -> Tensor:
    """() value of L_b."""
    z = X @ w
    fit = nn.functional.softplus(-y * z).sum() if loss == "logistic" else (z - y).square().sum() / 2
    return fit + lam * len(X) / 2 * w.square().sum() + b @ w


def minimise(
    X: Tensor, y: Tensor, lam: float, b: Tensor, loss: str = "logistic", tolerance: float = 1e-10, steps: int = 100
) -> Tensor:
    """w (d,) with ||grad L_b|| near 0, by Newton's method with halved steps (strongly convex, so it converges)."""
    w = torch.zeros_like(b)
    for _ in range(steps):
        g = objective_gradient(X, y, w, lam, b, loss)
        if float(g.norm()) <= tolerance:
            break
        direction = torch.cholesky_solve(g[:, None], torch.linalg.cholesky(hessian(X, w, lam, loss))).squeeze(1)
        value, slope, size = objective(X, y, w, lam, b, loss), float(g @ direction), 1.0
        if slope <= 1e-12 * abs(float(value)):  # values no longer resolve the decrease: the full step is right here
            w = w - direction
            continue
        while size > 1e-8 and objective(X, y, w - size * direction, lam, b, loss) > value - 0.25 * size * slope:
            size /= 2
        w = w - size * direction
    return w


def removal_step(
    X: Tensor, X_removed: Tensor, y_removed: Tensor, w: Tensor, lam: float, loss: str = "logistic"
) -> tuple[Tensor, float]:
    """One removal of a batch: (new w, what it adds to beta). X (n - m, d) are the rows that remain."""
    delta = lam * len(X_removed) * w + loss_gradient(X_removed, y_removed, w, loss)
    step = torch.cholesky_solve(delta[:, None], torch.linalg.cholesky(hessian(X, w, lam, loss))).squeeze(1)
    bound = LIPSCHITZ[loss] * torch.linalg.matrix_norm(X, 2) * step.norm() * (X @ step).norm()
    return w + step, float(bound)


def worst_case_bound(n: int, lam: float, loss: str = "logistic", gradient_norm: float = 1.0) -> float:
    """What one removal from n samples adds to beta at most, whatever the data: 4 g2 C^2 / (lam^2 (n - 1))."""
    return 4 * LIPSCHITZ[loss] * gradient_norm**2 / (lam**2 * (n - 1))


def residual_budget(sigma: float, epsilon: float, delta: float) -> float:
    """The largest beta that N(0, sigma^2) hides: sigma epsilon / sqrt(2 log(1.5 / delta))."""
    return sigma * epsilon / math.sqrt(2 * math.log(1.5 / delta))


@dataclass(frozen=True)
class Removal:
    """What one request did. bounds: beta of each head; spent and budget in the same unit (gradient norm)."""

    removed: int
    bounds: tuple[float, ...]
    spent: float
    budget: float
    retrained: bool

    @property
    def share(self) -> float:
        """Part of the budget in use, 0..1."""
        return self.spent / self.budget


class CertifiedLogistic(nn.Module):
    """A (one-vs-rest) linear classifier with certified removal. The data stay with the caller and are handed in.

    Args:
        features: d. classes: K; with K = 2 there is one head. lam, sigma: as in the file's text.
        epsilon, delta: the certificate. loss: "logistic" or "quadratic". accounting: "joint" or "per_class".
        when_spent: "retrain" on the remaining rows with a fresh b, or "refuse" (`UnmetNeed`, nothing changes).
        seed: of b; retraining derives a new one.

    State: weight (H, d), perturbation (H, d) (secret), beta (H,), rows (), trainings (), removals (); H = 1 or K.
    """

    def __init__(
        self, features: int, classes: int, lam: float = 1e-2, sigma: float = 1.0, epsilon: float = 1.0,
        delta: float = 1e-4, loss: str = "logistic", accounting: str = "joint", when_spent: str = "retrain",
        seed: int = 0,
    ):  # fmt: skip
        super().__init__()
        for value, known, what in (
            (loss, tuple(LIPSCHITZ), "loss"),
            (accounting, ACCOUNTINGS, "accounting"),
            (when_spent, WHEN_SPENT, "when_spent"),
        ):
            if value not in known:
                raise BadSetting(f"expected {what}, one of {', '.join(known)}, found {value!r}; use one of them")
        if not (lam > 0 and sigma > 0 and epsilon > 0 and 0 < delta < 1 and classes >= 2):
            raise BadSetting(
                f"expected lam, sigma, epsilon > 0, 0 < delta < 1 and classes >= 2, found lam={lam}, sigma={sigma}, "
                f"epsilon={epsilon}, delta={delta}, classes={classes}; correct them"
            )
        self.features, self.classes, self.lam, self.sigma = features, classes, lam, sigma
        self.epsilon, self.delta, self.loss = epsilon, delta, loss
        self.accounting, self.when_spent, self.seed = accounting, when_spent, seed
        heads = 1 if classes == 2 else classes
        self.register_buffer("weight", torch.zeros(heads, features, dtype=torch.float64))
        self.register_buffer("perturbation", torch.zeros(heads, features, dtype=torch.float64))
        self.register_buffer("beta", torch.zeros(heads, dtype=torch.float64))
        for name in ("rows", "trainings", "removals"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))

    def forward(self, X: Tensor) -> Tensor:
        """(B, d) -> (B, K) logits in X's float type; with two classes (0, x.w), whose softmax is the sigmoid."""
        scores = X.to(torch.float64) @ self.weight.T
        logits = scores if self.classes > 2 else torch.cat([torch.zeros_like(scores), scores], dim=1)
        return logits.to(X.dtype)

    @property
    def budget(self) -> float:
        return residual_budget(self.sigma, self.epsilon, self.delta)

    @property
    def spent(self) -> float:
        """Residual bound of all removals since the last training, by the accounting."""
        return self._spent(self.beta)

    def _spent(self, beta: Tensor) -> float:
        return float(beta.norm() if self.accounting == "joint" else beta.max())

    def train_on(self, X: Tensor, labels: Tensor) -> CertifiedLogistic:
        """Fit from scratch with a fresh perturbation; X (n, d) with rows of norm <= 1, labels (n,) in 0..K-1."""
        X, signs = self._checked(X, labels)
        if len(X) == 0:
            raise BadData("expected rows to train on, found none; a request that removes everything leaves no model")
        self.trainings += 1
        rng = generator(self.seed, "certified", "perturbation", int(self.trainings))
        b = torch.randn(self.weight.shape, generator=rng, dtype=torch.float64) * self.sigma
        self.perturbation = b.to(X.device)
        b = self.perturbation
        self.weight = torch.stack([minimise(X, signs[k], self.lam, b[k], self.loss) for k in range(len(b))])
        self.beta = self.residuals(X, labels)
        self.rows.fill_(len(X))
        if self.spent > self.budget:
            raise BadSetting(
                f"expected training to end with a gradient below the budget {self.budget:.3g}, found {self.spent:.3g}; "
                "raise sigma, epsilon or lam"
            )
        return self

    def remove(self, X: Tensor, labels: Tensor, X_removed: Tensor, labels_removed: Tensor) -> Removal:
        """Remove a batch; X (n - m, d), labels (n - m,) are the rows that remain."""
        X, signs = self._checked(X, labels)
        X_removed, signs_removed = self._checked(X_removed, labels_removed)
        if int(self.trainings) == 0 or len(X) + len(X_removed) != int(self.rows):
            raise BadData(
                f"expected the remaining and the removed rows to be the {int(self.rows)} rows of the model, found "
                f"{len(X)} + {len(X_removed)}; call train_on first and hand in all other rows"
            )
        if len(X_removed) == 0:
            return Removal(0, tuple(self.beta.tolist()), self.spent, self.budget, False)
        if len(X) == 0:
            raise BadData("expected some rows to remain, found none; to remove everything, delete the model")
        moved = [
            removal_step(X, X_removed, signs_removed[k], self.weight[k], self.lam, self.loss) for k in range(len(signs))
        ]
        beta = self.beta + torch.tensor([bound for _, bound in moved], dtype=torch.float64, device=self.beta.device)
        retrained = self._spent(beta) > self.budget
        if retrained and self.when_spent == "refuse":
            raise UnmetNeed(
                f"expected the residual bound to stay within the budget {self.budget:.3g}, found "
                f"{self._spent(beta):.3g} after this removal; call train_on with the remaining rows (a fresh "
                "perturbation), or use when_spent='retrain'"
            )
        if retrained:
            self.train_on(X, labels)
        else:
            self.weight, self.beta = torch.stack([w for w, _ in moved]), beta
            self.rows.fill_(len(X))
        self.removals += 1
        return Removal(len(X_removed), tuple(self.beta.tolist()), self.spent, self.budget, retrained)

    def residuals(self, X: Tensor, labels: Tensor) -> Tensor:
        """(H,) true gradient norm of the loss of these rows at the present weights; at most beta on the remaining."""
        X, signs = self._checked(X, labels)
        pairs = zip(signs, self.weight, self.perturbation, strict=True)
        return torch.stack([objective_gradient(X, y, w, self.lam, b, self.loss).norm() for y, w, b in pairs])

    def published(self) -> nn.Linear:
        """The weights alone as an ordinary layer: what may leave the house (no perturbation, no beta)."""
        layer = nn.Linear(self.features, len(self.weight), bias=False, dtype=torch.float64, device=self.weight.device)
        with torch.no_grad():
            layer.weight.copy_(self.weight)
        return layer

    def _checked(self, X: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """float64 X, and (H, n) signs: one row per head."""
        X = X.to(torch.float64)
        if X.dim() != 2 or X.shape[1] != self.features or len(X) != len(labels):
            raise BadData(
                f"expected inputs (n, {self.features}) with one label each, found {tuple(X.shape)} and {len(labels)} "
                "labels; flatten the inputs or pass features of the backbone"
            )
        longest = float(X.norm(dim=1).max()) if len(X) else 0.0
        if not longest <= 1 + 1e-9:
            raise BadData(
                f"expected rows of norm at most 1, found {longest:.3g}; scale them with certified.unit_rows(X) "
                "(each row by itself) before training and removal alike"
            )
        if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < self.classes:
            raise BadData(
                f"expected labels in 0..{self.classes - 1}, found {int(labels.min())}..{int(labels.max())}; "
                "renumber them"
            )
        heads = torch.ones(1, device=X.device) if self.classes == 2 else torch.arange(self.classes, device=X.device)
        return X, torch.where(labels[None].to(X.device) == heads[:, None], 1.0, -1.0).to(torch.float64)
