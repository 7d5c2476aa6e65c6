"""The READMEs: their code runs, their commands are accepted by make, their tables match benchmarks/figures."""

import json
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import tables
from common import competition as competitions
from common import front
from common.errors import UserError
from common.flags import to_json
from competitions.digit_recognizer.config import RECIPES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```python\n(.*?)^```", README, flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(BLOCKS)))
def test_code_of_the_readme_runs(number, tmp_path):
    if BLOCKS[number].startswith("# competitions/"):
        compile(BLOCKS[number], "README.md", "exec")  # an example competition, which tests/test_templates.py runs
        return
    ran = subprocess.run(
        [sys.executable, "-c", BLOCKS[number]],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr


def test_the_readme_has_code_of_the_core():
    assert sum("from common.engine" in block for block in BLOCKS) >= 2


PAGES = [*ROOT.glob("*.md"), *ROOT.glob("benchmarks/*.md"), *ROOT.glob("competitions/*/*.md")]
COMMAND = re.compile(r"""(?:^ *(?:\$ )?|`)make ([a-z]+)((?: +[A-Z]+=(?:"[^"]*"|[^\s`"]+))*)""", flags=re.MULTILINE)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_make_takes_every_command_of_a_page(page):
    targets = set(re.findall(r"^([a-z]+):.* ## ", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)) | {"help"}
    found = COMMAND.findall(page.read_text(encoding="utf-8"))
    assert {target for target, _ in found} <= targets
    for target, words in found:
        given = dict(word.split("=", 1) for word in shlex.split(words))
        if given.get("COMP") in competitions.names() or "BENCH" in given:
            front.check(target, given | {"GIVEN": " ".join(given)})
    assert page != ROOT / "README.md" or len(found) > 20


def test_the_tables_are_what_the_figures_give():
    texts = [file.read_text(encoding="utf-8") for file in tables.READMES]
    assert texts == [tables.written(text) for text in texts], "run make bench BENCH=tables"
    assert sorted(re.findall(r"<!-- figures: (\w+) -->", "".join(texts))) == sorted(tables.TABLES)


def finished(folder: Path, seed: int, score: float | None, **changes) -> Path:
    """Write the files of a finished run of digit_recognizer with the recipe fast."""
    folder.mkdir()
    facts = {"competition": "digit_recognizer", "recipe": "fast", "demo": False, "machine": "1 CPU", "commit": "abc"}
    (folder / "run.json").write_text(json.dumps(facts))
    (folder / "config.json").write_text(to_json(replace(RECIPES["fast"], seed=seed, **changes)))
    result = {"monitor": "accuracy", "score": score, "errors": {"accuracy": 0.01}, "rows": 90, "training_seconds": 7.0}
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_runs_become_lines_of_the_scores(tmp_path):
    first, second = finished(tmp_path / "a", 0, 0.5), finished(tmp_path / "b", 1, 0.25)
    other = finished(tmp_path / "c", 0, 0.75, epochs=9)
    old = tables.score_of(first) | {"scores": {"0": 0.1}, "note": "on real data"}
    lines = tables.with_runs([old], [first, second, other])
    assert [(line["recipe"], line["scores"], line["note"]) for line in lines] == [
        ("fast", {"0": 0.5, "1": 0.25}, "on real data"),
        ("fast, epochs: 2 -> 9", {"0": 0.75}, ""),
    ]
    *_, line, _, _, machines = tables.scores(lines)
    assert line.startswith("| digit_recognizer `fast` | accuracy 0.375 ± 0.01 (0.5, 0.25) | 0, 1 | CV, 90 rows | 7 s |")
    assert line.endswith("| A, abc | on real data |") and machines == "Machines: A = 1 CPU."
    with pytest.raises(UserError, match="expected a finished run with a score"):
        tables.score_of(finished(tmp_path / "d", 0, None))
