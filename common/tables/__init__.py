"""CSV files through pandas, with checks that name the file, the line and the value.

train = tables.read(raw, "train.csv", {"id": str, "target": number(0, 1)}, id="id")
sample = tables.read(raw, "sample_submission.csv", {"id": str}, id="id")
"""

from common.tables.columns import Column, number, text, whole
from common.tables.reading import parts, read

__all__ = ["Column", "number", "parts", "read", "text", "whole"]
