"""Means over tokens or answers, with their standard errors over documents."""

import numpy as np
from numpy.typing import NDArray


def ratio(sum_D: NDArray, count_D: NDArray) -> tuple[float, float | None]:
    """Sum over count, over all documents, and the standard error of that ratio over documents.

    Documents without a count are left out. The error is that of a ratio estimator, to first order: documents differ
    in length, and what differs between documents must not pass for what many tokens of one document tell.

    Args:
        sum_D, count_D: a number for each document; some count is above 0.

    Returns:
        the ratio, and its error, None for a single document.
    """
    sum_D, count_D = sum_D[count_D > 0], count_D[count_D > 0]
    n, value = len(count_D), sum_D.sum() / count_D.sum()
    if n < 2:
        return float(value), None
    residuals = sum_D - value * count_D
    return float(value), float(np.sqrt((residuals**2).sum() * n / (n - 1)) / count_D.sum())
