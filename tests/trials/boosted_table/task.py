import numpy as np
from lightgbm import LGBMRegressor

from common import tables
from common.loading.folds import kfold
from common.metrics import rmse
from common.tables.numbers import TableDataset
from common.task import Data, Task


def build(config, raw, log):
    table = tables.read(raw, "train.csv", {"id": str, "y": float}, id="id")
    test = tables.read(raw, "test.csv", {"id": str}).astype({"kind": "category"})
    ids, targets = table.pop("id").tolist(), table.pop("y").to_numpy(np.float32)
    table = table.astype({"kind": test["kind"].dtype})

    def fit_predict(train, valid, fold, run):
        model = LGBMRegressor(n_estimators=config.trees, n_jobs=1, verbose=-1, deterministic=True, random_state=0)
        model.fit(table.iloc[train], targets[train])
        return model.predict(table.iloc[valid]), model.predict(test[table.columns])

    rows, test_rows = TableDataset(np.arange(len(ids)), targets), TableDataset(np.arange(len(test)))
    data = Data(rows, ids, kfold(ids, config.folds, config.seed), test_rows)
    return Task(data, metrics=(rmse(),), fit_predict=fit_predict)
