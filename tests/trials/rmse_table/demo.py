import numpy as np
import pandas as pd


def write_demo(folder):
    rng = np.random.default_rng(0)
    table = pd.DataFrame(rng.normal(size=(300, 3)), columns=["a", "b", "c"])
    table["kind"] = rng.choice(["red", "blue"], 300)
    table["y"] = 100 + 20 * table["a"] - 10 * (table["kind"] == "red")
    table.index.name = "id"
    table[:240].to_csv(folder / "train.csv")
    table[240:].drop(columns="y").to_csv(folder / "test.csv")
    table[240:][["y"]].round(0).to_csv(folder / "sample_submission.csv")
