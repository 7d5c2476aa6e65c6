import pickle
import struct
import subprocess
import sys
import zlib

import cv2
import numpy as np
import pytest

from common.errors import BadImage
from common.vision.decode import decode

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
    """The JPEG with an EXIF tag for a quarter turn (orientation 6)."""
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


@pytest.mark.parametrize("order, mark", [("<", b"II*\0"), (">", b"MM\0*")])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_tiffs_are_turned_only_where_that_is_asked_for(tmp_path, picture, order, mark, orientation):
    """OpenCV itself turns TIFFs even if its flags forbid it."""
    place = 8 + 2 + 10 * 12 + 4  # offset of the pixels: after the header, ten tags and the end of their list
    facts = {256: WIDTH, 257: HEIGHT, 258: 8, 259: 1, 262: 1, 273: place, 274: orientation, 277: 1}
    facts |= {278: HEIGHT, 279: HEIGHT * WIDTH}
    head = mark + struct.pack(f"{order}IH", 8, len(facts))
    entries = b"".join(struct.pack(f"{order}HHIH2x", tag, 3, 1, value) for tag, value in facts.items())
    plane = picture[:, :, 1]
    data = head + entries + bytes(4) + plane.tobytes()
    (tmp_path / "a.tif").write_bytes(data)
    assert np.array_equal(decode((tmp_path / "a.tif",), upright=False)[:, :, 0], plane)
    assert np.array_equal(decode(tmp_path / "a.tif", upright=False)[:, :, 2], plane)
    upright = plane.T if orientation > 4 else plane
    for axis in {2: [1], 3: [0, 1], 4: [0], 6: [1], 7: [0, 1], 8: [0]}.get(orientation, []):
        upright = np.flip(upright, axis)
    assert np.array_equal(decode((tmp_path / "a.tif",))[:, :, 0], upright)


@pytest.mark.parametrize("order, mark", [("<", b"II*\0"), (">", b"MM\0*")])
@pytest.mark.parametrize("extra", [0, 1, 2])
def test_the_transparency_of_a_tiff_is_dropped_as_that_of_a_png(tmp_path, picture, order, mark, extra):
    """OpenCV multiplies the colours of a TIFF by its alpha: a wholly transparent one was black."""
    facts = {256: WIDTH, 257: HEIGHT, 258: 8, 259: 1, 262: 2, 273: 150, 274: 1, 277: 4, 278: HEIGHT}
    facts |= {279: HEIGHT * WIDTH * 4, 338: extra}
    entries = b"".join(
        struct.pack(f"{order}HHI", tag, 4 if tag == 279 else 3, 1)
        + struct.pack(f"{order}{'I' if tag == 279 else 'H2x'}", value)
        for tag, value in facts.items()
    )
    pixels = np.dstack([picture, np.zeros((HEIGHT, WIDTH), np.uint8)]).tobytes()
    data = mark + struct.pack(f"{order}IH", 8, len(facts)) + entries
    (tmp_path / "a.tif").write_bytes(data.ljust(150, b"\0") + pixels)
    assert np.array_equal(decode(tmp_path / "a.tif"), picture)


def with_thumbnail(jpeg: bytes) -> bytes:
    """The JPEG with another complete JPEG in its header, as cameras write it."""
    thumbnail = cv2.imencode(".jpg", np.zeros((8, 8, 3), np.uint8))[1].tobytes()
    return jpeg[:2] + b"\xff\xe1" + (len(thumbnail) + 2).to_bytes(2) + thumbnail + jpeg[2:]


def test_colours_and_sizes(tmp_path, picture, jpeg, png):
    (tmp_path / "a.png").write_bytes(png)
    (tmp_path / "a.jpg").write_bytes(jpeg)
    np.testing.assert_array_equal(decode(tmp_path / "a.png"), picture)
    assert np.abs(decode(tmp_path / "a.jpg").astype(int) - picture).mean() < 6
    assert decode((tmp_path / "a.jpg",)).shape == (HEIGHT, WIDTH, 1)
    assert decode(tmp_path / "a.png", size=(300, 400)).shape == (300, 400, 3)


@pytest.mark.parametrize("ending", ["png", "jpg"])
@pytest.mark.parametrize("channel", [0, 1, 2])
def test_a_coloured_file_of_one_channel_keeps_its_brightness(tmp_path, ending, channel):
    """As the Human Protein Atlas publishes its images: a JPEG for each dye, in the dye's colour."""
    pixels = np.zeros((64, 96, 3), np.uint8)
    pixels[16:48, 16:80, channel] = 255
    cv2.imwrite(str(tmp_path / f"a.{ending}"), pixels)
    for size in (None, (64, 96), (32, 48), (16, 24)):
        found = decode((tmp_path / f"a.{ending}",), size)
        height, width = found.shape[:2]
        assert found[height // 2, width // 2, 0] > 240 and found[1, 1, 0] < 15


@pytest.mark.parametrize("size", [(139, 200), (71, 106), (70, 105), (50, 60), (35, 50), (17, 26), (8, 8)])
@pytest.mark.parametrize("gray", [False, True])
def test_reduced_decoding_is_the_full_one_resized(tmp_path, jpeg, size, gray):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    image = (tmp_path / "a.jpg",) if gray else tmp_path / "a.jpg"
    full = decode(image)
    expected = cv2.resize(full, size[::-1], interpolation=cv2.INTER_AREA).reshape(*size, -1).astype(int)
    found = decode(image, size)
    assert found.shape == (*size, 1 if gray else 3) and found.dtype == np.uint8
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


def test_an_image_is_never_decoded_smaller_than_asked(tmp_path, monkeypatch):
    cv2.imwrite(str(tmp_path / "a.jpg"), np.zeros((160, 800, 3), np.uint8))
    seen, resize = [], cv2.resize
    monkeypatch.setattr(cv2, "resize", lambda image, *a, **k: seen.append(image.shape[:2]) or resize(image, *a, **k))
    decode(tmp_path / "a.jpg", (150, 100))
    assert seen == [(160, 800)]


def test_a_turned_image_is_never_decoded_smaller_than_asked(tmp_path):
    stripes = np.zeros((160, 800), np.uint8)
    stripes[::2] = 255  # 160 stripes in width once the image is turned
    data = cv2.imencode(".jpg", stripes, [cv2.IMWRITE_JPEG_QUALITY, 95])[1].tobytes()
    (tmp_path / "a.jpg").write_bytes(turned(data))
    assert decode(tmp_path / "a.jpg", (80, 160)).std() > 100


def png_of(width: int, height: int, bits: int, color: int, body: bytes) -> bytes:
    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(body)) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [None, (20, 30)])
def test_a_header_of_more_pixels_than_a_decoder_takes_is_a_bad_image(tmp_path, jpeg, size):
    (tmp_path / "a.png").write_bytes(png_of(40000, 40000, 1, 0, b"\0" * 5001))
    place = jpeg.find(b"\xff\xc0") + 5
    (tmp_path / "a.jpg").write_bytes(jpeg[:place] + struct.pack(">HH", 65000, 65000) + jpeg[place + 4 :])
    for name in ("a.png", "a.jpg"):
        with pytest.raises(BadImage, match=f"{name} cannot be decoded .its header says 2.30 pixels or more") as caught:
            decode(tmp_path / name, size)
        assert len(str(caught.value)) < 400 and "\n" not in str(caught.value)


def test_whatever_a_decoder_raises_is_a_bad_image(tmp_path, jpeg, monkeypatch):
    (tmp_path / "a.jpg").write_bytes(jpeg)
    for error in (ValueError("odd\nbytes"), MemoryError(), RuntimeError(), cv2.error("no codec")):

        def fails(data, flags, error=error):
            raise error

        monkeypatch.setattr(cv2, "imdecode", fails)
        with pytest.raises(BadImage, match="a.jpg cannot be decoded"):
            decode(tmp_path / "a.jpg")


def test_names_that_lead_nowhere_are_named(tmp_path):
    (tmp_path / "a.jpg").symlink_to(tmp_path / "gone.jpg")
    (tmp_path / "b.jpg").symlink_to(tmp_path / "b.jpg")
    for name in ("a.jpg", "b.jpg", "zero\0byte.jpg"):
        with pytest.raises(BadImage, match="cannot be opened"):
            decode(tmp_path / name)


@pytest.mark.parametrize("ending", [".png", ".tif"])
def test_sixteen_bits_become_eight(tmp_path, ending):
    deep = np.random.default_rng(0).integers(0, 2**16, (12, 17, 3), np.uint16)
    cv2.imwrite(str(tmp_path / f"a{ending}"), deep[..., ::-1])
    cv2.imwrite(str(tmp_path / f"grey{ending}"), deep[..., 0])
    for name, wanted in (("a", deep), ("grey", np.repeat(deep[..., :1], 3, axis=2))):
        assert np.abs(decode(tmp_path / f"{name}{ending}") - wanted / 257).max() <= 1  # formats truncate or round
    cv2.imwrite(str(tmp_path / "float.tif"), np.zeros((8, 8), np.float32))
    with pytest.raises(BadImage, match="not an image of 8 or 16 bits"):
        decode(tmp_path / "float.tif")


def test_transparency_is_dropped(tmp_path, picture):
    alpha = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 1), np.uint8)
    cv2.imwrite(str(tmp_path / "a.png"), np.concatenate((picture[..., ::-1], alpha), 2))
    assert np.array_equal(decode(tmp_path / "a.png"), picture)


@pytest.mark.parametrize("depth", [8, 16])
def test_files_of_one_channel_each_are_stacked(tmp_path, depth):
    planes = np.random.default_rng(0).integers(0, 2**depth, (4, 20, 30), np.uint8 if depth == 8 else np.uint16)
    paths = tuple(tmp_path / f"x_{colour}.png" for colour in ("red", "green", "blue", "yellow"))
    for path, plane in zip(paths, planes, strict=True):
        cv2.imwrite(str(path), plane)
    found = decode(paths)
    assert found.dtype == np.uint8 and np.array_equal(found, (planes >> (depth - 8)).transpose(1, 2, 0))
    assert decode(paths, (10, 10)).shape == (10, 10, 4)
    cv2.imwrite(str(paths[2]), planes[2, :10])
    with pytest.raises(BadImage, match="x_blue.png has 10x30 pixels, and x_red.png of the same image 20x30"):
        decode(paths)
    paths[3].unlink()
    with pytest.raises(BadImage, match="x_yellow.png cannot be opened"):
        decode(paths)


def test_a_tiff_of_other_channels_is_read_without_a_warning(tmp_path, monkeypatch):
    """Near infrared beside red, green and blue: a training would print a line of OpenCV for every image."""
    file = tmp_path / "planet.tif"
    cv2.imwrite(str(file), np.full((8, 8, 4), 257, np.uint16))
    monkeypatch.delenv("OPENCV_LOG_LEVEL", raising=False)
    code = "import sys; from common.__main__ import settle; settle(); from common.vision.decode import decode; "
    code += "assert (decode(sys.argv[1]) == 1).all()"  # in a process of its own: OpenCV reads its settings once
    done = subprocess.run([sys.executable, "-c", code, file], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
