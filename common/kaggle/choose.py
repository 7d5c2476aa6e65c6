"""Which submission file is sent, and everything that can be known against it before it is."""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import raw, submission
from common import run as runs
from common.competition import Competition
from common.errors import UserError
from common.files import read_json
from common.kaggle.source import Source
from common.submission import SUBMISSIONS


@dataclass(frozen=True)
class Candidate:
    """A submission file and where it came from; `provenance` is empty for a file that the kit did not write."""

    path: Path
    provenance: dict[str, Any]

    @property
    def run(self) -> str:
        return self.provenance.get("run", "")

    @property
    def score(self) -> float | None:
        return self.provenance.get("score")

    @property
    def sha256(self) -> str:
        with open(self.path, "rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()


def choose(competition: str, source: Source, run: str | None, file: str | None) -> Candidate:
    """FILE= as it is, else the newest file of RUN=, else of the run with the best validation score."""
    candidates = _written(competition)
    if file:
        path = Path(file).expanduser()
        if not path.is_file():
            names = ", ".join(str(candidate.path) for candidate in candidates) or "none yet"
            raise UserError(f"FILE={file} does not exist (submissions: {names}): make predict COMP={competition}")
        return _with_origin(path, candidates)
    if run:
        candidates = [candidate for candidate in candidates if candidate.run == run or candidate.path.stem == run]
        if not candidates:
            names = ", ".join(candidate.path.stem for candidate in _written(competition)) or "none yet"
            raise UserError(
                f"RUN={run} has no submission (there are: {names}): make predict COMP={competition} RUN={run}"
            )
        return candidates[-1]
    real = [candidate for candidate in candidates if not candidate.provenance.get("demo")]
    if not real:
        why = f"only samples ({candidates[-1].path})" if candidates else "nothing"
        raise UserError(
            f"{SUBMISSIONS / competition} holds {why}: train on the real data first: make data COMP={competition}, "
            f"then make train COMP={competition}"
        )
    scored = [candidate for candidate in real if candidate.score is not None]
    if not scored:
        return real[-1]
    sign = 1 if source.higher_is_better else -1
    best = max(sign * candidate.score for candidate in scored)
    return [candidate for candidate in scored if sign * candidate.score == best][-1]


def _written(competition: str) -> list[Candidate]:
    """The submissions that the kit wrote, oldest first."""
    found = []
    for sidecar in (SUBMISSIONS / competition).glob("*.json"):
        path = sidecar.with_suffix(".csv")
        try:
            provenance = json.loads(sidecar.read_text())
        except ValueError:
            continue  # not one of the kit's
        if path.is_file() and _is_ours(provenance):
            found.append(Candidate(path, provenance))
    return sorted(found, key=lambda one: (one.provenance.get("created", ""), one.path.stat().st_mtime_ns))


def _is_ours(provenance: Any) -> bool:
    """Whether the content of a .json beside a .csv was written by the kit, not by whatever else made that file."""
    return isinstance(provenance, dict) and "sha256" in provenance


def _with_origin(path: Path, candidates: list[Candidate]) -> Candidate:
    """The file with its sidecar, or with that of the submission it is a copy of."""
    sidecar = path.with_suffix(".json")
    if sidecar.is_file():
        try:
            provenance = json.loads(sidecar.read_text())
        except ValueError as error:
            raise UserError(f"{sidecar} cannot be read ({error}): write the submission again: make predict") from error
        if _is_ours(provenance):
            return Candidate(path, provenance)
    digest = Candidate(path, {}).sha256
    same = [candidate.provenance for candidate in candidates if candidate.provenance["sha256"] == digest]
    return Candidate(path, same[0] if same else {})


def check(candidate: Candidate, competition: str, module: Competition, data: str | None) -> int:
    """Raises UserError for a sample, a changed or stale file, or one that no sample submission allows; its rows."""
    again = f"make predict COMP={competition}" + (f" RUN={candidate.run}" if candidate.run else "")
    if candidate.provenance.get("demo"):
        raise UserError(
            f"{candidate.path} was made from demo data and means nothing on Kaggle: make data "
            f"COMP={competition}, then make train COMP={competition}"
        )
    if candidate.provenance and candidate.sha256 != candidate.provenance.get("sha256"):
        raise UserError(f"{candidate.path} was changed after it was checked: write it again with {again}")
    for name in filter(None, candidate.run.split(",")):
        result = runs.RUNS / competition / name / "result.json"
        finished = read_json(result).get("finished", "") if result.is_file() else ""
        if finished > candidate.provenance.get("created", ""):
            raise UserError(
                f"{candidate.path} is older than its run ({candidate.provenance.get('created')}, {name} finished "
                f"{finished}): write it again with {again}"
            )
    found = _data(candidate, competition, data)
    # A file of the kit's own passed the competition's check of values when it was written, and has not changed since.
    valid = None if candidate.provenance else module.build(module.recipes["default"], found, print).submission.valid
    pattern, failure = module.source.sample_submission, None
    for name in found.matching(pattern) or [pattern]:
        try:
            return submission.check(candidate.path, submission.Sample.read(found, name), valid)
        except UserError as error:
            failure = failure or error
    raise failure


def _data(candidate: Candidate, competition: str, data: str | None) -> raw.RawData:
    """The competition's files: DATA=, those the run was trained on, or data/<competition>."""
    if data is None:
        for name in filter(None, candidate.run.split(",")):
            file = runs.RUNS / competition / name / "run.json"
            path = read_json(file).get("data", "") if file.is_file() else ""
            if path and Path(path).exists():
                data = path
                break
    if data is None and not (raw.DATA / competition).is_dir():
        raise UserError(
            f"{candidate.path} cannot be compared with the sample submission, there is no {raw.DATA / competition}: "
            f"make data COMP={competition}, or pass DATA=/path/to/folder-or-zip"
        )
    return raw.find(competition, data, _no_demo)


def _no_demo(folder: Path) -> None:
    raise AssertionError(f"no demo data are made for a submission: {folder}")
