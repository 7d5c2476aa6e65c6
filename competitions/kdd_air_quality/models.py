"""The five forecasters behind two functions: fit one on what is known, and forecast days with it.

What is fitted lies in one folder per cut (the origin before which everything is known), in a file per model that is
there only when it is whole: a run that was stopped finds it and goes on with the next.
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np

from common import checkpoint
from common.errors import UserError
from common.files import write_text, write_with
from common.run import Run
from competitions.kdd_air_quality import boosting, features, impute, linear, medians, prophet_model
from competitions.kdd_air_quality.config import MODELS, Config
from competitions.kdd_air_quality.origins import DAY, HORIZON_HOURS, first_hour
from competitions.kdd_air_quality.reader import Observations, known_before

# The precision that forecasts come in, and are kept with: the blend's bits depend on it.
KEPT = {"medians": "float64", "linear": "float32", "boosting": "float64", "mlp": "float32", "prophet": "float64"}


def names_of(config: Config) -> list[str]:
    """The models of --models in their fixed order; raises UserError on an unknown one."""
    given = [name.strip() for name in (config.model or config.models).split(",") if name.strip()]
    unknown = [name for name in given if name not in MODELS]
    if unknown or not given:
        raise UserError(f"--models {config.model or config.models}: expected one or more of {','.join(MODELS)}")
    return [name for name in MODELS if name in given]


def longest_window(config: Config) -> int:
    """Days of the longest window of any model; raises UserError on the name of a window that there is not."""
    names = (config.beijing_windows, config.london_windows, config.windows)
    return max(max(medians.windows_of(name)) for name in names)


def refuse_short_history(known: Observations, config: Config) -> None:
    """Raise UserError, before anything is fitted, when `known` leaves a model nothing to be trained on."""
    names = names_of(config)
    if {"linear", "boosting", "mlp"} & set(names):
        lost = max(boosting.SHIFT_HOURS) if "boosting" in names else 0  # its days begin at several hours
        features.training_ends(known.history(len(known.values) - lost))


def fitted_folder(run: Run, fold: int | None) -> Path:
    return run.path / ("fitted" if fold is None else f"fitted-{fold}")


def fit(
    name: str,
    known: Observations,
    config: Config,
    run: Run,
    fold: int | None,
    held_days: np.ndarray | None = None,
    later: Observations | None = None,
) -> None:
    """Fit a model on `known`, which ends at the cut. `later` and `held_days` only let the network log a score."""
    folder = fitted_folder(run, fold)
    label = f"{name} before {known.end}"
    if name in ("medians", "mlp") and not (folder / "imputers.json").is_file():
        found = impute.fit(known, config.jobs, config.seed, f"imputers before {known.end}")
        write_text(folder / "imputers.json", json.dumps(found.models))
    if name in ("linear", "boosting") and not (folder / "linear.npy").is_file():
        lines = linear.fit(known, config.jobs, f"linear before {known.end}")
        write_with(folder / "linear.npy", lambda stream: np.save(stream, lines.coefficients))
    if name == "boosting":
        draws = [draw for draw in range(config.boosting_seeds) if not (folder / f"boosting-{draw}.json").is_file()]
        rounds, share = config.boosting_rounds, config.boosting_fraction
        fitted = boosting.fit(known, _lines(folder), draws, rounds, share, config.jobs, config.seed, label)
        for draw, members in fitted if draws else ():
            write_text(folder / f"boosting-{draw}.json", json.dumps([vars(member) for member in members]))
    if name == "prophet" and not (folder / "prophet.npz").is_file():
        weeks = prophet_model.fit(known, config.jobs, label)
        facts = {"start": weeks.start, "level": weeks.level, "slope": weeks.slope, "week": weeks.week}
        write_with(folder / "prophet.npz", lambda stream: np.savez(stream, **facts))
    if name == "mlp" and not (run.fold_folder(fold) / "model.pt").is_file():
        _fit_network(known, config, run, fold, held_days, later)


def _lines(folder: Path) -> linear.Lines:
    return linear.Lines(np.load(folder / "linear.npy"))


def _imputers(folder: Path, observations: Observations) -> impute.Imputers:
    return impute.Imputers(tuple(json.loads((folder / "imputers.json").read_text())), observations.network)


def _fit_network(
    known: Observations,
    config: Config,
    run: Run,
    fold: int | None,
    held_days: np.ndarray | None,
    later: Observations | None,
) -> None:
    from common.engine.ranks import SINGLE
    from common.fit import fit as train_network
    from competitions.kdd_air_quality import mlp

    imputers = _imputers(fitted_folder(run, fold), known)
    held = np.array([], int) if held_days is None else _ends(known, held_days)
    seen = known if later is None else later
    completed = impute.complete(imputers.fill(seen.series()), seen.network)
    if later is not None:  # nothing after the cut may reach the training rows, not even through the imputation
        completed[: len(known.values)] = impute.complete(imputers.fill(known.series()), known.network)
    train = features.training_ends(known)[-config.train_days :]
    rows = mlp.Rows(seen, completed, np.union1d(train, held), config.history_days, medians.windows_of(config.windows))
    task = mlp.task(rows, held, -1 if fold is None else fold, config.units, config.dropout)
    # The held days only show a score: weights chosen on them would be chosen on what is scored.
    settings = replace(config, evaluate_every=config.epochs)
    train_network(task, settings, run, fold, SINGLE)


def _ends(observations: Observations, days: np.ndarray) -> np.ndarray:
    """Origins of submit days as numbers of days since the start of the data."""
    return ((first_hour_of(days) - observations.start.astype("datetime64[D]")) / DAY).astype(int)


def first_hour_of(days: np.ndarray) -> np.ndarray:
    return np.array([first_hour(day) for day in days]).astype("datetime64[D]")


def forecast(
    name: str, observations: Observations, days: np.ndarray, config: Config, run: Run, fold: int | None
) -> np.ndarray:
    """ug/m3 [days, 48, S] of a fitted model for submit days; each sees what is before its origin and nothing else."""
    folder = fitted_folder(run, fold)
    network = observations.network
    seen = [known_before(observations, day) for day in (days[0], days[-1])][-1]  # refuses days outside the data
    if name == "prophet":
        saved = np.load(folder / "prophet.npz")
        weeks = prophet_model.Weeks(saved["start"], saved["level"], saved["slope"], saved["week"])
        result = prophet_model.forecast(weeks, first_hour_of(days))
    elif name == "linear":
        result = linear.forecast(_lines(folder), seen, _ends(seen, days))
    elif name == "boosting":
        files = sorted(folder.glob("boosting-*.json"))
        members = [boosting.Member(**member) for file in files for member in json.loads(file.read_text())]
        result = boosting.forecast(members, _lines(folder), seen, _ends(seen, days))
    else:
        filled = _imputers(folder, seen).fill(seen.series())
        if name == "medians":
            result = _medians(filled, _ends(seen, days), config, seen)
        else:
            result = _network_forecast(filled, seen, days, config, run, fold)
    return np.exp(features.whole(features.log_of(result), network))


def _medians(filled: np.ndarray, ends: np.ndarray, config: Config, observations: Observations) -> np.ndarray:
    """Median of medians with each city's own windows [days, 48, S]; gaps that no neighbour filled are left out."""
    cities = np.array([group.split(" ")[0] for group in observations.network.groups])
    result = np.full((len(ends), HORIZON_HOURS, filled.shape[1]), np.nan)
    for city, windows in (("Beijing", config.beijing_windows), ("London", config.london_windows)):
        own = np.flatnonzero(cities == city)
        if not len(own):  # the sample submission asks for the other city alone
            continue
        result[..., own] = medians.forecast(filled[:, own], medians.windows_of(windows), ends)
    return result


def _network_forecast(
    filled: np.ndarray, seen: Observations, days: np.ndarray, config: Config, run: Run, fold: int | None
) -> np.ndarray:
    """One origin at a time, because the last steps of the imputation look at everything they are given."""
    from competitions.kdd_air_quality import mlp

    windows = medians.windows_of(config.windows)
    hours = 24 * (max(*windows, *features.MEDIAN_DAYS, config.history_days) + mlp.MEDIAN_SHIFTS_DAYS)
    state = checkpoint.load(run.fold_folder(fold) / "model.pt")["model"]
    parts = []
    for day in days:
        known = seen.before(first_hour(day))
        completed = impute.complete(filled[: len(known.values)][-hours:], seen.network)
        recent = known.history(hours)
        rows = mlp.Rows(recent, completed, np.array([len(recent.values) // 24]), config.history_days, windows)
        parts.append(mlp.predict(rows, state, config.units, config.dropout))
    return np.concatenate(parts)
