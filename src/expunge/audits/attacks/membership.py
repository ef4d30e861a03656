"""Membership attacks that look at one model: who was in its training data?

An attack is a score (a membership signal of the task, higher = more likely a member) and a fitting rule. Here are the
rules, as functions of arrays:

    auc, roc             no fitting: how well the score ranks forget above holdout; what the verdict uses as membership
    class_thresholds     a cut for each class with the best balanced accuracy (Song & Mittal, arXiv 2003.10595)
    svc_nonmembers       RBF SVC (C=3, gamma=auto) on one score, retain against test (SalUn's SVC-MIA)
    svc_privacy          the same attacker fitted on halves and scored on the other halves
    logistic_members     class-balanced logistic regression on entropy (bad teaching, SSD)
    cross_validated      logistic regression on the loss, forget against unseen (challenge kit, MUFAC): a different
    question
    boosted_success      gradient boosting on sorted probabilities (LAF's ASR)

All fits use equally many members and non-members, or the answer is trivial. Scores are sorted before they are drawn
from, so the order of examples does not matter.

Official bug (SalUn's `SVC_MIA.py`): its modified entropy indexes the columns of every row by the whole label vector and
takes log p where log(1 - p) belongs. The formula of the threshold file (and of `Classification.signals`) is right:
Mentr = -(1 - p_y) log p_y - sum_{i != y} p_i log(1 - p_i).
"""

from __future__ import annotations

import math

import numpy as np
from scipy.stats import rankdata

from expunge.audits.metrics.intervals import Z95, Interval, bootstrap
from expunge.errors import BadData
from expunge.seeds import derive, numpy_generator


def auc(members: np.ndarray, others: np.ndarray) -> float:
    """Probability that a member scores above a non-member, ties counted half; (n,) and (m,) scores."""
    n, m = len(members), len(others)
    _enough(n, m)
    ranks = rankdata(np.concatenate([members, others]))
    return float((ranks[:n].sum() - n * (n + 1) / 2) / (n * m))


def auc_interval(members: np.ndarray, others: np.ndarray, seed: int = 0, resamples: int = 300) -> Interval:
    """95% interval of `auc`: the wider end, on each side, of the bootstrap and Hanley and McNeil's formula (1982).

    The formula is taken at least half a pair away from 0 and 1, where the bootstrap of separated scores has no width.
    """
    n, m = len(members), len(others)
    area = auc(members, others)
    low, high = bootstrap((members, others), auc, seed, resamples)
    edge = 0.5 / min(n, m)
    a = min(max(area, edge), 1 - edge)
    q1, q2 = a / (2 - a), 2 * a * a / (1 + a)
    half = Z95 * math.sqrt(max(a * (1 - a) + (n - 1) * (q1 - a * a) + (m - 1) * (q2 - a * a), 0.0) / (n * m))
    return max(0.0, min(low, area - half)), min(1.0, max(high, area + half))


def roc(members: np.ndarray, others: np.ndarray, points: int | None = 200) -> tuple[np.ndarray, np.ndarray]:
    """False and true positive rates, both rising from 0 to 1; one point for each distinct score, thinned to
    `points`."""
    _enough(len(members), len(others))
    cuts = np.unique(np.concatenate([members, others]))[::-1]
    fpr, tpr = (np.concatenate([[0.0], _share_above(part, cuts)]) for part in (others, members))
    if points is not None and len(fpr) > points:
        kept = np.unique(np.linspace(0, len(fpr) - 1, points).round().astype(int))
        fpr, tpr = fpr[kept], tpr[kept]
    return fpr, tpr


def tpr_at_fpr(members: np.ndarray, others: np.ndarray, limit: float) -> float:
    """The largest true positive rate whose false positive rate is at most `limit`."""
    fpr, tpr = roc(members, others, None)
    return float(tpr[fpr <= limit].max())


def best_threshold(members: np.ndarray, others: np.ndarray) -> float:
    """The cut t, member if score >= t, with the best balanced accuracy; the highest such cut."""
    cuts = np.unique(np.concatenate([members, others]))
    gains = _share_above(members, cuts) - _share_above(others, cuts)
    return float(cuts[len(cuts) - 1 - int(np.argmax(gains[::-1]))])


def class_thresholds(
    members: np.ndarray, member_labels: np.ndarray, others: np.ndarray, other_labels: np.ndarray
) -> dict[int, float]:
    """class -> cut. A class that lacks members or non-members takes the cut of all classes together, under key -1."""
    _enough(len(members), len(others))
    cuts = {-1: best_threshold(members, others)}
    for label in np.intersect1d(member_labels, other_labels):
        cuts[int(label)] = best_threshold(members[member_labels == label], others[other_labels == label])
    return cuts


def called_members(scores: np.ndarray, labels: np.ndarray, cuts: dict[int, float]) -> np.ndarray:
    """(n,) bool: score >= its class's cut."""
    return scores >= np.array([cuts.get(int(label), cuts[-1]) for label in labels])


def balanced_draw(
    members: np.ndarray, others: np.ndarray, seed: int, cap: int = 2000, size: int | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Equally many rows of both, min(n, m, cap, size), drawn without replacement from the sorted rows."""
    _enough(len(members), len(others))
    count = min(len(members), len(others), cap, size or cap)
    rng = numpy_generator(seed, "membership")
    return tuple(_sorted(part)[np.sort(rng.choice(len(part), count, replace=False))] for part in (members, others))


def _svc(members: np.ndarray, others: np.ndarray):
    from sklearn.svm import SVC

    rows = np.concatenate([members, others]).reshape(-1, 1)
    return SVC(C=3, gamma="auto", kernel="rbf").fit(rows, np.repeat([1, 0], [len(members), len(others)]))


def svc_nonmembers(
    retain: np.ndarray, test: np.ndarray, forget: np.ndarray, seed: int = 0, cap: int = 2000
) -> np.ndarray:
    """(n,) bool: forget rows called NON-members by the SVC fitted on equally many retain (1) and test (0) scores.

    Its mean is MIA-efficacy; the aim is the retrained model's, since too high leaks as well.
    """
    return _svc(*balanced_draw(retain, test, seed, cap)).predict(forget.reshape(-1, 1)) == 0


def svc_privacy(retain: np.ndarray, test: np.ndarray, seed: int = 0, cap: int = 2000) -> float:
    """MIA-privacy: mean of the two accuracies on the halves that the SVC was not fitted on; 0.5 is ideal."""
    members, others = balanced_draw(retain, test, seed, cap)
    if len(members) < 2:
        raise BadData(f"expected at least 2 scores each, found {len(members)}; give the case more retain or test rows")
    rng = numpy_generator(seed, "membership", "halves")
    members, others = rng.permutation(members), rng.permutation(others)
    half = len(members) // 2
    found = []
    for fitted, scored in ((slice(None, half), slice(half, None)), (slice(half, None), slice(None, half))):
        attacker = _svc(members[fitted], others[fitted])
        called = attacker.predict(members[scored].reshape(-1, 1)), attacker.predict(others[scored].reshape(-1, 1))
        found.append(((called[0] == 1).mean() + (called[1] == 0).mean()) / 2)
    return float(np.mean(found))


def svc_members(train: np.ndarray, test: np.ndarray, forget: np.ndarray, seed: int = 0, cap: int = 2000) -> np.ndarray:
    """(n,) bool: forget rows called members, the form that deep regression unlearning reports (on losses)."""
    return ~svc_nonmembers(train, test, forget, seed, cap)


def logistic_members(retain: np.ndarray, test: np.ndarray, forget: np.ndarray) -> np.ndarray:
    """(n,) bool: forget rows called members by class-balanced logistic regression on one score, retain against test."""
    from sklearn.linear_model import LogisticRegression

    _enough(len(retain), len(test))
    rows = np.concatenate([_sorted(retain), _sorted(test)]).reshape(-1, 1)
    attacker = LogisticRegression(class_weight="balanced", max_iter=1000)
    attacker.fit(rows, np.repeat([1, 0], [len(retain), len(test)]))
    return attacker.predict(forget.reshape(-1, 1)) == 1


def cross_validated(forget: np.ndarray, unseen: np.ndarray, seed: int = 0, splits: int = 10) -> float:
    """Accuracy of logistic regression on the loss, forget against unseen (balanced), over 10 shuffled splits of 10%;
    ideal 0.5."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import StratifiedShuffleSplit, cross_val_score

    members, others = balanced_draw(forget, unseen, seed, cap=1 << 40)
    n = len(members)
    if n < 2:
        raise BadData(f"expected at least 2 forget and 2 unseen examples, found {n}; leave the check out for so few")
    # 10% of the 2n rows as the card says, but never fewer than one of each class.
    held = max(math.ceil(0.1 * 2 * n), 2)
    folds = StratifiedShuffleSplit(
        n_splits=splits, test_size=held, random_state=derive(seed, "membership", "folds") % 2**31
    )
    rows = np.concatenate([members, others]).reshape(-1, 1)
    return float(cross_val_score(LogisticRegression(), rows, np.repeat([1, 0], n), cv=folds, scoring="accuracy").mean())


def boosted_success(retain: np.ndarray, test: np.ndarray, forget: np.ndarray, seed: int = 0, cap: int = 5000) -> float:
    """LAF's attack success rate from probabilities (n, K): sorted within each row; the balanced accuracy of telling
    forget rows (members) from the test rows not fitted on; closest to retrained's is best.

    Departure: scikit-learn's HistGradientBoostingClassifier (100 trees, depth 6, as XGBoost's defaults) in place of
    XGBoost, which would be one more dependency for one attack.
    """
    from sklearn.ensemble import HistGradientBoostingClassifier

    members, others = balanced_draw(np.sort(retain, axis=1), np.sort(test, axis=1), seed, cap)
    rng = numpy_generator(seed, "membership", "boosted")
    order = rng.permutation(len(others))
    half = max(len(others) // 2, 1)
    fitted, scored = others[order[:half]], others[order[half:]]
    members = members[rng.permutation(len(members))[:half]]
    if len(scored) == 0:
        raise BadData(f"expected at least 2 test rows, found {len(others)}; give the case more test data")
    attacker = HistGradientBoostingClassifier(
        max_iter=100, max_depth=6, min_samples_leaf=5, early_stopping=False, random_state=derive(seed, "boost") % 2**31
    )
    attacker.fit(np.concatenate([members, fitted]), np.repeat([1, 0], [len(members), len(fitted)]))
    hit, kept = attacker.predict(np.sort(forget, axis=1)) == 1, attacker.predict(scored) == 0
    return float((hit.mean() + kept.mean()) / 2)


def _share_above(scores: np.ndarray, cuts: np.ndarray) -> np.ndarray:
    """Share of scores >= each cut, divided once: 1 - 99/100 would lie above 0.01."""
    return (len(scores) - np.searchsorted(np.sort(scores), cuts, "left")) / len(scores)


def _sorted(part: np.ndarray) -> np.ndarray:
    return np.sort(part) if part.ndim == 1 else part[np.lexsort(part.T[::-1])]


def _enough(n: int, m: int) -> None:
    if n == 0 or m == 0:
        raise BadData(f"expected scores of members and of non-members, found {n} and {m}; give both splits some rows")
