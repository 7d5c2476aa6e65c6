"""Reads CSV files in blocks of lines: counts the cells of every row, parses with pandas and checks every column.

pandas alone takes the first cells of too long rows for an index, and does not report where a cell is invalid.
"""

import codecs
import csv
import io
import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import BinaryIO, Literal

import numpy as np
import pandas as pd
from pandas.api.types import union_categoricals

from common.archive import DAMAGED
from common.errors import UserError, some
from common.raw import RawData
from common.tables.columns import NO_NUMBER, Column, as_column

BYTES_AT_ONCE = 1 << 23  # few enough for the distinct cells to stay in the processor cache, and for the memory
SHOWN = 30  # characters of a cell or a name in a message
BLANK = re.compile(r"[ \t]+")  # a line that pandas skips
IN_WHOLE_NUMBERS = b'0123456789-,"\n'

Columns = Mapping[str, Column | type]
Others = Literal["keep", "drop", "refuse"]


def read(
    raw: RawData,
    name: str,
    columns: Columns | None = None,
    *,
    id: str | None = None,
    others: Others = "keep",
    header: bool = True,
    blank_lines: bool = True,
    lines: bool = False,
) -> pd.DataFrame:
    """The CSV `name` of the data; `columns` are those that it must have, with their kinds, in the order of the result.

    `id` is a column of unique cells. `others` are further columns of the file: "keep" appends them with the types that
    pandas infers, "drop" drops them, "refuse" raises for them and for another order of the columns. Without a `header`
    the file's columns are those of `columns`, in this order. Blank lines are skipped, or refused if `blank_lines` is
    off. With `lines` the index holds the line in which each row begins.

    Accepts a byte order mark, UTF-16 with one, any line ends, quotes, and a comma at the end of every row. Raises
    UserError naming file, line, column and value of the first fault: no rows, missing or repeated columns, too few or
    too many cells, a text among numbers, NaN, infinite, out of range, blank, or a repeated id.
    """
    found = list(parts(raw, name, columns, others=others, header=header, blank_lines=blank_lines))
    file = _File(raw, name)
    if not found:
        raise UserError(f"{file.where} has no rows: {raw.mend}")
    table = pd.concat(found) if len(found) > 1 else found[0]
    for column in found[0].columns[found[0].dtypes == "category"]:  # pd.concat makes texts of them
        table[column] = union_categoricals([part[column] for part in found], sort_categories=True)
    if id is not None and (twice := table[id].duplicated()).any():
        line = table.index[np.argmax(twice)]
        value = table[id][line]
        first = table.index[np.argmax(table[id] == value)]
        raise UserError(
            f"{file.where} line {line}: {id} {_cut(value)!r} appears twice, first in line {first}: {raw.mend}"
        )
    return table if lines else table.reset_index(drop=True)


def parts(
    raw: RawData,
    name: str,
    columns: Columns | None = None,
    *,
    others: Others = "keep",
    header: bool = True,
    blank_lines: bool = True,
) -> Iterator[pd.DataFrame]:
    """`read` in pieces of BYTES_AT_ONCE, for files larger than the memory; the index is the line, ids may repeat."""
    wanted = {column: as_column(kind) for column, kind in (columns or {}).items()}
    file = _File(raw, name, wanted, others, blank_lines)
    with raw.open(name) as stream:
        at_once = -1 if others == "keep" else BYTES_AT_ONCE  # pandas must see a whole column to infer its type
        line, names = 1, None if header else list(wanted)
        for block in _blocks(file, stream, at_once):
            if names is None:
                head, _, block = block.partition(b"\n")
                names, line = file.header(head), 2
            if block:
                frame = file.frame(block, names, line)
                if len(frame):
                    yield frame
            line += block.count(b"\n")
        if names is None:
            file.header(b"")


def _blocks(file: "_File", stream: BinaryIO, at_once: int) -> Iterator[bytes]:
    """The file as blocks of whole lines, in UTF-8 with line feeds; from the first quote on it is one block."""

    def taken(size: int) -> bytes:
        try:
            return stream.read(size)
        except (*DAMAGED, OSError) as error:
            raise UserError(f"{file.where} is damaged ({error}): {file.raw.mend}") from error

    rest, line, ended = taken(4), 1, False
    if rest.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        rest = file.decoded(rest + taken(-1), "utf-16", 1).encode()
    rest = rest.removeprefix(codecs.BOM_UTF8)
    while not ended:
        more = taken(at_once)
        block, ended = rest + more, at_once < 0 or len(more) < at_once
        if b'"' in block and not ended:  # a quoted cell may hold a line end
            block, ended = block + taken(-1), True
        if block.endswith(b"\r"):
            block += taken(1)
        if b"\r" in block:
            block = block.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        cut = len(block) if ended else block.rfind(b"\n") + 1
        block, rest = block[:cut], block[cut:]
        file.decoded(block, "utf-8", line)
        if block:
            yield block
        line += block.count(b"\n")


@dataclass(frozen=True)
class _File:
    """The file of a table, and the columns that are expected in it."""

    raw: RawData
    name: str
    columns: Mapping[str, Column] = None
    others: Others = "keep"
    blank_lines: bool = True

    @property
    def where(self) -> str:
        return f"{self.raw.path}/{self.name}"

    def decoded(self, block: bytes, encoding: str, line: int) -> str:
        """The text of a block that begins in `line`."""
        try:
            return "" if encoding == "utf-8" and block.isascii() else block.decode(encoding)
        except UnicodeDecodeError as error:
            at = line + block.count(b"\n", 0, error.start)
            byte = block[error.start]
            raise UserError(f"{self.where} line {at}: byte {byte:#04x} is not {encoding.upper()} text: save the file "
                            f"as UTF-8, {self.raw.mend}") from error  # fmt: skip

    def header(self, head: bytes) -> list[str]:
        """The names of the columns; raises UserError for missing, repeated or unexpected ones."""
        found = next(csv.reader([head.decode()]), [])
        if not any(found):
            raise UserError(
                f"{self.where} is empty or begins with a blank line; expected {self._header}: {self.raw.mend}"
            )
        is_strict, count = self.others == "refuse", len(self.columns)
        missing = [name for name in self.columns if name not in found]
        extra = [name for name in found if name not in self.columns] if is_strict else []
        twice = [name for name, times in Counter(found).items() if times > 1 and name.strip()]
        near = {_plain(name): name for name in found}
        renamed = [f"{_cut(near[_plain(name)])!r} for {name}" for name in missing if _plain(name) in near]
        separator = next((mark for mark in (";", "\t") if len(found) == 1 and mark in found[0]), None)
        facts = [
            f"{len(found)} columns, expected {count}" if is_strict and len(found) != count else "",
            f"its cells are separated by {separator!r}, not by commas" if separator else "",
            f"missing: {_some(missing)}" if missing else "",
            f"spelt differently: {some(renamed)}" if renamed else "",
            f"not expected: {_some(extra)}" if extra else "",
            f"more than once: {_some(twice)}" if twice else "",
        ]
        told = "; ".join(fact for fact in facts if fact)
        if not told and is_strict and found != list(self.columns):
            told = "the columns are in another order"
        if told:
            build = "name the file's columns in task.py, or " * bool(missing)
            raise UserError(
                f"{self.where} has the columns {_some(found)}; expected {self._header} ({told}): {build}{self.raw.mend}"
            )
        return found

    @property
    def _header(self) -> str:
        return _some(list(self.columns)) if self.columns else "the names of its columns"

    def frame(self, block: bytes, names: list[str], line: int) -> pd.DataFrame:
        """The rows of a block that begins in `line`, checked; the index is their lines."""
        lines, spare = self._counted(block, len(names), line)
        places = {name: names.index(name) for name in self.columns}
        kept = list(places.values())
        if self.others == "keep":
            kept += [place for place, name in enumerate(names) if name not in places]
        options = {
            "header": None,
            "names": range(len(names) + spare),
            "usecols": kept,
            "keep_default_na": False,
            "low_memory": False,
        }
        typed = {places[name]: column for name, column in self.columns.items()}
        frame = _whole_numbers(block, typed, options)
        if frame is None or len(frame) != len(lines):
            frame = self._parsed(block, typed, names, lines, options)
        frame = frame[kept]
        frame.columns = [names[place] or f"column {place + 1}" for place in kept]
        frame.index = lines
        return frame

    def _counted(self, block: bytes, expected: int, line: int) -> tuple[np.ndarray, int]:
        """The line of every row [n], and the number of extra blank cells in each: 1 if all rows end in a comma, else 0.

        Raises UserError for a row with any other number of cells.
        """
        if (rows := _equal_rows(block, expected)) is not None:
            return line + np.arange(rows), 0
        lines, cells, all_end_blank = [], [], True
        reader, start, blank_line = csv.reader(io.StringIO(block.decode(), newline="")), line, None
        for row in reader:
            if not row or (len(row) == 1 and BLANK.fullmatch(row[0])):
                blank_line = blank_line or start
            else:
                if blank_line and not self.blank_lines:  # those at the end of the file are no rows
                    raise UserError(f"{self.where} line {blank_line} is blank: {self.raw.mend}")
                lines.append(start)
                cells.append(len(row))
                all_end_blank = all_end_blank and not row[-1]
            start = line + reader.line_num
        spare = int(all_end_blank and set(cells) == {expected + 1})
        for row_line, count in zip(lines, cells, strict=True):
            if count != expected + spare:
                raise UserError(f"{self.where} line {row_line} has {count} cells, expected {expected}: {self.raw.mend}")
        return np.array(lines, int), spare

    def _parsed(
        self, block: bytes, typed: Mapping[int, Column], names: list[str], lines: np.ndarray, options: dict
    ) -> pd.DataFrame:
        """The block in the dtypes of its columns; raises UserError for invalid cells, which are found in the texts."""
        try:
            frame, as_text = _read_csv(block, typed, {p: kind for p, kind in typed.items() if kind.is_float}, options)
            if len(frame) != len(lines):
                raise ValueError(f"it is no table from line {lines[0] if len(lines) else 1} on")
            faults = []
            for place, column in as_text.items():
                texts = frame[place]
                frame[place], wrong = column.parsed(texts)
                if wrong.any():
                    row = int(wrong.argmax())
                    faults.append((row, place, texts[row]))
        except (ValueError, OverflowError) as error:
            if "EOF inside string" in str(error):  # the cell takes the rest of the file, so its row is the last
                raise UserError(
                    f"{self.where} line {lines[-1]}: a quote opens here and is not closed: {self.raw.mend}"
                ) from error
            raise UserError(f"{self.where} cannot be read ({str(error).strip()}): {self.raw.mend}") from error
        if faults:
            row, place, cell = min(faults)
            raise UserError(
                f"{self.where} line {lines[row]}, column {names[place]}: {_cut(cell)!r}, expected {typed[place]}: "
                f"{self.raw.mend}"
            )
        return frame


def _read_csv(
    block: bytes, typed: Mapping[int, Column], fast: Mapping[int, Column], options: dict
) -> tuple[pd.DataFrame, dict[int, Column]]:
    """The block parsed by pandas, and its columns that are texts: all `typed` ones if a cell of the `fast` is invalid.

    pandas parses the fast ones as numbers, seven times as fast as by texts, but does not report where one is invalid.
    """
    as_text = {place: column for place, column in typed.items() if place not in fast}
    dtypes = {place: column.dtype if place in fast or column.is_text else "str" for place, column in typed.items()}
    blanks = {place: [] if place in as_text else NO_NUMBER for place in options["usecols"]}
    try:
        with np.errstate(over="ignore"):  # 1e39 is infinite in float32
            frame = pd.read_csv(io.BytesIO(block), dtype=dtypes, na_values=blanks, **options)
        if all(column.holds(frame[place]) for place, column in fast.items()):
            return frame, as_text
    except ValueError:
        if not fast:
            raise
    return _read_csv(block, typed, {}, options)


def _whole_numbers(block: bytes, typed: Mapping[int, Column], options: dict) -> pd.DataFrame | None:
    """The block parsed as whole numbers, which is fast; None if there is anything else in it."""
    if len(typed) < len(options["usecols"]) or not all(column.is_whole for column in typed.values()):
        return None
    if block.translate(None, IN_WHOLE_NUMBERS):  # pandas would take 7.0, +7 and 1e2
        return None
    try:
        frame = pd.read_csv(io.BytesIO(block), dtype="int64", **options)
    except (ValueError, OverflowError):
        return None
    cells, kinds = frame[list(typed)].to_numpy(), typed.values()
    if (cells < [kind.low for kind in kinds]).any() or (cells > [kind.high for kind in kinds]).any():
        return None
    return frame.astype({place: column.dtype for place, column in typed.items()})


def _equal_rows(block: bytes, cells: int) -> int | None:
    """The number of rows, if all have `cells` cells and there are no quotes or blank lines; otherwise None."""
    if b'"' in block or cells < 2:
        return None
    text = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
    marks = text[np.flatnonzero((text == ord(",")) | (text == ord("\n")))]
    if len(marks) % cells:
        return None
    breaks = marks.reshape(-1, cells) == ord("\n")
    return len(breaks) if breaks[:, -1].all() and breaks.sum() == len(breaks) else None


def _plain(name: str) -> str:
    return name.strip().strip("'\"").casefold().replace(" ", "").replace("_", "")


def _some(names: list[str]) -> str:
    return some(list(map(_shown, names))) or "none"


def _shown(name: str) -> str:
    cut = _cut(name)
    return cut if cut.isprintable() and cut == cut.strip() and cut else repr(cut)


def _cut(cell: object) -> str:
    text = str(cell)
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."
