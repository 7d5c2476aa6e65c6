"""The official score: SMAPE pooled over all valid points of a submit day, then the mean of the 25 lowest days.

Definition: biendata.xyz, KDD Cup 2018, evaluation page. Arrays are [days, 48 hours, stations, 3 pollutants].
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd

from competitions.kdd_air_quality.stations import POLLUTANTS, STATION_TYPE, Network, city_of

BEST_DAYS = 25
DRAWS = 10_000


def valid_points(truth: np.ndarray, stations: tuple[str, ...]) -> np.ndarray:
    """Which points are scored, bool.

    A row (station, hour) with a missing or negative value is dropped for all pollutants. London's rows need only PM2.5
    and PM10, and their O3 is never scored.
    """
    london = np.array([city_of(station) == "London" for station in stations])
    good = truth >= 0  # false for missing values
    good[..., london, POLLUTANTS.index("O3")] = True
    valid = np.repeat(good.all(axis=-1, keepdims=True), len(POLLUTANTS), axis=-1)
    valid[..., london, POLLUTANTS.index("O3")] = False
    return valid


def terms(truth: np.ndarray, forecast: np.ndarray) -> np.ndarray:
    """|a - f| / ((a + f) / 2), from 0 to 2, and 0 where both are 0. A missing or negative forecast counts as 0."""
    forecast = np.where(forecast > 0, forecast, 0).astype(np.float64)
    truth = np.asarray(truth, np.float64)
    total = truth + forecast
    return np.divide(2 * np.abs(truth - forecast), total, out=np.zeros_like(total), where=total > 0)


def errors(truth: np.ndarray, forecast: np.ndarray, stations: tuple[str, ...]) -> tuple[np.ndarray, np.ndarray]:
    """The `terms` of all points, 0 where a point is not scored, and the `valid_points`."""
    valid = valid_points(truth, stations)
    return np.where(valid, terms(np.where(valid, truth, 0), forecast), 0), valid


def daily(truth: np.ndarray, forecast: np.ndarray, stations: tuple[str, ...]) -> np.ndarray:
    """Score of every submit day [days]: the mean over its valid points; NaN on a day without any."""
    return mean_over(*errors(truth, forecast, stations), (1, 2, 3))


def mean_over(values: np.ndarray, valid: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """Pooled mean of the valid points over `axes`; `values` are 0 elsewhere. NaN where there are none."""
    count = valid.sum(axis=axes)
    return np.divide(values.sum(axis=axes), count, out=np.full(np.shape(count), np.nan), where=count > 0)


def figures(scores: np.ndarray) -> dict[str, float]:
    """Summary figures of daily scores [days], the official ones first.

    The mean of the best 25 days is what the leaderboard showed after a month; it is better than an average day. The
    mean of 25 random days (the blog's protocol) estimates the average day.
    """
    known = scores[~np.isnan(scores)]
    names = ("mean", f"best_{BEST_DAYS}", f"resampled_{BEST_DAYS}", f"resampled_{BEST_DAYS}_sd")
    if not len(known):
        return dict.fromkeys(names, float("nan")) | {"days": 0}
    draws = np.random.default_rng(0).permuted(np.tile(known, (DRAWS, 1)), axis=1)[:, :BEST_DAYS].mean(axis=1)
    found = (known.mean(), np.sort(known)[:BEST_DAYS].mean(), draws.mean(), draws.std())
    return dict(zip(names, map(float, found), strict=True)) | {"days": len(known)}


def breakdown(truth: np.ndarray, forecast: np.ndarray, network: Network) -> pd.Series:
    """Pooled scores by city, by city and pollutant, by station type, station, band of hours, and hour ahead."""
    values, valid = errors(truth, forecast, network.stations)
    cities = [city_of(station) for station in network.stations]
    kinds = [f"{city} {STATION_TYPE[station]}" for city, station in zip(cities, network.stations, strict=True)]

    def of(by: str, labels: Sequence[str]) -> dict[tuple[str, str], tuple]:
        return {(by, name): np.s_[:, :, [n for n, one in enumerate(labels) if one == name]] for name in labels}

    places = of("city", cities)
    for group in network.by_group:
        city, pollutant = group.split(" ")
        places["pollutant", group] = np.s_[:, :, network.of_city(city), POLLUTANTS.index(pollutant)]
    places |= of("station type", kinds) | of("station", network.stations)
    for start, stop in ((0, 24), (24, 48), (0, 48)):
        places["hour band", f"hours {start}-{stop - 1}"] = np.s_[:, start:stop]
    places |= {("hour ahead", str(hour)): np.s_[:, hour] for hour in range(values.shape[1])}
    found = {name: float(mean_over(values[where], valid[where], None)) for name, where in places.items()}
    return pd.Series(found)
