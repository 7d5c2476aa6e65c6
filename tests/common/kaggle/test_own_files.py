"""The user's own files beside those of make data: none is lost, whatever stops an installation."""

import errno
import os
from dataclasses import replace
from pathlib import Path

import pytest

from common.errors import UserError
from common.kaggle import manifest
from tests.common.kaggle.fetching import HOME, contents, fetch, leftovers, with_images
from tests.common.kaggle.server import archive

pytestmark = pytest.mark.usefixtures("no_secrets")


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
    assert leftovers() == {"toy", "toy.before", "toy.manifest.json"}, "nothing of the user's is in the way now"
    Path("data/toy.manifest.json").unlink()
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
        patch.setattr(manifest, "_remove", lambda *arguments: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
    assert (HOME / "train_images/2.jpg").is_file()
    assert manifest.read(HOME).damage() == ["train_images/2.jpg is left over from older data"]
    fetch(source, **then)
    assert contents() == kaggle.files
    assert manifest.read(HOME).outdated == () and manifest.read(HOME).part == "all"
    kept = own("train_images/2.jpg")
    fetch(source)
    assert contents() == kaggle.files | kept, "the name is free for the user's own"


def test_stopped_when_nothing_but_the_last_stamp_is_left_to_do(kaggle, source, monkeypatch):
    with_images(kaggle)
    fetch(source)
    without(kaggle, "train_images/2.jpg")
    write = manifest.Manifest.write

    def once(self):
        if not self.outdated:
            raise KeyboardInterrupt
        write(self)

    with monkeypatch.context() as patch:
        patch.setattr(manifest.Manifest, "write", once)
        with pytest.raises(KeyboardInterrupt):
            fetch(source, force=True)
    assert contents() == kaggle.files and manifest.read(HOME).outdated
    asked = len(kaggle.asked)
    fetch(source)
    assert len(kaggle.asked) == asked and manifest.read(HOME).outdated == ()


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
    made = manifest.read(HOME)
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
