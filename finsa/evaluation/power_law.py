"""Learning curves: a power law of the error by the number of training rows, and what more rows would bring."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finsa.evaluation import metrics

FloatArray = NDArray[np.float64]
EXPONENTS = np.linspace(0.01, 2, 200)
PARAMETERS = 3
CHUNK = 200  # fits at once, to limit memory


def fit(sizes: FloatArray, errors: FloatArray) -> FloatArray:
    """Fit ``a + b n^-c`` with a, b >= 0 by least squares.

    Given c, the other two are a linear problem (separable least squares, Golub & Pereyra 1973), so that c is searched
    on a grid and the result is a global optimum.

    Args:
        sizes: training rows of each run, (k,).
        errors: of each run, (..., k).

    Returns:
        a, b and c, (..., 3).
    """
    largest = sizes.max()
    x = (sizes / largest) ** -EXPONENTS[:, None]  # (e, k)
    flat, found = errors.reshape(-1, errors.shape[-1]), []
    for start in range(0, len(flat), CHUNK):
        y = flat[start : start + CHUNK, None]  # (d, 1, k)
        mean_x, mean_y = x.mean(axis=-1), y.mean(axis=-1)
        centered = x - mean_x[:, None]
        slope = np.maximum((centered * y).sum(axis=-1) / (centered**2).sum(axis=-1), 0)
        floor = mean_y - slope * mean_x
        # Below 0, the best a is 0, and b the slope through the origin.
        slope = np.where(floor < 0, (x * y).sum(axis=-1) / (x**2).sum(axis=-1), slope)
        floor = np.maximum(floor, 0)
        loss = ((y - floor[..., None] - slope[..., None] * x) ** 2).sum(axis=-1)
        best = loss.argmin(axis=1)
        rows = np.arange(len(best))
        exponent = EXPONENTS[best]
        found.append(np.stack([floor[rows, best], slope[rows, best] * largest**exponent, exponent], axis=1))
    return np.concatenate(found).reshape(*errors.shape[:-1], PARAMETERS)


def predict(parameters: FloatArray, sizes: Any) -> FloatArray:
    """Expected errors, (..., m), of parameters (..., 3) at sizes (m,)."""
    a, b, c = (parameters[..., place, None] for place in range(PARAMETERS))
    return np.asarray(a + b * np.asarray(sizes, dtype=float) ** -c)


def bootstrap(sizes: FloatArray, errors: FloatArray, resampled: FloatArray, seed: int) -> FloatArray:
    """Parameters on other test rows and with other runs, (d, 3).

    Each draw is the fitted curve, shifted by what resampled test rows change at each size, plus the residual of each
    run with a random sign (wild bootstrap, Liu 1988), which keeps that small training sets vary more. Residuals are
    scaled for the parameters that the fit has used up.

    Args:
        sizes: (k,).
        errors: (k,).
        resampled: errors of the runs on resampled test rows, the same for all runs, (d, k).
        seed: of the signs.
    """
    fitted = predict(fit(sizes, errors), sizes)
    residuals = (errors - fitted) * np.sqrt(len(errors) / max(len(errors) - PARAMETERS, 1))
    shift = resampled - errors
    for size in np.unique(sizes):
        same = sizes == size
        shift[:, same] = shift[:, same].mean(axis=1, keepdims=True)
    signs = np.random.default_rng(seed).choice([-1.0, 1.0], resampled.shape)
    return fit(sizes, fitted + shift + signs * residuals)


def summarize(
    parameters: FloatArray, draws: FloatArray, rows: int, multiples: tuple[int, ...] = (1, 2, 4)
) -> dict[str, Any]:
    """Expected error at multiples of the number of rows, and how much lower it is than there, with intervals."""
    wanted = [rows * multiple for multiple in multiples]
    errors, drawn = predict(parameters, wanted), predict(draws, wanted)
    return {
        str(size): {
            "error": float(errors[place]),
            "interval": metrics.percentiles(drawn[:, place]),
            "gain": float(errors[0] - errors[place]),
            "gain_interval": metrics.percentiles(drawn[:, 0] - drawn[:, place]),
        }
        for place, size in enumerate(wanted)
    }
