"""The kinds of columns in a CSV file, and the search for invalid cells."""

import math
from dataclasses import dataclass

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
    def is_float(self) -> bool:
        return not self.is_text and not self.is_whole

    def __str__(self) -> str:
        """What is expected of a cell, in words."""
        if self.is_text:
            return "a text"
        low, high = (f"{limit:g}" if abs(limit) < 1e15 else "" for limit in (self.low, self.high))
        between = f" from {low}" * bool(low) + f" to {high}" * bool(high)
        return f"a{' whole' if self.is_whole else ''} number{between}{', or nothing' if self.blank else ''}"

    def holds(self, numbers: pd.Series) -> bool:
        """Whether all of these floating-point numbers are valid."""
        inside = numbers.between(self.low, self.high) & np.isfinite(numbers)
        return bool((inside | numbers.isna()).all() if self.blank else inside.all())

    def parsed(self, texts: pd.Series) -> tuple[pd.Series, np.ndarray]:
        """The cells in this column's dtype, and which of them are invalid: bool [n]."""
        if self.is_text:
            return texts.astype(self.dtype), (texts == "").to_numpy(bool) & (not self.blank)
        found = numbers(texts)
        if self.is_whole:
            wrong = ~(found.between(self.low, self.high) & texts.str.fullmatch(r"-?[0-9]+"))
            found = texts.mask(wrong, "0")  # a float64 does not hold every whole number
            return found.astype(self.dtype), wrong.to_numpy(bool)
        with np.errstate(over="ignore"):  # 1e39 is infinite in float32
            found = found.astype(self.dtype)
        wrong = ~(found.between(self.low, self.high) & np.isfinite(found))
        if self.blank:
            wrong &= ~texts.isin(NO_NUMBER)
        return found, wrong.to_numpy(bool)


def numbers(texts: pd.Series) -> pd.Series:
    """Parse texts to float64: NaN if a text is no number, 1 and 0 for True and False as in pandas."""
    found = pd.to_numeric(texts, errors="coerce").astype(float)
    return found.fillna(texts[found.isna()].map(TRUTHS))


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
