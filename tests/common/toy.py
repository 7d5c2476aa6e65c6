"""A competition small enough to train in milliseconds: sixteen numbers, three classes, dropout and BatchNorm."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.config import Config, flag
from common.losses import CrossEntropy
from common.raw import RawData
from common.task import Metric, Task, View


@dataclass(frozen=True)
class ToyConfig(Config):
    rows: int = flag(120, "labelled rows")
    nan_at_test: bool = flag(False, "predict NaN for the test rows")


RECIPES = {"default": ToyConfig(epochs=3, batch_size=16, ema=0.9, workers=0, folds=3, precision="fp32")}
RECIPES["smoke"] = replace(RECIPES["default"], epochs=2)


class ToyRows:
    """Rows whose augmentation is keyed noise; `nan` spoils the inputs."""

    def __init__(self, inputs: torch.Tensor, targets: torch.Tensor, augment: bool = False, nan: bool = False):
        self.inputs, self.targets, self.augment = inputs * (float("nan") if nan else 1), targets, augment

    def __len__(self) -> int:
        return len(self.inputs)

    def batch(self, indices, keys):
        indices = torch.as_tensor(indices)
        inputs = self.inputs[indices]
        if self.augment:
            inputs = inputs + 0.1 * torch.as_tensor(keys.normal((16,))).float()
        return inputs, self.targets[indices]


def write_demo(folder: Path) -> None:
    (folder / "seed.txt").write_text("1")


def build(config: ToyConfig, raw: RawData) -> Task:
    generator = torch.Generator().manual_seed(int(raw.read("seed.txt")))
    inputs = torch.randn(config.rows + 30, 16, generator=generator)
    targets = (inputs @ torch.randn(16, 3, generator=generator)).argmax(1)
    train, test = slice(0, config.rows), slice(config.rows, None)
    ids = [f"t{row}" for row in range(30)]
    return Task(
        labelled=ToyRows(inputs[train], targets[train], augment=True),
        plain=ToyRows(inputs[train], targets[train]),
        test=ToyRows(inputs[test], targets[test], nan=config.nan_at_test),
        ids=[f"r{row}" for row in range(config.rows)],
        test_ids=ids,
        folds=np.arange(config.rows) % config.folds,
        model=lambda: nn.Sequential(
            nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 3)
        ),
        loss=CrossEntropy(),
        metrics=(Metric("accuracy", lambda decisions, targets: (decisions == targets).float()),),
        predict=lambda outputs: outputs.softmax(1),
        decide=lambda predictions, learnt: predictions.argmax(1),
        columns=("id", "label"),
        rows=lambda ids, decisions: zip(ids, decisions.tolist(), strict=True),
        sample_submission=lambda: ["id,label\n", *(f"{name},0\n" for name in ids)],
        valid=lambda values: None if values[0] in ("0", "1", "2") else f"label {values[0]} is not 0 to 2",
        learn=lambda predictions, rows: {"rows": len(rows), "mean": float(predictions.mean())},
        views=(View("as is"), View("scaled", lambda x: 1.01 * x)),
        fingerprint=raw.fingerprint("seed.txt"),
    )
