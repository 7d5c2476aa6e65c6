"""Progress of long work: a bar on a terminal, and otherwise a plain line now and then."""

import sys
from types import SimpleNamespace

from common import progress as module
from common.progress import Progress, progress, say


def test_everything_is_passed_on_and_told_in_plain_lines(capsys, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.0)
    assert list(progress(range(3), "reading", 3)) == [0, 1, 2]
    out = capsys.readouterr().out
    assert "reading: 1/3 batches, " in out and "s to go" in out and "3/3" not in out
    assert list(progress(range(3), "reading", 3, show=False)) == [0, 1, 2]
    assert capsys.readouterr().out == ""


def test_a_total_that_is_not_known_at_first(capsys, monkeypatch):
    monkeypatch.setattr(module, "HEARTBEAT_SECONDS", 0.0)
    with Progress("downloading x", unit="MB") as shown:
        shown.update(5)
        shown.update(1200, "Kaggle fails now", total=2400)
    first, second = capsys.readouterr().out.splitlines()
    assert first == "downloading x: 5 MB"
    assert second.startswith("downloading x: 1200/2400 MB, ") and second.endswith("s to go, Kaggle fails now")


def test_a_terminal_gets_a_bar_and_lines_above_it(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    clock = iter(range(100))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: 10 * next(clock)))
    with Progress("downloading x", unit="MB") as shown:
        shown.update(5, "slowly", total=10)
        say("a line")
    done = capsys.readouterr()
    assert "downloading x" in done.err and "5/10" in done.err and "slowly" in done.err and "a line" in done.out


def test_without_a_stderr_lines_go_to_stdout(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)  # as Python sets it after 2>&-
    with Progress("downloading x", unit="MB") as shown:
        shown.update(10, total=10)
        say("a line")
    assert capsys.readouterr().out == "a line\n"
