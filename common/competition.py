"""A competition's folder: its light config.py is imported at once, task.py and demo.py when they are needed."""

import difflib
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from common.config import Config
from common.errors import UserError, did_you_mean
from common.kaggle.source import Source

if TYPE_CHECKING:  # needs torch, which --help does without
    from common.raw import RawData
    from common.task import Task

COMPETITIONS = Path(__file__).parents[1] / "competitions"


@dataclass(frozen=True)
class Competition:
    """A competition's folder, see common.task. `config` is its config module; the other modules are imported on use."""

    name: str
    config: ModuleType

    @property
    def recipes(self) -> dict[str, Config]:
        return self.config.RECIPES

    @property
    def source(self) -> Source:
        return self.config.SOURCE

    @property
    def config_class(self) -> type[Config]:
        return type(self.recipes["default"])

    @property
    def verbs(self) -> dict[str, Callable[[str, list[str]], None]]:
        return getattr(self.config, "VERBS", {})

    def build(self, config: Config, raw: "RawData", log: Callable[[str], Any]) -> "Task":
        with _told_of_modules(self.name):
            task = importlib.import_module(f"competitions.{self.name}.task").build(config, raw, log)
        if task is None:
            raise UserError(
                f"build() of competitions/{self.name}/task.py returns nothing: end it with `return Task(...)`"
            )
        return task

    def write_demo(self, folder: Path) -> None:
        with _told_of_modules(self.name):
            importlib.import_module(f"competitions.{self.name}.demo").write_demo(folder)


def names() -> list[str]:
    return sorted(file.parent.name for file in COMPETITIONS.glob("*/config.py"))


def load(name: str) -> Competition:
    """The competition of that name; does not import torch."""
    with _told_of_modules(name):
        return Competition(name, importlib.import_module(f"competitions.{name}.config"))


@contextmanager
def _told_of_modules(name: str) -> Iterator[None]:
    """Inside the block, a module that the competition's code imports and that is missing is raised as UserError."""
    try:
        yield
    except ModuleNotFoundError as error:
        parts, code = (error.name or "").split("."), f"competitions/{name}"
        if parts[0] == "competitions" and len(parts) > 1 and not (COMPETITIONS / parts[1]).is_dir():
            old = parts[1]
            remedy = (
                f"if its folder had that name, write {name} there too, grep -n {old} {code}/*.py, and rename "
                f"data/{old}, runs/{old} and submissions/{old}"
            )
        elif parts[0] in ("competitions", "common"):
            remedy = "correct the import, or write that file"
        else:
            remedy = "correct the import, or add its package to requirements.txt: make installs it"
        raise UserError(f"the code of {code} imports {error.name}, which is not there: {remedy}") from error


def known(name: str, verb: str) -> str:
    """Return `name` if it is a competition; otherwise raises UserError with all names and the nearest one."""
    there = names()
    if name in there:
        return name
    near = difflib.get_close_matches(name, there, n=1, cutoff=0.4)
    what = f"COMP={name} is not a competition.{did_you_mean(name, there, 0.4)}" if name else "COMP= is missing."
    raise UserError(f"{what} There are: {', '.join(there)}. Try: make {verb} COMP={(near or there)[0]}")
