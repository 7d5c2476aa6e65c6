"""A CSV is checked against the sample before it takes its place; a bad one leaves no trace."""

import csv
import errno
import hashlib
import json
import os
import re
import resource
from pathlib import Path

import numpy as np
import pytest

from common import files, submission
from common.defaults import a_row_each
from common.errors import UserError
from common.raw import RawData

LINES = ["ImageId,Label\n", "1,0\n", "2,0\n", "3,0\n"]


def sample_of(*lines: str, several: bool = False) -> submission.Sample:
    reader = csv.reader(lines)
    return submission.Sample.of(((reader.line_num, row) for row in reader if row), "the sample", several=several)


SAMPLE = sample_of(*LINES)


def digit(values):
    return None if values[0] in set("0123456789") else f"label {values[0]!r} is not 0 to 9"


def write(path, rows, sample=SAMPLE):
    return submission.write(path, sample, rows, digit, {"competition": "toy", "demo": False})


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
        ([(1, 7), (1, 0), (3, 1)], "line 3: id 1 appears twice"),
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


@pytest.mark.parametrize(
    "rows", [["1,0", "2,0"], ["a7,0.3", "a8,0.5"], ["a7.png,1 1", "a8.png,1 1"], ["7,0.1,x", "8,0.2,x"]]
)
def test_a_sample_without_its_header_is_refused(rows):
    """Its first id was taken for the name of a column, and so was neither predicted nor missed."""
    with pytest.raises(UserError, match=f"the sample line 1: '{re.escape(rows[0])}' is a row, expected the names"):
        sample_of(*(f"{row}\n" for row in rows))


@pytest.mark.parametrize("header", ["id,0,1", "id,cats", "sha256,x", "v2,x,0"])
def test_names_of_columns_may_be_numbers(header):
    count = header.count(",")
    assert sample_of(f"{header}\n", "a" + ",0" * count + "\n", "b" + ",1" * count + "\n").ids == ("a", "b")


def test_the_header_must_be_the_samples(tmp_path):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    with pytest.raises(UserError, match="header is 'ImageId,Label', expected 'id,Label'"):
        submission.check(path, sample_of("id,Label", *LINES[1:]))


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


def test_a_disk_that_is_full_for_the_sidecar_keeps_both_old_files(tmp_path):
    path = write(tmp_path / "run.csv", [(1, 7), (2, 0), (3, 9)])
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    allowed = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, allowed[1]))
    try:
        with pytest.raises(UserError, match="run.json could not be written"):
            submission.write(path, SAMPLE, [(1, 1), (2, 1), (3, 1)], digit, {"note": "x" * 9000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, allowed)
    assert (path.read_bytes(), path.with_suffix(".json").read_bytes()) == before


def test_two_that_write_the_same_submission_at_once_each_write_a_whole_one(tmp_path):
    path = tmp_path / "run.csv"

    def other_writes(values):
        if not path.exists():
            child = os.fork()
            if not child:
                os._exit(write(path, [(1, 2), (2, 2), (3, 2)]) != path)
            assert os.waitpid(child, 0)[1] == 0

    submission.write(path, SAMPLE, [(1, 7), (2, 0), (3, 9)], other_writes, {})
    assert path.read_text() == "ImageId,Label\n1,7\n2,0\n3,9\n"
    assert submission.sidecar(path)["sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.csv", "run.json"]


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


def test_a_sample_says_its_columns_ids_and_which_cells_are_numbers(tmp_path):
    text = '\ufeffid,runs,score,o3,label\nb,"1 1",0.5,0,7\n\na,"2\n3",1e-3,,8\n'
    (tmp_path / "Sample_Submission.csv").write_text(text, encoding="utf-8")
    sample = submission.Sample.read(RawData(tmp_path, "toy"), text=("label",))
    assert sample.columns == ("id", "runs", "score", "o3", "label") and sample.ids == ("b", "a")
    assert sample.numeric == {"score", "o3"} and sample.blank == {"o3"}
    assert sample.fault(["", "0.25", "", "any"]) is None, "a blank is refused where the sample has none"
    for row in (["", "", "0", "x"], ["", "0.5", "x", "x"], ["nan", "0.5", "0", "x"]):
        assert "has the value " + ",".join(row) in sample.fault(row)


@pytest.mark.parametrize(
    "cell", ["tensor(0.0037)", "", "nan", "inf", "-Infinity", "1e999", "0x1", "1_000", "٣", "True", "[1]", "1,5", "5%"]
)
def test_where_the_sample_has_numbers_a_cell_is_one(tmp_path, cell):
    with pytest.raises(UserError, match="line 3: id b has the value .*, expected a finite number in y"):
        submission.write(tmp_path / "x.csv", sample_of("id,y", "a,0.5", "b,1"), [("a", 1), ("b", cell)], None, {})
    assert list(tmp_path.iterdir()) == []


def test_numbers_of_every_library_are_written(tmp_path):
    values = [1, -2.5, 1e-300, np.float32(0.1), np.int64(3), np.float64(1e20), "+.5", "1.", "1E5"]
    ids = [f"r{place}" for place in range(len(values))]
    sample = sample_of("id,y", *(f"{name},0" for name in ids))
    assert submission.check(
        submission.write(tmp_path / "x.csv", sample, list(zip(ids, values, strict=True)), None, {}), sample
    ) == len(values)


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        ([], "line 1: the header is ''"),
        (["id"], "line 1: the header is 'id', expected the column of the ids and at least one other"),
        (["id,y,", "a,1,"], "line 1: the header is 'id,y,'"),
        (["id,y,y", "a,1,1"], "each with a name of its own"),
        (["id,y"], "has a header and no rows"),
        (["id,y", "a,1", "", "b,1,2"], "line 4: 3 values, expected 2"),
        (["id,y", "a,1", "a,2"], "line 3: id a appears twice, first in line 2"),
        (["id,y", ",1"], "line 2: the id is empty"),
    ],
)
def test_a_sample_that_no_submission_could_follow_is_named(tmp_path, lines, told):
    (tmp_path / "sample_submission.csv").write_text("\n".join(lines))
    with pytest.raises(UserError, match=re.escape(f"{tmp_path}/sample_submission.csv") + ".*" + re.escape(told)):
        submission.Sample.read(RawData(tmp_path, "toy"))


def test_a_sample_of_another_name_is_named(tmp_path):
    (tmp_path / "gender_submission.csv").write_text("id,y\na,1\n")
    with pytest.raises(UserError, match="but gender_submission.csv: .*Submission.sample='gender_submission.csv'"):
        submission.Sample.read(RawData(tmp_path, "toy"))
    assert submission.Sample.read(RawData(tmp_path, "toy"), "gender_submission.csv").ids == ("a",)


@pytest.mark.parametrize(
    ("ids", "told"),
    [
        (["1", "2"], "id 3 is missing"),
        (["1", "1", "3"], "id 1 appears twice, id 2 is missing"),
        (["1", "2", "3", "4"], "id 4 is not in the sample submission"),
    ],
)
def test_ids_are_compared_before_there_is_anything_to_submit(ids, told):
    SAMPLE.check_ids([1, 2, 3])
    SAMPLE.check_ids([3, 1, 2])
    with pytest.raises(UserError, match="the rows to predict are not those of the sample: .*" + told):
        SAMPLE.check_ids(ids)


def test_rows_are_put_in_the_order_of_the_sample_and_what_is_not_of_it_goes_last():
    def ordered(rows):
        return [(int(row[0]), *row[1:]) for row in SAMPLE.in_order(iter(rows))]

    assert ordered([(1, 7), (3, 9), (2, 8)]) == [(1, 7), (2, 8), (3, 9)]
    assert ordered([(3, 9), (4, 0), (1, 7), (1, 6), (2, 8)]) == [(1, 7), (1, 6), (2, 8), (3, 9), (4, 0)]
    passed = SAMPLE.in_order(iter([(1, 7), (2, 8), ()]))
    assert next(passed) == (1, 7) and [*passed] == [(2, 8), ()]


SEVERAL = sample_of("id,runs", "a,1 1", "b,1 1", "b,", "c,1 1", several=True)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (["a 1 2", "b 3 1", "b 5 2", "b 9 1", "c "], None),
        (["a 1 2", "b ", "c 1 1", "c 4 4"], None),
        (["a 1 2", "a 3 3", "c 1 1"], "line 4: id c, expected b"),
        (["\ta 1 2", "a 3 3", "c 1 1"], "line 2: id '.ta', expected a"),
        (["a 1 2", "b 3 3"], "line 4: id c is missing"),
        (["a 1 2", "b 3 3", "a 4 4", "c 1 1"], "line 4: id a appears twice"),
        (["a 1 2", "b 3 3", "c 4 4", "d 1 1"], "line 5: id d is not in the sample"),
    ],
)
def test_an_id_has_several_rows_where_the_task_says_so(tmp_path, rows, told):
    """As with several objects in an image: the rows of an id must be adjacent, and no id may be missing."""
    assert SEVERAL.ids == ("a", "b", "c")
    path, cells = tmp_path / "x.csv", [row.split(" ", 1) for row in rows]
    if told is None:
        submission.write(path, SEVERAL, cells, None, {})
        assert list(csv.reader(open(path)))[1:] == cells and submission.check(path, SEVERAL) == len(cells)
        shuffled = sorted(cells, key=lambda row: "bca".index(row[0]))
        assert list(SEVERAL.in_order(iter(shuffled))) == list(SEVERAL.in_order(iter(cells))) == cells
    else:
        with pytest.raises(UserError, match=told):
            submission.write(path, SEVERAL, cells, None, {})
        assert not path.exists()
    with pytest.raises(UserError, match="id b appears twice, first in line 3, .*Submission.several=True"):
        sample_of("id,runs", "a,1 1", "b,1 1", "b,")


def test_where_the_sample_has_true_and_false_no_probability_is_taken_for_them(tmp_path):
    sample = sample_of("id,alive,note", "a,False,", "b,TRUE,True")
    check = lambda cell: submission.write(tmp_path / "x.csv", sample, [("a", True, 1), ("b", cell, 0.5)], None, {})  # noqa: E731
    check(False)
    for cell in (0.2, 1, ""):
        with pytest.raises(UserError, match="line 3: id b has the value .*, expected True or False in alive"):
            check(cell)


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
    write(tmp_path / "a.csv", rows, sample_of(*LINES, "\n"))
    with pytest.raises(UserError, match="line 5: id 4 is not in the sample"):
        write(tmp_path / "b.csv", [*rows, (4, 1)], sample_of(*LINES, "\n"))


def test_a_disk_that_became_read_only_is_told(tmp_path, monkeypatch):
    """Deleting the draft fails as well, even if there is none."""

    def read_only(*arguments, **options):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    monkeypatch.setattr(Path, "unlink", read_only)
    with pytest.raises(UserError, match="run.csv could not be written .Read-only.*Make it writable for you"):
        files.write_text(tmp_path / "run.csv", "x")


def test_a_sample_of_another_name_is_named_wherever_it_is_asked_for(tmp_path):
    """Also in SOURCE: make submit compares with the file that it names."""
    (tmp_path / "sample_submission_v2.csv").write_text("id,label\n1,0\n")
    with pytest.raises(UserError, match=r"Submission\(sample=.*make submit in config.py, .*sample_submission='sample_"):
        submission.Sample.read(RawData(tmp_path, "toy"))


def test_whole_numbers_have_no_point_and_all_others_keep_every_digit():
    decisions = np.float64([[2.0, 0.1 + 0.2], [-0.0, 1e-300], [np.nan, np.inf], [2.0**60, -3.0]])
    assert [list(map(str, row)) for row in a_row_each("abcd", decisions)] == [
        ["a", "2", "0.30000000000000004"],
        ["b", "0", "1e-300"],
        ["c", "nan", "inf"],
        ["d", str(2**60), "-3"],
    ]
    assert list(a_row_each("ab", np.float32([1, 0.5]))) == [("a", 1), ("b", 0.5)]
