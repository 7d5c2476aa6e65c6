"""Run the kaggle program as a watched subprocess, because it can hang forever and exit 0 after a failure."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

from common.errors import UserError
from common.files import number_in
from common.kaggle.credentials import Account, find
from common.kaggle.source import Source
from common.progress import Progress

PATIENCE_SECONDS = 45.0  # longer than the longest pause (33 s) between the program's own five attempts at a download
# Not .venv/bin/kaggle: its first line holds the path of the .venv, which is wrong once the checkout was moved.
KAGGLE = (sys.executable, "-P", "-m", "kaggle")
ASKED = Path(__file__).with_name("asked.py")
UNREACHABLE = (  # requests nests its messages: the last match is the reason
    r"Max retries exceeded|NameResolution|ProxyError|Connection aborted|RemoteDisconnected|IncompleteRead|"
    r"Failed to resolve '[^']+'|Name or service not known|Cannot connect to proxy|Connection (?:refused|reset)|"
    r"Remote end closed connection without response|Network is unreachable|timed out"
)


@dataclass(frozen=True)
class Answer:
    """Exit status and output of the kaggle program, without secrets."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"

    @property
    def last_line(self) -> str:
        """The most informative line: the last one of stderr, or of stdout when stderr is empty."""
        lines = [line.strip() for line in (self.err.strip() or self.out.strip()).splitlines()]
        lines = [line for line in lines if line and not re.match(r"\d+%\|", line)]
        return lines[-1][:300] if lines else f"no output, exit status {self.status}"


class Transient(UserError):
    """A failure that may pass by itself, so a waiting loop tries again."""


@contextmanager
def go_on_with(command: str) -> Iterator[None]:
    """Make errors and Ctrl-C advise `command`, not the same command: for code after a step that must not run twice."""
    try:
        yield
    except UserError as error:
        again = "([Rr])epeat the (same )?command"
        raise type(error)(re.sub(again, lambda m: f"{'Gg'[m[1] == 'r']}o on with {command}", str(error))) from error
    except KeyboardInterrupt:
        print(f"stopped: go on with {command}", file=sys.stderr)
        raise SystemExit(130) from None  # the status of the command line for Ctrl-C


def until(look: Callable[[], Any], label: str, wait: float, poll: float, outage: float = math.inf) -> Any:
    """Call `look` until its result is true and return that result, or None after `wait` seconds.

    `poll` is the first pause in seconds. A Transient error of `look` is raised only when such errors last for `outage`
    seconds without a break, or when the last call still fails.
    """
    start = answered = time.monotonic()
    with Progress(label, int(wait), "s") as progress:
        while True:
            failure = None
            try:
                if found := look():
                    return found
                answered = time.monotonic()
            except Transient as error:
                failure = error
            now = time.monotonic()
            is_last = now - start + poll > wait
            if failure is not None and (is_last or now - answered >= outage):
                raise failure
            if is_last:
                return None
            progress.update(int(now - start), str(failure or ""))
            time.sleep(poll)
            poll = min(1.3 * poll, 60)


def patience() -> float:
    """Seconds without progress after which a program is stopped; KIT_PATIENCE raises them for slow connections."""
    given = os.environ.get("KIT_PATIENCE") or PATIENCE_SECONDS
    seconds = number_in(given)
    if seconds is None or not 0 < seconds < 1e6:
        raise UserError(f"KIT_PATIENCE={given}: expected a number of seconds, for example KIT_PATIENCE=120")
    return seconds


def kaggle(account: Account, *arguments: str, **watching: Any) -> Answer:
    """Run `kaggle ARGUMENTS` as `watched` does; raises UserError when it is not installed."""
    if find_spec("kaggle") is None:
        raise UserError("kaggle is not installed: .venv/bin/python -m pip install -r requirements.txt")
    # -W: no hint on stdout that a newer version exists, as it would mix with the answers
    return watched([*KAGGLE, "-W", *arguments], account, **watching)


def watched(
    command: Sequence[str],
    account: Account,
    *,
    measure: Callable[[], int] | None = None,
    lock: IO | None = None,
) -> Answer:
    """Run a program until it ends, makes no progress for too long (raises Transient), or `measure()` raises.

    Progress is a change of `measure()` (by default the size of the output), or processor time: on a busy machine the
    start alone takes seconds. The file `lock` stays open in the program too and holds its process id, so that
    `end_orphan` can end the program after the kit was killed.
    """
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=account.environment,
            pass_fds=[lock.fileno()] if lock else [],
            start_new_session=True,  # Ctrl-C reaches the kit alone, which then stops the program and tidies up
        )
        if lock:
            lock.truncate(0)
            lock.write(f"{os.getpid()} {child.pid}\n")
            lock.flush()
        measure = measure or (lambda: sum(os.fstat(stream.fileno()).st_size for stream in (out, err)))
        limit, last, since = patience(), None, time.monotonic()
        try:
            while child.poll() is None:
                if (now := (measure(), _ticks(child.pid))) != last:
                    last, since = now, time.monotonic()
                elif time.monotonic() - since > limit:
                    raise Transient(
                        f"no answer from Kaggle for {limit:.0f} s: check the network (and HTTPS_PROXY where there is "
                        "a proxy), then repeat the same command; on a slow line set KIT_PATIENCE=300"
                    )
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.1)
        finally:
            _end(child)
        for stream in (out, err):
            stream.seek(0)
        said = (account.hide(stream.read().decode("utf-8", "replace")) for stream in (out, err))
        return Answer(child.returncode, *said)


def _ticks(process: int) -> str:
    """Processor time of a process so far; "" if the system does not report it."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return f"{fields[11]} {fields[12]}"
    except (OSError, IndexError):
        return ""


def _end(child: subprocess.Popen) -> None:
    """Stop the program and its children, first with SIGTERM so that a download keeps its resume marker."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(timeout=3)


def end_orphan(lock: Path) -> bool:
    """End the program that holds `lock` if the kit that started it is dead; returns whether it ended one."""
    try:
        kit, program = (int(word) for word in lock.read_text().split())
        if Path(f"/proc/{kit}").exists() or b"kaggle" not in Path(f"/proc/{program}/cmdline").read_bytes():
            return False
        os.killpg(program, signal.SIGTERM)
    except (OSError, ValueError):
        return False
    time.sleep(1)
    return True


@dataclass(frozen=True)
class Site:
    """A competition's pages on Kaggle as an account sees them; `competition` is the name of its folder here."""

    competition: str
    source: Source
    account: Account

    @staticmethod
    def announced(competition: str, source: Source) -> "Site":
        """The site with the account that `find` returns; prints which account it is."""
        site = Site(competition, source, find())
        print(f"Kaggle account: {site.account.where}")
        return site

    def told(self, what: str, *arguments: str) -> Answer:
        """Run `kaggle ARGUMENTS`; raises UserError (Transient if it may pass) with the reason why `what` failed."""
        try:
            answer = kaggle(self.account, *arguments)
        except Transient as error:
            raise Transient(f"{what}: {error}") from error
        if answer.status != 0:
            raise self.explained(answer, what)
        return answer

    def asked(self, what: str, **watching: Any) -> Any:
        """The answer of asked.py to `submissions` or `files`; raises UserError when Kaggle fails."""
        answer = watched([sys.executable, "-P", str(ASKED), what, self.source.slug], self.account, **watching)
        if answer.status != 0:
            raise self.explained(answer, f"listing the {what} of {self.source.slug}")
        return json.loads(answer.out.splitlines()[-1])  # importing the kaggle library may print lines above it

    def explained(self, answer: Answer, what: str) -> UserError:
        """The failure as one line with the value, the expectation and the next step."""
        account, source, said = self.account, self.source, answer.last_line
        where, rules = account.where, f"{source.page}/rules"
        reason = ([said[:150]] + re.findall(UNREACHABLE, said))[-1]
        hides = all(account.environment.get(name) for name in ("KAGGLE_API_TOKEN", "KAGGLE_KEY"))
        shadow = "; it also hides KAGGLE_USERNAME and KAGGLE_KEY: unset KAGGLE_API_TOKEN to use those" if hides else ""
        # Only a status as the program or asked.py writes it: a bare number may be a count of rows.
        text = re.sub(r"\b(\d{3}) (Client|Server) Error|^\((\d{3})\)", r"HTTP\1\3", answer.text, flags=re.M)
        cases = (
            ("HTTP401|Authentication required|Unauthorized|Invalid credentials", UserError,
             f"Kaggle does not accept {where} (401){shadow}. Create a new token at "
             "https://www.kaggle.com/settings/api, then repeat the same command"),
            (r"accepts submissions from (notebooks|kernels)", UserError,
             f"{source.page} takes submissions only from notebooks: make notebook, with the same COMP= and RUN= and "
             "ARGS=--submit, pushes one that predicts there, and submits it"),
            (r"accept\b.*\brules|rules\b.*\baccept|competitions.participate", UserError,
             f"Kaggle says {said!r}. Open {rules} in a browser, accept the rules as the owner of {where} (for a closed "
             "competition: Late Submission), then repeat the same command"),
            (r"No space left on device|Errno 28\b|Disk quota exceeded", UserError,
             "the disk is full: free some space, then repeat the same command; it goes on from there"),
            (UNREACHABLE, Transient,
             f"Kaggle cannot be reached ({reason}): check the network, and "
             "HTTPS_PROXY where there is a proxy, then repeat the same command"),
            ("HTTP429|Too Many Requests", Transient,
             "Kaggle asks to slow down (429): repeat the same command in some minutes"),
            (r"HTTP5\d\d|Internal Server Error|Bad Gateway|Service Unavailable|Gateway Time-?out", Transient,
             f"Kaggle itself fails ({said}): repeat the same command in some minutes"),
            ("HTTP403|Forbidden|Permission", UserError,
             f"Kaggle refuses it ({said}). Most often the rules are not accepted: open {rules} in a browser as the "
             f"owner of {where}, then repeat the same command"),
            ("HTTP404|Not Found", UserError,
             f"Kaggle does not find it ({said}): check that {source.page} opens in a browser, then repeat the same "
             "command"),
            ("", UserError,
             f"{said}. Repeat the same command; {source.page} shows whether the competition is open"),
        )  # fmt: skip
        kind, told = next((kind, told) for pattern, kind, told in cases if re.search(pattern, text, re.I | re.M))
        return kind(f"{what}: {told}")
