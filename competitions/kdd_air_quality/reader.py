"""One reader for all air quality files: the organisers' history and API layouts, and the public .tsf copy.

Any mix of files becomes one grid, hour x station x pollutant, in UTC, with NaN for missing values.
"""

import re
import unicodedata
from collections import Counter
from dataclasses import dataclass, field, replace

import numpy as np
import pandas as pd

from common import tables
from common.errors import UserError, some
from common.raw import RawData
from competitions.kdd_air_quality.origins import DAY, HORIZON_HOURS, HOUR, first_hour, last_scored_day
from competitions.kdd_air_quality.stations import (
    ALL_POLLUTANTS,
    CITIES,
    FULL_NAME,
    LONDON_OTHER,
    POLLUTANTS,
    STATIONS,
    Network,
)

# Names of columns, in lower case.
COLUMNS = {"station": ("stationid", "station_id", "geocode"), "time": ("utc_time", "time", "measurementdategmt")}
# Columns that show that a file of the competition has no observations of air quality.
OTHER_FILES = {"api_data", "test_id", "stationname", "temperature", "humidity"}
DAY_MONTH_YEAR = r"^\s*(\d\d?)([-/.])(\d\d?)\2(\d{4})"  # or month, day, year
LONGEST_GAP_DAYS = 90  # a longer gap is a mistyped date, or separates history that is useless for the last days
MEASURABLE = (-50, 5000)  # ug/m3; values outside, such as -999 or 9999, mean missing (real values: -12 to 3,280)
# Real values below 0 (drifting instruments) or from EXTREME on hardly repeat: one that is more than the fraction OFTEN
# of a column means missing.
EXTREME, OFTEN = 500, 0.01
O3_PEAK_HOURS_UTC = range(5, 11)  # Beijing's O3 peaks about 08:00 UTC, which is 16:00 local time


@dataclass(frozen=True)
class Observations:
    """Hourly values [hours, stations, 6 pollutants] float32 from `start` on, NaN where missing; ug/m3, CO in mg/m3."""

    start: np.datetime64
    values: np.ndarray
    network: Network
    warnings: tuple[str, ...] = field(default=(), repr=False)

    @property
    def end(self) -> np.datetime64:
        """The first hour after the data."""
        return self.start + len(self.values) * HOUR

    @property
    def last_day(self) -> np.datetime64:
        """The last submit day. A day that has only begun counts too; its other hours are missing values."""
        return (self.end - HOUR).astype("datetime64[D]")

    def before(self, hour: np.datetime64) -> "Observations":
        """The observations before `hour`, without all later ones, padded with missing hours up to it."""
        rows = max(int((hour - self.start) / HOUR), 0)
        known = self.values[:rows]
        return replace(self, values=np.pad(known, ((0, rows - len(known)), (0, 0), (0, 0)), constant_values=np.nan))

    def history(self, hours: int) -> "Observations":
        """The last `hours` hours only."""
        rows = max(len(self.values) - hours, 0)
        return replace(self, start=self.start + rows * HOUR, values=self.values[rows:])

    def series(self) -> np.ndarray:
        """The scored series [hours, S]."""
        return self.values[:, *self.network.places]

    def truth(self, days: np.ndarray) -> np.ndarray:
        """The truth for the forecasts of these submit days [days, 48, stations, 3].

        All NaN for a day whose 48 hours are not all within the data, as a score of the rest would not be official.
        """
        result = np.full((len(days), HORIZON_HOURS, len(self.network.stations), len(POLLUTANTS)), np.nan, np.float32)
        first = (first_hour(days) - self.start) // HOUR
        over = (first >= 0) & (days <= last_scored_day(self.end))
        result[over] = self.values[first[over, None] + np.arange(HORIZON_HOURS), :, : len(POLLUTANTS)]
        return result


def read(raw: RawData, stations: tuple[str, ...] = STATIONS) -> Observations:
    """Read all air quality files of the data into one grid over `stations`.

    Of several values for the same hour the last in the order of the file names counts. Negative values are kept, as the
    score needs them. Raises UserError if no file can be read or a whole city is missing; lesser problems are in the
    `warnings` of the result.
    """
    found, warnings, others = [], [], []
    for name in raw.names():
        file = name.rsplit("/", 1)[-1].lower()
        if "sample_submission" in file:
            continue
        if not file.endswith((".csv", ".tsf")):
            others.append(name)
            continue
        try:
            table = _csv_table(raw, name, warnings) if file.endswith(".csv") else _tsf_table(raw.read(name))
        except (ValueError, UserError) as error:  # the other files may be enough
            warnings.append(f"{name} was not read: {error}".strip())
            continue
        if table is not None and len(table):
            table = _without_sentinels(name, table, warnings)
            _warn_of_local_time(name, table, warnings)
            found.append(table)
    if others:
        warnings.append(f"neither .csv nor .tsf, so not read: {some(others, 5)}")
    if not found:
        raise _nothing(raw, f"has no file of air quality (found: {some(raw.names(), 8) or 'nothing'})", warnings)
    return _grid(pd.concat(found, ignore_index=True), Network(tuple(stations)), warnings, raw)


def _nothing(raw: RawData, what: str, warnings: list[str]) -> UserError:
    return UserError(
        f"{raw.path} {what}{_told(warnings)}: get the public copy with make data "
        f"COMP={raw.competition}, or pass DATA=/path/to/folder"
    )


def _told(warnings: list[str]) -> str:
    """The warnings in brackets, for an error: a file that was not read is often its reason."""
    return f" ({'; '.join(warnings)})" * bool(warnings)


def _csv_table(raw: RawData, name: str, warnings: list[str]) -> pd.DataFrame | None:
    """Station, hour and pollutants of one CSV in any known layout; None for a file with other content."""
    frame = tables.read(raw, name)
    plain = {column.strip().lower(): column for column in frame.columns}
    station, time = (next((plain[name] for name in names if name in plain), None) for names in COLUMNS.values())
    pollutants = {_pollutant(column): column for column in frame.columns if _pollutant(column)}
    if station is None or time is None or not pollutants:
        if not OTHER_FILES.isdisjoint(plain):
            return None
        raise ValueError(
            f"expected a column of the station ({', '.join(COLUMNS['station'])}), one of the time "
            f"({', '.join(COLUMNS['time'])}) and of a pollutant (PM2.5, PM25_Concentration, PM2.5 (ug/m3) ...), found "
            f"{some(frame.columns, 8)}"
        )
    for column in frame.columns:
        if (pollutant := _pollutant(column)) and column != pollutants[pollutant]:
            raise ValueError(f"{column} and {pollutants[pollutant]} both hold {pollutant}: remove or rename one")
    values = {pollutant: _numbers(name, frame[column], warnings) for pollutant, column in pollutants.items()}
    hours, has_hour = _hours(frame[time])
    table = pd.DataFrame({"station": frame[station], "hour": hours, **values})
    there = table["station"].notna()
    unreadable, hourless = there & table["hour"].isna(), there & _hourless(table, has_hour)
    for left_out, why in ((unreadable, "cannot be read"), (hourless, "has no hour")):
        if left_out.any():
            warnings.append(
                f"{name}: {int(left_out.sum())} rows are left out because their time {why}, such as "
                f"{str(frame[time][left_out].iloc[0])!r}: expected year, month, day and hour as in 2018-01-31 05:00"
            )
    return table[there & ~unreadable & ~hourless]


def _pollutant(column: str) -> str | None:
    """PM2.5 for 'PM2.5', 'pm2.5 (ug/m3)', 'PM2.5 (µg/m³)' and 'PM25_Concentration'; None for others or other units."""
    plain = unicodedata.normalize("NFKC", column).strip().lower()  # both signs for micro become μ, ³ becomes 3
    name = re.sub(r"(_concentration|\([uμ]g/m3\)|(?<=co)\s*\(mg/m3\))$", "", plain)
    short = name.strip().replace("pm25", "pm2.5").upper()
    return short if short in ALL_POLLUTANTS else None


def _numbers(name: str, column: pd.Series, warnings: list[str]) -> pd.Series:
    """The column as numbers; other text, such as a decimal comma, and inf become NaN with a warning."""
    numbers = pd.to_numeric(column, errors="coerce")
    numbers = numbers.where(np.isfinite(numbers))
    lost = column[numbers.isna() & column.notna()].astype(str)
    lost = lost[lost.str.strip() != ""]
    if len(lost):
        warnings.append(
            f"{name}: {len(lost)} values of {column.name.strip()} are not numbers and count as missing, such as "
            f"{lost.iloc[0]!r}: expected one such as 12.5"
        )
    return numbers


def _without_sentinels(name: str, table: pd.DataFrame, warnings: list[str]) -> pd.DataFrame:
    """The table without numbers that mean missing: outside MEASURABLE, or the same extreme value too often."""
    counts: Counter = Counter()
    for pollutant in table.columns.intersection(ALL_POLLUTANTS):
        values = table[pollutant]
        found, times = np.unique(values[values.notna()], return_counts=True)
        still = ((found < 0) | (found >= EXTREME)) & (times > max(OFTEN * times.sum(), 100))
        wrong = still | (found < MEASURABLE[0]) | (found > MEASURABLE[1])
        if wrong.any():
            counts.update(dict(zip(found[wrong].tolist(), times[wrong].tolist(), strict=True)))
            table = table.assign(**{pollutant: values.where(~values.isin(found[wrong]))})
    if counts:
        told = some([f"{value:g} ({count} times)" for value, count in counts.most_common()])
        warnings.append(
            f"{name}: {counts.total()} implausible values count as missing: {told}: leave the cells of missing values "
            f"blank"
        )
    return table


def _hours(texts: pd.Series) -> tuple[np.ndarray, np.ndarray]:
    """Times as full hours in UTC, NaT for blank or unreadable ones, and which of them have an hour besides the date.

    Each distinct text is parsed only once, which is 13 times faster. Numbers (seconds, a spreadsheet's days) count as
    unreadable, because their epoch is unknown, and so do texts without a four-digit year. Raises ValueError if days and
    months cannot be told apart.
    """
    codes, distinct = pd.factorize(texts, use_na_sentinel=False)
    distinct = pd.Series(distinct, dtype=object)
    given = _year_first(distinct.astype(str))
    given = given.str.replace(r"\s*(UTC|GMT)(?=[+-]\d)", "", regex=True)  # pandas inverts the sign of "UTC+8"
    dated = given.str.contains(r"\d{4}") & pd.to_numeric(distinct, errors="coerce").isna()
    times = pd.to_datetime(given.where(dated), errors="coerce", format="mixed", utc=True)
    times = times.dt.round("min").dt.floor("h")  # a spreadsheet may write 05:00 as 04:59:59.999997
    hours = times.dt.tz_localize(None).to_numpy("datetime64[ns]")
    has_hour = given.str.contains(r":|T\d") | (given.str.count(r"\d+") > 3)  # a month may be a name, not a number
    return hours[codes], has_hour.to_numpy()[codes]


def _hourless(table: pd.DataFrame, has_hour: np.ndarray) -> np.ndarray:
    """Rows whose time is only a date and cannot be taken for midnight, which some programs write that way.

    A date means midnight if the station has one such row for the day (repeated or not) and other hours of that day.
    """
    if has_hour.all():
        return ~has_hour
    day = table.groupby(["station", table["hour"].dt.floor("D")]).ngroup()
    dates = pd.Series(~has_hour & ~table.duplicated(), table.index).groupby(day).transform("sum")
    hours = pd.Series(has_hour, table.index).groupby(day).transform("any")
    return ~has_hour & ~((dates == 1) & hours) & table["hour"].notna()


def _year_first(texts: pd.Series) -> pd.Series:
    """'31/1/2018 5:00' and '1/31/2018 5:00' as '2018-1-31 5:00'; other texts unchanged.

    A number above 12 in the file shows which field is the day. Raises ValueError if both or neither field has one.
    """
    fields = texts.str.extract(DAY_MONTH_YEAR).dropna()
    if fields.empty:
        return texts
    day_first, month_first = ((fields[number].astype(int) > 12).any() for number in (0, 2))
    if day_first == month_first:
        raise ValueError(
            f"times such as {texts[fields.index[0]]!r} are {'both' if day_first else 'either'} day or month first: "
            f"expected the year first as in 2018-01-31 05:00"
        )
    return texts.str.replace(DAY_MONTH_YEAR, r"\4-\3-\1" if day_first else r"\4-\1-\3", regex=True)


def _tsf_table(content: bytes) -> pd.DataFrame | None:
    """Read the Monash archive's format: one series per line, its attributes and then its values, separated by colons.

    The header lists the attributes in their order: "@attribute station string". Missing values are "?".
    """
    head, _, body = content.decode("utf-8", "replace").partition("@data")
    names = [line.split()[1] for line in head.splitlines() if line.startswith("@attribute")]
    wanted = ("station", "air_quality_measurement", "start_timestamp")
    if not set(wanted) <= set(names):
        raise ValueError(f"expected an @attribute line for each of {', '.join(wanted)}, found {names}")
    parts = []
    for line in body.splitlines():
        *fields, values = line.split(":")
        if len(fields) == len(names):
            station, pollutant, start = (fields[names.index(name)] for name in wanted)
            numbers = pd.to_numeric(pd.Series(values.split(",")), errors="coerce")
            first = pd.to_datetime(start, format="%Y-%m-%d %H-%M-%S").floor("h")
            hours = pd.date_range(first, periods=len(numbers), freq="h")
            parts.append(pd.DataFrame({"station": station, "hour": hours, _pollutant(pollutant) or "unknown": numbers}))
    return pd.concat(parts, ignore_index=True) if parts else None


def _warn_of_local_time(name: str, table: pd.DataFrame, warnings: list[str]) -> None:
    """Warn if times seem to be local: ozone forms in sunlight, so the hour of Beijing's peak shows the time zone."""
    if "O3" not in table:
        return
    beijing = table[table["station"].astype(str).str.endswith("_aq") & table["O3"].notna()]
    cycle = beijing["O3"].groupby(beijing["hour"].dt.hour).mean()
    if len(beijing) >= 24 * 14 and len(cycle) == 24:
        peak = int(cycle.rolling(3, center=True, min_periods=1).mean().idxmax())
        if peak not in O3_PEAK_HOURS_UTC:
            warnings.append(
                f"{name} looks like local time: Beijing's O3 peaks at {peak:02d}:00, expected 05-10:00 UTC. Times are "
                f"taken as UTC: subtract 8 hours from the file if it is in Beijing time"
            )


def _grid(table: pd.DataFrame, network: Network, warnings: list[str], raw: RawData) -> Observations:
    table["station"] = table["station"].astype(str).str.strip()
    if unknown := sorted(set(table["station"].unique()) - set(LONDON_OTHER) - set(FULL_NAME)):
        warnings.append(f"{len(unknown)} unknown stations are left out: {some(unknown, 5)}")
    table["station"] = table["station"].map(FULL_NAME)
    rows = table[table["station"].isin(network.stations)].reindex(columns=["station", "hour", *ALL_POLLUTANTS])
    rows = rows.dropna(how="all", subset=ALL_POLLUTANTS)  # blank rows must not set the start or end of the data
    if rows.empty:
        raise _nothing(raw, f"has no row with a value of a known station such as {network.stations[0]}", warnings)
    hours = rows["hour"].to_numpy("datetime64[h]")
    _refuse_gaps(rows["station"].to_numpy(), hours, warnings, raw)
    start = hours.min().astype("datetime64[D]").astype("datetime64[h]")
    last = rows.drop(columns="hour").groupby([(hours - start) // HOUR, "station"]).last().unstack()  # ignores blanks
    columns = pd.MultiIndex.from_product([ALL_POLLUTANTS, network.stations])
    values = last.reindex(range(last.index.max() + 1), columns=columns).to_numpy(np.float32)
    values = values.reshape(len(values), len(ALL_POLLUTANTS), -1).transpose(0, 2, 1)
    observations = Observations(start, np.ascontiguousarray(values), network)
    return replace(observations, warnings=(*warnings, *_gaps(observations, warnings, raw)))


def _refuse_gaps(stations: np.ndarray, hours: np.ndarray, warnings: list[str], raw: RawData) -> None:
    """Raise UserError for long gaps: one mistyped year would move the end of the data, and all that is forecast."""
    days = np.unique(hours.astype("datetime64[D]"))
    wide = np.flatnonzero(np.diff(days) > LONGEST_GAP_DAYS * DAY)
    if not len(wide):
        return
    before, after = days[wide[-1]], days[wide[-1] + 1]
    fewer = min(hours < after, hours >= after, key=np.sum)
    raise UserError(
        f"{raw.path} has no value from {before + DAY} to {after - DAY}{_told(warnings)}, expected gaps of at most "
        f"{LONGEST_GAP_DAYS} days: mend or remove the {fewer.sum()} rows on one side, such as {stations[fewer][0]} at "
        f"{hours[fewer][0]}, or add the files between"
    )


def _gaps(observations: Observations, warnings: list[str], raw: RawData) -> list[str]:
    """A warning about series without a single value; raises UserError with all `warnings` if they are a whole city."""
    network, there = observations.network, np.isfinite(observations.series()).any(axis=0)
    for city in CITIES:
        own = network.in_city(city)
        if own.any() and not there[own].any():
            raise UserError(
                f"{raw.path} has no observation of {city}{_told(warnings)}: add or mend its file (expected: "
                f"{' and '.join(CITIES)}), or use a sample submission without its stations"
            )
    empty = ", ".join(np.array(network.names)[~there])
    return [f"forecast from the rest of the city, as they have no observation: {empty}"] * bool(empty)


def known_before(observations: Observations, day: np.datetime64) -> Observations:
    """The observations that a forecast of submit day `day` may use; raises UserError if the day is outside the data."""
    origin = first_hour(day)
    if origin <= observations.start or origin > observations.end + 24 * HOUR:
        first, last = observations.start.astype("datetime64[D]"), observations.last_day
        raise UserError(
            f"submit day {day} is outside the data, which go from {first} to {last}: expected a day in that range "
            f"(--first-day {last}), or add the files of the days before {day}"
        )
    return observations.before(origin)
