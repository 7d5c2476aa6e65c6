"""All forecasters behind two methods: `fit` a model to the known hours, and `forecast` days with it.

A cut is the origin before which a model is fitted. Every cut has a folder with a file per fitted model, written only
when the model is complete, so that an interrupted run resumes with the next one.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from common import checkpoint
from common.errors import UserError
from common.files import write_npy, write_text
from common.run import Run
from competitions.kdd_air_quality import boosting, features, impute, linear, medians, prophet_model
from competitions.kdd_air_quality.config import MODELS, Config
from competitions.kdd_air_quality.origins import DAY, HORIZON_HOURS, first_hour
from competitions.kdd_air_quality.reader import Observations, known_before
from competitions.kdd_air_quality.stations import CITIES

# The precision in which forecasts are made and stored; the blend's bits depend on it.
KEPT = {"medians": "float64", "linear": "float32", "boosting": "float64", "mlp": "float32", "prophet": "float64"}


def names_of(config: Config) -> list[str]:
    """The models of --models in their fixed order; raises UserError for an unknown name."""
    text = config.model or config.models
    given = {name.strip() for name in text.split(",")} - {""}
    if not given or not given <= set(MODELS):
        raise UserError(f"--models {text}: expected one or more of {','.join(MODELS)}")
    return [name for name in MODELS if name in given]


def longest_window(config: Config) -> int:
    """Days of the longest window of any model; raises UserError for an unknown window."""
    names = (config.beijing_windows, config.london_windows, config.windows)
    return max(max(medians.windows_of(name)) for name in names)


def refuse_short_history(known: Observations, config: Config) -> None:
    """Raise UserError, before anything is fitted, if `known` is too short to train a model on."""
    names = names_of(config)
    if not set(names) <= {"medians", "prophet"}:
        lost = max(boosting.SHIFT_HOURS) if "boosting" in names else 0  # its training origins are shifted
        features.training_ends(known.history(len(known.values) - lost))


def _kept(file: Path, make: Callable[[], Any]) -> Any:
    """The content of the file, an array or JSON; without the file it is made and written first."""
    is_array = file.suffix == ".npy"
    if not file.is_file():
        write_npy(file, make()) if is_array else write_text(file, json.dumps(make()))
    return np.load(file) if is_array else json.loads(file.read_text())


@dataclass(frozen=True)
class Models:
    """The models of one cut, stored in `run`; `fold` is the number of the cut, None for the final fit to all data."""

    config: Config
    run: Run
    fold: int | None = None

    @property
    def folder(self) -> Path:
        return self.run.path / ("fitted" if self.fold is None else f"fitted-{self.fold}")

    def of_period(self, observations: Observations, days: np.ndarray) -> dict[str, np.ndarray]:
        """Forecasts [days, 48, S] of all models, fitted before the first of the days; stored forecasts are reused."""
        known = known_before(observations, days[0])
        later = observations.before(first_hour(days[-1]) + 2 * DAY)

        def made(name: str) -> np.ndarray:
            self.fit(name, known, days, later)
            return self.forecast(name, observations, days)

        folder = self.run.path / f"period-{self.fold}"
        return {name: _kept(folder / f"{name}.npy", partial(made, name)) for name in names_of(self.config)}

    def fit(
        self, name: str, known: Observations, held: np.ndarray | None = None, later: Observations | None = None
    ) -> None:
        """Fit a model to `known`, which ends at the cut; `later` and `held` only let the network log a score."""
        folder, jobs, cut = self.folder, self.config.jobs, f"before {known.end}"
        if name == "prophet":
            _kept(folder / "prophet.npy", lambda: prophet_model.fit(known, jobs, f"prophet {cut}"))
        elif name in ("linear", "boosting"):
            lines = _kept(folder / "linear.npy", lambda: linear.fit(known, jobs, f"linear {cut}"))
            if name == "boosting":
                self._fit_boosting(lines, known)
        else:
            make = partial(impute.fit, known, jobs, self.config.seed, f"imputers {cut}")
            imputers = _kept(folder / "imputers.json", make)
            if name == "mlp" and not (self.run.fold_folder(self.fold) / "model.pt").is_file():
                self._fit_network(imputers, known, held, later)

    def _fit_boosting(self, lines: np.ndarray, known: Observations) -> None:
        files = [self.folder / f"boosting-{draw}.json" for draw in range(self.config.boosting_seeds)]
        draws = [draw for draw, file in enumerate(files) if not file.is_file()]
        if draws:
            for draw, members in boosting.fit(known, lines, draws, self.config, f"boosting before {known.end}"):
                write_text(files[draw], json.dumps(members))

    def _fit_network(
        self, imputers: list[str], known: Observations, held: np.ndarray | None, later: Observations | None
    ) -> None:
        from common import fit as training
        from common.engine.ranks import SINGLE
        from competitions.kdd_air_quality import mlp

        held = np.array([], int) if held is None else _ends(known, held)
        seen = later or known
        completed = impute.complete(impute.fill(imputers, seen), seen.network)
        if later is not None:  # no later hour may influence the training rows, not even through the imputation
            completed[: len(known.values)] = impute.complete(impute.fill(imputers, known), known.network)
        train = features.training_ends(known)[-self.config.train_days :]
        rows = mlp.Rows(seen, completed, np.union1d(train, held), self.config)
        task = mlp.task(rows, held, -1 if self.fold is None else self.fold, self.config)
        # The held days are only for the logged score: weights must not be chosen on the days that are scored.
        settings = replace(self.config, evaluate_every=self.config.epochs)
        training.fit(task, settings, self.run, self.fold, SINGLE)

    def forecast(self, name: str, observations: Observations, days: np.ndarray) -> np.ndarray:
        """Forecasts of a fitted model in ug/m3 [days, 48, S]; each day's uses only the hours before its origin."""
        folder = self.folder
        known_before(observations, days[0])  # raises for a day before the data
        seen = known_before(observations, days[-1])
        ends = _ends(seen, days)
        if name == "prophet":
            result = prophet_model.forecast(np.load(folder / "prophet.npy"), first_hour(days))
        elif name == "linear":
            result = linear.forecast(np.load(folder / "linear.npy"), seen, ends)
        elif name == "boosting":
            members = [one for file in sorted(folder.glob("boosting-*.json")) for one in json.loads(file.read_text())]
            result = boosting.forecast(members, np.load(folder / "linear.npy"), seen, ends)
        else:
            filled = impute.fill(json.loads((folder / "imputers.json").read_text()), seen)
            of_filled = self._median_forecast if name == "medians" else self._network_forecast
            result = of_filled(filled, seen, ends)
        return np.exp(features.whole(features.log_of(result), seen.network))

    def _median_forecast(self, filled: np.ndarray, seen: Observations, ends: np.ndarray) -> np.ndarray:
        result = np.full((len(ends), HORIZON_HOURS, filled.shape[1]), np.nan)
        for city, windows in zip(CITIES, (self.config.beijing_windows, self.config.london_windows), strict=True):
            own = seen.network.in_city(city)
            if own.any():  # the sample submission may have stations of one city only
                result[..., own] = medians.forecast(filled[:, own], medians.windows_of(windows), ends)
        return result

    def _network_forecast(self, filled: np.ndarray, seen: Observations, ends: np.ndarray) -> np.ndarray:
        """Forecast one origin at a time, because the last imputation steps use all hours that they are given."""
        from competitions.kdd_air_quality import mlp

        config, parts = self.config, []
        longest = max(*medians.windows_of(config.windows), *features.MEDIAN_DAYS, config.history_days)
        hours = 24 * (longest + mlp.MEDIAN_SHIFTS_DAYS)
        state = checkpoint.load(self.run.fold_folder(self.fold) / "model.pt")["model"]
        for end in ends:
            recent = replace(seen, values=seen.values[: end * 24]).history(hours)
            completed = impute.complete(filled[: end * 24][-hours:], seen.network)
            rows = mlp.Rows(recent, completed, np.array([len(recent.values) // 24]), config)
            parts.append(mlp.predict(rows, state, config))
        return np.concatenate(parts)


def _ends(observations: Observations, days: np.ndarray) -> np.ndarray:
    """Origins of submit days as numbers of days since the start of the data."""
    return (first_hour(days) - observations.start) // DAY
