"""Missing values in three steps: from the city's other stations, then forward and backward in time, then the mean.

Nothing looks at or past a forecast's origin: the regressors are fitted on what lies before it, their use is row by row,
and the other two steps see only what they are given, which ends at the origin.
"""

from collections.abc import Sequence

import numpy as np

from competitions.kdd_air_quality.features import log_of
from competitions.kdd_air_quality.parallel import fit_trees, in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import Network

# Regressors fill an hour only when fewer stations of the city than this miss the pollutant, the target among them.
MOST_MISSING = {"Beijing": (17, 35), "London": (6, 13)}  # of all stations of the city
ROUNDS = 60
FEWEST_ROWS = 200  # hours of a series that are worth a regressor
SETTINGS = {"objective": "l2", "learning_rate": 0.1, "feature_fraction": 0.5, "min_data_in_leaf": 20}


def fill(models: Sequence[str], observations: Observations) -> np.ndarray:
    """Step 1: the series [hours, S], missing values regressed by `models` from the same hour at the other stations.

    A row depends on itself alone, so what comes later in the data cannot matter.
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
    """Hours [hours] in which the series is missing and enough of its city is not."""
    city = network.groups[number].split(" ")[0]
    stations, (most, of_all) = [*_peers(network, number), number], MOST_MISSING[city]
    limit = most * len(stations) / of_all  # in proportion on smaller networks
    missing = np.isnan(series[:, stations]).sum(axis=1)
    return np.isnan(series[:, number]) & (missing < limit)


def fit(observations: Observations, jobs: int = 1, seed: int = 0, label: str = "imputers") -> list[str]:
    """A LightGBM regressor per series as text, '' for one that has too few values or no neighbours; in parallel.

    `observations` must end at the origin they are used for.
    """
    series, work = observations.series(), []
    for number in range(series.shape[1]):
        rows = np.isfinite(series[:, number])
        neighbours = log_of(series[rows][:, _peers(observations.network, number)])
        work.append((_fit_one, (neighbours, log_of(series[rows, number]), seed)))
    return in_parallel(work, jobs, label)


def _fit_one(neighbours: np.ndarray, target: np.ndarray, seed: int) -> str:
    """A regressor as text, from `neighbours` [n, peers] to `target` [n], both in logarithms."""
    if len(target) < FEWEST_ROWS or not neighbours.shape[1]:
        return ""
    return fit_trees(neighbours, target, SETTINGS | {"seed": seed}, ROUNDS)


def complete(series: np.ndarray, network: Network) -> np.ndarray:
    """Steps 2 and 3: `series` [hours, S] that end at the origin, with nothing missing.

    A gap takes the value of the same hour on the nearest day before it, else after it; a series without any value takes
    its city's mean of the hour, and where there is none the mean over everything.
    """
    hours = len(series)
    whole = np.concatenate([np.full((-hours % 24, series.shape[1]), np.nan, series.dtype), series])
    days = whole.reshape(-1, 24, series.shape[1])
    days = _carried(_carried(days)[::-1])[::-1]
    filled = days.reshape(-1, series.shape[1])[-hours % 24 :]
    for group in network.by_group.values():
        own = filled[:, group]
        there = np.isfinite(own)
        count, total = there.sum(1), np.where(there, own, 0).sum(1)
        overall = total.sum() / count.sum() if count.sum() else 1.0  # a city that never measured it
        mean = np.where(count > 0, total / np.maximum(count, 1), overall)
        filled[:, group] = np.where(there, own, mean[:, None])
    return filled


def _carried(days: np.ndarray) -> np.ndarray:
    """[days, 24, S] with every gap filled by the last earlier day that has the hour."""
    rows = np.where(np.isfinite(days), np.arange(len(days))[:, None, None], 0)
    return np.take_along_axis(days, np.maximum.accumulate(rows, axis=0), axis=0)
