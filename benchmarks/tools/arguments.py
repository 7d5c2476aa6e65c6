"""Argument types, which refuse wrong values before anything is measured."""

from argparse import ArgumentTypeError
from pathlib import Path


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise ArgumentTypeError(f"{text}: expected a whole number of 1 or more")
    return int(text)


def existing(text: str) -> Path:
    if not Path(text).exists():
        raise ArgumentTypeError(f"{text} does not exist: expected the competition's files")
    return Path(text)


def height_and_width(text: str) -> tuple[int, int]:
    """1400,2100 -> (1400, 2100)"""
    numbers = text.split(",")
    if len(numbers) != 2:
        raise ArgumentTypeError(f"{text}: expected height,width, for example 1400,2100")
    height, width = map(positive, numbers)
    return height, width
