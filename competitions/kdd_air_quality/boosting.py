"""The direct forecaster: gradient boosting over all series and all 48 hours, one set of models per city.

It predicts the logarithm of the value relative to the series' daily cycle. Its loss is the SMAPE itself,
2 tanh(|d| / 2), whose gradient vanishes for hours that cannot be predicted (large errors d). All stations of a city
share one weather, so a year is 365 samples rather than millions, and overfitting to single days is the main danger.
Against it, training origins lie at four hours of the day, half of the models split at random thresholds, half start
from the linear forecast and learn its error, and several models are averaged.
"""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np

from competitions.kdd_air_quality import features, linear
from competitions.kdd_air_quality.config import Config
from competitions.kdd_air_quality.origins import HORIZON_HOURS, HOUR
from competitions.kdd_air_quality.parallel import fit_trees, in_parallel
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import CITIES

# With one spring in the history the season identifies single days. Draws with and without it make different errors,
# which cancel out in the mean of all. The weekday only identifies days.
LEFT_OUT = (("season_sine", "season_cosine", "weekday"), ("weekday",))
FROM_LINEAR = (False, False, True, True)  # by draw: whether it learns the error of the linear forecast
SHIFT_HOURS = (0, 6, 12, 18)  # hours of the training origins; forecasts start at 0
KINDS = ({}, {"extra_trees": True})  # best splits, and random splits
SETTINGS = {"learning_rate": 0.06, "feature_fraction": 0.3, "lambda_l2": 1.0, "cat_smooth": 50.0}
FEWEST_IN_LEAF = 200
Member = dict[str, Any]  # one fitted model: its "city", its "draw", and its "text" (LightGBM's model string)


def smape_gradient(scores: np.ndarray, data) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of 2 tanh(|d| / 2) at d = scores - target, smoothed around 0, and a constant Hessian.

    The true Hessian is negative away from 0, which boosting cannot use; a constant gives plain gradient steps.
    """
    difference = scores - data.get_label()
    slope = 1 - np.tanh(difference / 2) ** 2
    gradient = slope * np.clip(difference / 0.05, -1, 1)
    return gradient, np.ones_like(gradient)


def columns(known: features.Features, draw: int) -> list[int]:
    """Numbers of the features that the models of a draw use."""
    return [number for number, name in enumerate(known.names) if name not in LEFT_OUT[draw % len(LEFT_OUT)]]


def from_linear(draw: int) -> bool:
    return FROM_LINEAR[draw % len(FROM_LINEAR)]


def fit(
    observations: Observations, lines: np.ndarray, draws: list[int], config: Config, label: str
) -> Iterator[tuple[int, list[Member]]]:
    """Fit a model per kind and city for every draw, and yield the members of each draw when they are done.

    Origins are those whose 48 hours end before the data do. Every draw takes another random `boosting_fraction` of the
    rows (origin, hour ahead, series). `lines` is the linear forecaster fitted to the same data. Raises UserError if the
    history is too short.
    """
    network, parts = observations.network, []
    for shift in SHIFT_HOURS:
        shifted = replace(observations, start=observations.start + shift * HOUR, values=observations.values[shift:])
        ends = features.training_ends(shifted)
        known = features.build(shifted, ends)
        parts.append((known, features.targets(shifted, known.base, ends), linear.at(lines, known, network)))
    fraction = config.boosting_fraction / len(parts)
    for draw in draws:
        kept, seed = columns(known, draw), config.seed * 1000 + draw
        categorical = [place for place, number in enumerate(kept) if known.names[number] in features.CATEGORICAL]
        work, members = [], []
        for city in CITIES:
            table, target = _rows(parts, network.in_city(city), fraction, config.seed, draw)
            in_leaf = min(FEWEST_IN_LEAF, max(len(target) // 100, 1))
            own = SETTINGS | {"seed": seed, "objective": smape_gradient, "min_data_in_leaf": in_leaf}
            for kind in KINDS if len(target) else ():
                work.append((fit_trees, (table[:, kept], target, own | kind, config.boosting_rounds, categorical)))
                members.append({"city": city, "draw": draw})
        texts = in_parallel(work, config.jobs, f"{label}, draw {draw + 1}")
        yield draw, [member | {"text": text} for member, text in zip(members, texts, strict=True)]


def _rows(
    parts: list[tuple[features.Features, np.ndarray, np.ndarray]], own: np.ndarray, share: float, seed: int, draw: int
) -> tuple[np.ndarray, np.ndarray]:
    """A random `share` of the rows with a known target, of the series `own`: features [n, F] and targets [n]."""
    tables, found = [], []
    for number, (known, wanted, line) in enumerate(parts):
        random = np.random.default_rng([seed, draw, number])
        chosen = np.isfinite(wanted) & own & (random.random(wanted.shape, dtype=np.float32) < share)
        places = np.nonzero(chosen)  # origin, hour, series
        tables.append(known.table(*places))
        found.append((wanted - line if from_linear(draw) else wanted)[places])
    return np.concatenate(tables), np.concatenate(found)


def forecast(members: list[Member], lines: np.ndarray, observations: Observations, ends: np.ndarray) -> np.ndarray:
    """Forecasts in ug/m3 [N, 48, S] for the origins `ends`, each only from the hours before it."""
    from lightgbm import Booster

    known, network = features.build(observations, ends), observations.network
    result = np.zeros((len(ends), HORIZON_HOURS, len(network.series)))
    for city in dict.fromkeys(member["city"] for member in members):
        boosters = [
            (columns(known, member["draw"]), Booster(model_str=member["text"]))
            for member in members
            if member["city"] == city
        ]
        own = np.flatnonzero(network.in_city(city))
        hour, place = np.repeat(np.arange(HORIZON_HOURS), len(own)), np.tile(own, HORIZON_HOURS)
        for number in range(len(ends)):
            table = known.table(np.full(len(hour), number), hour, place)
            mean = sum(booster.predict(table[:, kept], num_threads=1) for kept, booster in boosters) / len(boosters)
            result[number][:, own] = mean.reshape(HORIZON_HOURS, len(own))
    fraction = sum(from_linear(member["draw"]) for member in members) / max(len(members), 1)
    return known.in_units(result + fraction * linear.at(lines, known, network))
