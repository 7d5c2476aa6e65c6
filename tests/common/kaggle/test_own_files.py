"""The user's own files in the data folder: none is lost, even if make data is stopped half-way."""

import errno
import os
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import cli
from common.errors import UserError
from common.kaggle import manifest
from common.kaggle.source import Images
from tests.common.kaggle.fetching import HOME, contents, fetch, leftovers, with_images
from tests.common.kaggle.server import archive

pytestmark = pytest.mark.usefixtures("no_secrets")


def test_files_put_there_by_hand_are_not_replaced_unasked(kaggle, source):
    HOME.mkdir(parents=True)
    (HOME / "train.csv").write_text("mine")
    with pytest.raises(UserError, match=r"holds files that make data did not put there \(train.csv\).*FORCE=1"):
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
    """Write files of the user into the data folder; returns their contents by name."""
    files = {name: f"my {name}".encode() for name in names}
    for name, content in files.items():
        (HOME / name).parent.mkdir(parents=True, exist_ok=True)
        (HOME / name).write_bytes(content)
    return files


def test_force_keeps_files_put_there_by_hand_in_a_folder_of_their_own(kaggle, source, capfd):
    mine = own("notes.txt", "train.csv", "sample_submission.csv/old.csv")
    fetch(source, force=True)
    assert contents() == kaggle.files and contents(Path("data/toy.before")) == mine
    assert "moved to data/toy.before, as make data did not fetch them: notes.txt; " in (capfd.readouterr().out)
    fetch(source, force=True)
    assert leftovers() == {"toy", "toy.before"}, "nothing of the user's is in the way now"
    (HOME / ".manifest.json").unlink()
    fetch(source, force=True)
    assert contents(Path("data/toy.before2")) == kaggle.files and contents(Path("data/toy.before")) == mine


def test_another_download_replaces_the_whole_folder(kaggle, source):
    with_images(kaggle)
    fetch(source)
    (HOME / "cache").mkdir()
    (HOME / "cache/made.bin").write_bytes(b"from the old files")
    without(kaggle, "train_images/2.jpg")
    fetch(source, force=True)
    assert contents() == kaggle.files, "a file that the competition has no more is gone"
    assert leftovers() == {"toy"}, "and so is what was made from the old ones"


def test_own_files_among_the_data_outlive_another_download(kaggle, source):
    with_images(kaggle)
    fetch(source)
    mine = own("train_images/mine.jpg", "extra/mine.jpg", "cache.txt")
    (HOME / "linked").symlink_to(Path("elsewhere").absolute())
    fetch(source, force=True)
    before = Path("data/toy.before")
    assert contents() == kaggle.files and contents(before) == mine and (before / "linked").is_symlink()


def test_images_from_elsewhere_move_on_to_the_new_folder(kaggle, source):
    images = Images(f"{kaggle.address}/{{id}}.jpg", "train.csv", "id", "more_images", "1")
    kaggle.blobs["/1.jpg"] = b"jpeg"
    source = replace(source, images=images)
    fetch(source, images=1)
    fetch(source, force=True)
    assert contents() == kaggle.files | {"more_images/1.jpg": b"jpeg"} and leftovers() == {"toy"}


def without(kaggle, *names):
    """Remove these files from the competition on the server."""
    for name in names:
        del kaggle.files[name]
    kaggle.listing = {name: len(content) for name, content in kaggle.files.items()}
    kaggle.archive = archive(kaggle.files)


@pytest.mark.parametrize("then", [{}, {"force": True}, {"labels_only": True}])
@pytest.mark.parametrize("renames", [1, 2])
def test_stopped_between_the_renames_and_after_them(kaggle, source, monkeypatch, then, renames):
    """Stop without any cleanup, as a kill does. Old files are never mixed with new ones, the user's are not lost."""
    with_images(kaggle)
    fetch(source)
    mine, old = own("mine.txt"), dict(kaggle.files)
    without(kaggle, "train_images/2.jpg")
    rename, done = Path.rename, []

    def killed(path, target):
        if len(done) == renames:
            raise KeyboardInterrupt
        if {Path(path).name, Path(target).name} & {".toy.part", ".toy.old"}:
            done.append(path)
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", killed)
        patch.setattr(manifest.shutil, "rmtree", lambda *arguments, **options: None)
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
    assert Path("data/.toy.old").is_dir() and HOME.is_dir() == (renames == 2)
    fetch(source, **then)
    is_new = renames == 2 or then == {"force": True}
    assert contents() == (kaggle.files if is_new else old | mine)
    assert not is_new or contents(Path("data/toy.before")) == mine
    assert leftovers() == ({"toy", "toy.before"} if is_new else {"toy"})


def test_a_folder_that_cannot_be_moved_stays_as_it_is(kaggle, source, monkeypatch):
    fetch(source)
    old, rename = contents(), Path.rename

    def busy(path, target):
        if path.name == "toy":
            raise OSError(errno.EBUSY, "Device or resource busy")
        return rename(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", busy)
        with pytest.raises(UserError, match="could not be put in place .Device or resource busy.*is a mount point"):
            fetch(source, force=True)
    assert contents() == old and leftovers() <= {"toy", ".toy.download"}


def test_a_link_to_a_folder_on_a_larger_disk(kaggle, source, monkeypatch):
    """Download and unpack beside the link's target: the small disk has no room even for the archive."""
    small, usage = Path("data").absolute(), shutil.disk_usage
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0) if path == small else usage(path))
    Path("large/toy").mkdir(parents=True)
    Path("data").mkdir()
    HOME.symlink_to(Path("large/toy").absolute())
    for _ in range(2):
        fetch(source, force=True)
        assert HOME.is_symlink() and contents(Path("large/toy")) == kaggle.files
        assert [path.name for path in Path("large").iterdir()] == ["toy"] and leftovers() == {"toy"}


def test_files_that_others_hold_keep_their_content(kaggle, source):
    """Replacing a file must not change the target of a link, its other hard links or what an open file reads."""
    with_images(kaggle)
    fetch(source)
    old = dict(kaggle.files)
    Path("mine.csv").write_bytes(b"mine")
    (HOME / "train.csv").unlink()
    (HOME / "train.csv").symlink_to(Path("mine.csv").absolute())
    os.link(HOME / "sample_submission.csv", "backup.csv")
    kaggle.files |= {name: b"new " + content for name, content in old.items()} | {"new/deep/x.txt": b"x"}
    without(kaggle)
    with open(HOME / "train_images/0.jpg", "rb") as stream:
        fetch(source, force=True)
        assert stream.read() == old["train_images/0.jpg"]
    assert Path("mine.csv").read_bytes() == b"mine" and not (HOME / "train.csv").is_symlink()
    assert Path("backup.csv").read_bytes() == old["sample_submission.csv"]
    made = manifest.read(HOME)
    assert contents() == kaggle.files
    assert {name: file.mtime_ns for name, file in made.files.items()} == {
        name: (HOME / name).stat().st_mtime_ns for name in kaggle.files
    }, "nothing is hashed again"


@pytest.mark.parametrize("flag", ["--labels-only", "--images=3", "--url=http://x", "--checksum=md5:0"])
def test_choices_that_a_competition_does_not_have(kaggle, flag, capfd):
    own = "kdd_air_quality" if flag[2] in "li" else "digit_recognizer"
    assert cli.main(["data", own, flag]) == 1
    assert flag.partition("=")[0] in capfd.readouterr().err and kaggle.asked == []
