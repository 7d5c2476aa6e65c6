"""A competition small enough to train in milliseconds: sixteen numbers, three classes, dropout and BatchNorm."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common import raw
from common.config import Config, flag
from common.defaults import completed
from common.kaggle.source import Source
from common.losses import CrossEntropy
from common.metrics import accuracy
from common.raw import RawData
from common.task import TTA, Data, Network, Postprocess, Submission, Task


@dataclass(frozen=True)
class ToyConfig(Config):
    rows: int = flag(120, "labelled rows")
    nan_at_test: bool = flag(False, "predict NaN for the test rows")


RECIPES = {"default": ToyConfig(epochs=3, batch_size=16, ema=0.9, workers=0, folds=3, precision="fp32")}
TEST_ROWS = 30
RECIPES["smoke"] = replace(RECIPES["default"], epochs=2)


class ToyRows:
    """Rows whose augmentation is keyed noise; `nan` makes all inputs NaN."""

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
    (folder / "sample_submission.csv").write_text("id,label\n" + "".join(f"t{row},0\n" for row in range(TEST_ROWS)))


def build(config: ToyConfig, raw: RawData, log=print) -> Task:
    generator = torch.Generator().manual_seed(int(raw.read("seed.txt")))
    inputs = torch.randn(config.rows + TEST_ROWS, 16, generator=generator)
    targets = (inputs @ torch.randn(16, 3, generator=generator)).argmax(1)
    train, test = slice(0, config.rows), slice(config.rows, None)
    return Task(
        data=Data(
            train=ToyRows(inputs[train], targets[train], augment=True),
            valid=ToyRows(inputs[train], targets[train]),
            ids=[f"r{row}" for row in range(config.rows)],
            folds=np.arange(config.rows) % config.folds,
            test=ToyRows(inputs[test], targets[test], nan=config.nan_at_test),
            pseudo=lambda soft: ToyRows(inputs[test], soft, augment=True),
        ),
        network=Network(
            model=lambda: nn.Sequential(
                nn.Linear(16, 24), nn.BatchNorm1d(24), nn.ReLU(), nn.Dropout(0.3), nn.Linear(24, 3)
            ),
            loss=CrossEntropy(),
            tta=(TTA("as is"), TTA("scaled", lambda x: 1.01 * x)),
        ),
        postprocess=Postprocess(
            predict=lambda outputs: outputs.softmax(1),
            apply=lambda predictions, tuned: predictions.argmax(1),
            tune=lambda predictions, rows: {"rows": len(rows), "mean": float(predictions.mean())},
        ),
        submission=Submission(
            valid=lambda values: None if values[0] in ("0", "1", "2") else f"label {values[0]} is not 0 to 2"
        ),
        metrics=(accuracy(),),
    )


class Toy:
    """Stands in for a common.competition.Competition; it calls this module's functions, so tests can patch them."""

    name = "toy"
    source = Source(slug="toy", expected=("seed.txt",), higher_is_better=True)
    config_class = ToyConfig

    @property
    def recipes(self):
        return RECIPES

    def build(self, config, raw, log):
        return build(config, raw, log)

    def write_demo(self, folder):
        write_demo(folder)


TOY = Toy()


def made(config: ToyConfig | None = None, **changes) -> Task:
    """The toy's Task on its demo data, with defaults filled in."""
    found = raw.find("toy", None, write_demo, str)
    return completed(changed(build(config or RECIPES["default"], found), **changes), found)


def changed(task: Task, **changes) -> Task:
    """The Task with `changes`; each goes to the part that has a field of its name, or else to the Task itself."""
    for part in ("data", "network", "postprocess", "submission"):
        value = getattr(task, part)
        own = {name: changes.pop(name) for name in list(changes) if hasattr(value, name)}
        task = replace(task, **{part: replace(value, **own)}) if own else task
    return replace(task, **changes)
