"""KDD Cup 2018, fresh air: PM2.5, PM10 and O3 at 48 stations of Beijing and London for the next 48 hours.

Five kinds of models and a blend are not one network: the Task has a `fit_predict`, and its rows are submit days. The
last of them whose truth is known are held out, the blend is tuned on their forecasts, and the test row is the day after
which nothing is known. The networks among the models are trained by the core's `fit`, as Tasks of their own (mlp.py).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.loading.keys import Keys
from common.metrics import Metric
from common.predictions import Predictions
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.task import Data, Postprocess, Submission, Task, Tuned
from competitions.kdd_air_quality import backtest, blend, metric, models, table
from competitions.kdd_air_quality.config import NOWHERE_TO_SUBMIT, Config, refuse_unused
from competitions.kdd_air_quality.origins import (
    DAY,
    HORIZON_HOURS,
    days_between,
    first_hour,
    last_day,
    last_scored_day,
    parse_day,
)
from competitions.kdd_air_quality.reader import Observations, known_before, read
from competitions.kdd_air_quality.stations import POLLUTANTS

TRUTH_DAYS = 2  # a submit day is scored on the two days after it


class Days:
    """Dataset of submit days: inputs are their numbers [B], targets the truth [B, 48, stations, 3]."""

    def __init__(self, observations: Observations, days: np.ndarray):
        self.observations, self.days = observations, days

    def __len__(self) -> int:
        return len(self.days)

    def batch(self, indices: np.ndarray, keys: Keys | None = None) -> tuple[Tensor, Tensor]:
        return torch.as_tensor(indices), torch.from_numpy(self.observations.truth(self.days[indices]))


@dataclass(frozen=True)
class Forecasters:
    """The settings and data of all models: the functions of the Task."""

    config: Config
    observations: Observations
    known: Observations  # before the origin of `day`
    held: np.ndarray  # submit days whose forecasts the blend is tuned on
    day: np.datetime64

    def fit_predict(
        self, train: np.ndarray, valid: np.ndarray, fold: int | None, home: Run
    ) -> tuple[Predictions, Predictions]:
        """{model: forecasts [days, 48, S]} of the held-out days, and of the last one by models that know everything."""
        days = np.array([self.day])
        held = backtest.forecasts_of(home, self.known, self.config, backtest.Period(0, self.held))
        for name in held:
            models.fit(name, self.known, self.config, home, None)
        return held, {name: models.forecast(name, self.observations, days, self.config, home, None) for name in held}

    def tune(self, predictions: Predictions, rows: np.ndarray) -> Tuned:
        names = models.names_of(self.config)
        forecasts = {name: np.asarray(predictions[name]) for name in names}
        return {
            "blend": blend.tuned(forecasts, self.known.truth(self.held), self.known.network),
            "models": names,
            "stations": self.known.network.stations,
            "last_day": str(self.day),
        }

    def apply(self, predictions: Predictions, tuned: Tuned) -> Tensor:
        if (stations := tuple(tuned["stations"])) != self.known.network.stations:
            raise UserError(
                f"the run was fitted on {len(stations)} stations, and the sample submission asks for others: forecast "
                f"a day with make predict and --last-day {self.day}, or fit a run on these files"
            )
        forecasts = {name: np.asarray(predictions[name]) for name in tuned["models"]}
        return torch.from_numpy(blend.apply(tuned["blend"], forecasts, self.known.network.groups))

    def stats(self, decisions: Tensor, truth: Tensor) -> Tensor:
        """Score of every day, and whether it has one [B, 2]: the mean is over the days that do."""
        network = self.known.network
        truth = truth.numpy().reshape(-1, HORIZON_HOURS, len(network.stations), len(POLLUTANTS))
        forecasts = decisions.numpy().reshape(-1, HORIZON_HOURS, len(network.series))
        scores = metric.daily(truth, table.grid(forecasts, network), network.stations)
        return torch.from_numpy(np.stack([np.nan_to_num(scores), np.isfinite(scores)], axis=1))

    def report(self, run: Run, page: Report) -> None:
        """Tables and plots of the held-out days, and the score of the last one where its truth is known."""
        from competitions.kdd_air_quality import plots

        kept = {name: np.load(run.path / f"oof.{name}.npy") for name in models.names_of(self.config)}
        tuned = run.result["tuned"]
        forecasts = kept | {"blend": blend.apply(tuned["blend"], kept, self.known.network.groups)}
        backtest.summarise(run, [(backtest.Period(0, self.held), forecasts)], self.known)
        plots.draw(run, page, self.known, self.held, forecasts)


def build(config: Config, raw: RawData, log: Callable[[str], Any]) -> Task:
    """The Task of the submit day --last-day, by default the last of the data. Raises UserError on too few of them."""
    refuse_unused(config)
    if config.first_day:
        raise UserError(
            f"--first-day {config.first_day}: train fits on everything up to --last-day and forecasts that day. For "
            f"other days: make predict, or make backtest COMP={raw.competition}"
        )
    models.names_of(config)
    asked = table.asked(raw)
    observations = read(raw, asked.network.stations)
    day = parse_day(config.last_day) if config.last_day else last_day(observations.end)
    known = known_before(observations, day)
    stop = min(day - TRUTH_DAYS * DAY, last_scored_day(observations.end))
    held = days_between(stop - (config.backtest_days - 1) * DAY, stop)
    if first_hour(held[0]) <= known.start:
        raise UserError(
            f"{len(known.values) // 24} days of history are too few to hold out {config.backtest_days} and learn from "
            f"the rest: add earlier files, or use fewer --backtest-days"
        )
    models.refuse_short_history(known_before(observations, held[0]), config)
    refuse_unscored(known, held)
    warnings = [*observations.warnings, *short_history(known, config)]
    for warning in warnings:
        log(f"warning: {warning}")
    forecasters = Forecasters(config, observations, known, held, day)
    days = np.concatenate([days_between(known.start.astype("datetime64[D]"), held[0] - DAY), held])
    return Task(
        data=Data(
            train=Days(known, days),
            ids=[str(day) for day in days],
            folds=np.where(np.isin(days, held), 0, -1),
            test=Days(observations, np.array([day])),
            test_ids=[str(day)],
        ),
        fit_predict=forecasters.fit_predict,
        postprocess=Postprocess(apply=forecasters.apply, tune=forecasters.tune, kept=models.KEPT),
        submission=Submission(
            rows=lambda ids, decisions: _rows(asked, decisions, known),
            valid=table.valid,
            facts=facts_of(observations, day, warnings),
        ),
        metrics=(Metric("smape", forecasters.stats, higher_is_better=False),),
        report=forecasters.report,
        sample=asked.sample,
    )


def _rows(asked: table.Asked, decisions: Tensor, known: Observations) -> Iterator[Sequence[str]]:
    for forecast in decisions.numpy():  # of the only test row
        yield from table.csv_rows(asked, forecast, known.network)


def facts_of(observations: Observations, day: np.datetime64, warnings: Sequence[str]) -> dict[str, Any]:
    """What stands beside the CSV of a submit day besides where it comes from."""
    recent = np.isfinite(observations.before(first_hour(day)).series()[-24:]).any(0)
    silent = [name for name, there in zip(observations.network.names, recent, strict=True) if not there]
    return {
        "day": str(day),
        "first_hour": str(first_hour(day)),
        "series_without_recent_values": silent,
        "warnings": list(warnings),
        "submit": NOWHERE_TO_SUBMIT,
    }


def short_history(observations: Observations, config: Config) -> list[str]:
    """What to tell about a history that is shorter than the longest window; raises UserError on a wrong window."""
    days, longest = len(observations.values) // 24, models.longest_window(config)
    told = f"{days} days of history, the longest window has {longest}: windows end where the data begin"
    return [told] if days < longest else []


def refuse_unscored(observations: Observations, days: np.ndarray) -> None:
    """Raise UserError, before anything is fitted, when the score of these days would be the mean of nothing."""
    if not metric.valid_points(observations.truth(days), observations.network.stations).any():
        raise UserError(
            f"nothing can be scored of the forecasts of {days[0]} to {days[-1]}: no hour after them has a value of "
            f"every pollutant of a station. Expected earlier days (--last-day), or the files of the days after them"
        )
