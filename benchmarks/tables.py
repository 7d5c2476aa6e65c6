"""Write the tables of the READMEs from benchmarks/figures/*.json, between <!-- figures: NAME --> and <!-- end -->.

    make bench BENCH=tables
    make bench BENCH=tables ARGS="runs/clouds/003-small"      first adds the score of this finished run

Runs of one recipe that differ only in the seed become one line if they are given together. A new line replaces the
line of the same competition and recipe in scores.json, but keeps its `note` about the data and comparable scores.
The benchmarks engine, loaders and gpu write the files with their names: ARGS="--json PATH".
"""

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.tools import figures
from common import competition as competitions
from common import config as configs
from common.errors import UserError
from common.files import read_json
from common.run import Run

ROOT = Path(__file__).parents[1]
FIGURES = ROOT / "benchmarks" / "figures"
READMES = (ROOT / "README.md", ROOT / "benchmarks" / "README.md")
Rows = list[dict[str, Any]]


def score_of(folder: Path) -> dict[str, Any]:
    """The line of scores.json for a finished run; raises UserError if it has no score."""
    run = Run(folder, read_json(folder / "run.json", "competition", "recipe", "demo", "machine", "commit"))
    result = run.result
    if result is None or result["score"] is None:
        raise UserError(f"{folder}: expected a finished run with a score; make runs lists those that have one")
    competition = competitions.load(run.provenance["competition"])
    config, recipe = run.config(competition.config_class), run.provenance["recipe"]
    changed = configs.differences(competition.recipes.get(recipe, config), config)
    settings = [text for text in changed if not text.startswith("seed:")]
    return {
        "competition": competition.name,
        "recipe": ", ".join([recipe, *settings]),
        "on": "CV on demo data" if run.provenance["demo"] else "CV",
        "metric": result["monitor"],
        "scores": {str(config.seed): result["score"]},
        "error": result.get("errors", {}).get(result["monitor"]),
        "rows": result["rows"],
        "seconds": result["training_seconds"],
        "machine": run.provenance["machine"],
        "commit": run.provenance["commit"],
        "note": "",
    }


def with_runs(lines: Rows, runs: list[Path]) -> Rows:
    """`lines` of scores.json with the lines of `runs`, which replace old ones of the same recipe."""
    found = {_key(line): line for line in lines}
    fresh: dict[tuple, dict[str, Any]] = {}
    for line in map(score_of, runs):
        first = fresh.setdefault(_key(line), line)
        if first["commit"] != line["commit"]:
            raise UserError(f"commits {first['commit']} and {line['commit']} give no common line: name runs of one")
        first["scores"] |= line["scores"]
    for key, line in fresh.items():
        found[key] = line | {"note": found.get(key, line)["note"]}
    return sorted(found.values(), key=lambda line: line["competition"])


def _key(line: dict[str, Any]) -> tuple:
    return line["competition"], line["recipe"], line["on"]


def scores(lines: Rows) -> list[str]:
    """A line for every competition, recipe and kind of rows; the score is the mean over the seeds.

    Machines are given as letters, which are explained below the table.
    """
    machines = dict.fromkeys(line["machine"] for line in lines if line["machine"])
    letters = {machine: chr(ord("A") + number) for number, machine in enumerate(machines)}
    rows = []
    for line in lines:
        seeds, error, seconds = line["scores"], line["error"], line["seconds"]
        each = f" ({', '.join(f'{score:.4g}' for score in seeds.values())})" if len(seeds) > 1 else ""
        row = {
            "competition, recipe": f"{line['competition']} `{line['recipe']}`",
            "score": f"{line['metric']} {fmean(seeds.values()):.4g}{f' ± {error:.2g}' if error else ''}{each}",
            "seeds": ", ".join(seeds),
            "on": f"{line['on']}, {line['rows']:,} rows" if line["rows"] else line["on"],
            "training": f"{seconds:,.0f} s" if seconds else "",
            "machine, commit": f"{letters[line['machine']]}, {line['commit']}" if line["machine"] else "not recorded",
            "note": line["note"],
        }
        rows.append(row)
    told = "; ".join(f"{letter} = {machine}" for machine, letter in letters.items())
    return [*figures.table(rows), "", f"Machines: {told}."]


def engine(found: dict[str, Any]) -> list[str]:
    errors = {row["loop"]: row for row in found["error"]}
    rows = [row | errors[row["loop"]] for row in found["time"]]
    names = [name for name in rows[0] if not name.endswith(", ms")]
    return [*figures.table({name: row.get(name, "") for name in names} for row in rows), *_source(found, "engine")]


def loaders(found: dict[str, Any]) -> list[str]:
    return [*figures.table(found["guarantees"]), *_source(found, "loaders")]


def gpu(found: dict[str, Any]) -> list[str]:
    """Step times relative to the hand-written loop, a column for each loop; then memory and whole trainings."""
    steps: dict[tuple, dict[str, Any]] = {}
    for row in (row for row in found.get("steps", ()) if "ratio" in row):
        line = steps.setdefault((row["network"], row["data"]), {"network": row["network"], "data on the": row["data"]})
        line[row["loop"]] = row["ratio"]
        line |= {name: row[name] for name in ("commit",) if name in row}  # of an older row
    others = [[row for row in found.get(part, ()) if "skipped" not in row] for part in ("memory", "trainings")]
    tables = [figures.table(rows) for rows in ([*steps.values()], *others) if rows]
    return [line for table in tables for line in (*table, "")][:-1] + _source(found, "gpu")


def _source(found: dict[str, Any], name: str) -> list[str]:
    return ["", f"`make bench BENCH={name}`: {figures.one_line(found)}."]


TABLES: dict[str, Callable[[Any], list[str]]] = {"scores": scores, "engine": engine, "loaders": loaders, "gpu": gpu}


def written(readme: str) -> str:
    """A README's text with its tables renewed from the JSON files."""

    def block(found: re.Match) -> str:
        if found[2] not in TABLES:
            raise UserError(f"<!-- figures: {found[2]} -->: expected one of {', '.join(TABLES)}")
        values = json.loads((FIGURES / f"{found[2]}.json").read_text(encoding="utf-8"))
        return "\n".join([found[1], *TABLES[found[2]](values), found[3]])

    return re.sub(r"(<!-- figures: (\w+) -->).*?(<!-- end -->)", block, readme, flags=re.DOTALL)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="*", type=Path, help="folders of finished runs, as runs/clouds/003-small")
    given = parser.parse_args(arguments)
    try:
        if given.runs:
            lines = json.loads((FIGURES / "scores.json").read_text(encoding="utf-8"))
            figures.write(FIGURES / "scores.json", with_runs(lines, given.runs))
        for file in READMES:
            file.write_text(written(file.read_text(encoding="utf-8")), encoding="utf-8")
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
