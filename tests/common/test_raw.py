"""Data come from the given path, data/<competition> or the demo; folders and archives are read alike."""

import csv
import errno
import io
import os
import warnings
import zipfile
from types import SimpleNamespace

import pytest

from common import archive as common_archive
from common import raw, tables
from common.errors import UserError


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def sample(folder):
    (folder / "train.csv").write_text("sample")


def archive(path, **files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as stream:
        for name, text in files.items():
            stream.writestr(f"{name}.csv", text)
    return path


def test_without_data_the_sample_is_made_once_and_announced(tmp_path):
    said = []
    found = raw.find("toy", None, sample, said.append)
    assert found.is_demo and found.read("train.csv") == b"sample"
    assert len(said) == 1 and "demo" in said[0] and "make data COMP=toy" in said[0] and "DATA=" in said[0]
    again = raw.find("toy", None, lambda folder: pytest.fail("made twice"), said.append)
    assert again.path == found.path and list((tmp_path / "data" / "demo").iterdir()) == [tmp_path / found.path]


def test_the_sample_is_made_again_when_its_code_has_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(raw, "COMPETITIONS", tmp_path)
    (tmp_path / "toy").mkdir()
    for code in ("first", "second", "second"):
        (tmp_path / "toy" / "demo.py").write_text(code)
        found = raw.find("toy", None, lambda folder, code=code: (folder / "train.csv").write_text(code), str)
        assert found.read("train.csv") == code.encode() and found.names() == ["train.csv"]
    raw.find("toy", None, lambda folder: pytest.fail("made again"), str)


def test_a_sample_that_fails_half_way_is_not_taken_for_whole(tmp_path):
    def broken(folder):
        (folder / "train.csv").write_text("half")
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError):
        raw.find("toy", None, broken, str)
    assert raw.find("toy", None, sample, str).read("train.csv") == b"sample"


def test_the_data_folder_wins_over_the_sample(tmp_path):
    home = tmp_path / "data" / "toy"
    home.mkdir(parents=True)
    (home / "train.csv").write_text("real")
    found = raw.find("toy", None, sample, pytest.fail)
    assert not found.is_demo and found.read("train.csv") == b"real"


def test_a_zip_and_the_folder_that_holds_it_read_alike(tmp_path):
    path = archive(tmp_path / "download" / "toy.zip", train="a,b", test="c")
    for given in (path, path.parent):
        found = raw.find("toy", str(given), sample, pytest.fail)
        assert found.path == path and found.names() == ["test.csv", "train.csv"]
        assert found.read("train.csv") == b"a,b"
    folder = tmp_path / "unpacked"
    zipfile.ZipFile(path).extractall(folder)
    unpacked = raw.RawData(folder, "toy")
    assert unpacked.read("train.csv") == b"a,b" and unpacked.opened_fingerprint() == found.opened_fingerprint()


def test_what_a_file_manager_leaves_beside_the_archive(tmp_path):
    path = archive(tmp_path / "download" / "toy.zip", train="a,b")
    (path.parent / ".DS_Store").write_bytes(b"?")
    assert raw.find("toy", str(path.parent), sample, pytest.fail).path == path


def test_hidden_files_and_the_cache_are_no_data(tmp_path):
    (tmp_path / "data" / "toy" / "cache").mkdir(parents=True)
    (tmp_path / "data" / "toy" / ".DS_Store").write_bytes(b"?")
    assert raw.find("toy", None, sample, str).is_demo


def test_processes_that_unpack_at_once_agree(tmp_path, monkeypatch):
    path = archive(tmp_path / "toy.zip", train="a,b")
    unpack_into, target = common_archive.unpack_into, raw.RawData(path, "toy").folder()
    common_archive.shutil.rmtree(target)

    def overtaken(packed, folder):
        entries = unpack_into(packed, folder)
        unpack_into(packed, target)  # another process finishes first
        return entries

    monkeypatch.setattr(common_archive, "unpack_into", overtaken)
    assert raw.RawData(path, "toy").folder() == target
    assert [file.name for file in target.parent.iterdir()] == [target.name]
    assert (target / "train.csv").read_text() == "a,b"


@pytest.mark.parametrize("fault", [RuntimeError("stopped"), KeyboardInterrupt(), None])
def test_a_demo_that_writes_nothing_hides_no_later_mend(tmp_path, fault):
    def broken(folder):
        (folder / "cache").mkdir()
        if fault:
            raise fault

    with pytest.raises(type(fault) if fault else UserError, match=None if fault else "write_demo wrote no file"):
        raw.find("toy", None, broken, str)
    assert list((tmp_path / "data" / "demo").iterdir()) == []
    (tmp_path / "data" / "demo" / "toy").mkdir()  # as earlier versions left it
    assert raw.find("toy", None, sample, str).read("train.csv") == b"sample"


def test_what_a_kill_leaves_behind_is_swept_by_the_next_run(tmp_path):
    for left in ("data/demo/toy.4711.part", "cache/.unpacked-0123.4711.part"):
        (tmp_path / left).mkdir(parents=True)
        (tmp_path / left / "half").touch()
    (tmp_path / "data" / "demo" / "toys.4711.part").mkdir()  # of another competition
    raw.find("toy", None, sample, str)
    assert sorted(path.name for path in (tmp_path / "data" / "demo").iterdir()) == ["toy", "toys.4711.part"]
    folder = raw.RawData(archive(tmp_path / "toy.zip", train="a,b"), "toy").folder()
    assert list((tmp_path / "cache").iterdir()) == [folder]


def test_linked_folders_are_read_and_loops_end(tmp_path):
    data, elsewhere = tmp_path / "files", tmp_path / "elsewhere"
    (data / "a").mkdir(parents=True)
    (elsewhere / "deep").mkdir(parents=True)
    for file in (data / "a" / "1.csv", elsewhere / "2.csv", elsewhere / "deep" / "3.csv"):
        file.write_text("x")
    (data / "april").symlink_to(elsewhere)
    (data / "one.csv").symlink_to(elsewhere / "2.csv")
    (data / "a" / "up").symlink_to(data)
    (elsewhere / "round").symlink_to(elsewhere / "deep")
    (elsewhere / "deep" / "back").symlink_to(data)
    (data / "itself").symlink_to(data / "itself")
    (data / "nowhere").symlink_to(tmp_path / "nothing")
    found = raw.RawData(data, "toy")
    assert found.names() == ["a/1.csv", "april/2.csv", "april/deep/3.csv", "april/round/3.csv", "one.csv"]
    assert all(found.read(name) == b"x" for name in found.names())


def test_a_name_in_other_case_is_found_and_two_are_refused(tmp_path):
    path = archive(tmp_path / "toy.zip", Sample_Submission="a", other="b")
    folder = tmp_path / "files"
    zipfile.ZipFile(path).extractall(folder)
    for data in (raw.RawData(path, "toy"), raw.RawData(folder, "toy")):
        assert data.exists("sample_submission.csv") and data.read("sample_submission.csv") == b"a"
        assert data.matching("*sample_submission*.csv") == ["Sample_Submission.csv"]
        assert not data.exists("train.csv") and not data.exists("no/a.csv")
    (folder / "SAMPLE_submission.csv").write_text("c")
    with pytest.raises(UserError, match="has no sample_submission.csv, but SAMPLE_submission.csv and Sample_Sub"):
        data.read("sample_submission.csv")
    assert data.read("SAMPLE_submission.csv") == b"c"


def test_names_that_are_not_utf8_are_refused_before_anything_is_opened(tmp_path):
    odd = os.fsdecode(b"donn\xe9es")
    (tmp_path / odd).mkdir()
    (tmp_path / "link").symlink_to(tmp_path / odd)
    for given in (odd, "link"):
        with pytest.raises(UserError, match=r"donn.xe9es has a name that is not UTF-8.*rename it") as caught:
            raw.find("toy", given, sample, pytest.fail)
        str(caught.value).encode()
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / os.fsdecode(b"\xb1\xb1.csv")).touch()
    with pytest.raises(UserError, match=r"xb1.xb1.csv has a name that is not UTF-8"):
        raw.RawData(tmp_path / "files", "toy").names()


def test_the_fingerprint_is_of_what_was_opened_in_any_order_and_place(tmp_path):
    path = archive(tmp_path / "toy.zip", a="1", b="2", sample="3")
    folder = tmp_path / "files"
    zipfile.ZipFile(path).extractall(folder)

    def opened(where, *names):
        data = raw.RawData(where, "toy")
        for name in names:
            data.read(name)
        data.uncounted().read("sample.csv")
        return data.opened_fingerprint()

    whole = opened(folder, "a.csv", "b.csv")
    assert whole == opened(folder, "b.csv", "a.csv", "a.csv") == opened(path, "b.csv", "a.csv")
    streamed = raw.RawData(path, "toy")
    for name in ("b.csv", "a.csv"):
        streamed.open(name).close()
    assert streamed.opened_fingerprint() == whole
    assert len({whole, opened(folder, "a.csv"), opened(folder, "b.csv"), opened(folder)}) == 4
    (folder / "sample.csv").write_text("9")
    assert opened(folder, "a.csv", "b.csv") == whole, "a mended sample trains nothing again"
    (folder / "a.csv").write_text("9")
    assert opened(folder, "a.csv", "b.csv") != whole


def test_a_quoted_cell_may_hold_the_end_of_a_line(tmp_path):
    (tmp_path / "a.csv").write_text('id,text\r\n1,"two\nlines\u2028"\r\n\r\n2,b\r\n', encoding="utf-8", newline="")
    assert list(raw.RawData(tmp_path, "toy").rows("a.csv")) == [
        (1, ["id", "text"]), (3, ["1", "two\nlines\u2028"]), (5, ["2", "b"])]  # fmt: skip


def test_a_run_on_the_sample_predicts_the_sample_whatever_came_later(tmp_path):
    provenance = {"competition": "toy", "demo": True, "data": str(raw.find("toy", None, sample, str).path)}
    home = tmp_path / "data" / "toy"
    home.mkdir(parents=True)
    (home / "train.csv").write_text("real")
    assert raw.of_run(provenance, None, sample).is_demo
    assert raw.of_run(provenance, str(home), sample).read("train.csv") == b"real"
    assert raw.of_run(provenance | {"demo": False, "data": str(home)}, None, sample).read("train.csv") == b"real"


def test_a_run_of_another_machine_takes_the_data_of_this_one(tmp_path):
    """A run from Kaggle names its data /kaggle/input/...; demo data never replace them."""
    provenance = {"competition": "toy", "demo": False, "data": "/kaggle/input/competitions/toy"}
    with pytest.raises(
        UserError, match="trained on /kaggle/input/competitions/toy, which is gone, .* make data COMP=toy"
    ):
        raw.of_run(provenance, None, sample)
    home = tmp_path / "data" / "toy"
    home.mkdir(parents=True)
    (home / "train.csv").write_text("real")
    assert raw.of_run(provenance, None, sample).read("train.csv") == b"real"


def test_a_disk_without_room_for_the_sample(tmp_path):
    def full(folder):
        (folder / "train.csv").write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(UserError, match="No space left"):
        raw.find("toy", None, full, str)
    assert not list((tmp_path / "data" / "demo").iterdir())


def test_an_encrypted_archive_is_named(tmp_path):
    path = archive(tmp_path / "toy.zip", train="x" * 100)
    data = bytearray(path.read_bytes())
    central = data.index(b"PK\x01\x02")
    data[6] |= 1  # the encryption flag in the member's own header; the next line sets it in the directory
    data[central + 8] |= 1
    path.write_bytes(bytes(data))
    with pytest.raises(UserError, match="train.csv .*encrypted.*unpack it with another program"):
        raw.RawData(path, "toy").read("train.csv")


def test_an_archive_of_a_kind_that_python_cannot_unpack_is_not_called_damaged(tmp_path):
    """Windows packs files of 2 GB by Deflate64, method 9. Downloading it again would not help."""
    path = archive(tmp_path / "toy.zip", train="x" * 100)
    data = bytearray(path.read_bytes())
    data[8] = data[data.index(b"PK\x01\x02") + 10] = 9
    path.write_bytes(bytes(data))
    for use in (lambda: raw.RawData(path, "toy").read("train.csv"), lambda: raw.RawData(path, "toy").folder()):
        with pytest.raises(UserError, match=r"train.csv cannot be .*not supported\): unpack it with another"):
            use()
    (tmp_path / "data.tar.gz").write_bytes(b"\x1f\x8b" + bytes(100))
    with pytest.raises(UserError, match="another kind .tar.gz, 7z., unpack it with another program"):
        raw.RawData(tmp_path / "data.tar.gz", "toy").read("train.csv")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "Train.csv.zip").write_bytes(b"")
    (folder / "notes.txt").write_bytes(b"")
    with pytest.raises(UserError, match="no train.csv .*or unpack Train.csv.zip and pass DATA=/path/to/folder"):
        raw.RawData(folder, "toy").read("train.csv")


def test_the_sample_stays_a_sample_when_it_is_given_as_data(tmp_path):
    made = raw.find("toy", None, sample, str)
    assert raw.find("toy", str(made.path), sample, pytest.fail).is_demo
    assert raw.find("toy", str(made.path.resolve()), sample, pytest.fail).is_demo


def test_text_is_utf8_without_a_mark_and_a_bad_byte_is_named(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbfid\n\xc3\xa9\n")
    (tmp_path / "b.csv").write_bytes(b"id\n1\n\xe9\n")
    data = raw.RawData(tmp_path, "toy")
    assert data.text("a.csv") == "id\n\u00e9\n"
    with pytest.raises(UserError, match="b.csv line 3: byte 0xe9 .*make data COMP=toy"):
        data.text("b.csv")


def test_files_that_may_not_be_read(tmp_path, monkeypatch):
    """Permission errors are simulated, because the tests may run as root, which may read every file."""

    def forbidden(*given, **options):
        raise PermissionError(errno.EACCES, "Permission denied")

    path = archive(tmp_path / "toy.zip", train="a")
    folder = tmp_path / "files"
    folder.mkdir()
    (folder / "train.csv").write_text("a")
    monkeypatch.setattr(raw.zipfile, "ZipFile", forbidden)
    monkeypatch.setattr("builtins.open", forbidden)
    for place in (path, folder):
        with pytest.raises(UserError, match="cannot be read .Permission denied.: make it readable for you"):
            raw.RawData(place, "toy").read("train.csv")
    monkeypatch.setattr(raw.Path, "exists", forbidden)
    with pytest.raises(UserError, match="Permission denied"):
        raw.find("toy", str(path), sample, pytest.fail)
    monkeypatch.setattr(raw.Path, "is_file", forbidden)
    with pytest.raises(UserError, match="train.csv cannot be read .Permission denied"):
        raw.RawData(folder, "toy").exists("train.csv")
    monkeypatch.setattr(raw.Path, "iterdir", forbidden)
    (raw.DATA / "toy").mkdir(parents=True)
    with pytest.raises(UserError, match="toy cannot be read .Permission denied"):
        raw.find("toy", None, sample, pytest.fail)


@pytest.mark.parametrize("other", ["./train.csv", "train.csv"])
def test_a_name_that_an_archive_has_twice_is_refused(tmp_path, other):
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as stream, warnings.catch_warnings(action="ignore"):
        stream.writestr("train.csv", "1")
        stream.writestr(other, "2")
    with pytest.raises(UserError, match="a.zip holds train.csv twice"):
        raw.RawData(tmp_path / "a.zip", "toy").read("train.csv")


@pytest.mark.parametrize("cut", ['2,"0\n3,0\n', '2,"0', '2,"', '2,"0\n\n"", ""\n'])
def test_a_quote_that_is_not_closed_is_refused_by_its_line(tmp_path, cut):
    """Its cell would swallow all the rows after it, without any error when the file is cut off there."""
    (tmp_path / "a.csv").write_text(f'id,y\n\n1,"0\n"\n{cut}')
    data = raw.RawData(tmp_path, "toy")
    with pytest.raises(UserError, match=r"a.csv line 5: a quote opens here and is not closed: mend the file"):
        list(data.rows("a.csv"))
    with pytest.raises(UserError, match=r"a.csv line 5: a quote opens here and is not closed: mend the file"):
        tables.read(data, "a.csv")


@pytest.mark.parametrize("text", ["", "a", 'a,b\r\n1,"2"', 'a,"b""c"\r\n\r\n"x\ny",2\r\n', 'a "b" c,"d"e\n'])
def test_rows_are_those_of_the_file(tmp_path, text):
    (tmp_path / "a.csv").write_bytes(text.encode())
    expected = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    assert [row for _, row in raw.RawData(tmp_path, "toy").rows("a.csv")] == expected


def test_errors_name_the_path_and_the_next_command(tmp_path):
    with pytest.raises(UserError, match="DATA=/nowhere does not exist"):
        raw.find("toy", "/nowhere", sample, str)
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for given in ("~nobody-of-that-name/data", "circle", "long" * 99):
        with pytest.raises(UserError, match=f"DATA={given} (leads nowhere|does not exist)"):
            raw.find("toy", given, sample, str)
    path = archive(tmp_path / "toy.zip", train="x" * 10_000)
    with pytest.raises(UserError, match=r"has no test.csv \(found: train.csv\).*make data COMP=toy"):
        raw.RawData(path, "toy").open("test.csv")
    deep = archive(tmp_path / "deep.zip", **{"toy/files/train": "x"})
    with pytest.raises(UserError, match="or unpack it and pass its toy/files$"):
        raw.RawData(deep, "toy").open("Train.csv")
    (tmp_path / "home" / "toy").mkdir(parents=True)
    (tmp_path / "home" / "toy" / "train.csv").write_text("x")
    with pytest.raises(UserError, match=f"or pass DATA={tmp_path}/home/toy$"):
        raw.RawData(tmp_path / "home", "toy").open("train.csv")
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(UserError, match="not a complete zip archive.*make data COMP=toy"):
        raw.RawData(path, "toy").read("train.csv")


def test_a_damaged_member_is_named(tmp_path):
    path = archive(tmp_path / "toy.zip", train="x" * 10_000)
    data = bytearray(path.read_bytes())
    data[5000] ^= 1
    path.write_bytes(bytes(data))
    for use in (lambda data: data.read("train.csv"), lambda data: data.folder()):
        with pytest.raises(UserError, match="toy.zip: .*train.csv is damaged.*CRC.*make data COMP=toy"):
            use(raw.RawData(path, "toy"))


def test_a_member_that_cannot_be_inflated_is_named(tmp_path):
    packed = tmp_path / "data.zip"
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("train.csv", "label,pixel0\n" * 1000)
    content = bytearray(packed.read_bytes())
    content[30 + len("train.csv")] = 0xFF  # the first byte of the stream: an invalid type of block
    packed.write_bytes(content)
    with pytest.raises(UserError, match="train.csv is damaged.*make data COMP=toy"):
        raw.RawData(packed, "toy").read("train.csv")


def test_the_cache_lies_beside_the_data_or_where_it_can(tmp_path, monkeypatch):
    folder = tmp_path / "given"
    folder.mkdir()
    assert raw.RawData(folder, "toy").cache == folder / "cache"
    read_only = tmp_path / "read-only"
    read_only.mkdir()
    (read_only / "cache").touch()  # so that the folder cannot be created, as without write permission
    assert raw.RawData(read_only, "toy").cache == raw.DATA / "cache" / "toy"


def test_an_archive_is_unpacked_again_when_it_was_touched(tmp_path):
    """A corrected cell may leave the archive's size unchanged."""
    path = archive(tmp_path / "toy.zip", train="1")
    first = raw.RawData(path, "toy").folder()
    assert raw.RawData(path, "toy").folder() == first
    archive(path, train="2")
    os.utime(path, ns=(1, 1))
    second = raw.RawData(path, "toy").folder()
    assert second != first and (second / "train.csv").read_text() == "2"


def test_an_archive_that_the_disk_cannot_hold_is_refused_before_it_is_unpacked(tmp_path, monkeypatch):
    path = archive(tmp_path / "toy.zip", train="x" * 10_000_000)

    def room(free):
        monkeypatch.setattr(common_archive.shutil, "disk_usage", lambda folder: SimpleNamespace(free=free))

    room(common_archive.SPARE_BYTES + 9_999_999)
    with pytest.raises(UserError, match=r"toy.zip needs 0.01 GB, 0.08 GB are free: free some space"):
        raw.RawData(path, "toy").folder()
    assert not list((tmp_path / "cache").iterdir())
    room(common_archive.SPARE_BYTES + 10_000_000)
    assert (raw.RawData(path, "toy").folder() / "train.csv").stat().st_size == 10_000_000


def test_a_table_that_unpacks_to_more_than_memory_takes_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "toy.zip", "w", zipfile.ZIP_DEFLATED) as stream:
        stream.writestr("train.csv", bytes(common_archive.HARMLESS_BYTES + 1))
        stream.writestr("test.csv", bytes(1000))
    found = raw.RawData(tmp_path / "toy.zip", "toy")
    for read in (found.read, found.open, found.text):
        with pytest.raises(UserError, match="toy.zip: train.csv unpacks to more than 200 times its size"):
            read("train.csv")
    assert found.read("test.csv") == bytes(1000)


def test_what_a_mac_adds_is_no_data_wherever_files_are_found(tmp_path):
    names = ["kdd/a.csv", "__MACOSX/kdd/._a.csv", "kdd/._a.csv", "kdd/.DS_Store", "._b.csv", "kdd/.hidden/c.csv"]
    with zipfile.ZipFile(tmp_path / "mac.zip", "w") as stream:
        for name in names:
            stream.writestr(f"./{name}", name)  # as bsdtar writes them
            (tmp_path / "mac" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "mac" / name).write_text(name)
    (tmp_path / "mac/cache").mkdir()
    (tmp_path / "mac/cache/c.csv").write_text("x")
    for path in (tmp_path / "mac.zip", tmp_path / "mac"):
        found = raw.RawData(path, "toy")
        assert found.names() == ["kdd/a.csv"] == found.matching("*.CSV")
        assert raw.RawData(found.folder(), "toy").names() == ["kdd/a.csv"]
    assert [file.name for file in raw.visible(tmp_path / "mac")] == ["kdd"]
    assert [file.name for file in raw.visible(tmp_path / "mac/kdd")] == ["a.csv"]
