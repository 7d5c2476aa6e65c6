"""The direct forecaster: gradient boosting over all series and all 48 hours, one set of models per city.

It predicts the logarithm of the value relative to the series' daily cycle, under the SMAPE itself: 2 tanh(|d| / 2),
whose slope fades for hours that cannot be foreseen. All stations of a city share one weather, so a year is 365 samples
rather than millions: what helps is anything that keeps the trees from learning days by heart. Training origins lie at
four hours of the day, half of the models split at random thresholds, and the mean of several is taken.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from common.errors import UserError
from competitions.kdd_air_quality import features
from competitions.kdd_air_quality.origins import HORIZON_HOURS, HOUR
from competitions.kdd_air_quality.parallel import in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import CITIES

FEWEST_ORIGINS = 5
HISTORY_DAYS = 21  # an origin needs this much past to be trained on
# With one spring in the history the season names days as well as the season: draws with and without it err differently,
# which the mean of all likes. The weekday only names days.
LEFT_OUT = (("season_sine", "season_cosine", "weekday"), ("weekday",))
SHIFT_HOURS = (0, 6, 12, 18)  # training origins; forecasts start at 0
KINDS = {"best splits": {}, "random splits": {"extra_trees": True}}
SETTINGS = {
    "learning_rate": 0.06,
    "num_leaves": 31,
    "min_data_in_leaf": 200,
    "feature_fraction": 0.3,
    "bagging_fraction": 0.5,
    "bagging_freq": 1,
    "max_bin": 63,
    "lambda_l2": 1.0,
    "cat_smooth": 50.0,
    "num_threads": 1,
    "deterministic": True,
    "force_row_wise": True,
    "verbose": -1,
}


@dataclass(frozen=True)
class Member:
    """One fitted model: for the series of a city, as text."""

    city: str
    kind: str
    draw: int
    text: str


def smape_gradient(scores: np.ndarray, data) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of 2 tanh(|d| / 2) at d = scores - target, rounded off at 0, with a constant curvature.

    The true curvature is negative away from 0, which boosting cannot use; a constant makes the step a plain gradient's.
    """
    difference = scores - data.get_label()
    slope = 1 - np.tanh(difference / 2) ** 2
    gradient = slope * np.clip(difference / 0.05, -1, 1)
    return gradient, np.ones_like(gradient)


def columns(known: features.Features, draw: int) -> list[int]:
    """The features that a draw's models see."""
    left_out = LEFT_OUT[draw % len(LEFT_OUT)]
    return [number for number, name in enumerate(known.names) if name not in left_out]


def targets(observations: Observations, base: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Logarithm of the truth relative to the daily cycle [N, 48, S]; NaN where it is missing or not above 0."""
    series = observations.series()
    padded = np.concatenate([series, np.full((HORIZON_HOURS, series.shape[1]), np.nan, np.float32)])
    ahead = np.stack([padded[end * 24 : end * 24 + HORIZON_HOURS] for end in ends])
    return np.where(ahead > 0, features.log_of(ahead) - np.tile(base, (1, 2, 1)), np.nan).astype(np.float32)


def training_ends(observations: Observations) -> np.ndarray:
    """Origins whose 48 hours are over when the data end: with the fit at that end nothing is trained on the future."""
    last = (len(observations.values) - HORIZON_HOURS) // 24
    first = min(HISTORY_DAYS, max(last // 2, 1))
    return np.arange(first, last + 1)


def fit(observations: Observations, draws: list[int], rounds: int, share: float, jobs: int, seed: int,
        label: str = "boosting") -> Iterator[tuple[int, list[Member]]]:
    """Fit kinds x cities on everything that is over at the end of the data; yields the members of each draw when done.

    Every draw takes another `share` of the rows (origin, hour ahead, series). Raises UserError on too short a history.
    """
    ends = training_ends(observations)
    if len(ends) < FEWEST_ORIGINS:
        raise UserError(
            f"{len(observations.values) // 24} days of history before {observations.end} leave {max(len(ends), 0)} "
            f"origins to train on, expected at least {FEWEST_ORIGINS}: add earlier files, or use --models medians"
        )
    parts = []
    for shift in SHIFT_HOURS:
        shifted = replace(observations, start=observations.start + shift * HOUR, values=observations.values[shift:])
        ends = training_ends(shifted)
        known = features.build(shifted, ends)
        parts.append((known, targets(shifted, known.base, ends)))
    for draw in draws:
        kept = columns(known, draw)
        categorical = [place for place, number in enumerate(kept) if known.names[number] in features.CATEGORICAL]
        work, members = [], []
        for city in CITIES:
            table, target = _rows(parts, city, observations.network.groups, share / len(parts), seed, draw)
            for kind in KINDS if len(target) else ():
                work.append((_fit_one, (table[:, kept], target, categorical, kind, seed * 1000 + draw, rounds)))
                members.append((city, kind, draw))
        texts = in_parallel(work, jobs, f"{label}, draw {draw + 1}")
        yield draw, [Member(*member, text) for member, text in zip(members, texts, strict=True)]


def _rows(parts: list[tuple[features.Features, np.ndarray]], city: str, groups: tuple[str, ...], share: float,
          seed: int, draw: int) -> tuple[np.ndarray, np.ndarray]:
    """A random `share` of a city's rows with a known target: features [n, F] and targets [n]."""
    own = np.array([group.startswith(city) for group in groups])
    tables, found = [], []
    for number, (known, wanted) in enumerate(parts):
        random = np.random.default_rng([seed, draw, number])
        chosen = np.isfinite(wanted) & own & (random.random(wanted.shape, dtype=np.float32) < share)
        origin, hour, series = np.nonzero(chosen)
        tables.append(known.table(origin, hour, series))
        found.append(wanted[origin, hour, series])
    return np.concatenate(tables), np.concatenate(found)


def _fit_one(table: np.ndarray, target: np.ndarray, categorical: list[int], kind: str, seed: int, rounds: int) -> str:
    import lightgbm

    settings = SETTINGS | KINDS[kind] | {"seed": seed, "objective": smape_gradient}
    settings["min_data_in_leaf"] = min(SETTINGS["min_data_in_leaf"], max(len(target) // 100, 1))
    data = lightgbm.Dataset(table, target, categorical_feature=categorical, params={"max_bin": SETTINGS["max_bin"]})
    return lightgbm.train(settings, data, rounds).model_to_string()


def forecast(members: list[Member], observations: Observations, ends: np.ndarray) -> np.ndarray:
    """ug/m3 [N, 48, S] for the origins `ends`, each from what is before it alone."""
    from lightgbm import Booster

    known = features.build(observations, ends)
    count = len(observations.network.series)
    result = np.zeros((len(ends), HORIZON_HOURS, count))
    boosters = [(member, columns(known, member.draw), Booster(model_str=member.text)) for member in members]
    for city in CITIES:
        own = np.flatnonzero([group.startswith(city) for group in observations.network.groups])
        of_city = [(kept, booster) for member, kept, booster in boosters if member.city == city]
        for number in range(len(ends)) if len(own) and of_city else ():
            hour, place = (grid.ravel() for grid in np.meshgrid(np.arange(HORIZON_HOURS), own, indexing="ij"))
            table = known.table(np.full(len(hour), number), hour, place)
            mean = sum(booster.predict(table[:, kept], num_threads=1) for kept, booster in of_city) / len(of_city)
            result[number][:, own] = mean.reshape(HORIZON_HOURS, len(own))
    return np.exp(result + np.tile(known.base, (1, 2, 1)))
