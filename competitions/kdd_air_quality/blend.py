"""The blend: a weighted geometric mean of the models times one level, fitted to backtest forecasts alone.

A month of forecasts is only about thirty samples of weather, so the fit is strongly regularised. Clearly worse models
are left out. The weights start from how far each model is behind the best and are pulled back to that start. Those of a
city and pollutant are pulled to those of all series. The level is one number, as one per group is worse than none.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from scipy.optimize import minimize
from scipy.special import softmax

from competitions.kdd_air_quality import metric, table
from competitions.kdd_air_quality.features import log_of
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.stations import Network

Weights = dict[str, Any]  # {"level": factor on the forecast, "weights": {"Beijing PM2.5": {model: weight}}}, sums are 1
NEAR_THE_BEST = 1.02  # largest SMAPE over the best model's; weights of weaker models fitted in winter fail in spring
HALF_BEHIND = 0.01  # a model whose SMAPE is higher than the best by this fraction starts at half of the best's weight
PULL_TO_START = 2e-3
PULL_TO_SHARED = 1e-2
PULL_OF_LEVEL = 0.1  # to 1, because the best level of one month tells little about the next
LARGEST_LEVEL = 0.3  # logarithm
PARTS = 5  # parts of the days for `honest`


def tuned(forecasts: dict[str, np.ndarray], truth: np.ndarray, network: Network) -> Weights:
    """`fit` backtest forecasts {model: [days, 48, S]} to the truth [days, 48, stations, 3] at the official points."""
    own = np.s_[:, :, *network.places]
    return fit(forecasts, truth[own], metric.valid_points(truth, network.stations)[own], network.groups)


def honest(forecasts: dict[str, np.ndarray], truth: np.ndarray, network: Network) -> float:
    """The cross-validated mean daily score of consecutive days.

    Each of PARTS parts is scored by a blend fitted to the days that share no hour with it.
    """
    days, scores = np.arange(len(truth)), []
    for own in np.array_split(days, min(PARTS, len(days))):
        rest = (days <= own[0] - HORIZON_HOURS // 24) | (days >= own[-1] + HORIZON_HOURS // 24)
        weights = tuned({name: values[rest] for name, values in forecasts.items()}, truth[rest], network)
        found = apply(weights, {name: values[own] for name, values in forecasts.items()}, network.groups)
        scores.append(metric.daily(truth[own], table.grid(found, network), network.stations))
    return float(np.nanmean(np.concatenate(scores)))


def fit(forecasts: dict[str, np.ndarray], truth: np.ndarray, valid: np.ndarray, groups: tuple[str, ...]) -> Weights:
    """Weights and level of least SMAPE. Forecasts and truth [days, 48, S] in ug/m3, `valid` the scored points.

    A group without scored points gets the weights of all groups; without any scored point weights are equal, level 1.
    """
    names = list(forecasts)
    chosen = valid & (truth > 0)
    logs = np.stack([log_of(forecasts[name]) for name in names])  # [models, days, 48, S]
    target = log_of(np.where(chosen, truth, 1))
    at, wanted = logs[:, chosen], target[chosen]
    losses = np.tanh(np.abs(at - wanted) / 2).mean(axis=1) + 1e-9 if len(wanted) else np.ones(len(names))
    near = np.flatnonzero(losses <= NEAR_THE_BEST * losses.min())
    start = -np.log(2) * (losses[near] / losses.min() - 1) / HALF_BEHIND
    shared, level = _minimum(at[near], wanted, start, PULL_TO_START, None)
    result = {}
    for group in dict.fromkeys(groups):
        own = chosen & (np.array(groups) == group)
        free, _ = _minimum(logs[near][:, own], target[own], shared, PULL_TO_SHARED, level)
        weights = np.zeros(len(names))
        weights[near] = softmax(free)
        result[group] = {name: round(float(w), 4) for name, w in zip(names, weights, strict=True)}
    return {"level": round(float(np.exp(level)), 4), "weights": result}


def _minimum(
    logs: np.ndarray, target: np.ndarray, start: np.ndarray, pull: float, level: float | None
) -> tuple[np.ndarray, float]:
    """Minimise the mean of 2 tanh(|d| / 2); returns logarithms of the weights [models], up to a constant, and level.

    `logs` [models, points], `target` [points]. The weights are pulled to `start`; a given `level` is kept fixed.
    """
    if not len(target):
        return start, level or 0.0

    def value_and_gradient(free: np.ndarray) -> tuple[float, np.ndarray]:
        weights, away = softmax(free[:-1]), free[:-1] - start
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


def equal(names: Sequence[str], groups: Sequence[str]) -> Weights:
    return {"level": 1.0, "weights": {group: dict.fromkeys(names, 1.0) for group in groups}}


def apply(fitted: Weights, forecasts: dict[str, np.ndarray], groups: tuple[str, ...]) -> np.ndarray:
    """The blended forecast [days, 48, S] in ug/m3."""
    weights = np.array([[fitted["weights"][group][name] for group in groups] for name in forecasts])  # [models, S]
    weighted = zip(weights / weights.sum(axis=0), forecasts.values(), strict=True)
    return fitted["level"] * np.exp(sum(own * log_of(values) for own, values in weighted))
