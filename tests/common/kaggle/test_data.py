"""make data with faults of Kaggle, the network, the disk and the archive."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import archive as archives
from common.errors import UserError
from common.kaggle import data, manifest, web
from common.kaggle.source import Images
from tests.common.kaggle.fetching import HOME, assert_nothing_kept, big, contents, fetch, leftovers, with_images
from tests.common.kaggle.server import DROP, HANG, KEY, SLUG, TOKEN, Reply, archive

pytestmark = pytest.mark.usefixtures("no_secrets")
DENIED = b"<html>Forbidden</html>"


# Without faults.


def test_data_arrives_whole_and_a_second_call_does_nothing(kaggle, source, real_start, capfd):
    assert fetch(source) == HOME
    assert contents() == kaggle.files
    assert leftovers() == {"toy"}
    facts = json.loads(Path("data/toy/.manifest.json").read_text())
    assert facts["files"]["train.csv"]["size"] == len(kaggle.files["train.csv"]) and facts["source"] == source.page
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked, "the second call asks Kaggle nothing"
    out = capfd.readouterr().out
    assert "Kaggle account: KAGGLE_USERNAME and KAGGLE_KEY of someone" in out and "is complete: 2 files" in out


def test_damage_is_noticed_and_mended(kaggle, source, capfd):
    fetch(source)
    Path("data/toy/own.txt").write_text("kept")
    file, content = HOME / "train.csv", kaggle.files["train.csv"]
    for spoil, told in (
        (lambda: file.write_bytes(b"x" * len(content)), "train.csv was changed"),
        (lambda: file.write_bytes(content[:-1]), "train.csv has 12 bytes, expected 13"),
        (file.unlink, "train.csv is missing"),
    ):
        spoil()
        assert manifest.read(HOME).damage(HOME) == [told]
    fetch(source)
    assert contents() == kaggle.files and contents(Path("data/toy.before")) == {"own.txt": b"kept"}
    assert "data/toy is damaged (train.csv is missing): fetching it again" in capfd.readouterr().out


def test_a_copy_with_other_times_is_not_damaged(kaggle, source, capfd):
    fetch(source)
    os.utime(HOME / "train.csv", (1, 1))
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked


@pytest.mark.parametrize("page", [b"<html>please log in</html>", b"\n<!DOCTYPE html>\n<html>"])
def test_a_web_page_is_no_label_file(kaggle, source, page):
    kaggle.files["train.csv"] = page
    with pytest.raises(UserError, match="train.csv is a web page.*a second download was no better"):
        fetch(source, labels_only=True)
    assert leftovers() == set()


def test_labels_alone(kaggle, source, capfd):
    fetch(source, labels_only=True)
    assert contents() == {"train.csv": kaggle.files["train.csv"]}
    fetch(source, labels_only=True)
    assert len(kaggle.calls("DownloadDataFile")) == 1
    fetch(source)
    assert contents() == kaggle.files


@pytest.mark.parametrize("force", [False, True])
def test_labels_that_were_changed_in_place_are_fetched_again(kaggle, source, force):
    """The download folder keeps no hard link to the label file: it would change with it and pass as downloaded."""
    fetch(source, labels_only=True)
    with open(HOME / "train.csv", "ab") as stream:
        stream.write(b"2,1\n")
    fetch(source, labels_only=True, force=force)
    assert contents() == {"train.csv": kaggle.files["train.csv"]} and leftovers() == {"toy"}


def test_further_labels_and_labels_in_folders(kaggle, source):
    """SOURCE may name more label files than at the last call, and two with the same name in different folders."""
    more = {"old/train.csv": b"id,label\n3,1\n"}
    kaggle.files |= more
    fetch(source, labels_only=True)
    source = replace(source, labels=(*source.labels, *more))
    for _ in range(2):
        fetch(source, labels_only=True)
        assert contents() == {"train.csv": kaggle.files["train.csv"]} | more
    assert len(kaggle.calls("DownloadDataFile")) == 3


def test_labels_alone_on_complete_data_replace_nothing_else(kaggle, source, capfd):
    with_images(kaggle)
    fetch(source)
    (HOME / "train.csv").write_text("spoilt")
    kaggle.files["train.csv"] += b"2,1\n"
    for force in (False, True):
        fetch(source, labels_only=True, force=force)
        assert contents() == kaggle.files
        assert manifest.read(HOME).part == "all" and set(manifest.read(HOME).files) == set(kaggle.files)
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked, "all that the manifest says is there"
    (HOME / "train_images/1.jpg").unlink()
    capfd.readouterr()
    fetch(source, labels_only=True)
    out = capfd.readouterr().out
    assert "others are damaged (train_images/1.jpg is missing): fetch all again with make data COMP=toy" in out
    assert "is complete" not in out
    fetch(source)
    assert contents()["train_images/1.jpg"] == b"1"


@pytest.mark.parametrize("force", [False, True])
def test_labels_alone_after_everything_was_deleted(kaggle, source, monkeypatch, force):
    images = []
    monkeypatch.setattr(web, "fetch_images", lambda home, of, count: images.append(count))
    source = replace(source, images=Images(f"{kaggle.address}/{{id}}.jpg", "train.csv", "ID", "more_images", "9"))
    with_images(kaggle)
    fetch(source)
    shutil.rmtree(HOME)
    fetch(source, labels_only=True, images=4, force=force)
    assert contents() == {"train.csv": kaggle.files["train.csv"]} and images == [4]
    asked = len(kaggle.asked)
    fetch(source, labels_only=True)
    assert len(kaggle.asked) == asked, "the label files are complete"
    fetch(source)
    assert contents() == kaggle.files


def test_a_damaged_rest_does_not_keep_images_from_elsewhere_away(kaggle, source, monkeypatch):
    images = []
    monkeypatch.setattr(web, "fetch_images", lambda home, of, count: images.append(count))
    source = replace(source, images=Images(f"{kaggle.address}/{{id}}.jpg", "train.csv", "ID", "more_images", "9"))
    with_images(kaggle)
    fetch(source)
    (HOME / "train_images/1.jpg").unlink()
    fetch(source, labels_only=True, images=4)
    assert images == [4] and manifest.read(HOME).part == "all"


def test_a_listing_of_many_pages_is_read_to_its_end(kaggle, source):
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(250)}
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)
    fetch(source)
    assert [body.get("pageToken", "") for body in kaggle.calls("ListDataFiles")] == ["", "200"]
    assert contents() == kaggle.files


# Errors that Kaggle returns.


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Reply(401, "Unauthenticated"), r"does not accept KAGGLE_USERNAME and KAGGLE_KEY of someone \(401\)"),
        (
            Reply(403, "You must accept this competition's rules before you'll be able to download files."),
            f"Open https://www.kaggle.com/c/{SLUG}/rules in a browser, accept the rules",
        ),
        (Reply(403, "Permission 'competitions.participate' was denied"), f"Open https://www.kaggle.com/c/{SLUG}/rules"),
        (Reply(403, body=DENIED), f"403 Client Error.*rules are not accepted: open https://www.kaggle.com/c/{SLUG}"),
        (Reply(404, "Not Found"), f"does not find it.*https://www.kaggle.com/c/{SLUG}"),
        (Reply(429), "slow down .429.: repeat the same command in some minutes"),
        (Reply(503), "Kaggle itself fails.*503.*repeat the same command"),
        (DROP, "cannot be reached.*check the network.*HTTPS_PROXY"),
    ],
)
def test_refusals_of_the_server(kaggle, source, fault, message):
    kaggle.on = {"DownloadDataFiles": fault, "ListDataFiles": fault}
    with pytest.raises(UserError, match=message) as raised:
        fetch(source)
    assert "\n" not in str(raised.value)
    assert_nothing_kept()


def test_a_listing_that_fails_stops_the_download(kaggle, source):
    big(kaggle)
    kaggle.bytes_per_second = 300_000
    kaggle.on = {"ListDataFiles": Reply(503)}
    with pytest.raises(UserError, match="listing the files of toy-competition: Kaggle itself fails"):
        fetch(source)
    assert kaggle.sent < len(kaggle.archive), "the rest of the ten seconds' download was not waited for"
    assert not HOME.exists()


def test_a_server_that_never_answers(kaggle, source, monkeypatch):
    kaggle.on = {"DownloadDataFiles": HANG, "ListDataFiles": HANG}
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    with pytest.raises(UserError, match="no answer from Kaggle for 1 s: check the network.*KIT_PATIENCE=300"):
        fetch(source)
    assert_nothing_kept()


@pytest.mark.parametrize("token", [False, True])
def test_no_network(kaggle, source, monkeypatch, token):
    """No server listens at the proxy's port: with a token the kaggle program shows a traceback, the kit one line."""
    if token:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("http_proxy", "http://someone:planted-key-0123456789@127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached.*check the network") as raised:
        fetch(source)
    assert "\n" not in str(raised.value) and KEY not in str(raised.value)


# Interrupted downloads.


def test_a_short_cut_is_mended_by_the_kaggle_program(kaggle, source):
    big(kaggle)
    kaggle.cut_after = [1_500_000]
    fetch(source)
    assert contents() == kaggle.files
    assert [headers.get("Range") for asked, _, headers in kaggle.asked if asked == "GET"] == [None, "bytes=1048576-"]


def test_a_stalled_download_is_stopped_and_resumed_by_the_next_call(kaggle, source, monkeypatch):
    big(kaggle)
    kaggle.stall_after = 2_000_000
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    with pytest.raises(UserError, match="no answer from Kaggle for 1 s"):
        fetch(source)
    assert_nothing_kept()
    assert {file.name for file in Path("data/.toy.download").iterdir()} == {
        "lock", f"{SLUG}.zip", f"{SLUG}.zip.kaggle-partial"
    }  # fmt: skip
    kaggle.stall_after = None
    monkeypatch.setenv("KIT_PATIENCE", "20")
    fetch(source)
    assert contents() == kaggle.files and leftovers() == {"toy"}
    assert [headers.get("Range") for asked, _, headers in kaggle.asked if asked == "GET"][-1] == "bytes=1048576-"


def test_another_archive_since_the_cut_is_not_appended(kaggle, source, monkeypatch):
    big(kaggle)
    kaggle.stall_after = 1_000_000
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    with pytest.raises(UserError):
        fetch(source)
    kaggle.stall_after = None
    big(kaggle, 2_000_000)
    monkeypatch.setenv("KIT_PATIENCE", "20")
    fetch(source)
    assert contents() == kaggle.files


def test_a_second_make_data_waits_its_turn(kaggle, source):
    Path("data/.toy.download").mkdir(parents=True)
    code = (
        "import fcntl, sys, time; lock = open('data/.toy.download/lock', 'w'); fcntl.flock(lock, fcntl.LOCK_EX)\n"
        "print('locked', flush=True); sys.stdin.read()"
    )
    child = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert child.stdout.readline() == "locked\n"
    with pytest.raises(UserError, match="data/toy is being downloaded by another process"):
        fetch(source)
    child.communicate()
    assert kaggle.asked == []


CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
from common.kaggle import data; from tests.common.kaggle.conftest import SOURCE
data.fetch("toy", SOURCE)
"""


def started() -> subprocess.Popen:
    """Start make data in its own process and wait until its download has begun."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, Path(__file__).parents[3]], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(Path("data").glob(".toy.download/*.zip")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return child


def test_killed_and_started_again(kaggle, source):
    """The kaggle program outlives the killed kit and waits for ever: the next call ends it and resumes its download."""
    big(kaggle)
    kaggle.stall_after = 2_000_000
    child = started()
    child.kill()
    child.wait()
    kaggle.stall_after = None
    fetch(source)
    assert contents() == kaggle.files and leftovers() == {"toy"}


def test_the_kaggle_program_is_interrupted_and_exits_with_0(kaggle, source, real_start):
    big(kaggle)
    kaggle.stall_after = 2_000_000
    over = threading.Event()

    def interrupt():
        # Wait until the download has stalled. Then interrupt repeatedly: Python ignores a SIGINT inside a destructor.
        deadline = time.monotonic() + 60
        arrived = 0
        while arrived < 1_000_000 and time.monotonic() < deadline:
            time.sleep(0.1)
            arrived = sum(file.stat().st_size for file in Path("data").glob(".toy.download/*.zip"))
        program = int(Path("data/.toy.download/lock").read_text().split()[1])
        while not over.wait(3) and time.monotonic() < deadline:
            with suppress(ProcessLookupError):
                os.kill(program, signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(UserError, match="interrupted: repeat the same command, it goes on where it stopped"):
        fetch(source)
    over.set()
    thread.join()
    assert_nothing_kept()


# The disk.


def test_a_disk_that_is_too_small_is_told_from_the_listing(kaggle, source):
    big(kaggle)
    kaggle.bytes_per_second = 300_000
    kaggle.listing["train.csv"] = 10**15
    with pytest.raises(
        UserError, match=r"toy-competition .archive and files;.* will take 2000000.\d* GB of .*, where .* GB are free"
    ):
        fetch(source)
    assert_nothing_kept()


def test_what_is_unpacked_already_needs_no_space_again(kaggle, source, monkeypatch):
    """The listing's last page arrives after unpacking, on a disk with just enough room for archive and files."""
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(250)}
    big(kaggle, 20_000_000)
    room = 2 * len(kaggle.archive) + archives.SPARE_BYTES
    unpacked = Path("data/.toy.part/train.csv")

    def disk_usage(folder):
        folders = [Path("data/.toy.download"), unpacked.parent]
        return SimpleNamespace(free=room - sum(data.size_of(folder) for folder in folders if folder.is_dir()))

    def late(body):
        deadline = time.monotonic() + 60
        while body.get("pageToken") and time.monotonic() < deadline:
            if unpacked.is_file() and unpacked.stat().st_size == len(kaggle.files["train.csv"]):
                break
            time.sleep(0.02)
        return kaggle.ListDataFiles(body)

    monkeypatch.setattr(shutil, "disk_usage", disk_usage)
    kaggle.on = {"ListDataFiles": late}
    fetch(source)
    assert contents() == kaggle.files


def test_a_disk_that_fills_up_on_the_way(kaggle, source, tmp_path):
    """Mount a real file system of two megabytes. The listing is empty, so the size is not known beforehand."""
    big(kaggle)
    kaggle.listing = {}
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from common import archive; from common.kaggle import data; from tests.common.kaggle.conftest import SOURCE\n"
        "archive.SPARE_BYTES = 0\n"
        "try: data.fetch('toy', SOURCE)\n"
        "except Exception as error: print(type(error).__name__, error)"
    )
    root = Path(__file__).parents[3]
    mounted = 'mkdir -p data && mount -t tmpfs -o size=2m none data && "$@"; status=$?; ls -A data; exit $status'
    command = ["unshare", "--mount", "--map-root-user", "sh", "-c", mounted, "sh", sys.executable, "-c", code, root]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except FileNotFoundError:
        pytest.skip("no unshare program here, so no small disk can be made")
    if "unshare" in done.stderr or "mount" in done.stderr:
        pytest.skip(f"no small disk can be mounted here: {done.stderr.strip()}")
    assert "UserError downloading toy-competition: the disk is full (data): free some space" in done.stdout, done.stderr
    assert done.stdout.splitlines()[-1] == ".toy.download", "nothing but the download to go on with"


def test_a_disk_that_is_full_while_unpacking(kaggle, source, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archives, "_extract", full)
    with pytest.raises(UserError, match="could not be unpacked .No space left on device.: free some disk space"):
        fetch(source)
    assert_nothing_kept()
    monkeypatch.undo()
