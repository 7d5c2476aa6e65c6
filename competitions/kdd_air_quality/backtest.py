"""Rolling origins: models fitted before a period forecast each of its days, and the official score says how well."""

from dataclasses import dataclass

import numpy as np

from common.files import write_csv, write_with
from common.run import Run
from competitions.kdd_air_quality import metric, models, table
from competitions.kdd_air_quality.config import Config
from competitions.kdd_air_quality.origins import DAY, days_between, first_hour, last_scored_day
from competitions.kdd_air_quality.reader import Observations, known_before


@dataclass(frozen=True)
class Period:
    """Consecutive submit days; everything that is fitted for them ends at the first one's origin."""

    number: int
    days: np.ndarray


def periods_of(days: np.ndarray, refit_days: int, before_days: int) -> list[Period]:
    """The days in periods of `refit_days`, after a period of `before_days` whose forecasts fit the first blend.

    That period ends two days early: its truth must be over at the first origin.
    """
    stop = days[0] - 2 * DAY
    parts = [days_between(stop - (before_days - 1) * DAY, stop)]
    parts += [days[start : start + refit_days] for start in range(0, len(days), refit_days)]
    return [Period(number, part) for number, part in enumerate(parts)]


def forecasts_of(run: Run, observations: Observations, config: Config, period: Period) -> dict[str, np.ndarray]:
    """Every model's forecasts [days, 48, S] of a period; what an interrupted run had finished is read back."""
    known = known_before(observations, period.days[0])
    later = observations.before(first_hour(period.days[-1]) + 2 * DAY)
    result = {}
    for name in models.names_of(config):
        path = run.path / f"period-{period.number}" / f"{name}.npy"
        if not path.is_file():
            models.fit(name, known, config, run, period.number, period.days, later)
            found = models.forecast(name, observations, period.days, config, run, period.number)
            write_with(path, lambda stream, found=found: np.save(stream, found))
        result[name] = np.load(path)
    return result


def summarise(run: Run, parts: list[tuple[Period, dict[str, np.ndarray]]], observations: Observations) -> dict:
    """Print one table of all models, and write metrics.csv (figures), scores.csv (days) and breakdown.csv.

    Returns {model: figures} over all days; with several periods or calendar months the table shows each as well.
    """
    network = observations.network
    days = np.concatenate([period.days for period, _ in parts])
    truth = observations.truth(days)
    forecasts = {name: np.concatenate([found[name] for _, found in parts]) for name in parts[0][1]}
    grids = {name: table.grid(values, network) for name, values in forecasts.items()}
    spans = {f"{days[0]} to {days[-1]}": np.ones(len(days), bool)}
    if len(parts) > 1:
        spans = {f"{period.days[0]} to {period.days[-1]}": np.isin(days, period.days) for period, _ in parts} | spans
    lines = []
    for span, chosen in spans.items():
        for name, values in grids.items():
            figures = metric.summary(truth[chosen], values[chosen], network.stations)
            lines.append({"span": span, "model": name, **figures})
    for line in ["", *_aligned(lines)]:
        print(line)
    late = days[days > last_scored_day(observations.end)]
    if len(late):
        print(f"not scored, the data end before their 48 hours do: {', '.join(map(str, late))}")
    _write_csv(run, "metrics.csv", lines)
    daily = {name: metric.daily(truth, values, network.stations) for name, values in grids.items()}
    rows = [{"day": day, **{name: daily[name][number] for name in daily}} for number, day in enumerate(days)]
    _write_csv(run, "scores.csv", rows)
    found = {name: metric.breakdown(truth, values, network) for name, values in grids.items()}
    first = next(iter(found.values()))
    _write_csv(
        run,
        "breakdown.csv",
        [
            {"by": by, "part": part, **{name: found[name][by][part] for name in found}}
            for by in first
            for part in first[by]
        ],
    )
    for by in ("pollutant", "hour band"):
        print("\n".join(_aligned([{by: part} | {name: found[name][by][part] for name in found} for part in first[by]])))
    return {
        line["model"]: {key: line[key] for key in ("mean", "best_25", "resampled_25", "days")}
        for line in lines[-len(grids) :]
    }


def _aligned(lines: list[dict]) -> list[str]:
    """Rows of equal keys as text columns."""
    shown = [[f"{v:.4f}" if isinstance(v, float) else str(v) for v in line.values()] for line in lines]
    cells = [list(lines[0]), *shown]
    widths = [max(len(row[number]) for row in cells) for number in range(len(cells[0]))]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in cells]


def _write_csv(run: Run, name: str, lines: list[dict]) -> None:
    cells = ([f"{v:.6f}" if isinstance(v, float) else v for v in line.values()] for line in lines)
    write_csv(run.path / name, lines[0], cells)
