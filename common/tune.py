"""`make tune`: Optuna looks for settings; every trial is a run, trained by the same command as any other.

A trial is a process of its own: its memory is freed when it ends, and a crash does not end the search. Its validation
curve is read from the run's metrics.csv; a trial that is behind the median of the others at the same epoch is stopped.
The search is kept in runs/<competition>/tune.db, so the same command resumes it, and the run of an interrupted trial.
"""

import argparse
import hashlib
import math
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_args, get_type_hints

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, Trial, TrialState
from sqlalchemy.exc import SQLAlchemyError

from common import config as configs
from common import raw
from common import run as runs
from common.competition import Competition
from common.config import Config
from common.defaults import completed
from common.errors import UserError, did_you_mean, first_line
from common.files import locked, read_json, read_table
from common.flags import to_json

SECONDS = 0.5  # between two looks at a trial's curve
GRACE = 60.0  # seconds that a stopped trial has to end by itself
UNPRUNED = 5  # trials that must end before others are compared with them
FAILURES = 3  # failed trials in a row after which the search ends
ROWS = ("fold", "folds", "seed")  # settings that choose the rows of the score
Space = dict[str, BaseDistribution]


def space_of(search: str, config: Config) -> Space:
    """ "lr=1e-4:1e-2:log,dropout=0:0.5,optimizer=adamw|sgd" as distributions; raises UserError for invalid values.

    low:high is a range of the setting's type, :log samples it on a logarithmic scale, a|b are choices, also of tuples.
    """
    hints, found = get_type_hints(type(config)), {}
    for part in re.split(r",(?=[\s\w-]*=)", search):  # other commas are in values: size=256,256|384,384
        name, _, text = part.partition("=")
        name = name.strip().lstrip("-").replace("-", "_")
        if name not in vars(config):
            raise UserError(f"--search {part}: no such setting.{did_you_mean(name, vars(config))}")
        if name in ROWS:
            raise UserError(
                f"--search {part}: trials with another {name} are scored on other rows, so the best would be that with "
                f"the easiest rows: leave {name} out, and give --fold all to score every trial on all of them"
            )
        if name in found:
            raise UserError(f"--search {part}: {name} appears twice, expected each setting once")
        values = text.split("|") if "|" in text else text.removesuffix(":log").split(":")
        for value in values:
            configs.with_flags(config, argparse.Namespace(**{name: value}))
        if "|" in text:
            found[name] = CategoricalDistribution(values)
            continue
        kind = next((kind for kind in (float, int) if kind in (hints[name], *get_args(hints[name]))), None)
        if kind is None or len(values) != 2:
            raise UserError(f"--search {part}: expected low:high of a number, low:high:log, or choices a|b")
        low, high = map(kind, values)
        log = text.endswith(":log")
        if not low < high or (log and low <= 0):
            raise UserError(f"--search {part}: expected low below high{', and above 0 for :log' * log}")
        found[name] = (FloatDistribution if kind is float else IntDistribution)(low, high, log=log)
    return found


def flags_of(params: dict[str, Any]) -> list[str]:
    """The trial's settings as flags; floats have six significant digits."""
    text = {name: f"{value:.6g}" if isinstance(value, float) else str(value) for name, value in params.items()}
    return [f"--{name.replace('_', '-')}={value}" for name, value in text.items()]


def command(competition: str, flags: list[str], run: str) -> list[str]:
    """The command that trains a trial."""
    return [sys.executable, "-m", "common", "train", competition, *flags, f"--run={run}", "--no-submission"]


def tune(
    competition: Competition,
    config: Config,
    recipe: str,
    search: str,
    trials: int,
    given: list[str],
    data: str | None = None,
) -> None:
    """Run the search until `trials` trials have ended; `given` are the flags of all trials.

    `data` is the value of DATA=. A search is known by its flags and by what it reads: scores on other data, such as the
    demo data, cannot be compared.
    """
    if config.fold == "none":
        raise UserError("--fold none holds nothing out, so no trial has a score: give --fold 0 or --fold all")
    if trials < 1:
        raise UserError(f"TRIALS={trials}: expected at least 1")
    space, home = space_of(search, config), runs.RUNS / competition.name
    given = [f"--recipe={recipe}", *given]
    found = raw.find(competition.name, data, competition.write_demo)
    fingerprint = completed(competition.build(config, found, lambda line: None), found).fingerprint
    words = [*sorted(given), search, to_json(config), fingerprint]
    name = hashlib.sha256(shlex.join(words).encode()).hexdigest()[:6]
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    busy = f"this search of {competition.name} is already running in another process"
    with locked(home / f"tune-{name}.lock", busy), _told_of(home / "tune.db"):
        storage = optuna.storages.RDBStorage(f"sqlite:///{home / 'tune.db'}")
        direction = "maximize" if competition.source.higher_is_better else "minimize"
        study = optuna.create_study(storage=storage, study_name=name, direction=direction, load_if_exists=True)
        # The sampler's random state is not kept: with the same seed a resumed search would draw the same trials again.
        study.sampler = optuna.samplers.TPESampler(seed=config.seed + len(study.trials))
        study.pruner = optuna.pruners.MedianPruner(n_startup_trials=UNPRUNED, n_warmup_steps=1)
        _search(study, space, competition.name, given, trials)
        _tell(study, competition.name, given, search)


@contextmanager
def _told_of(database: Path) -> Iterator[None]:
    """Inside the block, errors of the database or its disk are raised as UserError."""
    try:
        yield
    except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
        reason = first_line(error.__cause__ or error)
        raise UserError(
            f"{database} cannot be read or written ({reason}): free disk space and repeat the same command, restore "
            f"a complete copy, or delete it to start its searches anew"
        ) from error


def _ended(study: optuna.Study) -> list[FrozenTrial]:
    """The trials that have ended, the newest of each run: an interrupted trial is resumed as a new one."""
    newest = {trial.user_attrs["run"]: trial for trial in study.get_trials(deepcopy=False) if "run" in trial.user_attrs}
    return [trial for trial in newest.values() if trial.state.is_finished()]


def _search(study: optuna.Study, space: Space, competition: str, given: list[str], trials: int) -> None:
    for trial in study.get_trials(states=[TrialState.RUNNING]):  # of a search that was stopped
        if run := trial.user_attrs.get("run"):
            busy = f"{run} is still being trained by a process of a killed search: wait for it, or kill it"
            locked(runs.RUNS / competition / run / "lock", busy).close()
        study.tell(trial.number, state=TrialState.FAIL)
        if run:  # it goes on as a new trial with the same run
            study.enqueue_trial(trial.params, user_attrs={"run": run})
    failed = 0
    while (count := len(_ended(study))) < trials:
        trial = study.ask(space)
        run = trial.user_attrs.get("run", f"tune-{study.study_name}-{count:03d}")
        trial.set_user_attr("run", run)
        state, value, told = _one(trial, competition, [*given, *flags_of(trial.params)], run)
        study.tell(trial, value, state=state)
        print(f"{run}: {' '.join(flags_of(trial.params))}: {told}", flush=True)
        failed = failed + 1 if state == TrialState.FAIL else 0
        if failed == FAILURES:
            raise UserError(f"{FAILURES} trials in a row failed, the last one: {told}")


def _one(trial: Trial, competition: str, flags: list[str], run: str) -> tuple[TrialState, float | None, str]:
    """Train one trial; returns its state, its score, and both in words."""
    folder, reported = runs.RUNS / competition / run, 0
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # its default would leave the trial running
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command(competition, flags, run), stdout=subprocess.DEVNULL, stderr=errors)
        try:
            while child.poll() is None:
                time.sleep(SECONDS)
                curve = list(_curve(folder))
                for step, value in enumerate(curve[reported:], start=reported):
                    trial.report(value, step)
                reported = max(reported, len(curve))
                if curve and trial.should_prune():
                    return TrialState.PRUNED, None, f"stopped after {reported} validations, at {curve[-1]:.5f}"
        finally:
            _stop(child)
            signal.signal(signal.SIGTERM, before)
        errors.seek(0)
        last = next((line.strip() for line in reversed(errors.readlines()) if line.strip()), "")
    result = folder / "result.json"
    score = read_json(result, "score")["score"] if child.returncode == 0 and result.is_file() else None
    if score is None or not math.isfinite(score):
        return TrialState.FAIL, None, f"failed with status {child.returncode}, score {score}. {last}"
    return TrialState.COMPLETE, score, f"{score:.5f}"


def _stop(child: subprocess.Popen) -> None:
    if child.poll() is None:
        child.terminate()  # not SIGINT: programs that a shell starts in the background ignore it
        try:
            child.wait(GRACE)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _curve(folder: Path) -> Iterator[float]:
    """The metric of every validation so far, fold by fold: it is the column after the validation loss."""
    for table in sorted(folder.glob("fold-*/metrics.csv"), key=lambda file: int(file.parent.name[5:])):
        for row in read_table(table):
            names = list(row)
            metric = row.get(names[names.index("valid_loss") + 1]) if "valid_loss" in names else None
            if metric and math.isfinite(float(metric)):
                yield float(metric)


def _tell(study: optuna.Study, competition: str, given: list[str], search: str) -> None:
    """Print the importance of the settings and the best trial's command; write a page with these and all trials."""
    from common.report import Report

    trials = _ended(study)
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    sign = 1 if study.direction == optuna.study.StudyDirection.MAXIMIZE else -1
    order = sorted(trials, key=lambda one: -sign * one.value if one.value is not None else math.inf)
    names = list(dict.fromkeys(name for trial in trials for name in trial.params))
    rows = [
        (one.user_attrs["run"], one.state.name.lower(), "" if one.value is None else one.value)
        + tuple(one.params.get(name, "") for name in names)
        for one in order
    ]
    page = Report(runs.RUNS / competition / f"tune-{study.study_name}", f"{competition}: search of {search}")
    if complete:
        best = f'make train COMP={competition} ARGS="{shlex.join([*given, *flags_of(study.best_params)])}"'
        page.text(f"The best of {len(trials)} trials: {study.best_value:.5f}. {best}")
    page.table(["run", "state", "score", *names], rows)
    if len({trial.value for trial in complete}) > 1 and len(complete) >= 4:
        importance = optuna.importance.get_param_importances(study)
        page.heading("How much of the score's variance a setting explains")
        page.figure(_bars(importance), "importance", f"fANOVA over {len(complete)} trials")
        print("importance: " + ", ".join(f"{name} {value:.2f}" for name, value in importance.items()))
    print(f"search: {page.write()}")
    print(f"the best of {len(trials)} trials, {study.best_value:.5f}: {best}" if complete else "no trial has a score")


def _bars(importance: dict[str, float]) -> Any:
    from common.report import subplots

    figure, axes = subplots(7, 0.6 + 0.4 * len(importance))
    axes.barh(list(importance)[::-1], list(importance.values())[::-1])
    axes.set_xlabel("part of the variance")
    return figure
