"""The reader on hand-written files: values, cache and refused input."""

import shutil
import zipfile
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from common import competition, tables
from common.defaults import completed
from common.errors import UserError
from common.preflight import check_before
from common.raw import RawData
from common.task import Task
from competitions.digit_recognizer import reader
from competitions.digit_recognizer.config import RECIPES
from competitions.digit_recognizer.reader import PIXEL_COLUMNS, read
from competitions.digit_recognizer.task import build

NAMES = [*reader.FILES, "sample_submission.csv"]


def write(folder: Path, train=None, test=None, sample=None) -> RawData:
    """Write files of 6 labelled and 4 test images; `train`, `test` and `sample` are functions that change the lines."""
    generator = np.random.default_rng(5)
    pixels = generator.integers(0, 256, (10, 784))
    labels = [3, 0, 9, 1, 7, 2]
    default_train = [["label", *PIXEL_COLUMNS], *([label, *row] for label, row in zip(labels, pixels, strict=False))]
    default_test = [PIXEL_COLUMNS, *pixels[6:].tolist()]
    default_sample = [["ImageId", "Label"], *([number, 0] for number in range(1, 5))]
    for name, lines in [
        ("train.csv", default_train if train is None else train(default_train)),
        ("test.csv", default_test if test is None else test(default_test)),
        ("sample_submission.csv", default_sample if sample is None else sample(default_sample)),
    ]:
        (folder / name).write_text("".join(",".join(map(str, line)) + "\n" for line in lines))
    return RawData(folder, "digit_recognizer")


def cell(line: int, column: int, value):
    """A function that changes one cell of a file's lines; line 1 is the header, as in the messages."""

    def change(lines):
        lines = [list(row) for row in lines]
        lines[line - 1][column] = value
        return lines

    return change


def checked(raw: RawData) -> Task:
    """The Task, after the checks before the training."""
    task = completed(build(RECIPES["smoke"], raw, print), raw)
    check_before(task, competition.load("digit_recognizer"))
    return task


def zipped(folder: Path) -> Path:
    path = folder.parent / "digit-recognizer.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in NAMES:
            archive.write(folder / name, name)
    return path


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "files"
    path.mkdir()
    return path


def test_reads_what_was_written(folder):
    files = read(write(folder))
    expected = np.random.default_rng(5).integers(0, 256, (10, 28, 28))
    assert files.images.dtype == np.uint8 and files.images.shape == (6, 1, 28, 28)
    assert np.array_equal(files.images[:, 0], expected[:6])
    assert np.array_equal(files.test_images[:, 0], expected[6:])
    assert files.labels.tolist() == [3, 0, 9, 1, 7, 2]


def test_archive_and_folder_are_the_same_data(folder):
    from_folder = read(write(folder))
    from_archive = read(RawData(zipped(folder), "digit_recognizer"))
    assert np.array_equal(from_archive.images, from_folder.images)
    assert np.array_equal(from_archive.test_images, from_folder.test_images)


def test_an_image_has_its_id_in_whatever_order_the_sample_submission_is(folder):
    straight = checked(write(folder))
    turned = checked(write(folder, sample=lambda lines: [lines[0], *lines[:0:-1]]))
    assert turned.sample.ids == ("4", "3", "2", "1") and straight.data.test_ids == ["1", "2", "3", "4"]
    assert turned.data.test_ids == straight.data.test_ids
    assert np.array_equal(turned.data.test.images, straight.data.test.images)


def test_batches_line_ends_are_read(folder):
    raw = write(folder)
    straight = read(raw)
    for name in NAMES:
        (folder / name).write_bytes((folder / name).read_bytes().replace(b"\n", b"\r\n"))
    assert np.array_equal(read(raw).images, straight.images)
    assert checked(raw).sample.ids == ("1", "2", "3", "4")


def test_a_byte_order_mark_is_no_part_of_the_header(folder):
    raw = write(folder)
    straight = read(raw)
    for name in NAMES:
        (folder / name).write_bytes(b"\xef\xbb\xbf" + (folder / name).read_bytes())
    assert np.array_equal(read(raw).images, straight.images)
    assert checked(raw).sample.columns == ("ImageId", "Label")


def test_other_line_ends_and_blank_last_lines_of_the_sample_submission(folder):
    raw = write(folder)
    (folder / "sample_submission.csv").write_bytes(b"ImageId,Label\r1,0\r3,0\r2,0\r4,0\r\r\r")
    assert checked(raw).sample.ids == ("1", "3", "2", "4")


@pytest.mark.parametrize("spoilt", [lambda copy: copy[:-100], lambda copy: copy.replace(b"}", b"(", 1)])
def test_a_damaged_cache_is_made_again(folder, spoilt):
    raw = write(folder)
    straight = read(raw)
    for file in raw.cache.glob("*.npy"):
        file.write_bytes(spoilt(file.read_bytes()))
    assert np.array_equal(read(raw).images, straight.images)
    assert all(len(np.load(file)) in (4, 6) for file in raw.cache.glob("*.npy"))


def test_a_sample_submission_that_is_no_text(folder):
    raw = write(folder)
    (folder / "sample_submission.csv").write_bytes(b"ImageId,Label\n1,0\n2,\xe9\n3,0\n4,0\n")
    with pytest.raises(UserError, match="sample_submission.csv line 3: byte 0xe9 .*make data COMP=digit_recognizer"):
        checked(raw)


def test_messages_stay_short_whatever_the_file_holds(folder):
    for change in (cell(3, 5, '"' + "7" * 5000), cell(1, 5, "x" * 5000), lambda lines: [["\x00\x01" * 4000]]):
        with pytest.raises(UserError) as caught:
            read(write(folder, train=change))
        assert len(str(caught.value)) < 600 and str(caught.value).isprintable()


def test_csv_is_parsed_once_for_the_same_contents(folder, monkeypatch):
    raw = write(folder)
    first = read(raw)
    parsed = []
    parse = tables.read
    monkeypatch.setattr(
        reader.tables, "read", lambda raw, name, *given, **rest: parsed.append(name) or parse(raw, name, *given, **rest)
    )
    again = read(raw)
    assert parsed == [] and np.array_equal(again.images, first.images)
    changed = read(write(folder, train=cell(2, 1, 77)))
    assert parsed == ["train.csv"] and changed.images[0, 0, 0, 0] == 77


def test_folder_that_cannot_be_written_is_told_and_cached_elsewhere(folder, tmp_path, capsys, monkeypatch):
    raw = write(folder)
    (folder / "cache").write_text("a file where the cache would be")
    files = read(raw)
    told = capsys.readouterr().out
    assert told.count("cannot be written") == 1 and "data/cache/digit_recognizer" in told
    assert len(list((tmp_path / "data/cache/digit_recognizer").glob("*.npy"))) == 2
    for name in ("train.csv", "test.csv"):
        monkeypatch.setitem(reader.FILES, name, None)  # so that the second reading must come from the cache
    assert np.array_equal(read(raw).images, files.images) and not capsys.readouterr().out


def without(column: int):
    return lambda lines: [row[:column] + row[column + 1 :] for row in lines]


FAULTS = {
    "missing label": ({"train": without(0)}, ["train.csv", "missing: label"]),
    "missing pixel": ({"train": without(5)}, ["train.csv", "784 columns, expected 785", "missing: pixel4"]),
    "extra column": ({"test": lambda lines: [[*row, "1"] for row in lines]}, ["test.csv", "not expected: 1"]),
    "extra pixel": (
        {"test": lambda lines: [[*lines[0], "pixel784"], *([*row, 0] for row in lines[1:])]},
        ["test.csv", "785 columns, expected 784", "not expected: pixel784"],
    ),
    "labelled test": (
        {"test": lambda lines: [["label", *lines[0]], *([1, *row] for row in lines[1:])]},
        ["test.csv", "not expected: label"],
    ),
    "column twice": ({"train": cell(1, 4, "pixel2")}, ["train.csv", "missing: pixel3", "more than once: pixel2"]),
    "columns swapped": (
        {"train": lambda lines: [[row[1], row[0], *row[2:]] for row in lines]},
        ["train.csv", "another order"],
    ),
    "short row": ({"train": lambda lines: [*lines[:3], lines[3][:-1], *lines[4:]]}, ["line 4 has 784 cells"]),
    "long row": ({"train": lambda lines: [*lines[:3], [*lines[3], 0], *lines[4:]]}, ["line 4 has 786 cells"]),
    "long rows": ({"test": lambda lines: [lines[0], *([*row, 0] for row in lines[1:])]}, ["line 2", "785 cells"]),
    "blank line": ({"train": lambda lines: [*lines[:3], [], *lines[3:]]}, ["line 4 is blank"]),
    "text": ({"train": cell(5, 13, "abc")}, ["train.csv line 5", "column pixel12", "'abc'", "0 to 255"]),
    "empty cell": ({"train": cell(5, 13, "")}, ["train.csv line 5", "column pixel12", "''"]),
    "NaN": ({"test": cell(3, 0, "nan")}, ["test.csv line 3", "column pixel0", "'nan'"]),
    "whole number as a fraction": ({"train": cell(5, 13, "7.0")}, ["line 5", "column pixel12", "'7.0'", "whole"]),
    "exponent": ({"test": cell(3, 2, "1e2")}, ["line 3", "column pixel2", "'1e2'"]),
    "sign": ({"test": cell(3, 2, "+7")}, ["line 3", "column pixel2", "'+7'"]),
    "blank first line": ({"train": lambda lines: [[], *lines]}, ["train.csv", "begins with a blank line"]),
    "sample row short": ({"sample": lambda lines: [*lines[:3], [3], lines[4]]}, ["line 4: 1 values, expected 2"]),
    "sample row long": ({"sample": lambda lines: [*lines[:3], [3, 0, 5], lines[4]]}, ["line 4: 3 values"]),
    "fraction": ({"train": cell(5, 13, "0.5")}, ["line 5", "column pixel12", "'0.5'", "whole number"]),
    "pixel too large": ({"train": cell(4, 784, 256)}, ["train.csv line 4", "column pixel783", "'256'", "0 to 255"]),
    "pixel negative": ({"test": cell(2, 7, -1)}, ["test.csv line 2", "column pixel7", "'-1'"]),
    "label too large": ({"train": cell(7, 0, 10)}, ["train.csv line 7", "column label", "'10'", "0 to 9"]),
    "label negative": ({"train": cell(7, 0, -1)}, ["train.csv line 7", "column label", "'-1'"]),
    "empty file": ({"test": lambda lines: []}, ["test.csv is empty"]),
    "no rows": ({"train": lambda lines: lines[:1]}, ["train.csv", "no rows"]),
    "sample header": ({"sample": cell(1, 1, "")}, ["sample_submission.csv line 1: the header is 'ImageId,'"]),
    "sample empty": ({"sample": lambda lines: []}, ["sample_submission.csv line 1: the header is ''"]),
    "id twice": ({"sample": cell(4, 0, 2)}, ["sample_submission.csv line 4: id 2 appears twice, first in line 3"]),
    "id missing": ({"sample": lambda lines: lines[:-1]}, ["id 4 is not in the sample submission"]),
    "id unknown": ({"sample": cell(5, 0, "x4")}, ["id 4 is not in the sample submission", "id x4 is missing"]),
    "test row missing": ({"test": lambda lines: lines[:-1]}, ["sample_submission.csv", "id 4 is missing"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_the_place_and_the_next_command(folder, name):
    change, words = FAULTS[name]
    with pytest.raises(UserError) as caught:
        checked(write(folder, **change))
    message = str(caught.value)
    again = "make data" if "sample_submission.csv" in message else "make data COMP=digit_recognizer"
    assert all(word in message for word in [*words, again]), message
    assert "\n" not in message


def test_first_five_ids_are_named(folder):
    files = write(folder, test=lambda lines: [lines[0], *lines[1:] * 3], sample=lambda lines: lines[:2])
    with pytest.raises(UserError, match="id 2 is not in .* id 6 is not in the sample submission and 6 more"):
        checked(files)


def test_a_faulty_file_is_not_cached(folder):
    with pytest.raises(UserError):
        read(write(folder, train=cell(4, 784, 256)))
    assert not list(folder.rglob("*.npy"))


@pytest.mark.parametrize("part", ["end cut off", "middle spoilt"])
def test_damaged_archive(folder, part):
    write(folder)
    path = zipped(folder)
    contents = path.read_bytes()
    half = len(contents) // 2
    spoilt = contents[: half - 400] + b"\0" * 800 + contents[half + 400 :]
    path.write_bytes(contents[:half] if part == "end cut off" else spoilt)
    with pytest.raises(UserError, match="download it again"):
        read(RawData(path, "digit_recognizer"))


def test_missing_file(folder):
    raw = write(folder)
    (folder / "test.csv").unlink()
    with pytest.raises(UserError, match=r"no test\.csv.*make data COMP=digit_recognizer"):
        read(raw)


def test_real_archive(real_data, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "digit-recognizer.zip"
    source = real_data / "digit-recognizer" / "digit-recognizer.zip"
    if not source.is_file():
        pytest.skip(f"no {source}")
    shutil.copy(source, path)
    files = read(RawData(path, "digit_recognizer"))
    assert files.images.shape == (42_000, 1, 28, 28) and files.test_images.shape == (28_000, 1, 28, 28)
    with zipfile.ZipFile(path) as archive, archive.open("train.csv") as stream:
        lines = [line.decode().strip().split(",") for line in islice(stream, 1, 2000)]
    for number, line in enumerate(lines):
        assert [files.labels[number], *files.images[number].ravel()] == list(map(int, line))
    assert checked(RawData(path, "digit_recognizer")).data.test_ids == [str(number) for number in range(1, 28_001)]
