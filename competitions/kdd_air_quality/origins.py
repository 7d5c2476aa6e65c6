"""Time in this competition. All hours are UTC, and every date below goes through `first_hour`.

A forecast is named by its submit day D. It may use every hour before (D+1) 00:00, its origin, and predicts the 48 hours
from there on: hours 0-23 are D+1, hours 24-47 are D+2.
"""

from datetime import date

import numpy as np

from common.errors import UserError

HORIZON_HOURS = 48
HOUR = np.timedelta64(1, "h")
DAY = np.timedelta64(1, "D")


def first_hour(day: np.datetime64 | np.ndarray) -> np.datetime64:
    """The origin of submit day `day`: the first hour that is forecast, and that the forecast may not use."""
    return (np.asarray(day, "datetime64[D]") + DAY).astype("datetime64[h]")


def last_scored_day(end: np.datetime64) -> np.datetime64:
    """The last submit day whose 48 hours all lie before the hour `end`, where the data end."""
    return end.astype("datetime64[D]") - 3 * DAY


def days_between(first: str | np.datetime64, last: str | np.datetime64) -> np.ndarray:
    """All submit days from `first` to `last`, both included; raises UserError if there is none or for a wrong date."""
    days = np.arange(parse_day(first), parse_day(last) + DAY, dtype="datetime64[D]")
    if not len(days):
        raise UserError(f"--last-day {last} is before --first-day {first}: expected a later or the same day")
    return days


def parse_day(text: str | np.datetime64) -> np.datetime64:
    try:
        return np.datetime64(date.fromisoformat(str(text)), "D")  # numpy would take 2018-04 for its first day
    except ValueError as error:
        raise UserError(f"{str(text)!r} is not a day: expected year-month-day as in 2018-04-30") from error
