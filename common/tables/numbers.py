"""Tables as inputs of a network: standardised columns, batches cut from arrays, outputs in the target's units."""

from collections.abc import Iterator

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_bool_dtype, is_numeric_dtype
from torch import Tensor, nn

from common.batch import Tree, map_tree, tensors_of
from common.errors import UserError
from common.loading.collate import as_tensors
from common.loading.keys import Keys

MANY = 1000  # different texts: rather an id or a sentence than a category
ROUNDING = 1e-12  # of the mean: a smaller deviation is a rounding error of equal numbers (1e-17 for 0.1, 0.1, 0.1)


def standardised(train: pd.DataFrame, *others: pd.DataFrame) -> list[np.ndarray]:
    """Every table as float32 [rows, F], with the columns of `train` and the statistics of all its rows.

    Numbers get mean 0 and deviation 1. A column that is constant in `train` becomes 0 in every table, because the
    effect of other values cannot be learnt. A text column becomes a 0/1 column for each text in `train`; a text that
    only `others` have is 0 in all of them. A blank is 0; where `train` has blanks, a further 0/1 column marks them.
    Raises UserError for a column that another table lacks, one with numbers in one table and texts in another, and one
    with too many different texts.
    """
    parts: list[list[np.ndarray]] = [[] for _ in (train, *others)]
    for name, cells in _columns(train, *others):
        made = _of_numbers(cells) if is_numeric_dtype(train[name]) else _of_texts(cells)
        has_blanks = cells[0].isna().any()
        for part, column, numbers in zip(parts, cells, made, strict=True):
            part += [numbers, column.isna().to_numpy()[:, None]] if has_blanks else [numbers]
    return [np.concatenate(part, axis=1, dtype=np.float32) for part in parts]


def row_numbers(train: pd.DataFrame, *others: pd.DataFrame) -> list[np.ndarray]:
    """The row numbers [rows] of every table, for a model that takes the tables themselves, any number of texts too.

    Raises UserError as `standardised` for a column that another table lacks, or has of another kind.
    """
    for _ in _columns(train, *others):
        pass
    return [np.arange(len(table)) for table in (train, *others)]


def _columns(train: pd.DataFrame, *others: pd.DataFrame) -> Iterator[tuple[str, list[pd.Series]]]:
    """Every column of `train` by its name, in all tables and of one kind."""
    for name in train.columns:
        yield name, [_cells(table, name, is_numeric_dtype(train[name])) for table in (train, *others)]


def _cells(table: pd.DataFrame, name: str, numeric: bool) -> pd.Series:
    """A column after the checks, numbers as float64."""
    if name not in table:
        raise UserError(f"column {name} is not in every table: leave it out of the features")
    column = table[name]
    if numeric != is_numeric_dtype(column) and column.notna().any() and not is_bool_dtype(column):
        raise UserError(
            f"column {name} has numbers in one table and texts in another: give tables.read {name!r}: "
            f"number(blank=True), which names the bad line, or {name!r}: str"
        )
    if numeric and np.isinf(column.to_numpy(np.float64, na_value=np.nan)).any():
        raise UserError(
            f"column {name} holds an infinite value: give tables.read {name!r}: number(), which names the line"
        )
    return column.astype(np.float64) if numeric else column


def _of_numbers(columns: list[pd.Series]) -> list[np.ndarray]:
    mean, deviation = columns[0].mean(), columns[0].std(ddof=0)
    scale = deviation if deviation > ROUNDING * abs(mean) else np.inf
    return [((column - mean) / scale).fillna(0).to_numpy()[:, None] for column in columns]


def _of_texts(columns: list[pd.Series]) -> list[np.ndarray]:
    if (count := max(column.nunique() for column in columns)) > MANY:
        raise UserError(
            f"column {columns[0].name} has {count:,} different texts, at most {MANY:,} can become 0/1 columns: leave "
            f"it out of the features, or turn it into numbers"
        )
    texts = sorted(columns[0].dropna().unique())
    codes = [pd.Index(texts, dtype=object).get_indexer(column.astype(object)) for column in columns]
    return [code[:, None] == np.arange(len(texts)) for code in codes]


class TableDataset:
    """Rows of arrays or tensors [n, ...], cut a batch at a time; inputs and targets may be tuples and dicts of them.

    Without targets (test rows) every target is an empty tensor. Raises UserError unless there is one for every row.
    """

    def __init__(self, inputs: Tree, targets: Tree = None):
        self.inputs = as_tensors(inputs)
        self.targets = torch.empty(len(self), 0) if targets is None else as_tensors(targets)
        if (count := len(tensors_of(self.targets)[0])) != len(self):
            raise UserError(f"{len(self)} rows have {count} targets: expected one for each, see build()")

    def __len__(self) -> int:
        return len(tensors_of(self.inputs)[0])

    def batch(self, indices: np.ndarray, keys: Keys) -> tuple[Tree, Tree]:
        rows = torch.as_tensor(indices)
        return map_tree(lambda x: x[rows], (self.inputs, self.targets))


class ToUnits(nn.Module):
    """The last layer of a regression: gives standardised outputs [B, T] the mean and deviation of `targets` [n, T].

    A NaN target is unknown, as in the losses, and does not count.
    """

    def __init__(self, targets: np.ndarray):
        super().__init__()
        known = ~np.isnan(targets)
        mean, deviation = (torch.as_tensor(f(0, dtype=np.float64, where=known)) for f in (targets.mean, targets.std))
        self.register_buffer("mean", mean.float())
        self.register_buffer("deviation", torch.where(deviation > ROUNDING * mean.abs(), deviation, 1.0).float())

    def forward(self, outputs: Tensor) -> Tensor:
        return outputs * self.deviation + self.mean
