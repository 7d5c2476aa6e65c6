"""The device and precision of a run on cards that this machine need not have."""

import pytest
import torch

from common.batch import Batch
from common.config import Config
from common.device import device_of, precision_of
from common.engine.ranks import Ranks
from common.errors import UserError
from common.metrics import rmse
from common.thresholds import decide

CARDS = [("bf16", 8), ("fp16", 7), ("bf16", 12), ("fp32", 6)]  # and the current card is the first one


@pytest.fixture(autouse=True)
def _cards(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(CARDS))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (CARDS[(device or CARD).index][1], 0))
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)


CARD = torch.device("cuda", 0)


@pytest.mark.parametrize("number", range(len(CARDS)))
def test_precision_is_that_of_the_card_itself(number):
    assert precision_of(Config(), torch.device("cuda", number)) == CARDS[number][0]


@pytest.mark.parametrize("name, precision", [("amx_bf16", "bf16"), ("avx512_bf16", "bf16"), ("avx512_f", "fp32")])
def test_a_processor_that_multiplies_bf16_computes_in_it(monkeypatch, name, precision):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": False, name: True}, raising=False)
    assert precision_of(Config(), torch.device("cpu")) == precision


def test_the_oldest_card_decides_for_all_processes(monkeypatch):
    sent = []
    others = torch.tensor([0, 1, 0, 0])  # bf16, fp16, bf16, bf16
    monkeypatch.setattr(Ranks, "max_", lambda ranks, mine: sent.append(int(mine)) or torch.max(others, mine).max())
    assert precision_of(Config(), CARD, Ranks(0, 4)) == "fp16" and sent == [0]
    assert precision_of(Config(precision="bf16"), CARD, Ranks(0, 4)) == "bf16"


def test_a_card_is_named_by_its_number_or_by_that_of_the_process():
    assert [device_of(Config(device=name)).index for name in ("auto", "cuda", "cuda:3")] == [0, 0, 3]
    assert device_of(Config(device="cuda"), local_rank=2, world=3).index == 2


@pytest.mark.parametrize("name", ["cuda:4", "cuda:", "cuda:x", "cuda:-1", "gpu"])
def test_a_card_that_is_not_there_is_told_at_once(name):
    with pytest.raises(UserError, match=rf"--device {name} is not available: .* cpu \(cuda:0 to cuda:3\)"):
        device_of(Config(device=name))


def test_a_numbered_card_is_not_shared():
    with pytest.raises(UserError, match="2 processes cannot share it: --device cuda gives each its own"):
        device_of(Config(device="cuda:1"), local_rank=1, world=2)


class Apples(torch.Tensor):
    """A tensor on one of Apple's GPUs: it has no float64."""

    device = torch.device("mps")

    def double(self):
        raise TypeError("Cannot convert a MPS Tensor to float64 dtype as the MPS framework doesn't support float64")

    def cpu(self):
        return self.as_subclass(torch.Tensor)


def test_what_is_computed_in_float64_leaves_a_gpu_without_it(monkeypatch):
    scores, truth = torch.tensor([[0.2, 0.7], [0.6, 0.1]]), torch.tensor([[0.0, 1.0], [1.0, 1.0]])
    apples = scores.as_subclass(Apples)
    assert rmse().score(apples, truth.as_subclass(Apples)) == rmse().score(scores, truth)
    assert torch.equal(decide(apples, [0.5, 0.5]), decide(scores, [0.5, 0.5]))
    sent = []
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device, **_: sent.append((tensor.dtype, device)) or tensor)
    Batch(scores, truth.double(), torch.arange(2)).to("mps")
    assert sent == [(torch.float32, "mps"), (torch.float32, "mps"), (torch.int64, "mps")]
