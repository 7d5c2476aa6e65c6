"""Demo data in the organisers' file formats: two cities with daily cycles, shared episodes, gaps and outages."""

from pathlib import Path

import numpy as np
import pandas as pd
from scipy.signal import lfilter

from common.files import write_csv
from competitions.kdd_air_quality.stations import FULL_NAME
from competitions.kdd_air_quality.table import COLUMNS, rows_for

BEIJING = ("dongsi_aq", "aotizhongxin_aq", "fangshan_aq", "dingling_aq", "qianmen_aq")
LONDON = ("CD1", "BL0", "MY7")
FIRST_DAY = "2018-01-01"
SEED, DAYS = 7, 90
API_DAYS = 20  # the last days are in the format of the organisers' API, with cut station names
# Typical level of each pollutant, and the factor between trough and peak of its daily cycle.
LEVELS = {"PM2.5": (50, 1.5), "PM10": (80, 1.6), "NO2": (45, 2.0), "CO": (0.9, 1.5), "O3": (40, 4.0), "SO2": (8, 1.6)}
PEAK_HOUR = {"Beijing": {"O3": 8}, "London": {}}  # UTC; everything else peaks in the evening


def write_demo(folder: Path) -> None:
    """Write the history, the API files and the sample submission, always the same bytes."""
    random = np.random.default_rng(SEED)
    hours = pd.date_range(FIRST_DAY, periods=DAYS * 24, freq="h")
    beijing = _city("Beijing", BEIJING, hours, random, 1.0)
    london = _city("London", LONDON, hours, random, 0.3)
    history = hours[: (DAYS - API_DAYS) * 24]

    frame = beijing[beijing["time"].isin(history)].rename(columns={"station": "stationId", "time": "utc_time"})
    twice = frame.sample(20, random_state=SEED)  # the real files repeat rows
    pd.concat([frame, twice]).to_csv(folder / "beijing_17_18_aq.csv", index=False)
    frame = london[london["time"].isin(history)]
    pd.DataFrame(
        {
            "MeasurementDateGMT": frame["time"].dt.strftime("%Y/%-m/%-d %-H:%M"),
            "station_id": frame["station"],
            **{f"{name} (ug/m3)": frame[name] for name in ("PM2.5", "PM10", "NO2")},
        }
    ).to_csv(folder / "London_historical_aqi_forecast_stations_20180331.csv")
    short = {full: cut for cut, full in reversed(FULL_NAME.items())}  # the cut names come first in FULL_NAME
    columns = {"station": "station_id"} | {name: f"{name.replace('.', '')}_Concentration" for name in LEVELS}
    for city, table in (("bj", beijing), ("ld", london)):
        frame = table[~table["time"].isin(history)].rename(columns=columns).reset_index(drop=True)
        frame["station_id"] = frame["station_id"].map(short)
        frame.set_index(frame.index + 1).to_csv(folder / f"{city}_aq_2018.csv", index_label="id")
    write_csv(folder / "sample_submission.csv", COLUMNS, rows_for((*BEIJING, *LONDON)))


def _city(
    city: str, stations: tuple[str, ...], hours: pd.DatetimeIndex, random: np.random.Generator, scale: float
) -> pd.DataFrame:
    """Long table of one city with the columns station, time and six pollutants."""
    episode = _wandering(len(hours), random, hours_of_memory=40)  # weather shared by all stations
    parts = []
    for station in stations:
        own = random.normal(0, 0.15)
        columns = {"station": station, "time": hours}
        for name, (level, depth) in LEVELS.items():
            peak = PEAK_HOUR[city].get(name, 13)
            cycle = np.log(depth) / 2 * np.cos((hours.hour.to_numpy() - peak) * 2 * np.pi / 24)
            weather = (-0.3 if name == "O3" else 0.7) * episode
            noise = 0.1 * random.normal(size=len(hours)) + 0.2 * _wandering(len(hours), random, hours_of_memory=6)
            values = np.round(level * scale * np.exp(own + cycle + weather + noise), 1)
            values[_gaps(len(hours), random)] = np.nan
            if city == "London" and name in ("CO", "O3", "SO2"):
                values[:] = np.nan
            if city == "London":
                values[random.random(len(hours)) < 0.002] = -0.4  # real instruments drift below zero
            columns[name] = values
        table = pd.DataFrame(columns)
        parts.append(table[random.random(len(hours)) > 0.01])  # whole rows are missing, too
    return pd.concat(parts, ignore_index=True)


def _wandering(count: int, random: np.random.Generator, hours_of_memory: float) -> np.ndarray:
    """A stationary process of deviation 1 whose autocorrelation decays over `hours_of_memory`."""
    keep = np.exp(-1 / hours_of_memory)
    steps = random.normal(size=count) * np.sqrt(1 - keep**2)
    return lfilter([1], [1, -keep], steps, zi=[keep * random.normal()])[0]


def _gaps(count: int, random: np.random.Generator) -> np.ndarray:
    """Which hours are missing: random single hours, and an outage of up to three days now and then."""
    missing = random.random(count) < 0.03
    for start in np.flatnonzero(random.random(count) < 1 / (24 * 40)):
        missing[start : start + random.integers(6, 72)] = True
    return missing
