"""Checkpoints are replaced as a whole and hold plain types only."""

import resource
from pathlib import Path

import pytest
import torch

from common import checkpoint
from common.errors import UserError


def test_round_trip(tmp_path):
    state = {"model": {"w": torch.randn(3)}, "history": [{"loss": 0.5, "fold": None}], "step": 3}
    checkpoint.save(tmp_path / "a.pt", state)
    again = checkpoint.load(tmp_path / "a.pt")
    assert torch.equal(again["model"]["w"], state["model"]["w"]) and again["history"] == state["history"]
    assert [file.name for file in tmp_path.iterdir()] == ["a.pt"]


def test_a_full_disk_keeps_the_old_checkpoint(tmp_path):
    """The limit makes the operating system itself refuse the write in the middle of torch.save."""
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"step": 1})
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(UserError, match="a.pt could not be written.*the file that was there is untouched"):
            checkpoint.save(path, {"w": torch.zeros(1_000_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def flipped(data: bytes) -> bytes:
    """Flip one bit of the weights; torch alone would not notice it."""
    at = data.index(bytes(1000)) + 500
    return data[:at] + b"\1" + data[at + 1 :]


def packed_otherwise(data: bytes) -> bytes:
    """Flip a bit in the zip directory, so that the first part is marked as compressed."""
    at = data.index(b"PK\1\2") + 10
    return data[:at] + b"\10" + data[at + 1 :]


@pytest.mark.parametrize(
    "damage",
    [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: b"junk" * 9, flipped, packed_otherwise],
)
def test_a_damaged_checkpoint_is_named(tmp_path, damage):
    path = tmp_path / "a.pt"
    checkpoint.save(path, {"w": torch.zeros(1000)})
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match="a.pt cannot be read as a checkpoint"):
        checkpoint.load(path)


def test_objects_that_could_run_code_are_refused_without_the_advice_to_run_it(tmp_path):
    torch.save({"path": Path("x")}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="cannot be read .*more than plain types and tensors") as caught:
        checkpoint.load(tmp_path / "a.pt")
    assert "weights_only" not in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("state", "told"),
    [({"step": 1}, "it has no model, seconds"), ([1, 2], "it holds a list"), (torch.ones(2), "Tensor")],
)
def test_a_checkpoint_of_something_else_is_named(tmp_path, state, told):
    torch.save(state, tmp_path / "a.pt")
    with pytest.raises(UserError, match=f"a.pt cannot be read as a checkpoint .*{told}"):
        checkpoint.load(tmp_path / "a.pt", "model", "step", "seconds")


def test_weights_of_another_network_are_one_line(tmp_path):
    model, optimizer = torch.nn.Linear(3, 2), torch.optim.Adam(torch.nn.Linear(3, 2).parameters())
    for use in (
        lambda: model.load_state_dict(torch.nn.Linear(4, 2).state_dict()),
        lambda: model.load_state_dict({"other": torch.ones(1)}),
        lambda: optimizer.load_state_dict({"state": {}, "param_groups": []}),
        lambda: {}["engine"],
    ):
        fault = pytest.raises(UserError, match=r"a.pt does not fit this network .*repeat the command")
        with fault as caught, checkpoint.restoring(tmp_path / "a.pt"):
            use()
        assert "\n" not in str(caught.value)
    with pytest.raises(torch.OutOfMemoryError), checkpoint.restoring(tmp_path / "a.pt"):
        raise torch.OutOfMemoryError("the caller's business")
