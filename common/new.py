"""`make new`: a competition's folder as a copy of a template, under its own name. Needs no package."""

import difflib
import keyword
import re
import shutil

from common.competition import COMPETITIONS
from common.errors import UserError

TEMPLATES = COMPETITIONS.with_name("templates")
NAME, SLUG, CLASS = "my_competition", "my-competition", "MyConfig"  # the templates' placeholders
TAKEN = ("demo", "cache")  # folders below data/ that are the kit's own


def new(name: str, kind: str) -> None:
    """Copy templates/`kind` to competitions/`name` and print what to do next; on UserError nothing is copied."""
    kinds = sorted(file.parent.name for file in TEMPLATES.glob("*/config.py"))
    near = (difflib.get_close_matches(kind, kinds, n=1, cutoff=0.3) or kinds)[0]
    _check_name(name, near)
    if kind not in kinds:
        what = f"KIND={kind}: expected" if kind else "KIND= is missing:"
        raise UserError(f"{what} one of {', '.join(kinds)}. Try: make new COMP={name} KIND={near}")
    words = {NAME: name, SLUG: name.replace("_", "-"), CLASS: f"{name.title().replace('_', '')}Config"}
    files = sorted(file for file in (TEMPLATES / kind).iterdir() if file.is_file())
    texts = {file.name: re.sub("|".join(words), lambda found: words[found[0]], file.read_text()) for file in files}
    target = COMPETITIONS / name
    try:
        target.mkdir()
        for file, text in sorted(texts.items(), key=lambda item: item[0] == "config.py"):  # last: only then it is found
            (target / file).write_text(text)
    except OSError as error:
        shutil.rmtree(target, ignore_errors=True)
        raise UserError(
            f"{target} cannot be written ({error.strerror or error}): free disk space, or make it writable"
        ) from error
    print(f"competitions/{name} has {', '.join(texts)}, from templates/{kind}. Next:")
    for command, what in (
        (f"make train COMP={name}", "trains on its demo data: a minute or two"),
        (f'make test ARGS="-k {name}"', "tests it: killed, resumed, predicted again"),
        (f"grep -n CHANGE competitions/{name}/*.py", "lists the lines to change, config.py first"),
        (f"make data COMP={name}", "downloads your files; then the first command again"),
    ):
        print(f"  {command:{len(name) + 34}}  {what}")


def _is_allowed(name: str) -> bool:
    is_word = re.fullmatch(r"[A-Za-z][A-Za-z0-9_]*", name) is not None
    return is_word and not keyword.iskeyword(name) and name not in TAKEN


def _check_name(name: str, kind: str) -> None:
    """Raises UserError for a name that a competition cannot have."""
    if not _is_allowed(name):
        words = re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_")
        near = words if _is_allowed(words) else f"comp_{words}"
        what = (
            f"COMP={name}: expected a name of letters, digits and _ that Python can import"
            if name
            else "COMP= is missing"
        )
        raise UserError(f"{what}. Try: make new COMP={near if words else 'name'} KIND={kind}")
    if there := [folder.name for folder in COMPETITIONS.iterdir() if folder.name.lower() == name.lower()]:
        raise UserError(f"competitions/{there[0]} already exists and is not changed: choose another COMP=")
