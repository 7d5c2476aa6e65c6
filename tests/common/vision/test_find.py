"""Finding image files by their ids: subfolders, links, hidden files, equal names in two folders."""

from dataclasses import replace

import cv2
import numpy as np
import pytest

from common.errors import UserError
from common.raw import RawData
from common.vision.check import unreadable
from common.vision.decode import decode
from common.vision.find import find_images, fingerprint, images_of, match_images


@pytest.fixture
def raw(tmp_path):
    return RawData(tmp_path, "cats")


def touched(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(name.encode())
    return folder


def relative(folder, paths):
    return [None if path is None else str(path.relative_to(folder)) for path in paths]


def test_linked_subfolders_are_read_and_hidden_files_are_not(tmp_path):
    elsewhere = touched(tmp_path / "elsewhere", "b.png", "deep/c.TIF")
    folder = touched(tmp_path / "images", "a.jpg", "._a.jpg", "notes.txt", "__MACOSX/a.jpg", ".cache/d.jpg")
    (folder / "linked").symlink_to(elsewhere)
    (folder / "linked.jpg").symlink_to(elsewhere / "b.png")
    (folder / "gone.jpg").symlink_to(tmp_path / "nothing.jpg")
    (elsewhere / "back").symlink_to(folder)  # a cycle
    found = relative(folder, find_images(folder))
    assert found == ["a.jpg", "gone.jpg", "linked/b.png", "linked/deep/c.TIF", "linked.jpg"]
    assert find_images(tmp_path / "none") == []


def test_ids_with_and_without_endings_and_folders(tmp_path):
    folder = touched(tmp_path, "a.jpg", "cats/001.png", "dogs/001.png", "v1.2.jpeg", "cats/deep/x.jpg")
    ids = ["a", "a.jpg", "cats/001", "dogs/001.png", "v1.2", "v1.2.jpeg", "x", "deep/x.jpg", "b", "a.png", "1", 17]
    wanted = ["a.jpg", "a.jpg", "cats/001.png", "dogs/001.png", "v1.2.jpeg", "v1.2.jpeg"]
    wanted += ["cats/deep/x.jpg", "cats/deep/x.jpg", None, None, None, None]
    assert relative(folder, match_images(folder, ids)) == wanted
    with pytest.raises(UserError, match="cats/001.png and dogs/001.png for the id 001"):
        match_images(folder, ["001"])
    touched(folder, "001.png")  # the file nearest to the top is taken
    assert relative(folder, match_images(folder, ["001"])) == ["001.png"]


def test_a_macs_way_of_writing_accents_is_the_same_name(tmp_path):
    apart, whole = "e\u0301te\u0301", "\u00e9t\u00e9"
    folder = touched(tmp_path, f"{apart}/{apart}_1.jpg", f"{whole}_2.jpg")
    found = match_images(folder, [f"{whole}_1", f"{whole}/{whole}_1.jpg", f"{apart}_2", f"{apart}_1"])
    wanted = [folder / apart / f"{apart}_1.jpg", folder / f"{whole}_2.jpg"]
    assert found == [wanted[0], wanted[0], wanted[1], wanted[0]]
    touched(tmp_path, f"{apart}_1.jpg")  # the one whose whole path is the id
    assert match_images(folder, [f"{apart}_1", f"{whole}_1.jpg"]) == [folder / f"{apart}_1.jpg"] * 2
    touched(tmp_path, f"{apart}_3.png", f"{whole}_3.jpg")  # the second would be taken for both ids
    with pytest.raises(UserError, match="for the id"):
        match_images(folder, [f"{apart}_3", f"{whole}_3"])


@pytest.mark.parametrize("ending", [".bmp", ".webp", ".gif", ".jp2", ".avif", ".ppm"])
def test_whatever_a_decoder_reads_is_found(tmp_path, ending):
    file = tmp_path / f"a{ending}"
    try:
        cv2.imwrite(str(file), np.full((64, 64, 3), 255, np.uint8))
    except cv2.error:
        pytest.skip(f"this OpenCV writes no {ending}")
    assert match_images(tmp_path, ["a", file.name]) == [file, file]
    assert (decode(file) > 250).all() and unreadable([file], few=0) == []


def test_two_files_of_one_name_are_an_error_unless_the_id_says_which(tmp_path):
    folder = touched(tmp_path, "x.jpg", "x.png")
    with pytest.raises(UserError, match="x.jpg and x.png for the id x: remove one of them"):
        match_images(folder, ["x"])
    assert relative(folder, match_images(folder, ["x.png", "x.jpg"])) == ["x.png", "x.jpg"]


def test_missing_images_are_named(raw, tmp_path):
    folder = touched(tmp_path / "train", "a.jpg")
    with pytest.raises(UserError, match="train.csv names b, c, d and 2 more, not in .*train .5 of 6 images.*or get"):
        images_of(raw, "train", [*"abcdef"], "train.csv")
    with pytest.raises(UserError, match="other is missing .beside it: train.: name the folder in build.., or get"):
        images_of(raw, "other", ["a"], "train.csv")
    found = images_of(replace(raw, lenient=True), "train", [*"ab"], "train.csv")
    assert relative(folder, found) == ["a.jpg", "b"], "whoever decodes it is told"


def test_files_that_no_id_names_are_told_beside_missing_ones(raw, tmp_path):
    touched(tmp_path / "train", "001.jpg", "002.jpg", "c.heic")
    with pytest.raises(UserError, match="names 1, b, not in .*train .2 of 3 images., which holds 001.jpg, c.heic that"):
        images_of(raw, "train", ["1", "b", "002"], "train.csv")


def test_spaces_around_an_id_are_seen(raw, tmp_path):
    touched(tmp_path / "train", "a.jpg")
    with pytest.raises(UserError, match="names 'a.jpg ', b, not in"):
        images_of(raw, "train", ["a.jpg ", "b"], "train.csv")


def test_a_folder_that_is_still_packed_is_to_be_unpacked(raw, tmp_path):
    touched(tmp_path, "train.csv", "train.tar.gz", "test.csv", "train_2.zip")
    with pytest.raises(UserError, match="train is missing, but train.tar.gz is beside it: unpack it into .*or get"):
        images_of(raw, "train", ["a"], "train.csv")
    with pytest.raises(UserError, match="test is missing: name the folder"):
        images_of(raw, "test", ["a"], "test.csv")


def test_the_fingerprint_is_of_names_and_sizes_and_the_cache_key_of_the_place_too(tmp_path):
    first, second = touched(tmp_path / "1/images", "a.jpg", "b.jpg"), touched(tmp_path / "2/images", "a.jpg", "b.jpg")
    (first / "gone.jpg").symlink_to(first / "nothing")
    (second / "gone.jpg").symlink_to(second / "nothing")
    here, there = find_images(first), find_images(second)
    assert fingerprint(here) == fingerprint(there) == fingerprint([tuple(there)])
    assert fingerprint(here, of_place=True) != fingerprint(there, of_place=True)
    (second / "a.jpg").write_bytes(b"another size")
    assert fingerprint(here) != fingerprint(there)
