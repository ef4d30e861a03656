"""Membership attacks with many models, as functions of matrices (models x examples).

Margins are phi = log p_y - log(1 - p_y), roughly Gaussian over training randomness.

    LiRA     Lambda(x) = N(phi; mu_in, s_in^2) / N(phi; mu_out, s_out^2), Gaussians over shadow models trained with and
             without x; offline: the upper tail of the `out` Gaussian alone (Carlini et al., arXiv 2112.03570)
    U-LiRA   in := trained WITH x, then unlearned of it; out := never trained on x (Hayes et al., arXiv 2403.01218;
             Kurmanji et al.). Is the target of the `in` family? Accuracy over half and half, ideal 0.5
    RMIA     score(x) = share of population z with [p_x(theta)/p_x] / [p_z(theta)/p_z] > gamma (arXiv 2312.03262)
             online  p_x = (mean_in + mean_out)/2;   offline  p_x = ((1 + a) mean_out + (1 - a))/2

The unlearned models of U-LiRA must come from different originals: the question is about training's randomness too.
"""

from __future__ import annotations

import numpy as np
from scipy.stats import norm

from expunge.audits.attacks.membership import auc, tpr_at_fpr
from expunge.errors import BadData, BadSetting
from expunge.seeds import numpy_generator

TINY = 1e-6
"""Smallest standard deviation, in units of margin: below it a Gaussian is a spike that no new model can hit."""


def attack_quality(scores: np.ndarray, members: np.ndarray) -> dict[str, float]:
    """AUC and TPR at FPR 1% and 0.1% of scores (any shape, higher = member) against their truth (same shape, bool)."""
    scores, members = np.asarray(scores, dtype=np.float64).ravel(), np.asarray(members, dtype=bool).ravel()
    inside, outside = scores[members], scores[~members]
    return {
        "auc": auc(inside, outside),
        "tpr_at_1pct_fpr": tpr_at_fpr(inside, outside, 0.01),
        "tpr_at_01pct_fpr": tpr_at_fpr(inside, outside, 0.001),
    }


def gaussians(margins: np.ndarray, chosen: np.ndarray, shared: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation (n,) of margins (M, n) over the chosen (M, n) models of each example.

    shared: one standard deviation for all examples, which LiRA advises below about 64 models an example. An example
    that fewer than two models chose takes the shared one; with none at all it is an error.
    """
    counts = chosen.sum(0)
    if (counts == 0).any():
        raise BadData(
            f"expected models with and without each example, found {int((counts == 0).sum())} examples that lack one "
            "kind; train more shadow models, or use the offline attack"
        )
    mean = np.where(chosen, margins, 0).sum(0) / counts
    squares = np.where(chosen, (margins - mean) ** 2, 0).sum(0)
    pooled = np.sqrt(squares.sum() / max(int((counts - 1).clip(0).sum()), 1))
    own = np.sqrt(squares / np.maximum(counts - 1, 1))
    return mean, np.maximum(np.where((counts < 2) | shared, pooled, own), TINY)


def lira(
    target: np.ndarray, shadows: np.ndarray, membership: np.ndarray, *, online: bool = True, shared: bool = False
) -> np.ndarray:
    """(n,) membership scores of a target's margins (n,), higher = member; log Lambda online, log-odds of the tail
    offline.

    shadows: (M, n) margins of models that are not the target. membership: (M, n) bool, model m was trained on example
    x.
    """
    target, shadows, membership = np.asarray(target, dtype=np.float64), *_matrices(shadows, membership)
    mean_out, std_out = gaussians(shadows, ~membership, shared)
    if not online:
        # -log of the tail beyond the target: unbounded, where the probability itself would tie at 1.
        return -norm.logsf(target, mean_out, std_out)
    mean_in, std_in = gaussians(shadows, membership, shared)
    return norm.logpdf(target, mean_in, std_in) - norm.logpdf(target, mean_out, std_out)


def u_lira(
    target: np.ndarray,
    inside: np.ndarray,
    outside: np.ndarray,
    inside_mask: np.ndarray | None = None,
    outside_mask: np.ndarray | None = None,
    *,
    cap: int = 300,
    shared: bool = False,
    seed: int = 0,
) -> np.ndarray:
    """Log ratio (T, n) or (n,): above 0 the target's margins look like models that were trained with x and unlearned of
    it.

    target: (T, n) or (n,) margins of models that are in neither family. inside: (A, n) margins of
    trained-then-unlearned
    models, outside: (B, n) of models never trained on x. Masks (A, n), (B, n): which models count for which example,
    default all. Each example uses equally many of both, at most `cap`.
    """
    inside, inside_mask = _matrices(inside, np.ones_like(inside, dtype=bool) if inside_mask is None else inside_mask)
    outside, outside_mask = _matrices(
        outside, np.ones_like(outside, dtype=bool) if outside_mask is None else outside_mask
    )
    counts = np.minimum(np.minimum(inside_mask.sum(0), outside_mask.sum(0)), cap)
    rng = numpy_generator(seed, "u_lira")
    mean_in, std_in = gaussians(inside, _first(inside_mask, counts, rng), shared)
    mean_out, std_out = gaussians(outside, _first(outside_mask, counts, rng), shared)
    target = np.asarray(target, dtype=np.float64)
    return norm.logpdf(target, mean_in, std_in) - norm.logpdf(target, mean_out, std_out)


def u_lira_accuracy(forgotten: np.ndarray, unseen: np.ndarray) -> float:
    """Accuracy of "log ratio > 0 means the in family" over log ratios of targets' forgotten and never seen points,
    weighing both halves equally; a tie counts half. 0.5 is ideal."""
    hit = (np.asarray(forgotten) > 0).mean() + (np.asarray(forgotten) == 0).mean() / 2
    kept = (np.asarray(unseen) < 0).mean() + (np.asarray(unseen) == 0).mean() / 2
    return float((hit + kept) / 2)


def u_lira_pairs(unlearned: np.ndarray, retrained: np.ndarray, shared: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Log ratios (N, n) of N unlearned and of N retrained models on one forget set, each pair judged by the other
    pairs.

    The cheap variant: Gaussians leave one pair out. Feed both to `u_lira_accuracy` and `auc`.
    """
    u, r = np.asarray(unlearned, dtype=np.float64), np.asarray(retrained, dtype=np.float64)
    if u.shape != r.shape or u.ndim != 2 or len(u) < 3:
        raise BadData(
            f"expected margins of at least 3 pairs, (N, n) each, found {u.shape} and {r.shape}; train as many of one "
            "kind as of the other"
        )
    (mean_in, std_in), (mean_out, std_out) = _leave_one_out(u, shared), _leave_one_out(r, shared)
    return (
        norm.logpdf(u, mean_in, std_in) - norm.logpdf(u, mean_out, std_out),
        norm.logpdf(r, mean_in, std_in) - norm.logpdf(r, mean_out, std_out),
    )


def _leave_one_out(values: np.ndarray, shared: bool) -> tuple[np.ndarray, np.ndarray]:
    """Row i: mean and standard deviation of all other rows."""
    n = len(values)
    centred = values - values.mean(0)  # so that the sum of squares does not cancel for large margins
    rest = -centred / (n - 1)
    squares = (centred**2).sum(0) - centred**2 - (n - 1) * rest**2
    variance = np.maximum(squares, 0) / (n - 2)
    if shared:
        variance = np.broadcast_to(variance.mean(1, keepdims=True), variance.shape)
    return values.mean(0) + rest, np.maximum(np.sqrt(variance), TINY)


def rmia(
    target: np.ndarray,
    references: np.ndarray,
    target_population: np.ndarray,
    reference_population: np.ndarray,
    membership: np.ndarray | None = None,
    *,
    a: float = 0.3,
    gamma: float = 1.0,
) -> np.ndarray:
    """(n,) RMIA scores in [0, 1], higher = member, from probabilities of the true answer.

    target: (n,) of the target model, target_population: (Z,) of it on a population that no model trained on.
    references: (M, n), reference_population: (M, Z) of reference models. membership: (M, n) bool for the online attack
    (an example that no reference holds takes the offline form); None: all references exclude the examples.
    a: of the offline form, in [0, 1]; see `tune_offline`.
    """
    if not 0 <= a <= 1:
        raise BadSetting(f"expected a in [0, 1], found {a}; 0.3 is usual where it was not tuned")
    references = np.asarray(references, dtype=np.float64)
    membership = np.zeros(references.shape, dtype=bool) if membership is None else membership
    references, membership = _matrices(references, membership)
    into, out = membership.sum(0), (~membership).sum(0)
    if (out == 0).any():
        raise BadData(
            f"expected a reference model without each example, found {int((out == 0).sum())} examples without one; "
            "train a reference that excludes them"
        )
    mean_out = np.where(~membership, references, 0).sum(0) / out
    mean_in = np.where(membership, references, 0).sum(0) / np.maximum(into, 1)
    p_x = np.where(into > 0, (mean_in + mean_out) / 2, ((1 + a) * mean_out + (1 - a)) / 2)
    # The population is out of every reference model: its plain mean online, the offline form where x has it too.
    online = bool((into > 0).all())
    mean_z = np.asarray(reference_population, dtype=np.float64).mean(0)
    p_z = mean_z if online else ((1 + a) * mean_z + (1 - a)) / 2
    ratio_x = np.asarray(target, dtype=np.float64) / np.maximum(p_x, 1e-30)
    ratio_z = np.sort(np.asarray(target_population, dtype=np.float64) / np.maximum(p_z, 1e-30))
    return np.searchsorted(ratio_z, ratio_x / gamma, "left") / len(ratio_z)


def tune_offline(
    references: np.ndarray, membership: np.ndarray, reference_population: np.ndarray, grid: int = 11
) -> float:
    """The a in [0, 1] under which the offline attack best tells the first reference's members by the other references.

    references, membership: (M, n) with M >= 2; reference_population: (M, Z). Examples that all the others hold are left
    out.
    """
    references, membership = _matrices(references, membership)
    usable = (~membership[1:]).any(0) if len(references) > 1 else np.zeros(references.shape[1], dtype=bool)
    truth = membership[0] & usable
    if not truth.any() or not (~membership[0] & usable).any():
        raise BadData(
            "expected two reference models at least, the first with members and non-members that another excludes, "
            f"found {len(references)} models and {int(truth.sum())} such members; keep a=0.3"
        )
    out = ~membership[1:, usable]
    # Offline: a model counts for an example only if it excludes it, so members' rows are dropped by weight.
    mean_out = np.where(out, references[1:, usable], 0).sum(0, keepdims=True) / out.sum(0)
    population = reference_population[1:].mean(0, keepdims=True)

    def quality(a: float) -> float:
        scores = rmia(references[0, usable], mean_out, reference_population[0], population, a=a)
        return auc(scores[membership[0, usable]], scores[~membership[0, usable]])

    return float(max(np.linspace(0, 1, grid), key=quality))


def _matrices(values: np.ndarray, mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    values, mask = np.asarray(values, dtype=np.float64), np.asarray(mask, dtype=bool)
    if values.ndim != 2 or values.shape != mask.shape:
        raise BadData(
            f"expected a matrix (models, examples) and a membership of the same shape, found {values.shape} and "
            f"{mask.shape}; give one row per model"
        )
    return values, mask


def _first(mask: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A random `counts[x]` of the chosen models of each example."""
    if (mask.sum(0) == counts).all():
        return mask
    keys = np.where(mask, rng.random(mask.shape), np.inf)
    return mask & (keys.argsort(0).argsort(0) < counts)
