"""KDD Cup 2018, fresh air: PM2.5, PM10 and O3 at 48 stations of Beijing and London for the next 48 hours.

Four kinds of models and a blend are not a single network, so the Task has a `fit_predict`. Its rows are submit days.
The last days whose truth is known are held out, and the blend is tuned on their forecasts. The test row is the day
`--last-day`, by default the last day of the data. The core's `fit` trains the networks as Tasks of their own (mlp.py).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.metrics import Metric
from common.predictions import Predictions
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.tables.numbers import TableDataset
from common.task import Data, Postprocess, Submission, Task, Tuned
from competitions.kdd_air_quality import blend, metric, models, report, table
from competitions.kdd_air_quality.config import NOWHERE_TO_SUBMIT, USES, Config, refuse_folds
from competitions.kdd_air_quality.origins import DAY, days_between, first_hour, last_scored_day, parse_day
from competitions.kdd_air_quality.reader import Observations, known_before, read
from competitions.kdd_air_quality.stations import Network

TRUTH_DAYS = 2  # a submit day is scored on the two days after it


@dataclass(frozen=True)
class Forecasters:
    """The `fit_predict`, `tune`, `apply` and `report` of the Task, with the settings and data that they need."""

    config: Config
    observations: Observations
    known: Observations  # before the origin of `day`
    held: np.ndarray  # submit days whose forecasts the blend is tuned on
    day: np.datetime64

    def fit_predict(
        self, train: np.ndarray, valid: np.ndarray, fold: int | None, home: Run
    ) -> tuple[Predictions, Predictions]:
        """{model: forecasts [days, 48, S]} of the held-out days, and of `day` by models fitted to all known hours."""
        held = models.Models(self.config, home, 0).of_period(self.known, self.held)
        last = models.Models(self.config, home)
        for name in held:
            last.fit(name, self.known)
        return held, {name: last.forecast(name, self.observations, np.array([self.day])) for name in held}

    def tune(self, predictions: Predictions, rows: np.ndarray) -> Tuned:
        names = models.names_of(self.config)
        given = {n: np.asarray(predictions[n]) for n in names}, self.known.truth(self.held), self.known.network
        return {
            "blend": blend.tuned(*given),
            "score": blend.honest(*given),
            "models": names,
            "stations": self.known.network.stations,
            "last_day": str(self.day),
        }

    def apply(self, predictions: Predictions, tuned: Tuned) -> Tensor:
        network, names = self.known.network, models.names_of(self.config)
        weights = tuned.get("blend") or blend.equal(names, network.groups)
        return torch.from_numpy(blend.apply(weights, {n: np.asarray(predictions[n]) for n in names}, network.groups))

    def report(self, run: Run, page: Report) -> None:
        """Tables and plots of the held-out days."""
        names = models.names_of(self.config)
        forecasts = {name: np.load(run.path / f"oof.{name}.npy") for name in names}
        forecasts["blend"] = blend.apply(run.result["tuned"]["blend"], forecasts, self.known.network.groups)
        report.tell(run, page, self.known, [self.held], forecasts)


def days_of(observations: Observations, days: np.ndarray) -> TableDataset:
    """Dataset of submit days: inputs are their numbers [B], targets the truth [B, 48, stations, 3]."""
    return TableDataset(np.arange(len(days)), observations.truth(days))


def smape(network: Network) -> Metric:
    """The metric of forecasts [B, 48, S]: the mean of the daily scores over the days that have one."""

    def stats(forecasts: Tensor, truth: Tensor) -> Tensor:
        shape = *forecasts.shape[:2], len(network.stations), -1  # metrics drop the axis of a single station
        truth = truth.reshape(shape).numpy()
        scores = metric.daily(truth, table.grid(forecasts.numpy(), network), network.stations)
        return torch.from_numpy(np.stack([np.nan_to_num(scores), np.isfinite(scores)], axis=1))

    return Metric("smape", stats, higher_is_better=False)


def build(config: Config, raw: RawData, log: Callable[[str], Any]) -> Task:
    """The Task for the submit day --last-day, by default the last of the data. Raises UserError for too few days."""
    if config.first_day:
        raise UserError(
            f"--first-day {config.first_day}: train fits on everything up to --last-day and forecasts that day. For "
            f"other days: make predict, or make backtest COMP={raw.competition}"
        )
    asked, observations = opened(config, raw)
    day = parse_day(config.last_day) if config.last_day else observations.last_day
    known = known_before(observations, day)
    stop = min(day - TRUTH_DAYS * DAY, last_scored_day(observations.end))
    held = days_between(stop - (config.backtest_days - 1) * DAY, stop)
    warnings = checked(config, known, held[0], held, log)
    forecasters = Forecasters(config, observations, known, held, day)
    days = days_between(known.start.astype("datetime64[D]"), stop)
    return Task(
        data=Data(
            train=days_of(known, days),
            ids=[str(day) for day in days],
            folds=np.where(days >= held[0], 0, -1),
            test=days_of(observations, np.array([day])),
            test_ids=[str(day)],
        ),
        fit_predict=forecasters.fit_predict,
        uses=USES,
        postprocess=Postprocess(apply=forecasters.apply, tune=forecasters.tune, kept=models.KEPT),
        submission=Submission(
            rows=lambda ids, decisions: table.csv_rows(asked, decisions[0].numpy(), known.network),  # the only test row
            valid=table.valid,
            facts=facts_of(observations, day, warnings),
        ),
        metrics=(smape(known.network),),
        report=forecasters.report,
        sample=asked.sample,
    )


def opened(config: Config, raw: RawData) -> tuple[table.Asked, Observations]:
    """The sample submission and the observations of its stations; raises UserError for --fold and --folds."""
    refuse_folds(config)
    asked = table.asked(raw)
    return asked, read(raw, asked.network.stations)


def checked(
    config: Config, known: Observations, first: np.datetime64, scored: np.ndarray, log: Callable[[str], Any]
) -> list[str]:
    """Warnings about the data, also written by `log`.

    Raises UserError, before anything is fitted, if the history before `first`, the first submit day that the blend is
    tuned on, is too short, or if none of the `scored` days can be scored.
    """
    if first_hour(first) <= known.start:
        raise UserError(
            f"{len(known.values) // 24} days of history leave nothing before {first}, the first of the "
            f"{config.backtest_days} days that the blend is fitted on: add earlier files, choose a later --first-day, "
            f"or use fewer --backtest-days"
        )
    models.refuse_short_history(known_before(known, first), config)
    refuse_unscored(known, scored)
    return warned(config, known, log)


def warned(config: Config, known: Observations, log: Callable[[str], Any]) -> list[str]:
    """Warnings about the data, also written by `log`; raises UserError for an unknown window."""
    warnings, days, longest = list(known.warnings), len(known.values) // 24, models.longest_window(config)
    if days < longest:
        warnings.append(
            f"{days} days of history, fewer than the longest window has ({longest}): windows are cut where the data "
            f"begin"
        )
    for warning in warnings:
        log(f"warning: {warning}")
    return warnings


def facts_of(observations: Observations, day: np.datetime64, warnings: Sequence[str]) -> dict[str, Any]:
    """Facts for the file beside the CSV of a submit day, in addition to the provenance."""
    there = np.isfinite(observations.before(first_hour(day)).series()[-24:]).any(0)
    return {
        "day": str(day),
        "first_hour": str(first_hour(day)),
        "series_without_recent_values": np.array(observations.network.names)[~there].tolist(),
        "warnings": list(warnings),
        "submit": NOWHERE_TO_SUBMIT,
    }


def refuse_unscored(observations: Observations, days: np.ndarray) -> None:
    """Raise UserError, before anything is fitted, if these days have no point that can be scored."""
    if not metric.valid_points(observations.truth(days), observations.network.stations).any():
        raise UserError(
            f"the forecasts of {days[0]} to {days[-1]} cannot be scored: no hour after them has a value of "
            f"every pollutant of a station. Expected earlier days (--last-day), or the files of the days after them"
        )
