"""A process is a rank only if all of torchrun's variables are set; clusters and notebooks set some of them."""

import os

import pytest

from common.engine.ranks import SINGLE, Ranks


@pytest.mark.parametrize(
    "variables",
    [
        "WORLD_SIZE=2",
        "WORLD_SIZE=2 RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511",
        "WORLD_SIZE=2 RANK=0 LOCAL_RANK=0",
        "WORLD_SIZE=two RANK=0 LOCAL_RANK=0 MASTER_ADDR=127.0.0.1 MASTER_PORT=29511",
        "RANK=3",
        "LOCAL_RANK=1 MASTER_PORT=29511",
        "LOCAL_WORLD_SIZE=8",
    ],
)
def test_what_a_cluster_sets_alone_is_ignored_with_a_line(monkeypatch, capsys, variables):
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    assert Ranks.from_environment() is SINGLE
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and variables.split(" MASTER")[0] in told and "NPROC=2" in told
    assert not {"WORLD_SIZE", "RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"} & os.environ.keys()


@pytest.mark.parametrize("variables", ["", "WORLD_SIZE=", "WORLD_SIZE=1 RANK=0 LOCAL_RANK=0", "MASTER_ADDR=host"])
def test_a_single_process_says_nothing(monkeypatch, capsys, variables):
    for pair in variables.split():
        monkeypatch.setenv(*pair.split("="))
    assert Ranks.from_environment() is SINGLE and capsys.readouterr().out == ""
