"""The submission's table: the ids of the sample file in its order, and one row of forecasts for each."""

import csv
from collections.abc import Iterator, Sequence

import numpy as np

from common import submission
from common.errors import UserError
from common.raw import RawData
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.stations import FULL_NAME, POLLUTANTS, STATIONS, Network, city_of

COLUMNS = ("test_id", *POLLUTANTS)


def sample_lines(raw: RawData) -> list[str]:
    """The lines of the sample submission; without one, the official 2,304 ids with full station names."""
    names = raw.matching("*sample_submission*.csv")
    if names:
        chosen = next((name for name in names if name.lower() == "sample_submission.csv"), names[0])
        return raw.text(chosen).splitlines()
    rows = [
        f"{station}#{hour},0,0,{0 if city_of(station) == 'Beijing' else ''}"
        for station in STATIONS
        for hour in range(HORIZON_HOURS)
    ]
    return [",".join(COLUMNS), *rows]


def parse_id(text: str) -> tuple[str, int]:
    """(full station name, hour ahead) of 'aotizhongx_aq#17'; raises UserError on anything else."""
    station, _, hour = text.partition("#")
    if station not in FULL_NAME or not hour.isdecimal() or int(hour) >= HORIZON_HOURS:
        raise UserError(
            f"the sample submission has the id {text!r}: expected a station such as dongsi_aq or CD1, #, and an hour "
            f"from 0 to {HORIZON_HOURS - 1}"
        )
    return FULL_NAME[station], int(hour)


def stations_of(lines: Sequence[str]) -> tuple[str, ...]:
    """The stations that the sample asks for, in the organisers' order whatever its own is.

    Raises UserError on anything in it that no checked CSV could follow: before the training, not after it.
    """
    header, *asked = _rows_of(lines) or [[]]
    if tuple(header) != COLUMNS:
        raise UserError(
            f"the sample submission starts with {','.join(header) or 'nothing'!r}: expected {','.join(COLUMNS)}"
        )
    if not asked:
        raise UserError("the sample submission has a header and no ids: mend it, or remove it for the official ids")
    for row in asked:
        if len(row) != len(COLUMNS):
            raise UserError(f"the sample submission has the row {','.join(row)!r}: expected {len(COLUMNS)} values")
    stations = {parse_id(row[0])[0] for row in asked}
    network = Network(tuple(station for station in STATIONS if station in stations))
    draft = rows(lines, np.zeros((HORIZON_HOURS, len(network.series))), network)
    sample = submission.Sample.of_lines(lines, "the sample submission")
    fault = next(iter(submission.faults([COLUMNS, *draft], sample, valid)), None)
    if fault:
        raise UserError(
            f"the sample submission cannot be followed, {fault}: expected each id once, and London's O3 blank or a "
            f"number from 0 up. Mend it, or remove it for the official ids"
        )
    return network.stations


def _rows_of(lines: Sequence[str]) -> list[list[str]]:
    """The rows of the sample as the check of a submission reads them."""
    return [row for row in csv.reader(lines) if row]


def grid(forecast: np.ndarray, network: Network) -> np.ndarray:
    """[days, 48, S] -> [days, 48, stations, 3] as the score wants it; NaN for London's O3."""
    result = np.full((*forecast.shape[:2], len(network.stations), len(POLLUTANTS)), np.nan)
    numbers = np.array(network.series)
    result[:, :, numbers[:, 0], numbers[:, 1]] = forecast
    return result


def rows(lines: Sequence[str], forecast: np.ndarray, network: Network) -> Iterator[list[str]]:
    """CSV rows for one day's forecast [48, S]; London's O3 is what the sample has there."""
    values = grid(forecast[None], network)[0]
    for identity, *given in _rows_of(lines)[1:]:
        station, hour = parse_id(identity)
        own = values[hour, network.stations.index(station)]
        yield [identity, *(f"{v:.4f}" if np.isfinite(v) else default for v, default in zip(own, given, strict=True))]


def valid(values: Sequence[str]) -> str | None:
    """What is wrong with the values of a row: PM2.5 and PM10 must be numbers from 0 up, O3 may be blank (London)."""
    for name, value in zip(POLLUTANTS, values, strict=True):
        if not value and name == "O3":
            continue
        try:
            number = float(value)
        except ValueError:
            return f"{name} is {value!r}, expected a number"
        if number < 0:
            return f"{name} is {value}, expected 0 or more"
    return None
