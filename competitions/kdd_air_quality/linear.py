"""The linear forecaster: one ridge regression under the SMAPE per city, pollutant and hour ahead, over all stations.

A year is 365 samples of weather, on which a straight line with a firm penalty forecasts as well as thousands of trees,
and errs differently: alone it is the equal of the boosted trees, and half of those start from it. Two coefficients for
the season are no trap for it as they are for trees: spring's rising ozone runs ahead of the medians.
"""

import re

import numpy as np

from competitions.kdd_air_quality import features
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import Network

PENALTY = 200.0  # per station, on coefficients of features of variance 1; a station has a row per origin
# It grows with the root of the age of a feature: the last hours say more of the next ones than a week ago does. Where
# the daily cycle stands at the hour itself counts as the youngest.
YOUNGEST = ("last_value", "shape", "city_shape")
# The past of the whole city says more than that of a station, single days less: how often the penalty, by names' start.
TIMES = {"city_last_": 0.4, "city_day_": 2.5, "day_": 2.5}
# Wind carries air from station to station: all departures from the city's mean count for every station. There are many,
# so each for little: what they have in common shows.
DEPARTURE = "last_6_hours", "city_last_6_hours"
PENALTY_OF_DEPARTURES = 1600.0
# The slope of 2 tanh(|d| / 2) over |d| weighs the rows of the next least squares (iteratively reweighted). Starting at
# the daily cycle itself rather than at plain least squares, far outliers never get to pull.
ROUNDS = 8
ROUNDED_OFF = 0.3  # errors below it count as in least squares, or single rows would weigh without bound


def at(lines: np.ndarray, known: features.Features, network: Network) -> np.ndarray:
    """Logarithms relative to the daily cycle [N, 48, S] by what `fit` returns, for all origins of `known`."""
    context, hourly = known.inputs()
    result = np.empty((len(context), HORIZON_HOURS, len(network.series)), np.float32)
    for of_group, (group, own) in zip(lines, network.by_group.items(), strict=True):
        shared = _shared(known, network, group)
        for hour, (*slopes, constant) in enumerate(of_group):
            table = _table(context[:, own], hourly[:, hour % 24, own], shared[:, hour])
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
    work, penalty = [], penalties(known.input_names, target.shape[2])
    for group, own in observations.network.by_group.items():
        part, hours_of_part, shared = context[:, own], hourly[:, :, own], _shared(known, observations.network, group)
        work += [
            (_fit_one, (part, hours_of_part[:, hour % 24], shared[:, hour], target[:, hour, own], penalty))
            for hour in range(HORIZON_HOURS)
        ]
    with threadpool_limits(1):  # the fits run side by side; a matrix product in each must not take every core
        found = in_parallel(work, jobs, label)
    return np.array(found).reshape(-1, HORIZON_HOURS, len(found[0]))


def _age(name: str) -> int:
    """Hours, of a feature by its name."""
    if name in YOUNGEST:
        return 1
    if found := re.search(r"last_(\d+)_hours", name):
        return int(found[1])
    found = re.search(r"(\d)_(days_)?ago", name)
    return 24 * int(found[1]) if found else 24


def penalties(names: tuple[str, ...], series: int) -> np.ndarray:
    """Penalty per station of the features `names`, of the two of the season, and of the departures of all series."""
    times = [next((n for start, n in TIMES.items() if name.startswith(start)), 1.0) for name in names]
    own = PENALTY * np.array(times) * np.sqrt(np.array([*map(_age, names)]) / 24)
    return np.array([*own, PENALTY, PENALTY, *[PENALTY_OF_DEPARTURES] * series])


def _shared(known: features.Features, network: Network, group: str) -> np.ndarray:
    """What all stations of a group have in common [N, 48, 2 + S]: the season, and where the air of their city is.

    That is how far each series of the city was from the city's mean; 0 for the other city's.
    """
    own, of_city = (known.per_series[..., known.input_names.index(name)] for name in DEPARTURE)
    away = np.nan_to_num(own - of_city).clip(-features.LIMIT, features.LIMIT) * network.in_city(group.split()[0])
    return np.concatenate([known.season, np.repeat(away[:, None], HORIZON_HOURS, axis=1)], axis=-1, dtype=np.float32)


def _table(context: np.ndarray, hourly: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """[N, stations, F] from [N, stations, F1], [N, stations, F2] and [N, F3]."""
    shared = np.broadcast_to(shared[:, None], (*context.shape[:2], shared.shape[1]))
    return np.concatenate([context, hourly, shared], axis=-1)


def _fit_one(
    context: np.ndarray, hourly: np.ndarray, shared: np.ndarray, target: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Coefficients [F + 1] from the inputs of `_table` to targets [N, stations], NaN left out; `penalty` [F]."""
    known = np.isfinite(target)
    table, target = _table(context, hourly, shared)[known], target[known]
    if not len(target):
        return np.zeros(table.shape[1] + 1)  # a pollutant without any value stays at its daily cycle
    mean, scale = table.mean(axis=0), table.std(axis=0) + 1e-3
    table = np.concatenate([(table - mean) / scale, np.ones((len(table), 1), np.float32)], axis=1)
    penalty = np.diag([*penalty * known.shape[1], 1e-3])
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
