"""Which submission file is sent (`choose`), and everything that can be known against it before it is (`check`)."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import raw, submission
from common import run as runs
from common.competition import Competition
from common.errors import UserError
from common.files import expanded, read_json, sha256
from common.kaggle.source import Source
from common.runs_table import best_run
from common.submission import SUBMISSIONS


@dataclass(frozen=True)
class Candidate:
    """A submission file and its sidecar: `provenance` is empty for a file that the kit did not write."""

    path: Path
    provenance: dict[str, Any]

    @property
    def run(self) -> str:  # or several, separated by commas; "" where that is not known
        return self.provenance.get("run", "")

    @property
    def score(self) -> float | None:  # of the validation
        return self.provenance.get("score")

    def facts(self, competition: str, name: str) -> list[dict]:
        """What the file `name` of each of its runs says, of those that are still there."""
        files = [runs.RUNS / competition / run / name for run in filter(None, self.run.split(","))]
        return [{"run": file.parent.name, **read_json(file)} for file in files if file.is_file()]


def choose(competition: str, source: Source, run: str | None, file: str | None) -> Candidate:
    """FILE= as it is, else the newest file of RUN=, else of the run that `best_run` names, and says why.

    Raises UserError where there is none; files made from demo data are chosen only by their names.
    """
    written = _written(competition)
    if file:
        path = expanded(file, f"FILE={file}")
        if not path.is_file():
            names = ", ".join(str(one.path) for one in written) or "none yet"
            raise UserError(f"FILE={file} does not exist (submissions: {names}): make predict COMP={competition}")
        digest = sha256(path)
        copies = (one.provenance for one in written if one.provenance["sha256"] == digest)
        return Candidate(path, submission.sidecar(path) or next(copies, {}))
    if run:
        found = [candidate for candidate in written if run in (candidate.run, candidate.path.stem)]
        if not found:
            names = ", ".join(candidate.path.stem for candidate in written) or "none yet"
            raise UserError(
                f"RUN={run} has no submission (there are: {names}): make predict COMP={competition} RUN={run}"
            )
        return found[-1]
    real = [candidate for candidate in written if not candidate.provenance.get("demo")]
    if not real:
        why = f"only submissions made from demo data ({written[-1].path})" if written else "nothing"
        raise UserError(
            f"{SUBMISSIONS / competition} holds {why}: train on the real data first: make data COMP={competition}, "
            f"then make train COMP={competition}"
        )
    sign = 1 if source.higher_is_better else -1
    scored = [candidate for candidate in reversed(real) if candidate.score is not None]
    if best := best_run(competition, [candidate.run for candidate in scored], source.higher_is_better):
        print(best[1])
        return next(candidate for candidate in scored if candidate.run == best[0])
    return max(scored, key=lambda candidate: sign * candidate.score, default=real[-1])


def _written(competition: str) -> list[Candidate]:
    """The submissions that the kit wrote, oldest first."""
    paths = (file.with_suffix(".csv") for file in (SUBMISSIONS / competition).glob("*.json"))
    found = [Candidate(path, facts) for path in paths if path.is_file() and (facts := submission.sidecar(path))]
    return sorted(found, key=lambda one: (one.provenance.get("created", ""), one.path.stat().st_mtime_ns))


def check(candidate: Candidate, competition: str, module: Competition, data: str | None) -> int:
    """The rows of the file; raises UserError for one from demo data, a changed or stale one, or one that no sample
    submission allows."""
    again = f"make predict COMP={competition}" + (f" RUN={candidate.run}" if candidate.run else "")
    if candidate.provenance.get("demo"):
        raise UserError(
            f"{candidate.path} was made from demo data and means nothing on Kaggle: make data "
            f"COMP={competition}, then make train COMP={competition}"
        )
    if candidate.provenance and sha256(candidate.path) != candidate.provenance["sha256"]:
        raise UserError(f"{candidate.path} was changed after it was checked: write it again with {again}")
    created = candidate.provenance.get("created", "")
    for result in candidate.facts(competition, "result.json"):
        if result.get("finished", "") > created:
            raise UserError(
                f"{candidate.path} is older than its run ({created}, {result['run']} finished "
                f"{result['finished']}): write it again with {again}"
            )
    known = [facts.get("data", "") for facts in candidate.facts(competition, "run.json")]
    data = data or next((path for path in known if path and Path(path).exists()), None)
    if raw.would_be_demo(competition, data):
        raise UserError(
            f"{candidate.path} cannot be compared with the sample submission, there is no {raw.DATA / competition}: "
            f"make data COMP={competition}, or pass DATA=/path/to/folder-or-zip"
        )
    found = raw.find(competition, data, lambda _: None)
    # A file of the kit's own passed the competition's check of values when it was written, and has not changed since.
    valid, text = None, candidate.provenance.get("text_columns", ())
    if not candidate.provenance:
        asked = module.build(module.recipes["default"], found, print).submission
        valid, text = asked.valid, asked.text
    pattern, failure = module.source.sample_submission, None
    for name in found.matching(pattern) or [pattern]:
        try:
            return submission.check(candidate.path, submission.Sample.read(found, name, text), valid)
        except UserError as error:
            failure = failure or error
    raise failure
