import numpy as np
from torch import nn

from common import tables
from common.loading.folds import kfold
from common.losses import MSE
from common.metrics import rmse
from common.tables.numbers import TableDataset, ToUnits, standardised
from common.task import Data, Network, Task


def build(config, raw, log):
    table = tables.read(raw, "train.csv", {"id": str, "y": float}, id="id")
    ids, targets = table.pop("id").tolist(), table.pop("y").to_numpy(np.float32)[:, None]
    rows, test = standardised(table, tables.read(raw, "test.csv", {"id": str}))
    folds = kfold(ids, config.folds, config.seed)
    layers = rows.shape[1], config.width, 1

    def model():
        return nn.Sequential(nn.Linear(*layers[:2]), nn.ReLU(), nn.Linear(*layers[1:]), ToUnits(targets))

    data = Data(TableDataset(rows, targets), ids, folds, TableDataset(test))
    return Task(data, metrics=(rmse(),), network=Network(model, MSE()))
