"""The linear forecaster: one ridge regression under the SMAPE per city, pollutant and hour ahead, over all stations.

A year is 365 samples of weather, on which a straight line with a firm penalty forecasts as well as thousands of trees,
and errs differently: alone it is the equal of the boosted trees, and half of those start from it. Two coefficients for
the season are no trap for it as they are for trees: spring's rising ozone runs ahead of the medians.
"""

import numpy as np

from competitions.kdd_air_quality import features
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import Network

PENALTY = 200.0  # per station, on coefficients of features of variance 1; a station has a row per origin
# The slope of 2 tanh(|d| / 2) over |d| weighs the rows of the next least squares (iteratively reweighted). Starting at
# the daily cycle itself rather than at plain least squares, far outliers never get to pull.
ROUNDS = 8
ROUNDED_OFF = 0.3  # errors below it count as in least squares, or single rows would weigh without bound


def at(lines: np.ndarray, known: features.Features, network: Network) -> np.ndarray:
    """Logarithms relative to the daily cycle [N, 48, S] by what `fit` returns, for all origins of `known`."""
    context, hourly = known.inputs()
    result = np.empty((len(context), HORIZON_HOURS, len(network.series)), np.float32)
    for of_group, own in zip(lines, network.by_group.values(), strict=True):
        for hour, (*slopes, constant) in enumerate(of_group):
            table = _table(context[:, own], hourly[:, hour % 24, own], known.season[:, hour])
            result[:, hour, own] = table @ np.array(slopes) + constant
    return result


def fit(observations: Observations, jobs: int, label: str = "linear") -> np.ndarray:
    """Coefficients [groups, 48, F + 1], the last one the constant, from the origins that are over when the data end.

    Raises UserError on too few of them.
    """
    from threadpoolctl import threadpool_limits

    ends = features.training_ends(observations)
    known = features.build(observations, ends)
    context, hourly = known.inputs()
    target = features.targets(observations, known.base, ends)
    work = []
    for own in observations.network.by_group.values():
        part, hours_of_part = context[:, own], hourly[:, :, own]
        work += [
            (_fit_one, (part, hours_of_part[:, hour % 24], known.season[:, hour], target[:, hour, own]))
            for hour in range(HORIZON_HOURS)
        ]
    with threadpool_limits(1):  # the fits run side by side; a matrix product in each must not take every core
        found = in_parallel(work, jobs, label)
    return np.array(found).reshape(-1, HORIZON_HOURS, len(found[0]))


def _table(context: np.ndarray, hourly: np.ndarray, season: np.ndarray) -> np.ndarray:
    """[N, stations, F] from [N, stations, F1], [N, stations, F2] and [N, 2]."""
    season = np.broadcast_to(season[:, None], (*context.shape[:2], season.shape[1]))
    return np.concatenate([context, hourly, season], axis=-1)


def _fit_one(context: np.ndarray, hourly: np.ndarray, season: np.ndarray, target: np.ndarray) -> np.ndarray:
    """Coefficients [F + 1] from the inputs of `_table` to targets [N, stations], NaN left out."""
    known = np.isfinite(target)
    table, target = _table(context, hourly, season)[known], target[known]
    if not len(target):
        return np.zeros(table.shape[1] + 1)  # a pollutant without any value stays at its daily cycle
    mean, scale = table.mean(axis=0), table.std(axis=0) + 1e-3
    table = np.concatenate([(table - mean) / scale, np.ones((len(table), 1), np.float32)], axis=1)
    penalty = np.diag([*np.full(table.shape[1] - 1, PENALTY * known.shape[1]), 1e-3])
    error, found = -target, np.zeros(table.shape[1])
    for _ in range(ROUNDS):
        weighted = (table * ((1 - np.tanh(error / 2) ** 2) / np.maximum(np.abs(error), ROUNDED_OFF))[:, None]).T
        found = np.linalg.solve(weighted @ table + penalty, weighted @ target)
        error = table @ found.astype(np.float32) - target
    slopes = found[:-1] / scale
    return np.append(slopes, found[-1] - slopes @ mean)


def forecast(lines: np.ndarray, observations: Observations, ends: np.ndarray) -> np.ndarray:
    """ug/m3 [N, 48, S] for the origins `ends`, each from what is before it alone."""
    known = features.build(observations, ends)
    return np.exp(at(lines, known, observations.network) + np.tile(known.base, (1, 2, 1)))
