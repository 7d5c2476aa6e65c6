"""Saved predictions are read back unchanged, or refused if damaged."""

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.files import write_npy
from common.predictions import PredictionWriter, check_names, read_ids, read_predictions, write_ids


def test_rows_of_another_shape_are_refused_and_leave_nothing(tmp_path):
    """Image sizes may differ between batches; a single array would then be read back as other images."""
    told = pytest.raises(UserError, match=r"predictions masks of a row have the shape \[3, 2\].* before \[2, 3\]")
    with told, PredictionWriter(tmp_path, "oof", 2, "float32") as writer:
        writer.add({"masks": torch.ones(1, 2, 3)})
        writer.add({"masks": torch.ones(1, 3, 2)})
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [0, "a/b"])
def test_names_that_no_file_could_have_are_refused(name):
    with pytest.raises(UserError, match=f"predictions are named {name!r}: expected a text without /"):
        check_names({name: torch.ones(2)})


def test_names_are_read_back(tmp_path):
    parts = {name: np.full((2, 3), place, np.float32) for place, name in enumerate(("a", "a.b", "c.", "[*]"))}
    with PredictionWriter(tmp_path, "oof", 2, "float32") as writer:
        writer.add({name: torch.from_numpy(part) for name, part in parts.items()})
    found = read_predictions(tmp_path, "oof")
    assert found.keys() == parts.keys() and all((found[name] == part).all() for name, part in parts.items())


@pytest.mark.parametrize("damage", [
    lambda whole: b"", lambda whole: whole[:-4], lambda whole: b"PK" + whole,
    lambda whole: whole.replace(b"}", b"(", 1),
])  # fmt: skip
def test_damaged_predictions_are_one_line(tmp_path, damage):
    write_npy(tmp_path / "oof.npy", np.ones((2, 3)))
    (tmp_path / "oof.npy").write_bytes(damage((tmp_path / "oof.npy").read_bytes()))
    with pytest.raises(
        UserError, match="oof.npy cannot be read .*restore a complete copy, or delete .* and train again"
    ):
        read_predictions(tmp_path, "oof")


@pytest.mark.parametrize("damage", [lambda whole: b"", lambda whole: whole[:-3], lambda whole: b"\xff" + whole])
def test_ids_that_are_not_those_of_the_predictions_are_refused(tmp_path, damage):
    """A blend would take the remaining ids for all of them."""
    write_npy(tmp_path / "oof.npy", np.ones((2, 3)))
    write_ids(tmp_path, "oof", ["a\r", "b"])
    assert read_ids(tmp_path, "oof") == ["a\r", "b"]
    (tmp_path / "oof_ids.txt").write_bytes(damage((tmp_path / "oof_ids.txt").read_bytes()))
    with pytest.raises(UserError, match="oof_ids.txt cannot be read .*restore a complete copy"):
        read_ids(tmp_path, "oof")
