"""The submission: a CSV that is checked against the sample file, and a JSON file with its provenance."""

import csv
import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any

from common.errors import UserError, quoted, some
from common.files import (
    NUMBER,
    NUMBER_OR_NONE,
    TEXT,
    TEXTS,
    TRUTH,
    check_rules,
    not_read,
    number_in,
    replacing,
    sha256,
    write_json,
)
from common.raw import RawData

SUBMISSIONS = Path("submissions")
TRUTHS = ("true", "false")
OFFENDERS = 5  # most faults that an error lists
AGAIN = "mend the file, or get it again with make data"
RULES = dict.fromkeys(("run", "recipe", "monitor", "commit", "created", "sha256"), TEXT) | {  # of the sidecar
    "score": NUMBER_OR_NONE,
    "demo": TRUTH,
    "text_columns": TEXTS,
    "several_rows": TRUTH,
}
Validator = Callable[[Sequence[str]], str | None]


@dataclass(frozen=True)
class Sample:
    """What the sample submission asks for: its columns, its ids in their order, and what its cells are."""

    where: str  # the file, for messages
    columns: tuple[str, ...]  # the id first
    ids: tuple[str, ...]
    numeric: frozenset[str]  # columns that hold nothing but finite numbers
    blank: frozenset[str]  # columns with empty cells
    truths: frozenset[str]  # columns that hold nothing but True and False
    several: bool = False  # whether an id may have several rows, one after the other

    @staticmethod
    def read(
        raw: RawData, name: str = "sample_submission.csv", text: Collection[str] = (), several: bool = False
    ) -> "Sample":
        """Read the competition's sample file; it is not in the data's fingerprint, as the training does not use it."""
        if not raw.exists(name) and (others := raw.matching("*submission*.csv")):
            raise UserError(
                f"{raw.path} has no {name}, but {some(others)}: name it in build(), Sample.read(raw, {others[0]!r}) "
                f"and Task(submission=Submission(sample={others[0]!r})), and for make submit in config.py, "
                f"SOURCE = Source(sample_submission={others[0]!r}, ...)"
            )
        return Sample.of(raw.uncounted().rows(name), f"{raw.path}/{name}", text, several)

    @staticmethod
    def of(
        rows: Iterable[tuple[int, Sequence[str]]], where: str, text: Collection[str] = (), several: bool = False
    ) -> "Sample":
        """Make a Sample from (line, cells), the header first. `text` names columns whose numbers are placeholders.

        With `several` an id may occur more than once. Raises UserError naming the first invalid line.
        """
        rows = iter(rows)
        line, header = next(rows, (1, []))
        if len(header) < 2 or not all(header) or len(set(header)) < len(header):
            raise UserError(
                f"{where} line {line}: the header is {','.join(header)!r}, expected the column of the ids and at least "
                f"one other, each with a name of its own: {AGAIN}"
            )
        ids: dict[str, int] = {}
        numeric, truths = (set(header[1:]) - set(text) for _ in range(2))
        filled, blank, repeated = set(), set(), set()
        for line, row in rows:
            if len(row) != len(header):
                raise UserError(f"{where} line {line}: {len(row)} values, expected {len(header)}: {AGAIN}")
            if not row[0] or (row[0] in ids and not several):
                twice = f"id {row[0]} appears twice, first in line {ids.get(row[0])}, expected it once or build()'s "
                problem = f"{twice}Submission(several=True)" if row[0] else "the id is empty"
                raise UserError(f"{where} line {line}: {problem}: {AGAIN}")
            ids.setdefault(row[0], line)
            for column, cell in zip(header[1:], row[1:], strict=True):
                (filled if cell else blank).add(column)
                if cell == column:
                    repeated.add(column)
                if cell and not is_number(cell):
                    numeric.discard(column)
                if cell.lower() not in TRUTHS:
                    truths.discard(column)
        if not ids:
            raise UserError(f"{where} has a header and no rows, expected one for every id: {AGAIN}")
        if re.search(r"\d", header[0]) and all(name in repeated or is_number(name) for name in header[1:]):
            raise UserError(  # else the first id would be left out in silence
                f"{where} line 1: {','.join(header)!r} is a row, expected the names of the columns first: {AGAIN}"
            )
        return Sample(
            where, tuple(header), tuple(ids), frozenset(numeric & filled), frozenset(blank), frozenset(truths), several
        )

    def check_ids(self, ids: Iterable[Any]) -> None:
        """Raises UserError when the ids to predict, in any order, are not the sample's; called before the training."""
        counts, asked = Counter(map(str, ids)), set(self.ids)
        found = [f"id {name} appears twice" for name, count in counts.items() if count > 1]
        found += [f"id {name} is not in the sample submission" for name in counts if name not in asked]
        found += [f"id {name} is missing" for name in self.ids if name not in counts]
        if found:
            raise UserError(
                f"the rows to predict are not those of {self.where}: {some(found, OFFENDERS)}. Files of one download "
                f"belong together: {AGAIN}"
            )

    def in_order(self, rows: Iterable[Sequence[Any]]) -> Iterator[Sequence[Any]]:
        """The rows of a CSV in the order of the sample's ids. Rows with other ids come last, for the check to report.

        Rows in order are passed on at once; from the first one that is not, all rows are held in memory and sorted.
        """
        rows, ids, last = iter(rows), iter(self.ids), None
        for row in rows:
            name = str(row[0]) if row else ""
            if (self.several and name == last) or name == next(ids, None):
                last = name
                yield row
                continue
            places = {name: place for place, name in enumerate(self.ids)}
            yield from sorted([row, *rows], key=lambda row: places.get(str(row[0]) if row else "", len(places)))

    def beside(self, rows: Iterable[Sequence[str]]) -> Iterator[tuple[Sequence[str] | None, str | None]]:
        """Every row of a CSV with the id that belongs in its place; None for what has no counterpart."""
        if not self.several:
            yield from zip_longest(rows, self.ids)
            return
        ids, expected = iter(self.ids), None
        for row in rows:
            if expected is None or not row or row[0] != expected:
                expected = next(ids, None)
            yield row, expected
        for name in ids:
            yield None, name

    def fault(self, values: Sequence[str]) -> str | None:
        """What is wrong with a row's `values` (no id); they must be finite, numbers or True/False as in the sample."""
        for column, value in zip(self.columns[1:], values, strict=True):
            if column in self.numeric and not (is_number(value) or (not value and column in self.blank)):
                return f"has the value {','.join(values)}, expected a finite number in {column} as in the sample"
            if column in self.truths and value.lower() not in TRUTHS:
                return f"has the value {','.join(values)}, expected True or False in {column} as in the sample"
            if (number := number_in(value)) is not None and not math.isfinite(number):
                return f"has the value {','.join(values)}, which is not finite in {column}"
        return None


def sidecar(path: Path) -> dict[str, Any]:
    """The JSON that the kit wrote beside a submission; {} where there is none, or one that the kit did not write.

    Raises UserError where it has values that the kit does not write.
    """
    file = path.with_suffix(".json")
    try:
        provenance = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(provenance, dict) or "sha256" not in provenance:
        return {}
    try:
        check_rules(provenance, RULES)
    except ValueError as error:
        raise not_read(file, error, "delete it and write the submission again with make predict") from error
    return provenance


def is_number(cell: str) -> bool:
    """Whether every reader of the CSV takes the cell for a finite number; Python alone takes 1_000 for one."""
    return NUMBER.fullmatch(cell.strip(" ")) is not None and math.isfinite(float(cell))


def _misplaced(name: str | None, expected: str | None, seen: set[str]) -> str | None:
    """What is wrong with the id `name` in the place of `expected` (None: past the end); adds it to the `seen` ones."""
    if name is None:
        return f"id {quoted(expected)} is missing"
    twice = name in seen
    seen.add(name)
    if name == expected:
        return None
    if twice:
        return f"id {quoted(name)} appears twice"
    if expected is None:
        return f"id {quoted(name)} is not in the sample submission"
    return f"id {quoted(name)}, expected {quoted(expected)} (same ids in the same order as the sample)"


def faults(rows: Iterable[Sequence[str]], sample: Sample, valid: Validator | None) -> Iterable[str]:
    """What is wrong with a submission, line by line: header, number of rows, ids, their order, duplicates, values."""
    rows, seen = iter(rows), set()
    header = next(rows, [])
    if tuple(header) != sample.columns:
        yield f"line 1: the header is {','.join(header)!r}, expected {','.join(sample.columns)!r}"
        return
    for line, (row, expected) in enumerate(sample.beside(rows), start=2):
        if row is not None and len(row) != len(sample.columns):
            yield f"line {line}: {len(row)} values, expected {len(sample.columns)}"
            continue
        if problem := _misplaced(row and row[0], expected, seen):
            yield f"line {line}: {problem}"
        if row is None:
            continue
        if problem := sample.fault(row[1:]):
            yield f"line {line}: id {row[0]} {problem}"
        elif valid is not None and (problem := valid(list(row[1:]))):
            yield f"line {line}: id {row[0]}: {problem}"


def check(path: Path, sample: Sample, valid: Validator | None = None) -> int:
    """Compare the CSV at `path` with the sample; returns its number of rows, raises UserError with the first faults.

    `valid(values)` returns what is wrong with the values of one row (without its id), or None.
    """
    found: list[str] = []
    count = 0

    def counted(rows):
        nonlocal count
        for row in rows:
            count += 1
            yield row

    try:
        with open(path, newline="", encoding="utf-8") as stream:
            for fault in islice(faults(counted(csv.reader(stream)), sample, valid), OFFENDERS):
                found.append(fault)
    except (UnicodeDecodeError, csv.Error) as error:
        found.append(f"after line {count}: not readable as a CSV in UTF-8 ({error})")
    if found:
        told = "; ".join(found)
        raise UserError(f"{path.name} is not a valid submission: {told}. Compare it with the sample submission")
    return count - 1


def write(
    path: Path,
    sample: Sample,
    rows: Iterable[Sequence[Any]],
    valid: Validator | None,
    provenance: dict[str, Any],
) -> Path:
    """Stream `rows` into `path`, check the whole file, then put it in place with the sidecar `<name>.json`.

    If anything is wrong it raises UserError and leaves nothing behind; an older file stays as it was.
    """
    with replacing(path, "w", newline="", encoding="utf-8") as stream:
        draft = Path(stream.name)
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(sample.columns)
        writer.writerows(rows)
        stream.flush()
        try:
            check(draft, sample, valid)
        except UserError as error:
            told = str(error).replace(draft.name, path.name, 1)
            raise UserError(f"{told}, then train or predict again: this file was not kept") from error
        os.fsync(stream.fileno())  # on a full disk both files stay as they were
        write_json(path.with_suffix(".json"), {**provenance, "sha256": sha256(draft)})
    return path
