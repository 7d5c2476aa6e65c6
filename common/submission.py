"""The submission: a CSV checked against the sample file before anybody sees it, and where it came from."""

import csv
import json
import math
import os
from collections.abc import Callable, Iterable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from common.errors import UserError
from common.files import replacing, sha256

SUBMISSIONS = Path("submissions")
OFFENDERS = 5  # so many faults are named before the check gives up
Validator = Callable[[Sequence[str]], str | None]


def faults(rows: Iterable[Sequence[str]], sample: Iterable[Sequence[str]], valid: Validator | None) -> Iterable[str]:
    """What is wrong with a submission, line by line: header, number of rows, ids, their order, duplicates, values."""
    rows, sample = iter(rows), (row for row in sample if row)  # a sample file may end with blank lines
    header, expected_header = next(rows, []), next(sample, [])
    if list(header) != list(expected_header):
        yield f"line 1: the header is {','.join(header)!r}, expected {','.join(expected_header)!r}"
        return
    seen: set[str] = set()
    for line, (row, expected) in enumerate(zip_longest(rows, sample), start=2):
        if row is None:
            yield f"line {line}: id {expected[0]} is missing"
            continue
        if not row or len(row) != len(expected_header):
            yield f"line {line}: {len(row)} values, expected {len(expected_header)}"
            continue
        if row[0] in seen:
            yield f"line {line}: id {row[0]} is there twice"
        elif expected is None:
            yield f"line {line}: id {row[0]} is not in the sample submission"
        elif row[0] != expected[0]:
            yield f"line {line}: id {row[0]}, expected {expected[0]} (same ids in the same order as the sample)"
        seen.add(row[0])
        values = list(row[1:])
        if not all(map(_is_finite, values)):
            yield f"line {line}: id {row[0]} has the value {','.join(values)}"
        elif valid is not None and (problem := valid(values)):
            yield f"line {line}: id {row[0]}: {problem}"


def _is_finite(value: str) -> bool:
    try:
        return math.isfinite(float(value))
    except ValueError:
        return True  # no number: whether it may stand there is for the competition's own check


def check(path: Path, sample_lines: Iterable[str], valid: Validator | None = None) -> int:
    """Compare the CSV at `path` with the sample's lines; returns its rows, raises UserError naming the first offenders.

    `valid(values)` says what is wrong with the values of one row (without its id), or None.
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
            for fault in faults(counted(csv.reader(stream)), csv.reader(sample_lines), valid):
                found.append(fault)
                if len(found) == OFFENDERS:
                    break
    except (UnicodeDecodeError, csv.Error) as error:
        found.append(f"after line {count}: not readable as a CSV in UTF-8 ({error})")
    if found:
        told = "; ".join(found)
        raise UserError(f"{path.name} is not a valid submission: {told}. Compare it with the sample submission")
    return count - 1


def write(
    path: Path,
    header: Sequence[str],
    rows: Iterable[Sequence[Any]],
    sample_lines: Iterable[str],
    valid: Validator | None,
    provenance: dict[str, Any],
) -> Path:
    """Stream `rows` into `path`, check the whole file, then put it in place with the sidecar `<name>.json`.

    Nothing is left behind, and an older file stays, when anything is wrong (UserError).
    """
    draft = path.with_suffix(".csv.part")
    try:
        with replacing(draft, "w", newline="", encoding="utf-8") as stream:
            writer = csv.writer(stream, lineterminator="\n")
            writer.writerow(header)
            writer.writerows(rows)
        try:
            check(draft, sample_lines, valid)
        except UserError as error:
            told = str(error).replace(draft.name, path.name, 1)
            raise UserError(f"{told}, then train or predict again: this file was not kept") from error
        digest = sha256(draft)
        with replacing(path.with_suffix(".json"), "w", encoding="utf-8") as stream:
            stream.write(json.dumps({**provenance, "sha256": digest}, indent=2) + "\n")
            stream.flush()
            os.fsync(stream.fileno())  # on a full disk both files stay as they were
            draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
    return path
