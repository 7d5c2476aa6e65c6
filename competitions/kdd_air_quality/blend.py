"""The blend: a weighted geometric mean of the models, its weights per city and pollutant fitted on backtests alone."""

import numpy as np

from competitions.kdd_air_quality.features import log_of

Weights = dict[str, dict[str, float]]  # group ("Beijing PM2.5") -> model -> weight; each group's weights sum to 1
PULL = 0.002  # towards equal weights: worth a thousandth of SMAPE, as a month of weather says little more


def fit(forecasts: dict[str, np.ndarray], truth: np.ndarray, valid: np.ndarray, groups: tuple[str, ...]) -> Weights:
    """Weights that minimise each group's SMAPE. Forecasts and truth [days, 48, S] in ug/m3, `valid` the scored points.

    A group without a scored point has equal weights.
    """
    names = list(forecasts)
    result = {}
    for group in dict.fromkeys(groups):
        own = np.array([name == group for name in groups])
        chosen = valid & own & (truth > 0)
        stack = np.stack([log_of(forecasts[name][chosen]) for name in names])  # [models, points]
        weights = _minimum(stack, log_of(truth[chosen])) if chosen.any() else np.full(len(names), 1 / len(names))
        result[group] = {name: round(float(weight), 4) for name, weight in zip(names, weights, strict=True)}
    return result


def _minimum(logs: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Weights [models], positive with sum 1, of the least mean of 2 tanh(|d| / 2); logs [models, points]."""
    from scipy.optimize import minimize

    def value_and_gradient(free: np.ndarray) -> tuple[float, np.ndarray]:
        weights = np.exp(free - free.max())
        weights /= weights.sum()
        difference = weights @ logs - target
        half = np.tanh(np.abs(difference) / 2)
        slope = logs @ (np.sign(difference) * (1 - half**2)) / len(target)  # of the mean by the weights
        gradient = weights * (slope - weights @ slope)
        return 2 * half.mean() + PULL * (free**2).sum(), gradient + 2 * PULL * free

    found = minimize(value_and_gradient, np.zeros(len(logs)), jac=True, method="L-BFGS-B", bounds=[(-6, 6)] * len(logs))
    weights = np.exp(found.x - found.x.max())
    return weights / weights.sum()


def apply(weights: Weights, forecasts: dict[str, np.ndarray], groups: tuple[str, ...]) -> np.ndarray:
    """The blended forecast [days, 48, S] in ug/m3."""
    names = list(forecasts)
    table = np.array([[weights[group][name] for group in groups] for name in names])  # [models, S]
    table = table / table.sum(axis=0)
    return np.exp(sum(table[number] * log_of(forecasts[name]) for number, name in enumerate(names)))
