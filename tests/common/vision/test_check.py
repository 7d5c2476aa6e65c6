"""Unreadable images are found: a few images are all decoded, of many only those with an odd start or end."""

import os
import struct
import subprocess
import sys

import cv2
import numpy as np
import pytest

from common import progress
from common.errors import UserError
from common.vision.check import check_folder, find_bad, image_paths, unreadable
from tests.common.loading.test_workers import ROOT, descendants, is_alive, wait_until


def encoded(ending: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (140, 210, 3), np.uint8)
    return cv2.imencode(ending, pixels, [cv2.IMWRITE_JPEG_QUALITY, 95] if ending == ".jpg" else [])[1].tobytes()


@pytest.fixture
def paths(tmp_path):
    found = [tmp_path / f"{row}{'.png' if row % 3 == 0 else '.jpg'}" for row in range(30)]
    for path in found:
        path.write_bytes(encoded(path.suffix))
    return found


def test_the_folder_check_finds_every_bad_file(paths, capsys, monkeypatch):
    monkeypatch.setattr(progress, "HEARTBEAT_SECONDS", 0)
    jpeg = encoded(".jpg")
    paths[4].write_bytes(jpeg[:-500])
    paths[11].write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")  # a proper end marker, but half of the image is missing
    paths[20].unlink()
    assert [error.row for error in find_bad(paths, show=False)] == [4, 11, 20]
    assert capsys.readouterr().out == ""
    again = r"make data COMP=toy downloads the data again\)"
    with pytest.raises(UserError, match=rf"3 of 30 images cannot be read: .*4.jpg is truncated.*{again}, or.*skip"):
        check_folder(paths[:21], paths[21:], "toy")
    assert "checking: 29/30 images" in capsys.readouterr().out
    with pytest.raises(UserError, match=rf"3 of 30 .*{again}$"):  # a submission needs every test image
        check_folder(paths[:20], paths[20:], "toy")
    check_folder(paths[5:8], paths[8:11], "toy")


@pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="this system has no files in memory")
def test_a_full_disk_for_temporary_files_hides_no_damage(paths, monkeypatch):
    jpeg = encoded(".jpg")
    paths[11].write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")
    monkeypatch.setattr("tempfile.TemporaryFile", lambda: open("/dev/full", "wb"))
    assert [error.row for error in find_bad(paths, show=False)] == [11]


CHECKER = """
import os, sys, time
from common.vision import check

check.decode = lambda *_, **__: os.write(1, b"ready\\n") and time.sleep(600)  # one piece, whatever the others write
check.find_bad(sys.argv[1:], show=False)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="looks into /proc")
def test_what_checks_ends_with_its_command(paths, tmp_path):
    (tmp_path / "checker.py").write_text(CHECKER)
    command = [sys.executable, tmp_path / "checker.py", *paths]
    checker = subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ | {"PYTHONPATH": str(ROOT)})
    assert checker.stdout.readline() == b"ready\n"
    workers = descendants(checker.pid)
    checker.kill()
    checker.wait()
    checker.stdout.close()
    assert workers
    wait_until(lambda: not any(map(is_alive, workers)))


@pytest.mark.parametrize("few", [0, 100])
def test_what_cannot_be_read_is_found_by_both_ways(paths, few):
    whole = paths[0].read_bytes(), paths[1].read_bytes()
    paths[0].write_bytes(whole[0][:-300])
    paths[1].write_bytes(whole[1][: len(whole[1]) // 2])
    paths[2].write_bytes(b"")
    paths[4].write_bytes(b"<html>not found</html>")
    paths[5].unlink()
    paths[7].unlink()
    paths[7].symlink_to("gone.jpg")
    place = whole[1].find(b"\xff\xc0") + 5
    paths[8].write_bytes(whole[1][:place] + struct.pack(">HH", 65000, 65000) + whole[1][place + 4 :])
    paths[10].write_bytes(whole[1] + bytes(1000))  # complete, with trailing bytes
    paths[13].write_bytes(encoded(".bmp"))  # complete, but of another format
    found = unreadable(paths, few)
    assert [error.row for error in found] == [0, 1, 2, 4, 5, 7, 8]
    assert [error.path for error in found] == [str(paths[error.row]) for error in found]


def test_of_many_images_only_odd_ones_are_decoded(paths, monkeypatch):
    from common.vision import check

    monkeypatch.setattr(check, "find_bad", lambda paths, show: pytest.fail(f"{paths} decoded") if paths else [])
    assert unreadable(paths, few=0) == []


class Held:
    def __init__(self, **held):
        self.__dict__ |= held


def test_the_images_of_any_dataset(tmp_path):
    files = [tmp_path / "a.jpg", tmp_path / "b.PNG"]
    assert image_paths(Held(paths=files)) == files
    assert image_paths(Held(names=["x", "y"], sizes=[1, 2], files=[str(file) for file in files])) == files
    assert image_paths(Held(names=["x.jpg", "notes.txt"], paths=[])) == [] == image_paths([1, 2])
