"""Writing: the file that is there stays until the new one is whole, whoever notices that the disk is full."""

import resource

import numpy as np
import pytest

from common.errors import UserError
from common.files import write_with


@pytest.mark.parametrize("kind", ["save", "savez"])
def test_a_disk_that_is_full_for_numpy_keeps_the_old_file(tmp_path, kind):
    """The limit makes the operating system itself refuse the write; numpy's error has no number to know it by."""
    path, write = tmp_path / "a.npy", getattr(np, kind)
    write_with(path, lambda stream: write(stream, np.zeros(3)))
    before = path.read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with pytest.raises(UserError, match="a.npy could not be written.*the file that was there is untouched"):
            write_with(path, lambda stream: write(stream, np.zeros(100_000)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]
