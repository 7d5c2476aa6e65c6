"""Medians compared with pandas and numpy; imputation, which must not use values after the origin."""

import warnings
from dataclasses import replace

import numpy as np
import pytest

from common.errors import UserError
from competitions.kdd_air_quality import impute, medians
from competitions.kdd_air_quality.stations import Network

SMALL = Network(("dongsi_aq", "tiantan_aq", "guanyuan_aq", "CD1", "BL0"))


def reference(days: np.ndarray, length: int, end: int) -> np.ndarray:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmedian(days[max(end - length, 0) : end], axis=0)


@pytest.mark.parametrize("missing", [0.0, 0.3, 0.95])
def test_sliding_medians_equal_numpy(missing):
    random = np.random.default_rng(0)
    days = np.round(random.lognormal(2, 1, (60, 24, 3)).astype(np.float32))  # rounded: many equal values
    days[random.random(days.shape) < missing] = np.nan
    days[:, :, 2] = np.nan if missing else days[:, :, 2]
    ends = np.array([3, 4, 20, 21, 40, 60])
    found = medians.sliding_medians(days, (2, 7, 30, 100), ends)
    for window, length in enumerate((2, 7, 30, 100)):
        for place, end in enumerate(ends):
            np.testing.assert_array_equal(found[window, place], reference(days, length, end), err_msg=f"{length} {end}")


def test_a_window_of_n_days_holds_the_n_days_before_the_origin():
    """Each value is the number of its day: the median of days 53..59 is 56, for both forecast days."""
    series = np.repeat(np.arange(60.0), 24)[:, None].astype(np.float32)
    np.testing.assert_array_equal(medians.forecast(series, (7,), np.array([60])), np.full((1, 48, 1), 56.0))
    series[-24:] = 1000  # the newest day is used
    for length, value in ((1, 1000), (2, 529)):
        assert (medians.forecast(series, (length,), np.array([60])) == value).all()


def test_hours_of_the_day_stay_apart():
    series = np.tile(np.arange(24.0), 30)[:, None].astype(np.float32)
    np.testing.assert_array_equal(
        medians.forecast(series, (7, 14), np.array([30]))[0, :, 0], np.tile(np.arange(24.0), 2)
    )


def test_names_of_windows():
    assert medians.windows_of("golden_5") == (11, 18, 30, 48, 78)
    assert medians.windows_of("fib_9") == (7, 14, 21, 35, 56, 91, 147, 238, 385)
    for name in ("golden_9", "fib_0", "silver_3", "golden"):
        with pytest.raises(UserError, match="golden_1 to golden_8"):
            medians.windows_of(name)


def city_series(hours: int = 600, seed: int = 0) -> np.ndarray:
    """Values [hours, 13] with a common trend in each group, so that neighbours predict each other."""
    random = np.random.default_rng(seed)
    result = np.empty((hours, len(SMALL.series)), np.float32)
    for group in dict.fromkeys(SMALL.groups):
        course = np.cumsum(random.normal(0, 0.1, hours))
        for number in np.flatnonzero(np.array(SMALL.groups) == group):
            result[:, number] = np.exp(3 + course + random.normal(0, 0.05, hours))
    return result


def observed(observations, series: np.ndarray):
    values = np.full((len(series), 5, 6), np.nan, np.float32)
    for number, (station, pollutant) in enumerate(SMALL.series):
        values[:, station, pollutant] = series[:, number]
    return replace(observations, values=values, network=SMALL)


def test_neighbours_fill_better_than_time(observations):
    truth = city_series()
    holed = truth.copy()
    hole = np.random.default_rng(2).random(len(truth)) < 0.2
    holed[hole, 0] = np.nan
    known = observed(observations, holed)
    filled = impute.fill(impute.fit(known), known)
    assert np.isfinite(filled[:, 0]).all()
    np.testing.assert_array_equal(filled[~hole], truth[~hole])
    by_neighbours = np.abs(np.log(filled[hole, 0] / truth[hole, 0])).mean()
    by_time = np.abs(np.log(impute.complete(holed, SMALL)[hole, 0] / truth[hole, 0])).mean()
    assert by_neighbours < by_time / 2


def test_the_threshold_counts_the_stations_that_are_missing():
    """Filled if fewer than 17 of 35 stations (Beijing) or 6 of 13 (London) are missing, the target included."""
    network = Network()
    for city, limit, pollutant in (("Beijing", 17, "PM2.5"), ("London", 6, "PM10")):
        members = [number for number, group in enumerate(network.groups) if group == f"{city} {pollutant}"]
        series = np.ones((2, len(network.series)), np.float32)
        series[0, members[: limit - 1]] = np.nan
        series[1, members[:limit]] = np.nan
        assert impute._fillable(series, network, members[0]).tolist() == [True, False]


def test_forward_then_backward_then_the_mean():
    series = np.full((72, len(SMALL.series)), np.nan, np.float32)
    series[:] = 5
    series[:, 0] = np.repeat([np.nan, 7, np.nan], 24)
    series[:, 3] = np.nan  # another station's PM2.5 is empty: filled by the city's mean of each hour
    filled = impute.complete(series, SMALL)
    assert (filled[:, 0] == 7).all() and np.isfinite(filled).all()
    np.testing.assert_allclose(filled[:, 3], 6)
    assert np.isfinite(impute.complete(np.full((30, len(SMALL.series)), np.nan, np.float32), SMALL)).all()


def test_imputers_know_nothing_after_the_origin(observations):
    """Changes at or after the origin alter neither the regressors nor the filled past; a change before it does."""
    series = city_series()
    series[np.random.default_rng(3).random(series.shape) < 0.1] = np.nan
    origin = observations.start + np.timedelta64(480, "h")

    def filled(values: np.ndarray) -> tuple:
        whole = observed(observations, values)
        imputers = impute.fit(whole.before(origin))
        return imputers, impute.complete(impute.fill(imputers, whole)[:480], SMALL)

    expected = filled(series)
    changed = series.copy()
    changed[480:] = 1e4
    found = filled(changed)
    assert found[0] == expected[0]
    np.testing.assert_array_equal(found[1], expected[1])
    changed[479] = 1e4
    assert filled(changed)[0] != expected[0]


def test_imputers_are_the_same_in_parallel_and_with_another_backend(observations):
    import joblib

    whole = observed(observations, city_series(300))
    alone = impute.fit(whole, jobs=1)
    assert impute.fit(whole, jobs=2) == alone
    with joblib.parallel_config(backend="multiprocessing"):  # like Ray's backend it cannot return results one by one
        assert impute.fit(whole, jobs=2) == alone
