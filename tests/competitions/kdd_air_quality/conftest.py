"""A small two-city data set, read once."""

import pytest

from common.raw import RawData
from competitions.kdd_air_quality import sample
from competitions.kdd_air_quality.reader import read

STATIONS = (*sample.BEIJING, *sample.LONDON)


@pytest.fixture(scope="session")
def sample_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sample")
    sample.write(folder)
    return folder


@pytest.fixture(scope="session")
def observations(sample_folder):
    return read(RawData(sample_folder, "kdd_air_quality"), STATIONS)
