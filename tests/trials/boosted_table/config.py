from dataclasses import dataclass, replace

from common.config import Config, flag
from common.kaggle.source import Source

SOURCE = Source(slug="boosted-table", expected=("train.csv", "test.csv"), higher_is_better=False)


@dataclass(frozen=True)
class TreeConfig(Config):
    trees: int = flag(500, "trees of LightGBM")


RECIPES = {"default": TreeConfig(fold="all")}
RECIPES["smoke"] = replace(RECIPES["default"], trees=50)
