"""Prophet, one model per series, fitted in parallel and kept as the little that its forecast is made of.

With weekly and daily seasonality and no yearly one (16 months of data hold no second year) a forecast is a straight
line plus a table over the hours of the week. That line and table are the fitted model: forecasting needs no Prophet.
"""

import logging
import warnings
from dataclasses import dataclass

import numpy as np

from common.errors import UserError
from competitions.kdd_air_quality.origins import HORIZON_HOURS, HOUR
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations

HISTORY_DAYS = 475
CHANGEPOINTS = 67
CHANGEPOINT_SCALE = {"Beijing": 0.003, "London": 0.001}
WEEK_HOURS = 168
FEWEST_VALUES = 48


@dataclass(frozen=True)
class Weeks:
    """`level` + `slope` * hours since `start` + `week`[hour of the week], per series; NaN where none was fitted."""

    start: np.datetime64  # the first forecast hour of the fit
    level: np.ndarray  # [S]
    slope: np.ndarray  # [S], ug/m3 per hour
    week: np.ndarray  # [168, S]; hour 0 is Monday 00:00 UTC

    def at(self, hours: np.ndarray) -> np.ndarray:
        """Forecast [hours, S] in ug/m3, never below 0."""
        since = ((hours - self.start) / HOUR).astype(float)[:, None]
        return np.maximum(self.level + self.slope * since + self.week[_hour_of_week(hours)], 0)


def _hour_of_week(hours: np.ndarray) -> np.ndarray:
    return (hours.astype("datetime64[h]").astype(int) + 72) % WEEK_HOURS  # 1970-01-01 was a Thursday


def fit(observations: Observations, jobs: int, label: str = "prophet") -> Weeks:
    """Fit every series on the last 475 days before the end of `observations`; raises UserError without Prophet."""
    try:
        _silence()  # before the threads, which would all wait for the imports
    except ImportError as error:
        raise UserError(
            "prophet is not installed: pip install prophet, or leave it out with --models medians,boosting,mlp"
        ) from error
    known = observations.history(HISTORY_DAYS * 24)
    hours = known.start + np.arange(len(known.values)) * HOUR
    series = known.series()
    cities = [group.split(" ")[0] for group in known.network.groups]
    work = [(fit_one, (hours, series[:, number], city)) for number, city in enumerate(cities)]
    fitted = in_parallel(work, jobs, label)
    return Weeks(
        observations.end,
        np.array([level for level, _, _ in fitted]),
        np.array([slope for _, slope, _ in fitted]),
        np.stack([week for _, _, week in fitted], axis=1),
    )


def fit_one(hours: np.ndarray, values: np.ndarray, city: str) -> tuple[float, float, np.ndarray]:
    """Level, slope per hour and week table [168] of one series after its last hour; NaN with too few values."""
    there = np.isfinite(values)
    if there.sum() < FEWEST_VALUES:
        return np.nan, np.nan, np.full(WEEK_HOURS, np.nan)
    model = fitted_prophet(hours[there], values[there], city)
    import pandas as pd

    first = hours[-1] + HOUR
    ahead = pd.DataFrame({"ds": (first + np.arange(WEEK_HOURS) * HOUR).astype("datetime64[ns]")})
    ahead = model.setup_dataframe(ahead)
    trend = np.asarray(model.predict_trend(ahead))
    seasonal = model.predict_seasonal_components(ahead)["additive_terms"].to_numpy()
    week = np.empty(WEEK_HOURS)
    week[_hour_of_week(first + np.arange(WEEK_HOURS) * HOUR)] = seasonal
    return float(trend[0]), float(trend[-1] - trend[0]) / (WEEK_HOURS - 1), week


def fitted_prophet(hours: np.ndarray, values: np.ndarray, city: str):
    """A fitted prophet.Prophet with the competition's settings, silent."""
    import pandas as pd

    _silence()
    from prophet import Prophet

    frame = pd.DataFrame({"ds": hours.astype("datetime64[ns]"), "y": values.astype(float)})
    model = Prophet(
        growth="linear",
        n_changepoints=CHANGEPOINTS,
        changepoint_prior_scale=CHANGEPOINT_SCALE[city],
        weekly_seasonality=True,
        daily_seasonality=True,
        yearly_seasonality=False,
        uncertainty_samples=0,
    )
    model.fit(frame)
    return model


def _silence() -> None:
    """Import Prophet, without its reports of every fit, of a missing plotly and of what newer pandas think of it."""
    logging.getLogger("prophet.plot").setLevel(logging.CRITICAL)
    import cmdstanpy
    import prophet  # noqa: F401

    cmdstanpy.utils.get_logger()  # chooses its level the first time it is asked for
    for name in ("cmdstanpy", "prophet"):
        logging.getLogger(name).setLevel(logging.CRITICAL)
    warnings.filterwarnings("ignore", module="prophet")


def forecast(weeks: Weeks, first_hours: np.ndarray) -> np.ndarray:
    """ug/m3 [origins, 48, S] from the origins `first_hours`; NaN for a series that had too few values."""
    return np.stack([weeks.at(first + np.arange(HORIZON_HOURS) * HOUR) for first in first_hours])
