"""The kinds of columns in a CSV file, and the search for invalid cells."""

import io
import math
from dataclasses import dataclass
from functools import cache

import numpy as np
import pandas as pd

# How programs write that a number is missing.
NO_NUMBER = ("", "NA", "N/A", "n/a", "#N/A", "#NA", "<NA>", "NaN", "nan", "-NaN", "-nan", "null", "NULL", "None")
TRUTHS = {"True": 1.0, "TRUE": 1.0, "true": 1.0, "False": 0.0, "FALSE": 0.0, "false": 0.0}
TEXTS = ("str", "category")


@dataclass(frozen=True)
class Column:
    """The cells of a column: their `dtype` as pandas names it, the range of numbers, and whether they may be blank."""

    dtype: str
    low: float = -math.inf
    high: float = math.inf
    blank: bool = False

    @property
    def is_text(self) -> bool:
        return self.dtype in TEXTS

    @property
    def is_whole(self) -> bool:
        return not self.is_text and np.dtype(self.dtype).kind in "iu"

    @property
    def read_as(self) -> str:
        """The dtype to parse as, wide enough for `wrong` to see numbers out of range."""
        return "int64" if self.is_whole and np.dtype(self.dtype).itemsize < 8 and wraps() else self.dtype

    def __str__(self) -> str:
        """What is expected of a cell, in words."""
        if self.is_text:
            return "a text"
        low, high = (f"{limit:g}" if abs(limit) < 1e15 else "" for limit in (self.low, self.high))
        between = f" from {low}" * bool(low) + f" to {high}" * bool(high)
        return f"a{' whole' if self.is_whole else ''} number{between}{', or nothing' if self.blank else ''}"

    def wrong(self, cells: pd.Series) -> np.ndarray:
        """Which cells, parsed to this column's dtype, are invalid: bool [n]."""
        if self.is_text:
            if self.blank:
                return np.zeros(len(cells), bool)
            if self.dtype == "category":
                return (cells.cat.categories == "")[cells.cat.codes]
            return (cells == "").to_numpy(bool)
        numbers = cells.to_numpy()
        if self.is_whole:
            return (numbers < self.low) | (numbers > self.high)
        missing = np.isnan(numbers)
        inside = np.isfinite(numbers) & (numbers >= self.low) & (numbers <= self.high)
        return ~inside & ~missing if self.blank else ~inside

    def wrong_texts(self, texts: pd.Series) -> np.ndarray:
        """Which cells, as texts, are invalid, including those that are no numbers at all: bool [n]."""
        if self.is_text:
            return self.wrong(texts.astype(self.dtype))
        found = numbers(texts)
        wrong = Column("float64", self.low, self.high, self.blank).wrong(found)
        if self.is_whole:
            return wrong | ~texts.str.fullmatch(r"-?[0-9]+").to_numpy(bool)
        return wrong | (found.isna() & ~texts.isin(NO_NUMBER)).to_numpy(bool)


@cache
def wraps() -> bool:
    """Whether this pandas reads 256 as 0 in uint8: 2.2 does, later versions do not."""
    try:
        return len(pd.read_csv(io.StringIO("cell\n256\n"), dtype="uint8")) == 1
    except (ValueError, OverflowError):
        return False


def numbers(texts: pd.Series) -> pd.Series:
    """Parse texts to float64: NaN if a text is no number, 1 and 0 for True and False as in pandas."""
    kept = texts.where(~texts.isin(NO_NUMBER))
    return kept.map(TRUTHS).fillna(pd.to_numeric(kept, errors="coerce")).astype(float)


def text(blank: bool = False, category: bool = False) -> Column:
    """Texts as they are written, "NA" included; a `category` stores each distinct text once."""
    return Column("category" if category else "str", blank=blank)


def number(low: float = -math.inf, high: float = math.inf, blank: bool = False, dtype: str = "float64") -> Column:
    """Finite numbers from `low` to `high`, True and False as 1 and 0; a blank cell is NaN if `blank` allows it."""
    return Column(dtype, low, high, blank)


def whole(low: float = -math.inf, high: float = math.inf, dtype: str = "int64") -> Column:
    """Whole numbers, written in digits: neither 7.0 nor 1e2. The range is at most that of the dtype."""
    limits = np.iinfo(dtype)
    return Column(dtype, max(low, limits.min), min(high, limits.max))


def as_column(given: Column | type) -> Column:
    """`str`, `float` and `int` stand for text(), number() and whole()."""
    return given if isinstance(given, Column) else {str: text(), float: number(), int: whole()}[given]
