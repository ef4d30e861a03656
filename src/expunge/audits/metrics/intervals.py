"""95% intervals over examples, honest for a handful of them.

The percentile bootstrap is too narrow for few examples (a single one has no spread at all), so intervals are widened
about the estimate by t(n-1) / z * sqrt(n / (n-1)), which is infinite for one example and 1 for many. Proportions take
Wilson's interval, since a bootstrap of "all right" has no width. Samples are sorted first: the order of examples does
not matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
from scipy.stats import t as student

from expunge.seeds import numpy_generator

Interval = tuple[float, float]
Z95 = 1.959963984540054
RESAMPLES = 300


def mean(values: np.ndarray) -> float:
    """The plain mean as a float."""
    return float(np.mean(values))


def widening(n: int) -> float:
    """t(n-1) quantile over the normal one, times sqrt(n/(n-1)): infinite for n = 1, towards 1 for many."""
    return math.inf if n < 2 else float(student.ppf(0.975, n - 1)) / Z95 * math.sqrt(n / (n - 1))


def bootstrap(
    samples: Sequence[np.ndarray],
    statistic: Callable[..., float] = mean,
    seed: int = 0,
    resamples: int = RESAMPLES,
) -> Interval:
    """95% interval of `statistic(*samples)`; each sample (n_i, ...) is resampled by rows, apart from the others."""
    samples = [_in_order(np.asarray(sample)) for sample in samples]
    sizes = [len(sample) for sample in samples]
    if min(sizes) < 2:
        return -math.inf, math.inf
    estimate = float(statistic(*samples))
    if statistic is mean and sizes[0] > 5000:
        # The bootstrap of a mean over this many rows is its normal limit, at a thousandth of the time.
        half = Z95 * float(np.std(samples[0])) / math.sqrt(sizes[0])
        return estimate - half, estimate + half
    rng = numpy_generator(seed, "bootstrap")
    drawn = [
        statistic(*(sample[rng.integers(0, len(sample), len(sample))] for sample in samples)) for _ in range(resamples)
    ]
    low, high = np.nanpercentile(drawn, [2.5, 97.5])
    wide = widening(min(sizes))
    return estimate - wide * max(estimate - float(low), 0.0), estimate + wide * max(float(high) - estimate, 0.0)


def wilson(right: float, n: int) -> Interval:
    """Wilson's 95% interval of a proportion `right` of `n`."""
    if n == 0:
        return 0.0, 1.0
    z2 = Z95**2
    centre = (right + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(right * (1 - right) / n + z2 / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def _in_order(sample: np.ndarray) -> np.ndarray:
    if sample.ndim == 1:
        return np.sort(sample)
    flat = sample.reshape(len(sample), -1)
    return sample[np.lexsort(flat.T[::-1])]
