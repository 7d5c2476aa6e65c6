"""The shortcut network on the core's training loop: one network for both cities, all series and all 48 hours.

A row is a series at an origin. Its inputs are the hours before the origin, with gaps imputed, and the medians per hour
of the day over windows that end at the origin and a day before it, all as logarithms relative to the series' daily
cycle, and indicators of the series. The network outputs 48 logarithms relative to the same cycle, so forecasts are
always positive.
"""

from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from common import task as core
from common.loading import orders
from common.losses import LogSMAPE
from common.metrics import Metric
from competitions.kdd_air_quality import features, medians
from competitions.kdd_air_quality.config import Config
from competitions.kdd_air_quality.origins import HORIZON_HOURS
from competitions.kdd_air_quality.reader import Observations
from competitions.kdd_air_quality.stations import CITIES, POLLUTANTS

MEDIAN_SHIFTS_DAYS = 2  # windows end at the origin, and a day before it


class ShortcutMLP(nn.Module):
    """Dense layers with a shortcut: the second layer gets the raw inputs too. Inputs [B, F] -> [B, 48]."""

    def __init__(self, inputs: int, units: int, dropout: float):
        super().__init__()
        drop = partial(nn.Dropout, dropout)
        self.first = nn.Sequential(nn.Linear(inputs, units), nn.ReLU(), drop())
        layers = [nn.Linear(units + inputs, units), nn.ReLU(), nn.BatchNorm1d(units), drop()]
        for _ in range(2):
            layers += [nn.Linear(units, units), nn.ReLU(), drop()]
        self.rest = nn.Sequential(*layers, nn.Linear(units, HORIZON_HOURS))
        nn.init.zeros_(self.rest[-1].weight)  # the first forecast is the daily cycle itself
        nn.init.zeros_(self.rest[-1].bias)

    def forward(self, inputs: Tensor) -> Tensor:
        return self.rest(torch.cat([self.first(inputs), inputs], dim=1))


class Rows:
    """Dataset of all series at the origins `ends`; the row number is the origin's position * S + the series' number.

    `completed` [hours, S] are values without gaps; inputs use only the hours before the origin. Targets are those of
    `observations`.
    """

    def __init__(self, observations: Observations, completed: np.ndarray, ends: np.ndarray, config: Config):
        self.network = observations.network
        self.series_count = completed.shape[1]
        self.ends = np.asarray(ends)
        self.hours = config.history_days * 24
        logs = features.log_of(completed).astype(np.float32)
        self.logs = np.pad(logs, ((self.hours, 0), (0, 0)), mode="edge")  # hours before the data = the first
        days, windows = medians.by_day(logs[: len(logs) // 24 * 24]), medians.windows_of(config.windows)
        self.medians = [
            window  # [origins, 24, S]
            for back in range(MEDIAN_SHIFTS_DAYS)
            for window in medians.sliding_medians(days, windows, np.maximum(self.ends - back, 1))
        ]
        self.known = features.build(observations, self.ends)
        self.base = self.known.base
        self.targets = features.targets(observations, self.base, self.ends)
        context, hourly = self.known.inputs()
        hourly = hourly.transpose(0, 2, 1, 3).reshape(*context.shape[:2], -1)
        self.context = np.concatenate([context, hourly], axis=-1)
        stations, pollutants = self.network.places
        cities = np.array([CITIES.index(city) for city in self.network.cities])
        names = ((cities, CITIES), (stations, self.network.stations), (pollutants, POLLUTANTS))
        self.indicators = np.concatenate([number[:, None] == np.arange(len(of)) for number, of in names], axis=1)

    def __len__(self) -> int:
        return len(self.ends) * self.series_count

    def batch(self, indices: np.ndarray, keys=None) -> tuple[Tensor, Tensor]:
        """Inputs [B, F] and targets [B, 48], logarithms relative to the daily cycle; NaN where the truth is missing."""
        position, series = np.divmod(np.asarray(indices), self.series_count)
        base = self.base[position, :, series]  # [B, 24]
        hour = self.ends[position] * 24
        past = self.logs[hour[:, None] + np.arange(self.hours), series[:, None]]
        parts = [past - np.tile(base, (1, self.hours // 24))]
        parts += [window[position, :, series] - base for window in self.medians]
        parts += [self.context[position, series], self.indicators[series]]
        inputs = np.concatenate(parts, axis=1).clip(-features.LIMIT, features.LIMIT).astype(np.float32)
        return torch.from_numpy(inputs), torch.from_numpy(self.targets[position, :, series])

    def forecast(self, relative: np.ndarray) -> np.ndarray:
        """Network outputs [origins * S, 48] of all rows in order -> forecasts in ug/m3 [origins, 48, S]."""
        return self.known.in_units(relative.reshape(len(self.ends), -1, HORIZON_HOURS).transpose(0, 2, 1))


def task(rows: Rows, held: np.ndarray, fold: int, config: Config) -> core.Task:
    """The Task for the core's `fit`: rows of the origins `held` are in `fold`, all other rows are always trained on."""
    count = rows.series_count
    of_day = np.repeat(rows.ends, count)
    return core.Task(
        data=core.Data(
            train=rows,
            valid=rows,
            ids=[f"{end}/{name}" for end in rows.ends for name in rows.network.names],
            folds=np.where(np.isin(of_day, held), fold, -1),
            order=lambda train: orders.grouped(of_day[train], train),  # a batch is a day, as its series share weather
        ),
        network=core.Network(model=lambda: _model(rows, config), loss=LogSMAPE()),
        metrics=(Metric("smape", _smape_stats, higher_is_better=False),),
    )


def _model(rows: Rows, config: Config) -> ShortcutMLP:
    return ShortcutMLP(rows.batch(np.zeros(1, np.int64))[0].shape[1], config.units, config.dropout)


def _smape_stats(predictions: Tensor, targets: Tensor) -> Tensor:
    """Sum of the SMAPE terms, and number of known hours, of every row [B, 2]."""
    known = ~targets.isnan()
    terms = torch.where(known, LogSMAPE().entries(predictions, targets), 0.0)
    return torch.stack([terms.sum(1), known.sum(1).to(terms.dtype)], dim=1)


@torch.inference_mode()
def predict(rows: Rows, state: dict[str, Tensor], config: Config) -> np.ndarray:
    """Forecasts of a fitted network in ug/m3 [origins, 48, S] for all origins of `rows`."""
    model = _model(rows, config).eval()
    model.load_state_dict(state)
    return rows.forecast(model(rows.batch(np.arange(len(rows)))[0]).numpy())
