"""Random numbers that belong to a sample: functions of (seed, epoch, index, draw) and of nothing else.

Every number comes from the counter-based generator Philox 4x64-10 (Salmon, Moraes, Dror, Shaw: "Parallel random
numbers: as easy as 1, 2, 3", SC 2011) in the variant of numpy, laid out as

    key     = (seed, epoch)
    counter = (block, draw, index, stream)        each block is four 64-bit words

so a sample's numbers do not depend on the process that draws them, the order, or the other samples of the batch.
"""

import numpy as np
from scipy.special import ndtri

WORD = 2**64
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
    The results are numpy arrays [B, *shape]; `torch.from_numpy` shares their memory.
    """

    def __init__(self, seed: int, epoch: int, index: np.ndarray, draw: np.ndarray | int = 0):
        self.seed, self.epoch = int(seed), int(epoch)  # of numpy, they would overflow
        self.index = np.asarray(index)
        self.draw = np.broadcast_to(np.asarray(draw), self.index.shape)
        self._unnamed = UNNAMED_STREAMS

    def __len__(self) -> int:
        return len(self.index)

    def words(self, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Uniform 64-bit words, uint64 [B, *shape]: the first words of each sample's generator at this stream."""
        if stream is None:
            stream, self._unnamed = self._unnamed, self._unnamed + 1
        count = int(np.prod(shape))
        if count > VECTOR_LIMIT:
            keyed, rows = KeyedGenerator(), np.empty((len(self), count), np.uint64)
            for row, index, draw in zip(rows, self.index.tolist(), self.draw.tolist(), strict=True):
                row[:] = keyed.jump(self.seed, self.epoch, index, draw, stream).bit_generator.random_raw(count)
            return rows.reshape(len(self), *shape)
        blocks = -(-count // 4)
        counter = np.empty((4, len(self), blocks), np.uint64)
        counter[0] = np.arange(1, blocks + 1)  # numpy's Philox increments before it draws
        counter[1], counter[2], counter[3] = self.draw[:, None], self.index[:, None], stream
        rows = philox(self.seed % WORD, self.epoch, counter).transpose(1, 2, 0).reshape(len(self), 4 * blocks)
        return rows[:, :count].reshape(len(self), *shape)

    def uniform(self, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Uniform in [0, 1), float64 [B, *shape]."""
        return (self.words(shape, stream) >> 11) * 2.0**-53

    def normal(self, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Standard normal, float64 [B, *shape], by inversion: one word a number, so nothing is ever rejected."""
        return ndtri(((self.words(shape, stream) >> 11) + 0.5) * 2.0**-53)

    def integers(self, low: int, high: int, shape: tuple[int, ...] = (), stream: int | None = None) -> np.ndarray:
        """Uniform in low..high-1, int64 [B, *shape]; ranges are at most 2**40, where the bias is below 2**-13."""
        return low + (self.uniform(shape, stream) * (high - low)).astype(np.int64)


def philox(seed: int, epoch: int, counter: np.ndarray) -> np.ndarray:
    """Philox 4x64-10 of many counters at once: uint64 [4, ...] to uint64 [4, ...]."""
    multipliers = np.array([0xD2E7470EE14C6C93, 0xCA5A826395121157], np.uint64).reshape(2, *[1] * (counter.ndim - 1))
    low_half, high_half = multipliers & 0xFFFFFFFF, multipliers >> 32
    even, odd = counter[0::2], counter[1::2]  # words 0, 2 and words 1, 3: [2, ...]
    for turn in range(10):
        keys = [(seed + turn * 0x9E3779B97F4A7C15) % WORD, (epoch + turn * 0xBB67AE8584CAA73B) % WORD]
        # The high words of 64 x 64 bit products: numpy has no 128-bit integers, so by halves.
        a, b = even & 0xFFFFFFFF, even >> 32
        middle = b * low_half + (a * low_half >> 32)
        high = b * high_half + (middle >> 32) + (a * high_half + (middle & 0xFFFFFFFF) >> 32)
        low = even * multipliers
        even = high[::-1] ^ odd ^ np.array(keys, np.uint64).reshape(multipliers.shape)
        odd = low[::-1]
    return np.stack([even[0], odd[0], even[1], odd[1]])
