"""Demo data in the competition's formats: flats, whose prices are the targets."""

from pathlib import Path

import numpy as np
import pandas as pd

ROWS, TEST = 1500, 300
TOWNS = {"Aston": 3.1, "Brook": 2.4, "Crag": 1.7, "Dale": 4.0}  # price per square metre, in thousands


def write_demo(folder: Path) -> None:
    """Write train.csv, test.csv, sample_submission.csv, always the same bytes. CHANGE: to the real files' formats."""
    rng, count = np.random.default_rng(0), ROWS + TEST
    town, area, floor = rng.choice(list(TOWNS), count), rng.gamma(9, 9, count).round(1), rng.integers(0, 12, count)
    year = np.where(rng.random(count) < 0.1, np.nan, rng.integers(1900, 2024, count))
    price = area * np.vectorize(TOWNS.get)(town) * (1 + 0.02 * floor) * np.where(year > 1990, 1.3, 1.0)
    table = pd.DataFrame(
        {
            "id": [f"flat_{row:04}" for row in range(count)],
            "town": town,
            "area": area,
            "floor": floor,
            "year": pd.array(year, "Float64").astype("Int64"),
            "price": (price * rng.lognormal(0, 0.1, count)).round(1),
        }
    )
    table[:ROWS].to_csv(folder / "train.csv", index=False)
    table[ROWS:].drop(columns="price").to_csv(folder / "test.csv", index=False)
    table[ROWS:][["id"]].assign(price=0).to_csv(folder / "sample_submission.csv", index=False)
