"""`make submit`: send the best checked submission to Kaggle, verify that Kaggle lists it, and fetch its score."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common import raw, submission
from common import run as runs
from common.competition import Competition
from common.errors import UserError
from common.files import expanded, read_json, sha256
from common.kaggle import ledger
from common.kaggle.client import Site, Transient, go_on_with, until
from common.kaggle.ledger import FAILED, SCORED
from common.kaggle.source import Source
from common.runs_table import best_run, score_of
from common.submission import SUBMISSIONS

WAIT_SECONDS = 900  # for the score; some competitions take an hour, which `make board` then shows
LISTED_TRIES = 5  # readings of Kaggle's list after which a submission that was sent must be in it


def submit(
    competition: str,
    module: Competition,
    *,
    run: str | None = None,
    file: str | None = None,
    message: str | None = None,
    force: bool = False,
    data: str | None = None,
    wait: float = WAIT_SECONDS,
    poll: float = 4.0,
) -> None:
    """Choose, check, show and send a submission, wait for its score and write the ledger.

    `wait` is the longest time to wait for the score, `poll` the first pause between two requests, both in seconds.
    Raises UserError when any step fails.
    """
    source: Source = module.source
    refuse_nowhere(competition, source)
    candidate = choose(competition, source, run, file)
    rows = check(candidate, competition, module, data)
    facts = candidate.provenance
    score = "" if candidate.score is None else f"{facts.get('monitor', 'score')} {candidate.score:.5f}"
    commit = f"commit {facts['commit']}" if facts.get("commit") else ""
    described = (candidate.run or candidate.path.name, f"recipe {facts.get('recipe', '-')}", score, commit)
    row = candidate.row(facts.get("commit", ""), message or ", ".join(filter(None, described)))
    site = Site.announced(competition, source)
    print(f"{candidate.path} ({rows:,} rows) of run {candidate.run or 'unknown'}{score and ', '}{score}")
    column = "" if force else "sha256"
    if before := deliver(site, ["-f", str(candidate.path)], row, column, wait, poll):
        doubt = "" if before.ref else f"; make board COMP={competition} shows whether it arrived"
        raise UserError(
            f"{candidate.path} was sent before ({before.time}, {before.status} {before.public or '-'}{doubt}): sending "
            f"the same file again uses up a submission. To do so: make submit COMP={competition} FORCE=1"
        )


@dataclass(frozen=True)
class Candidate:
    """A submission file and its sidecar; `provenance` is empty for a file that the kit did not write."""

    path: Path
    provenance: dict[str, Any]

    @property
    def run(self) -> str:  # or several, separated by commas; "" if unknown
        return self.provenance.get("run", "")

    @property
    def score(self) -> float | None:  # of the validation
        return score_of(self.provenance)

    def row(self, commit: str, message: str) -> ledger.Row:
        """The row of the ledger for sending it now; the message gets a tag."""
        return ledger.Row(
            time=runs.now(),
            file=str(self.path),
            sha256=sha256(self.path) if self.path.is_file() else "",  # a notebook submits its own copy
            run=self.run,
            commit=commit,
            validation="" if self.score is None else str(self.score),
            message=ledger.tagged(message),
        )

    def facts(self, competition: str, name: str) -> list[dict]:
        """The content of the JSON file `name` of each of its runs that still exist."""
        files = [runs.RUNS / competition / run / name for run in filter(None, self.run.split(","))]
        return [
            {"run": file.parent.name, **read_json(file, rules=runs.RULES[name])} for file in files if file.is_file()
        ]


def choose(competition: str, source: Source, run: str | None, file: str | None) -> Candidate:
    """Choose FILE= as it is, else the newest file of RUN=, else that of the `best_run` (never one of demo data)."""
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
    scored = [candidate for candidate in reversed(real) if candidate.score is not None]
    if best := best_run(competition, [candidate.run for candidate in scored], source.higher_is_better):
        print(best[1])
        return next(candidate for candidate in scored if candidate.run == best[0])
    return max(scored, key=lambda one: one.score if source.higher_is_better else -one.score, default=real[-1])


def _written(competition: str) -> list[Candidate]:
    """The submissions that the kit wrote, oldest first."""
    paths = (file.with_suffix(".csv") for file in (SUBMISSIONS / competition).glob("*.json"))
    found = [Candidate(path, submission.sidecar(path)) for path in paths if path.is_file()]
    for candidate in found:
        if not candidate.provenance:
            print(f"{candidate.path} is passed over: {candidate.path.stem}.json beside it is damaged, or not the kit's")
    found = [candidate for candidate in found if candidate.provenance]
    return sorted(found, key=lambda one: (one.provenance.get("created", ""), one.path.stat().st_mtime_ns))


def check(candidate: Candidate, competition: str, module: Competition, data: str | None) -> int:
    """Number of rows of the file; raises UserError for every fault that can be found before it is sent."""
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
    # A file that the kit wrote passed the competition's check of values then, and is unchanged.
    valid, text = None, candidate.provenance.get("text_columns", ())
    several = candidate.provenance.get("several_rows", False)
    if not candidate.provenance:
        asked = module.build(module.recipes["default"], found, print).submission
        valid, text, several = asked.valid, asked.text, asked.several
    pattern, failure = module.source.sample_submission, None
    for name in found.matching(pattern) or [pattern]:
        try:
            return submission.check(candidate.path, submission.Sample.read(found, name, text, several), valid)
        except UserError as error:
            failure = failure or error
    raise failure


def refuse_nowhere(competition: str, source: Source) -> None:
    if source.nowhere_to_submit or not source.slug:
        why = source.nowhere_to_submit or "it is not on Kaggle"
        raise UserError(f"{competition}: there is nowhere to submit ({why})")


def deliver(
    site: Site, arguments: Sequence[str], row: ledger.Row, column: str, wait: float, poll: float
) -> ledger.Row | None:
    """Send with the kaggle program's `arguments`, wait for the score, keep the ledger up to date, print the scores.

    If the ledger has a row with the same value in `column`, it is returned and nothing is sent. Else `row` is added
    before sending, and removed only if it is certain that nothing was submitted. Raises UserError if the submission did
    not arrive or Kaggle could not score it.
    """
    competition, source = site.competition, site.source
    if before := ledger.newest(ledger.read(competition), column, row):
        return before
    left = ledger.submissions(site)[1]
    if left == 0:
        raise UserError(f"no submission to {source.slug} is left today: repeat the same command after midnight UTC")
    name = Path(row.file).name
    print(f"sending to {source.page} with the message {row.message}")
    print(f"submissions left today: {'unknown' if left is None else left}")
    if before := ledger.claim(competition, row, column):
        return before
    what, message = f"submitting {name}", f"--message={row.message}"  # one word, as it may start with a dash
    with go_on_with(f"make board COMP={competition}"):  # from here on it may have arrived
        try:
            answer = site.told(what, "competitions", "submit", source.slug, *arguments, message)
            if "Successfully submitted" not in answer.text:  # the program exits 0 when the upload fails
                said = "; ".join(line for line in answer.out.splitlines() if line.strip())[:300] or "no reason given"
                raise Transient(
                    f"{what}: the upload failed ({said}): repeat the same command; if it fails again, upload {name} at "
                    f"{source.page}/submit"
                )
            failure = None
        except Transient as error:  # the connection may break after the upload: ask for the list
            is_listed = until(
                lambda: row.listed(ledger.submissions(site)[0]), f"looking for {name}", LISTED_TRIES * poll, poll
            )
            failure = None if is_listed else UserError(f"{error}. It did not arrive: Kaggle does not list it")
        except UserError as error:
            failure = error
        if failure is None:
            return _follow(site, row, wait, poll)
    ledger.put(competition, row, remove=True)
    raise failure


def _follow(site: Site, row: ledger.Row, wait: float, poll: float) -> None:
    """Wait until the submission is listed and scored; keep Kaggle's answers in the ledger and print the score."""
    competition, source, name, looks = site.competition, site.source, Path(row.file).name, 0

    def look() -> bool:
        nonlocal row, looks
        listed, looks = row.listed(ledger.submissions(site)[0]), looks + 1
        if listed:
            row = listed
            ledger.put(competition, row)  # at once, so that an interruption loses nothing
        elif not row.ref and looks >= LISTED_TRIES:
            raise UserError(f"Kaggle said that {name} was submitted but does not list it: look at "
                            f"{source.page}/submissions before sending it again")  # fmt: skip
        return row.status in (SCORED, FAILED)

    try:
        is_scored = until(look, f"waiting for the score of {name}", wait, poll)
    except Transient as error:
        raise UserError(f"{name} was sent, but its score is not known: {error}") from error
    if not is_scored:
        print(f"{name} was sent but not scored after {wait:.0f} s: make board COMP={competition} shows the score later")
        return
    if row.status == FAILED:
        why = row.reason or "it gives no reason"
        raise UserError(f"Kaggle could not score {name}: {why}. See {source.page}/submissions")
    scores = f"public {row.public or '-'}, private {row.private or 'not shown yet'}"
    print(f"score of {name}: {scores}" + (f", validation {float(row.validation):.5f}" if row.validation else ""))
    print(f"kept in {ledger.path_of(competition)}")
