"""Run Python programs as forks of a process that has already loaded their libraries, which saves most start-up time.

Apart from that a fork is like a new process: it has its own session, the given arguments, environment, working folder
and streams, and it loads its own code from its own path.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import IO, Any, NoReturn


class Forks:
    """Replaces the module subprocess for commands [sys.executable, optionally "-P", "-m" and a module, or a file, ...].

    It has `run`, and `Popen` with the methods that the kit uses.
    """

    DEVNULL, TimeoutExpired = subprocess.DEVNULL, subprocess.TimeoutExpired

    def __init__(self, line: socket.socket):
        self.line = line

    def Popen(
        self,
        command: Sequence[str],
        *,
        stdout: IO,
        stderr: IO,
        env: Mapping[str, str],
        cwd: Any = ".",
        stdin: int = subprocess.DEVNULL,
        pass_fds: Sequence[int] = (),
        start_new_session: bool = True,
    ) -> "Fork":
        assert command[0] == sys.executable and stdin == subprocess.DEVNULL and start_new_session, command
        folder = os.path.abspath(cwd)
        facts = {"words": [str(word) for word in command[1:]], "environment": dict(env), "folder": folder}
        return Fork(self.line, command, facts, [stdout.fileno(), stderr.fileno(), *pass_fds])

    def run(self, command: Sequence[str], *, cwd: Any, env: Mapping[str, str], timeout: float):
        """Like subprocess.run(..., capture_output=True, text=True)."""
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            child = self.Popen(command, stdout=out, stderr=err, env=env, cwd=cwd)
            try:
                status = child.wait(timeout)
            finally:
                child.kill()
            out.seek(0)
            err.seek(0)
            return subprocess.CompletedProcess(command, status, out.read(), err.read())


class Fork:
    """A forked program, with the methods of subprocess.Popen that the kit uses."""

    def __init__(self, line: socket.socket, command: Sequence[str], facts: dict, streams: Sequence[int]):
        self.args, self.returncode = command, None
        self.answer, theirs = socket.socketpair()
        with theirs, tempfile.TemporaryFile("w+") as request:
            json.dump(facts, request)
            request.seek(0)
            socket.send_fds(line, [b"!"], [request.fileno(), theirs.fileno(), *streams])
            self.pid = self._told()

    def _told(self) -> int:
        return struct.unpack("i", self.answer.recv(4, socket.MSG_WAITALL))[0]

    def poll(self) -> int | None:
        if self.returncode is None and select.select([self.answer], [], [], 0)[0]:
            self.returncode = self._told()
            self.answer.close()
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        if self.returncode is None and not select.select([self.answer], [], [], timeout)[0]:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.poll()

    def kill(self) -> None:
        if self.poll() is None:
            with suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)


@contextmanager
def forks(*modules: str) -> Iterator[Forks]:
    """Yield a Forks with `modules` imported, whose import must not read the environment or the working folder."""
    ours, theirs = socket.socketpair()
    with theirs:
        server = subprocess.Popen(
            [sys.executable, "-P", __file__, str(theirs.fileno()), *modules],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
            pass_fds=[theirs.fileno()],
            start_new_session=True,
        )
    with ours:
        yield Forks(ours)
    server.wait(timeout=60)


# The code below runs in the process that forks.


def forked(line: socket.socket) -> list[str]:
    """Fork for every request on the socket `line`; returns only in the forks, with the program's arguments."""
    answers: dict[int, socket.socket] = {}
    while True:
        if select.select([line], [], [], 0.005 if answers else None)[0]:
            _, streams, _, _ = socket.recv_fds(line, 1, 16)
            if not streams:
                sys.exit()
            if (child := os.fork()) == 0:
                return become(*streams)
            request, answer, *streams = streams
            answers[child] = socket.socket(fileno=answer)
            for stream in (request, *streams):
                os.close(stream)
        while answers and (ended := os.waitpid(-1, os.WNOHANG))[0]:
            with answers.pop(ended[0]) as answer:
                answer.send(struct.pack("i", os.waitstatus_to_exitcode(ended[1])))


def become(request: int, answer: int, out: int, err: int, *kept: int) -> list[str]:
    """Turn this process into the requested one and return its arguments; `kept` stay open, like Popen's pass_fds."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.dup2(out, 1)
    os.dup2(err, 2)
    with open(request) as stream:
        given = json.load(stream)
    os.environ.clear()
    os.environ.update(given["environment"])
    os.chdir(given["folder"])
    os.write(answer, struct.pack("i", os.getpid()))
    for own in (answer, out, err):
        os.close(own)
    return given["words"]


def main(words: list[str]) -> None:
    """Run the program as the interpreter would; `words` are its arguments after sys.executable."""
    path = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    if words[0] == "-P":
        words = words[1:]
    else:
        path = [os.getcwd() if words[0] == "-m" else os.path.dirname(words[0]), *path]
    sys.path[:0] = path
    if words[0] == "-m":
        sys.argv = words[1:]
        runpy.run_module(words[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = words
        runpy.run_path(words[0], run_name="__main__")


def end(code: object) -> NoReturn:
    """Exit as the interpreter does, but without unloading the libraries, which would copy their memory."""
    if not isinstance(code, int | None):
        print(code, file=sys.stderr)
        code = 1
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit((code or 0) & 0xFF)


if __name__ == "__main__":
    for name in sys.argv[2:]:
        __import__(name)
    gc.freeze()  # keep the loaded objects out of garbage collection, which would copy their memory in every fork
    with socket.socket(fileno=int(sys.argv[1])) as requests:
        asked = forked(requests)
    try:
        main(asked)
        code = None
    except SystemExit as exit:
        code = exit.code
    end(code)  # the interpreter handles any other exception
