"""The submission's table: a row of forecasts for each id of the sample submission, in its order."""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from common import submission
from common.errors import UserError
from common.raw import RawData
from common.submission import Sample
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.stations import FULL_NAME, POLLUTANTS, STATIONS, Network, city_of

COLUMNS = ("test_id", *POLLUTANTS)


@dataclass(frozen=True)
class Asked:
    """The content of the sample submission: its `rows` without the header, and the network of its stations."""

    rows: list[list[str]]
    sample: Sample
    network: Network  # stations in the organisers' order, not in the sample's


def asked(raw: RawData) -> Asked:
    """The sample submission of the data; without one, the official 2,304 ids with full station names.

    Raises UserError, before the training, if no valid CSV could match it.
    """
    exact = "sample_submission.csv"
    found = [exact] if raw.exists(exact) else raw.matching("*sample_submission*.csv")
    where = f"{raw.path}/{found[0]}" if found else "the official ids"
    rows = list(raw.rows(found[0]) if found else enumerate([COLUMNS, *rows_for(STATIONS)], 1))
    sample = Sample.of(rows, where)
    if sample.columns != COLUMNS:
        raise UserError(f"{where} starts with {','.join(sample.columns)!r}: expected {','.join(COLUMNS)}")
    stations = {parse_id(name)[0] for name in sample.ids}
    result = Asked([row for _, row in rows[1:]], sample, Network(tuple(name for name in STATIONS if name in stations)))
    draft = csv_rows(result, np.zeros((HORIZON_HOURS, len(result.network.series))), result.network)
    if fault := next(iter(submission.faults([COLUMNS, *draft], sample, valid)), None):
        raise UserError(
            f"no valid CSV can be written for {where}, {fault}: expected London's O3 blank or a number from 0 up. Mend "
            f"the file, or remove it to use the official ids"
        )
    return result


def rows_for(stations: Iterable[str]) -> Iterator[list[str]]:
    """The rows of a sample submission with these stations."""
    for name in stations:
        for hour in range(HORIZON_HOURS):
            yield [f"{name}#{hour}", "0", "0", "0" * (city_of(name) == "Beijing")]


def parse_id(text: str) -> tuple[str, int]:
    """(full station name, hour ahead) of an id such as 'aotizhongx_aq#17'; raises UserError for any other text."""
    station, _, hour = text.partition("#")
    if station not in FULL_NAME or not hour.isdecimal() or int(hour) >= HORIZON_HOURS:
        raise UserError(
            f"the sample submission has the id {text!r}: expected a station such as dongsi_aq or CD1, #, and an hour "
            f"from 0 to {HORIZON_HOURS - 1}"
        )
    return FULL_NAME[station], int(hour)


def grid(forecast: np.ndarray, network: Network) -> np.ndarray:
    """Forecasts [days, 48, S] -> [days, 48, stations, 3], as the score needs them; NaN for London's O3."""
    result = np.full((*forecast.shape[:2], len(network.stations), len(POLLUTANTS)), np.nan)
    result[:, :, *network.places] = forecast
    return result


def csv_rows(asked: Asked, forecast: np.ndarray, network: Network) -> Iterator[list[str]]:
    """CSV rows for one day's forecast [48, S] of `network`; London's O3 is copied from the sample."""
    values = grid(forecast[None], network)[0]
    for identity, *given in asked.rows:
        station, hour = parse_id(identity)
        own = values[hour, network.stations.index(station)]
        yield [identity, *(f"{v:.4f}" if np.isfinite(v) else default for v, default in zip(own, given, strict=True))]


def valid(values: Sequence[str]) -> str | None:
    """The fault in the values of a row, or None: all must be numbers from 0 up, but O3 may be blank (London)."""
    for name, value in zip(POLLUTANTS, values, strict=True):
        if not submission.is_number(value) and (value or name != "O3"):
            return f"{name} is {value!r}, expected a number"
        if value and float(value) < 0:
            return f"{name} is {value}, expected 0 or more"
    return None
