"""Valid tables are read as by pandas; faulty ones raise a message with file, line, column and value."""

import io
import zipfile

import numpy as np
import pandas as pd
import pytest

from common import tables
from common.errors import UserError
from common.raw import RawData
from common.tables import number, reading, text, whole
from common.tables.columns import Column

COLUMNS = {"id": str, "count": whole(0, 9), "size": number(0, 100, blank=True), "name": text(blank=True)}
CSV = 'id,count,size,name,more\na,1,2.5,"x, y",7\nb,2,,NA,8\nc,3,1e1,,9\n'


@pytest.fixture
def read(tmp_path):
    """A function that reads text or bytes as the table t.csv; it passes options on to tables.read."""

    def given(contents, columns=COLUMNS, **options) -> pd.DataFrame:
        raw = contents.encode() if isinstance(contents, str) else contents
        (tmp_path / "t.csv").write_bytes(raw)
        return tables.read(RawData(tmp_path, "toy"), "t.csv", columns, **options)

    return given


def fault(read, contents, *given, **options) -> str:
    with pytest.raises(UserError) as caught:
        read(contents, *given, **options)
    message = str(caught.value)
    assert "t.csv" in message and "make data COMP=toy" in message and message.isprintable() and len(message) < 600
    return message


def test_cells_have_the_types_of_their_columns(read):
    table = read(CSV)
    assert list(table) == ["id", "count", "size", "name", "more"] and list(table.index) == [0, 1, 2]
    assert list(table["id"]) == ["a", "b", "c"] and list(table["name"]) == ["x, y", "NA", ""]
    assert table["count"].dtype == np.int64 and list(table["count"]) == [1, 2, 3]
    np.testing.assert_array_equal(table["size"], [2.5, np.nan, 10])
    assert list(table["more"]) == [7, 8, 9]


def test_valid_numbers_are_parsed_by_pandas_and_not_as_texts(read, monkeypatch):
    """By texts, 200,000 rows of 30 numbers take 10 s in place of 1.3 s."""
    monkeypatch.setattr(Column, "parsed", lambda *_: pytest.fail("parsed as texts"))
    kinds = {"a": number(), "b": number(0, 9, blank=True), "c": number(dtype="float32"), "d": number()}
    table = read("a,b,c,d,e\n1,,0.5,True,x\n-2e3,9,1,False,y\n", kinds)
    assert table["a"].tolist() == [1, -2000] and table["c"].dtype == np.float32 and table["d"].tolist() == [1, 0]
    np.testing.assert_array_equal(table["b"], [np.nan, 9])


@pytest.mark.parametrize(
    ("lines", "place"),
    [
        ("1,2,3,4\n1,2,x,4\ny,2,3,z\n", "line 3, column c: 'x'"),
        ("1,2,3,z\n1,x,3,4\n", "line 2, column d: 'z'"),
        ("1,x,y,4\n", "line 2, column b: 'x'"),
        ("1,2,x,y\n", "line 2, column c: 'x'"),
    ],
)
def test_of_many_faults_the_first_of_the_first_row_is_told(read, lines, place):
    """For faults in columns of one kind or of several, in any order of the requested columns."""
    kinds = {"d": whole(), "c": whole(), "b": number(0, 9), "a": whole()}
    assert place in fault(read, f"a,b,c,d\n{lines}", kinds)


def test_columns_come_in_the_order_that_was_asked_for(read):
    assert list(read("b,a\n1,2\n", {"a": int, "b": int}).iloc[0]) == [2, 1]
    assert list(read(CSV, {"size": number(blank=True), "id": str}, others="drop")) == ["size", "id"]


def test_numbers_are_those_of_pandas(read):
    random = np.random.default_rng(0)
    frame = pd.DataFrame({"a": random.normal(size=500), "b": random.integers(-9, 9, 500), "c": random.random(500)})
    found = read(frame.to_csv(index=False), {"a": float, "b": int})
    expected = pd.read_csv(io.StringIO(frame.to_csv(index=False)))
    pd.testing.assert_frame_equal(found, expected)
    pd.testing.assert_frame_equal(read(frame.to_csv(index=False), None), expected)


MARKED = {
    "byte order mark": lambda data: b"\xef\xbb\xbf" + data,
    "Windows": lambda data: data.replace(b"\n", b"\r\n"),
    "old Mac": lambda data: data.replace(b"\n", b"\r"),
    "no last line end": lambda data: data.removesuffix(b"\n"),
    "blank lines": lambda data: data.replace(b"\n", b"\n\n  \n"),
    "UTF-16": lambda data: data.decode().encode("utf-16"),
    "UTF-16, other order": lambda data: b"\xfe\xff" + data.decode().encode("utf-16-be"),
    "quoted header": lambda data: data.replace(b"id,count,size", b'"id","count","size"'),
    "comma at every end": lambda data: b"\n".join(
        line + b"," * (number > 0) for number, line in enumerate(data.splitlines())
    ),
    "comma at every end and in the header": lambda data: data.replace(b"\n", b",\n"),
}


@pytest.mark.parametrize("quotes", [True, False])
@pytest.mark.parametrize("name", MARKED)
def test_ways_to_write_the_same_table(read, name, quotes):
    contents = CSV.encode() if quotes else CSV.replace('"x, y"', "x").encode()
    found = read(MARKED[name](contents)).filter(list(read(contents)))
    pd.testing.assert_frame_equal(found, read(contents))


@pytest.mark.parametrize("at_once", [1, 5, 40, 200])
@pytest.mark.parametrize("quote_from", [None, 0, 150])
def test_blocks_do_not_show(tmp_path, monkeypatch, at_once, quote_from):
    rows = [f"{n},{n % 7},{'“é”' * (n % 3)}" for n in range(200)]
    if quote_from is not None:
        rows[quote_from] = f'{quote_from},"1","two\nlines, ""quoted"""'
    (tmp_path / "t.csv").write_text("\r\n".join(["id,count,name", *rows, "", ""]), newline="")
    columns = {"id": str, "count": whole(0, 9, "uint8"), "name": text(blank=True, category=True)}

    def table() -> pd.DataFrame:
        return tables.read(RawData(tmp_path, "toy"), "t.csv", columns, others="drop", lines=True)

    expected = table()
    monkeypatch.setattr(reading, "BYTES_AT_ONCE", at_once)
    found = table()
    assert found.equals(expected) and len(found) == 200
    assert (found["count"].dtype, found["name"].dtype) == (np.uint8, expected["name"].dtype)
    after = 1 if quote_from is not None else 0
    assert list(found.index[[0, 199]]) == [2, 201 + after], "as an editor counts"


def test_archives_and_their_damage(tmp_path):
    path = tmp_path / "files.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("t.csv", "id\n" + "".join(f"{n}\n" for n in range(50_000)))
    assert len(tables.read(RawData(path, "toy"), "t.csv", {"id": int}, others="drop")) == 50_000
    data = bytearray(path.read_bytes())
    data[100_000] ^= 1
    path.write_bytes(data)
    with pytest.raises(UserError, match="t.csv is damaged .*make data COMP=toy"):
        tables.read(RawData(path, "toy"), "t.csv", {"id": int}, others="drop")


def changed(line: int, old: str, new: str) -> str:
    lines = CSV.splitlines()
    assert old in lines[line - 1]
    lines[line - 1] = lines[line - 1].replace(old, new)
    return "\n".join(lines) + "\n"


FAULTS = {
    "missing": (changed(1, "count", "number"), ["missing: count"]),
    "other case": (changed(1, "count", "Count"), ["missing: count", "spelt differently: 'Count' for count"]),
    "spaces": (changed(1, "count", " count "), ["missing: count", "' count ' for count"]),
    "quoted twice": (changed(1, "count", "'count'"), ["missing: count", "\"'count'\" for count"]),
    "there twice": (changed(1, "more", "count"), ["more than once: count"]),
    "semicolons": (CSV.replace('"x, y"', "x").replace(",", ";"), ["separated by ';'", "missing: id"]),
    "empty": ("", ["is empty", "expected id, count, size and 1 more"]),
    "blank first": ("\n" + CSV, ["begins with a blank line"]),
    "no rows": ("id,count,size,name\n", ["has no rows"]),
    "short row": (changed(3, ",8", ""), ["line 3 has 4 cells, expected 5"]),
    "long row": (changed(3, ",8", ",8,9"), ["line 3 has 6 cells, expected 5"]),
    "a comma at one end": (changed(3, ",8", ",8,"), ["line 3 has 6 cells, expected 5"]),
    "longer rows": (CSV.replace(",more", ""), ["line 2 has 5 cells, expected 4"]),
    "text": (changed(3, "2", "two"), ["line 3, column count: 'two', expected a whole number from 0 to 9"]),
    "fraction": (changed(3, "2", "2.0"), ["line 3, column count: '2.0', expected a whole"]),
    "exponent": (changed(3, "2", "1e0"), ["line 3, column count: '1e0'"]),
    "too large": (changed(4, "3", "10"), ["line 4, column count: '10', expected a whole number from 0 to 9"]),
    "negative": (changed(4, "3", "-3"), ["line 4, column count: '-3'"]),
    "blank": (changed(4, "3", ""), ["line 4, column count: ''"]),
    "beyond any integer": (changed(4, "3", "9" * 40), ["line 4, column count: '999"]),
    "no number": (
        changed(2, "2.5", "2;5"),
        ["line 2, column size: '2;5', expected a number from 0 to 100, or nothing"],
    ),
    "infinite": (changed(2, "2.5", "inf"), ["line 2, column size: 'inf'"]),
    "overflow": (changed(2, "2.5", "1e999"), ["line 2, column size: '1e999'"]),
    "out of range": (changed(2, "2.5", "-0.1"), ["line 2, column size: '-0.1'"]),
    "no id": (changed(2, "a,", ","), ["line 2, column id: ''"]),
    "first of two": (changed(3, "2", "x").replace("a,1", "a,y"), ["line 2, column count: 'y'"]),
    "open quote": (changed(3, "NA", '"NA'), ["line 3 has 4 cells, expected 5"]),
    "no text": (CSV.encode().replace(b"NA", b"\xe9"), ["line 3: byte 0xe9 is not UTF-8 text"]),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults_name_line_column_and_value(read, name):
    contents, words = FAULTS[name]
    for message in (fault(read, contents, id="id"), fault(read, contents, others="drop")):
        assert all(word in message for word in words), message


@pytest.mark.parametrize("name", ["NaN", "", "NA", "null"])
def test_a_number_that_must_be_there(read, name):
    assert f"line 3, column size: {name!r}" in fault(read, f"size\n1\n{name or ' '}\n3\n".replace(" \n", '""\n'),
                                                     {"size": float})  # fmt: skip
    table = read(f"a,size\n1,1\n2,{name}\n", {"size": number(blank=True)})
    assert np.isnan(table["size"][1])


def test_a_number_that_the_dtype_does_not_hold_is_refused(read):
    assert "line 3, column v: '1e39', expected a number" in fault(read, "v\n1\n1e39\n", {"v": number(dtype="float32")})
    assert read("v\n0.1\n", {"v": number(0, 0.1, dtype="float32")})["v"].tolist() == [np.float32(0.1)]


def test_true_and_false_are_1_and_0_beside_blanks_too(read):
    assert list(read("a,v\n1,True\n2,False\n", {"v": float})["v"]) == [1, 0]
    table = read("a,v\n1,True\n2,\n3,false\n4,0.5\n", {"v": number(blank=True)})
    np.testing.assert_array_equal(table["v"], [1, np.nan, 0, 0.5])
    assert "line 3, column v: 'Maybe', expected a number" in fault(read, "v\nTrue\nMaybe\nFalse\n", {"v": float})
    assert "line 3, column v: '', expected a number" in fault(read, 'v\nTrue\n""\nFalse\n', {"v": float})


def test_small_whole_numbers_never_wrap(read):
    """pandas 2.2 reads 256 as 0 in uint8."""
    pixels = {"a": whole(0, 255, "uint8"), "b": whole(-5, 5, "int8")}
    found = read("a,b\n255,-5\n0,5\n", pixels)
    assert found.to_numpy().tolist() == [[255, -5], [0, 5]]
    assert list(map(str, found.dtypes)) == ["uint8", "int8"]
    for cell in ("256,0", "-1,0", "0,251"):
        with pytest.raises(UserError, match="line 3, column"):
            read(f"a,b\n255,-5\n{cell}\n", pixels)


def test_ids_that_are_there_twice(read):
    message = fault(read, "id\nx\n\ny\nx\n", {"id": str}, id="id")
    assert "line 5: id 'x' appears twice, first in line 2" in message
    assert len(read("id\n1\n01\n", {"id": str}, id="id")) == 2, "texts, as they are written"


def test_the_advice_fits_whose_file_it_is(tmp_path):
    (tmp_path / "t.csv").write_text("a\n1\n")
    for is_demo, advice in ((False, "mend the file, or get it"), (True, "mend competitions/toy/demo.py")):
        words = f"missing: b.: name the file's columns in task.py, or {advice}"
        with pytest.raises(UserError, match=words):
            tables.read(RawData(tmp_path, "toy", is_demo), "t.csv", {"b": int})


def test_refusing_others_refuses_another_order(read):
    assert "not expected: c" in fault(read, "a,b,c\n1,2,3\n", {"a": int, "b": int}, others="refuse")
    assert "another order" in fault(read, "b,a\n1,2\n", {"a": int, "b": int}, others="refuse")
    assert "3 columns, expected 2" in fault(read, "a,b,c\n1,2,3\n", {"a": int, "b": int}, others="refuse")


def test_blank_lines_that_may_not_be(read):
    assert "line 3 is blank" in fault(read, "a,b\n1,2\n\n3,4\n", {"a": int}, blank_lines=False)
    assert len(read("a,b\n1,2\n3,4\n\n\n", {"a": int}, blank_lines=False)) == 2, "the end of the file is no line"


def test_a_line_of_spaces_is_blank_between_whole_numbers_too(read):
    table = read("a,b\n1,2\n  \n3,4\n\t\n", {"a": int, "b": int}, lines=True)
    assert table["a"].to_dict() == {2: 1, 4: 3}
    assert read("a\nx\n\xa0\n", {"a": str})["a"].tolist() == ["x", "\xa0"]


def test_tables_without_a_header(read):
    table = read('t1,/m/a /m/b\nt2,"/m/c, d"\n', {"image": str, "codes": str}, header=False, lines=True)
    assert table.loc[2].tolist() == ["t2", "/m/c, d"]
    assert "line 2 has 1 cells" in fault(read, "t1,a\nt2\n", {"image": str, "codes": str}, header=False)


def test_messages_stay_short_whatever_the_file_holds(read):
    for contents in ("id,count,size,name\n" + "7" * 5000 + ",x,1,\n", "\x00\x01" * 4000, ",".join("x" * 900) + "\n1\n"):
        fault(read, contents)
