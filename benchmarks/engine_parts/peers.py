"""The same training with other libraries (peers), written as in their documentation; each is imported when it runs.

The micro-batches are ready in a list. accelerate and Keras get them through a DataLoader, whose time is included:
accelerate detects the end of the data only there, and Keras would wrap the list in a loader itself.
"""

import importlib.metadata
import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.batch import Batch

ACCUMULATE = 4


@dataclass
class Work:
    """One training: model, optimizer, batches, `loss` (a batch's mean) for the peers and `exact_loss` for the kit.

    `micro_batches` are the batches' micro-batches as (inputs, targets), views of the same memory.
    """

    model: nn.Module
    make_optimizer: Callable
    loss: Callable
    batches: list[Batch]
    micro_batch: int
    exact_loss: Any
    ticks: list[float] = field(default_factory=list)

    def __post_init__(self):
        size = self.micro_batch
        parts = [batch.slice(at, at + size) for batch in self.batches for at in range(0, len(batch), size)]
        self.micro_batches = [(part.inputs, part.targets) for part in parts]

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        return self.make_optimizer(model.parameters())

    def tick(self) -> None:
        """Record the time at which an optimizer step begins or the last one ends."""
        self.ticks.append(time.perf_counter())


def fabric(work: Work) -> None:
    from lightning.fabric import Fabric

    runner = Fabric(accelerator="cpu", devices=1)
    model, optimizer = runner.setup(work.model, work.optimizer(work.model))
    last = len(work.micro_batches) - 1
    for number, (inputs, targets) in enumerate(work.micro_batches):
        if number % ACCUMULATE == 0:
            work.tick()
        accumulating = number % ACCUMULATE != ACCUMULATE - 1 and number != last
        with runner.no_backward_sync(model, enabled=accumulating):
            runner.backward(work.loss(model(inputs), targets) / ACCUMULATE)
        if not accumulating:
            optimizer.step()
            optimizer.zero_grad()
    work.tick()


def accelerate(work: Work) -> None:
    from accelerate import Accelerator

    runner = Accelerator(gradient_accumulation_steps=ACCUMULATE, cpu=True)
    model, optimizer, loader = runner.prepare(
        work.model, work.optimizer(work.model), DataLoader(work.micro_batches, batch_size=None)
    )
    for number, (inputs, targets) in enumerate(loader):
        if number % ACCUMULATE == 0:
            work.tick()
        with runner.accumulate(model):
            runner.backward(work.loss(model(inputs), targets))
            optimizer.step()
            optimizer.zero_grad()
    work.tick()


class Batches:
    """An iterable that Lightning accepts in place of a DataLoader; it would take a list for several loaders."""

    def __init__(self, micro_batches: list):
        self.micro_batches = micro_batches

    def __len__(self) -> int:
        return len(self.micro_batches)

    def __iter__(self) -> Iterator:
        return iter(self.micro_batches)


def lightning(work: Work) -> None:
    import lightning as pl

    for name in ("lightning.pytorch", "lightning.fabric", "lightning"):
        logging.getLogger(name).setLevel(logging.ERROR)

    class Module(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.network = work.model

        def on_train_batch_start(self, batch, number):
            if number % ACCUMULATE == 0:
                work.tick()

        def training_step(self, batch, number):
            return work.loss(self.network(batch[0]), batch[1])

        def configure_optimizers(self):
            return work.optimizer(self.network)

    double = next(work.model.parameters()).dtype == torch.float64
    trainer = pl.Trainer(
        max_epochs=1,
        accelerator="cpu",
        devices=1,
        accumulate_grad_batches=ACCUMULATE,
        precision="64-true" if double else "32-true",
        barebones=True,
    )
    trainer.fit(Module(), Batches(work.micro_batches))
    work.tick()


def keras(work: Work) -> None:
    """Keras with its torch backend and its own layers; weights are copied there and back; always in float32."""
    import keras

    network = [_keras_layer(keras, layer) for layer in work.model]
    model = keras.Sequential([keras.Input(work.micro_batches[0][0].shape[1:]), *(layer for layer in network if layer)])
    pairs = [(ours, theirs) for ours, theirs in zip(work.model, network, strict=True) if list(ours.parameters())]
    for ours, theirs in pairs:
        theirs.set_weights([_turned(ours.weight), ours.bias.detach().float().numpy()])
    target_type = _single(work.micro_batches[:1])[0][1].dtype
    plain = work.make_optimizer([torch.zeros(1, requires_grad=True)])
    made = {"AdamW": keras.optimizers.AdamW, "SGD": keras.optimizers.SGD}[type(plain).__name__]
    rate = plain.param_groups[0]["lr"]
    model.compile(
        optimizer=made(learning_rate=rate, gradient_accumulation_steps=ACCUMULATE),
        loss=lambda targets, outputs: work.loss(outputs, targets.to(target_type)),  # Keras passes targets as floats
    )

    class Clock(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch % ACCUMULATE == 0:
                work.tick()

    model.fit(DataLoader(_single(work.micro_batches), batch_size=None), epochs=1, verbose=0, callbacks=[Clock()])
    work.tick()
    with torch.no_grad():
        for ours, theirs in pairs:
            weight, bias = theirs.get_weights()
            ours.weight.copy_(torch.as_tensor(weight).movedim((-1, -2), (0, 1)))
            ours.bias.copy_(torch.as_tensor(bias))


def _single(micro_batches: list) -> list:
    return [(x.float(), y.float() if y.is_floating_point() else y) for x, y in micro_batches]


def _turned(weight: torch.Tensor) -> Any:
    """A weight [out, in, ...] in the axis order of Keras, [..., in, out]."""
    return weight.detach().float().movedim((0, 1), (-1, -2)).numpy()


def _keras_layer(keras: Any, layer: nn.Module) -> Any:
    where = {"data_format": "channels_first"}
    match layer:
        case nn.Linear():
            return keras.layers.Dense(layer.out_features)
        case nn.Conv2d():
            return keras.layers.Conv2D(layer.out_channels, layer.kernel_size, padding="same", **where)
        case nn.MaxPool2d():
            return keras.layers.MaxPooling2D(layer.kernel_size, **where)
        case nn.ReLU():
            return keras.layers.ReLU()
        case nn.Flatten():
            return keras.layers.Flatten()
    raise TypeError(f"no Keras layer for {layer}")


PEERS = {"Fabric": fabric, "accelerate": accelerate, "Lightning": lightning, "Keras": keras}
PACKAGES = {"Fabric": "lightning", "Lightning": "lightning", "accelerate": "accelerate", "Keras": "keras"}


def versions() -> str:
    """The versions of all peers in one line."""
    return ", ".join(f"{name} {installed(name) or 'not installed'}" for name in PEERS)


def installed(name: str) -> str | None:
    """The version of a peer's package, None if it is missing; torch's version for loops that are no peers."""
    try:
        return importlib.metadata.version(PACKAGES.get(name, "torch"))
    except importlib.metadata.PackageNotFoundError:
        return None
