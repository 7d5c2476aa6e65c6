"""`make kernel`: train on Kaggle's GPUs and fetch the run and its submission back."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from common import run as runs
from common.errors import UserError
from common.files import read_json, write_json
from common.kaggle.client import Answer, Site, Transient, go_on_with, kaggle, until
from common.kaggle.kernel.notebook import (
    ACCELERATOR,
    ARCHIVE,
    MARGIN_SECONDS,
    SESSION_HOURS,
    TRAINING,
    code,
    needed,
    pack,
    wheels,
    written,
)
from common.kaggle.kernel.output import end_of_log, fetch_output, unfinished
from common.kaggle.source import Source
from common.kaggle.submit import WAIT_SECONDS as SCORE_SECONDS
from common.kaggle.submit import Candidate, deliver
from common.submission import sidecar

WAIT_SECONDS = 12 * 3600  # including the time in the queue
OUTAGE_SECONDS = 1800.0  # longest time without an answer from Kaggle while waiting for a notebook that was just pushed
READY_SECONDS = 600  # longest time until a notebook can use a new version of the code
LONGEST = 28  # characters of a competition's name in its notebooks' names, because Kaggle limits those
ENDED = {"COMPLETE", "ERROR", "CANCEL_ACKNOWLEDGED"}


def kernel(
    competition: str,
    source: Source,
    arguments: Sequence[str] = (),
    *,
    accelerator: str = ACCELERATOR,
    internet: bool = True,
    fetch: bool = False,
    hours: float = SESSION_HOURS,
    wait: float = WAIT_SECONDS,
    poll: float = 15.0,
) -> None:
    """Push a notebook that runs `train COMPETITION ARGUMENTS`, wait for it and fetch its run; `fetch` pushes nothing.

    A run that is not finished after a session of `hours` is resumed in another notebook, until it is finished.
    `accelerator` is one of Kaggle's names, `wait` and `poll` are seconds.
    Raises UserError if Kaggle refuses the notebook or the notebook fails.
    """
    if not source.slug:
        raise UserError(
            f"{competition} is not on Kaggle, so no notebook there can read its files: make train COMP={competition}"
        )
    if 3600 * hours < 2 * MARGIN_SECONDS:
        raise UserError(
            f"--hours {hours:g}: the last {MARGIN_SECONDS // 60} minutes of a session are for packing the run, so give "
            f"it --hours {2 * MARGIN_SECONDS / 3600:g} or more"
        )
    record = runs.RUNS / competition / "kernel.json"
    site = Site.announced(competition, source)
    facts = read_record(record, "kernel") if fetch or record.is_file() else {}
    notebook = Notebook(site, "kernel", facts["kernel"] if fetch else f"{username(site)}/{name_of(competition)}", poll)
    is_done = False
    while not is_done:
        if not fetch:
            before = facts if facts.get("checkpoint") and facts["arguments"] == list(arguments) else {}
            facts = _push(notebook, arguments, accelerator, internet, hours, before)
            write_json(record, facts)
        with go_on_with(f"make kernel COMP={competition} ARGS=--fetch"):  # another push would train again
            notebook.follow(wait, 0.0 if fetch else OUTAGE_SECONDS)
            is_done = _fetch(notebook, facts, record)
        if not is_done and fetch:
            print(f"the run is not finished: make kernel COMP={competition} with the same flags resumes it")
            return


def _fetch(notebook: "Notebook", facts: dict, record: Path) -> bool:
    """Fetch the run and its submission if the run is finished, and return whether it is."""
    facts["checkpoint"] = unfinished(notebook.site, notebook.reference)
    write_json(record, facts)
    if facts["checkpoint"]:
        if facts["checkpoint"] == facts.get("resumed"):
            raise UserError(
                f"{notebook.page} version {facts['version']}: a whole session brought no new checkpoint: see its log"
            )
        print(f"version {facts['version']} has used up its session, the next one resumes the run")
        return False
    table = Path(facts.get("fetched", ""))
    if table.is_file():
        print(f"fetched before: {table}; delete it to fetch it again")
    else:
        facts["fetched"] = str(fetch_output(notebook.site, notebook.reference))
        write_json(record, facts)
    return True


def _push(
    notebook: "Notebook", arguments: Sequence[str], accelerator: str, internet: bool, hours: float, before: dict
) -> dict:
    """Push code and notebook; `before` is the result of the earlier push of an unfinished run, or empty.

    An unfinished run is resumed with the code that it was started with, so the code is not uploaded again.
    """
    competition, version = notebook.site.competition, before.get("code")
    if not internet and before.get("internet"):
        raise UserError(
            f"--internet off: the run was begun with --internet on, so its code on Kaggle has no wheels: go on with "
            f"--internet on, or delete {runs.RUNS / competition / 'kernel.json'} to begin another run"
        )
    metadata = {
        "machine_shape": accelerator,
        "enable_internet": str(internet).lower(),
        "kernel_sources": [before["kernel"]] if before else [],
    }
    files = code(competition)
    pins, words, limit = needed(files), ("train", competition, *arguments), 3600 * hours
    with tempfile.TemporaryDirectory(prefix="kaggle-kernel-") as name:
        folder = Path(name)
        if not before:
            files |= {} if internet else wheels(pins.values(), folder / "wheels")
            version = notebook.push_files(files, folder)
        text = written(TRAINING, notebook.site.source.slug, words, version, pins, limit, MARGIN_SECONDS, internet)
        facts = notebook.push(text, metadata, limit, folder)
    going = f", going on with version {before['version']}" if before else ""
    print(f"notebook: {notebook.page} version {facts['version']}: python -m common {' '.join(words)}{going}")
    facts |= {"code": version, "arguments": list(arguments), "resumed": before.get("checkpoint", "")}
    return facts | {"internet": before.get("internet", internet), "pushed": runs.now()}


def read_record(record: Path, verb: str) -> dict:
    """The saved facts about the notebook that `make VERB` pushed; a broken record is to be deleted, not its runs."""
    if not record.is_file():
        competition = record.parent.name
        raise UserError(f"--fetch: no notebook of {competition} was pushed from here: make {verb} COMP={competition}")
    return read_json(record, "kernel", "version", again=f"delete {record} and push the notebook again")


def name_of(competition: str, *purpose: str) -> str:
    """The name of the competition's notebook for a purpose, in the form that Kaggle itself gives to a title."""
    return "-".join(("kit", re.sub("[^a-z0-9]+", "-", competition.lower())[:LONGEST].strip("-"), *purpose))


def username(site: Site) -> str:
    """The account's name, with which the address of each of its notebooks starts."""
    answer = kaggle(site.account, "config", "view")
    found = re.search(r"^- username: (\S+)$", answer.out, re.MULTILINE)
    if answer.status != 0 or not found or found.group(1) == "None":
        raise site.explained(answer, "asking for the account's name")
    return found.group(1)


@dataclass(frozen=True)
class Notebook:
    """A notebook at Kaggle, OWNER/NAME, that `make VERB` pushes; `poll` is the first pause of a wait, in seconds."""

    site: Site
    verb: str
    reference: str
    poll: float

    @property
    def name(self) -> str:
        return self.reference.partition("/")[2]

    @property
    def page(self) -> str:
        return f"https://www.kaggle.com/code/{self.reference}"

    def push_files(self, files: Mapping[str, Path], folder: Path) -> str:
        """Upload the files for the notebook as the private data set OWNER/NAME-code; returns their version.

        Waits until the notebook can use them. `folder` is a temporary one, also that of `push`.
        """
        site, reference, home = self.site, f"{self.reference}-code", folder / "code"
        home.mkdir()
        version = pack(files, home / ARCHIVE)
        size = (home / ARCHIVE).stat().st_size
        facts = {"id": reference, "title": f"{self.name} code", "licenses": [{"name": "other"}]}
        write_json(home / "dataset-metadata.json", facts)
        what = f"uploading the code as {reference}"
        known = kaggle(site.account, "datasets", "status", reference)
        if known.status != 0 and not re.search(r"\b40[34]\b|Not Found|Forbidden|denied", known.text):
            raise site.explained(known, what)
        command = ["create"] if known.status != 0 else ["version", "-m", f"version {version}"]
        answer = site.told(what, "datasets", *command, "-p", str(home))
        if "is being created" not in answer.out:  # the program exits 0 even so
            raise UserError(f"{what}: {_error_line(answer)}. See https://www.kaggle.com/datasets/{reference}")
        print(f"code: private data set {reference}, version {version}, {size / 1e3:,.0f} kB")

        def is_ready() -> bool:
            answer = kaggle(site.account, "datasets", "status", reference)
            return answer.status == 0 and "ready" in answer.out.lower()

        if not until(is_ready, f"Kaggle unpacks {reference}", READY_SECONDS, min(self.poll, 5.0)):
            raise UserError(
                f"{reference} is not ready after {READY_SECONDS} s: look at "
                f"https://www.kaggle.com/datasets/{reference}, then repeat the same command"
            )
        return version

    def push(self, text: str, metadata: dict, seconds: float, folder: Path) -> dict:
        """Push the notebook for a session of at most `seconds` on a GPU; returns its reference and version.

        Raises UserError if Kaggle does not accept it.
        """
        site, home = self.site, folder / "notebook"
        home.mkdir()
        (home / f"{self.name}.ipynb").write_text(text)
        facts = {
            "id": self.reference,
            "title": self.name,
            "code_file": f"{self.name}.ipynb",
            "language": "python",
            "kernel_type": "notebook",
            "is_private": "true",
            "enable_gpu": "true",
            "dataset_sources": [f"{self.reference}-code"],
            "competition_sources": [site.source.slug],
        }
        write_json(home / "kernel-metadata.json", facts | metadata)
        what = f"pushing the notebook {self.reference}"
        try:
            answer = site.told(what, "kernels", "push", "-p", str(home), "-t", str(int(seconds)))
        except Transient as failure:
            reason = str(failure).partition(": repeat the same command")[0]
            raise UserError(
                f"{reason}. Kaggle may have accepted it anyway, and a second push runs it a second time: look at "
                f"{self.page} first, and if no new version runs there, make {self.verb} COMP={site.competition} again"
            ) from failure
        pushed = re.search(r"Kernel version (\d+) successfully pushed", answer.out)
        if not pushed or "not valid" in answer.out:  # the program exits 0 in both cases
            problem = _error_line(answer)
            rules = f" Accept the rules at {site.source.page}/rules" if "competition sources" in problem else ""
            raise UserError(f"{what}: {problem}.{rules} See {self.page}")
        return {"kernel": self.reference, "version": int(pushed.group(1))}

    def follow(self, wait: float, outage: float) -> None:
        """Wait until the notebook has ended successfully; Kaggle may be unreachable for up to `outage` seconds.

        Raises UserError with Kaggle's reason and the end of the log if the notebook failed.
        """
        site, reference, said = self.site, self.reference, ""

        def look() -> str | None:
            nonlocal said
            answer = site.told(f"asking for the notebook {reference}", "kernels", "status", reference)
            found = re.search(r'has status "(?:KernelWorkerStatus\.)?(\w+)"', answer.out)
            failure = re.search(r'Failure message: "(.*)"', answer.out)
            said = failure.group(1) if failure else ""
            return found.group(1) if found and found.group(1) in ENDED else None

        state = until(look, f"running {self.page}", wait, self.poll, outage)
        if state is None:
            print(f"the notebook still runs after {wait:,.0f} s")
            raise UserError(
                f"{self.page} is not ready: fetch it later with make {self.verb} COMP={site.competition} ARGS=--fetch"
            )
        if state != "COMPLETE":
            last = site.account.hide(end_of_log(site, reference))
            raise UserError(f"the notebook ended with {state} ({said or 'no reason given'}; {last}): see {self.page}")


def _error_line(answer: Answer) -> str:
    lines = [line.strip() for line in answer.out.splitlines() if re.search(r"error|not valid|unsuccessful", line, re.I)]
    return (lines[0] if lines else answer.last_line).rstrip(".")


def submit_version(site: Site, facts: dict, poll: float) -> None:
    """Submit the version of the notebook that `facts` names, unless it was submitted before; waits for the score."""
    table = Path(facts["table"])
    message = f"{facts['kernel']} version {facts['version']}, code {facts['code']}"
    row = Candidate(table, sidecar(table)).row(f"notebook {facts['kernel']}/{facts['version']}", message)
    arguments = ["-k", facts["kernel"], "-v", str(facts["version"]), "-f", "submission.csv"]
    if before := deliver(site, arguments, row, "commit", SCORE_SECONDS, poll):
        print(
            f"{row.commit} was submitted before ({before.time}, {before.status} {before.public or '-'}): make board "
            f"COMP={site.competition} shows its score. To submit it once more: {site.source.page}/submit"
        )
