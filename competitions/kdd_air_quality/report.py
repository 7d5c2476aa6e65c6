"""The scores of a run's forecasts: tables on the screen, CSV files, and plots for the report."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from common.files import write_text
from common.report import Report, subplots
from common.run import Run
from competitions.kdd_air_quality import metric, table
from competitions.kdd_air_quality.origins import HOUR, first_hour, last_scored_day
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import POLLUTANTS, city_of

SHOWN_STATIONS = ("dongsi_aq", "dingling_aq", "MY7")
SHOWN_DAYS = 4  # number of last days with a truth in the plot of forecasts
Forecasts = dict[str, np.ndarray]  # {model: [days, 48, S]}


def tell(run: Run, page: Report, observations: Observations, periods: list[np.ndarray], forecasts: Forecasts) -> None:
    """Write the tables and add the plots for forecasts of the submit days of `periods`."""
    summarise(run.path, observations, periods, forecasts)
    draw(page, observations, np.concatenate(periods), forecasts)


def summarise(folder: Path, observations: Observations, periods: list[np.ndarray], forecasts: Forecasts) -> None:
    """Print and write the scores of forecasts of all submit days, and of each period if there are several.

    metrics.csv has the figures of each model, scores.csv a row per day, breakdown.csv the scores of the parts.
    """
    network, days = observations.network, np.concatenate(periods)
    truth = observations.truth(days)
    grids = {name: table.grid(values, network) for name, values in forecasts.items()}
    scores = {name: metric.daily(truth, values, network.stations) for name, values in grids.items()}
    figures = pd.DataFrame(
        {"span": f"{span[0]} to {span[-1]}", "model": name} | metric.figures(daily[np.isin(days, span)])
        for span in ([*periods, days] if len(periods) > 1 else [days])
        for name, daily in scores.items()
    )
    parts = {name: metric.breakdown(truth, values, network) for name, values in grids.items()}
    parts = pd.concat(parts, axis=1).rename_axis(["by", "part"]).reset_index()
    print(f"\n{figures.to_string(index=False, float_format='%.4f')}")
    late = days[days > last_scored_day(observations.end)]
    if len(late):
        print(f"not scored, as the data end before their 48 hours do: {', '.join(map(str, late))}")
    print(parts[parts["by"].isin(("pollutant", "hour band"))].to_string(index=False, float_format="%.4f"))
    daily = pd.DataFrame({"day": days.astype(str), **scores})
    for name, frame in (("metrics", figures), ("scores", daily), ("breakdown", parts)):
        write_text(folder / f"{name}.csv", frame.to_csv(index=False, float_format="%.6f", na_rep="nan"))


def draw(page: Report, observations: Observations, days: np.ndarray, forecasts: Forecasts) -> None:
    """Add the tables of `summarise` and plots of the forecasts to the run's report."""
    network, truth = observations.network, observations.truth(days)
    grids = {name: table.grid(values, network) for name, values in forecasts.items()}
    page.text(
        f"Submit days {days[0]} to {days[-1]}; a submit day forecasts the two days after it. Scores are the "
        f"official SMAPE, from 0 to 2, lower is better."
    )
    for name in ("metrics.csv", "breakdown.csv"):
        frame = pd.read_csv(page.folder / name)
        frame = frame[~frame.iloc[:, 0].isin(("station", "hour ahead"))]
        page.table(list(frame), frame.itertuples(index=False))
    caption = "Forecast and truth (black), the first 24 hours of each day's forecast, ug/m3"
    page.figure(_forecasts(days, truth, grids, network.stations), "forecasts", caption)
    errors = {name: metric.errors(truth, values, network.stations) for name, values in grids.items()}
    if next(iter(errors.values()))[1].any():
        figure, axes = subplots(10, 4)
        for name, found in errors.items():
            axes.plot(np.arange(48), metric.mean_over(*found, (0, 2, 3)), label=name)
        axes.set(xlabel="hours ahead", ylabel="SMAPE", xticks=range(0, 49, 6))
        axes.legend()
        page.figure(figure, "hours_ahead", "Error by hour ahead, all stations and pollutants")
        figure = _heat(metric.mean_over(*errors["blend"], (1, 3)).T, network.stations, days, "SMAPE", 1.2)
        page.figure(figure, "station_day", "SMAPE of the blend by station and submit day; white: nothing to score")
    hours = observations.start + np.arange(len(observations.values)) * HOUR
    missing = pd.DataFrame(np.isnan(observations.series())).groupby(hours.astype("datetime64[M]").astype(str)).mean()
    missing = missing.T.groupby(network.places[0]).mean()
    figure = _heat(missing.to_numpy(), network.stations, missing.columns, "part missing", 1.0)
    page.figure(figure, "missing", "Share of missing values of the scored pollutants by station and month")


def _forecasts(days: np.ndarray, truth: np.ndarray, grids: dict[str, np.ndarray], names: tuple[str, ...]) -> Any:
    """Plots with a row per station and a column per pollutant: the models' forecasts as lines, the truth in black."""
    shown = np.flatnonzero(np.isfinite(truth[:, :24]).any(axis=(1, 2, 3)))[-SHOWN_DAYS:]
    shown = shown if len(shown) else np.arange(len(days))[-SHOWN_DAYS:]
    hours = (first_hour(days[shown])[:, None] + np.arange(24) * HOUR).ravel()
    stations = [name for name in SHOWN_STATIONS if name in names] or list(names[:2])
    figure, axes = subplots(14, 3 * len(stations), len(stations), len(POLLUTANTS), squeeze=False)
    for row, station in enumerate(stations):
        for column, pollutant in enumerate(POLLUTANTS):
            axis, place = axes[row, column], np.s_[shown, :24, names.index(station), column]
            if city_of(station) == "London" and pollutant == "O3":
                axis.set_axis_off()
                continue
            for model, values in grids.items():
                axis.plot(hours, values[place].ravel(), label=model, linewidth=2 if model == "blend" else 0.8)
            axis.plot(hours, truth[place].ravel(), color="black", label="truth", linewidth=1.5)
            axis.set_title(f"{station} {pollutant}", fontsize=9)
            axis.tick_params(labelsize=7, axis="x", rotation=20)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=7, fontsize=9)
    return figure


def _heat(values: np.ndarray, rows: tuple[str, ...], columns: np.ndarray, label: str, top: float) -> Any:
    figure, axes = subplots(12, 10)
    image = axes.imshow(values, aspect="auto", vmin=0, vmax=top, cmap="viridis", interpolation="nearest")
    axes.set_yticks(range(len(rows)), rows, fontsize=7)
    step = max(len(columns) // 12, 1)
    axes.set_xticks(range(0, len(columns), step), map(str, columns[::step]), fontsize=7, rotation=30)
    figure.colorbar(image, label=label)
    return figure
