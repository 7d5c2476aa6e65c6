"""Files are replaced as a whole, drafts of killed writers are removed, and tables hold no formulas."""

import csv
import errno
import os
import resource
import select
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from common import files
from common.errors import UserError

ROOT = Path(files.__file__).parents[1]


def limited(size: int):
    """Make the operating system refuse to write more than `size` bytes into a file."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("writer", [files.write_npy, lambda path, array: files.write_with(path, array.tofile)])
def test_a_disk_that_is_full_for_numpy_keeps_the_old_array(tmp_path, writer):
    files.write_npy(tmp_path / "a.npy", np.arange(3))
    before, free = (tmp_path / "a.npy").read_bytes(), limited(5000)
    try:
        with pytest.raises(UserError, match="a.npy could not be written .No space left on device.*repeat the same"):
            writer(tmp_path / "a.npy", np.zeros(100_000))
    finally:
        free()
    assert (tmp_path / "a.npy").read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_arrays_are_read_back(tmp_path):
    for array in (np.arange(6).reshape(2, 3), np.zeros(0, np.float32), np.asfortranarray(np.ones((3, 2)))):
        files.write_npy(tmp_path / "a.npy", array)
        assert np.array_equal(np.load(tmp_path / "a.npy"), array)


def test_drafts_of_killed_writers_go_and_those_of_living_ones_stay(tmp_path):
    code = (
        "import sys; from pathlib import Path; from common.files import replacing\n"
        "with replacing(Path(sys.argv[1])) as stream: print('open', flush=True); sys.stdin.read()"
    )
    line = [sys.executable, "-c", code, str(tmp_path / "a[1].json")]
    child = subprocess.Popen(
        line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env={"PYTHONPATH": str(ROOT), "PATH": ""}
    )
    assert child.stdout.readline() == b"open\n"
    draft = tmp_path / f".a[1].json.{child.pid}.part"
    files.write_text(tmp_path / "a[1].json", "{}")
    assert draft.exists()
    child.send_signal(signal.SIGKILL)
    child.wait()
    assert draft.exists()
    files.write_text(tmp_path / "a[1].json", "{}")
    assert [file.name for file in tmp_path.iterdir()] == ["a[1].json"]


def test_a_draft_that_another_writer_took_for_a_dead_one_before_it_was_locked_is_opened_again(tmp_path, monkeypatch):
    flock, taken = files.fcntl.flock, []

    def deleted_first(stream, how):
        if not taken:
            taken.append(Path(stream.name))
            taken[0].unlink()
        flock(stream, how)

    monkeypatch.setattr(files.fcntl, "flock", deleted_first)
    files.write_text(tmp_path / "a.json", "{}")
    assert taken and [file.name for file in tmp_path.iterdir()] == ["a.json"]
    assert (tmp_path / "a.json").read_text() == "{}"


def test_a_draft_that_has_become_the_file_is_not_a_dead_one(tmp_path, monkeypatch):
    """Before the cleaner has locked the draft, its writer may finish it and begin another one of the same name."""
    flock, draft = files.fcntl.flock, tmp_path / ".a.json.4711.part"
    draft.write_text("first")

    def finished_first(stream, how):
        if Path(stream.name) == draft and not (tmp_path / "a.json").exists():
            os.replace(draft, tmp_path / "a.json")
            draft.write_text("second")
        flock(stream, how)

    monkeypatch.setattr(files.fcntl, "flock", finished_first)
    files._remove_dead_drafts(tmp_path / "a.json")
    assert draft.read_text() == "second"


@pytest.mark.parametrize("write", [lambda path: files.write_text(path, ""), files.locked])
def test_a_folder_that_is_a_file_or_a_link_to_a_disk_that_is_gone_is_one_line(tmp_path, write):
    (tmp_path / "runs").symlink_to(tmp_path / "unplugged")
    (tmp_path / "submissions").write_text("")
    for path in (tmp_path / "runs/lock", tmp_path / "submissions/toy/one.csv"):
        with pytest.raises(UserError, match="cannot be a folder: .* a file or a link that leads nowhere"):
            write(path)


def test_room_is_checked_before_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setattr(files.shutil, "disk_usage", lambda folder: SimpleNamespace(free=2_000_000_000))
    files.require_room(tmp_path / "not" / "there" / "yet.npy", 1_500_000_000, "predictions")
    with pytest.raises(UserError, match=f"predictions will take 3.00 GB of {tmp_path}, where 2.00 GB are free"):
        files.require_room(tmp_path / "oof.npy", 3e9, "predictions")


CELLS = [
    "=1+1",
    "+a",
    "-b",
    "@sum",
    "\t=1",
    "'=1",
    "''=1",
    "'a",
    "-1",
    "+2.5e-3",
    "-1.5.2",
    "a=b",
    "",
    "größe",
    "--best",
]


def test_no_cell_is_a_formula_and_all_are_read_back(tmp_path):
    files.write_csv(tmp_path / "a.csv", ("id", "fold"), [(cell, -1) for cell in CELLS])
    with open(tmp_path / "a.csv", newline="", encoding="utf-8") as stream:
        rows = list(csv.reader(stream))[1:]
    assert [files.read_cell(cell) for cell, _ in rows] == CELLS and {fold for _, fold in rows} == {"-1"}
    for cell, _ in rows:
        assert not cell.startswith(("=", "@", "\t", "\r")) and (cell[:1] not in "+-" or not cell or float(cell))


@pytest.mark.parametrize("text", ['{"half', "[1]", "null", '{"a": 1}', "[" * 100_000, "\xff"])
def test_damaged_json_is_one_line(tmp_path, text):
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match="run.json cannot be read .*restore a complete copy"):
        files.read_json(tmp_path / "run.json", "data")
    (tmp_path / "run.json").write_text('{"data": 1}')
    assert files.read_json(tmp_path / "run.json", "data") == {"data": 1}


@pytest.mark.parametrize("content", [b"fold;id\n0;a\n", b"fold,id\n0,\xe4\n", b""])
def test_a_table_that_a_spreadsheet_changed_is_one_line(tmp_path, content):
    (tmp_path / "folds.csv").write_bytes(content)
    with pytest.raises(UserError, match="folds.csv cannot be read .*restore a complete copy"):
        list(files.read_table(tmp_path / "folds.csv", "fold"))
    (tmp_path / "folds.csv").write_text("\ufefffold,id\r\n0,a\r\n", encoding="utf-8")
    assert list(files.read_table(tmp_path / "folds.csv", "fold")) == [{"fold": "0", "id": "a"}]


def test_a_file_system_without_locks_is_written_to(tmp_path, monkeypatch, capsys):
    answer = errno.ENOLCK

    def flock(*_):
        raise OSError(answer, os.strerror(answer))

    monkeypatch.setattr(files.fcntl, "flock", flock)
    files.locked(tmp_path / "run" / "lock", "busy").close()
    assert "run is on a file system without locks: do not run two commands" in capsys.readouterr().out
    files.write_text(tmp_path / "run" / "a.json", "{}")
    (tmp_path / "a.part").touch()
    with files.alone_in(tmp_path, "*.part"):
        assert (tmp_path / "a.part").exists(), "another process may be writing it"
    answer = errno.EIO
    with pytest.raises(UserError, match="lock cannot be locked .*repeat the same command"):
        files.locked(tmp_path / "run" / "lock", "busy")


def test_one_process_at_a_time_is_in_a_folder(tmp_path):
    code = (
        "import sys; from pathlib import Path; from common.files import alone_in\n"
        "with alone_in(Path(sys.argv[1]), '*.part'): print('in', flush=True); sys.stdin.read()"
    )
    (tmp_path / "killed.part").mkdir()
    line = [sys.executable, "-c", code, str(tmp_path)]
    environment = {"PYTHONPATH": str(ROOT), "PATH": os.environ["PATH"]}
    one, other = (
        subprocess.Popen(line, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment)
        for _ in range(2)
    )
    if one.stdout not in select.select([one.stdout, other.stdout], [], [], 60)[0]:
        one, other = other, one
    assert one.stdout.readline() == b"in\n" and select.select([other.stdout], [], [], 0.5)[0] == []
    one.kill()
    assert other.stdout.readline() == b"in\n" and list(tmp_path.iterdir()) == []
    other.kill()
    assert {one.wait(), other.wait()} == {-signal.SIGKILL}
