"""The label files: labels kept, label counts and refused files."""

import numpy as np
import pytest

from common.errors import UserError
from common.raw import RawData
from common.tables import reading
from competitions.inclusive_images import labels

CODES = "label_code\n/m/b\n/m/a\n/m/c\n/m/never\n"
TRAIN = """ImageID,Source,LabelName,Confidence
img2,verification,/m/a,1
img1,verification,/m/b,1
img1,verification,/m/a,0
img2,verification,/m/odd,1
img1,machine,/m/c,0.4
img2,verification,/m/a,1
img3,verification,/m/b,0
img1,verification,/m/other,0
"""


def folder(tmp_path, **files) -> RawData:
    texts = {"classes-trainable.csv": CODES, "train_human_labels.csv": TRAIN, "tuning_labels.csv": "t1,/m/a /m/b\n"}
    for name, text in (
        texts | {name.replace("__", ".").replace("_DASH_", "-"): t for name, t in files.items()}
    ).items():
        (tmp_path / name).write_text(text)
    return RawData(tmp_path, "inclusive_images")


def test_train_labels_by_hand(tmp_path):
    raw = folder(tmp_path)
    index = labels.read_index(raw)
    table = labels.read_train(raw, index)
    assert index.codes == ("/m/b", "/m/a", "/m/c", "/m/never")
    assert table.ids.tolist() == ["img1", "img2"]
    assert table.matrix.toarray().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    counts = table.counts
    assert (counts.rows, counts.zero_confidence, counts.repeated) == (8, 3, 1)
    assert dict(counts.untrainable) == {"/m/odd": 1}, "a code of confidence 0 was not given to the image at all"
    assert (counts.unseen, counts.without_labels) == (1, 1)
    assert "1 rows of 1 codes that are not trainable" in str(counts) and "never occur" in str(counts)


def test_the_order_of_the_file_changes_nothing(tmp_path):
    raw = folder(tmp_path)
    index = labels.read_index(raw)
    first = labels.read_train(raw, index)
    lines = TRAIN.splitlines()
    (tmp_path / "train_human_labels.csv").write_text("\n".join([lines[0], *lines[:0:-1]]) + "\n")
    second = labels.read_train(raw, index)
    assert first.ids.tolist() == second.ids.tolist()
    assert (first.matrix != second.matrix).nnz == 0


def test_chunks_do_not_show(tmp_path, monkeypatch):
    rng = np.random.default_rng(0)
    rows = [f"i{rng.integers(50):02d},v,/m/{'abc'[rng.integers(3)]},{rng.integers(2)}" for _ in range(500)]
    raw = folder(tmp_path, train_human_labels__csv="ImageID,Source,LabelName,Confidence\n" + "\n".join(rows) + "\n")
    index = labels.read_index(raw)
    whole = labels.read_train(raw, index)
    monkeypatch.setattr(reading, "BYTES_AT_ONCE", 150)
    parts = labels.read_train(raw, index)
    expected = {(row.split(",")[0], row.split(",")[2]) for row in rows if row.endswith(",1")}
    place = parts.matrix.nonzero()
    found = {(str(parts.ids[i]), index.codes[j]) for i, j in zip(*place, strict=True)}
    assert found == expected and (whole.matrix != parts.matrix).nnz == 0 and str(whole.counts) == str(parts.counts)


def test_index_is_a_bijection(tmp_path):
    index = labels.read_index(folder(tmp_path))
    assert [index.column[code] for code in index.codes] == list(range(len(index)))
    assert index.text([index.column["/m/c"], index.column["/m/b"]]) == "/m/c /m/b"


def test_tuning_labels_without_header(tmp_path):
    raw = folder(tmp_path, tuning_labels__csv="t2,/m/a /m/zzz\nt1,/m/c /m/b\nt3,/m/zzz\nt4,\n")
    table = labels.read_tuning(raw, labels.read_index(raw))
    assert table.ids.tolist() == ["t1", "t2"]
    assert table.matrix.toarray().tolist() == [[1, 0, 1, 0], [0, 1, 0, 0]]
    assert table.counts.untrainable.total() == 2 and table.counts.without_labels == 2


@pytest.mark.parametrize(
    "name, text, words",
    [
        ("train_human_labels.csv", "ImageID,LabelName\na,b\n", "Confidence"),
        ("train_human_labels.csv", "ImageID,Source,LabelName,Confidence\n", "no rows"),
        ("train_human_labels.csv", "ImageID,Source,LabelName,Confidence\na,v,/m/zzz,1\n", "no row has a trainable"),
        (
            "train_human_labels.csv",
            "ImageID,Source,LabelName,Confidence\na,v,/m/a,high\n",
            "line 2, column Confidence: 'high'",
        ),
        ("classes-trainable.csv", "code\n/m/a\n", "expected label_code"),
        ("classes-trainable.csv", "label_code\n", "has no rows"),
        ("classes-trainable.csv", "label_code\n/m/b\n/m/a \n", "line 3: '/m/a ', expected a code without spaces"),
        ("classes-trainable.csv", "label_code\n/m/b\n/m/a\n/m/b\n", "line 4: label_code '/m/b' appears twice"),
        ("tuning_labels.csv", "t1,/m/a\nt1,/m/b\n", "'t1' appears twice"),
        ("tuning_labels.csv", "t1\n", "line 1"),
    ],
)
def test_bad_files_are_refused_by_name(tmp_path, name, text, words):
    raw = folder(tmp_path)
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=words) as error:
        index = labels.read_index(raw)
        labels.read_train(raw, index)
        labels.read_tuning(raw, index)
    assert name in str(error.value) and "make data" in str(error.value)


def test_real_labels(real_data):
    raw = RawData(real_data / "inclusive-images-challenge" / "labels_only", "inclusive_images")
    index = labels.read_index(raw)
    table = labels.read_train(raw, index)
    assert (len(index), table.matrix.shape, table.matrix.nnz) == (7178, (24290, 7178), 98373)
    assert table.counts.rows == 103137 and len(labels.read_tuning(raw, index)) == 1000
