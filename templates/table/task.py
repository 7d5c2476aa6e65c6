"""my_competition: a number for every row of a table; the score is the RMSE.

A small network, or LightGBM with --model boosting. CHANGE marks what to adapt; common/task.py lists all of a Task.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pandas as pd
from torch import nn

from common import tables
from common.loading.folds import kfold
from common.losses import MSE
from common.metrics import rmse
from common.raw import RawData
from common.run import Run
from common.tables.numbers import TableDataset, ToUnits, row_numbers, standardised
from common.task import Data, Network, Postprocess, Task
from competitions.my_competition.config import MyConfig

ID, TARGETS = "id", ("price",)  # CHANGE: columns of train.csv; the targets in the order of the sample submission's


def build(config: MyConfig, raw: RawData, log: Callable[[str], Any]) -> Task:
    """Read the files and fill in the Task; raises UserError for anything wrong in them."""
    # CHANGE: add columns whose type matters: {"rooms": tables.number(0, 50, blank=True), "zip": str}
    table = tables.read(raw, "train.csv", {ID: str} | dict.fromkeys(TARGETS, float), id=ID)
    test = tables.read(raw, "test.csv", {ID: str}, id=ID)
    targets = table[list(TARGETS)].to_numpy(np.float32)  # [n, targets]
    # CHANGE: add your own features here, as columns of both tables.
    train, test_ids = table.drop(columns=[ID, *TARGETS]), test.pop(ID).tolist()
    # [n, F], [m, F]; LightGBM takes the tables themselves
    rows, test_rows = (standardised if config.model == "network" else row_numbers)(train, test)
    data = Data(
        train=TableDataset(rows, targets),
        test=TableDataset(test_rows),
        ids=table[ID].tolist(),
        test_ids=test_ids,
        # CHANGE: if rows belong together, grouped(table["owner"], config.folds, config.seed) from the same module
        folds=kfold(table[ID].tolist(), config.folds, config.seed),
        # --pseudo RUN trains on the test rows too, with predictions (also of boosting) as their targets
        pseudo=lambda soft: TableDataset(test_rows, soft),
    )
    score = (rmse(),)  # CHANGE: from common.metrics, or your own Metric; the first one is the score
    # CHANGE: if the CSV wants True or False, apply=lambda values, tuned: values > 0.5; with .int() for 0 or 1
    task = partial(Task, data, score, postprocess=Postprocess(), names=TARGETS)
    if config.model == "boosting":
        return task(fit_predict=partial(boosting, config, train, targets, test))
    return task(network=Network(partial(network, config, rows, targets), loss=MSE()))


def network(config: MyConfig, rows: np.ndarray, targets: np.ndarray) -> nn.Module:
    """float32 [B, F] -> [B, targets], in the targets' units. CHANGE: for classes, no ToUnits and a loss of logits."""
    hidden, sizes = [], (rows.shape[1], config.width, config.width)
    for before, after in zip(sizes, sizes[1:], strict=False):
        hidden += [nn.Linear(before, after), nn.SiLU(), nn.Dropout(config.dropout)]
    return nn.Sequential(*hidden, nn.Linear(config.width, targets.shape[1]), ToUnits(targets))


def boosting(
    config: MyConfig,
    table: pd.DataFrame,
    targets: np.ndarray,
    test: pd.DataFrame,
    train: np.ndarray,
    valid: np.ndarray,
    fold: int | None,
    part: Run,
) -> list[np.ndarray]:
    """Fit LightGBM on the rows `train`, predict the rows `valid` and the test rows; `part` is the run for this fold."""
    from lightgbm import LGBMRegressor

    texts = table.select_dtypes(exclude="number").columns
    both = pd.concat([table, test[table.columns]]).astype(dict.fromkeys(texts, "category"))  # trees take NaN
    size = {"n_estimators": config.trees, "num_leaves": config.leaves, "learning_rate": config.tree_lr, "verbose": -1}
    same = {"random_state": config.seed, "n_jobs": config.threads or 1, "deterministic": True, "force_row_wise": True}
    models = []
    for target in targets.T:
        known = train[~np.isnan(target[train])]  # LightGBM would take an unknown target, NaN, for 0
        models.append(LGBMRegressor(**size, **same).fit(both.iloc[known], target[known]))
    rows = both.iloc[[*valid, *range(len(table), len(both))]]
    return np.split(np.stack([model.predict(rows) for model in models], 1), [len(valid)])  # [m, targets]: both blend
