"""Reads CSV files in blocks of lines: counts the cells of every row, parses with pandas and checks every column.

pandas alone takes the first cells of too long rows for an index, and does not report where a cell is invalid.
"""

import csv
import io
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
from common.tables.columns import NO_NUMBER, Column, as_column, numbers

BYTES_AT_ONCE = 1 << 23  # few enough for the distinct cells to stay in the processor cache, and for the memory
SHOWN = 30  # characters of a cell or a name in a message
BYTE_ORDER_MARKS = {b"\xef\xbb\xbf": "utf-8", b"\xff\xfe": "utf-16", b"\xfe\xff": "utf-16"}
IN_WHOLE_NUMBERS = np.zeros(256, bool)
IN_WHOLE_NUMBERS[list(b'0123456789-,"\n')] = True

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
    again = _File(raw, name).again
    if not found:
        raise UserError(f"{raw.path}/{name} has no rows: {again}")
    for column in found[0].columns[found[0].dtypes == "category"]:  # else pd.concat would make texts of them
        every = union_categoricals([part[column] for part in found], sort_categories=True).categories
        for part in found:
            part[column] = part[column].cat.set_categories(every)
    table = pd.concat(found) if len(found) > 1 else found[0]
    if id is not None and (twice := table[id].duplicated()).any():
        line = table.index[np.argmax(twice)]
        value = table[id][line]
        first = table.index[np.argmax(table[id] == value)]
        raise UserError(
            f"{raw.path}/{name} line {line}: {id} {_cut(value)!r} appears twice, first in line {first}: {again}"
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
            raise UserError(f"{file.where} is damaged ({error}): {file.again}") from error

    rest, line, encoding = taken(4), 1, "utf-8"
    for mark, marked in BYTE_ORDER_MARKS.items():
        if rest.startswith(mark):
            encoding, rest = marked, rest if marked == "utf-16" else rest.removeprefix(mark)
    at_once, ended = -1 if encoding == "utf-16" else at_once, False
    while not ended:
        more = taken(at_once)
        block, ended = rest + more, at_once < 0 or len(more) < at_once
        if b'"' in block and not ended:  # a quoted cell may hold a line end
            block, ended = block + taken(-1), True
        if encoding == "utf-16":
            block = file.decoded(block, encoding, 1).encode()
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

    @property
    def again(self) -> str:
        if self.raw.is_demo:
            return f"mend competitions/{self.raw.competition}/demo.py"
        return f"mend the file, or get it again with make data COMP={self.raw.competition}"

    def decoded(self, block: bytes, encoding: str, line: int) -> str:
        """The text of a block that begins in `line`."""
        try:
            return "" if encoding == "utf-8" and block.isascii() else block.decode(encoding)
        except UnicodeDecodeError as error:
            at = line + block.count(b"\n", 0, error.start)
            byte = block[error.start]
            raise UserError(f"{self.where} line {at}: byte {byte:#04x} is not {encoding.upper()} text: save the file "
                            f"as UTF-8, {self.again}") from error  # fmt: skip

    def header(self, head: bytes) -> list[str]:
        """The names of the columns; raises UserError for missing, repeated or unexpected ones."""
        found = next(csv.reader([head.decode()]), [])
        if not any(found):
            raise UserError(f"{self.where} is empty or begins with a blank line; expected {self._header}: {self.again}")
        missing = [name for name in self.columns if name not in found]
        extra = [name for name in found if name not in self.columns] if self.others == "refuse" else []
        twice = [name for name, count in Counter(found).items() if count > 1 and name.strip()]
        near = {_plain(name): name for name in found}
        renamed = [f"{_cut(near[_plain(name)])!r} for {name}" for name in missing if _plain(name) in near]
        separator = next((mark for mark in (";", "\t") if len(found) == 1 and mark in found[0]), None)
        many = self.others == "refuse" and len(found) > 9
        facts = [
            f"{len(found)} columns, expected {len(self.columns)}" if extra or many and missing else "",
            f"its cells are separated by {separator!r}, not by commas" if separator else "",
            f"missing: {_some(missing)}" if missing else "",
            f"spelt differently: {', '.join(renamed[:3])}" if renamed else "",
            f"not expected: {_some(extra)}" if extra or missing and len(found) > 9 and self.others == "refuse" else "",
            f"more than once: {_some(twice)}" if twice else "",
        ]
        told = "; ".join(fact for fact in facts if fact)
        if not told and self.others == "refuse" and found != list(self.columns):
            told = "the columns are in another order"
        if told:
            build = "name the file's columns in task.py, or " * bool(missing)
            raise UserError(
                f"{self.where} has the columns {_some(found)}; expected {self._header} ({told}): {build}{self.again}"
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
        labels = [*names, *[""] * spare]
        options = {
            "header": None,
            "names": range(len(labels)),
            "usecols": kept,
            "keep_default_na": False,
            "low_memory": False,
        }
        typed = {places[name]: column for name, column in self.columns.items()}
        frame = self._parsed(block, typed, options)
        if frame is None or len(frame) != len(lines):
            raise UserError(self._fault(block, typed, names, lines, options))
        frame = frame[kept]
        frame.columns = [labels[place] or f"column {place + 1}" for place in kept]
        frame.index = lines
        return frame

    def _counted(self, block: bytes, expected: int, line: int) -> tuple[np.ndarray, int]:
        """The line of every row [n], and the number of extra blank cells in each: 1 if all rows end in a comma, else 0.

        Raises UserError for a row with any other number of cells.
        """
        if (rows := _equal_rows(block, expected)) is not None:
            return line + np.arange(rows), 0
        cells, blank, ends, lines = _quoted_rows(block) if b'"' in block else _plain_rows(block)
        if not self.blank_lines and blank[: len(blank) - _blank_tail(blank)].any():
            raise UserError(f"{self.where} line {line + lines[np.argmax(blank)]} is blank: {self.again}")
        cells, ends, lines = cells[~blank], ends[~blank], lines[~blank] + line
        if len(cells) and (cells == expected + 1).all() and ends.all():
            return lines, 1
        if (wrong := np.flatnonzero(cells != expected)).size:
            row = int(wrong[0])
            raise UserError(f"{self.where} line {lines[row]} has {cells[row]} cells, expected {expected}: {self.again}")
        return lines, 0

    def _parsed(self, block: bytes, typed: Mapping[int, Column], options: dict) -> pd.DataFrame | None:
        """The block parsed by pandas, or None if a cell is invalid in its column."""
        only_whole = len(typed) == len(options["usecols"]) and all(column.is_whole for column in typed.values())
        if only_whole and not IN_WHOLE_NUMBERS[np.frombuffer(block, np.uint8)].all():
            return None  # pandas would take 7.0, +7 and 1e2 for whole numbers
        as_text = {} if only_whole else {place: column for place, column in typed.items() if column.is_whole}
        dtypes = {place: "str" if place in as_text else column.read_as for place, column in typed.items()}
        blanks = {place: [] if column.is_text or column.is_whole else NO_NUMBER for place, column in typed.items()}
        blanks |= {place: NO_NUMBER for place in options["usecols"] if place not in typed}
        try:
            try:
                frame = pd.read_csv(io.BytesIO(block), dtype=dtypes, na_values=blanks, **options)
            except ValueError:  # a column of numbers may hold True and False beside blanks
                as_text |= {place: column for place, column in typed.items() if not column.is_text}
                dtypes, blanks = dtypes | dict.fromkeys(as_text, "str"), blanks | dict.fromkeys(as_text, [])
                frame = pd.read_csv(io.BytesIO(block), dtype=dtypes, na_values=blanks, **options)
            for place, column in as_text.items():
                if column.wrong_texts(frame[place]).any():
                    return None
                frame[place] = (frame[place] if column.is_whole else numbers(frame[place])).astype(column.dtype)
        except (ValueError, OverflowError):  # pandas does not report where
            return None
        if any(column.wrong(frame[place]).any() for place, column in typed.items()):
            return None
        narrow = {place: column.dtype for place, column in typed.items() if frame[place].dtype != column.dtype}
        return frame.astype(narrow) if narrow else frame

    def _fault(
        self, block: bytes, typed: Mapping[int, Column], names: list[str], lines: np.ndarray, options: dict
    ) -> str:
        """The error message for the first invalid cell; parses the block once more, as texts."""
        try:
            texts = pd.read_csv(io.BytesIO(block), dtype="str", na_filter=False, **options)
        except ValueError as error:
            if "EOF inside string" in str(error):  # the cell takes the rest of the file, so its row is the last
                return f"{self.where} line {lines[-1]}: a quote opens here and is not closed: {self.again}"
            return f"{self.where} cannot be read ({str(error).strip()}): {self.again}"
        alike: dict[Column, list[int]] = {}  # checked at once: hundreds of columns one by one take seconds
        for place in sorted(typed):
            alike.setdefault(typed[place], []).append(place)
        first = None
        for column, places in alike.items():
            wrong = np.flatnonzero(column.wrong_texts(pd.Series(texts[places].to_numpy().ravel(), dtype="str")))
            if wrong.size:
                row, of = divmod(int(wrong[0]), len(places))
                first = min(first or (row, places[of], column), (row, places[of], column), key=lambda it: it[:2])
        if first is None or len(texts) != len(lines):
            return f"{self.where} cannot be read as a table from line {lines[0] if len(lines) else 1} on: {self.again}"
        row, place, column = first
        cell = texts[place][row]
        return f"{self.where} line {lines[row]}, column {names[place]}: {_cut(cell)!r}, expected {column}: {self.again}"


Rows = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # cells, is blank, last cell is blank, line from 0: [n]


def _equal_rows(block: bytes, cells: int) -> int | None:
    """The number of rows, if all have `cells` cells and there are no quotes or blank lines; otherwise None."""
    if b'"' in block or cells < 2:
        return None
    text = np.frombuffer(block if block.endswith(b"\n") else block + b"\n", np.uint8)
    marks = text[np.flatnonzero((text == ord(",")) | (text == ord("\n")))]
    if len(marks) % cells or not (marks[cells - 1 :: cells] == ord("\n")).all():
        return None
    return len(marks) // cells if np.count_nonzero(marks == ord("\n")) == len(marks) // cells else None


def _plain_rows(block: bytes) -> Rows:
    """The rows of a block without quotes."""
    text = np.frombuffer(block.removesuffix(b"\n"), np.uint8)
    if not len(text):
        return np.ones(1, int), np.ones(1, bool), np.ones(1, bool), np.zeros(1, int)
    breaks = np.flatnonzero(text == ord("\n"))
    starts, stops = np.concatenate([[0], breaks + 1]), np.concatenate([breaks, [len(text)]])
    filled = stops > starts
    cells, shown = np.ones(len(starts), np.int64), np.zeros(len(starts), bool)
    own = np.flatnonzero(filled)
    if own.size:
        cells[own] += np.add.reduceat(text == ord(","), starts[own], dtype=np.int64)
        shown[own] = np.logical_or.reduceat(text > ord(" "), starts[own]) if (cells[own] == 1).any() else True
    return cells, ~shown, text[stops - 1] == ord(","), np.arange(len(starts))


def _quoted_rows(block: bytes) -> Rows:
    """The rows of a block with quotes, in which commas and line ends are text."""
    rows, found = csv.reader(io.StringIO(block.decode(), newline="")), []
    line = 0
    for row in rows:
        found.append((len(row), not row or (len(row) == 1 and row[0].isspace()), not row or not row[-1], line))
        line = rows.line_num
    cells, blank, ends, lines = (np.array(part) for part in zip(*found, strict=True))
    return cells, blank, ends, lines


def _blank_tail(blank: np.ndarray) -> int:
    """How many rows at the end are blank."""
    return int(np.argmin(blank[::-1])) if not blank.all() else len(blank)


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
