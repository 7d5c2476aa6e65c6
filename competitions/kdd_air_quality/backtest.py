"""The rolling backtest: models fitted before a period forecast its days; earlier periods give the blend's weights."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from common.competition import Competition
from common.predictions import Predictions
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.task import Data, Postprocess, Task
from competitions.kdd_air_quality import blend, models, report
from competitions.kdd_air_quality.config import USES, Config
from competitions.kdd_air_quality.origins import DAY, days_between, last_scored_day, parse_day
from competitions.kdd_air_quality.reader import Observations, known_before
from competitions.kdd_air_quality.task import TRUTH_DAYS, checked, days_of, opened, smape


class Backtest(Competition):
    """The competition with a Task whose held-out rows are the days to score, and without test rows."""

    def build(self, config: Config, raw: RawData, log: Callable[[str], Any]) -> Task:
        """Build the Task; raises UserError for days outside the data, and for too short a history before them."""
        asked, observations = opened(config, raw)
        days = days_to_score(config, observations)
        before, *periods = periods_of(days, config.refit_days, config.backtest_days)
        checked(config, observations, before[0], days, log)
        rolling = Rolling(config, observations, before, periods)
        rows = np.concatenate([before, days])
        return Task(
            data=Data(
                train=days_of(observations, rows),
                ids=[str(day) for day in rows],
                folds=np.where(np.isin(rows, days), 0, -1),
                test=(),
            ),
            fit_predict=rolling.fit_predict,
            uses=USES,
            postprocess=Postprocess(
                apply=lambda predictions, tuned: predictions["blend"], kept=models.KEPT | {"blend": "float64"}
            ),
            metrics=(smape(observations.network),),
            report=rolling.report,
            sample=replace(asked.sample, ids=()),  # there are no rows to predict
        )


@dataclass(frozen=True)
class Rolling:
    """The `fit_predict` and `report` of the Task, with the settings and data that they need."""

    config: Config
    observations: Observations
    before: np.ndarray  # submit days whose forecasts the first blend is fitted to
    periods: list[np.ndarray]

    def fit_predict(
        self, train: np.ndarray, valid: np.ndarray, fold: int | None, home: Run
    ) -> tuple[Predictions, Predictions]:
        """{model: forecasts [days, 48, S]} of all models, fitted before each period, and of their blend.

        The weights of a blend are never fitted to the days that it forecasts.
        """
        observations, past_days, blends = self.observations, self.before, []
        past = models.Models(self.config, home, 0).of_period(observations, past_days)
        for number, days in enumerate(self.periods, 1):
            over = past_days <= days[0] - TRUTH_DAYS * DAY  # the truth of later days is not known yet
            truth = observations.truth(past_days[over])
            weights = blend.tuned({name: values[over] for name, values in past.items()}, truth, observations.network)
            home.log(f"blend before {days[0]}: {json.dumps(weights)}")
            new = models.Models(self.config, home, number).of_period(observations, days)
            blends.append(blend.apply(weights, new, observations.network.groups))
            past_days = np.concatenate([past_days, days])
            past = {name: np.concatenate([past[name], new[name]]) for name in past}
        scored = {name: values[len(self.before) :] for name, values in past.items()}
        return scored | {"blend": np.concatenate(blends)}, {}

    def report(self, run: Run, page: Report) -> None:
        names = (*models.names_of(self.config), "blend")
        forecasts = {name: np.load(run.path / f"oof.{name}.npy") for name in names}
        report.tell(run, page, self.observations, self.periods, forecasts)


def days_to_score(config: Config, observations: Observations) -> np.ndarray:
    """The submit days given by the flags, by default the last 30 whose truth is known."""
    newest = last_scored_day(observations.end)
    for day in (config.first_day, config.last_day):
        if day:
            known_before(observations, parse_day(day))
    return days_between(config.first_day or newest - 29 * DAY, config.last_day or newest)


def periods_of(days: np.ndarray, refit_days: int, before_days: int) -> list[np.ndarray]:
    """A first period of `before_days`, to fit the first blend to, then the days in periods of `refit_days`.

    The first period ends two days before `days`, because its truth must be known at their first origin.
    """
    stop = days[0] - TRUTH_DAYS * DAY
    parts = [days_between(stop - (before_days - 1) * DAY, stop)]
    return parts + [days[start : start + refit_days] for start in range(0, len(days), refit_days)]
