"""Read the competition's label files into one index of codes and sparse matrices [images, labels]."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import csr_matrix

from common import tables
from common.errors import UserError
from common.raw import RawData
from common.tables import number, text

CLASSES, DESCRIPTIONS = "classes-trainable.csv", "class-descriptions.csv"
TRAIN, TUNING = "train_human_labels.csv", "tuning_labels.csv"


class LabelIndex:
    """The mapping between trainable codes and columns, in the order of classes-trainable.csv."""

    def __init__(self, codes: Sequence[str], names: dict[str, str]):
        self.codes = tuple(codes)
        self.column = {code: column for column, code in enumerate(self.codes)}
        self.names = tuple(names.get(code, code) for code in self.codes)

    def __len__(self) -> int:
        return len(self.codes)

    def __str__(self) -> str:
        """The number of codes and a hash of their order, short enough for a message: equal texts mean equal columns."""
        digest = hashlib.sha256("\n".join(self.codes).encode()).hexdigest()
        return f"{len(self):,} codes of {CLASSES} (order {digest[:16]})"

    def text(self, columns: Iterable[int]) -> str:
        """Space-separated codes of columns, as a submission has them."""
        return " ".join(self.codes[column] for column in columns)


@dataclass
class Counts:
    """Counts of what was left out of a label file, so that nothing is dropped silently."""

    rows: int = 0
    zero_confidence: int = 0  # verified as absent
    untrainable: Counter = field(default_factory=Counter)  # rows of every code outside classes-trainable.csv
    repeated: int = 0  # the same image and label again
    unseen: int = 0  # trainable labels that no image has
    without_labels: int = 0  # images that have lost all their labels

    def __str__(self) -> str:
        facts = [
            (self.zero_confidence, "rows of confidence 0"),
            (self.untrainable.total(), f"rows of {len(self.untrainable)} codes that are not trainable"),
            (self.repeated, "repeated labels"),
            (self.without_labels, "images without a label"),
        ]
        left_out = ", ".join(f"{count:,} {what}" for count, what in facts if count) or "nothing"
        return f"{self.rows:,} rows read, left out: {left_out}; {self.unseen:,} trainable labels never occur"


@dataclass(frozen=True)
class LabelTable:
    """Labels of n images: sorted `ids` [n], and `matrix` uint8 csr [n, m] with sorted columns and no empty row."""

    ids: np.ndarray
    matrix: csr_matrix
    counts: Counts

    def __len__(self) -> int:
        return len(self.ids)

    def take(self, rows: np.ndarray) -> "LabelTable":
        return LabelTable(self.ids[rows], self.matrix[rows], self.counts)


def read_index(raw: RawData) -> LabelIndex:
    """Read classes-trainable.csv, and the names of class-descriptions.csv if that file is there."""
    codes = tables.read(raw, CLASSES, {"label_code": str}, id="label_code", lines=True)["label_code"]
    for line, code in codes[codes.str.contains(r"\s")].items():  # no label would fit it, nor a submission hold it
        raise UserError(f"{raw.path}/{CLASSES} line {line}: {code!r}, expected a code without spaces: {raw.mend}")
    names = {}
    if raw.exists(DESCRIPTIONS):
        columns = {"label_code": str, "description": text(blank=True)}
        names = tables.read(raw, DESCRIPTIONS, columns).set_index("label_code")["description"].to_dict()
    return LabelIndex(codes.tolist(), names)


def read_train(raw: RawData, index: LabelIndex) -> LabelTable:
    """Read train_human_labels.csv, 8 million rows, in seconds; raises UserError for wrong columns or confidences."""
    counts, numbers = Counts(), {}  # image id -> number by first appearance, sorted at the end
    images, labels = [], []
    columns = {
        "ImageID": text(category=True),
        "LabelName": text(category=True),
        "Confidence": number(0, 1, dtype="float32"),
    }
    for part in tables.parts(raw, TRAIN, columns, others="drop"):
        image, label = part["ImageID"].cat, part["LabelName"].cat
        positive = part["Confidence"].to_numpy() > 0
        column_of = np.array([index.column.get(code, -1) for code in label.categories.tolist()], np.int32)
        label_codes = label.codes.to_numpy()
        column = column_of[label_codes]
        counts.rows += len(part)
        counts.zero_confidence += int((~positive).sum())
        unknown = np.bincount(label_codes[positive & (column < 0)], minlength=len(column_of))
        counts.untrainable.update({label.categories[code]: int(unknown[code]) for code in np.flatnonzero(unknown)})
        number_of = np.array([numbers.setdefault(name, len(numbers)) for name in image.categories.tolist()], np.int32)
        kept = positive & (column >= 0)
        images.append(number_of[image.codes.to_numpy()[kept]])
        labels.append(column[kept])
    if not numbers:
        raise UserError(f"{raw.path}/{TRAIN} has no rows: {raw.mend}")
    table = _table(np.array(list(numbers)), np.concatenate(images), np.concatenate(labels), len(index), counts)
    if not len(table):
        some = ", ".join(list(counts.untrainable)[:3]) or "none"
        raise UserError(
            f"{raw.path}/{TRAIN}: no row has a trainable label of confidence above 0 (codes found: {some}): "
            f"the file and {CLASSES} must belong to one competition; {raw.mend}"
        )
    return table


def read_tuning(raw: RawData, index: LabelIndex) -> LabelTable:
    """Read tuning_labels.csv, `ImageID,code code ...` without a header; raises UserError for a repeated image."""
    columns = {"ImageID": str, "codes": text(blank=True)}
    table = tables.read(raw, TUNING, columns, id="ImageID", header=False)
    pairs = [(image, code) for image, cell in enumerate(table["codes"]) for code in cell.split()]
    counts = Counts(rows=len(pairs))
    counts.untrainable.update(code for _, code in pairs if code not in index.column)
    known = [(image, index.column[code]) for image, code in pairs if code in index.column]
    images, labels = np.array(known, int).reshape(-1, 2).T
    return _table(table["ImageID"].to_numpy(str), images, labels, len(index), counts)


def _table(names: np.ndarray, images: np.ndarray, labels: np.ndarray, m: int, counts: Counts) -> LabelTable:
    """Sort the images by id and leave out those without a label."""
    order = np.argsort(names)
    place = np.empty(len(names), np.int64)
    place[order] = np.arange(len(names))
    matrix = csr_matrix((np.ones(len(images), np.uint8), (place[images], labels)), shape=(len(names), m))
    matrix.sum_duplicates()
    counts.repeated = len(images) - matrix.nnz
    matrix.data[:] = 1
    matrix.sort_indices()
    labelled = np.flatnonzero(np.diff(matrix.indptr))
    counts.without_labels = len(names) - len(labelled)
    counts.unseen = int(m - len(np.unique(labels)))
    return LabelTable(names[order][labelled], matrix[labelled], counts)
