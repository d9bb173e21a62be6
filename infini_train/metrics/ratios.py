"""Means over tokens or answers, with their standard errors over documents."""

import numpy as np
from numpy.typing import NDArray


def ratio(sum_D: NDArray, count_D: NDArray) -> tuple[float, float | None]:
    """Return the total sum over the total count of D documents, and the standard error of that ratio.

    Documents with a count of 0 are left out. The error is that of a ratio estimator over documents, to first order.
    The tokens of one document are not independent of each other, so they do not count as independent samples.

    Args:
        sum_D: [D], sum of the values in each document.
        count_D: [D], number of values in each document; at least one is above 0.

    Returns:
        the ratio and its standard error; the error is None for a single document.
    """
    sum_D, count_D = sum_D[count_D > 0], count_D[count_D > 0]
    n, value = len(count_D), sum_D.sum() / count_D.sum()
    if n < 2:
        return float(value), None
    residuals = sum_D - value * count_D
    return float(value), float(np.sqrt((residuals**2).sum() * n / (n - 1)) / count_D.sum())
