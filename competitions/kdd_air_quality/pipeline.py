"""The verbs: from files to forecasts, with everything that is finished kept in the run."""

import argparse
import json
import os
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from common import raw as raw_data
from common import run as runs
from common import submission
from common.config import MACHINE_FIELDS
from common.errors import UserError
from common.raw import RawData
from common.run import Run
from competitions.kdd_air_quality import blend, metric, models, plots, table
from competitions.kdd_air_quality.backtest import Period, forecasts_of, periods_of, summarise
from competitions.kdd_air_quality.config import NOWHERE_TO_SUBMIT, RECIPES, Config
from competitions.kdd_air_quality.demo import write_demo
from competitions.kdd_air_quality.origins import DAY, days_between, first_hour, last_day, last_scored_day, parse_day
from competitions.kdd_air_quality.reader import Observations, known_before, read

TRUTH_DAYS = 2  # a submit day is scored on the two days after it


def opened(competition: str, data: str | None, fitted: Run | None = None) -> tuple[RawData, list[str], Observations]:
    """The data, the sample submission's lines, and the observations of its stations, or of those of a fitted run.

    Raises UserError when the sample submission asks for a station that the run knows nothing of.
    """
    if fitted is None:
        found = raw_data.find(competition, data, write_demo)
    else:
        found = raw_data.of_run(fitted.provenance, data, write_demo)
    lines = table.sample_lines(found)
    stations = asked = table.stations_of(lines)
    if fitted is not None:  # what it learnt belongs to its stations, whichever the sample asks for
        stations = tuple(fitted.result["tuned"]["stations"])
        unknown = [station for station in asked if station not in stations]
        if unknown:
            raise UserError(
                f"{fitted.path} was fitted on {len(stations)} stations, and not on {', '.join(unknown[:5])} that the "
                f"sample submission asks for: fit a run on these files with make train COMP={competition}"
            )
    return found, lines, read(found, stations)


def started(competition: str, found: RawData, config: Config, given: argparse.Namespace) -> Run:
    """A new run, or the interrupted one of the same command and data; raises UserError under torchrun."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # which starts the whole command several times
        raise UserError(
            f"NPROC={os.environ['WORLD_SIZE']}: one process fits all models of {competition}, several at a time: leave "
            f"out NPROC and NNODES, and use --jobs {os.environ['WORLD_SIZE']}"
        )
    names = [name for name in found.names() if not name.startswith("cache/")]
    provenance = {
        "competition": competition,
        "recipe": given.recipe,
        "demo": found.is_demo,
        "data": str(found.path.resolve()),
        "data_fingerprint": found.fingerprint(*names),
        "outputs": "",
        "code": runs.code_fingerprint(competition),
        "command": f"python -m common {' '.join(sys.argv[1:])}",
        "commit": runs.commit(),
        "machine": runs.machine(),
    }
    return runs.open_run(competition, given.run, config, provenance)


def train(competition: str, config: Config, given: argparse.Namespace) -> None:
    """`make train`: backtest the last days, fit the blend on them, fit the models on everything, forecast and write."""
    names = models.names_of(config)
    if config.first_day:
        raise UserError(
            f"--first-day {config.first_day}: train fits on everything up to --last-day and forecasts that day. For "
            f"other days: make predict, or make backtest COMP={competition}"
        )
    found, lines, observations = opened(competition, given.data)
    day = parse_day(config.last_day) if config.last_day else last_day(observations.end)
    known = known_before(observations, day)
    stop = min(day - TRUTH_DAYS * DAY, last_scored_day(observations.end))
    period = Period(0, days_between(stop - (config.backtest_days - 1) * DAY, stop))
    if first_hour(period.days[0]) <= known.start:
        raise UserError(
            f"{len(known.values) // 24} days of history are too few to hold out {config.backtest_days} and learn from "
            f"the rest: add earlier files, or use fewer --backtest-days"
        )
    models.refuse_short_history(known_before(observations, period.days[0]), config)
    refuse_unscored(known, period.days)
    warnings = [*observations.warnings, *short_history(known, config)]
    run = started(competition, found, config, given)
    if run.result is None:
        for warning in warnings:
            run.log(f"warning: {warning}")
        backtested = forecasts_of(run, known, config, period)
        truth = known.truth(period.days)
        weights = fitted_blend(backtested, truth, known)
        forecasts = backtested | {"blend": blended(weights, backtested, known)}
        rows = summarise(run, [(period, forecasts)], known)
        plots.draw(run, known, period.days, forecasts)
        for name in names:
            models.fit(name, known, config, run, None)
        run.write_result(
            {
                "monitor": "smape",
                "score": rows["blend"]["mean"],
                "metrics": rows,
                "tuned": {"blend": weights, "models": names, "stations": known.network.stations},
                "rows": int(metric.valid_points(truth, known.network.stations).sum()),
                "fitted_before": str(first_hour(day)),
                "last_day": str(day),
            },
        )
    else:
        run.log(f"{run.path} is finished ({run.result['monitor']} {run.result['score']}): nothing to train")
    paths = write_forecasts(run, config, observations, np.array([day]), lines, found.is_demo, warnings)
    run.finish()
    print(f"no submission: {NOWHERE_TO_SUBMIT}")
    print(f"submission: {paths[-1]}")


def short_history(observations: Observations, config: Config) -> list[str]:
    """What to tell about a history that is shorter than the longest window; raises UserError on a wrong window."""
    days, longest = len(observations.values) // 24, models.longest_window(config)
    return [f"{days} days of history, the longest window has {longest}: windows end where the data begin"] * (
        days < longest
    )


def refuse_unscored(observations: Observations, days: np.ndarray) -> None:
    """Raise UserError, before anything is fitted, when the score of these days would be the mean of nothing."""
    if not metric.valid_points(observations.truth(days), observations.network.stations).any():
        raise UserError(
            f"nothing can be scored of the forecasts of {days[0]} to {days[-1]}: no hour after them has a value of "
            f"every pollutant of a station. Expected earlier days (--last-day), or the files of the days after them"
        )


def fitted_blend(forecasts: dict[str, np.ndarray], truth: np.ndarray, observations: Observations) -> blend.Weights:
    """Weights from backtest forecasts {model: [days, 48, S]} and the truth [days, 48, stations, 3]."""
    numbers = np.array(observations.network.series)
    valid = metric.valid_points(truth, observations.network.stations)
    own = np.s_[:, :, numbers[:, 0], numbers[:, 1]]
    return blend.fit(forecasts, truth[own], valid[own], observations.network.groups)


def blended(weights: blend.Weights, forecasts: dict[str, np.ndarray], observations: Observations) -> np.ndarray:
    return blend.apply(weights, forecasts, observations.network.groups)


def write_forecasts(
    run: Run,
    config: Config,
    observations: Observations,
    days: np.ndarray,
    lines: list[str],
    demo: bool,
    warnings: list[str],
) -> list[Path]:
    """Forecast the submit days with the run's models and write a checked CSV for each.

    What is missing is said, and stands with the `warnings` about the data in the file beside the CSV.
    """
    tuned = run.result["tuned"]
    parts = {name: models.forecast(name, observations, days, config, run, None) for name in tuned["models"]}
    forecast = blended(tuned["blend"], parts, observations)
    scores = metric.daily(
        observations.truth(days), table.grid(forecast, observations.network), observations.network.stations
    )
    paths = []
    for number, day in enumerate(days):
        known = observations.before(first_hour(day)).series()
        silent = [
            name
            for name, there in zip(observations.network.names, np.isfinite(known[-24:]).any(0), strict=True)
            if not there
        ]
        if silent:
            run.log(
                f"{day}: no value in the last 24 hours of {len(silent)} of {known.shape[1]} series: "
                f"{', '.join(silent[:6])}{' ...' if len(silent) > 6 else ''}"
            )
        name = f"{run.name}{'-demo' if demo and 'demo' not in run.name else ''}-{day}"
        provenance = {
            "competition": run.provenance["competition"],
            "run": run.name,
            "recipe": run.provenance["recipe"],
            "score": run.result["score"],
            "monitor": "smape",
            "day": str(day),
            "first_hour": str(first_hour(day)),
            "official_score": None if np.isnan(scores[number]) else round(float(scores[number]), 6),
            "series_without_recent_values": silent,
            "warnings": warnings,
            "submit": NOWHERE_TO_SUBMIT,
            "commit": runs.commit(),
            "data_fingerprint": run.provenance["data_fingerprint"],
            "demo": demo,
            "created": runs.now(),
        }
        path = submission.SUBMISSIONS / run.provenance["competition"] / f"{name}.csv"
        rows = table.rows(lines, forecast[number], observations.network)
        sample = submission.Sample.of_lines(lines, "the sample submission")
        paths.append(submission.write(path, table.COLUMNS, rows, sample, table.valid, provenance))
        if not np.isnan(scores[number]):
            run.log(f"{day}: official score {scores[number]:.4f}")
    return paths


def predict(competition: str, given: argparse.Namespace) -> None:
    """`make predict`: forecasts of any submit days with a fitted run."""
    run = finished(competition, given.run)
    config = run.config(Config)
    found, lines, observations = opened(competition, given.data, run)
    first = given.first_day or given.last_day or run.result["last_day"]
    days = days_between(first, given.last_day or first)
    known_before(observations, days[-1])  # before anything is forecast
    warnings = [*observations.warnings, *short_history(known_before(observations, days[0]), config)]
    for warning in warnings:
        print(f"warning: {warning}")
    warn_of_seen_days(run, days)
    paths = write_forecasts(run, config, observations, days, lines, found.is_demo or run.provenance["demo"], warnings)
    print(f"no submission: {NOWHERE_TO_SUBMIT}")
    for path in paths:
        print(f"submission: {path}")


def warn_of_seen_days(run: Run, days: np.ndarray) -> None:
    """Say so when the run was fitted on hours that it is to forecast."""
    early = days[days < parse_day(run.result["last_day"])]
    if len(early):
        print(
            f"warning: {run.path} was fitted on everything before {run.result['fitted_before']}: its forecasts of "
            f"earlier days ({early[0]} ...) know too much. Honest ones: make backtest "
            f"COMP={run.provenance['competition']} without --run"
        )


def finished(competition: str, name: str | None) -> Run:
    """The named run, or the newest fitted one; raises UserError when there is none or it is not finished."""
    if name:
        run = runs.load(competition, name)
        if run.result is None:
            raise UserError(f"{run.path} is not finished: repeat its command ({run.provenance.get('command', '')})")
        if not has_models(run):
            raise UserError(f"RUN={name} is a backtest and has no fitted models: make train COMP={competition}")
        return run
    there = [run for run in runs.all_runs(competition) if has_models(run)]
    if not there:
        raise UserError(f"no finished run of {competition}: make train COMP={competition}")
    return there[-1]


def has_models(run: Run) -> bool:
    """Whether the run is finished and was made by train: a backtest has no models that know everything."""
    return "fitted_before" in (run.result or {})


def backtest(competition: str, config: Config, given: argparse.Namespace) -> None:
    """`make backtest`: every model and the blend over a range of days, refitted as the days pass, or a run as it is."""
    models.names_of(config)
    there = runs.all_runs(competition)
    fitted = next((run for run in there if run.name == given.run and has_models(run)), None)
    if fitted is not None:
        _refuse_settings(fitted, config, given)
    elif given.run and given.run not in [run.name for run in there]:
        names = ", ".join(run.name for run in there if has_models(run)) or "none yet"
        print(f"warning: no run is named {given.run} (fitted ones: {names}): this fits a new backtest of that name")
    found, _, observations = opened(competition, given.data, fitted)
    newest = last_scored_day(observations.end)
    for day in (config.first_day, config.last_day):
        if day:
            known_before(observations, parse_day(day))
    days = days_between(config.first_day or newest - 29 * DAY, config.last_day or newest)
    refuse_unscored(observations, days)
    if fitted is not None:
        _backtest_of(fitted, observations, days)
        return
    config = replace(config, first_day=str(days[0]), last_day=str(days[-1]))
    before, *scored = periods_of(days, config.refit_days, config.backtest_days)
    if first_hour(before.days[0]) <= observations.start:
        raise UserError(
            f"--first-day {days[0]} leaves no data before {before.days[0]}, where the {config.backtest_days} days "
            f"begin that the first blend is fitted on: choose a later --first-day, or fewer --backtest-days"
        )
    known = known_before(observations, before.days[0])
    models.refuse_short_history(known, config)
    warnings = [*observations.warnings, *short_history(known, config)]
    run = started(competition, found, config, given)
    for warning in warnings:
        run.log(f"warning: {warning}")
    # The blend is fitted on the periods before: no forecast is scored with weights that saw its days.
    parts, past_days, past = [], before.days, forecasts_of(run, observations, config, before)
    for period in scored:
        over = past_days <= period.days[0] - TRUTH_DAYS * DAY  # the truth of the day before is not known yet
        weights = fitted_blend(
            {name: values[over] for name, values in past.items()}, observations.truth(past_days[over]), observations
        )
        run.log(f"blend before {period.days[0]}: {json.dumps(weights)}")
        found_forecasts = forecasts_of(run, observations, config, period)
        parts.append((period, found_forecasts | {"blend": blended(weights, found_forecasts, observations)}))
        past_days = np.concatenate([past_days, period.days])
        past = {name: np.concatenate([past[name], found_forecasts[name]]) for name in past}
    rows = summarise(run, parts, observations)
    together = {name: np.concatenate([forecasts[name] for _, forecasts in parts]) for name in parts[0][1]}
    page = plots.draw(run, observations, days, together)
    run.write_result(
        {
            "monitor": "smape",
            "score": rows["blend"]["mean"],
            "metrics": rows,
            "tuned": {},
            "rows": len(days),
        },
    )
    run.finish()
    print(f"report: {page}")


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
    config = run.config(Config)
    tuned = run.result["tuned"]
    forecasts = {name: models.forecast(name, observations, days, config, run, None) for name in tuned["models"]}
    forecasts["blend"] = blended(tuned["blend"], forecasts, observations)
    print(f"{run.path}, fitted before {run.result['fitted_before']}")
    warn_of_seen_days(run, days)
    summarise(
        replace(run, path=run.path / f"backtest-{days[0]}-{days[-1]}"), [(Period(0, days), forecasts)], observations
    )
