"""The time arithmetic and the official score, compared with hand-worked cases and a slow loop over points."""

import numpy as np
import pytest

from common.errors import UserError
from competitions.kdd_air_quality import metric, origins
from competitions.kdd_air_quality.reader import Observations, read
from competitions.kdd_air_quality.stations import FULL_NAME, STATIONS, Network, city_of

STATIONS_HERE = ("dongsi_aq", "CD1")


def hours_of(day: np.datetime64) -> np.ndarray:
    return origins.first_hour(day) + np.arange(origins.HORIZON_HOURS) * origins.HOUR


def test_submit_day_forecasts_the_next_two_days():
    hours = hours_of(np.datetime64("2018-02-28"))
    assert str(hours[0]) == "2018-03-01T00" and str(hours[23]) == "2018-03-01T23" and str(hours[-1]) == "2018-03-02T23"
    days = np.array(["2018-02-28", "2018-03-01"], "datetime64[D]")
    assert origins.first_hour(days).tolist() == [origins.first_hour(day).item() for day in days]


@pytest.mark.parametrize("hours, day", [(24, "2018-04-30"), (15, "2018-04-30")])
def test_last_day_is_the_day_of_the_last_hour(hours, day):
    values = np.zeros((hours, 48, 6), np.float32)
    assert str(Observations(np.datetime64("2018-04-30T00", "h"), values, Network()).last_day) == day


@pytest.mark.parametrize("end, day", [("2018-05-01T00", "2018-04-28"), ("2018-04-30T23", "2018-04-27")])
def test_the_last_scored_day_is_over(end, day):
    found = origins.last_scored_day(np.datetime64(end, "h"))
    assert str(found) == day and hours_of(found)[-1] < np.datetime64(end, "h")
    assert hours_of(found + origins.DAY)[-1] >= np.datetime64(end, "h")


def test_days_are_checked():
    assert len(origins.days_between("2018-02-28", "2018-03-29")) == 30
    with pytest.raises(UserError, match="before --first-day"):
        origins.days_between("2018-03-02", "2018-03-01")
    for text in ("yesterday", "", "2018-13-01", "2018-03", "2018", "2018-03-01T05", "today"):
        with pytest.raises(UserError, match="2018-04-30"):
            origins.parse_day(text)


def test_131_series_and_both_spellings():
    network = Network()
    assert len(network.stations) == len(set(STATIONS)) == 48 and len(network.series) == 131
    cut = [short for short, full in FULL_NAME.items() if short != full]
    assert sorted(cut) == sorted(
        f"{name}_aq"
        for name in ("aotizhongx", "fengtaihua", "miyunshuik", "nongzhangu", "wanshouxig", "xizhimenbe", "yongdingme")
    )


def slow_score(truth: np.ndarray, forecast: np.ndarray, stations: tuple[str, ...]) -> list[float]:
    """The organisers' scoring rules, applied point by point."""
    result = []
    for day in range(len(truth)):
        terms = []
        for hour in range(truth.shape[1]):
            for number, station in enumerate(stations):
                pollutants = [0, 1, 2] if city_of(station) == "Beijing" else [0, 1]
                row = [truth[day, hour, number, p] for p in pollutants]
                if any(np.isnan(a) or a < 0 for a in row):
                    continue
                for actual, p in zip(row, pollutants, strict=True):
                    f = forecast[day, hour, number, p]
                    f = 0.0 if np.isnan(f) or f < 0 else f
                    terms.append(0.0 if actual + f == 0 else abs(actual - f) / ((actual + f) / 2))
        result.append(np.mean(terms) if terms else np.nan)
    return result


def test_daily_score_equals_the_slow_loop():
    random = np.random.default_rng(0)
    truth = np.round(random.lognormal(2, 1, (4, 48, 2, 3)))
    truth[random.random(truth.shape) < 0.1] = np.nan
    truth[random.random(truth.shape) < 0.05] *= -1
    truth[random.random(truth.shape) < 0.05] = 0
    truth[3] = np.nan
    forecast = random.lognormal(2, 1, truth.shape)
    forecast[random.random(truth.shape) < 0.05] = np.nan
    forecast[random.random(truth.shape) < 0.05] = -3
    found = metric.daily(truth, forecast, STATIONS_HERE)
    np.testing.assert_allclose(found, slow_score(truth, forecast, STATIONS_HERE), rtol=1e-12)
    assert np.isnan(found[3]) and metric.figures(found)["days"] == 3
    assert not np.allclose(found[:3], metric.daily(truth, forecast * 1.01, STATIONS_HERE)[:3], rtol=1e-6)


def case(truth: list, forecast: list, stations=("dongsi_aq",)) -> float:
    shape = (1, 1, len(stations), 3)
    return float(metric.daily(np.reshape(np.array(truth, float), shape), np.reshape(forecast, shape), stations)[0])


@pytest.mark.parametrize(
    "truth, forecast, score",
    [
        ([10, 10, 10], [10, 10, 10], 0.0),
        ([10, 10, 10], [0, 0, 0], 2.0),
        ([10, 10, 10], [-1, np.nan, 10], 4 / 3),
        ([0, 10, 10], [0, 30, 10], 1 / 3),
        ([0, 10, 10], [-5, 10, 10], 0.0),
        ([np.nan, 10, 10], [1, 1, 1], np.nan),
        ([10, -1, 10], [1, 1, 1], np.nan),
    ],
)
def test_hand_cases(truth, forecast, score):
    assert case(truth, forecast) == pytest.approx(score, nan_ok=True)


def test_london_ozone_is_never_scored_and_never_drops_a_row():
    assert case([10, 10, np.nan], [30, 30, 500], ("CD1",)) == pytest.approx(1.0)
    assert case([10, 10, 10], [30, 30, 500], ("CD1",)) == pytest.approx(1.0)
    assert np.isnan(case([10, 10, np.nan], [30, 30, 500], ("dongsi_aq",)))


def test_days_pool_points_rather_than_station_means():
    truth = np.full((1, 2, 2, 3), 10.0)
    truth[0, 1, 1] = np.nan  # dongsi has two hours, London one
    forecast = truth.copy()
    forecast[:, :, 0] = 30
    assert metric.daily(truth, forecast, STATIONS_HERE)[0] == pytest.approx(6 / 8)


def test_best_25_and_resampling():
    scores = np.arange(30.0)
    found = metric.figures(np.append(scores, np.nan))
    assert found["best_25"] == np.arange(25).mean() and found["days"] == 30 and found["mean"] == 14.5
    assert found["resampled_25"] == pytest.approx(14.5, abs=0.05) and 0.3 < found["resampled_25_sd"] < 1.2
    assert metric.figures(scores) == found
    assert np.isnan(metric.figures(np.full(3, np.nan))["best_25"])


def test_breakdown_pools_the_same_points():
    random = np.random.default_rng(1)
    truth, forecast = random.lognormal(2, 1, (2, 3, 48, 2, 3))
    found = metric.breakdown(truth, forecast, Network(STATIONS_HERE))
    beijing = metric.terms(truth[:, :, 0], forecast[:, :, 0])
    assert found["city"]["Beijing"] == pytest.approx(beijing.mean())
    assert found["pollutant"]["Beijing O3"] == pytest.approx(beijing[..., 2].mean())
    assert "London O3" not in found["pollutant"] and len(found["hour ahead"]) == 48
    london = metric.terms(truth[:, :, 1, :2], forecast[:, :, 1, :2])
    late = np.concatenate([beijing[:, 24:].ravel(), london[:, 24:].ravel()]).mean()
    assert found["hour band"]["hours 24-47"] == pytest.approx(late)


def test_score_of_nothing_on_the_real_months(real_data):
    """A forecast of 0 costs 2 wherever the truth is above 0; the scores are known from the truth of March 2018."""
    from common.raw import RawData

    observations = read(RawData(real_data / "kdd_cup_2018", "kdd_air_quality"))
    days = origins.days_between("2018-02-28", "2018-03-29")
    truth = observations.truth(days)
    figures = metric.figures(metric.daily(truth, np.zeros_like(truth), observations.network.stations))
    assert figures["mean"] == pytest.approx(1.99948, abs=2e-5)
    assert figures["best_25"] == pytest.approx(1.99937, abs=2e-5)
