"""The kaggle program as a watched subprocess: it can hang for ever, and exit 0 on a failure."""

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
from common.kaggle.credentials import Account, find
from common.kaggle.source import Source
from common.progress import Progress

PATIENCE_SECONDS = 45.0  # longer than the longest pause (33 s) between the program's own five attempts at a download
# Not .venv/bin/kaggle, whose first line names the folder of its installation: a checkout may have been moved since.
KAGGLE = (sys.executable, "-P", "-m", "kaggle")
ASKED = Path(__file__).with_name("asked.py")
UNREACHABLE = (  # of requests' nested messages the last one is the reason
    r"Max retries exceeded|NameResolution|ProxyError|Connection aborted|RemoteDisconnected|IncompleteRead|"
    r"Failed to resolve '[^']+'|Name or service not known|Cannot connect to proxy|Connection (?:refused|reset)|"
    r"Remote end closed connection without response|Network is unreachable|timed out"
)


@dataclass(frozen=True)
class Answer:
    """What the kaggle program said, without secrets."""

    status: int
    out: str
    err: str

    @property
    def text(self) -> str:
        return f"{self.out}\n{self.err}"

    @property
    def last_line(self) -> str:
        """The line that says most: the last one on stderr, or else on stdout."""
        lines = [line.strip() for line in (self.err.strip() or self.out.strip()).splitlines()]
        lines = [line for line in lines if line and not re.match(r"\d+%\|", line)]
        return lines[-1][:300] if lines else f"it said nothing, exit status {self.status}"


class Transient(UserError):
    """A failure that is over by itself: worth another look while something is waited for."""


@contextmanager
def go_on_with(command: str) -> Iterator[None]:
    """For what follows a step that must not be taken twice: errors and Ctrl-C name `command`, not the same command."""
    try:
        yield
    except UserError as error:
        again = "([Rr])epeat the (same )?command"
        raise type(error)(re.sub(again, lambda m: f"{'Gg'[m[1] == 'r']}o on with {command}", str(error))) from error
    except KeyboardInterrupt:
        print(f"stopped: go on with {command}", file=sys.stderr)
        raise SystemExit(130) from None  # the status of the command line for Ctrl-C


def until(look: Callable[[], Any], label: str, wait: float, poll: float, outage: float = math.inf) -> Any:
    """What `look` returns once that is true, None after `wait` seconds; `poll` is the first pause.

    Raises its Transient error when that lasts for `outage` seconds without a break, or until the end.
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
    """Seconds without progress until a program is stopped: KIT_PATIENCE, for lines that are slower than most."""
    given = os.environ.get("KIT_PATIENCE") or PATIENCE_SECONDS
    with suppress(ValueError):
        if 0 < float(given) < 1e6:
            return float(given)
    raise UserError(f"KIT_PATIENCE={given}: expected a number of seconds, for example KIT_PATIENCE=120")


def kaggle(account: Account, *arguments: str, **watching: Any) -> Answer:
    """Run `kaggle ARGUMENTS` as `watched` does; raises UserError when it is not installed."""
    if find_spec("kaggle") is None:
        raise UserError("kaggle is not installed: .venv/bin/python -m pip install -r requirements.txt")
    # -W: a hint on stdout that a newer version exists would mix with the answers
    return watched([*KAGGLE, "-W", *arguments], account, **watching)


def watched(
    command: Sequence[str],
    account: Account,
    *,
    measure: Callable[[], int] | None = None,
    stop: Callable[[], None] = lambda: None,
    lock: IO | None = None,
) -> Answer:
    """Run a program until it ends, is silent for too long (Transient), or `stop()` raises.

    Progress is a change of `measure()` (of its output by default), or computing: on a busy machine the start alone
    takes seconds. The program holds the file `lock` with its number too: where the kit is killed, `end_orphan` ends it.
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
                with suppress(subprocess.TimeoutExpired):
                    child.wait(timeout=0.1)
                if child.returncode is None:
                    stop()
                now = (measure(), _ticks(child.pid))
                if now != last:
                    last, since = now, time.monotonic()
                elif child.returncode is None and time.monotonic() - since > limit:
                    raise Transient(
                        f"no answer from Kaggle for {limit:.0f} s: check the network (and HTTPS_PROXY where there is "
                        "a proxy), then repeat the same command; on a slow line set KIT_PATIENCE=300"
                    )
        finally:
            _end(child)
        for stream in (out, err):
            stream.seek(0)
        said = (account.hide(stream.read().decode("utf-8", "replace")) for stream in (out, err))
        return Answer(child.returncode, *said)


def _ticks(process: int) -> str:
    """Processor time of a process so far; "" where the system does not tell."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
        return f"{fields[11]} {fields[12]}"
    except (OSError, IndexError):
        return ""


def _end(child: subprocess.Popen) -> None:
    """Stop the program and whatever it started: first politely, so that a download keeps its resume marker."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if child.poll() is None:
            with suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(child.pid, number)
                child.wait(timeout=3)


def end_orphan(lock: Path) -> bool:
    """End the program that holds `lock` when the kit that started it is dead; whether there was one."""
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
        """With the account that is found, and a line that names it."""
        site = Site(competition, source, find())
        print(f"Kaggle account: {site.account.where}")
        return site

    def told(self, what: str, *arguments: str) -> Answer:
        """Run `kaggle ARGUMENTS`; raises UserError (Transient where that may pass) that says why `what` failed."""
        try:
            answer = kaggle(self.account, *arguments)
        except Transient as error:
            raise Transient(f"{what}: {error}") from error
        if answer.status != 0:
            raise self.explained(answer, what)
        return answer

    def asked(self, what: str, **watching: Any) -> Any:
        """What asked.py finds out of the competition (`submissions` or `files`); raises UserError when Kaggle fails."""
        answer = watched([sys.executable, "-P", str(ASKED), what, self.source.slug], self.account, **watching)
        doing = f"listing the {what} of {self.source.slug}"
        if answer.status != 0:
            raise self.explained(answer, doing)
        try:
            return json.loads(answer.out.strip().splitlines()[-1])
        except (ValueError, IndexError) as error:
            said = f"{doing}: the answer cannot be read ({answer.last_line}): repeat the same command"
            raise Transient(said) from error

    def explained(self, answer: Answer, what: str) -> UserError:
        """The failure as one line with the value, the expectation and the next step."""
        account, source, said = self.account, self.source, answer.last_line
        where, rules = account.where, f"{source.page}/rules"
        reason = ([said[:150]] + re.findall(UNREACHABLE, said))[-1]
        hides = account.kind == "token" and account.environment.get("KAGGLE_KEY")
        shadow = "; it also hides KAGGLE_USERNAME and KAGGLE_KEY: unset KAGGLE_API_TOKEN to use those" if hides else ""
        # A status as the program writes it, or asked.py: a mere number may count the rows of a submission.
        text = re.sub(r"\b(\d{3}) (Client|Server) Error|^\((\d{3})\)", r"HTTP\1\3", answer.text, flags=re.M)
        cases = (
            ("HTTP401|Authentication required|Unauthorized|Invalid credentials", UserError,
             f"Kaggle does not accept {where} (401){shadow}. Create a new token at "
             "https://www.kaggle.com/settings/api, then repeat the same command"),
            (r"accepts submissions from (notebooks|kernels)", UserError,
             f"{source.page} takes submissions from notebooks alone: make notebook, with the same COMP= and RUN= and "
             "ARGS=--submit, pushes one that predicts there, and submits it"),
            (r"accept\b.*\brules|rules\b.*\baccept|competitions.participate", UserError,
             f"Kaggle says {said!r}. Open {rules} in a browser, accept the rules as the owner of {where} (for a closed "
             "competition: Late Submission), then repeat the same command"),
            (r"No space left on device|Errno 28\b|Disk quota exceeded", UserError,
             "the disk is full: free some space, then repeat the same command; it goes on there"),
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
