import pickle

import cv2
import numpy as np
import pytest
from common.loading.images import BadImage, check_folder, decode, find_bad

from common.errors import UserError

HEIGHT, WIDTH = 140, 210


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """A smooth picture in RGB, uint8 [140, 210, 3], with noise that keeps its JPEG from being tiny."""
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    smooth = np.stack([y, x, 255 - y], -1) + np.random.default_rng(0).normal(0, 6, (HEIGHT, WIDTH, 3))
    return smooth.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def jpeg(picture) -> bytes:
    return cv2.imencode(".jpg", picture[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()


@pytest.fixture(scope="module")
def png(picture) -> bytes:
    return cv2.imencode(".png", picture[..., ::-1])[1].tobytes()


def turned(jpeg: bytes) -> bytes:
    """The JPEG with the EXIF note that it lies on its side (orientation 6)."""
    entry = b"\x01\x12\x00\x03\x00\x00\x00\x01\x00\x06\x00\x00"
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\0\x01" + entry + b"\0\0\0\0"
    return jpeg[:2] + b"\xff\xe1" + (len(exif) + 2).to_bytes(2) + exif + jpeg[2:]


@pytest.mark.parametrize("size", [None, (35, 35)])
def test_masks_belong_to_the_pixels_as_they_are_stored(tmp_path, jpeg, size):
    path, plain = tmp_path / "turned.jpg", tmp_path / "plain.jpg"
    path.write_bytes(turned(jpeg))
    plain.write_bytes(jpeg)
    stored = decode(plain, size)
    assert np.array_equal(decode(path, size, upright=False), stored)
    assert size or np.array_equal(decode(path), np.rot90(stored, -1))


def with_thumbnail(jpeg: bytes) -> bytes:
    """The JPEG with another JPEG, end marker and all, inside its header, as cameras write it."""
    thumbnail = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    return jpeg[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail + jpeg[2:]


def test_colours_and_sizes(tmp_path, picture, jpeg, png):
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), picture)
    assert np.abs(decode(tmp_path / "a.jpg").astype(int) - picture).mean() < 6
    assert decode(tmp_path / "a.jpg", gray=True).shape == (HEIGHT, WIDTH)
    assert decode(tmp_path / "a.png", size=(300, 400)).shape == (300, 400, 3)


@pytest.mark.parametrize("size", [(139, 200), (71, 106), (70, 105), (50, 60), (35, 50), (17, 26), (8, 8)])
@pytest.mark.parametrize("gray", [False, True])
def test_reduced_decoding_is_the_full_one_resized(tmp_path, jpeg, size, gray):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    full = decode(tmp_path / "a.jpg", gray=gray)
    expected = cv2.resize(full, size[::-1], interpolation=cv2.INTER_AREA).astype(int)
    found = decode(tmp_path / "a.jpg", size, gray)
    assert found.shape[:2] == size and found.dtype == np.uint8
    assert np.abs(found - expected).mean() < 4


@pytest.mark.parametrize(
    "damage, reason",
    [
        (lambda data: data[: len(data) // 2], "truncated"),
        (lambda data: data[: len(data) * 99 // 100], "truncated"),
        (lambda data: data[:-2], "truncated"),
        (lambda data: data[:300], "truncated"),
        (lambda data: data[: len(data) // 2] + bytes(len(data) - len(data) // 2), "truncated"),  # a half-written file
        (lambda data: b"", "empty"),
        (lambda data: b"<html>not found</html>", "not an image"),
    ],
)
@pytest.mark.parametrize("thumbnail", [False, True])
@pytest.mark.parametrize("size", [None, (20, 30)])
def test_broken_jpegs_are_named(tmp_path, jpeg, damage, reason, thumbnail, size):
    path = tmp_path / "a.jpg"
    path.write_bytes(damage(with_thumbnail(jpeg) if thumbnail else jpeg))
    with pytest.raises(BadImage, match=f"a.jpg .*{reason}"):
        decode(path, size)


def test_whole_jpegs_with_thumbnails_padding_or_trailing_bytes_are_read(tmp_path, jpeg):
    for data in (with_thumbnail(jpeg), jpeg + bytes(100), jpeg[:2] + b"\xff\xff" + jpeg[3:]):
        (tmp_path / "a.jpg").write_bytes(data)
        assert decode(tmp_path / "a.jpg").shape == (HEIGHT, WIDTH, 3)


def test_broken_pngs_and_missing_files_are_named(tmp_path, png):
    (tmp_path / "a.png").write_bytes(png[:-300])
    with pytest.raises(BadImage, match="a.png is truncated"):
        decode(tmp_path / "a.png")
    with pytest.raises(BadImage, match="b.png cannot be opened .No such file"):
        decode(tmp_path / "b.png")
    with pytest.raises(BadImage, match="cannot be opened"):
        decode(tmp_path)


def test_the_error_crosses_processes_whole():
    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty", 7)))
    assert (error.path, error.reason, error.row) == ("a.jpg", "is empty", 7)
    assert str(error).startswith("image a.jpg (row 7) is empty")


def test_the_folder_check_finds_every_bad_file(tmp_path, jpeg, png, capsys):
    paths = [tmp_path / f"{row}.jpg" for row in range(30)]
    for path in paths:
        path.write_bytes(jpeg)
    paths[3].write_bytes(jpeg[:-500])
    paths[11].write_bytes(jpeg[: len(jpeg) // 2] + b"\xff\xd9")  # ends as it should, and half of it is grey
    paths[20].unlink()
    assert [error.row for error in find_bad(paths, show=False)] == [3, 11, 20]
    with pytest.raises(UserError, match=r"3 of 30 images cannot be read: .*3.jpg \(row 3\) is truncated.*"):
        check_folder(paths)
    assert "30/30" in capsys.readouterr().err
    check_folder(paths[4:11], show=False)


def test_an_image_is_never_decoded_smaller_than_asked(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((160, 800, 3), np.uint8))
    seen, resize = [], cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda image, *a, **k: seen.append(image.shape[:2]) or resize(image, *a, **k))
    decode(tmp_path / "a.jpg", (150, 100))
    assert seen == [(160, 800)]
