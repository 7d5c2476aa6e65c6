"""The kaggle program as a watched subprocess: it can hang for ever, and exit 0 on a failure."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import IO

from common.errors import UserError
from common.kaggle.credentials import Account
from common.kaggle.source import Source

# A program that neither writes nor says anything for so long is stopped. Longer than the longest pause (33 s) between
# the kaggle program's own five attempts at a download, short enough to tell within a minute that there is no network.
PATIENCE_SECONDS = 45.0
# Not .venv/bin/kaggle, whose first line names the folder of its installation: a checkout may have been moved since.
KAGGLE = (sys.executable, "-P", "-m", "kaggle")


@dataclass(frozen=True)
class Answer:
    """What the kaggle program said, without secrets."""

    status: int
    out: str
    err: str
    unhidden: str = field(default="", repr=False)  # stdout as it came: to be read by the kit, never to be shown

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


class Silent(Transient):
    """The program made no progress and was stopped."""


@contextmanager
def go_on_with(command: str) -> Iterator[None]:
    """For what follows a step that must not be taken twice: errors and Ctrl-C name `command`, not the same command."""
    try:
        yield
    except UserError as error:
        text = re.sub("repeat the (same )?command", f"go on with {command}", str(error))
        raise type(error)(re.sub("Repeat the (same )?command", f"Go on with {command}", text)) from error
    except KeyboardInterrupt:
        print(f"stopped: go on with {command}", file=sys.stderr)
        raise SystemExit(130) from None  # the status of the command line for Ctrl-C


def patience() -> float:
    """Seconds without progress until a program is stopped: KIT_PATIENCE, for lines that are slower than most."""
    given = os.environ.get("KIT_PATIENCE", "")
    try:
        return float(given) if given else PATIENCE_SECONDS
    except ValueError as error:
        raise UserError(f"KIT_PATIENCE={given}: expected a number of seconds, for example KIT_PATIENCE=120") from error


def kaggle(
    account: Account,
    *arguments: str,
    measure: Callable[[], int] | None = None,
    stop: Callable[[], UserError | None] | None = None,
    lock: IO | None = None,
) -> Answer:
    """Run `kaggle ARGUMENTS` as `watched` does; raises UserError when it is not installed."""
    if find_spec("kaggle") is None:
        raise UserError("kaggle is not installed: .venv/bin/python -m pip install -r requirements.txt")
    # -W: a hint on stdout that a newer version exists would mix with the answers
    return watched([*KAGGLE, "-W", *arguments], account, measure=measure, stop=stop, lock=lock)


def watched(
    command: Sequence[str],
    account: Account,
    *,
    measure: Callable[[], int] | None = None,
    stop: Callable[[], UserError | None] | None = None,
    lock: IO | None = None,
) -> Answer:
    """Run a program until it ends, is silent for too long (Silent), or `stop()` returns an error (raised).

    Progress is a change of `measure()`, for example the size of a download, output where there is no measure, or
    computing: on a busy machine the start alone takes seconds.
    The program holds the file `lock` too, and its number is written there: should the kit be killed, the lock lasts as
    long as the program, and `end_orphan` can end it.
    """
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=account.environment,
        pass_fds=[lock.fileno()] if lock else [],
        start_new_session=True,  # Ctrl-C reaches the kit alone, which then stops the program and tidies up
    )
    if lock:
        lock.truncate(0)
        lock.write(f"{os.getpid()} {child.pid}\n")
        lock.flush()
    out, err = _Reader(child.stdout), _Reader(child.stderr)
    limit, last, since = patience(), None, time.monotonic()
    try:
        while True:
            out.finished.wait(timeout=0.1)  # returns at once when the program ends, unlike child.wait
            try:
                child.wait(timeout=0.01)
                break
            except subprocess.TimeoutExpired:
                pass
            if stop is not None and (error := stop()):
                raise error
            now = (measure() if measure is not None else out.count + err.count, _ticks(child.pid))
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > limit:
                raise Silent(
                    f"no answer from Kaggle for {limit:.0f} s: check the network (and HTTPS_PROXY where there is a "
                    "proxy), then repeat the same command; on a slow line set KIT_PATIENCE=300"
                )
    finally:
        _end(child)
    return Answer(child.returncode, account.hide(out.text()), account.hide(err.text()), out.text())


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
        if child.poll() is not None:
            return
        try:
            os.killpg(child.pid, number)
            child.wait(timeout=3)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue


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


class _Reader(threading.Thread):
    """Collects a pipe, so that it never fills up."""

    def __init__(self, pipe: IO[bytes]):
        super().__init__(daemon=True)
        self.pipe, self.parts, self.count = pipe, [], 0
        self.finished = threading.Event()
        self.start()

    def run(self) -> None:
        while chunk := self.pipe.read1(1 << 16):  # not by lines: a progress bar has none
            self.parts.append(chunk)
            self.count += len(chunk)
        self.finished.set()

    def text(self) -> str:
        self.join(timeout=5)  # a grandchild that keeps the pipe open must not hold the kit up
        return b"".join(self.parts).decode("utf-8", "replace")


def explained(answer: Answer, account: Account, source: Source, what: str) -> UserError:
    """The failure as one line with the value, the expectation and the next step."""
    text = answer.text
    said = answer.last_line

    def found(*patterns: str) -> bool:
        return any(re.search(pattern, text, re.IGNORECASE | re.MULTILINE) for pattern in patterns)

    def has_status(number: str) -> bool:
        """As the program writes it; a mere number may count the rows of a submission."""
        return found(rf"\b{number} (Client|Server) Error", rf"^\({number}\)")

    if has_status("401") or found("Authentication required", "Unauthorized", "Invalid credentials"):
        shadow = (
            "; it also hides KAGGLE_USERNAME and KAGGLE_KEY: unset KAGGLE_API_TOKEN to use those"
            if account.kind == "token" and account.environment.get("KAGGLE_KEY")
            else ""
        )
        return UserError(
            f"{what}: Kaggle does not accept {account.where} (401){shadow}. Create a new token at "
            "https://www.kaggle.com/settings/api, then repeat the same command"
        )
    if found(r"accept\b.*\brules", r"rules\b.*\baccept", "competitions.participate"):
        return UserError(
            f"{what}: Kaggle says {said!r}. Open {source.rules_page} in a browser, accept the rules as the owner of "
            f"{account.where} (for a closed competition: Late Submission), then repeat the same command"
        )
    if found("No space left on device", r"Errno 28\b", "Disk quota exceeded"):
        return UserError(f"{what}: the disk is full: free some space, then repeat the same command; it goes on there")
    if found("Max retries exceeded", "Name or service not known", "NameResolution", "Connection refused", "ProxyError",
             "Connection aborted", "RemoteDisconnected", "Network is unreachable", "Connection reset", "timed out",
             "Failed to resolve", "IncompleteRead"):  # fmt: skip
        return Transient(
            f"{what}: Kaggle cannot be reached ({_shortened(said)}): check the network, and HTTPS_PROXY where there "
            "is a proxy, then repeat the same command"
        )
    if has_status("429") or found("Too Many Requests"):
        return Transient(f"{what}: Kaggle asks to slow down (429): repeat the same command in some minutes")
    if has_status(r"5\d\d") or found(r"Internal Server Error|Bad Gateway|Service Unavailable|Gateway Time-?out"):
        return Transient(f"{what}: Kaggle itself fails ({said}): repeat the same command in some minutes")
    if has_status("403") or found("Forbidden", "Permission"):
        return UserError(
            f"{what}: Kaggle refuses it ({said}). Most often the rules are not accepted: open {source.rules_page} in "
            f"a browser as the owner of {account.where}, then repeat the same command"
        )
    if has_status("404") or found("Not Found"):
        return UserError(
            f"{what}: Kaggle does not find it ({said}): check that {source.page} opens in a browser, then repeat the "
            "same command"
        )
    return UserError(f"{what}: {said}. Repeat the same command; {source.page} shows whether the competition is open")


def _shortened(line: str) -> str:
    """The reason inside requests' nested messages, without object addresses."""
    reason = re.search(r"(Failed to resolve '[^']+'|Name or service not known|Connection refused|"
                       r"Remote end closed connection without response|Network is unreachable|"
                       r"Cannot connect to proxy|timed out|Connection reset by peer)", line)  # fmt: skip
    return reason.group(1) if reason else line[:150]
