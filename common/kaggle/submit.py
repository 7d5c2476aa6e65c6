"""`make submit`: the best checked submission to Kaggle, believed only when Kaggle lists it, and its score back."""

import time
from collections.abc import Sequence
from pathlib import Path

from common.competition import Competition
from common.errors import UserError
from common.kaggle import candidate as candidates
from common.kaggle import ledger, status
from common.kaggle.candidate import Candidate
from common.kaggle.client import Silent, Transient, explained, go_on_with, kaggle
from common.kaggle.credentials import Account, find
from common.kaggle.source import Source
from common.kaggle.status import FAILED, SCORED
from common.progress import Progress
from common.run import now

WAIT_SECONDS = 900  # for the score; some competitions take an hour, which `make board` then shows
LISTED_TRIES = 5  # how often the list is read until a submission that was sent must be there


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
    """Check, show, send, wait for the score and write the ledger. Raises UserError when it did not arrive or failed.

    `wait` and `poll` are seconds: how long the score is waited for, and the first pause between two looks.
    """
    source: Source = module.source
    refuse_nowhere(competition, source)
    candidate = candidates.choose(competition, source, run, file)
    rows = candidates.check(candidate, competition, module, data)
    row = ledger.Row(
        time=now(),
        file=str(candidate.path),
        sha256=candidate.sha256,
        run=candidate.run,
        commit=candidate.provenance.get("commit", ""),
        validation="" if candidate.score is None else str(candidate.score),
        message=ledger.tagged(message or described(candidate)),
    )
    if not force and (before := ledger.newest(ledger.read(competition), "sha256", row.sha256)):
        raise _sent_before(competition, candidate.path, before)
    account = find()
    left = status.submissions(account, source)[1]
    if left == 0:
        raise UserError(f"no submission to {source.slug} is left today: repeat the same command after midnight UTC")
    score = f", {candidate.provenance['monitor']} {candidate.score:.5f}" if candidate.score is not None else ""
    print(f"Kaggle account: {account.where}")
    print(f"sending {candidate.path} ({rows:,} rows) of run {candidate.run or 'unknown'}{score} to {source.page}")
    print(f"message: {row.message}\nsubmissions left today: {'unknown' if left is None else left}")
    if before := ledger.claim(competition, row, "" if force else "sha256"):
        raise _sent_before(competition, candidate.path, before)
    deliver(competition, account, source, ["-f", str(candidate.path)], row, wait, poll)


def _sent_before(competition: str, path: Path, before: ledger.Row) -> UserError:
    doubt = "" if before.ref else f"; make board COMP={competition} shows whether it arrived"
    return UserError(
        f"{path} was sent before ({before.time}, {before.status} {before.public or '-'}{doubt}): sending the same file "
        f"again uses up a submission. To do so: make submit COMP={competition} FORCE=1"
    )


def refuse_nowhere(competition: str, source: Source) -> None:
    if source.nowhere_to_submit:
        raise UserError(f"{competition}: there is nowhere to submit ({source.nowhere_to_submit})")


def described(candidate: Candidate) -> str:
    """The default message: run, recipe, score and commit."""
    provenance = candidate.provenance
    score = f"{provenance['monitor']} {candidate.score:.5f}" if candidate.score is not None else ""
    commit = f"commit {provenance['commit']}" if provenance.get("commit") else ""
    parts = [candidate.run or candidate.path.name, f"recipe {provenance.get('recipe', '-')}", score, commit]
    return ", ".join(filter(None, parts))


def deliver(
    competition: str,
    account: Account,
    source: Source,
    arguments: Sequence[str],
    row: ledger.Row,
    wait: float = WAIT_SECONDS,
    poll: float = 4.0,
) -> None:
    """Send with the kaggle program's `arguments`, wait for the score, keep the ledger up to date, print the scores.

    `row` is claimed in the ledger and leaves it only when nothing was submitted for certain: otherwise the file is not
    sent again unasked. Raises UserError when it did not arrive or could not be scored.
    """
    name = Path(row.file).name
    what, failure, said = f"submitting {name}", None, ""
    with go_on_with(f"make board COMP={competition}"):  # as long as it may have arrived
        try:  # the message is one word: it may start with a dash
            answer = kaggle(account, "competitions", "submit", source.slug, *arguments, f"--message={row.message}")
            said = "; ".join(line for line in answer.out.splitlines() if line.strip())[:300]
            if answer.status != 0:
                failure = explained(answer, account, source, what)
        except Silent as error:
            failure = Transient(f"{what}: {error}")
        # The program exits 0 when the upload fails. A line may break after the file has left: only the list can tell.
        arrived = failure is None and "Successfully submitted" in answer.text
        if not arrived and (failure is None or isinstance(failure, Transient)):
            arrived = _is_listed(account, source, row, poll)
        if arrived:
            _follow(competition, account, source, row, wait, poll)
            return
    ledger.put(competition, row, remove=True)
    if isinstance(failure, Transient):
        raise UserError(f"{failure}. It did not arrive: Kaggle does not list it") from failure
    raise failure or UserError(
        f"{what}: the upload failed ({said or 'no reason given'}), nothing was submitted: repeat the same command; if "
        f"it fails again, upload {name} at {source.page}/submit"
    )


def _is_listed(account: Account, source: Source, row: ledger.Row, poll: float) -> bool:
    """Whether the submission turns up in one of several looks; raises Transient when the last one fails."""
    for look in range(LISTED_TRIES):
        try:
            if row.listed(status.submissions(account, source)[0]):
                return True
        except Transient:
            if look == LISTED_TRIES - 1:
                raise
        if look < LISTED_TRIES - 1:
            time.sleep(poll)
    return False


def _follow(competition: str, account: Account, source: Source, row: ledger.Row, wait: float, poll: float) -> None:
    """Wait until the submission is listed and scored, and write down and print what Kaggle says."""
    name, pause, looks, start = Path(row.file).name, poll, 0, time.monotonic()
    with Progress(f"waiting for the score of {name}", int(wait), "s") as progress:
        while True:
            failure = None
            try:
                listed = row.listed(status.submissions(account, source)[0])
                looks += 1
                if listed:
                    row = row.with_answer(listed)
                    ledger.put(competition, row)  # at once: interrupted now, nothing of it is lost
            except Transient as error:
                failure = error
            if row.status in (SCORED, FAILED):
                break
            if not row.ref and looks >= LISTED_TRIES:
                raise UserError(
                    f"Kaggle said that {name} was submitted but does not list it: look at {source.page}/submissions "
                    "before sending it again"
                )
            left = start + wait - time.monotonic()
            if left <= 0 and failure is not None:
                raise UserError(f"{name} is sent, but its score is not known: {failure}") from failure
            if left <= 0:
                print(f"{name} is sent but not scored after {wait:.0f} s: make board COMP={competition} shows the "
                      "score later")  # fmt: skip
                return
            progress.update(int(wait - left), "Kaggle fails now" if failure else "")
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, 30)
    if row.status == FAILED:
        raise UserError(
            f"Kaggle could not score {name}: {row.reason or 'it gives no reason'}. See {source.page}/submissions"
        )
    scores = f"public {row.public or '-'}, private {row.private or 'not shown yet'}"
    print(f"score of {name}: {scores}" + (f", validation {float(row.validation):.5f}" if row.validation else ""))
    print(f"kept in {ledger.path_of(competition)}")
