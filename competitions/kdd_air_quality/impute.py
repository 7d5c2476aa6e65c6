"""Fill missing values in three steps: from the city's other stations, then forward and backward in time, then the mean.

No step uses hours from a forecast's origin on. The regressors are fitted to the hours before it and applied row by row,
and the other two steps get only data that end at the origin.
"""

from collections.abc import Sequence

import bottleneck
import numpy as np

from competitions.kdd_air_quality.features import log_of, mean_of
from competitions.kdd_air_quality.parallel import fit_trees, in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import Network

# Regressors fill an hour only if fewer stations of the city than this, the target included, miss the pollutant.
MOST_MISSING = {"Beijing": (17, 35), "London": (6, 13)}  # of all stations of the city
ROUNDS = 60
FEWEST_ROWS = 200  # fewest hours of a series to fit a regressor to
SETTINGS = {"objective": "l2", "learning_rate": 0.1, "feature_fraction": 0.5, "min_data_in_leaf": 20}


def fill(models: Sequence[str], observations: Observations) -> np.ndarray:
    """Step 1: the series [hours, S] with missing values predicted by `models` from other stations at the same hour.

    Every row is filled only from itself, so later hours have no effect.
    """
    from lightgbm import Booster

    series, network = observations.series(), observations.network
    result = series.copy()
    for number, text in enumerate(models):
        rows = np.flatnonzero(_fillable(series, network, number)) if text else ()
        if len(rows):
            others = log_of(series[rows][:, _peers(network, number)])
            result[rows, number] = np.exp(Booster(model_str=text).predict(others, num_threads=1))
    return result


def _peers(network: Network, number: int) -> list[int]:
    """The series of the same pollutant at the city's other stations."""
    group = network.groups[number]
    return [other for other, name in enumerate(network.groups) if name == group and other != number]


def _fillable(series: np.ndarray, network: Network, number: int) -> np.ndarray:
    """Which hours can be filled, bool [hours]: the series is missing, and enough stations of its city are not."""
    stations, (most, of_all) = [*_peers(network, number), number], MOST_MISSING[network.cities[number]]
    limit = most * len(stations) / of_all  # in proportion for fewer stations
    missing = np.isnan(series[:, stations]).sum(axis=1)
    return np.isnan(series[:, number]) & (missing < limit)


def fit(observations: Observations, jobs: int = 1, seed: int = 0, label: str = "imputers") -> list[str]:
    """Fit a LightGBM regressor per series, in parallel; returns texts, '' for a series with few values or no neighbour.

    `observations` must end at the origin for which the regressors are used.
    """
    series, work = observations.series(), []
    for number in range(series.shape[1]):
        rows = np.isfinite(series[:, number])
        neighbours = log_of(series[rows][:, _peers(observations.network, number)])
        work.append((_fit_one, (neighbours, log_of(series[rows, number]), seed)))
    return in_parallel(work, jobs, label)


def _fit_one(neighbours: np.ndarray, target: np.ndarray, seed: int) -> str:
    """A regressor from `neighbours` [n, peers] to `target` [n], both logarithms, as text."""
    if len(target) < FEWEST_ROWS or not neighbours.shape[1]:
        return ""
    return fit_trees(neighbours, target, SETTINGS | {"seed": seed}, ROUNDS)


def complete(series: np.ndarray, network: Network) -> np.ndarray:
    """Steps 2 and 3: fill all missing values of `series` [hours, S], which end at the origin.

    A gap takes the value of the same hour on the nearest day before it, else after it. A series without any value at
    that hour takes the mean of its city and pollutant, of the hour or else of all hours.
    """
    hours = len(series)
    whole = np.pad(series, ((-hours % 24, 0), (0, 0)), constant_values=np.nan)
    days = whole.reshape(-1, 24, series.shape[1])
    days = bottleneck.push(bottleneck.push(days, axis=0)[::-1], axis=0)[::-1]  # forward, then backward
    filled = days.reshape(-1, series.shape[1])[-hours % 24 :]
    for group in network.by_group.values():
        own = filled[:, group]
        overall = np.nan_to_num(mean_of(own, None), nan=1.0)  # 1 if the city never measured this pollutant
        mean = np.nan_to_num(mean_of(own, 1), nan=overall)
        filled[:, group] = np.where(np.isnan(own), mean[:, None], own)
    return filled
