"""The linear forecaster: one ridge regression under the SMAPE per city, pollutant and hour ahead, over all stations.

A year is only 365 samples of weather. On these a linear model with a strong penalty forecasts as well as the boosted
trees, and makes different errors; half of the trees start from it. Trees overfit to the season, but two coefficients do
not. They help because the medians lag behind the rising ozone of spring.
"""

import re

import numpy as np

from competitions.kdd_air_quality import features
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import Network

PENALTY = 200.0  # per station, on coefficients of features of variance 1; a station has a row per origin
# The penalty grows with the root of a feature's age, as the last hours tell more about the next ones than older hours.
# The shape of the daily cycle at the hour itself counts as youngest.
YOUNGEST = ("last_value", "shape", "city_shape")
# Factors on the penalty by the start of a name: the past of the whole city is more informative, single days are less.
TIMES = {"city_last_": 0.4, "city_day_": 2.5, "day_": 2.5}
# Wind carries air between stations, so the departures of all stations from the city's mean are features of every
# station. They are many, so a large penalty keeps what they have in common.
DEPARTURE = "last_6_hours", "city_last_6_hours"
PENALTY_OF_DEPARTURES = 1600.0
# Iteratively reweighted least squares: rows are weighted by the slope of 2 tanh(|d| / 2) over |d|. The start is the
# daily cycle itself, not plain least squares, so that far outliers have little weight from the beginning.
ROUNDS = 8
ROUNDED_OFF = 0.3  # smaller errors are weighted as in least squares; else the weight of a row would be unbounded


def at(lines: np.ndarray, known: features.Features, network: Network) -> np.ndarray:
    """Forecast logarithms relative to the daily cycle [N, 48, S] for all origins of `known`; `lines` are from `fit`."""
    context, hourly = known.inputs()
    result = np.empty((len(context), HORIZON_HOURS, len(network.series)), np.float32)
    for of_group, (group, own) in zip(lines, network.by_group.items(), strict=True):
        shared = _shared(known, network, group)
        for hour, (*slopes, constant) in enumerate(of_group):
            table = _table(context[:, own], hourly[:, hour % 24, own], shared[:, hour])
            result[:, hour, own] = table @ np.array(slopes) + constant
    return result


def fit(observations: Observations, jobs: int, label: str) -> np.ndarray:
    """Coefficients [groups, 48, F + 1], the last one the constant, fitted to all `training_ends` of the data.

    Raises UserError if these origins are too few.
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
    with threadpool_limits(1):  # the fits run in parallel, so a matrix product must not take every core
        found = in_parallel(work, jobs, label)
    return np.array(found).reshape(-1, HORIZON_HOURS, len(found[0]))


def _age(name: str) -> int:
    """Age in hours of a feature, by its name."""
    if name in YOUNGEST:
        return 1
    if found := re.search(r"last_(\d+)_hours", name):
        return int(found[1])
    found = re.search(r"(\d)_(days_)?ago", name)
    return 24 * int(found[1]) if found else 24


def penalties(names: tuple[str, ...], series: int) -> np.ndarray:
    """Penalties per station: of the features `names`, of the two season features, of the departures of all series."""
    times = [next((n for start, n in TIMES.items() if name.startswith(start)), 1.0) for name in names]
    own = PENALTY * np.array(times) * np.sqrt(np.array([*map(_age, names)]) / 24)
    return np.array([*own, PENALTY, PENALTY, *[PENALTY_OF_DEPARTURES] * series])


def _shared(known: features.Features, network: Network, group: str) -> np.ndarray:
    """The features [N, 48, 2 + S] that all stations of a group share: the season, and the departures of all series.

    A departure is how far a series was from its city's mean; it is 0 for series of the other city.
    """
    own, of_city = (known.per_series[..., known.series_names.index(name)] for name in DEPARTURE)
    away = np.nan_to_num(own - of_city).clip(-features.LIMIT, features.LIMIT) * network.in_city(group.split()[0])
    return np.concatenate([known.season, np.repeat(away[:, None], HORIZON_HOURS, axis=1)], axis=-1, dtype=np.float32)


def _table(context: np.ndarray, hourly: np.ndarray, shared: np.ndarray) -> np.ndarray:
    """[N, stations, F] from [N, stations, F1], [N, stations, F2] and [N, F3]."""
    shared = np.broadcast_to(shared[:, None], (*context.shape[:2], shared.shape[1]))
    return np.concatenate([context, hourly, shared], axis=-1)


def _fit_one(
    context: np.ndarray, hourly: np.ndarray, shared: np.ndarray, target: np.ndarray, penalty: np.ndarray
) -> np.ndarray:
    """Coefficients [F + 1] from the inputs of `_table` to `target` [N, stations], without its NaN; `penalty` [F]."""
    known = np.isfinite(target)
    table, target = _table(context, hourly, shared)[known], target[known]
    if not len(target):
        return np.zeros(table.shape[1] + 1)  # without any value the forecast is the daily cycle
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
    """Forecasts in ug/m3 [N, 48, S] for the origins `ends`, each only from the hours before it."""
    known = features.build(observations, ends)
    return known.in_units(at(lines, known, observations.network))
