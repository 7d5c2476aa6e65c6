"""The verbs that only this competition has: forecasts of any submit day with a fitted run, and the rolling backtest."""

import argparse
import json
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from common import competition as competitions
from common import predict as predicting
from common import raw, submission
from common import run as runs
from common.config import MACHINE_FIELDS
from common.device import use_threads
from common.errors import UserError
from common.raw import RawData
from common.report import Report
from common.run import Run
from common.task import Data, Task
from common.train import provenance_of
from competitions.kdd_air_quality import blend, metric, models, plots, table
from competitions.kdd_air_quality.backtest import Period, forecasts_of, periods_of, summarise
from competitions.kdd_air_quality.config import RECIPES, Config, refuse_unused
from competitions.kdd_air_quality.origins import DAY, days_between, first_hour, last_scored_day, parse_day
from competitions.kdd_air_quality.reader import Observations, known_before, read
from competitions.kdd_air_quality.task import TRUTH_DAYS, Days, facts_of, refuse_unscored, short_history


def predict(competition: str, given: argparse.Namespace) -> None:
    """`make predict`: forecasts of any submit days with a fitted run, a checked CSV for each.

    Without days and other data it is the core's: the submission again, of one run or averaged over several.
    """
    chosen = [_finished(competition, name) for name in (given.run or "").split(",")]
    if not (given.first_day or given.last_day or given.data):
        given.run = ",".join(run.name for run in chosen)
        return predicting.predict(competitions.load(competition), given)
    if len(chosen) > 1:
        raise UserError(f"RUN={given.run}: days and other data are forecast with one run: name one, or leave them out")
    run = chosen[0]
    config = run.config(Config)
    use_threads(config)
    found = raw.of_run(run.provenance, given.data, competitions.load(competition).write_demo)
    asked, observations = _opened(run, found)
    first = given.first_day or given.last_day or run.result["tuned"]["last_day"]
    days = days_between(first, given.last_day or first)
    known_before(observations, days[-1])  # before anything is forecast
    warnings = [*observations.warnings, *short_history(known_before(observations, days[0]), config)]
    for warning in warnings:
        print(f"warning: {warning}")
    _warn_of_seen_days(run, days)
    demo = found.is_demo or run.provenance["demo"]
    for path in _write_forecasts(run, config, observations, days, asked, demo, warnings):
        print(f"submission: {path}")


def _finished(competition: str, name: str | None) -> Run:
    """The named run, or the newest fitted one; raises UserError when there is none or it is not finished."""
    if name:
        run = runs.load(competition, name)
        if run.result is None:
            raise UserError(f"{run.path} is not finished: repeat its command ({run.provenance.get('command', '')})")
        if not _has_models(run):
            raise UserError(f"RUN={name} is a backtest and has no fitted models: make train COMP={competition}")
        return run
    there = [run for run in runs.all_runs(competition) if _has_models(run)]
    if not there:
        raise UserError(f"no finished run of {competition}: make train COMP={competition}")
    return there[-1]


def _has_models(run: Run) -> bool:
    """Whether the run is finished and was made by train: a backtest has no models that know everything."""
    return "models" in (run.result or {}).get("tuned", {})


def _opened(fitted: Run, found: RawData) -> tuple[table.Asked, Observations]:
    """The sample submission, and the observations of the run's stations: what it learnt belongs to them.

    Raises UserError when the sample asks for a station that the run knows nothing of.
    """
    asked, stations = table.asked(found), tuple(fitted.result["tuned"]["stations"])
    unknown = [station for station in asked.network.stations if station not in stations]
    if unknown:
        raise UserError(
            f"{fitted.path} was fitted on {len(stations)} stations, and not on {', '.join(unknown[:5])} that the "
            f"sample submission asks for: fit a run on these files with make train COMP={found.competition}"
        )
    return asked, read(found, stations)


def _warn_of_seen_days(run: Run, days: np.ndarray) -> None:
    """Say so when the run was fitted on hours that it is to forecast."""
    last = parse_day(run.result["tuned"]["last_day"])
    early = days[days < last]
    if len(early):
        print(
            f"warning: {run.path} was fitted on everything before {first_hour(last)}: its forecasts of earlier days "
            f"({early[0]} ...) know too much. Honest ones: make backtest COMP={run.provenance['competition']} without "
            f"--run"
        )


def _forecasts(run: Run, config: Config, observations: Observations, days: np.ndarray) -> dict[str, np.ndarray]:
    """{model: [days, 48, S]} of the run's models that know everything, and of their blend."""
    tuned, home = run.result["tuned"], run.inside(run.fold_folder(0))
    found = {name: models.forecast(name, observations, days, config, home, None) for name in tuned["models"]}
    return found | {"blend": blend.apply(tuned["blend"], found, observations.network.groups)}


def _write_forecasts(
    run: Run,
    config: Config,
    observations: Observations,
    days: np.ndarray,
    asked: table.Asked,
    demo: bool,
    warnings: list[str],
) -> list[Path]:
    """Forecast the submit days and write a checked CSV for each; what is missing stands in the file beside it."""
    network = observations.network
    forecast = _forecasts(run, config, observations, days)["blend"]
    scores = metric.daily(observations.truth(days), table.grid(forecast, network), network.stations)
    paths = []
    for number, day in enumerate(days):
        score = None if np.isnan(scores[number]) else round(float(scores[number]), 6)
        kept = ("competition", "recipe", "data_fingerprint")
        provenance = {
            **{key: run.provenance[key] for key in kept},
            "run": run.name,
            "score": run.result["score"],
            "monitor": run.result["monitor"],
            "official_score": score,
            "commit": runs.commit(),
            "demo": demo,
            "created": runs.now(),
            **facts_of(observations, day, warnings),
        }
        name = f"{run.name}{'-demo' * (demo and 'demo' not in run.name)}-{day}.csv"
        path = submission.SUBMISSIONS / run.provenance["competition"] / name
        rows = table.csv_rows(asked, forecast[number], network)
        paths.append(submission.write(path, asked.sample, rows, table.valid, provenance))
        if silent := provenance["series_without_recent_values"]:
            more = " ..." * (len(silent) > 6)
            print(f"{day}: no value in the last 24 hours of {len(silent)} series: {', '.join(silent[:6])}{more}")
        if score is not None:
            print(f"{day}: official score {score:.4f}")
    return paths


def backtest(competition: str, config: Config, given: argparse.Namespace) -> None:
    """`make backtest`: every model and the blend over a range of days, refitted as the days pass, or a run as it is."""
    refuse_unused(config)
    use_threads(config)
    models.names_of(config)
    there = runs.all_runs(competition)
    fitted = next((run for run in there if run.name == given.run and _has_models(run)), None)
    if fitted is not None:
        _refuse_settings(fitted, config, given)
        found = raw.of_run(fitted.provenance, given.data, competitions.load(competition).write_demo)
        observations = _opened(fitted, found)[1]
        _backtest_of(fitted, observations, _days_to_score(config, observations))
        return
    if given.run and given.run not in [run.name for run in there]:
        names = ", ".join(run.name for run in there if _has_models(run)) or "none yet"
        print(f"warning: no run is named {given.run} (fitted ones: {names}): this fits a new backtest of that name")
    found = raw.find(competition, given.data, competitions.load(competition).write_demo)
    observations = read(found, table.asked(found).network.stations)
    _backtest_anew(config, given, found, observations, _days_to_score(config, observations))


def _days_to_score(config: Config, observations: Observations) -> np.ndarray:
    newest = last_scored_day(observations.end)
    for day in (config.first_day, config.last_day):
        if day:
            known_before(observations, parse_day(day))
    days = days_between(config.first_day or newest - 29 * DAY, config.last_day or newest)
    refuse_unscored(observations, days)
    return days


def _refuse_settings(fitted: Run, config: Config, given: argparse.Namespace) -> None:
    """Raise UserError on flags that a fitted run cannot follow any more."""
    recipe, own = RECIPES[given.recipe], fitted.config(Config)
    free = {"first_day", "last_day", "jobs", *MACHINE_FIELDS}
    ignored = [
        f"--{item.name.replace('_', '-')} {getattr(config, item.name)}"
        for item in fields(config)
        if item.name not in free
        and getattr(config, item.name) not in (getattr(recipe, item.name), getattr(own, item.name))
    ]
    if ignored:
        raise UserError(
            f"{', '.join(ignored)}: {fitted.path} is fitted otherwise, and --run scores it as it is: leave these flags "
            f"out, or leave out --run to fit models with them"
        )


def _backtest_of(run: Run, observations: Observations, days: np.ndarray) -> None:
    """Score the fitted run as it is over the days: no fits, and the tables go to backtest-FIRST-LAST/ in its folder."""
    forecasts = _forecasts(run, run.config(Config), observations, days)
    print(f"{run.path}, fitted before {first_hour(parse_day(run.result['tuned']['last_day']))}")
    _warn_of_seen_days(run, days)
    folder = run.path / f"backtest-{days[0]}-{days[-1]}"
    summarise(replace(run, path=folder), [(Period(0, days), forecasts)], observations)


def _backtest_anew(
    config: Config, given: argparse.Namespace, found: RawData, observations: Observations, days: np.ndarray
) -> None:
    """Fit every model for each period; the blend is fitted on the periods before.

    No forecast is scored with weights that saw its days.
    """
    config = replace(config, first_day=str(days[0]), last_day=str(days[-1]))
    before, *scored = periods_of(days, config.refit_days, config.backtest_days)
    if first_hour(before.days[0]) <= observations.start:
        raise UserError(
            f"--first-day {days[0]} leaves no data before {before.days[0]}, where the {config.backtest_days} days "
            f"begin that the first blend is fitted on: choose a later --first-day, or fewer --backtest-days"
        )
    known = known_before(observations, before.days[0])
    models.refuse_short_history(known, config)
    data = Data(Days(observations, days), [str(day) for day in days], np.zeros(len(days), int))
    task = Task(data, metrics=(), fingerprint=found.opened_fingerprint())
    provenance = provenance_of(competitions.load(found.competition), task, given.recipe, found)
    run = runs.open_run(found.competition, given.run, config, provenance)
    for warning in [*observations.warnings, *short_history(known, config)]:
        run.log(f"warning: {warning}")
    parts, past_days, past = [], before.days, forecasts_of(run, observations, config, before)
    for period in scored:
        over = past_days <= period.days[0] - TRUTH_DAYS * DAY  # the truth of the day before is not known yet
        truth = observations.truth(past_days[over])
        weights = blend.tuned({name: values[over] for name, values in past.items()}, truth, observations.network)
        run.log(f"blend before {period.days[0]}: {json.dumps(weights)}")
        new = forecasts_of(run, observations, config, period)
        parts.append((period, new | {"blend": blend.apply(weights, new, observations.network.groups)}))
        past_days = np.concatenate([past_days, period.days])
        past = {name: np.concatenate([past[name], new[name]]) for name in past}
    rows = summarise(run, parts, observations)
    together = {name: np.concatenate([forecasts[name] for _, forecasts in parts]) for name in parts[0][1]}
    page = Report(run.path, f"KDD air quality: {run.name}")
    plots.draw(run, page, observations, days, together)
    score = rows["blend"]["mean"]
    run.write_result({"monitor": "smape", "score": score, "metrics": rows, "tuned": {}, "rows": len(days)})
    run.finish()
    print(f"report: {page.write()}")
