from dataclasses import dataclass, replace

from common.config import Config, flag
from common.kaggle.source import Source

SOURCE = Source(slug="rmse-table", expected=("train.csv", "test.csv"), higher_is_better=False)


@dataclass(frozen=True)
class TableConfig(Config):
    width: int = flag(64, "values in the hidden layer")


RECIPES = {"default": TableConfig(epochs=30, lr=1e-2, fold="all", workers=0)}
RECIPES["smoke"] = replace(RECIPES["default"], epochs=5, folds=3)
