"""The data fingerprint ignores files that do not affect training, so that a run can continue after their repair."""

import pytest

from common.competition import load
from common.raw import RawData
from competitions.clouds import reader as clouds
from competitions.digit_recognizer import reader as digits
from competitions.inclusive_images import rows as tags

READ = {
    "clouds": lambda raw: clouds.read(raw),
    "digit_recognizer": lambda raw: digits.read(raw),
    "inclusive_images": lambda raw: tags.read(load("inclusive_images").recipes["smoke"], raw, lambda message: None),
}


@pytest.mark.parametrize("name", READ)
def test_the_sample_submission_has_no_part_in_the_datas_fingerprint(name, tmp_path):
    load(name).write_demo(tmp_path)

    def found():
        raw = RawData(tmp_path, name)
        READ[name](raw)
        return raw.opened_fingerprint()

    before = found()
    (sample,) = tmp_path.glob("*sample_submission.csv")
    sample.write_text(sample.read_text() + "\n")
    assert found() == before
    (table,) = [path for path in tmp_path.glob("train*.csv")]
    table.write_text(table.read_text().rstrip("\n"))
    assert found() != before
