"""The features of the forecasters, as logarithms relative to the series' own daily cycle.

SMAPE is a function of the logarithm of forecast / truth, so ratios are the natural scale. A model of ratios does not
depend on the unit or the season, and what it learnt in winter holds in May.
"""

from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from competitions.kdd_air_quality.medians import by_day, sliding_medians
from competitions.kdd_air_quality.origins import HORIZON_HOURS, HOUR
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import ALL_POLLUTANTS, CITIES, STATION_TYPE, Network

FLOOR = 0.5  # ug/m3: smaller and negative values count as this much before the logarithm
MEDIAN_DAYS = (3, 7, 14, 30, 78, 203)
# The daily cycle is the mean of these medians except the first. Medians of a few days are noisy, so it is also averaged
# over this many hours before and after; the cycle of O3 is too steep for more than one.
AROUND_HOURS = {"O3": 1}
AROUND_OTHERS = 4
RECENT_HOURS = (1, 3, 6, 12, 24, 48, 72, 168)
CITY_HOURS = (1, 3, 6, 12, 24, 48, 168)
PAST_HOURS = 168
HISTORY_DAYS = 21  # an origin needs this many days before it to be trained on
FEWEST_ORIGINS = 5
LIMIT = 5.0  # largest logarithm given to the linear model and the network: a factor of 150 is an outage, not weather
CALENDAR = ("hour", "weekday", "season_sine", "season_cosine")
FIXED = ("station", "pollutant", "type")
CATEGORICAL = (*FIXED, "weekday")


@dataclass(frozen=True)
class Features:
    """Features of N origins: per series, per series and hour of the day, and per hour ahead."""

    base: np.ndarray  # [N, 24, S] log of the daily cycle; of the city, for a series without any value
    per_series: np.ndarray  # [N, S, F1]
    per_hour: np.ndarray  # [N, 24, S, F2], relative to `base`, or the shape of `base`
    calendar: np.ndarray  # [N, 48, F3], the CALENDAR of each hour ahead
    fixed: np.ndarray  # [S, F4], what is FIXED for a series
    series_names: tuple[str, ...]  # of the F1 features
    hour_names: tuple[str, ...]  # of the F2 features

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the columns of `table`."""
        return ("hours_ahead", *CALENDAR, "base", *self.hour_names, *self.series_names, *FIXED)

    def table(self, origin: np.ndarray, hour: np.ndarray, series: np.ndarray) -> np.ndarray:
        """Rows [B, F] for the given numbers of origins, hours ahead and series, each [B]."""
        at_hour = origin, hour % 24, series
        parts = [hour[:, None], self.calendar[origin, hour], self.base[at_hour][:, None], self.per_hour[at_hour]]
        parts += [self.per_series[origin, series], self.fixed[series]]
        return np.concatenate(parts, axis=1, dtype=np.float32)

    @property
    def input_names(self) -> tuple[str, ...]:
        """Names of what `inputs` returns [F1 + F2]."""
        return self.series_names + self.hour_names

    @property
    def season(self) -> np.ndarray:
        """Sine and cosine of the day of the year of the hours ahead [N, 48, 2]."""
        return self.calendar[..., -2:]

    def inputs(self) -> tuple[np.ndarray, np.ndarray]:
        """`per_series` and `per_hour` for models that accept no missing values: these become 0, the daily cycle."""
        context = self.per_series.copy()
        context[..., self.series_names.index("hours_since_last_value")] /= 24
        return np.nan_to_num(context).clip(-LIMIT, LIMIT), np.nan_to_num(self.per_hour).clip(-LIMIT, LIMIT)

    def in_units(self, relative: np.ndarray) -> np.ndarray:
        """Logarithms relative to the daily cycle [N, 48, S] -> values in ug/m3."""
        return np.exp(relative + np.tile(self.base, (1, 2, 1)))


def log_of(values: np.ndarray) -> np.ndarray:
    return np.log(np.maximum(values, FLOOR))  # NaN stays


def build(observations: Observations, ends: np.ndarray) -> Features:
    """Features of the origins `ends` [N], ascending numbers of days since the start of the data.

    The features of origin e depend only on the hours before e * 24.
    """
    network, values = observations.network, observations.values
    lanes = log_of(values.reshape(len(values), -1))  # [hours, stations * 6]
    days = by_day(lanes[: len(lanes) // 24 * 24])
    stations, pollutants = network.places
    scored = stations * len(ALL_POLLUTANTS) + pollutants

    medians = sliding_medians(days, MEDIAN_DAYS, ends)
    base = mean_of(medians[1:], 0)  # [N, 24, lanes]
    for number, name in enumerate(ALL_POLLUTANTS):
        lane = np.s_[..., number :: len(ALL_POLLUTANTS)]
        base[lane] = _around(base[lane], AROUND_HOURS.get(name, AROUND_OTHERS))

    padded = np.pad(lanes, ((PAST_HOURS, 0), (0, 0)), constant_values=np.nan)
    past = np.stack([padded[end * 24 : end * 24 + PAST_HOURS] for end in ends])  # [N, 168, lanes]
    past = past - np.tile(base, (1, PAST_HOURS // 24, 1))

    per_series = _per_series(past, scored, network)
    per_hour = {f"median_{n}_days": (own - base)[..., scored] for n, own in zip(MEDIAN_DAYS, medians, strict=True)}
    smooth = _smooth(past[..., scored])
    per_hour |= {f"same_hour_{back}_days_ago": _day_of(smooth, back - 1) for back in (1, 2, 3, 7)}
    cycle = whole(base[..., scored], network)
    per_hour |= _shapes(cycle, network)
    types = sorted(set(STATION_TYPE.values()))
    kinds = [types.index(STATION_TYPE[network.stations[station]]) for station in stations]
    return Features(
        cycle,
        np.stack([*per_series.values()], axis=-1).astype(np.float32),
        np.stack([*per_hour.values()], axis=-1),
        _calendar(observations.start, ends),
        np.stack([stations, pollutants, kinds], axis=1).astype(np.float32),
        tuple(per_series),
        tuple(per_hour),
    )


def targets(observations: Observations, base: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Logarithm of the truth relative to the daily cycle [N, 48, S]; NaN where it is missing or not above 0."""
    padded = np.pad(observations.series(), ((0, HORIZON_HOURS), (0, 0)), constant_values=np.nan)
    ahead = np.stack([padded[end * 24 : end * 24 + HORIZON_HOURS] for end in ends])
    return np.where(ahead > 0, log_of(ahead) - np.tile(base, (1, 2, 1)), np.nan).astype(np.float32)


def training_ends(observations: Observations) -> np.ndarray:
    """Origins whose 48 hours end before the data do, so that nothing is trained on hours after the end of the data.

    Raises UserError if they are too few.
    """
    last = (len(observations.values) - HORIZON_HOURS) // 24
    first = min(HISTORY_DAYS, max(last // 2, 1))
    ends = np.arange(first, last + 1)
    if len(ends) < FEWEST_ORIGINS:
        raise UserError(
            f"{len(observations.values) // 24} days of history before {observations.end} leave {len(ends)} origins to "
            f"train on, expected at least {FEWEST_ORIGINS}: hold out fewer --backtest-days, add earlier files, or use "
            f"--models medians"
        )
    return ends


def whole(values: np.ndarray, network: Network) -> np.ndarray:
    """[N, hours, S] without missing values: filled by means of the series' other hours, its group, then all series."""
    result = np.where(np.isnan(values), mean_of(values, 1)[:, None], values)
    for group in network.by_group.values():
        own = result[..., group]
        result[..., group] = np.where(np.isnan(own), mean_of(own, 2)[..., None], own)
    return np.nan_to_num(np.where(np.isnan(result), mean_of(result, 2)[..., None], result))


def mean_of(values: np.ndarray, axis: int | None) -> np.ndarray:
    """Mean over `axis` without the missing values; NaN where all values are missing."""
    there = np.isfinite(values)
    count = there.sum(axis)
    return np.divide(
        np.where(there, values, 0).sum(axis), count, out=np.full(count.shape, np.nan, np.float32), where=count > 0
    )


def _around(cycle: np.ndarray, hours: int) -> np.ndarray:
    """Mean of each hour of the day in [N, 24, lanes] with the `hours` before and after it, wrapping at midnight."""
    return mean_of(np.stack([np.roll(cycle, back, axis=1) for back in range(-hours, hours + 1)]), 0)


def _smooth(past: np.ndarray) -> np.ndarray:
    """Mean of each hour in [N, hours, S] with its two neighbours."""
    around = np.pad(past, ((0, 0), (1, 1), (0, 0)), constant_values=np.nan)
    return mean_of(np.stack([around[:, :-2], around[:, 1:-1], around[:, 2:]]), 0)


def _day_of(past: np.ndarray, back: int) -> np.ndarray:
    """The 24 hours that ended `back` days before the origin, of [N, 168, ...]."""
    return past[:, PAST_HOURS - 24 * (back + 1) : PAST_HOURS - 24 * back]


def _shapes(cycle: np.ndarray, network: Network) -> dict[str, np.ndarray]:
    """The daily cycle [N, 24, S] minus its own mean: of the city, and of the station minus that of the city.

    Medians of a few days are noisy, so a forecast must return from high or low hours of the cycle towards its mean.
    """
    own = cycle - cycle.mean(axis=1, keepdims=True)
    city = np.empty_like(own)
    for group in network.by_group.values():
        city[..., group] = own[..., group].mean(axis=2, keepdims=True)
    return {"shape": own - city, "city_shape": city}


def _per_series(past: np.ndarray, scored: np.ndarray, network: Network) -> dict[str, np.ndarray]:
    """Features [N, S] by name, from the last week `past` [N, 168, lanes]."""
    own, (stations, pollutants) = past[..., scored], network.places
    found = {f"last_{hours}_hours": mean_of(own[:, -hours:], 1) for hours in RECENT_HOURS}
    found |= {f"day_{back}_ago": mean_of(_day_of(own, back), 1) for back in range(1, 7)}
    there, day = np.isfinite(own), own[:, -24:]
    age = np.argmax(there[:, ::-1], axis=1)
    found["last_value"] = np.take_along_axis(own, (PAST_HOURS - 1 - age)[:, None], axis=1)[:, 0]
    found["hours_since_last_value"] = np.where(there.any(1), age, PAST_HOURS).astype(np.float32)
    found["spread_last_day"] = np.sqrt(mean_of((day - mean_of(day, 1)[:, None]) ** 2, 1))
    found["lowest_last_day"] = np.fmin.reduce(day, axis=1)
    found["highest_last_day"] = np.fmax.reduce(day, axis=1)
    found["trend_last_day"] = mean_of(own[:, -6:], 1) - mean_of(own[:, -24:-6], 1)

    city = [CITIES.index(name) for name in network.cities]
    means = _city_means(past, network)  # [N, 168, cities, 6]
    for hours in CITY_HOURS:
        recent = mean_of(means[:, -hours:], 1)  # [N, cities, 6]
        found[f"city_last_{hours}_hours"] = recent[:, city, pollutants]
        if hours in (3, 24, 168):
            found |= {f"city_{name}_last_{hours}_hours": recent[:, city, n] for n, name in enumerate(ALL_POLLUTANTS)}
    for back in (1, 2, 3, 4):
        found[f"city_day_{back}_ago"] = mean_of(_day_of(means, back), 1)[:, city, pollutants]
    for number, name in enumerate(ALL_POLLUTANTS):
        here = past[..., stations * len(ALL_POLLUTANTS) + number]
        found |= {f"here_{name}_last_{hours}_hours": mean_of(here[:, -hours:], 1) for hours in (6, 24)}
    return found


def _city_means(past: np.ndarray, network: Network) -> np.ndarray:
    """Mean over each city's stations [N, 168, cities, 6]."""
    grid = past.reshape(*past.shape[:2], len(network.stations), len(ALL_POLLUTANTS))
    return np.stack([mean_of(grid[:, :, network.of_city(city)], 2) for city in CITIES], axis=2)


def _calendar(start: np.datetime64, ends: np.ndarray) -> np.ndarray:
    """The CALENDAR of the 48 hours after each origin [N, 48, F3]."""
    hours = start.astype("datetime64[h]") + (ends[:, None] * 24 + np.arange(HORIZON_HOURS)) * HOUR
    dates = hours.astype("datetime64[D]")
    weekday = (dates.astype(int) + 3) % 7  # 1970-01-01 was a Thursday
    of_year = (dates - dates.astype("datetime64[Y]")).astype(int) * (2 * np.pi / 365.25)
    hour = (hours - dates).astype(int)
    return np.stack([hour, weekday, np.sin(of_year), np.cos(of_year)], axis=-1).astype(np.float32)
