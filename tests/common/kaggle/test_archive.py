"""Damaged, malicious and nested archives: none of the files of a bad archive are kept."""

import errno
import io
import stat
import struct
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from common import archive as archives
from common.archive import unpack
from common.errors import UserError
from tests.common.kaggle.fetching import assert_nothing_kept, big, contents, fetch, leftovers
from tests.common.kaggle.server import archive

pytestmark = pytest.mark.usefixtures("no_secrets")


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
        (lambda k: setattr(k, "archive", k.archive[:-30]), "not a complete zip archive"),
        (lambda k: setattr(k, "archive", b"<html>please log in</html>"), "not a complete zip archive"),
        (lambda k: k.listing.update({"train.csv": 99}), "train.csv has 13 bytes, Kaggle lists 99 .FORCE=1 keeps"),
        (lambda k: k.listing.update({"more.csv": 1}), "more.csv is missing"),
    ],
)
def test_incomplete_archives(kaggle, source, spoil, message):
    spoil(kaggle)
    with pytest.raises(UserError, match=message):
        fetch(source)
    assert leftovers() == set()


def test_a_whole_archive_without_what_is_expected_is_fetched_once(kaggle, source):
    """A wrong `expected` in a new competition's config.py: downloading the archive again would not help."""
    wrong = replace(source, expected=("train.csv", "train/*.jpg"))
    with pytest.raises(UserError, match=r"has no train/\*.jpg .found: sample_submission.csv, train.csv.: correct `exp"):
        fetch(wrong)
    assert kaggle.counts["GET"] == 1 and leftovers() == {".toy.download"}
    fetch(source)
    assert contents() == kaggle.files and leftovers() == {"toy"}


def test_force_keeps_what_the_listing_denies(kaggle, source, capfd):
    kaggle.listing["train.csv"] = 99
    fetch(source, force=True)
    assert contents() == kaggle.files
    assert "is kept as it is: train.csv has 13 bytes, Kaggle lists 99" in capfd.readouterr().out


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
    "parent": (archive({"../evil.txt": b"x"}), "points outside the folder"),
    "hidden parent": (archive({"train_images/../../evil.txt": b"x"}), "points outside the folder"),
    "batches parent": (archive({"..\\evil.txt": b"x"}), "points outside the folder"),
    "absolute": (archive({"/tmp/kaggle-starter-kit-evil.txt": b"x"}), "points outside the folder"),
    "drive": (archive({"C:/evil.txt": b"x"}), "points outside the folder"),
    "link": (link("/etc/passwd"), "is a link or a device"),
    "encrypted": (encrypted(), "is encrypted"),
    "file and folder": (archive({"a": b"x", "a/b": b"y"}), "is both a file and a folder|appears twice"),
    "bomb": (archive({"zeros.csv": bytes(100 << 20)}), "unpacks to more than 200 times its size"),
    "nested": (archive({"inner.zip": archive({"../../evil.txt": b"x"})}), "inner.zip: the entry.*points outside"),
    "two thousand folders": (archive({"a/" * 2000 + "x.csv": b"1"}), "is 2,000 folders deep, expected at most 63"),
    "a long name": (archive({f"a/{'é' * 150}.jpg": b"1"}), "has a name of 306 bytes, too long for a file"),
    "a long path": (archive({f"{'é' * 100}/" * 6 + "x.jpg": b"1"}), "has a name of 1,211 bytes, too long"),
    "nested bomb": (
        archive({f"{n}.zip": archive({"zeros.csv": bytes(40 << 20)}) for n in range(2)}),
        "unpacks to more than 200 times its size",
    ),
}


@pytest.mark.parametrize("kind", ["absolute", "bomb"])  # `unpack`, which refuses them, is tested with all kinds below
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


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whatever_byte_is_damaged_the_archive_is_named(tmp_path, kind):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", kind) as out:
        out.writestr("ü.csv", "a,b\n" * 20)
    for place in range(len(packed.getvalue())):
        content = bytearray(packed.getvalue())
        content[place] ^= 0xFF
        (tmp_path / "in.zip").write_bytes(content)
        try:
            unpack(tmp_path / "in.zip", tmp_path / f"out{place}")
        except (archives.Damaged, archives.Unsafe):  # any other UserError would blame the folder or the disk
            assert not (tmp_path / f"out{place}").exists()


def test_a_member_that_lies_about_its_size(tmp_path):
    """The header gives 10 bytes, the data unpack to 10 MB: reading stops after 10 bytes and the checksum fails."""
    content = bytearray(archive({"train.csv": bytes(10 << 20)}))
    for signature, offset in ((b"PK\x03\x04", 22), (b"PK\x01\x02", 24)):
        struct.pack_into("<I", content, content.index(signature) + offset, 10)
    (tmp_path / "in.zip").write_bytes(content)
    with pytest.raises(UserError, match="train.csv is damaged"):
        unpack(tmp_path / "in.zip", tmp_path / "out")
    assert list(tmp_path.glob("*out*")) == []


def test_a_neighbour_with_the_name_of_a_draft_is_kept(tmp_path):
    files = {"a.zip": archive({"a.csv": b"1"}), "a.zip.part": b"kept", "b.zip": archive({"b.zip": b"no archive"})}
    (tmp_path / "in.zip").write_bytes(archive(files))
    entries = unpack(tmp_path / "in.zip", tmp_path / "out")
    assert contents(tmp_path / "out") == {"a/a.csv": b"1", "a.zip.part": b"kept", "b/b.zip": b"no archive"}
    assert entries["b/b.zip"].size == len(b"no archive")


def test_a_file_system_that_does_not_take_a_name_is_not_said_to_be_full(tmp_path, monkeypatch):
    def too_long(*arguments):
        raise OSError(errno.ENAMETOOLONG, "File name too long")

    (tmp_path / "in.zip").write_bytes(archive({"a.csv": b"1"}))
    monkeypatch.setattr(archives, "_extract", too_long)
    with pytest.raises(UserError, match="could not be unpacked .File name too long.: use a folder that can hold"):
        unpack(tmp_path / "in.zip", tmp_path / "out")


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
        (
            {
                "__MACOSX/._images": b"",
                "__MACOSX/images/._a.jpg": b"",
                ".DS_Store": b"",
                "images/.DS_Store": b"",
                "images/._a.jpg": b"",
            },
            "",
        ),
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
