"""Random numbers that belong to a sample: functions of (seed, epoch, index, draw) and of nothing else.

Every number comes from the counter-based generator Philox 4x64-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) in the variant of numpy, laid out as

    key     = (seed, epoch)
    counter = (block, draw, index, stream)        each block is four 64-bit words

so a sample's numbers do not depend on the process that draws them, the order, or the other samples of the batch.
"""

import numpy as np
import torch
from scipy.special import ndtri
from torch import Tensor

from common.batch import on_device
from common.loading.transfer import to_device

CPU = torch.device("cpu")
HALF, WORD = 2**32, 2**64
VECTOR_LIMIT = 32  # words per sample above which jumping numpy's own generator from sample to sample is faster

# Streams above 2**32 are the library's own; a dataset's numbered streams lie below.
UNNAMED_STREAMS, ORDER_STREAM, MIX_STREAM = 2**32, 2**33, 2**33 + 1


def keyed_seed(seed: int, *counters: int) -> int:
    """A 32-bit seed that depends on every argument: `keyed_seed(seed, step)` starts the dropout of a step."""
    words = [word for value in (len(counters), seed, *counters) for word in (value % 2**32, value // 2**32 % 2**32)]
    return int(np.random.SeedSequence(words).generate_state(1)[0])


class KeyedGenerator:
    """A numpy Generator that jumps to the start of any sample's stream in about a microsecond."""

    def __init__(self):
        self._philox = np.random.Philox(0)
        self.generator = np.random.Generator(self._philox)
        self._state = self._philox.state
        self._key, self._counter = self._state["state"]["key"], self._state["state"]["counter"]

    def jump(self, seed: int, epoch: int, index: int, draw: int = 0, stream: int = 0) -> np.random.Generator:
        """Return the generator at the start of the stream; earlier draws have no influence."""
        self._key[0], self._key[1] = int(seed) % WORD, epoch
        self._counter[1], self._counter[2], self._counter[3] = draw, index, stream
        self._philox.state = self._state
        return self.generator

    def words(self) -> list[int]:
        """The next four 64-bit words of the stream, a block."""
        return self._philox.random_raw(4).tolist()


class Keys:
    """The random numbers of a batch of B samples, drawn for all of them at once.

    Row b of every result depends on sample b's key alone, so the numbers are the same for any batching. Every call
    without a `stream` takes the next unused one; number the streams when not every batch makes the same calls.
    The results are numpy arrays [B, *shape], or tensors for the methods `..._on` a device. A CUDA card draws them
    itself, so that the host need not: the same bits, except that normal numbers are equal only up to rounding.
    """

    def __init__(self, seed: int, epoch: int, index: np.ndarray, draw: np.ndarray | int = 0):
        self.seed, self.epoch = int(seed), int(epoch)  # of numpy, they would overflow
        self.index = np.asarray(index)
        self.draw = np.broadcast_to(np.asarray(draw), self.index.shape)
        self._unnamed = UNNAMED_STREAMS

    def __len__(self) -> int:
        return len(self.index)

    def uniform(self, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Uniform in [0, 1), float64 [B, *shape]."""
        return self.uniform_on(CPU, shape, stream).numpy()

    def uniform_on(self, device: torch.device, shape: tuple[int, ...] = (), stream: int | None = None) -> Tensor:
        """The numbers of `uniform` as a tensor on the device."""
        return on_device(self._drawn(shape, stream, device) * 2.0**-53, device)

    def normal(self, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Standard normal, float64 [B, *shape], by inversion: one word a number, so nothing is ever rejected."""
        return self.normal_on(CPU, shape, stream).numpy()

    def normal_on(self, device: torch.device, shape: tuple[int, ...] = (), stream: int | None = None) -> Tensor:
        """The numbers of `normal` as a tensor on the device."""
        places = (self._drawn(shape, stream, device) + 0.5) * 2.0**-53
        drawn = inverse_normal(places) if places.is_cuda else torch.from_numpy(ndtri(places.numpy()))
        return on_device(drawn, device)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Uniform in low..high-1, int64 [B, *shape]; ranges are at most 2**40, where the bias is below 2**-13."""
        return low + (self.uniform(shape, stream) * (high - low)).astype(np.int64)

    def _drawn(self, shape: tuple[int, ...], stream: int | None, device: torch.device) -> Tensor:
        """Whole numbers of 53 bits, float64 [B, *shape], on a CUDA device or on the CPU."""
        words = self._words(shape, stream, device if device.type == "cuda" else CPU)
        return (words >> 11 & 2**53 - 1).double()

    def _words(self, shape: tuple[int, ...], stream: int | None, device: torch.device) -> Tensor:
        """Words of 64 bits, int64 [B, *shape]: the first ones of each sample's generator at this stream."""
        if stream is None:
            stream, self._unnamed = self._unnamed, self._unnamed + 1
        count = int(np.prod(shape))
        if count > VECTOR_LIMIT and device.type == "cpu":
            keyed, rows = KeyedGenerator(), np.empty((len(self), count), np.uint64)
            for row, index, draw in zip(rows, self.index.tolist(), self.draw.tolist(), strict=True):
                row[:] = keyed.jump(self.seed, self.epoch, index, draw, stream).bit_generator.random_raw(count)
            return torch.from_numpy(rows.view(np.int64)).reshape(len(self), *shape)
        blocks = -(-count // 4)
        counter = torch.empty((4, len(self), blocks), dtype=torch.int64, device=device)
        counter[0] = torch.arange(1, blocks + 1, device=device)  # numpy's Philox increments before it draws
        counter[1:3] = to_device(np.stack([self.draw, self.index]).astype(np.int64), device)[:, :, None]
        counter[3] = stream
        rows = philox(self.seed, self.epoch, counter).permute(1, 2, 0).reshape(len(self), 4 * blocks)
        return rows[:, :count].reshape(len(self), *shape)


def philox(seed: int, epoch: int, counter: Tensor) -> Tensor:
    """Philox 4x64-10 of many counters at once, [4, ...] to [4, ...], on their device.

    The words are unsigned, but int64 here: sums and products wrap to the same bits, and `upper` shifts without a sign.
    """
    keys = [[seed + turn * 0x9E3779B97F4A7C15, epoch + turn * 0xBB67AE8584CAA73B] for turn in range(10)]
    multipliers = [0xD2E7470EE14C6C93, 0xCA5A826395121157]
    halves = [[word % HALF for word in multipliers], [word // HALF for word in multipliers]]
    constants = np.array([[word % WORD for word in pair] for pair in [*halves, multipliers, *keys]], np.uint64)
    constants = to_device(constants.view(np.int64), counter.device).reshape(13, 2, *[1] * (counter.ndim - 1))
    low_half, high_half, multipliers, *keys = constants
    even, odd = counter[0::2], counter[1::2]  # words 0, 2 and words 1, 3: [2, ...]

    def lower(words: Tensor) -> Tensor:
        return words & HALF - 1

    def upper(words: Tensor) -> Tensor:
        return words >> 32 & HALF - 1

    for key in keys:
        # The high words of 64 x 64 bit products, by halves.
        a, b = lower(even), upper(even)
        middle = b * low_half + upper(a * low_half)
        high = b * high_half + upper(middle) + upper(a * high_half + lower(middle))
        low = even * multipliers
        even, odd = high.flip(0) ^ odd ^ key, low.flip(0)
    return torch.stack([even[0], odd[0], even[1], odd[1]])


# Numerators and denominators, from the highest power down, of AS 241 (Wichura: "The percentage points of the normal
# distribution", Applied Statistics 37, 1988): for the middle, the tails, and the far tails.
AS241 = (
    (2509.0809287301226727, 33430.575583588128105, 67265.770927008700853, 45921.953931549871457, 13731.693765509461125,
     1971.5909503065514427, 133.14166789178437745, 3.387132872796366608),
    (5226.495278852854561, 28729.085735721942674, 39307.89580009271061, 21213.794301586595867, 5394.1960214247511077,
     687.1870074920579083, 42.313330701600911252, 1.0),
    (7.7454501427834140764e-4, 0.0227238449892691845833, 0.24178072517745061177, 1.27045825245236838258,
     3.64784832476320460504, 5.7694972214606914055, 4.6303378461565452959, 1.42343711074968357734),
    (1.05075007164441684324e-9, 5.475938084995344946e-4, 0.0151986665636164571966, 0.14810397642748007459,
     0.68976733498510000455, 1.6763848301838038494, 2.05319162663775882187, 1.0),
    (2.01033439929228813265e-7, 2.71155556874348757815e-5, 0.0012426609473880784386, 0.026532189526576123093,
     0.29656057182850489123, 1.7848265399172913358, 5.4637849111641143699, 6.6579046435011037772),
    (2.04426310338993978564e-15, 1.4215117583164458887e-7, 1.8463183175100546818e-5, 7.868691311456132591e-4,
     0.0148753612908506148525, 0.13692988092273580531, 0.59983220655588793769, 1.0),
)  # fmt: skip


def inverse_normal(places: Tensor) -> Tensor:
    """The standard normal numbers below which these fractions lie, float64, with an error of about 1e-15.

    torch.special.ndtri is compiled on its first use on a card.
    """

    def ratio(of: Tensor, part: int) -> Tensor:
        above, below = (torch.zeros_like(of) for _ in range(2))
        for up, down in zip(AS241[part], AS241[part + 1], strict=True):
            above, below = above * of + up, below * of + down
        return above / below

    middle = places - 0.5
    far = (-torch.minimum(places, 1 - places).log()).sqrt()
    tail = torch.where(far <= 5, ratio(far - 1.6, 2), ratio(far - 5, 4)) * middle.sign()
    return torch.where(middle.abs() <= 0.425, middle * ratio(0.180625 - middle.square(), 0), tail)
