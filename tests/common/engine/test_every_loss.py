"""For every shipped loss, a batch in micro-batches has the gradient of one graph."""

import pytest
import torch
from torch import nn

from common.batch import Batch, map_tree, tensors_of
from common.losses.protocol import kind
from tests.common.engine.toys import gradient_of, make_engine, reference, relative_error
from tests.common.losses.cases import SHIPPED, Case

ROWS = 37


class NearIdentity(nn.Module):
    """A model that takes outputs fit for the loss as its inputs and returns them slightly changed."""

    def __init__(self, outputs):
        super().__init__()
        generator = torch.Generator().manual_seed(4)
        sizes = [tensor[0].numel() for tensor in tensors_of(outputs)]
        noise = [torch.randn(size, size, generator=generator, dtype=torch.float64) for size in sizes]
        self.mixing = nn.ParameterList(
            torch.eye(len(turn), dtype=torch.float64) + 0.02 * turn.abs() / len(turn) ** 0.5 for turn in noise
        )

    def forward(self, inputs):
        mixing = iter(self.mixing)
        return map_tree(lambda x: (x.flatten(1) @ next(mixing)).view_as(x), inputs)


@pytest.mark.parametrize("weighted", [False, True], ids=["plain", "weighted"])
@pytest.mark.parametrize("case", SHIPPED, ids=lambda case: case.name.replace(" ", "_"))
def test_gradient_of_one_graph(case: Case, weighted):
    outputs, targets = case.sample(ROWS, seed=11)
    generator = torch.Generator().manual_seed(12)
    weights = torch.rand(ROWS, generator=generator, dtype=torch.float64) if weighted else None
    model, loss = NearIdentity(outputs), case.make()
    batch = Batch(outputs, targets, torch.arange(ROWS), weights)
    value, expected = reference(model, loss, batch)
    assert kind(loss) == case.kind and float(expected.norm()) > 0
    for micro_batch in (1, 3, 7, 16, ROWS):
        engine = make_engine(model, loss, micro_batch=micro_batch)
        for step in range(2):  # a loss over a single sum is computed differently from the second batch on
            found = engine.gradients(batch, step)
            assert relative_error(gradient_of(model, loss), expected) <= 1e-12, (micro_batch, step)
            torch.testing.assert_close(found, value, rtol=1e-12, atol=1e-14, check_dtype=False)
