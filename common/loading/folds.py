"""Folds: int arrays [n] with the fold of every row, functions of ids, labels and seed that do not see the file order.

Rows are first put into the order of a hash of (seed, id): the same ids get the same folds however the file is sorted.
"""

import csv
import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError
from common.loading.keys import keyed_seed


def kfold(ids: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds of equal size, up to one row."""
    return _dealt(_shuffled(ids, folds, seed), folds)


def stratified(ids: Sequence, labels: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds of equal size that hold every class of `labels` [n] in equal number, both up to one row."""
    order = _shuffled(ids, folds, seed)
    _, classes = np.unique(np.asarray(labels), return_inverse=True)
    return _dealt(order[np.argsort(classes[order], kind="stable")], folds)


def multilabel_stratified(ids: Sequence, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Folds with the same rate of every label; `labels` [n, L] is 0 or 1.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas, ECML PKDD 2011) of the iterative-stratification library.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold  # brings scikit-learn: two seconds

    order, labels = _shuffled(ids, folds, seed), np.asarray(labels)
    if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
        raise UserError(f"multilabel_stratified: expected labels [n, L] of 0 and 1, found an array {labels.shape}")
    splitter = MultilabelStratifiedKFold(folds, shuffle=True, random_state=keyed_seed(seed))
    result = np.empty(len(order), np.int64)
    for fold, (_, held) in enumerate(splitter.split(order, labels[order].astype(int))):
        result[order[held]] = fold
    return result


def grouped(groups: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds of about equal size that never share a group; `groups` [n] names the group of every row."""
    names, number, counts = np.unique(np.asarray(groups), return_inverse=True, return_counts=True)
    order = _shuffled(names.tolist(), folds, seed, "groups")
    of_group, sizes = np.empty(len(names), np.int64), np.zeros(folds, np.int64)
    for group in order[np.argsort(-counts[order], kind="stable")]:  # the largest first, each to the smallest fold
        of_group[group] = sizes.argmin()
        sizes[of_group[group]] += counts[group]
    return of_group[number]


def time_splits(times: Sequence, splits: int, length, gap) -> list[tuple[np.ndarray, np.ndarray]]:
    """(training rows, validation rows) of `splits` consecutive periods of `length` at the end of the data.

    A validation period holds start < time <= start + length; its training rows are all with time <= start - gap, so a
    feature that reaches `gap` back sees none of them. `times` [n], `length` and `gap` are numbers, or datetime64 and
    timedelta64; rows come in the order of time. Raises UserError when a split has nothing to train on.
    """
    times = np.asarray(times)
    order = np.argsort(times, kind="stable")
    ordered = times[order]
    result = []
    for split in range(splits):
        start = ordered[-1] - (splits - split) * length
        train = order[: np.searchsorted(ordered, start - gap, side="right")]
        first, stop = np.searchsorted(ordered, [start, start + length], side="right")
        if not len(train) or first == stop:
            raise UserError(
                f"{splits} periods of {length} with a gap of {gap} do not fit between {ordered[0]} and "
                f"{ordered[-1]}: use fewer or shorter ones"
            )
        result.append((train, order[first:stop]))
    return result


def fingerprint(folds: np.ndarray, ids: Sequence) -> str:
    """sha256 of the folds by id, the same for any order of the rows."""
    lines = sorted(f"{name}\t{fold}\n" for name, fold in zip(ids, np.asarray(folds).tolist(), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_csv(path: Path, folds: np.ndarray, ids: Sequence) -> None:
    """Save the folds as `id,fold`, to share them among models."""
    files.write_csv(path, ("id", "fold"), zip(ids, np.asarray(folds).tolist(), strict=True))


def read_csv(path: Path, ids: Sequence) -> np.ndarray:
    """The folds of `ids` that `write_csv` saved; raises UserError when an id has none."""
    with open(path, encoding="utf-8", newline="") as stream:
        saved = {files.read_cell(row["id"]): int(row["fold"]) for row in csv.DictReader(stream)}
    missing = [name for name in map(str, ids) if name not in saved]
    if missing:
        raise UserError(
            f"{path} has no fold for {len(missing)} of {len(ids)} ids, first {missing[0]}: it belongs to "
            "other data, delete it to make new folds"
        )
    return np.array([saved[str(name)] for name in ids])


def _shuffled(ids: Sequence, folds: int, seed: int, what: str = "ids") -> np.ndarray:
    """Positions of the ids in the order of their hash; raises UserError on ids that repeat or are too few."""
    hashes = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest() for name in ids]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    for before, after in zip(order, order[1:], strict=False):
        if hashes[before] == hashes[after]:
            raise UserError(
                f"{what} must differ, but {ids[before]} comes twice: use `grouped` for rows that belong together"
            )
    if len(hashes) < folds:
        raise UserError(f"{len(hashes)} {what} cannot fill {folds} folds: use fewer --folds")
    return np.array(order)


def _dealt(order: np.ndarray, folds: int) -> np.ndarray:
    """Deal positions to the folds in turn, like cards."""
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order)) % folds
    return result
