"""A CSV is checked against the sample before it takes its place; a bad one leaves no trace."""

import csv
import errno
import hashlib
import json
import os
from pathlib import Path

import pytest

from common import files, submission
from common.errors import UserError

LINES = ["ImageId,Label\n", "1,0\n", "2,0\n", "3,0\n"]


def sample_of(*lines: str) -> submission.Sample:
    return submission.Sample.of_lines(lines, "the sample")


SAMPLE = sample_of(*LINES)


def digit(values):
    return None if values[0] in set("0123456789") else f"label {values[0]!r} is not 0 to 9"


def write(path, rows):
    return submission.write(path, SAMPLE, rows, digit, {"competition": "toy", "demo": False})


def test_a_good_submission_is_written_with_its_origin(tmp_path):
    path = write(tmp_path / "toy" / "run.csv", [(1, 7), (2, 0), (3, 9)])
    assert list(csv.reader(open(path))) == [["ImageId", "Label"], ["1", "7"], ["2", "0"], ["3", "9"]]
    provenance = json.loads(path.with_suffix(".json").read_text())
    assert provenance == {"competition": "toy", "demo": False, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    assert submission.check(path, SAMPLE, digit) == 3


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(1, 7), (2, 0)], "line 4: id 3 is missing"),
        ([(1, 7), (2, 0), (3, 1), (4, 1)], "line 5: id 4 is not in the sample"),
        ([(2, 7), (1, 0), (3, 1)], "line 2: id 2, expected 1"),
        ([(1, 7), (1, 0), (3, 1)], "line 3: id 1 is there twice"),
        ([(1, 7), (2, float("nan")), (3, 1)], "line 3: id 2 has the value nan"),
        ([(1, 7), (2, float("-inf")), (3, 1)], "line 3: id 2 has the value -inf"),
        ([(1, 7), (2, "+Infinity"), (3, 1)], "line 3: id 2 has the value .Infinity"),
        ([(1, 7), (2, 10), (3, 1)], "line 3: id 2: label '10' is not 0 to 9"),
        ([(1, 7), (2,), (3, 1)], "line 3: 1 values, expected 2"),
        ([], "line 2: id 1 is missing"),
    ],
)
def test_a_bad_submission_is_refused_and_the_old_one_stays(tmp_path, rows, message):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    before = path.read_bytes()
    with pytest.raises(UserError, match=message):
        write(path, rows)
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.csv", "run.json"]


def test_the_header_must_be_the_samples(tmp_path):
    path = tmp_path / "run.csv"
    path.write_text("id,Label\n1,7\n2,0\n3,9\n")
    with pytest.raises(UserError, match="header is 'id,Label', expected 'ImageId,Label'"):
        submission.check(path, SAMPLE, digit)


def test_five_offenders_are_named_and_no_more(tmp_path):
    sample = sample_of("id,y\n", *(f"{i},0\n" for i in range(20)))
    with pytest.raises(UserError) as raised:
        submission.write(tmp_path / "x.csv", sample, [(i + 100, 0) for i in range(20)], None, {})
    assert str(raised.value).count("line ") == 5


def test_a_generator_that_fails_half_way_leaves_nothing(tmp_path):
    def rows():
        yield (1, 7)
        raise UserError("a prediction is NaN")

    with pytest.raises(UserError, match="NaN"):
        write(tmp_path / "run.csv", rows())
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    before = path.read_bytes()

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        write(path, [(1, 1), (2, 1), (3, 1)])
    assert path.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.csv", "run.json"]


def test_a_disk_that_is_full_for_the_sidecar_keeps_both_old_files(tmp_path, monkeypatch):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    monkeypatch.setattr(submission.json, "dumps", lambda *a, **k: full())

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="run.json could not be written"):
        write(path, [(1, 1), (2, 1), (3, 1)])
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


def test_a_disk_that_is_full_when_the_sidecar_reaches_it_keeps_both_old_files(tmp_path, monkeypatch):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    synced = []

    def full(descriptor):
        synced.append(descriptor)
        if len(synced) == 2:  # the first is the CSV's
            raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(UserError, match="run.json could not be written"):
        write(path, [(1, 1), (2, 1), (3, 1)])
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.csv", "run.json"]


def test_a_long_value_is_no_fault_and_another_encoding_is(tmp_path):
    sample = sample_of("id,runs\n", "a,\n")
    path = submission.write(tmp_path / "run.csv", sample, [("a", "1 2 " * 100_000)], None, {})
    assert submission.check(path, sample) == 1
    path.write_bytes("id,runs\na,é\n".encode("latin-1"))
    with pytest.raises(UserError, match="not readable as a CSV in UTF-8"):
        submission.check(path, sample)


@pytest.mark.parametrize(
    ("number", "remedy"), [(errno.ENOSPC, "Free disk space in"), (errno.EACCES, "Make it writable")]
)
def test_the_remedy_fits_the_error(tmp_path, number, remedy):
    assert remedy in str(files.not_written(tmp_path / "run.csv", OSError(number, "why")))


def test_an_error_of_the_rows_is_not_taken_for_the_disks(tmp_path):
    def rows():
        yield (1, 7)
        raise OSError(errno.EMFILE, "Too many open files")

    with pytest.raises(OSError, match="Too many open files"):
        write(tmp_path / "run.csv", rows())
    assert list(tmp_path.iterdir()) == []


def test_blank_lines_of_the_sample_do_not_count(tmp_path):
    rows = [(1, 7), (2, 0), (3, 9)]
    submission.write(tmp_path / "a.csv", sample_of(*LINES, "\n"), rows, digit, {})
    with pytest.raises(UserError, match="line 5: id 4 is not in the sample"):
        submission.write(tmp_path / "b.csv", sample_of(*LINES, "\n"), [*rows, (4, 1)], digit, {})


def test_a_disk_that_became_read_only_is_told(tmp_path, monkeypatch):
    """It refuses to delete the draft too, whether there is one or not."""

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="run.csv could not be written .Read-only.*Make it writable for you"):
        files.write_text(tmp_path / "run.csv", "x")
