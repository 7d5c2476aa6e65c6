"""Data that are not on Kaggle: plain downloads, which are resumed, verified and limited in time."""

import hashlib
import json
import os
import shutil
import urllib.request
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import archive as archives
from common.errors import UserError
from common.kaggle import web
from common.kaggle.source import Images, Source
from tests.common.kaggle.fetching import HOME, assert_nothing_kept, contents, fetch, leftovers
from tests.common.kaggle.server import DROP, HANG, Reply, archive

pytestmark = pytest.mark.usefixtures("no_secrets")


@pytest.fixture
def elsewhere(kaggle, monkeypatch):
    """A Source whose archive and record lie at the paths of zenodo.org; no Kaggle account is set."""
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
    assert len(contents()["series.tsf"]) == 2_000_000 and leftovers() == {"toy"}


def test_plain_download_is_resumed(kaggle, elsewhere, monkeypatch):
    kaggle.cut_after = [10**9, 500_000, 300_000]  # the record whole, then two cuts of the archive
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
    with pytest.raises(UserError, match="points outside the folder"):
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
    assert "series.zip?***" in out and "signed-secret" not in out + Path("data/toy/.manifest.json").read_text()


@pytest.mark.parametrize(
    ("url", "message"),
    [
        (f"http://me:signed-secret@127.0.0.1{SIGNED}", "a user name or password in the address"),
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
    """KIT_PATIENCE limits all attempts together, not each of them."""
    waited = []

    def silent(opener, request, timeout):
        waited.append(timeout)
        raise TimeoutError("timed out")

    monkeypatch.setenv("KIT_PATIENCE", "9")
    monkeypatch.setattr(urllib.request.OpenerDirector, "open", silent)
    with pytest.raises(UserError, match="cannot be read .timed out.*On a slow line set KIT_PATIENCE=300"):
        fetch(elsewhere, url=f"{kaggle.address}/records/7/files/series.zip", checksum=f"md5:{0:032}")
    assert sum(waited) <= 9 and len(waited) > 1


@pytest.mark.parametrize("patience", ["0", "-1", "nan", "inf", "1e12", "two"])
def test_a_patience_that_is_none(kaggle, elsewhere, monkeypatch, patience):
    monkeypatch.setenv("KIT_PATIENCE", patience)
    with pytest.raises(UserError, match=f"KIT_PATIENCE={patience}: expected a number of seconds"):
        fetch(elsewhere, url=kaggle.address)
    assert kaggle.asked == []


def test_a_competition_that_is_nowhere(kaggle):
    with pytest.raises(
        UserError, match="its SOURCE has no url: put the files into data/toy, or make train COMP=toy DATA="
    ):
        fetch(Source("", (), True))
    assert kaggle.asked == [] and leftovers() == set()


def test_a_line_that_breaks_often_but_goes_on_is_followed(kaggle, elsewhere):
    kaggle.cut_after = [10**9, *[300_000] * 6]  # the record whole, then more cuts of the archive than attempts
    fetch(elsewhere, url=kaggle.address)
    assert len(contents()["series.tsf"]) == 2_000_000


def test_a_record_without_the_file(kaggle, elsewhere):
    kaggle.blobs["/api/records/7"] = b'{"files": []}'
    with pytest.raises(UserError, match="names no checksum for series.zip: give it with"):
        fetch(elsewhere, url=kaggle.address)


IMAGES = Images("http://images.example/{id}.jpg", "train.csv", "ImageID", "train_images", "40")


def test_images_from_elsewhere_by_number(kaggle, source, capfd):
    kaggle.files["train.csv"] = b"\xef\xbb\xbfImageID,LabelName\n" + b"".join(
        b"im%d,/m/1\n" % (n // 2) for n in range(60)
    )
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
    with pytest.raises(
        UserError, match="1 of 20 images.*im19.jpg answers 404 Not Found: open it in a browser.: repeat"
    ):
        fetch(replace(source, images=images), labels_only=True, images=20)
    assert len(list((HOME / "train_images").iterdir())) == 19


@pytest.fixture
def many(kaggle, source, monkeypatch):
    """A competition with forty images outside Kaggle (on the same test server) and its files already fetched."""
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
    """A second command is refused by the lock, even if the first one has fetched the files again (`force`)."""

    def meanwhile(home, source, count):
        with pytest.raises(UserError, match="data/toy is being downloaded by another process"):
            fetch(many)
        images.append(count)

    images = []
    monkeypatch.setattr(web, "fetch_images", meanwhile)
    fetch(many, images=40, force=force)
    assert images == [40] and leftovers() == {"toy"}
