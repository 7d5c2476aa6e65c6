"""Plots of a run: forecasts against the truth, error by hour ahead, station x day, and what is missing."""

import csv

import numpy as np

from common.report import Report
from common.run import Run
from competitions.kdd_air_quality import metric, table
from competitions.kdd_air_quality.origins import forecast_hours
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import POLLUTANTS, city_of

SHOWN_STATIONS = ("dongsi_aq", "dingling_aq", "MY7")
SHOWN_DAYS = 4  # last days with a truth in the plot of forecasts


def draw(
    run: Run, page: Report, observations: Observations, days: np.ndarray, forecasts: dict[str, np.ndarray]
) -> None:
    """Add tables and plots of forecasts {model: [days, 48, S]} to the run's page."""
    from matplotlib.figure import Figure  # without pyplot there is no display to look for

    network = observations.network
    truth = observations.truth(days)
    grids = {name: table.grid(values, network) for name, values in forecasts.items()}
    page.text(
        f"Submit days {days[0]} to {days[-1]}; a submit day forecasts the two days after it. Scores are the "
        f"official SMAPE, from 0 to 2, lower is better."
    )
    for name in ("metrics.csv", "breakdown.csv"):
        if (run.path / name).is_file():
            header, *rows = list(csv.reader((run.path / name).read_text().splitlines()))
            rows = [row for row in rows if row[0] not in ("station", "hour ahead")]
            page.table(header, [[_number(cell) for cell in row] for row in rows])
    stations = [name for name in SHOWN_STATIONS if name in network.stations] or list(network.stations[:2])
    figure = Figure(figsize=(14, 3 * len(stations)))
    _forecasts(figure, stations, days, truth, grids, network.stations)
    page.figure(figure, "forecasts", "Forecast and truth (black), the first 24 hours of each day's forecast, ug/m3")

    valid = metric.valid_points(truth, network.stations)
    if valid.any():
        figure = Figure(figsize=(10, 4))
        axes = figure.subplots()
        for name, values in grids.items():
            errors = np.where(valid, metric.terms(np.where(valid, truth, 0), values), 0)
            axes.plot(np.arange(48), metric.mean_over(errors, valid, (0, 2, 3)), label=name)
        axes.set(xlabel="hours ahead", ylabel="SMAPE", xticks=range(0, 49, 6))
        axes.legend()
        page.figure(figure, "hours_ahead", "Error by hour ahead, all stations and pollutants")
        name = "blend" if "blend" in grids else next(iter(grids))
        errors = np.where(valid, metric.terms(np.where(valid, truth, 0), grids[name]), 0)
        by_station = metric.mean_over(errors, valid, (1, 3)).T
        figure = Figure(figsize=(12, 10))
        _heat(figure, by_station, network.stations, days, "SMAPE", 1.2)
        page.figure(figure, "station_day", f"SMAPE of the {name} by station and submit day; white: nothing to score")

    missing, months = _missing(observations)
    figure = Figure(figsize=(12, 10))
    _heat(figure, missing, network.stations, months, "part missing", 1.0)
    page.figure(figure, "missing", "Share of missing values of the scored pollutants by station and month")


def _number(cell: str) -> float | str:
    try:
        return float(cell) if "." in cell else cell
    except ValueError:
        return cell


def _forecasts(figure, stations: list[str], days: np.ndarray, truth: np.ndarray, grids: dict, names: tuple) -> None:
    """One row a station, one column a pollutant; the models as lines over the truth."""
    shown = np.flatnonzero(np.isfinite(truth[:, :24]).any(axis=(1, 2, 3)))[-SHOWN_DAYS:]
    shown = shown if len(shown) else np.arange(len(days))[-SHOWN_DAYS:]
    axes = figure.subplots(len(stations), len(POLLUTANTS), squeeze=False)
    for row, station in enumerate(stations):
        number = names.index(station)
        for column, pollutant in enumerate(POLLUTANTS):
            axis = axes[row, column]
            if city_of(station) == "London" and pollutant == "O3":
                axis.set_axis_off()
                continue
            for model, values in grids.items():
                hours = np.concatenate([forecast_hours(days[day])[:24] for day in shown])
                axis.plot(
                    hours,
                    values[shown, :24, number, column].ravel(),
                    label=model,
                    linewidth=2 if model == "blend" else 0.8,
                )
            axis.plot(hours, truth[shown, :24, number, column].ravel(), color="black", label="truth", linewidth=1.5)
            axis.set_title(f"{station} {pollutant}", fontsize=9)
            axis.tick_params(labelsize=7, axis="x", rotation=20)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="upper center", ncols=7, fontsize=9)  # hides no line
    figure.subplots_adjust(hspace=0.5)


def _heat(figure, values: np.ndarray, rows: tuple[str, ...], columns: np.ndarray, label: str, top: float) -> None:
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    step = max(len(columns) // 12, 1)
    axes.set_xticks(range(0, len(columns), step), [str(name) for name in columns[::step]], fontsize=7, rotation=30)
    figure.colorbar(image, label=label)


def _missing(observations: Observations) -> tuple[np.ndarray, np.ndarray]:
    """Share of missing values [stations, months] and the months."""
    hours = observations.start + np.arange(len(observations.values)) * np.timedelta64(1, "h")
    months, number = np.unique(hours.astype("datetime64[M]"), return_inverse=True)
    result = np.zeros((len(observations.network.stations), len(months)))
    for station, name in enumerate(observations.network.stations):
        scored = 3 if city_of(name) == "Beijing" else 2
        missing = np.isnan(observations.values[:, station, :scored]).mean(axis=1)
        result[station] = np.bincount(number, missing) / np.bincount(number)
    return result, months
