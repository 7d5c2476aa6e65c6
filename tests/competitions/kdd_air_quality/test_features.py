"""Features, compared with a slow loop over hours, for one series at one origin."""

import numpy as np
import pytest

from competitions.kdd_air_quality import features
from competitions.kdd_air_quality.origins import HOUR
from competitions.kdd_air_quality.stations import ALL_POLLUTANTS, city_of

END, NUMBER = 60, 4  # the origin in days since the start, and the number of the series


@pytest.fixture(scope="module")
def known(observations):
    return features.build(observations, np.array([END]))


@pytest.fixture(scope="module")
def logs(observations):
    """Logarithms of the values before the origin [hours, stations, 6]."""
    return np.log(np.maximum(observations.values[: END * 24].astype(float), features.FLOOR))


@pytest.fixture(scope="module")
def cycle_of(logs):
    """(station, pollutant) -> the daily cycle [24]: medians averaged over several windows and neighbouring hours."""

    def cycle(station: int, pollutant: int) -> np.ndarray:
        days = logs[:, station, pollutant].reshape(-1, 24)
        rough = np.nanmean([np.nanmedian(days[-count:], axis=0) for count in (7, 14, 30, 78, 203)], axis=0)
        near = 1 if ALL_POLLUTANTS[pollutant] == "O3" else 4
        return np.array([np.nanmean([rough[(hour + k) % 24] for k in range(-near, near + 1)]) for hour in range(24)])

    return cycle


@pytest.fixture(scope="module")
def past_of(logs, cycle_of):
    """(station, pollutant) -> the week before the origin as logarithms relative to the daily cycle [168]."""

    def past(station: int, pollutant: int) -> np.ndarray:
        return logs[-168:, station, pollutant] - np.tile(cycle_of(station, pollutant), 7)

    return past


@pytest.mark.parametrize("pollutant", range(3))
def test_the_daily_cycle_is_the_mean_over_the_hours_around_but_less_so_of_ozone(
    observations, known, cycle_of, pollutant
):
    number = observations.network.series.index((0, pollutant))
    np.testing.assert_allclose(known.base[0, :, number], cycle_of(0, pollutant), atol=2e-4)


def test_features_of_a_series_are_those_of_a_slow_loop(observations, known, past_of):
    network = observations.network
    station, pollutant = network.series[NUMBER]
    first = len(known.names) - known.per_series.shape[-1] - 3  # station, pollutant and type come last
    found = dict(zip(known.names[first:], known.per_series[0, NUMBER], strict=False))
    own = past_of(station, pollutant)
    there = np.flatnonzero(np.isfinite(own))
    expected = {f"last_{n}_hours": np.nanmean(own[-n:]) for n in (3, 24, 168)}
    expected |= {f"day_{k}_ago": np.nanmean(own[168 - 24 * (k + 1) : 168 - 24 * k]) for k in (1, 2, 6)}
    expected |= {
        "trend_last_day": np.nanmean(own[-6:]) - np.nanmean(own[-24:-6]),
        "last_value": own[there[-1]],
        "hours_since_last_value": 167 - there[-1],
        "lowest_last_day": np.nanmin(own[-24:]),
        "highest_last_day": np.nanmax(own[-24:]),
        "spread_last_day": np.nanstd(own[-24:]),
    }
    city = network.of_city(city_of(network.stations[station]))
    together = np.nanmean([past_of(n, pollutant) for n in city], axis=0)
    others = np.nanmean([past_of(n, ALL_POLLUTANTS.index("NO2")) for n in city], axis=0)
    expected |= {
        "city_last_24_hours": np.nanmean(together[-24:]),
        "city_day_2_ago": np.nanmean(together[168 - 72 : 168 - 48]),
        "city_NO2_last_24_hours": np.nanmean(others[-24:]),
        "here_PM10_last_6_hours": np.nanmean(past_of(station, ALL_POLLUTANTS.index("PM10"))[-6:]),
    }
    for name, value in expected.items():
        assert found[name] == pytest.approx(value, abs=2e-4), name


@pytest.mark.parametrize("city", ["Beijing", "London"])
def test_means_of_a_city_are_of_its_own_stations(observations, known, past_of, city):
    network = observations.network
    number = network.groups.index(f"{city} PM2.5")
    first = len(known.names) - known.per_series.shape[-1] - 3
    place = known.names.index("city_PM10_last_24_hours") - first
    means = np.nanmean([past_of(n, ALL_POLLUTANTS.index("PM10")) for n in network.of_city(city)], axis=0)
    assert known.per_series[0, number, place] == pytest.approx(np.nanmean(means[-24:]), abs=2e-4)


def test_the_same_hour_of_earlier_days_is_smoothed_over_its_neighbours(observations, known, past_of):
    own = past_of(*observations.network.series[NUMBER])
    first = known.names.index("base") + 1
    for back in (1, 2, 7):
        place = known.names.index(f"same_hour_{back}_days_ago") - first
        for hour in range(24):
            middle = 168 - 24 * back + hour
            near = own[max(middle - 1, 0) : middle + 2]
            assert known.per_hour[0, hour, NUMBER, place] == pytest.approx(np.nanmean(near), abs=2e-4), (back, hour)


def test_the_shape_is_the_cycle_of_the_station_beside_that_of_its_city(observations, known):
    network, first = observations.network, known.names.index("base") + 1
    peers = [n for n, group in enumerate(network.groups) if group == network.groups[NUMBER]]
    own, city = (known.names.index(name) - first for name in ("shape", "city_shape"))
    for hour in (0, 5, 23):
        away = [known.base[0, hour, n] - np.mean([known.base[0, h, n] for h in range(24)]) for n in peers]
        assert known.per_hour[0, hour, NUMBER, city] == pytest.approx(np.mean(away), abs=1e-5)
        expected = away[peers.index(NUMBER)] - np.mean(away)
        assert abs(expected) > 1e-4 and known.per_hour[0, hour, NUMBER, own] == pytest.approx(expected, abs=1e-5)


def test_inputs_have_the_names_of_the_table(observations, known):
    """Inputs equal the table's columns of the same name; only hours_since_last_value is in days for the network."""
    table = dict(zip(known.names, known.table(np.array([0]), np.array([7]), np.array([NUMBER]))[0], strict=True))
    context, hourly = known.inputs()
    values = np.concatenate([context[0, NUMBER], hourly[0, 7, NUMBER]])
    for name, value in zip(known.input_names, values, strict=True):
        expected = table[name] / 24 if name == "hours_since_last_value" else table[name]
        assert value == pytest.approx(np.clip(np.nan_to_num(expected), -features.LIMIT, features.LIMIT)), name


def test_the_season_is_the_day_of_the_year(observations, known):
    day = (observations.start + END * 24 * HOUR).astype("datetime64[D]")
    angle = (day - np.datetime64(str(day)[:4])).astype(int) * 2 * np.pi / 365.25
    np.testing.assert_allclose(known.season[0, 0], [np.sin(angle), np.cos(angle)], atol=1e-6)
