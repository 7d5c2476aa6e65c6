"""Resized images are made once, after a check of the disk, sent to workers by file name, and bad files are recorded."""

import errno
import os
import pickle
from concurrent.futures import ThreadPoolExecutor

import cv2
import numpy as np
import pytest
import torch

from common.errors import BadImage, UserError
from common.loading import orders
from common.loading.loader import Loader
from common.raw import RawData
from common.vision import store as stores
from common.vision.datasets import ImageDataset
from common.vision.decode import decode
from common.vision.store import ImageStore


@pytest.fixture
def paths(tmp_path):
    (tmp_path / "images").mkdir()
    found = [tmp_path / "images" / f"{row}.png" for row in range(6)]
    for row, path in enumerate(found):
        cv2.imwrite(str(path), np.random.default_rng(row).integers(0, 256, (60, 80, 3), np.uint8))
    cv2.imwrite(str(found[3]), np.zeros((60, 80, 3), np.uint8))  # a black image is valid too
    return found


@pytest.fixture
def cache(tmp_path):
    (tmp_path / "cache").mkdir()
    return tmp_path / "cache"


def counted(monkeypatch) -> list:
    decoded = []
    monkeypatch.setattr(stores, "decode", lambda *what: decoded.append(what) or decode(*what))
    return decoded


def test_files_as_channels_and_as_images_have_caches_of_their_own(paths, cache):
    ImageStore([tuple(paths[:3]), tuple(paths[3:])], (30, 40), cache)[1]
    assert np.array_equal(ImageStore(paths, (30, 40), cache)[1], decode(paths[1], (30, 40)))


@pytest.mark.parametrize("channels", [3, 1, 4])
def test_images_are_resized_once_up_to_a_limit(paths, cache, monkeypatch, channels):
    images = paths if channels == 3 else [(path,) * channels for path in paths]
    said, decoded = [], counted(monkeypatch)
    first = ImageStore(images, (30, 40), cache, announce=said.append)
    for row, image in enumerate(images):
        assert np.array_equal(first[row], decode(image, (30, 40))) and first[row].shape == (30, 40, channels)
    assert len(decoded) == 6
    again = ImageStore(images, (30, 40), cache, announce=said.append)
    assert np.array_equal(again[2], first[2]) and len(decoded) == 6 and not said
    direct = ImageStore(images, (30, 40), cache, limit_gb=0.0, announce=said.append)
    assert np.array_equal(direct[2], first[2]) and len(decoded) == 7
    assert said == [f"6 images are decoded at every use: resized they would take {said[0].split()[-6]} GB, more than "
                    "--cache-gb 0"]  # fmt: skip
    assert len(direct.paths) == 6 * (1 if channels == 3 else channels)


def test_another_size_another_turn_and_changed_files_are_other_stores(paths, cache, monkeypatch):
    decoded = counted(monkeypatch)
    assert ImageStore(paths, (30, 40), cache).paths == paths and not decoded, "nobody has used an image yet"
    for size, settings in (((30, 40), {}), ((40, 30), {}), ((30, 40), {"upright": False})):
        ImageStore(paths, size, cache, **settings)[0]
    assert len(decoded) == 18
    os.utime(paths[0], (1, 1))
    ImageStore(paths, (30, 40), cache)[0]
    assert len(decoded) == 24


def test_files_replaced_by_others_of_the_same_size_and_time_are_another_store(tmp_path, cache):
    path = tmp_path / "a.bmp"
    for value in (10, 200):
        cv2.imwrite(str(path), np.full((40, 40, 3), value, np.uint8))
        os.utime(path, (1e9, 1e9))  # as unpacking an archive may set it
        assert (ImageStore([path], (32, 32), cache)[0] == value).all()


@pytest.mark.parametrize("left", [0, 60, -100])
def test_a_part_of_a_store_is_made_again(paths, cache, left):
    whole = ImageStore(paths, (32, 32), cache)[1].copy()
    (file,) = cache.iterdir()
    file.write_bytes(file.read_bytes()[:left])
    assert np.array_equal(ImageStore(paths, (32, 32), cache)[1], whole)
    assert list(cache.iterdir()) == [file]


def test_a_disk_too_small_is_named_before_anything_is_written(paths, cache, monkeypatch):
    """Writing to a mapped file on a full disk kills the process, so its space is allocated first."""
    (cache / "images-old-64x64x3.part").write_bytes(b"left by a killed process")

    def no_room(descriptor: int, offset: int, length: int) -> None:
        assert offset == 0 and length == os.fstat(descriptor).st_size > 6 * 32 * 32 * 3
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as full:
        full.setattr(os, "posix_fallocate", no_room, raising=False)
        full.setattr(stores, "decode", lambda *_: pytest.fail("decoded without room"))
        with pytest.raises(UserError, match=r"No space left on device\): free disk space, or.*--cache-gb 0"):
            ImageStore(paths, (32, 32), cache)[0]
        assert not list(cache.iterdir())
        with open(cache / "images-older.npy", "wb") as older:
            older.truncate(2**27)
        with pytest.raises(UserError, match="free disk space .images kept there at other sizes take 0.1 GB: delete"):
            ImageStore(paths, (32, 32), cache)[0]
    assert [file.name for file in cache.iterdir()] == ["images-older.npy"]
    ImageStore(paths, (32, 32), cache)[0]
    assert not list(cache.glob("*.part"))


def test_a_store_that_only_another_user_may_read_is_made_again(paths, cache, monkeypatch):
    """As in a shared folder, under a umask of 077; it ended in a traceback."""
    whole, load = ImageStore(paths, (32, 32), cache)[1].copy(), np.load
    (file,) = cache.iterdir()
    theirs = file.stat().st_ino

    def forbidden(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(
        np, "load", lambda path, **mode: (forbidden if path.stat().st_ino == theirs else load)(path, **mode)
    )
    with monkeypatch.context() as sticky:
        sticky.setattr(os, "replace", forbidden)
        with pytest.raises(UserError, match=r"Permission denied\): make it writable for you, or .*--cache-gb 0"):
            ImageStore(paths, (32, 32), cache)[1]
    assert np.array_equal(ImageStore(paths, (32, 32), cache)[1], whole) and list(cache.iterdir()) == [file]


def test_several_processes_resize_once(paths, cache, monkeypatch):
    decoded = counted(monkeypatch)
    with ThreadPoolExecutor() as pool:  # each open of the lock file excludes the others, as if in another process
        list(pool.map(lambda _: ImageStore(paths, (32, 32), cache)[0], range(4)))
    assert len(decoded) == 6


@pytest.mark.parametrize("kept", [True, False])
def test_unreadable_images_are_named_at_every_use(paths, cache, kept):
    paths[1].write_bytes(b"\xff\xd8no image")
    paths[4].unlink()
    for images, rows in ((paths, [1, 4]), ([(a, b) for a, b in zip(paths[::2], paths[1::2], strict=True)], [0, 2])):
        found = ImageStore(images, (32, 32), cache if kept else None)
        for row in range(len(images)):
            if row in rows:
                with pytest.raises(BadImage, match=r"(1|4)\.png"):
                    found[row]
            else:
                assert found[row].any() == (images[row] is not paths[3])


def test_workers_get_the_name_of_the_file_and_not_its_bytes(paths, cache):
    kept = ImageStore(paths, (256, 256), cache)
    sent = pickle.dumps(ImageDataset(kept))
    assert len(sent) < 4000
    dataset = pickle.loads(sent)
    assert torch.equal(dataset[2][0], ImageDataset(kept)[2][0])
    assert isinstance(dataset.images._rows, np.memmap)
    direct = ImageStore(paths, (256, 256))
    assert np.array_equal(pickle.loads(pickle.dumps(direct))[2], direct[2])


def test_spawned_workers_read_the_same(paths, cache):
    dataset = ImageDataset(ImageStore(paths, (32, 32), cache))
    found = []
    for workers, method in ((0, None), (1, "spawn")):
        order = orders.sequential(np.arange(6))
        with Loader(dataset, order, 3, seed=0, workers=workers, start_method=method) as loader:
            found.append(torch.cat([batch.inputs for batch in loader.epoch(0)]))
    assert torch.equal(*found)


def test_images_of_the_ids_of_a_table(paths, tmp_path):
    raw = RawData(tmp_path, "cats")
    direct = ImageStore.of(raw, "images", ["4"], "train.csv", size=(30, 40), limit_gb=0.0)
    assert direct[0].shape == (30, 40, 3) and not (tmp_path / "cache").exists(), "the disk may be read-only"
    images = ImageStore.of(raw, "images", ["4", "1.png"], "train.csv", size=(30, 40))
    assert images.paths == [paths[4], paths[1]] and np.array_equal(images[1], decode(paths[1], (30, 40)))
    assert list((tmp_path / "cache").glob("images-*.npy"))
    gray = ImageStore.of(raw, "images", ["4"], "train.csv", gray=True)
    assert np.array_equal(gray[0], decode((paths[4],))) and gray[0].shape == (60, 80, 1)
    with pytest.raises(UserError, match=r"train.csv names 9, .*make data COMP=cats"):
        ImageStore.of(raw, "images", ["4", "9"], "train.csv")
    with pytest.raises(UserError, match=r"photos is missing .beside it: images.: .*make data COMP=cats"):
        ImageStore.of(raw, "photos", ["4"], "train.csv")
