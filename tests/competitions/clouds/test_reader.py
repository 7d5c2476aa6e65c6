"""The files of the competition, and every way in which they can be wrong."""

import random
import zipfile

import numpy as np
import pytest

from common.errors import UserError
from common.raw import RawData
from common.vision import rle
from competitions.clouds import reader

from .conftest import NAMES, TEST_NAMES, rows_of, train_rows, truth_of, write_image, write_rows


def read(folder):
    return reader.read(RawData(folder, "clouds"))


def test_masks_and_order(folder):
    files = read(folder)
    assert files.images == sorted(NAMES)
    assert files.test_images == TEST_NAMES  # as in the sample, not sorted
    for row, name in enumerate(files.images):
        for label in range(4):
            truth = truth_of(NAMES.index(name), label)
            assert (rle.decode(files.runs.of(row, label), 1400, 2100) == truth).all()
            assert files.runs.present()[row, label] == truth.any()
        small = files.runs.masks(row, (70, 105))
        assert small.shape == (4, 70, 105)
        assert (small[1] == truth_of(NAMES.index(name), 1).reshape(70, 20, 105, 20).mean((1, 3)).__ge__(0.5)).all()


def test_rows_in_any_order_are_the_same_data(folder):
    before = read(folder)
    rows = rows_of(folder, "train.csv")
    random.Random(1).shuffle(rows)
    write_rows(folder, "train.csv", rows)
    after = read(folder)
    assert after.images == before.images
    assert (after.runs.runs == before.runs.runs).all() and (after.runs.starts == before.runs.starts).all()


def test_nan_is_an_empty_mask(folder):
    rows = [
        f"{NAMES[0]}_Fish,NaN" if row.startswith(f"{NAMES[0]}_Fish") else row for row in rows_of(folder, "train.csv")
    ]
    write_rows(folder, "train.csv", rows)
    files = read(folder)
    assert not files.runs.present()[files.images.index(NAMES[0]), 0]


def test_lines_are_counted_as_an_editor_does(folder):
    rows = rows_of(folder, "train.csv")
    rows[5] = rows[5].split(",")[0] + ",1 2 3"
    write_rows(folder, "train.csv", [*rows[:2], "", "", *rows[2:]])
    with pytest.raises(UserError, match="train.csv line 9 "):
        read(folder)


def test_what_a_file_manager_leaves_beside_the_images(folder):
    (folder / "train_images" / f"._{NAMES[0]}").write_bytes(b"?")
    assert read(folder).images == sorted(NAMES)


def test_a_class_that_no_image_has(folder):
    write_rows(
        folder,
        "train.csv",
        [row.split(",")[0] + "," if "Sugar" in row else row for row in rows_of(folder, "train.csv")],
    )
    assert read(folder).runs.present()[:, 3].sum() == 0


def test_zip_archive(folder, tmp_path_factory):
    archive = tmp_path_factory.mktemp("zip") / "clouds.zip"
    with zipfile.ZipFile(archive, "w") as stream:
        for file in folder.rglob("*"):
            if file.is_file():
                stream.write(file, file.relative_to(folder))
    files = read(archive)
    assert files.images == sorted(NAMES) and all(path.is_file() for path in files.train_paths)


def changed(number, old, new):
    """A function that replaces `old` by `new` in row `number` of a folder's train.csv, to make a faulty file."""

    def apply(folder):
        rows = rows_of(folder, "train.csv")
        assert old in rows[number]
        rows[number] = rows[number].replace(old, new)
        write_rows(folder, "train.csv", rows)

    return apply


def cell(text):
    def apply(folder):
        rows = rows_of(folder, "train.csv")
        rows[5] = f"{rows[5].split(',')[0]},{text}"
        write_rows(folder, "train.csv", rows)

    return apply


def sample_row(row):
    def apply(folder):
        write_rows(folder, "sample_submission.csv", [*rows_of(folder, "sample_submission.csv"), row])

    return apply


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        (changed(2, "_Gravel", "_Gravle"), ["train.csv line 4", "Gravle", "Did you mean Gravel?", "Fish, Flower"]),
        (changed(2, "_Gravel", ""), ["train.csv line 4", "names no class"]),
        (changed(3, "_Sugar", "_Gravel"), ["train.csv line 5", "Gravel", "twice"]),
        (cell("1 2 3"), ["train.csv line 7", "Flower", "3 numbers, expected pairs"]),
        (cell("1 2,3 4"), ["line 7 has 3 cells, expected 2"]),
        (changed(4, ",", ""), ["train.csv line 6 has 1 cells"]),
        (cell("1 x"), ["line 7", "'x' is not a whole number"]),
        (cell("1 10 5 3"), ["line 7", "overlaps"]),
        (cell("2940000 2"), ["line 7", "out of range", "2940000"]),
        (cell("0 2"), ["line 7", "out of range"]),
        (
            lambda f: write_rows(f, "train.csv", rows_of(f, "train.csv")[:-1]),
            ["train.csv", NAMES[-1], "no row for Sugar"],
        ),
        (lambda f: write_rows(f, "train.csv", []), ["train.csv has no rows"]),
        (lambda f: (f / "train.csv").write_text("a,b\n1,2\n"), ["columns a, b", "expected Image_Label, EncodedPixels"]),
        (lambda f: (f / "train_images" / NAMES[3]).unlink(), ["train.csv names", NAMES[3], "train_images"]),
        (
            lambda f: write_image(f / "train_images" / "extra.jpg", 140, 210, 0),
            ["train_images holds extra.jpg", "train.csv"],
        ),
        (lambda f: (f / "test_images" / TEST_NAMES[0]).unlink(), ["sample_submission.csv names", TEST_NAMES[0]]),
        (lambda f: write_image(f / "test_images" / "extra.jpg", 140, 210, 0), ["test_images holds extra.jpg"]),
        (sample_row("unknown.jpg_Fish,1 1"), ["sample_submission.csv names unknown.jpg", "test_images"]),
        (sample_row(f"{TEST_NAMES[1]}_Fish,1 1"), ["line 10", "twice"]),
        (
            lambda f: write_rows(f, "sample_submission.csv", rows_of(f, "sample_submission.csv")[:-1]),
            ["sample_submission.csv", TEST_NAMES[-1], "no row for"],
        ),
        (sample_row(f"{TEST_NAMES[1]}_Dog,1 1"), ["sample_submission.csv line 10", "names no class"]),
    ],
)
def test_faults_are_named_with_file_and_row(folder, fault, words):
    fault(folder)
    with pytest.raises(UserError) as caught:
        read(folder)
    for word in words:
        assert word in str(caught.value), str(caught.value)


def written_again(folder, size):
    """Rewrite train.csv with the run lengths of masks resized to `size`, as in a resized copy of the data."""
    rows = []
    for row in rows_of(folder, "train.csv"):
        key, cell = row.split(",")
        rows.append(f"{key},{rle.encode(rle.decode_to_size(rle.parse(cell), 1400, 2100, *size))}")
    write_rows(folder, "train.csv", rows)


@pytest.mark.parametrize("size", [(140, 210), (350, 525)])
def test_masks_of_resized_images_are_read_at_their_size(folder, size):
    """If they were read at 1400x2100, every mask would lie at the left edge."""
    before, said = read(folder), []
    written_again(folder, size)
    (folder / "train_images" / sorted(NAMES)[0]).write_bytes(b"damaged: the next one shows the size")
    after = reader.read(RawData(folder, "clouds"), said.append)
    assert after.runs.size == size and before.runs.size == (1400, 2100)
    for row in range(len(NAMES)):
        assert (after.runs.masks(row, (70, 105)) == before.runs.masks(row, (70, 105))).all()
    assert len(said) == 1 and f"run lengths are read as {size[0]}x{size[1]} masks" in said[0]


def test_masks_of_a_size_that_nothing_else_has_are_refused(folder):
    written_again(folder, (280, 420))
    with pytest.raises(UserError, match="train.csv: .* are 280 pixels apart.*images are 140x210: expected"):
        read(folder)


def test_the_competitions_own_masks_are_never_taken_for_others(folder):
    """Not even small ones at the left edge, or a handful of odd ones, of which nothing follows."""
    column = " ".join(f"{1 + 1400 * x} 100" for x in range(80))
    cells = {"a": column, "b": "1 10 141 10 281 10", "c": "1 1"}
    for cell in cells.values():
        write_rows(folder, "train.csv", [row.split(",")[0] + f",{cell}" for row in train_rows()])
        files = reader.read(RawData(folder, "clouds"), lambda message: pytest.fail(message))
        assert files.runs.size == (1400, 2100)


def test_images_of_subfolders_and_copies_of_a_mac_are_told_apart(folder):
    train = folder / "train_images"
    (folder / "elsewhere").mkdir()
    (train / NAMES[0]).rename(folder / "elsewhere" / NAMES[0])
    (train / "more").symlink_to(folder / "elsewhere")
    (train / f"._{NAMES[1]}").write_bytes(b"apple")
    assert read(folder).train_paths[sorted(NAMES).index(NAMES[0])] == train / "more" / NAMES[0]
    write_image(train / "more" / NAMES[1], 140, 210, 0)  # the same name twice: the file in train_images itself is used
    assert read(folder).train_paths[sorted(NAMES).index(NAMES[1])] == train / NAMES[1]


def test_real_files(real_data):
    for name, count, tests in (("small", 500, 120), ("full", 40, 16)):
        files = read(real_data / "understanding_cloud_organization" / name)
        assert (len(files.images), len(files.test_images)) == (count, tests)
        assert files.runs.present().any(1).all()
        share = np.mean([files.runs.masks(row, (35, 50)).mean() for row in range(20)])
        assert 0.05 < share < 0.4
