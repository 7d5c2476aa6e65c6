"""The competition's three CSV files: checked cell by cell, read once, kept as .npy beside the data from then on."""

import codecs
import csv
import hashlib
import io
from collections import Counter
from dataclasses import dataclass

import numpy as np
import pandas as pd

from common.errors import UserError
from common.files import write_with
from common.raw import RawData

SIZE = 28  # pixels of a side
PIXEL_COLUMNS = [f"pixel{number}" for number in range(SIZE * SIZE)]
FILES = {
    "train.csv": ["label", *PIXEL_COLUMNS],
    "test.csv": PIXEL_COLUMNS,
    "sample_submission.csv": ["ImageId", "Label"],
}
LARGEST = {"label": 9}  # every other cell is a pixel, 0..255
AGAIN = "mend the file, or get it again with make data COMP=digit_recognizer"
OFFENDERS = 5  # so many faults are named
SHOWN = 30  # characters of a cell or a name
IN_NUMBERS = np.zeros(256, bool)  # bytes that the rows of train.csv and test.csv are made of
IN_NUMBERS[list(b'0123456789,"\r\n')] = True


@dataclass(frozen=True)
class DigitFiles:
    """Everything the files say. Row i of test.csv is ImageId i + 1; test rows are in the sample's order."""

    images: np.ndarray  # uint8 [n, 1, 28, 28], black is 0
    labels: np.ndarray  # int64 [n], 0..9
    test_images: np.ndarray  # uint8 [m, 1, 28, 28]
    test_ids: list[str]  # m ImageIds
    sample_lines: list[str]  # of sample_submission.csv
    fingerprint: str  # sha256 over the contents of the three files


def read(raw: RawData) -> DigitFiles:
    """Read and check the files; raises UserError naming the file, the line and the column of the first fault."""
    known = set(raw.cache.glob("*.npy"))
    train, train_digest = _pixels(raw, "train.csv")
    test, test_digest = _pixels(raw, "test.csv")
    sample = raw.text("sample_submission.csv")
    ids = _ids(f"{raw.path}/sample_submission.csv", list(raw.rows("sample_submission.csv")), len(test))
    beside = raw.path if raw.path.is_dir() else raw.path.parent
    if raw.cache.parent != beside and set(raw.cache.glob("*.npy")) != known:
        print(f"{beside} cannot be written: what was read is cached in {raw.cache} instead")
    digests = [train_digest, test_digest, hashlib.sha256(sample.encode()).hexdigest()]
    return DigitFiles(
        images=train[:, 1:].reshape(-1, 1, SIZE, SIZE).copy(),
        labels=train[:, 0].astype(np.int64),
        test_images=test.reshape(-1, 1, SIZE, SIZE)[ids - 1],
        test_ids=[str(number) for number in ids],
        sample_lines=sample.splitlines(),
        fingerprint=hashlib.sha256("".join(digests).encode()).hexdigest(),
    )


def _pixels(raw: RawData, name: str) -> tuple[np.ndarray, str]:
    """The numbers of a CSV as uint8 [rows, columns], cached for the same contents, and their sha256."""
    contents = raw.read(name)
    digest = hashlib.sha256(contents).hexdigest()
    cached = raw.cache / f"{name.removesuffix('.csv')}-{digest[:16]}.npy"
    if cached.is_file():
        try:
            return np.load(cached), digest
        except (ValueError, EOFError, OSError):  # a damaged copy of what is at hand: parsed and written again
            pass
    numbers = parse(f"{raw.path}/{name}", contents, FILES[name])
    write_with(cached, lambda stream: np.save(stream, numbers))
    return numbers, digest


def parse(where: str, contents: bytes, columns: list[str]) -> np.ndarray:
    """A CSV of whole numbers as uint8 [rows, columns]; raises UserError naming the first fault."""
    contents = contents.removeprefix(codecs.BOM_UTF8).rstrip()
    head, _, body = contents.partition(b"\n")
    _check_header(where, head.decode("utf-8", "replace").strip(), columns)
    if not body:
        raise UserError(f"{where} has a header but no rows: {AGAIN}")
    # pandas takes longer rows for rows with an index, so the cells are counted first: 0.2 s for 73 MB.
    text = np.frombuffer(body, np.uint8)
    starts = np.concatenate([[0], np.flatnonzero(text == ord("\n")) + 1])
    cells = np.add.reduceat(text == ord(","), starts, dtype=np.int64) + 1
    if (wrong := np.flatnonzero(cells != len(columns))).size:
        line = int(wrong[0])
        raise UserError(f"{where} line {line + 2} has {cells[line]} cells, expected {len(columns)}: {AGAIN}")
    try:
        if not IN_NUMBERS[text].all():  # pandas would take 7.0, +7 and 1e2 for whole numbers
            raise ValueError("not only digits and commas")
        table = pd.read_csv(io.BytesIO(contents), dtype=np.uint8, skip_blank_lines=False)
    except (ValueError, OverflowError) as error:  # pandas does not say where
        raise UserError(_fault(where, contents, columns) or f"{where} cannot be read ({error}): {AGAIN}") from error
    numbers = table.to_numpy()
    for column, largest in LARGEST.items():
        if column in columns and numbers[:, columns.index(column)].max() > largest:
            raise UserError(_fault(where, contents, columns))
    return numbers


def _check_header(where: str, head: str, columns: list[str]) -> None:
    found = head.split(",") if head else []
    if found == columns:
        return
    if not found:
        raise UserError(f"{where} is empty or begins with a blank line; expected {_some(columns)}: {AGAIN}")
    missing, extra = [name for name in columns if name not in found], [name for name in found if name not in columns]
    twice = [name for name, count in Counter(found).items() if count > 1]
    pixels = sum(name.startswith("pixel") for name in found)
    facts = [
        f"{pixels} pixel columns, expected {len(PIXEL_COLUMNS)}"
        if PIXEL_COLUMNS[0] in columns and pixels != len(PIXEL_COLUMNS)
        else "",
        f"missing: {_some(missing)}" if missing else "",
        f"not expected: {_some(extra)}" if extra else "",
        f"there twice: {_some(twice)}" if twice else "",
    ]
    told = "; ".join(fact for fact in facts if fact) or "the columns stand in another order"
    raise UserError(f"{where} has other columns than {_some(columns)} ({told}): {AGAIN}")


def _fault(where: str, contents: bytes, columns: list[str]) -> str:
    """The first cell that is no whole number in its range, as a message; takes seconds, so only on error."""
    rows = csv.reader(io.StringIO(contents.decode("utf-8", "replace")))
    next(rows)
    for line, row in enumerate(rows, start=2):
        for column, cell in zip(columns, row, strict=False):
            largest = LARGEST.get(column, 255)
            if not (cell.isascii() and cell.isdecimal() and int(cell) <= largest):
                expected = f"expected a whole number from 0 to {largest}"
                return f"{where} line {line}, column {column}: {_cut(cell)!r}, {expected}: {AGAIN}"
    return ""


def _ids(where: str, lines: list[tuple[int, list[str]]], rows: int) -> np.ndarray:
    """ImageIds of the sample submission in its order, int64 [rows]: each of 1..rows once. Raises UserError."""
    columns = FILES["sample_submission.csv"]
    _check_header(where, ",".join(lines[0][1]) if lines else "", columns)
    for line, row in lines:
        if len(row) != len(columns):
            raise UserError(f"{where} line {line} has {len(row)} cells, expected {len(columns)}: {AGAIN}")
    found = [row[0] for _, row in lines[1:]]
    expected = [str(number) for number in range(1, rows + 1)]
    known, counts = set(expected), Counter(found)
    facts = [
        ("there twice", [name for name, count in counts.items() if count > 1]),
        ("missing", [name for name in expected if name not in counts]),
        ("without a row in test.csv", [name for name in counts if name not in known]),
    ]
    told = "; ".join(f"{what}: {_some(names, OFFENDERS)}" for what, names in facts if names)
    if told:
        raise UserError(f"{where}: expected the ids 1 to {rows}, one for every row of test.csv ({told}): {AGAIN}")
    return np.array(found, np.int64)


def _some(names: list[str], shown: int = 3) -> str:
    rest = f" and {len(names) - shown} more" if len(names) > shown else ""
    plain = [_cut(name) if name.isascii() and name.isalnum() else repr(_cut(name)) for name in names[:shown]]
    return f"{', '.join(plain)}{rest}"


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
