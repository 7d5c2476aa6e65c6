"""The commands on the generated files: what they write, what they leave unchanged, and errors for bad input."""

import csv
import json
import shutil
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from common import competition
from common.cli import main
from common.raw import RawData
from competitions.kdd_air_quality import blend, demo, metric, models, report, table
from competitions.kdd_air_quality.origins import days_between
from competitions.kdd_air_quality.stations import Network

SMALL = ["--recipe", "smoke", "--models", "medians,boosting", "--boosting-rounds", "5", "--backtest-days", "4"]


@pytest.fixture(scope="module")
def home(tmp_path_factory, demo_folder):
    """A working directory with a trained run 'a' on a copy of the sample files."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copytree(demo_folder, folder / "files")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert main(["train", "kdd_air_quality", *SMALL, "--data", "files", "--run", "a"]) == 0
    return folder


@pytest.fixture
def here(home, tmp_path, monkeypatch):
    """A fresh copy of that directory for each test, without files that other tests wrote."""
    folder = shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(folder)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def no_plots(monkeypatch):
    """Skip the plots, which take longer than the fits; the run of `home` has them."""
    monkeypatch.setattr(report, "draw", lambda *given: None)


def rows_of(path) -> list[list[str]]:
    with open(path) as stream:
        return list(csv.reader(stream))


def test_train_writes_the_day_after_the_data_end(here):
    (path,) = (here / "submissions" / "kdd_air_quality").glob("a.csv")
    rows = rows_of(path)
    expected = rows_of(here / "files" / "sample_submission.csv")
    assert rows[0] == expected[0] and [row[0] for row in rows] == [row[0] for row in expected]
    for row in rows[1:]:
        numbers = row[1:] if row[0].split("#")[0] in demo.BEIJING else row[1:3]
        assert all(float(text) >= 0 for text in numbers)
    assert rows[-1][3] == ""
    origin = json.loads(path.with_suffix(".json").read_text())
    assert origin["first_hour"] == "2018-04-01T00" and origin["day"] == "2018-03-31" and "no more" in origin["submit"]


def test_the_run_holds_its_scores_and_its_page(here):
    home = here / "runs" / "kdd_air_quality" / "a"
    result = json.loads((home / "result.json").read_text())
    metrics = pd.read_csv(home / "metrics.csv").set_index("model")
    assert set(metrics.index) == {"medians", "boosting", "blend"}
    assert result["metrics"]["smape"] == pytest.approx(metrics["mean"]["blend"], abs=1e-6)
    assert result["score"] > result["metrics"]["smape"], "of days that the blend was not tuned on"
    scores = pd.read_csv(home / "scores.csv")
    assert list(scores["day"]) == ["2018-03-26", "2018-03-27", "2018-03-28", "2018-03-29"]
    assert scores["blend"].mean() == pytest.approx(result["metrics"]["smape"], abs=1e-5)
    parts = pd.read_csv(home / "breakdown.csv")
    assert set(parts["by"]) == {"city", "pollutant", "station type", "station", "hour band", "hour ahead"}
    page = (home / "report.html").read_text()
    assert page.count("<img") == 4 and "://" not in page
    assert not (home / "unfinished").exists()


def test_a_forecast_has_the_same_bits_with_the_later_rows_deleted(here, tmp_path):
    """`predict` for an earlier day, once with all data and once with the later rows deleted."""
    words = ["predict", "kdd_air_quality", "--run", "a", "--first-day", "2018-03-20"]
    path = here / "submissions" / "kdd_air_quality" / "a-2018-03-20.csv"
    assert main([*words, "--data", "files"]) == 0
    whole = path.read_bytes()
    shutil.copytree(here / "files", tmp_path / "cut")
    for name, column in (("bj_aq_2018.csv", "time"), ("ld_aq_2018.csv", "time")):
        frame = pd.read_csv(tmp_path / "cut" / name)
        frame[frame[column] < "2018-03-21"].to_csv(tmp_path / "cut" / name, index=False)
    path.unlink()
    assert main([*words, "--data", str(tmp_path / "cut")]) == 0
    assert path.read_bytes() == whole
    frame[frame[column] < "2018-03-20"].to_csv(tmp_path / "cut" / name, index=False)
    assert main([*words, "--data", str(tmp_path / "cut")]) == 0
    assert path.read_bytes() != whole, "the last day before the origin does count"


def test_predict_scores_what_is_over(here, observations, capsys):
    days = days_between("2018-03-20", "2018-03-21")
    words = ["--first-day", str(days[0]), "--last-day", str(days[1])]
    assert main(["predict", "kdd_air_quality", "--run", "a", *words]) == 0
    lines = capsys.readouterr().out.splitlines()
    folder = here / "submissions" / "kdd_air_quality"
    assert lines[-2:] == [f"submission: submissions/kdd_air_quality/a-{day}.csv" for day in days]
    for day in days:
        forecast = np.full((1, 48, 8, 3), np.nan)
        for identity, *values in rows_of(folder / f"a-{day}.csv")[1:]:
            station, hour = table.parse_id(identity)
            number = observations.network.stations.index(station)
            forecast[0, hour, number] = [float(text) if text else np.nan for text in values]
        score = metric.daily(observations.truth(np.array([day])), forecast, observations.network.stations)[0]
        assert any(f"{day}: official score {score:.4f}" in line for line in lines)


def test_short_ids_come_back_as_they_were(here):
    shutil.copytree(here / "files", here / "short")
    path = here / "short" / "sample_submission.csv"
    path.write_text(path.read_text().replace("aotizhongxin_aq", "aotizhongx_aq"))
    assert main(["predict", "kdd_air_quality", "--run", "a", "--data", "short", "--first-day", "2018-03-31"]) == 0
    rows = rows_of(here / "submissions" / "kdd_air_quality" / "a-2018-03-31.csv")
    assert rows[49][0] == "aotizhongx_aq#0" and float(rows[49][1]) > 0


def test_the_order_of_the_sample_moves_rows_and_no_forecast(here):
    """With the rows in another order or of London alone, every id keeps its forecast."""
    words = ["predict", "kdd_air_quality", "--run", "a", "--first-day", "2018-03-31"]
    path = here / "submissions" / "kdd_air_quality" / "a-2018-03-31.csv"
    assert main([*words, "--data", "files"]) == 0
    expected = {row[0]: row for row in rows_of(path)}
    shutil.copytree(here / "files", here / "mixed")
    header, *lines = (here / "files" / "sample_submission.csv").read_text().splitlines()
    for chosen in (lines[::-1], [line for line in lines if "_aq" not in line]):
        (here / "mixed" / "sample_submission.csv").write_text("\n".join([header, *chosen]) + "\n")
        assert main([*words, "--data", "mixed"]) == 0
        found = rows_of(path)
        assert [row[0] for row in found[1:]] == [line.split(",")[0] for line in chosen]
        assert found[1:] == [expected[row[0]] for row in found[1:]]


def test_a_sample_with_other_stations_than_the_run_s_is_refused(here, capsys):
    shutil.copytree(here / "files", here / "other")
    path = here / "other" / "sample_submission.csv"
    path.write_text(path.read_text().replace("CD1#", "KF1#"))
    before = sorted((here / "submissions").rglob("*.csv"))
    assert main(["predict", "kdd_air_quality", "--run", "a", "--data", "other"]) == 1
    error = capsys.readouterr().err
    assert "KF1" in error and "make train" in error and sorted((here / "submissions").rglob("*.csv")) == before


@pytest.mark.usefixtures("no_plots")
def test_one_city_alone(here):
    """The message about a city without data advises a sample submission without its stations: that works."""
    path = here / "files" / "sample_submission.csv"
    header, *lines = path.read_text().splitlines()
    kept = [line for line in lines if line.split("#")[0] in demo.LONDON]
    path.write_text("\n".join([header, *kept]) + "\n")
    words = ["--recipe", "smoke", "--epochs", "1", "--boosting-rounds", "3", "--backtest-days", "4"]
    assert main(["train", "kdd_air_quality", *words, "--data", "files", "--run", "london"]) == 0
    rows = rows_of(here / "submissions" / "kdd_air_quality" / "london.csv")
    assert [row[0] for row in rows[1:]] == [line.split(",")[0] for line in kept]


@pytest.mark.usefixtures("no_plots")
def test_one_station_alone(here):
    """Metrics drop the station axis of size 1, so the truth then has the shape of the three series' forecasts."""
    path = here / "files" / "sample_submission.csv"
    kept = [line for line in path.read_text().splitlines() if line.startswith(("test_id", "dongsi_aq"))]
    path.write_text("\n".join(kept) + "\n")
    assert main(["train", "kdd_air_quality", *SMALL, "--models", "medians", "--data", "files", "--run", "alone"]) == 0
    run = here / "runs" / "kdd_air_quality" / "alone"
    figures = pd.read_csv(run / "metrics.csv").set_index("model")
    found = json.loads((run / "result.json").read_text())["metrics"]["smape"]
    assert found == pytest.approx(figures["mean"]["blend"], abs=1e-6)
    assert len(rows_of(here / "submissions" / "kdd_air_quality" / "alone.csv")) == 49


def test_newer_data_are_forecast_from_their_own_end(here):
    """New files of later days in DATA= and no --first-day: as its help says, the data's last day is forecast."""
    for name in ("bj_aq_2018.csv", "ld_aq_2018.csv"):
        frame = pd.read_csv(here / "files" / name)
        frame["time"] = (pd.to_datetime(frame["time"]) + pd.Timedelta(days=2)).astype(str)
        frame[frame["time"] >= "2018-04-01"].to_csv(here / "files" / f"later_{name}", index=False)
    assert main(["predict", "kdd_air_quality", "--run", "a", "--data", "files"]) == 0
    facts = json.loads((here / "submissions" / "kdd_air_quality" / "a-2018-04-02.json").read_text())
    assert facts["first_hour"] == "2018-04-03T00" and not facts["series_without_recent_values"]


@pytest.mark.parametrize("what, other", [("models", ["medians"]), ("stations", [*demo.BEIJING, "CD1", "BL0", "KF1"])])
def test_runs_without_a_common_mean_are_not_averaged(here, capsys, what, other):
    """Refused even if the shapes agree: a mean over different stations is no station's forecast."""
    home = here / "runs" / "kdd_air_quality"
    shutil.copytree(home / "a", home / "b")
    result = json.loads((home / "b" / "result.json").read_text())
    result["tuned"][what] = other
    (home / "b" / "result.json").write_text(json.dumps(result))
    before = sorted((here / "submissions").rglob("*.csv"))
    for runs in ("a,b", "b,a"):
        assert main(["predict", "kdd_air_quality", "--run", runs]) == 1
        error = capsys.readouterr().err
        assert error.startswith(f"error: RUN={runs}: ") and f"average runs of the same {what}" in error
    assert sorted((here / "submissions").rglob("*.csv")) == before


def test_what_is_missing_stands_beside_the_file(here, capsys):
    """A folder with the last days only has less history than the run's longest window, as the sidecar warns."""
    shutil.copytree(here / "files", here / "late")
    for name in [file.name for file in (here / "late").glob("*.csv") if file.name != "sample_submission.csv"]:
        frame = pd.read_csv(here / "late" / name)
        time = next((c for c in frame if c in ("utc_time", "time", "MeasurementDateGMT")), None)
        if time is not None:
            frame[pd.to_datetime(frame[time], format="mixed") >= "2018-03-12"].to_csv(here / "late" / name, index=False)
    assert main(["predict", "kdd_air_quality", "--run", "a", "--data", "late", "--first-day", "2018-03-31"]) == 0
    assert "20 days of history, fewer than the longest window" in capsys.readouterr().out
    sidecar = (here / "submissions" / "kdd_air_quality" / "a-2018-03-31.json").read_text()
    assert any("20 days of history" in text for text in json.loads(sidecar)["warnings"])


@pytest.mark.usefixtures("no_plots")
def test_backtest_refits_and_its_blend_is_of_the_period_before(here, observations, capsys, monkeypatch):
    seen, blend_of = [], blend.tuned
    monkeypatch.setattr(blend, "tuned", lambda *given: seen.append(given[1]) or blend_of(*given))
    words = ["backtest", "kdd_air_quality", *SMALL, "--data", "files", "--run", "b", "--refit-days", "3"]
    assert main([*words, "--first-day", "2018-03-20", "--last-day", "2018-03-24"]) == 0
    shown = capsys.readouterr().out
    assert "2018-03-20 to 2018-03-22" in shown and "2018-03-23 to 2018-03-24" in shown
    assert [len(truth) for truth in seen] == [4, 6]
    for truth, over in zip(seen, days_between("2018-03-18", "2018-03-21")[::3], strict=True):
        np.testing.assert_array_equal(truth[-1], observations.truth(np.array([over]))[0])  # the next one ends too late
    home = here / "runs" / "kdd_air_quality" / "b"
    assert sorted(folder.name for folder in home.glob("fold-0/period-*")) == ["period-0", "period-1", "period-2"]
    assert len(pd.read_csv(home / "scores.csv")) == 5
    figures = pd.read_csv(home / "metrics.csv").set_index(["span", "model"])
    assert len(figures) == 9
    score = json.loads((home / "result.json").read_text())["score"]
    assert score == pytest.approx(figures.loc[("2018-03-20 to 2018-03-24", "blend"), "mean"], abs=1e-6)
    assert not (here / "submissions" / "kdd_air_quality" / "b.csv").exists()
    assert main(["predict", "kdd_air_quality", "--run", "b"]) == 1
    assert "backtest" in capsys.readouterr().err


def test_backtest_of_a_fitted_run_fits_nothing(here, capsys):
    words = ["backtest", "kdd_air_quality", "--data", "files", "--run", "a"]
    assert main([*words, "--first-day", "2018-03-28", "--last-day", "2018-03-29"]) == 0
    shown = capsys.readouterr().out
    assert "fitted before 2018-04-01T00" in shown and "blend" in shown and "fits" not in shown
    assert "are too good" in shown, "the run was fitted on these days"


@pytest.mark.parametrize("verb", ["train", "backtest", "backtest --run a"])
def test_days_that_cannot_be_scored_are_refused_before_anything_is_fitted(here, capsys, verb):
    """Without PM10 in the last weeks there are values, but no row that the metric scores."""
    for file in (here / "files").glob("*.csv"):
        frame = pd.read_csv(file)
        time = next((c for c in frame if c in ("utc_time", "time", "MeasurementDateGMT")), None)
        if time is not None:
            late = pd.to_datetime(frame[time], format="mixed") >= "2018-03-15"
            frame.loc[late, [column for column in frame if "PM10" in column]] = np.nan
            frame.to_csv(file, index=False)
    verb, *words = verb.split()
    days = ["--first-day", "2018-03-20", "--last-day", "2018-03-24"] if verb == "backtest" else []
    small = [] if words else SMALL
    assert main([verb, "kdd_air_quality", "--data", "files", *small, *words, *days]) == 1
    error = capsys.readouterr().err
    assert "the forecasts of 2018-03-2" in error and "--last-day" in error
    assert [folder.name for folder in (here / "runs" / "kdd_air_quality").iterdir()] == ["a"]


def test_half_known_days_have_no_official_score(here, capsys):
    words = ["kdd_air_quality", "--run", "a", "--data", "files", "--first-day", "2018-03-29", "--last-day"]
    assert main(["predict", *words, "2018-03-30"]) == 0
    shown = capsys.readouterr().out
    assert "2018-03-29: official score" in shown and "2018-03-30: official score" not in shown
    sidecar = (here / "submissions" / "kdd_air_quality" / "a-2018-03-30.json").read_text()
    assert json.loads(sidecar)["official_score"] is None
    assert main(["backtest", *words, "2018-03-31"]) == 0
    assert "not scored, as the data end before their 48 hours do: 2018-03-30, 2018-03-31" in capsys.readouterr().out
    scores = pd.read_csv(here / "runs" / "kdd_air_quality" / "a" / "backtest-2018-03-29-2018-03-31" / "scores.csv")
    assert scores["blend"].notna().tolist() == [True, False, False]


def test_held_out_days_are_over_when_the_data_end_at_noon(here):
    for file in (here / "files").glob("*aq_2018.csv"):
        frame = pd.read_csv(file)
        frame[frame["time"] < "2018-03-31 12"].to_csv(file, index=False)
    loaded = competition.load("kdd_air_quality")
    config = replace(loaded.recipes["smoke"], models="medians", backtest_days=4)
    data = loaded.build(config, RawData(here / "files", "kdd_air_quality"), print).data
    held = [day for day, fold in zip(data.ids, data.folds, strict=True) if fold == 0]
    assert held == ["2018-03-25", "2018-03-26", "2018-03-27", "2018-03-28"] and data.test_ids == ["2018-03-31"]


def test_backtest_of_a_fitted_run_refuses_settings_of_another(here, capsys):
    words = ["backtest", "kdd_air_quality", "--data", "files", "--run", "a", "--first-day", "2018-03-28"]
    assert main([*words, "--model", "linear", "--refit-days", "3"]) == 1
    assert "model:  -> linear; refit_days: 31 -> 3: runs/kdd_air_quality/a was fitted" in capsys.readouterr().err
    assert main([*words, *SMALL, "--jobs", "2"]) == 0, "its own settings and the machine's are no others"


def test_backtest_of_a_run_that_is_not_there_says_so(here, capsys, monkeypatch):
    monkeypatch.setattr("common.train.train", lambda *given, **options: print(f"trains {given[4]}"))
    assert main(["backtest", "kdd_air_quality", *SMALL, "--data", "files", "--run", "typo"]) == 0
    shown = capsys.readouterr().out
    assert "no run is named typo (fitted ones: a): this fits a new backtest" in shown and "trains typo" in shown


@pytest.mark.parametrize("words", [["backtest"], ["train", "--backtest-days", "84"]])
def test_too_short_a_history_is_refused_before_anything_is_fitted(here, capsys, words):
    """For example, the defaults of a backtest need more history than the demo data have."""
    verb, *rest = words
    assert main([verb, "kdd_air_quality", "--data", "files", *rest]) == 1
    assert "hold out fewer --backtest-days" in capsys.readouterr().err
    assert [folder.name for folder in (here / "runs" / "kdd_air_quality").iterdir()] == ["a"]


@pytest.mark.parametrize("verb", ["train", "backtest"])
@pytest.mark.parametrize(
    "words",
    ["--fold 1", "--folds 3", "--batch-size 64", "--keep best", "--patience 2 --keep best", "--evaluate-every 2"]
    + ["--tta 0", "--channels-last", "--bad-images skip"],
)
def test_flags_that_would_do_nothing_are_refused(here, capsys, verb, words):
    assert main([verb, "kdd_air_quality", *SMALL, "--data", "files", *words.split()]) == 1
    error = capsys.readouterr().err
    assert any(word in error for word in words.split() if word.startswith("--")) and error.count("\n") == 1
    assert [folder.name for folder in (here / "runs" / "kdd_air_quality").iterdir()] == ["a"]


@pytest.mark.usefixtures("no_plots")
def test_a_run_that_was_stopped_goes_on_with_what_is_fitted(here, monkeypatch, capsys):
    fit, fitted = models.Models.fit, []

    def stopped(part, name, *given):
        if name == "boosting":
            raise KeyboardInterrupt
        fit(part, name, *given)

    def noted(part, name, *given):
        fitted.append((name, part.fold))
        fit(part, name, *given)

    words = ["train", "kdd_air_quality", *SMALL, "--data", "files", "--run", "again"]
    with monkeypatch.context() as patch:
        patch.setattr(models.Models, "fit", stopped)
        assert main(words) == 130
    monkeypatch.setattr(models.Models, "fit", noted)
    assert main(words) == 0
    assert fitted == [("boosting", 0), ("medians", None), ("boosting", None)]
    assert "resuming" in capsys.readouterr().out
    folder = here / "submissions" / "kdd_air_quality"
    assert (folder / "again.csv").read_bytes() == (folder / "a.csv").read_bytes()


@pytest.mark.parametrize("words", [[], ["--data", "files"], ["--last-day", "2018-03-31"], ["--run", "a,a"]])
def test_what_train_and_predict_write_is_the_same(here, capsys, words):
    folder = here / "submissions" / "kdd_air_quality"
    expected = (folder / "a.csv").read_bytes()
    (folder / "a.csv").unlink()
    assert main(["predict", "kdd_air_quality", *words]) == 0
    shown = capsys.readouterr().out
    assert "no submission" not in shown and shown.count("submission: ") == 1
    (written,) = folder.glob("*.csv")
    name = {"--data": "a-2018-03-31.csv", "--last-day": "a-2018-03-31.csv", "--run": "a+a.csv"}
    assert written.name == name.get("".join(words[:1]), "a.csv") and written.read_bytes() == expected


def test_the_kept_forecasts_are_not_those_of_other_stations(here, capsys):
    path = here / "files" / "sample_submission.csv"
    path.write_text("\n".join(line for line in path.read_text().splitlines() if "CD1#" not in line))
    facts = here / "runs" / "kdd_air_quality" / "a" / "run.json"
    facts.write_text(json.dumps(json.loads(facts.read_text()) | {"data": str(here / "files")}))
    assert main(["predict", "kdd_air_quality", "--run", "a"]) == 1
    assert "only predictions for" in capsys.readouterr().err


def test_a_finished_run_is_not_trained_again(here, capsys):
    assert main(["train", "kdd_air_quality", *SMALL, "--data", "files", "--run", "a"]) == 0
    assert "only predicting" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words, message",
    [
        (["train", "--models", "forest"], "expected one or more of medians,linear,boosting,mlp"),
        (["train", "--beijing-windows", "silver_3"], "golden_1 to golden_8"),
        (["train", "--last-day", "2017-01-01"], "which go from 2018-01-01 to 2018-03-31"),
        (["train", "--last-day", "2018-04-20"], "which go from 2018-01-01 to 2018-03-31"),
        (["train", "--first-day", "2018-03-01"], "make backtest"),
        (["train", "--backtest-days", "0"], "expected at least 1"),
        (["train", "--jobs", "0"], "-1 for one per core"),
        (["backtest", "--refit-days", "0"], "expected at least 1"),
        (["backtest", "--last-day", "2018-04-20"], "which go from 2018-01-01 to 2018-03-31"),
        (["backtest", "--first-day", "2018-04-20"], "which go from 2018-01-01 to 2018-03-31"),
        (["backtest", "--run", "a", "--last-day", "2018-04-20"], "which go from 2018-01-01 to 2018-03-31"),
        (["train", "--last-day", "2018-01-04"], "history"),
        (["predict", "--run", "a", "--first-day", "2019-01-01"], "which go from 2018-01-01 to 2018-03-31"),
        (["predict", "--run", "a", "--first-day", "soon"], "expected year-month-day"),
        (["backtest", "--first-day", "2018-01-04", "--last-day", "2018-01-06"], "choose a later --first-day"),
        (["backtest", "--first-day", "2018-03-06", "--last-day", "2018-03-01"], "expected a later or the same day"),
    ],
)
def test_bad_input_is_one_line_and_no_csv(here, capsys, words, message):
    before = sorted((here / "submissions").rglob("*.csv"))
    verb, *rest = words
    small = SMALL if verb != "predict" and "--models" not in rest else ["--recipe", "smoke"] * (verb != "predict")
    assert main([verb, "kdd_air_quality", "--data", "files", *small, *rest]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert sorted((here / "submissions").rglob("*.csv")) == before


def test_check_reads_the_files(here, capsys):
    assert main(["check", "kdd_air_quality", "--recipe", "smoke", "--data", "files"]) == 0
    assert "is in order" in capsys.readouterr().out


def test_131_series_make_2304_rows(tmp_path):
    asked = table.asked(RawData(tmp_path, "kdd_air_quality"))
    assert len(list(table.csv_rows(asked, np.ones((48, 131)), Network()))) == 2304
