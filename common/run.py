"""A run: the folder runs/<competition>/<run>/ with everything needed to resume, predict and explain."""

import itertools
import os
import platform
import subprocess
import sys
import weakref
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from hashlib import sha256
from pathlib import Path
from typing import Any

from common import config as configs
from common.config import Config
from common.errors import UserError
from common.files import (
    COUNT,
    NUMBER_OR_NONE,
    NUMBERS,
    OBJECT,
    OBJECTS,
    TEXT,
    TRUTH,
    locked,
    make_folder,
    not_written,
    read_json,
    write_json,
    write_text,
)
from common.flags import from_values, to_json
from common.progress import say

RUNS = Path("runs")
LONGEST_NAME = 100  # bytes of a run's name: any file system takes it, with the suffixes of files named after it
CHANGED = ("data", "data_fingerprint", "code", "commit", "pseudo")  # facts with which RESUME=1 goes on
FORMAT = 2  # version of a run's files; other versions of the kit have others
FACTS = ("recipe", "data", "data_fingerprint", "folds_fingerprint", "created")  # texts that every run.json has
RULES = {  # of the files of a run, for hands and disks that have changed them
    "run.json": dict.fromkeys((*FACTS, "outputs", "command", "commit"), TEXT)
    | {"demo": TRUTH, "code": OBJECT, "pseudo": OBJECT, "before": OBJECTS},
    "result.json": {"monitor": TEXT, "finished": TEXT, "tuned": OBJECT, "folds": OBJECTS, "micro_batch": COUNT}
    | {"rows": (lambda value: isinstance(value, int), "a whole number")}
    | dict.fromkeys(("score", "mean", "std", "training_seconds"), NUMBER_OR_NONE)
    | dict.fromkeys(("metrics", "errors", "fold_scores"), NUMBERS),
}


@dataclass(frozen=True)
class Run:
    """One training: its folder and the facts about it (`provenance`: competition, recipe, data, commit ...)."""

    path: Path
    provenance: dict[str, Any]
    is_writer: bool = True  # the first of several processes; the others neither print nor write
    log_file: Path | None = None  # None: log.txt in the folder
    _lock: list = field(default_factory=list, repr=False)  # holds the open lock file while this process lives

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def is_readable(self) -> bool:
        return self.provenance.get("format") == FORMAT

    @property
    def is_blend(self) -> bool:
        """Whether it is a blend of other runs, which has predictions but no models."""
        return (self.path / "blend.json").is_file()

    @property
    def is_unfinished_blend(self) -> bool:
        """Whether it is a blend without a result or a submission, which may be started anew without loss."""
        return self.is_blend and not self.is_finished

    @property
    def is_finished(self) -> bool:
        """Whether nothing is left to do: trained, reported and predicted."""
        return self.result is not None and not self._unfinished.exists()

    @property
    def _unfinished(self) -> Path:
        return self.path / "unfinished"  # there from before result.json until the submission is written

    @property
    def result(self) -> dict[str, Any] | None:
        """The content of result.json (score, metrics, tuned ...), or None until the run is trained."""
        file = self.path / "result.json"
        if not file.is_file():
            return None
        return read_json(file, "score", "monitor", rules=RULES["result.json"], again=self.again("oof"))

    def again(self, kind: str) -> str:
        """How to get its "oof" or "test" predictions, or its result, once more: in words, without another training."""
        if self.is_blend:
            return f"delete {self.path} and blend its runs again"
        if kind == "test" and any(self.path.glob("fold-*/model.pt")):
            return f"make predict COMP={self.provenance['competition']} RUN={self.name}"
        return f"delete {self.path / 'result.json'} and repeat its command, {self.provenance.get('command', '')}"

    @property
    def report(self) -> Path:
        """The path of the run's page, which may not exist yet."""
        return self.path / "report.html"

    def fold_folder(self, fold: int | None) -> Path:
        """The folder of the training that holds out `fold` (None: nothing)."""
        return self.path / ("fold-none" if fold is None else f"fold-{fold}")

    def inside(self, folder: Path) -> "Run":
        """This run for a part of its training: files go to `folder`, lines to the same log."""
        return Run(folder, self.provenance, self.is_writer, self.log_file or self.path / "log.txt")

    def log(self, message: str) -> None:
        """Print a line and append it to log.txt with the time."""
        if self.is_writer:
            message = message.encode("utf-8", "backslashreplace").decode()  # a path may hold bytes of any kind
            say(message)
            file = self.log_file or self.path / "log.txt"
            try:
                with open(file, "a", encoding="utf-8") as stream:
                    stream.write(f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} {message}\n")
            except OSError as error:
                raise not_written(file, error) from error

    def write_result(self, result: dict[str, Any]) -> None:
        """Write result.json: the run is trained. Until `finish`, the same command resumes with the steps after it."""
        write_text(self._unfinished, "")
        write_json(self.path / "result.json", result | {"finished": now()})

    def finish(self) -> None:
        """Mark the run as finished, its submission is written: from now on the same command starts a new run."""
        self._unfinished.unlink(missing_ok=True)

    def config(self, config_class: type[configs.ConfigType]) -> configs.ConfigType:
        return from_values(config_class, read_json(self.path / "config.json"))

    def check_outputs(self, outputs: str) -> None:
        """Raises UserError when the models were trained for other outputs: these are known by their order alone."""
        trained = self.provenance.get("outputs")
        if trained != outputs:
            raise UserError(
                f"run {self.name} was trained to predict {trained}, but the data have {outputs}: give it the data of "
                f"its training, DATA={self.provenance['data']}, or train another run on these"
            )

    def lock(self) -> None:
        """Keep a second process out of this run; the lock ends with this process, however that ends."""
        busy = f"{self.path} is being trained by another process: wait for it, or name another RUN="
        stream = locked(self.path / "lock", busy)
        self._lock.append(stream)
        held = weakref.ref(stream)
        # A forked worker that outlived its trainer would hold the lock with its copy of the descriptor.
        os.register_at_fork(after_in_child=lambda: held() and held().close())


def load(competition: str, name: str) -> Run:
    """An existing run; raises UserError listing the runs there are."""
    path = folder_of(competition, name)
    if not (path / "run.json").is_file():
        names = ", ".join(run.name for run in all_runs(competition, {})) or "none yet"
        raise UserError(
            f"RUN={name}: there is no such run of {competition} (runs: {names}). "
            f"Train one: make train COMP={competition}"
        )
    run = _read(path)
    if not run.is_readable:
        raise UserError(
            f"{path} was made by another version of the kit (format {run.provenance.get('format', 1)}, this one reads "
            f"{FORMAT}): use that version, or train it again under another RUN="
        )
    return run


def finished(competition: str, names: str | None) -> list[Run]:
    """The finished runs `names`, separated by commas, or the newest one; raises UserError where one is not finished."""
    if names is None:
        if newest := [run for run in all_runs(competition) if run.result is not None][-1:]:
            return newest
        raise UserError(f"no finished run of {competition}: make train COMP={competition}")
    found = [load(competition, name) for name in names.split(",")]
    for run in found:
        if run.result is None:
            raise UserError(f"{run.path} is not finished: repeat its command, {run.provenance.get('command', '')}")
    return found


def all_runs(competition: str, broken: dict[str, UserError] | None = None) -> list[Run]:
    """Every run of a competition of this version, oldest first by the time in run.json: files get copied.

    Raises UserError for a damaged run.json or, if `broken` is given, adds the error to it by the run's name.
    """
    found = []
    for file in (RUNS / competition).glob("*/run.json"):
        try:
            found.append(_read(file.parent))
        except UserError as error:
            if broken is None:
                raise
            broken[file.parent.name] = error
    return sorted((run for run in found if run.is_readable), key=lambda run: (run.provenance["created"], run.name))


def _read(path: Path) -> Run:
    file = path / "run.json"
    facts = read_json(file)
    if facts.get("format") == FORMAT:  # else the message about another version is all that it is good for
        facts = read_json(file, "demo", *FACTS, rules=RULES[file.name])
    return Run(path, facts | {"competition": path.parent.name})  # whose folders may have been renamed since


def folder_of(competition: str, name: str) -> Path:
    """Where the run `name` is or would be; raises UserError for a name that is not allowed."""
    # Bytes that are not UTF-8 are not printable either.
    if not name.isprintable() or len(name.encode()) > LONGEST_NAME or name in ("", ".", "..") or set(name) & set("/,"):
        raise UserError(
            f"RUN={name[:LONGEST_NAME]!r}: expected a name in UTF-8 of at most {LONGEST_NAME} bytes without / and , (a "
            f"comma separates the runs that predict averages)"
        )
    return RUNS / competition / name


def open_run(
    competition: str,
    name: str | None,
    config: Config,
    provenance: dict[str, Any],
    insist: bool = False,
    before_new: Callable[[], Any] = lambda: None,
) -> Run:
    """The run to train: `name` if it is given, else an unfinished run of the same command, else a new one.

    A run is resumed only with the same settings, folds, code and data. `insist` allows other code and data, until the
    run is trained: without a network it cannot predict other data. What the run goes on with is then in its run.json.
    `before_new` is called before a new run is made, and may raise. Raises UserError when the named run was started
    differently, listing what differs.
    """
    if name is None:
        candidates = (run for run in reversed(all_runs(competition)) if not (run.is_finished or run.is_blend))
    else:
        path = folder_of(competition, name)
        is_there = (path / "run.json").is_file()
        if not is_there and any(file.suffix != ".part" for file in path.glob("fold-*/*")):  # of unknown settings
            raise UserError(f"{path} has models but no run.json: restore it, name another RUN=, or delete {path}")
        candidates = [load(competition, name)] if is_there else []
    for run in candidates:
        settings, changes = _obstacles(run, config, provenance)
        may_insist = not settings and run.result is None
        if not (settings or changes) or (may_insist and insist):
            return _resumed(run, provenance if changes else None)
        if name is not None:
            remedy = "RESUME=1 resumes it anyway" if may_insist else "repeat its own command to resume it"
            raise UserError(
                f"RUN={name} was started differently ({'; '.join(settings + changes)}): {remedy}, or name another "
                f"RUN=, or delete {run.path}"
            )
        if not settings:
            way = "; RESUME=1 resumes that one" * may_insist
            print(f"{run.path} is not resumed ({'; '.join(changes)}): this is a new run{way}")
    before_new()
    return new_run(competition, name, config, provenance)


def _obstacles(run: Run, config: Config, provenance: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Why this command cannot resume that run: (settings and folds, code and data) that differ, as texts."""
    try:
        settings = configs.differences(run.config(type(config)), config)
    except UserError as error:
        return [str(error)], []
    before, changes, is_trained = run.provenance, [], run.result is not None
    same_data = before["data_fingerprint"] == provenance["data_fingerprint"]
    # A trained run only predicts: with models any data, with kept predictions the same data.
    if not same_data and not (is_trained and any(run.path.glob("fold-*/model.pt"))):
        changes.append(f"data: {before['data']} -> {provenance['data']}, with other contents")
    if before["demo"] != provenance["demo"]:
        settings.append(f"demo data: {before['demo']} -> {provenance['demo']}")
    if same_data or not is_trained:  # finished folds have kept row numbers, and models that know outputs by order
        if before.get("folds_fingerprint") != provenance.get("folds_fingerprint"):
            settings.append("folds: their rows have changed since the run began")
        if before.get("outputs") != provenance.get("outputs"):
            settings.append(f"outputs: {before.get('outputs')} -> {provenance.get('outputs')}")
    if not is_trained:
        code, then = provenance.get("code", {}), before.get("code", {})
        changes += [f"code of {part}/ changed since" for part in code if then.get(part) != code[part]]
        labelling, then = provenance.get("pseudo", {}), before.get("pseudo", {})
        both = labelling.keys() & then  # a deleted run may have labelled all before
        changes += [f"run {name} was started anew since" for name in both if labelling[name] != then[name]]
    return settings, changes


def _resumed(run: Run, other: dict[str, Any] | None) -> Run:
    """Lock the run and go on with it; `other` is the provenance that it goes on with, where that has changed."""
    run.lock()
    if other:
        before = {fact: run.provenance.get(fact) for fact in CHANGED if run.provenance.get(fact) != other.get(fact)}
        run.provenance.update({fact: other.get(fact) for fact in before})
        run.provenance["before"] = [*run.provenance.get("before", ()), {"until": now(), **before}]
        write_json(run.path / "run.json", run.provenance)
    if run.result is None:
        run.log(f"resuming {run.path}")
    return run


def new_run(
    competition: str,
    name: str | None,
    config: Config,
    provenance: dict[str, Any],
    blend: dict[str, Any] | None = None,
) -> Run:
    """Make a run with its folder; a generated name begins with the next number among the competition's runs.

    `blend`, the content of blend.json, makes it a blend; an unfinished blend of that name is started anew. Raises
    UserError when another process has made a run of that name.
    """
    home = RUNS / competition
    demo = "-demo" * (provenance["demo"] and provenance["recipe"] != "demo")
    try:
        make_folder(home)
        if name:
            path = home / name
            make_folder(path)
        else:
            path = _next_folder(home, provenance["recipe"] + demo)
    except OSError as error:
        raise not_written(home, error) from error
    run = Run(path, {"format": FORMAT, "run": path.name, **provenance, "created": now()})
    run.lock()
    if (path / "run.json").is_file() and not (blend and run.is_unfinished_blend):
        raise UserError(f"another process has just made {path}: repeat the command, or name another run")
    if blend:
        (path / "result.json").unlink(missing_ok=True)  # of the blend that stopped: this one may have other members
        write_json(path / "blend.json", blend)  # before run.json, so that no training resumes it
    write_text(path / "config.json", to_json(config) + "\n")
    write_json(path / "run.json", run.provenance)  # last: a folder with run.json is a whole run
    run.log(f"run {path}: {' '.join(sys.argv[1:])}")
    return run


def _next_folder(home: Path, name: str) -> Path:
    """Make the folder of a new run in `home`, with a number that no run has, nor another process takes now."""
    first = 1 + max((int(run.name[:3]) for run in home.iterdir() if run.name[:3].isdecimal()), default=0)
    for number in itertools.count(first):
        path = home / f"{number:03d}-{name}"
        with suppress(FileExistsError):
            path.mkdir()
            return path


def now() -> str:
    return f"{datetime.now(UTC):%Y-%m-%dT%H:%M:%S.%fZ}"


def commit() -> str:
    """The git commit of the code, with '+changes' when files differ from it; 'unknown' outside a checkout."""
    try:
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True)
        status = subprocess.run(["git", "status", "--porcelain"], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head.stdout.strip() + ("+changes" if status.stdout.strip() else "")


def code_fingerprint(competition: str) -> dict[str, str]:
    """sha256 of the Python files that a run is computed with: those of common/ and those of its competition."""
    root, found = Path(__file__).parents[1], {}
    for part in ("common", f"competitions/{competition}"):
        contents = [file.name.encode() + file.read_bytes() for file in sorted((root / part).rglob("*.py"))]
        found[part] = sha256(b"".join(contents)).hexdigest()[:16]
    return found


def machine() -> str:
    """The hardware and versions that a figure was measured on, in one line."""
    import torch

    card = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{os.cpu_count()} CPU cores"
    return f"{card}, Python {platform.python_version()}, torch {torch.__version__}"
