"""make data against everything that Kaggle, the network, the disk and an archive can do."""

import errno
import hashlib
import io
import json
import os
import shutil
import signal
import stat
import struct
import subprocess
import sys
import threading
import time
import urllib.request
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import archive as archives
from common.archive import unpack
from common.errors import UserError
from common.kaggle import data, download, stamp
from common.kaggle.source import Images, Source
from tests.common.kaggle.server import DROP, HANG, KEY, SLUG, TOKEN, Reply, archive

pytestmark = pytest.mark.usefixtures("no_secrets")
HOME = Path("data/toy")
DENIED = b"<html>Forbidden</html>"


def fetch(source, **options):
    return data.fetch("toy", source, **options)


def contents(folder: Path = HOME) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def leftovers() -> set[str]:
    return {path.name for path in Path("data").iterdir()} if Path("data").is_dir() else set()


def assert_nothing_kept():
    """No data, no stamp, no half of anything; a download to be resumed is the only thing that may stay."""
    assert leftovers() <= {".toy.download"}


def big(kaggle, size=3_000_000):
    """An archive that is worth resuming."""
    kaggle.files["train.csv"] = os.urandom(size)
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)


# What works.


def test_data_arrives_whole_and_a_second_call_does_nothing(kaggle, source, capfd):
    assert fetch(source) == HOME
    assert contents() == kaggle.files
    assert leftovers() == {"toy", "toy.stamp.json"}
    facts = json.loads(Path("data/toy.stamp.json").read_text())
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
        assert stamp.read(HOME).damage() == [told]
    fetch(source)
    assert contents() == kaggle.files | {"own.txt": b"kept"}
    assert "data/toy is damaged (train.csv is missing): fetching it again" in capfd.readouterr().out


def test_a_copy_with_other_times_is_not_damaged(kaggle, source, capfd):
    fetch(source)
    os.utime(HOME / "train.csv", (1, 1))
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked


def test_nested_archives_are_unpacked_where_readers_look(kaggle, source):
    inner = archive({"a.jpg": b"1", "b.jpg": b"2"})
    kaggle.files |= {
        "train.csv.zip": archive({"train.csv": b"unpacked"}),
        "test_images.zip": inner,
        "train_images.zip": archive({"train_images/c.jpg": b"3"}),
        "deep.zip": archive({"deeper.zip": archive({"x.txt": b"4"})}),
    }
    del kaggle.files["train.csv"]
    kaggle.archive = archive(kaggle.files)
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    fetch(replace(source, expected=("train.csv", "test_images/*.jpg")))
    assert contents() == {
        "train.csv": b"unpacked",
        "test_images/a.jpg": b"1",
        "test_images/b.jpg": b"2",
        "train_images/c.jpg": b"3",
        "deep/deeper/x.txt": b"4",
        "sample_submission.csv": kaggle.files["sample_submission.csv"],
    }


@pytest.mark.parametrize(
    ("more", "place"),
    [
        ({"__MACOSX/._images": b"", "__MACOSX/images/._a.jpg": b"", ".DS_Store": b"", "images/.DS_Store": b""}, ""),
        ({"images\\": b""}, ""),
        ({"./": b"", "./top.jpg": b"0"}, "images/"),
    ],
)
def test_what_other_programs_add_to_an_archive_does_not_move_its_files(tmp_path, more, place):
    inner = {f"images/{name}.jpg": name.encode() for name in "ab"}
    (tmp_path / "in.zip").write_bytes(archive({"./": b"", "images.zip": archive(inner | more)}))
    unpack(tmp_path / "in.zip", tmp_path / "out")
    files = {f"{place}{name}": content for name, content in inner.items()}
    assert contents(tmp_path / "out") == files | ({"images/top.jpg": b"0"} if place else {})


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


def with_images(kaggle, count=3):
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(count)}
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)


def test_labels_alone_on_complete_data_replace_nothing_else(kaggle, source, capfd):
    with_images(kaggle)
    fetch(source)
    (HOME / "train.csv").write_text("spoilt")
    kaggle.files["train.csv"] += b"2,1\n"
    for force in (False, True):
        fetch(source, labels_only=True, force=force)
        assert contents() == kaggle.files
        assert stamp.read(HOME).part == "all" and set(stamp.read(HOME).files) == set(kaggle.files)
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked, "all that the stamp says is there"
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
    monkeypatch.setattr(data, "_fetch_images", lambda home, source, count: images.append(count))
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
    monkeypatch.setattr(data, "_fetch_images", lambda home, source, count: images.append(count))
    source = replace(source, images=Images(f"{kaggle.address}/{{id}}.jpg", "train.csv", "ID", "more_images", "9"))
    with_images(kaggle)
    fetch(source)
    (HOME / "train_images/1.jpg").unlink()
    fetch(source, labels_only=True, images=4)
    assert images == [4] and stamp.read(HOME).part == "all"


def test_a_listing_of_many_pages_is_read_to_its_end(kaggle, source):
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(250)}
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)
    fetch(source)
    assert [body.get("pageToken", "") for body in kaggle.calls("ListDataFiles")] == ["", "200"]
    assert contents() == kaggle.files


def test_images_from_elsewhere_by_number(kaggle, source, capfd):
    kaggle.files["train.csv"] = b"ImageID,LabelName\n" + b"".join(b"im%d,/m/1\n" % (n // 2) for n in range(60))
    kaggle.listing["train.csv"] = len(kaggle.files["train.csv"])
    kaggle.archive = archive(kaggle.files)
    for n in range(30):
        kaggle.blobs[f"/train/im{n}.jpg"] = b"jpeg %d" % n
    images = Images(f"{kaggle.address}/train/{{id}}.jpg", "train.csv", "ImageID", "train_images", "30 images (525 GB)")
    source = replace(source, images=images, expected=(*source.expected, "train_images/*.jpg"))
    fetch(source, images=5)
    first = {name for name in contents() if name.endswith(".jpg")}
    assert len(first) == 5 and all(contents()[name] == b"jpeg " + name[15:-4].encode() for name in first)
    fetch(source, images=9)
    second = {name for name in contents() if name.endswith(".jpg")}
    assert len(second) == 9 and first < second
    assert len(kaggle.calls("GET")) == 1 + 9, "images that are there are not fetched again"
    out = capfd.readouterr().out
    assert "the training images (30 images (525 GB)) are not on Kaggle but at 127.0.0.1" in out
    assert "9 of the 30 images (525 GB)" in out


def test_missing_images_are_counted_and_named(kaggle, source):
    kaggle.files["train.csv"] = b"ImageID\n" + b"".join(b"im%d\n" % n for n in range(20))
    for n in range(19):
        kaggle.blobs[f"/train/im{n}.jpg"] = b"jpeg"
    images = Images(f"{kaggle.address}/train/{{id}}.jpg", "train.csv", "ImageID", "train_images", "20")
    with pytest.raises(UserError, match="1 of 20 images could not be read.*im19.jpg.*404"):
        fetch(replace(source, images=images), labels_only=True, images=20)
    assert len(list((HOME / "train_images").iterdir())) == 19


IMAGES = Images("http://images.example/{id}.jpg", "train.csv", "ImageID", "train_images", "40")


@pytest.fixture
def many(kaggle, source, monkeypatch):
    """A competition with forty images elsewhere, on the same server, and its files fetched already."""
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    kaggle.files["train.csv"] = b"ImageID\n" + b"".join(b"im%d\n" % n for n in range(40))
    kaggle.listing["train.csv"] = len(kaggle.files["train.csv"])
    kaggle.archive = archive(kaggle.files)
    kaggle.blobs = {f"/im{n}.jpg": b"jpeg" for n in range(40)}
    source = replace(source, images=replace(IMAGES, url=f"{kaggle.address}/{{id}}.jpg"))
    fetch(source)
    kaggle.asked.clear()
    return source


def test_images_from_a_server_that_is_silent_are_given_up_together(kaggle, many, monkeypatch):
    monkeypatch.setenv("KIT_PATIENCE", "0.9")
    kaggle.on = {"GET": HANG}
    with pytest.raises(UserError, match="none of the first 16 files could be read .*timed out"):
        fetch(many, images=40)
    assert len(kaggle.calls("GET")) <= 16, "nobody waited for a second round of requests"


def test_images_that_do_not_fit_on_the_disk(kaggle, many, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=archives.SPARE_BYTES - 1))
    with pytest.raises(UserError, match=r"im\d+.jpg could not be written .No space left on device.*Free disk space"):
        fetch(many, images=40)
    assert kaggle.asked == [] and list((HOME / "train_images").iterdir()) == []


@pytest.mark.parametrize("force", [False, True])
def test_images_are_fetched_by_one_command_at_a_time(kaggle, many, monkeypatch, force):
    """Another one meets the lock, also where the files were fetched anew first."""

    def meanwhile(home, source, count):
        with pytest.raises(UserError, match="data/toy is being downloaded by another process"):
            fetch(many)
        images.append(count)

    images = []
    monkeypatch.setattr(data, "_fetch_images", meanwhile)
    fetch(many, images=40, force=force)
    assert images == [40] and leftovers() == {"toy", "toy.stamp.json"}


# What Kaggle says.


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
    """Nobody listens there: with a token the kaggle program shows a traceback, the kit one line."""
    if token:
        monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN)
    monkeypatch.setenv("http_proxy", "http://someone:planted-key-0123456789@127.0.0.1:9")
    with pytest.raises(UserError, match="cannot be reached.*check the network") as raised:
        fetch(source)
    assert "\n" not in str(raised.value) and KEY not in str(raised.value)


# What happens on the way.


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
    assert contents() == kaggle.files and leftovers() == {"toy", "toy.stamp.json"}
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
    """make data in a process of its own, when its download has begun."""
    child = subprocess.Popen([sys.executable, "-c", CHILD, Path(__file__).parents[3]], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(Path("data").glob(".toy.download/*.zip")) and time.monotonic() < deadline:
        time.sleep(0.02)
    return child


def test_killed_and_started_again(kaggle, source):
    """The kaggle program outlives its kit, waiting for ever: the next call ends it and goes on from its bytes."""
    big(kaggle)
    kaggle.stall_after = 2_000_000
    child = started()
    child.kill()
    child.wait()
    kaggle.stall_after = None
    fetch(source)
    assert contents() == kaggle.files and leftovers() == {"toy", "toy.stamp.json"}


def test_the_kaggle_program_is_interrupted_and_exits_with_0(kaggle, source):
    big(kaggle)
    kaggle.stall_after = 2_000_000
    over = threading.Event()

    def interrupt():
        # Not before it waits for bytes that do not come, and more than once: Python ignores one inside a destructor.
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


# What is in the archive.


def test_a_corrupt_archive_of_the_right_length_is_fetched_again(kaggle, source, capfd):
    big(kaggle, 200_000)
    good = kaggle.archive
    kaggle.archive = good[:100_000] + bytes([good[100_000] ^ 1]) + good[100_001:]

    def second_time_good(body):
        if kaggle.counts["DownloadDataFiles"] > 1:
            kaggle.archive = good
        return kaggle.DownloadDataFiles(body)

    kaggle.on = {"DownloadDataFiles": second_time_good}
    fetch(source)
    assert contents() == kaggle.files
    assert "train.csv is damaged" in capfd.readouterr().out


def test_twice_corrupt_is_refused(kaggle, source):
    good = kaggle.archive
    kaggle.archive = good[:40] + bytes([good[40] ^ 1]) + good[41:]
    with pytest.raises(UserError, match="is damaged.*a second download was no better and nothing was kept"):
        fetch(source)
    assert leftovers() == set()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda k: setattr(k, "archive", k.archive[:-30]), "not a whole zip archive"),
        (lambda k: setattr(k, "archive", b"<html>please log in</html>"), "not a whole zip archive"),
        (lambda k: k.listing.update({"train.csv": 99}), "train.csv has 13 bytes, Kaggle lists 99 .FORCE=1 keeps"),
        (lambda k: k.listing.update({"more.csv": 1}), "more.csv is missing"),
        (
            lambda k: (setattr(k, "archive", archive({"other.csv": b"1"})), k.listing.clear()),
            r"no train.csv, sample_submission.csv \(found: other.csv\)",
        ),
    ],
)
def test_incomplete_archives(kaggle, source, spoil, message):
    spoil(kaggle)
    with pytest.raises(UserError, match=message):
        fetch(source)
    assert leftovers() == set()


def test_force_keeps_what_the_listing_denies(kaggle, source):
    kaggle.listing["train.csv"] = 99
    fetch(source, force=True)
    assert contents() == kaggle.files


def link(target: str) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as out:
        entry = zipfile.ZipInfo("train.csv")
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16
        out.writestr(entry, target)
    return stream.getvalue()


def encrypted() -> bytes:
    content = bytearray(archive({"train.csv": b"1"}))
    for signature, offset in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        content[content.index(signature) + offset] |= 1
    return bytes(content)


MALICIOUS = {
    "parent": (archive({"../evil.txt": b"x"}), "leads out of the folder"),
    "hidden parent": (archive({"train_images/../../evil.txt": b"x"}), "leads out of the folder"),
    "windows parent": (archive({"..\\evil.txt": b"x"}), "leads out of the folder"),
    "absolute": (archive({"/tmp/kaggle-starter-kit-evil.txt": b"x"}), "leads out of the folder"),
    "drive": (archive({"C:/evil.txt": b"x"}), "leads out of the folder"),
    "link": (link("/etc/passwd"), "is a link or a device"),
    "encrypted": (encrypted(), "is encrypted"),
    "file and folder": (archive({"a": b"x", "a/b": b"y"}), "is there as a file and as a folder|there twice"),
    "bomb": (archive({"zeros.csv": bytes(100 << 20)}), "unpacks to more than 200 times its size"),
    "nested": (archive({"inner.zip": archive({"../../evil.txt": b"x"})}), "inner.zip: the entry.*leads out"),
    "nested bomb": (
        archive({f"{n}.zip": archive({"zeros.csv": bytes(40 << 20)}) for n in range(2)}),
        "unpacks to more than 200 times its size",
    ),
}


@pytest.mark.parametrize("kind", ["parent", "absolute", "link", "bomb"])
def test_malicious_archives_leave_nothing(kaggle, source, tmp_path, kind):
    before = {str(path) for path in tmp_path.rglob("*") if "here/data" not in str(path)}
    kaggle.archive, message = MALICIOUS[kind]
    kaggle.listing = {}
    with pytest.raises(UserError, match=message):
        fetch(source)
    assert {str(path) for path in tmp_path.rglob("*") if "here/data" not in str(path)} == before
    assert_nothing_kept()
    assert not Path("/tmp/kaggle-starter-kit-evil.txt").exists()


@pytest.mark.parametrize("kind", MALICIOUS)
def test_unpacking_refuses_what_is_malicious(tmp_path, kind):
    content, message = MALICIOUS[kind]
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(UserError, match=message):
        unpack(tmp_path / "in.zip", tmp_path / "sub" / "out")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == [tmp_path / "in.zip"]
    assert not Path("/tmp/kaggle-starter-kit-evil.txt").exists()


def test_a_member_that_lies_about_its_size(tmp_path):
    """The header says 10 bytes, the data unpack to 10 MB: reading stops there, and the checksum tells."""
    content = bytearray(archive({"train.csv": bytes(10 << 20)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", content, content.index(signature) + offset, 10)
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(UserError, match="train.csv is damaged"):
        unpack(tmp_path / "in.zip", tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


# The disk.


def test_a_disk_that_is_too_small_is_told_from_the_listing(kaggle, source):
    big(kaggle)
    kaggle.bytes_per_second = 300_000
    kaggle.listing["train.csv"] = 10**15
    with pytest.raises(UserError, match=r"toy-competition needs 2000000.\d* GB .archive and files., .* GB are free"):
        fetch(source)
    assert_nothing_kept()


def test_what_is_unpacked_already_needs_no_space_again(kaggle, source, monkeypatch):
    """The last page of a long listing comes when the archive is unpacked, on a disk that just holds both."""
    kaggle.files |= {f"train_images/{n}.jpg": b"%d" % n for n in range(250)}
    big(kaggle, 20_000_000)
    room = 2 * len(kaggle.archive) + archives.SPARE_BYTES
    unpacked = Path("data/.toy.part/train.csv")

    def disk_usage(folder):
        folders = [Path("data/.toy.download"), unpacked.parent]
        return SimpleNamespace(free=room - sum(download.size_of(folder) for folder in folders if folder.is_dir()))

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
    """On a disk of two megabytes of its own, as make data would meet it; the listing says nothing of the size."""
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


# The user's own files and choices.


def test_files_put_there_by_hand_are_not_replaced_unasked(kaggle, source):
    HOME.mkdir(parents=True)
    (HOME / "train.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that make data has not put there \(train.csv\).*FORCE=1"):
        fetch(source)
    assert contents() == {"train.csv": b"mine"} and kaggle.asked == []


@pytest.mark.parametrize("place", [Path("data"), HOME])
@pytest.mark.parametrize("put", [lambda path: path.write_text("x"), lambda path: path.symlink_to("/nowhere/big")])
def test_a_file_or_a_dangling_link_in_the_place_of_a_folder(kaggle, source, place, put):
    place.parent.mkdir(exist_ok=True)
    put(place)
    with pytest.raises(UserError, match=f"^{place} is a file or a link that leads nowhere, expected a folder"):
        fetch(source)
    assert kaggle.asked == [] and not place.is_dir()


def test_a_folder_that_cannot_be_written(kaggle, source, monkeypatch):
    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "mkdir", read_only)
    with pytest.raises(UserError, match="download/lock could not be written .Read-only.*Make it writable for you"):
        fetch(source)


def test_what_a_file_manager_leaves_does_not_count(kaggle, source):
    HOME.mkdir(parents=True)
    (HOME / ".DS_Store").write_bytes(b"?")
    fetch(source)
    assert (HOME / "train.csv").is_file()


def own(*names: str) -> dict[str, bytes]:
    """Files that the user has put there."""
    files = {name: f"my {name}".encode() for name in names}
    for name, content in files.items():
        (HOME / name).parent.mkdir(parents=True, exist_ok=True)
        (HOME / name).write_bytes(content)
    return files


def test_force_adds_to_files_put_there_by_hand(kaggle, source, capfd):
    with_images(kaggle)
    kept = own("train_images/mine.jpg", "notes.txt", "sample_submission.csv/old.csv")
    (HOME / "train_images/0.jpg").write_bytes(kaggle.files["train_images/0.jpg"])
    aside = own("train_images/1.jpg", "train.csv") | {
        "sample_submission.csv/old.csv": kept.pop("sample_submission.csv/old.csv")
    }
    fetch(source, force=True)
    assert contents() == kaggle.files | kept
    assert contents(Path("data/toy.before")) == aside, "what is the same is not kept twice"
    assert "data/toy.before takes what is in the way of new files: " in capfd.readouterr().out
    fetch(source, force=True)
    assert leftovers() == {"toy", "toy.before", "toy.stamp.json"}, "nothing of the user's is in the way now"
    Path("data/toy.stamp.json").unlink()
    changed = own("train.csv")
    fetch(source, force=True)
    assert contents(Path("data/toy.before2")) == changed and contents(Path("data/toy.before")) == aside


def test_own_files_in_a_folder_of_the_data_outlive_another_download(kaggle, source):
    with_images(kaggle)
    fetch(source)
    kept = own("train_images/mine.jpg", "extra/mine.jpg")
    without(kaggle, "train_images/2.jpg")
    fetch(source, force=True)
    assert contents() == kaggle.files | kept, "a file that the competition has no more is gone"


def without(kaggle, *names):
    """The competition has these files no more."""
    for name in names:
        del kaggle.files[name]
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)


@pytest.mark.parametrize("then", [{}, {"force": True}, {"labels_only": True}])
def test_old_files_do_not_outlive_an_installation_that_is_stopped(kaggle, source, monkeypatch, then):
    """All files of the new data are there and unchanged; that one too many is there must be told all the same."""
    with_images(kaggle)
    fetch(source)
    without(kaggle, "train_images/2.jpg")
    with monkeypatch.context() as patch:
        patch.setattr(stamp, "_remove", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
    assert (HOME / "train_images/2.jpg").is_file()
    assert stamp.read(HOME).damage() == ["train_images/2.jpg is left over from older data"]
    fetch(source, **then)
    assert contents() == kaggle.files
    assert stamp.read(HOME).outdated == () and stamp.read(HOME).part == "all"
    kept = own("train_images/2.jpg")
    fetch(source)
    assert contents() == kaggle.files | kept, "the name is free for the user's own"


def test_stopped_when_nothing_but_the_last_stamp_is_left_to_do(kaggle, source, monkeypatch):
    with_images(kaggle)
    fetch(source)
    without(kaggle, "train_images/2.jpg")
    write = stamp.Stamp.write

    def once(self):
        if not self.outdated:
            raise KeyboardInterrupt
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(stamp.Stamp, "write", once)
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
    assert contents() == kaggle.files and stamp.read(HOME).outdated
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked and stamp.read(HOME).outdated == ()


def test_old_files_in_a_linked_folder(kaggle, source):
    with_images(kaggle)
    fetch(source)
    (HOME / "train_images").rename("elsewhere")
    (HOME / "train_images").symlink_to(Path("elsewhere").absolute())
    without(kaggle, *(f"train_images/{n}.jpg" for n in range(3)))
    fetch(source, force=True)
    assert contents() == kaggle.files
    assert (HOME / "train_images").is_symlink() and list(Path("elsewhere").iterdir()) == []


def test_a_folder_on_another_disk_is_written_as_one_on_the_same(kaggle, source, monkeypatch):
    """What a replaced file links to, its other names and who has it open keep the content that they had."""
    with_images(kaggle)
    fetch(source)
    old = dict(kaggle.files)
    Path("mine.csv").write_bytes(b"mine")
    (HOME / "train.csv").unlink()
    (HOME / "train.csv").symlink_to(Path("mine.csv").absolute())
    os.link(HOME / "sample_submission.csv", "backup.csv")
    kaggle.files |= {name: b"new " + content for name, content in old.items()} | {"new/deep/x.txt": b"x"}
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)

    def on_one_disk(function):
        def moved(source, target, **options):
            if Path(source).parent != Path(target).parent:
                raise OSError(errno.EXDEV, "Invalid cross-device link")
            function(source, target, **options)

        return moved

    with open(HOME / "train_images/0.jpg", "rb") as stream, monkeypatch.context() as patch:
        for name in ("rename", "replace"):
            patch.setattr(os, name, on_one_disk(getattr(os, name)))
        fetch(source, force=True)
        assert stream.read() == old["train_images/0.jpg"]
    assert Path("mine.csv").read_bytes() == b"mine" and not (HOME / "train.csv").is_symlink()
    assert Path("backup.csv").read_bytes() == old["sample_submission.csv"]
    assert contents() == kaggle.files, "and nothing half copied"
    made = stamp.read(HOME)
    assert made.times == {name: (HOME / name).stat().st_mtime_ns for name in made.files}, "nothing is hashed again"


@pytest.mark.parametrize("stopped", ["b_images", ".toy.part"])
def test_own_files_outlive_an_installation_that_is_stopped(kaggle, source, monkeypatch, stopped):
    """By an entry that cannot be moved, as a mount point is, and by Ctrl-C between two renames."""
    with_images(kaggle)
    fetch(source)
    kept = own("a_images/1.jpg", "b_images/1.jpg", "c_images/1.jpg", "train_images/mine.jpg")
    move = os.replace

    def stubborn(old, new, **options):
        if stopped == Path(old).name == "b_images":
            raise OSError(errno.EBUSY, "Device or resource busy")
        if stopped in Path(old).parts and stopped == ".toy.part":
            raise KeyboardInterrupt
        move(old, new, **options)

    monkeypatch.setattr(os, "rename", stubborn)
    monkeypatch.setattr(os, "replace", stubborn)
    if stopped == ".toy.part":
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
        assert kept.items() <= contents().items()
        monkeypatch.setattr(os, "rename", move)
        monkeypatch.setattr(os, "replace", move)
    fetch(source, force=True)
    assert contents() == kaggle.files | kept


def test_choices_that_a_competition_does_not_have(kaggle, source):
    with pytest.raises(UserError, match="--labels-only: toy has no such choice"):
        fetch(replace(source, labels=()), labels_only=True)
    with pytest.raises(UserError, match="--images: toy has no such choice"):
        fetch(source, images=3)
    with pytest.raises(UserError, match="--url, --checksum: toy comes from https://www.kaggle.com"):
        fetch(source, url="http://x")


# Data that is not on Kaggle.


@pytest.fixture
def elsewhere(kaggle, monkeypatch):
    """The record of an archive on a server with the paths of zenodo.org; no Kaggle account is needed."""
    monkeypatch.delenv("KAGGLE_KEY")
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("http_proxy")
    content = archive({"series.tsf": os.urandom(2_000_000)})
    kaggle.blobs["/records/7/files/series.zip"] = content
    checksum = f"md5:{hashlib.md5(content).hexdigest()}"
    kaggle.blobs["/api/records/7"] = json.dumps({"files": [{"key": "series.zip", "checksum": checksum}]}).encode()
    return Source(
        "", ("*.tsf",), higher_is_better=False, url="https://zenodo.org/records/7/files/series.zip",
        checksum_url="https://zenodo.org/api/records/7", nowhere_to_submit="the contest ended in 2018",
    )  # fmt: skip


def test_plain_download_with_a_published_checksum(kaggle, elsewhere):
    fetch(elsewhere, url=kaggle.address)
    assert len(contents()["series.tsf"]) == 2_000_000 and leftovers() == {"toy", "toy.stamp.json"}


def test_plain_download_is_resumed(kaggle, elsewhere, monkeypatch):
    kaggle.cut_after = [10**9, 500_000, 300_000]  # the record, then two cuts
    fetch(elsewhere, url=kaggle.address)
    ranges = [headers.get("Range") for asked, _, headers in kaggle.asked if asked == "GET"]
    assert ranges == [None, None, "bytes=500000-", "bytes=800000-"] and len(contents()) == 1


def test_plain_download_with_a_wrong_checksum_is_not_kept(kaggle, elsewhere):
    with pytest.raises(UserError, match="checksum is md5:.*, expected md5:00.*not kept"):
        fetch(elsewhere, url=f"{kaggle.address}/records/7/files/series.zip", checksum=f"md5:{0:032}")
    assert leftovers() == set()


def test_a_checksum_in_capital_letters_is_the_same(kaggle, elsewhere):
    content = kaggle.blobs["/records/7/files/series.zip"]
    checksum = f"SHA256:{hashlib.sha256(content).hexdigest().upper()}"
    fetch(elsewhere, url=f"{kaggle.address}/records/7/files/series.zip", checksum=checksum)
    assert len(contents()["series.tsf"]) == 2_000_000


@pytest.mark.parametrize("checksum", [f"{0:032}", "md5:00", f"sha256:{0:032}", f"sha1:{0:040}", f"md5:{0:031}g"])
def test_a_checksum_that_cannot_be_one_is_refused_before_the_download(kaggle, elsewhere, checksum):
    with pytest.raises(UserError, match=f"--checksum {checksum}: expected md5: and 32 hexadecimal digits, or sha256:"):
        fetch(elsewhere, url=f"{kaggle.address}/records/7/files/series.zip", checksum=checksum)
    assert kaggle.asked == []


def test_a_refused_archive_does_not_stand_in_for_another(kaggle, elsewhere):
    bad, good = (archive({name: b"1", "series.tsf": b"2"}) for name in ("../evil.txt", "notes.txt"))
    kaggle.blobs |= {"/bad/series.zip": bad, "/good/series.zip": good}
    with pytest.raises(UserError, match="leads out of the folder"):
        fetch(elsewhere, url=f"{kaggle.address}/bad/series.zip", checksum=f"md5:{hashlib.md5(bad).hexdigest()}")
    fetch(elsewhere, url=f"{kaggle.address}/good/series.zip", checksum=f"md5:{hashlib.md5(good).hexdigest()}")
    assert contents() == {"notes.txt": b"1", "series.tsf": b"2"}


def test_another_copy_needs_a_checksum(kaggle, elsewhere):
    with pytest.raises(UserError, match="no checksum is known for other.zip"):
        fetch(elsewhere, url=f"{kaggle.address}/other.zip")


SIGNED = "/records/7/files/series.zip?X-Amz-Signature=signed-secret"


def test_the_signature_of_an_address_is_neither_shown_nor_kept(kaggle, elsewhere, capfd):
    checksum = f"md5:{hashlib.md5(kaggle.blobs['/records/7/files/series.zip']).hexdigest()}"
    fetch(elsewhere, url=kaggle.address + SIGNED, checksum=checksum)
    fetch(elsewhere)
    out = capfd.readouterr().out
    assert "series.zip?***" in out and "signed-secret" not in out + Path("data/toy.stamp.json").read_text()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://me:signed-secret@127.0.0.1{SIGNED}", "a user name or a password before its host"),
        (f"http://127.0.0.1:9/a b{SIGNED}", "cannot be read .URL can't contain control characters"),
        (f"127.0.0.1{SIGNED}", "expected an address like https://host/path"),
        (f"http://127.0.0.1/other{SIGNED.replace('series', 'other')}", "no checksum is known for other.zip"),
    ],
)
def test_no_error_shows_a_password_in_an_address(kaggle, elsewhere, url, message):
    checksum = "" if "other" in url else f"md5:{0:032}"
    with pytest.raises(UserError, match=message) as raised:
        fetch(elsewhere, url=url, checksum=checksum)
    assert "signed-secret" not in str(raised.value) and kaggle.asked == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Reply(404), "answers 404 Not Found: open it in a browser"),
        (Reply(503), "cannot be read .*check the network"),
        (DROP, "cannot be read .*check the network"),
        (HANG, "cannot be read .*timed out.*check the network"),
    ],
)
def test_plain_download_failures(kaggle, elsewhere, monkeypatch, fault, message):
    if fault is HANG:
        monkeypatch.setenv("KIT_PATIENCE", "0.3")
    kaggle.on = {"GET": fault}
    with pytest.raises(UserError, match=message):
        fetch(elsewhere, url=kaggle.address)
    assert_nothing_kept()


def test_a_silent_server_is_left_within_the_patience(kaggle, elsewhere, monkeypatch):
    """All attempts together, not each of them."""
    waited = []

    def silent(opener, request, timeout):
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setenv("KIT_PATIENCE", "9")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", silent)
    with pytest.raises(UserError, match="cannot be read .timed out.*On a slow line set KIT_PATIENCE=300"):
        fetch(elsewhere, url=f"{kaggle.address}/records/7/files/series.zip", checksum=f"md5:{0:032}")
    assert sum(waited) <= 9 and len(waited) > 1


def test_a_line_that_breaks_often_but_goes_on_is_followed(kaggle, elsewhere):
    kaggle.cut_after = [10**9, *[300_000] * 6]  # the record, then more cuts than attempts
    fetch(elsewhere, url=kaggle.address)
    assert len(contents()["series.tsf"]) == 2_000_000


def test_a_record_without_the_file(kaggle, elsewhere):
    kaggle.blobs["/api/records/7"] = b'{"files": []}'
    with pytest.raises(UserError, match="names no checksum for series.zip: give it with"):
        fetch(elsewhere, url=kaggle.address)
