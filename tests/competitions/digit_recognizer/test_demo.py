"""Demo data: the exact files of the competition, real digits inside, the same bytes every time."""

import csv

import numpy as np
from sklearn.datasets import load_digits

from common.raw import RawData
from competitions.digit_recognizer.demo import TRAIN_ROWS, write_demo
from competitions.digit_recognizer.reader import FILES, read


def test_files_are_those_of_the_competition(tmp_path):
    write_demo(tmp_path)
    files = FILES | {"sample_submission.csv": ["ImageId", "Label"]}
    assert {file.name for file in tmp_path.iterdir()} == set(files)
    for name, columns in files.items():
        rows = list(csv.reader((tmp_path / name).open()))
        assert rows[0] == list(columns) and {len(row) for row in rows} == {len(columns)}
    assert rows[1] == ["1", "0"] and rows[-1] == ["300", "0"]
    again = tmp_path / "again"
    again.mkdir()
    write_demo(again)
    assert all((again / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)


def test_digits_are_the_bundled_ones(tmp_path):
    write_demo(tmp_path)
    files = read(RawData(tmp_path, "digit_recognizer"))
    small, labels = load_digits(return_X_y=True)
    assert files.images.shape == (TRAIN_ROWS, 1, 28, 28) and len(files.test_images) == len(small) - TRAIN_ROWS
    assert np.array_equal(files.labels, labels[:TRAIN_ROWS])
    assert not files.images[:, 0, :4].any() and not files.images[:, 0, :, -4:].any(), "a border as in the real images"
    # Averaged over 4x4 blocks, the enlarged and the original images agree.
    inner = files.images[:, 0, 4:24, 4:24].reshape(-1, 4, 5, 4, 5).mean((2, 4)) / 255
    blocks = small[:TRAIN_ROWS].reshape(-1, 4, 2, 4, 2).mean((2, 4)) / 16
    assert np.corrcoef(inner.ravel(), blocks.ravel())[0, 1] > 0.99
