"""Folds: int arrays [n] with the fold of every row, which depend on ids, labels and seed.

Rows are first sorted by a hash of (seed, id), so the same ids get the same folds however the file is sorted.
"""

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from common import files
from common.errors import UserError
from common.loading.keys import keyed_seed

EXCHANGES, NEAR = 3, 100  # how often every group is tried, and with how many groups of similar size on either side


def kfold(ids: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds whose sizes differ by at most one row."""
    return _dealt(_shuffled(ids, folds, seed), folds)


def stratified(ids: Sequence, labels: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds whose sizes, and numbers of rows of every class in `labels` [n], differ by at most one."""
    order = _shuffled(ids, folds, seed)
    _check_length(order, "labels", labels)
    _, classes = np.unique(filled(labels, "label"), return_inverse=True)
    return _dealt(order[np.argsort(classes[order], kind="stable")], folds)


def multilabel_stratified(ids: Sequence, labels: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Folds with the same rate of every label; `labels` [n, L] is 0 or 1.

    Iterative stratification (Sechidis, Tsoumakas, Vlahavas, ECML PKDD 2011) by the iterative-stratification library.
    """
    from iterstrat.ml_stratifiers import MultilabelStratifiedKFold  # brings scikit-learn: two seconds

    order, labels = _shuffled(ids, folds, seed), np.asarray(labels)
    if labels.ndim != 2 or not np.isin(labels, (0, 1)).all():
        raise UserError(f"multilabel_stratified: expected labels [n, L] of 0 and 1, found an array {labels.shape}")
    _check_length(order, "labels", labels)
    if labels.shape[1] == 1:  # the library refuses it
        return stratified(ids, labels[:, 0], folds, seed)
    splitter = MultilabelStratifiedKFold(folds, shuffle=True, random_state=keyed_seed(seed))
    result = np.empty(len(order), np.int64)
    for fold, (_, held) in enumerate(splitter.split(order, labels[order].astype(int))):
        result[order[held]] = fold
    return result


def grouped(groups: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds of about equal size that never share a group; `groups` [n] names the group of every row."""
    names, number, counts = np.unique(filled(groups, "group"), return_inverse=True, return_counts=True)
    order = _shuffled(names.tolist(), folds, seed, "groups")
    of_group, sizes = np.empty(len(names), np.int64), np.zeros(folds, np.int64)
    for group in order[np.argsort(-counts[order], kind="stable")]:  # the largest first, each to the smallest fold
        of_group[group] = sizes.argmin()
        sizes[of_group[group]] += counts[group]
    return of_group[number]


def stratified_grouped(labels: Sequence, groups: Sequence, folds: int, seed: int) -> np.ndarray:
    """Folds of about equal size and with about equal numbers of every class, which never share a group.

    `labels` are classes [n], or 0 and 1 [n, L]; `groups` [n] names the group of every row. Each group, large ones
    first, goes to the fold that has least of its classes. Then groups of similar size are exchanged wherever that
    lowers the sum of squares over folds and classes, which is least when all folds are equal.
    """
    labels = filled(labels, "label")
    _check_length(labels, "groups", groups)
    if labels.ndim == 1:
        classes, labels = np.unique(labels, return_inverse=True)
        labels = labels[:, None] == np.arange(len(classes))
    names, number = np.unique(filled(groups, "group"), return_inverse=True)
    columns = np.column_stack([np.ones(len(labels)), labels])
    content = np.zeros((len(names), columns.shape[1]))  # each group's share of all rows, and of every class
    np.add.at(content, number, columns)
    content /= np.maximum(content.sum(0), 1)
    order = _shuffled(names.tolist(), folds, seed, "groups")
    order = order[np.argsort(-np.floor(np.log2(np.square(content[order]).sum(1)) / 2), kind="stable")]
    content = content[order]
    of_group, held = np.empty(len(names), np.int64), np.zeros((folds, columns.shape[1]))
    for group, own in enumerate(content):
        of_group[group] = (held @ own).argmin()
        held[of_group[group]] += own
    for group in [*range(len(names))] * EXCHANGES:
        first, fold = max(group - NEAR, 0), of_group[group]
        others = of_group[first : group + NEAR]
        gained = content[first : group + NEAR] - content[group]  # by the fold of `group`, and lost by the other
        change = np.where(others == fold, 0, ((held[fold] - held[others] + gained) * gained).sum(1))
        if change[best := change.argmin()] < -1e-12:
            held[fold] += gained[best]
            held[others[best]] -= gained[best]
            of_group[group], of_group[first + best] = others[best], fold
    result = np.empty(len(names), np.int64)
    result[order] = of_group
    return result[number]


def fingerprint(folds: np.ndarray, ids: Sequence) -> str:
    """sha256 of the folds by id, the same for any order of the rows."""
    lines = sorted(f"{name}\t{fold}\n" for name, fold in zip(ids, np.asarray(folds).tolist(), strict=True))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def write_csv(path: Path, folds: np.ndarray, ids: Sequence) -> None:
    """Save the folds as `id,fold`, to share them among models."""
    files.write_csv(path, ("id", "fold"), zip(ids, np.asarray(folds).tolist(), strict=True))


def filled(values: Sequence, what: str) -> np.ndarray:
    """`values` [n, ...] as an array; raises UserError if one is missing, since a blank is no class or group."""
    import pandas as pd  # knows None, NaN and NA

    array = np.asarray(values)
    if what == "group" and array.ndim != 1:
        raise UserError(f"the groups are an array {list(array.shape)}: expected one name for every row, such as a text")
    if (missing := np.argwhere(pd.isna(array))).size:
        raise UserError(
            f"row {missing[0][0]} (of {len(array)}, the first is 0) has no {what}: give it one, with fillna"
        )
    return array


def _check_length(rows: Sequence, what: str, values: Sequence) -> None:
    if len(values) != len(rows):
        raise UserError(f"{len(values)} {what} for {len(rows)} rows: expected one of each for every row")


def _shuffled(ids: Sequence, folds: int, seed: int, what: str = "ids") -> np.ndarray:
    """Positions of the ids in the order of their hash; raises UserError if ids repeat or are fewer than folds."""
    ids = list(ids)
    hashes = [hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=16).digest() for name in ids]
    order = sorted(range(len(hashes)), key=hashes.__getitem__)
    for before, after in zip(order, order[1:], strict=False):
        if hashes[before] == hashes[after]:
            raise UserError(
                f"{what} must differ, but {ids[before]} comes twice: use `grouped` for rows that belong together"
            )
    if not 1 <= folds <= len(hashes):
        raise UserError(f"{len(hashes)} {what} cannot fill {folds} folds: use fewer --folds, and 1 or more")
    return np.array(order)


def _dealt(order: np.ndarray, folds: int) -> np.ndarray:
    """Deal positions to the folds in turn, like cards."""
    result = np.empty(len(order), np.int64)
    result[order] = np.arange(len(order)) % folds
    return result
