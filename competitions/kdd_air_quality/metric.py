"""The official score: SMAPE pooled over all valid points of a submit day, then the mean of the 25 lowest days.

Definition: biendata.xyz, KDD Cup 2018, evaluation page. Arrays are [days, 48 hours, stations, 3 pollutants].
"""

from collections.abc import Mapping

import numpy as np

from competitions.kdd_air_quality.stations import POLLUTANTS, STATION_TYPE, Network, city_of

BEST_DAYS = 25


def valid_points(truth: np.ndarray, stations: tuple[str, ...]) -> np.ndarray:
    """Which points are scored. A row (station, hour) with one missing or negative value is dropped for all pollutants;

    London's rows need PM2.5 and PM10 only, and their O3 is never scored.
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


def daily(truth: np.ndarray, forecast: np.ndarray, stations: tuple[str, ...]) -> np.ndarray:
    """Score of every submit day [days]: the mean over its valid points; NaN on a day without any."""
    valid = valid_points(truth, stations)
    return mean_over(np.where(valid, terms(np.where(valid, truth, 0), forecast), 0), valid, (1, 2, 3))


def mean_over(values: np.ndarray, valid: np.ndarray, axes: tuple[int, ...] | None) -> np.ndarray:
    """Pooled mean of the valid points over `axes`; `values` are 0 elsewhere. NaN where there are none."""
    count = valid.sum(axis=axes)
    return np.divide(values.sum(axis=axes), count, out=np.full(np.shape(count), np.nan), where=count > 0)


def best_mean(scores: np.ndarray, days: int = BEST_DAYS) -> float:
    """Mean of the lowest `days` daily scores: what the leaderboard showed after a month."""
    there = np.sort(scores[~np.isnan(scores)])
    return float(there[:days].mean()) if len(there) else float("nan")


def resampled(scores: np.ndarray, days: int = BEST_DAYS, draws: int = 10_000, seed: int = 0) -> tuple[float, float]:
    """Mean and standard deviation over `draws` of the mean score of `days` random days (the blog's protocol).

    It estimates the average day, the official score an average lucky day: both are shown, neither is tuned.
    """
    there = scores[~np.isnan(scores)]
    if not len(there):
        return float("nan"), float("nan")
    random = np.random.default_rng(seed)
    size = min(days, len(there))
    means = random.permuted(np.tile(there, (draws, 1)), axis=1)[:, :size].mean(axis=1)
    return float(means.mean()), float(means.std())


def summary(truth: np.ndarray, forecast: np.ndarray, stations: tuple[str, ...]) -> dict[str, float]:
    """The figures of a forecast over a range of days, the official ones first."""
    scores = daily(truth, forecast, stations)
    mean, deviation = resampled(scores)
    known = scores[~np.isnan(scores)]
    return {
        "mean": float(known.mean()) if len(known) else float("nan"),
        "best_25": best_mean(scores),
        "resampled_25": mean,
        "resampled_25_sd": deviation,
        "days": len(known),
    }


def breakdown(truth: np.ndarray, forecast: np.ndarray, network: Network) -> dict[str, Mapping[str, float]]:
    """Pooled scores by city, pollutant of a city, station type, station, band of hours, and hour ahead."""
    stations = network.stations
    valid = valid_points(truth, stations)
    values = np.where(valid, terms(np.where(valid, truth, 0), forecast), 0)

    def pooled(where: tuple) -> float:
        return float(mean_over(values[where], valid[where], None))

    def of(names: list[str], labels: list[str]) -> dict[str, float]:
        columns = {name: [n for n, label in enumerate(labels) if label == name] for name in names}
        return {name: pooled(np.s_[:, :, column]) for name, column in columns.items() if column}

    cities = [city_of(station) for station in stations]
    kinds = [f"{city} {STATION_TYPE[station]}" for city, station in zip(cities, stations, strict=True)]
    groups = {
        f"{city} {pollutant}": pooled(np.s_[:, :, network.of_city(city), number])
        for city in dict.fromkeys(cities)
        for number, pollutant in enumerate(POLLUTANTS)
        if f"{city} {pollutant}" in network.groups
    }
    bands = {"hours 0-23": np.s_[:, :24], "hours 24-47": np.s_[:, 24:], "hours 0-47": np.s_[:, :]}
    return {
        "city": of(list(dict.fromkeys(cities)), cities),
        "pollutant": groups,
        "station type": of(list(dict.fromkeys(kinds)), kinds),
        "station": of(list(stations), list(stations)),
        "hour band": {name: pooled(where) for name, where in bands.items()},
        "hour ahead": {str(hour): pooled(np.s_[:, hour]) for hour in range(values.shape[1])},
    }
