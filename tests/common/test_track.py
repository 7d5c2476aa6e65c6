"""Logs of the trackers are read back with the trackers' own readers; without a tracker none is imported."""

import csv
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common import track
from common.errors import UserError
from tests.common.toy_runs import same, toy_train


@pytest.fixture(autouse=True)
def _here(tmp_path, monkeypatch, no_page):
    monkeypatch.chdir(tmp_path)
    yield
    track.close()


def test_tensorboard_has_every_row_of_metrics_csv():
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = toy_train("one", fold="all", track="tensorboard")
    track.close()
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    for fold in "012":
        found = EventAccumulator(str(folder / "tensorboard" / f"fold-{fold}"))
        found.Reload()
        own = [row for row in rows if row["fold"] == fold]
        for name in ("loss", "valid_loss", "accuracy", "lr"):
            points = {event.step: event.value for event in found.Scalars(name)}
            assert points == pytest.approx({int(row["epoch"]): float(row[name]) for row in own}, rel=1e-6)
    assert same(folder, toy_train("two", fold="all")), "to be watched changes nothing"


def records(log: bytes) -> Iterator[bytes]:
    """Records of a .wandb file, a LevelDB log: a head of 7 bytes, then blocks of 32 KiB with chunks of 4 kinds."""
    place, whole, block = 7, b"", 2**15
    while place + 7 <= len(log):
        if block - place % block < 7:  # too small for another chunk
            place += block - place % block
            continue
        size, kind = struct.unpack("<HB", log[place + 4 : place + 7])
        whole += log[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in (1, 4):  # a whole record, or its last chunk
            yield whole
            whole = b""


def test_wandb_offline_has_every_row_of_metrics_csv(monkeypatch):
    pytest.importorskip("wandb")
    from wandb.proto import wandb_internal_pb2

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    folder = toy_train("one", track="wandb")
    track.close()
    (file,) = folder.glob("wandb/offline-run-*/*.wandb")
    found = []
    for data in records(file.read_bytes()):
        record = wandb_internal_pb2.Record.FromString(data)
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            found.append({(item.key or ".".join(item.nested_key)): float(item.value_json) for item in items})
    rows = list(csv.DictReader(open(folder / "metrics.csv")))
    for name in ("loss", "accuracy"):
        assert [row[name] for row in found] == pytest.approx([float(row[name]) for row in rows])
    assert [row["_step"] for row in found] == [1, 2, 3]


def test_one_that_is_not_installed_is_said_before_the_training(monkeypatch):
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    with pytest.raises(UserError, match="pip install wandb"):
        toy_train("one", track="wandb")
    assert not Path("runs").exists()


def test_nothing_is_imported_when_not_asked():
    code = "import sys; import common.train; sys.exit(any(name in sys.modules for name in ('tensorboard', 'wandb')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2]).returncode == 0
