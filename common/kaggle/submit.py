"""`make submit`: the best checked submission to Kaggle, believed only when Kaggle lists it, and its score back."""

import time
from pathlib import Path

from common.competition import Competition
from common.errors import UserError
from common.kaggle import choose, ledger, status
from common.kaggle.choose import Candidate
from common.kaggle.cli import Silent, Transient, explained, go_on_with, kaggle
from common.kaggle.credentials import Account, find
from common.kaggle.progress import Progress
from common.kaggle.source import Source
from common.kaggle.status import FAILED, SCORED, Submission
from common.run import now

WAIT_SECONDS = 900  # for the score; some competitions take an hour, which `make board` then shows
LONGEST_MESSAGE = 500  # characters
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
    if source.notebook_only:
        raise UserError(
            f"{competition} takes submissions from notebooks alone: make kernel COMP={competition} trains on Kaggle "
            "and submits what the notebook wrote"
        )
    candidate = choose.choose(competition, source, run, file)
    rows = choose.check(candidate, competition, module, data)
    digest = candidate.sha256
    if not force and (before := ledger.newest(ledger.read(competition), "sha256", digest)):
        raise _sent_before(competition, candidate.path, before)
    account = find()
    known, left = status.submissions(account, source)
    if left == 0:
        raise UserError(f"no submission to {source.slug} is left today: repeat the same command after midnight UTC")
    message = (message or described(candidate))[:LONGEST_MESSAGE]
    score = f", {candidate.provenance['monitor']} {candidate.score:.5f}" if candidate.score is not None else ""
    print(f"Kaggle account: {account.where}")
    print(f"sending {candidate.path} ({rows:,} rows) of run {candidate.run or 'unknown'}{score} to {source.page}")
    print(f"message: {message}\nsubmissions left today: {'unknown' if left is None else left}")

    row = ledger.Row(
        time=now(),
        file=str(candidate.path),
        sha256=digest,
        run=candidate.run,
        commit=candidate.provenance.get("commit", ""),
        validation="" if candidate.score is None else str(candidate.score),
        message=message,
    )
    if before := ledger.claim(competition, row, "" if force else "sha256"):
        raise _sent_before(competition, candidate.path, before)
    arguments = ["-f", str(candidate.path), f"--message={message}"]  # one word: it may start with a dash
    send(competition, account, source, arguments, known, candidate.path.name, row, poll)
    follow(competition, account, source, row, known, candidate.path.name, wait, poll)


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


def send(
    competition: str,
    account: Account,
    source: Source,
    arguments: list[str],
    known: list[Submission],
    name: str,
    row: ledger.Row,
    poll: float,
) -> None:
    """Send, and raise UserError unless the program says that it did; it exits 0 when the upload fails.

    When the line breaks after the file has left, only Kaggle's list can tell whether it arrived. `row` is in the ledger
    and leaves it only when nothing was submitted for certain: otherwise the file is not sent again unasked.
    """
    what, failure = f"submitting {name}", None
    with go_on_with(f"make board COMP={competition}"):  # as long as it may have arrived
        try:
            answer = kaggle(account, "competitions", "submit", source.slug, *arguments)
            if answer.status != 0:
                failure = explained(answer, account, source, what)
            elif "Successfully submitted" in answer.text:
                return
        except Silent as error:
            failure = Transient(f"{what}: {error}")
        unclear = failure is None or isinstance(failure, Transient)
        if unclear and _is_listed(account, source, known, name, row.message, poll):
            return
    ledger.remove(competition, row)
    if isinstance(failure, Transient):
        raise UserError(f"{failure}. It did not arrive: Kaggle does not list it") from failure
    if failure is not None:
        raise failure
    said = [line for line in answer.out.splitlines() if line.strip()]
    raise UserError(
        f"{what}: the upload failed ({'; '.join(said)[:300] or 'no reason given'}), nothing was submitted: repeat "
        f"the same command; if it fails again, upload {name} at {source.page}/submit"
    )


def _is_listed(account: Account, source: Source, known: list[Submission], name: str, message: str, poll: float) -> bool:
    """Whether the submission turns up in one of several looks; raises Transient when the last one fails."""
    for look in range(LISTED_TRIES):
        last = look == LISTED_TRIES - 1
        try:
            if arrived(status.submissions(account, source)[0], known, name, message, by_name=last):
                return True
        except Transient:
            if last:
                raise
        if not last:
            time.sleep(poll)
    return False


def arrived(
    found: list[Submission], known: list[Submission], name: str, message: str, by_name: bool
) -> Submission | None:
    """The submission that is new in the list: ours by its message, or else, `by_name`, by its file's name.

    A team mate's file may have the same name, so that counts only where the message has not turned up for a while.
    """
    seen = {submission.ref for submission in known}
    new = [submission for submission in found if submission.ref not in seen]
    ours = [submission for submission in new if submission.message == message]
    if by_name and not ours:
        ours = [submission for submission in new if Path(submission.file).name == name]
    return ours[0] if ours else None


def follow(
    competition: str,
    account: Account,
    source: Source,
    row: ledger.Row,
    known: list[Submission],
    name: str,
    wait: float,
    poll: float,
) -> None:
    """Wait until the submission is listed and scored, keep the ledger up to date, print the scores."""
    deadline, pause, looks, listed = time.monotonic() + wait, poll, 0, None
    with go_on_with(f"make board COMP={competition}"), Progress(f"waiting for the score of {name}") as progress:
        while True:
            failure = None
            try:
                found = status.submissions(account, source)[0]
                looks += 1
                listed = arrived(found, known, name, row.message, by_name=looks >= LISTED_TRIES) or listed
            except Transient as error:
                failure = error
            if listed is not None:
                row = row.with_answer(listed)
                ledger.put(competition, row)  # at once: interrupted now, nothing of it is lost
                if listed.status in (SCORED, FAILED):
                    break
            elif looks >= LISTED_TRIES:
                raise UserError(
                    f"Kaggle said that {name} was submitted but does not list it: look at {source.page}/submissions "
                    "before sending it again"
                )
            left = deadline - time.monotonic()
            if left <= 0 and failure is not None:
                raise UserError(f"{name} is sent, but its score is not known: {failure}") from failure
            if left <= 0:
                break
            progress.update(f"{wait - left:.0f} s, at most {wait:.0f} s{', Kaggle fails now' if failure else ''}")
            time.sleep(min(pause, left))
            pause = min(1.5 * pause, 30)
    if listed is not None and listed.status == FAILED:
        raise UserError(
            f"Kaggle could not score {name}: {listed.reason or 'it gives no reason'}. See {source.page}/submissions"
        )
    if listed is None or listed.status != SCORED:
        print(f"{name} is sent but not scored after {wait:.0f} s: make board COMP={competition} shows the score later")
        return
    scores = f"public {listed.public or '-'}, private {listed.private or 'not shown yet'}"
    print(f"score of {name}: {scores}" + (f", validation {float(row.validation):.5f}" if row.validation else ""))
    print(f"kept in {ledger.path_of(competition)}")
