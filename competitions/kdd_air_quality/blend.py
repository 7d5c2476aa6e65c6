"""The blend: a weighted geometric mean of the models times one level, fitted on backtest forecasts alone.

A month of forecasts is about thirty samples of weather. So the weights are fitted for all series first, those of each
city and pollutant may only lean away from them, and the level is one number: one per group is worse than none.
"""

from typing import Any

import numpy as np

from competitions.kdd_air_quality.features import log_of

Weights = dict[str, Any]  # {"level": factor on the forecast, "weights": {"Beijing PM2.5": {model: weight}}}, sums are 1
PULL_TO_EQUAL = 2e-5
PULL_TO_SHARED = 1e-3
PULL_OF_LEVEL = 0.5  # about halves it: the best level of a month says little about that of the next
LARGEST_LEVEL = 0.3  # logarithm


def fit(forecasts: dict[str, np.ndarray], truth: np.ndarray, valid: np.ndarray, groups: tuple[str, ...]) -> Weights:
    """Weights and level of least SMAPE. Forecasts and truth [days, 48, S] in ug/m3, `valid` the scored points.

    A group without a scored point has the weights of all; without any point they are equal and the level is 1.
    """
    names = list(forecasts)
    chosen = valid & (truth > 0)
    logs = np.stack([log_of(forecasts[name]) for name in names])  # [models, days, 48, S]
    target = log_of(np.where(chosen, truth, 1))
    equal = np.zeros(len(names))
    shared, level = _minimum(logs[:, chosen], target[chosen], equal, PULL_TO_EQUAL, None)
    result = {}
    for group in dict.fromkeys(groups):
        own = chosen & np.array([name == group for name in groups])
        free, _ = _minimum(logs[:, own], target[own], shared, PULL_TO_SHARED, level)
        result[group] = {name: round(float(w), 4) for name, w in zip(names, _softmax(free), strict=True)}
    return {"level": round(float(np.exp(level)), 4), "weights": result}


def _softmax(free: np.ndarray) -> np.ndarray:
    weights = np.exp(free - free.max())
    return weights / weights.sum()


def _minimum(
    logs: np.ndarray, target: np.ndarray, start: np.ndarray, pull: float, level: float | None
) -> tuple[np.ndarray, float]:
    """Logarithms of the weights [models] up to a constant, and of the level, of the least mean of 2 tanh(|d| / 2).

    logs [models, points], target [points]. The weights are pulled to `start`; a given `level` is kept.
    """
    from scipy.optimize import minimize

    if not len(target):
        return start, level or 0.0

    def value_and_gradient(free: np.ndarray) -> tuple[float, np.ndarray]:
        weights, away = _softmax(free[:-1]), free[:-1] - start
        difference = weights @ logs + free[-1] - target
        half = np.tanh(np.abs(difference) / 2)
        slope = np.sign(difference) * (1 - half**2) / len(target)
        by_weight = logs @ slope
        gradient = weights * (by_weight - weights @ by_weight) + 2 * pull * away
        value = 2 * half.mean() + pull * (away**2).sum() + PULL_OF_LEVEL * free[-1] ** 2
        return value, np.append(gradient, slope.sum() + 2 * PULL_OF_LEVEL * free[-1])

    fixed = (-LARGEST_LEVEL, LARGEST_LEVEL) if level is None else (level, level)
    bounds = [(-8, 8)] * len(start) + [fixed]
    found = minimize(value_and_gradient, np.append(start, level or 0.0), jac=True, method="L-BFGS-B", bounds=bounds)
    return found.x[:-1], float(found.x[-1])


def apply(fitted: Weights, forecasts: dict[str, np.ndarray], groups: tuple[str, ...]) -> np.ndarray:
    """The blended forecast [days, 48, S] in ug/m3."""
    names = list(forecasts)
    table = np.array([[fitted["weights"][group][name] for group in groups] for name in names])  # [models, S]
    table = table / table.sum(axis=0)
    return fitted["level"] * np.exp(sum(table[n] * log_of(forecasts[name]) for n, name in enumerate(names)))
