"""A small two-city data set, read once."""

import pytest

from common.raw import RawData
from competitions.kdd_air_quality import demo
from competitions.kdd_air_quality.reader import read

STATIONS = (*demo.BEIJING, *demo.LONDON)


@pytest.fixture(scope="session")
def demo_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    demo.write_demo(folder)
    return folder


@pytest.fixture(scope="session")
def observations(demo_folder):
    return read(RawData(demo_folder, "kdd_air_quality"), STATIONS)
