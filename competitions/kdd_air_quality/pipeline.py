"""The commands of this competition that use a fitted run: forecast any submit day, and score forecasts."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import competition as competitions
from common import predict as predicting
from common import raw, submission
from common import run as runs
from common import train as training
from common.config import differences, with_flags
from common.device import use_threads
from common.errors import UserError, some
from common.run import Run
from competitions.kdd_air_quality import blend, metric, models, report, table
from competitions.kdd_air_quality.backtest import Backtest, days_to_score
from competitions.kdd_air_quality.config import Config
from competitions.kdd_air_quality.origins import days_between, first_hour, parse_day
from competitions.kdd_air_quality.reader import Observations, known_before, read
from competitions.kdd_air_quality.task import facts_of, refuse_unscored, warned


def predict(competition: str, given: argparse.Namespace) -> None:
    """`make predict`: forecast submit days with a fitted run and write a checked CSV for each.

    Without days and without other data this is the core's command: it writes the submission of one run, or of the mean
    of several, again.
    """
    chosen = _chosen(competition, given.run)
    if not (given.first_day or given.last_day or given.data):
        _refuse_unlike(chosen)
        given.run = ",".join(run.name for run in chosen)
        return predicting.predict(competitions.load(competition), given)
    if len(chosen) > 1:
        raise UserError(
            f"RUN={given.run}: --first-day, --last-day and DATA= need a single run: name one, or leave them out"
        )
    run = chosen[0]
    asked, observations, demo = _opened(run, given.data)
    first = given.first_day or given.last_day or observations.last_day
    days = days_between(first, given.last_day or first)
    warnings = warned(run.config(Config), known_before(observations, days[0]), print)
    forecast = _forecasts(run, observations, days)["blend"]
    network = observations.network
    scores = metric.daily(observations.truth(days), table.grid(forecast, network), network.stations)
    provenance = {key: run.provenance[key] for key in ("competition", "recipe", "data_fingerprint")}
    provenance |= {"run": run.name, "score": run.result["score"], "monitor": run.result["monitor"], "demo": demo}
    provenance |= {"commit": runs.commit(), "created": runs.now()}
    written = []
    for day, values, score in zip(days, forecast, scores, strict=True):
        score = None if np.isnan(score) else round(float(score), 6)
        facts = {"official_score": score, **facts_of(observations, day, warnings)}
        rows = table.csv_rows(asked, values, network)
        name = f"{run.name}{'-demo' * (demo and 'demo' not in run.name)}-{day}.csv"
        path = submission.SUBMISSIONS / competition / name
        written.append(submission.write(path, asked.sample, rows, table.valid, provenance | facts))
        if silent := facts["series_without_recent_values"]:
            print(f"{day}: no value in the last 24 hours of {len(silent)} series: {some(silent, 6)}")
        if score is not None:
            print(f"{day}: official score {score:.4f}")
    for path in written:
        print(f"submission: {path}")


def _fitted(competition: str) -> dict[str, Run]:
    """{name: finished run made by train}, the newest last; a backtest has no models fitted to all data."""
    return {run.name: run for run in runs.all_runs(competition) if "models" in (run.result or {}).get("tuned", {})}


def _chosen(competition: str, names: str | None) -> list[Run]:
    """The runs `names`, separated by commas, or the newest fitted one; raises UserError for one that is not fitted."""
    fitted = _fitted(competition)
    if fitted and not names:
        return [*fitted.values()][-1:]
    chosen = runs.finished(competition, names)
    for run in chosen:
        if run.name not in fitted:
            raise UserError(f"RUN={run.name} is a backtest and has no fitted models: make train COMP={competition}")
    return chosen


def _refuse_unlike(chosen: list[Run]) -> None:
    """Raise UserError for runs with other models or stations: averaging is per model and station."""
    first = chosen[0]
    for run in chosen[1:]:
        for what in ("models", "stations"):
            expected, found = first.result["tuned"][what], run.result["tuned"][what]
            if found != expected:
                raise UserError(
                    f"RUN={first.name},{run.name}: the first has the {what} {','.join(expected)}, the second "
                    f"{','.join(found)}: average runs of the same {what}"
                )


def _opened(run: Run, data: str | None) -> tuple[table.Asked, Observations, bool]:
    """The sample submission, the observations of the stations that the run was fitted to, and whether all is demo data.

    Raises UserError if the sample has a station that the run was not fitted to.
    """
    use_threads(run.config(Config))
    competition = run.provenance["competition"]
    found = raw.of_run(run.provenance, data, competitions.load(competition).write_demo)
    asked, stations = table.asked(found), tuple(run.result["tuned"]["stations"])
    unknown = [station for station in asked.network.stations if station not in stations]
    if unknown:
        raise UserError(
            f"{run.path} was fitted on {len(stations)} stations, and not on {', '.join(unknown[:5])} that the "
            f"sample submission asks for: fit a run on these files with make train COMP={competition}"
        )
    return asked, read(found, stations), found.is_demo or run.provenance["demo"]


def _forecasts(run: Run, observations: Observations, days: np.ndarray) -> dict[str, np.ndarray]:
    """{model: [days, 48, S]} of the run's final models and their blend; warns of days that the models have seen."""
    tuned, last = run.result["tuned"], parse_day(run.result["tuned"]["last_day"])
    if days[0] < last:
        print(
            f"warning: {run.path} was fitted on everything before {first_hour(last)}, so its scores on earlier days "
            f"({days[0]} ...) are too good. For a fair score: make backtest COMP={run.provenance['competition']} "
            f"without --run"
        )
    fitted = models.Models(run.config(Config), run.inside(run.fold_folder(0)))
    found = {name: fitted.forecast(name, observations, days) for name in tuned["models"]}
    return found | {"blend": blend.apply(tuned["blend"], found, observations.network.groups)}


def backtest(competition: str, config: Config, given: argparse.Namespace) -> None:
    """`make backtest`: score all models and the blend over a range of days, refitted per period or those of a run."""
    fitted = _fitted(competition)
    if given.run in fitted:
        return _score(fitted[given.run], given)
    if given.run and not runs.folder_of(competition, given.run).exists():
        names = ", ".join(fitted) or "none yet"
        print(f"warning: no run is named {given.run} (fitted ones: {names}): this fits a new backtest of that name")
    rolling = Backtest(competition, competitions.load(competition).config)
    training.train(rolling, config, given.recipe, given.data, given.run, submits=False)


def _score(run: Run, given: argparse.Namespace) -> None:
    """Score the fitted run over the days without refitting; the tables go to backtest-FIRST-LAST/ in its folder."""
    own = replace(run.config(Config), first_day="", last_day="")
    config = with_flags(own, given)
    free = {"first_day": "", "last_day": "", "jobs": own.jobs}
    if others := differences(own, replace(config, **free)):
        raise UserError(
            f"{'; '.join(others)}: {run.path} was fitted with other settings, but --run scores it as it is: leave "
            f"these flags out, or leave out --run to fit models with them"
        )
    observations = _opened(run, given.data)[1]
    days = days_to_score(config, observations)
    refuse_unscored(observations, days)
    forecasts = _forecasts(run, observations, days)
    folder = Path(run.path, f"backtest-{days[0]}-{days[-1]}")
    print(f"{run.path}, fitted before {first_hour(parse_day(run.result['tuned']['last_day']))}")
    report.summarise(folder, observations, [days], forecasts)
