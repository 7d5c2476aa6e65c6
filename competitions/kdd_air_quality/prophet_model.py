"""Prophet, one model per series, stored as the few numbers that determine its forecast.

With weekly and daily seasonality and no yearly one (16 months of data hold no second year) a forecast is a straight
line plus a table over the hours of the week. Line and table are stored, so forecasting does not need Prophet.
"""

import logging
import warnings
from typing import Any

import numpy as np
import pandas as pd

from common.errors import UserError
from competitions.kdd_air_quality.origins import HORIZON_HOURS, HOUR
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations

HISTORY_DAYS = 475
CHANGEPOINTS = 67
CHANGEPOINT_SCALE = {"Beijing": 0.003, "London": 0.001}
WEEK_HOURS = 168
FEWEST_VALUES = 48


def fit(observations: Observations, jobs: int, label: str) -> np.ndarray:
    """Fit every series; [171, S]: an hour, the level at that hour, the slope per hour, the week from Monday 00:00 UTC.

    All NaN for a series with too few values. Raises UserError if the package is not installed.
    """
    try:
        _silence()  # import before the threads start, which would all wait for it
    except ImportError as error:
        raise UserError("--models prophet: pip install prophet, or leave it out of --models") from error
    known = observations.history(HISTORY_DAYS * 24)
    hours = known.start + np.arange(len(known.values)) * HOUR
    series = zip(known.series().T, known.network.cities, strict=True)
    work = [(fit_one, (hours, values, city)) for values, city in series]
    return np.stack(in_parallel(work, jobs, label), axis=1)


def fit_one(hours: np.ndarray, values: np.ndarray, city: str) -> np.ndarray:
    """Fit one series: [171], as in `fit`."""
    there = np.isfinite(values)
    if there.sum() < FEWEST_VALUES:
        return np.full(3 + WEEK_HOURS, np.nan)
    model = fitted_prophet(hours[there], values[there], city)
    week = hours[-1] + (1 + np.arange(WEEK_HOURS)) * HOUR
    ahead = model.setup_dataframe(pd.DataFrame({"ds": week.astype("datetime64[ns]")}))
    trend = np.asarray(model.predict_trend(ahead))
    found = np.empty(3 + WEEK_HOURS)
    found[:3] = _number(week[0]), trend[0], (trend[-1] - trend[0]) / (WEEK_HOURS - 1)
    found[3 + _hour_of_week(week)] = model.predict_seasonal_components(ahead)["additive_terms"]
    return found


def fitted_prophet(hours: np.ndarray, values: np.ndarray, city: str) -> Any:
    """Fit a prophet.Prophet with the competition's settings, without its log."""
    _silence()
    from prophet import Prophet

    model = Prophet(
        n_changepoints=CHANGEPOINTS,
        changepoint_prior_scale=CHANGEPOINT_SCALE[city],
        weekly_seasonality=True,
        daily_seasonality=True,
        yearly_seasonality=False,
        uncertainty_samples=0,
    )
    return model.fit(pd.DataFrame({"ds": hours.astype("datetime64[ns]"), "y": values.astype(float)}))


def _silence() -> None:
    """Import Prophet and silence its log of every fit, of a missing plotly, and pandas' warnings about it."""
    logging.getLogger("prophet.plot").setLevel(logging.CRITICAL)
    import cmdstanpy
    import prophet  # noqa: F401

    cmdstanpy.utils.get_logger()  # the first call sets the level, so it must come before ours
    for name in ("cmdstanpy", "prophet"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="prophet")


def _number(hours: np.ndarray) -> np.ndarray:
    return hours.astype("datetime64[h]").astype(int)


def _hour_of_week(hours: np.ndarray) -> np.ndarray:
    return (_number(hours) + 72) % WEEK_HOURS  # 1970-01-01 was a Thursday


def forecast(fitted: np.ndarray, origins: np.ndarray) -> np.ndarray:
    """Forecasts in ug/m3 [origins, 48, S], never below 0; NaN for a series with too few values."""
    hours = origins[:, None] + np.arange(HORIZON_HOURS) * HOUR
    since, level, slope = _number(hours)[..., None] - fitted[0], fitted[1], fitted[2]
    return np.maximum(level + slope * since + fitted[3:][_hour_of_week(hours)], 0)
