"""Figures of a benchmark: a list of rows for each part, printed as Markdown tables and written as JSON."""

import json
import os
import platform
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from common.run import commit

CPU_FACTS = Path("/proc/cpuinfo")  # Linux only


def facts(**more: Any) -> dict[str, Any]:
    """Hardware, versions and commit of a benchmark's figures; `more` are facts of the one benchmark."""
    lines = CPU_FACTS.read_text().splitlines() if CPU_FACTS.exists() else []
    cpu = next((line.split(":")[1].strip() for line in lines if "model name" in line), platform.machine())
    versions = {"python": platform.python_version(), "torch": str(torch.__version__)}
    machine = {"processor": cpu, "cores": os.cpu_count(), "load": round(os.getloadavg()[0], 1)}
    return machine | versions | more | {"commit": commit()}


def one_line(found: dict[str, Any]) -> str:
    """The facts of a figures file in one line, without its tables."""
    return ", ".join(f"{name} {value}" for name, value in found.items() if not isinstance(value, list))


def measure(parts: dict[str, Callable], found: dict[str, Any], file: str | None, *arguments: Any) -> None:
    """Run each part with `arguments`, print its rows under its docstring's first line, and save the figures so far.

    `file` gets `found` (the result of `facts`) and each part's rows under the part's name.
    """
    print(one_line(found))
    for name, part in parts.items():
        found[name] = part(*arguments)
        print("\n".join(["", part.__doc__.splitlines()[0], "", *table(found[name])]), flush=True)
        if file:
            write(Path(file), found)
    if file:
        print(f"\nwritten to {file}")


def write(file: Path, found: Any) -> None:
    file.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def table(rows: Iterable[dict[str, Any]]) -> list[str]:
    """The rows as lines of a Markdown table, one column for every key."""
    rows = list(rows)
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_shown(row.get(name, "")) for name in names] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (names, ["---"] * len(names), *lines)]


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.3g}" if isinstance(value, float) else str(value)
