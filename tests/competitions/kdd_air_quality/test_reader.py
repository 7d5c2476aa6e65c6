"""The reader: all file layouts, both spellings, duplicates, negative values, and warnings about odd files."""

import shutil

import numpy as np
import pandas as pd
import pytest

from common.errors import UserError
from common.raw import RawData
from competitions.kdd_air_quality import demo, reader, table
from competitions.kdd_air_quality.origins import HOUR
from competitions.kdd_air_quality.reader import known_before, read
from competitions.kdd_air_quality.stations import Network

HISTORY = "beijing_17_18_aq.csv"
LONDON = "London_historical_aqi_forecast_stations_20180331.csv"


@pytest.fixture
def files(demo_folder, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(demo_folder, folder)
    return folder


def load(folder, stations=(*demo.BEIJING, *demo.LONDON)):
    return read(RawData(folder, "kdd_air_quality"), stations)


def value(observations, station, hour, pollutant=0):
    row = int((np.datetime64(hour, "h") - observations.start) / HOUR)
    return observations.values[row, observations.network.stations.index(station), pollutant]


def test_the_mixed_files_make_one_grid(files):
    observations = load(files)
    assert observations.values.shape == (demo.DAYS * 24, 8, 6) and not observations.warnings
    history = pd.read_csv(files / HISTORY).dropna(subset=["O3"]).iloc[100]
    assert value(observations, history.stationId, history.utc_time, 2) == np.float32(history.O3)
    recent = pd.read_csv(files / "bj_aq_2018.csv").dropna(subset=["PM10_Concentration"])
    recent = recent[recent.station_id == "aotizhongx_aq"].iloc[3]
    assert value(observations, "aotizhongxin_aq", recent.time, 1) == np.float32(recent.PM10_Concentration)
    london = pd.read_csv(files / LONDON).dropna(subset=["PM2.5 (ug/m3)"]).iloc[50]
    hour = pd.to_datetime(london.MeasurementDateGMT).to_datetime64()
    assert value(observations, london.station_id, hour) == np.float32(london["PM2.5 (ug/m3)"])
    assert (observations.values < 0).any(), "negative values stay for the score"


def test_geocode_column_and_times_do_not_matter(files):
    expected = load(files).values
    frame = pd.read_csv(files / LONDON).rename(columns={"station_id": "GeoCode"})
    frame["MeasurementDateGMT"] = pd.to_datetime(frame["MeasurementDateGMT"]).astype(str)
    frame.sample(frac=1, random_state=0).to_csv(files / LONDON, index=False)
    np.testing.assert_array_equal(load(files).values, expected)


def test_of_two_values_the_last_one_counts_and_a_blank_does_not(files):
    row = pd.read_csv(files / HISTORY).dropna().iloc[[10]]
    later = row.assign(O3=777.0, PM10=np.nan)
    later.to_csv(files / "zz_correction.csv", index=False)
    observations = load(files)
    station, hour = row.stationId.iloc[0], row.utc_time.iloc[0]
    assert value(observations, station, hour, 2) == 777
    assert value(observations, station, hour, 1) == np.float32(row.PM10.iloc[0])


def test_the_archive_of_series_reads_the_same_values(files, tmp_path):
    """The Zenodo layout has one line per series."""
    observations = load(files)
    attributes = (
        "series_name string",
        "city string",
        "station string",
        "air_quality_measurement string",
        "start_timestamp date",
    )
    lines = ["# comment", *(f"@attribute {text}" for text in attributes), "@data"]
    names = ("PM2.5", "PM10", "O3", "NO2", "CO", "SO2")
    for station, full in enumerate(observations.network.stations):
        for pollutant, name in enumerate(names):
            numbers = observations.values[:, station, pollutant]
            if np.isfinite(numbers).any():
                city = "Beijing" if full.endswith("_aq") else "London"
                text = ",".join("?" if np.isnan(v) else repr(float(v)) for v in numbers)
                lines.append(f"T{len(lines)}:{city}:{full}:{name}:2018-01-01 00-00-00:{text}")
    (tmp_path / "tsf").mkdir()
    (tmp_path / "tsf" / "kdd.tsf").write_text("\n".join(lines))
    np.testing.assert_array_equal(load(tmp_path / "tsf").values, observations.values)


def test_other_columns_are_named_and_left_out(files):
    (files / "strange.csv").write_text("place,when,dust\nA,2018-01-01,3\n")
    (files / "grid.csv").write_text("stationName,utc_time,temperature\nA,2018-01-01,3\n")
    (warning,) = load(files).warnings
    assert "strange.csv" in warning and "place, when, dust" in warning and "utc_time" in warning


@pytest.mark.parametrize("renamed", [str.upper, lambda column: f" {column.lower()}{' (ug/m3)' * (column == 'O3')} "])
def test_spelling_of_columns_and_endings_does_not_matter(files, renamed):
    expected = load(files).values
    pd.read_csv(files / HISTORY).rename(columns=renamed).to_csv(files / "BEIJING.CSV", index=False)
    (files / HISTORY).unlink()
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected)
    assert not observations.warnings


@pytest.mark.parametrize(
    "file, column, renamed",
    [(LONDON, "PM10 (ug/m3)", "PM10 (\u00b5g/m\u00b3)"), (LONDON, "NO2 (ug/m3)", "NO2 (\u03bcg/m3)")]
    + [(HISTORY, "CO", "CO (mg/m3)")],
)
def test_a_unit_spelt_otherwise_loses_no_column(files, file, column, renamed):
    expected = load(files).values
    pd.read_csv(files / file).rename(columns={column: renamed}).to_csv(files / file, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected)
    assert not observations.warnings


def test_another_unit_is_not_taken_for_the_files_own():
    assert reader._pollutant("CO (mg/m3)") == "CO" and reader._pollutant("PM10 (mg/m3)") is None


def test_a_file_with_two_columns_of_a_pollutant_is_left_out(files):
    """One of the columns may be a correction or have another unit, so the reader cannot choose."""
    frame = pd.read_csv(files / HISTORY).assign(PM25_Concentration=1.0)
    frame.to_csv(files / HISTORY, index=False)
    warning = load(files).warnings[0]
    assert f"{HISTORY} was not read: PM2.5 and PM25_Concentration both hold PM2.5" in warning


def test_columns_of_the_weather_beside_the_pollutants_hide_nothing(files):
    expected = load(files).values
    pd.read_csv(files / HISTORY).assign(temperature=3, humidity=40).to_csv(files / HISTORY, index=False)
    np.testing.assert_array_equal(load(files).values, expected)


def test_values_that_are_no_numbers_are_named(files):
    frame = pd.read_csv(files / HISTORY)
    texts = frame["PM10"].astype(str).where(frame["PM10"].notna(), " ")
    frame.assign(PM10=texts.str.replace(".", ",")).to_csv(files / HISTORY, index=False)
    (warning,) = load(files).warnings
    count, example = frame["PM10"].notna().sum(), texts[frame["PM10"].notna()].iloc[0].replace(".", ",")
    assert f"{HISTORY}: {count} values of PM10 are not numbers" in warning and repr(example) in warning


@pytest.mark.parametrize("name, sentinel", [(HISTORY, -999), (HISTORY, 999), (LONDON, -1), (LONDON, 9999)])
def test_numbers_for_missing_values_are_missing(files, name, sentinel):
    expected = load(files)
    frame = pd.read_csv(files / name)
    columns = [column for column in frame if "PM" in column or column in ("O3", "CO", "NO2", "SO2")]
    count = int(frame[columns].isna().sum().sum())
    frame.fillna(dict.fromkeys(columns, sentinel)).to_csv(files / name, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected.values)
    (warning,) = observations.warnings
    assert (
        f"{name}: {count} implausible values count as missing" in warning and f"{sentinel} ({count} times)" in warning
    )


def test_a_value_below_zero_that_is_rare_was_measured(files):
    """London's real files have -1 in 84 hours, too few for a code for missing values."""
    frame = pd.read_csv(files / LONDON)
    column = next(name for name in frame if name.startswith("NO2"))
    rows = frame[column].dropna().index[10:94]
    frame.loc[rows, column] = -1.0
    frame.to_csv(files / LONDON, index=False)
    observations = load(files)
    assert observations.warnings == () and np.count_nonzero(observations.values == -1) == 84


def test_numbers_for_missing_values_in_the_archive_of_series(tmp_path):
    head = ["@attribute station string", "@attribute air_quality_measurement string", "@attribute start_timestamp date"]
    lines = [f"{station}:PM2.5:2018-01-01 00-00-00:5,-999,-0.4,9999,?,7" for station in ("dongsi_aq", "CD1")]
    (tmp_path / "kdd.tsf").write_text("\n".join([*head, "@data", *lines]))
    observations = load(tmp_path, ("dongsi_aq", "CD1"))
    expected = np.float32([5, np.nan, -0.4, np.nan, np.nan, 7])
    np.testing.assert_array_equal(observations.values[:, 1, 0], expected)
    assert any(
        "kdd.tsf: 4 implausible values count as missing" in text and "-999 (2 times)" in text
        for text in observations.warnings
    )


def test_what_is_not_finite_is_missing_and_named(files):
    frame = pd.read_csv(files / HISTORY, dtype=str)
    row = frame[~frame.duplicated(["stationId", "utc_time"], keep=False)].dropna().index[7]
    frame.loc[row, "O3"] = "-Infinity"
    frame.to_csv(files / HISTORY, index=False)
    observations = load(files)
    (warning,) = observations.warnings
    assert f"{HISTORY}: 1 values of O3 are not numbers and count as missing" in warning
    assert np.isnan(value(observations, frame["stationId"][row], frame["utc_time"][row], 2))


def test_a_day_without_hours_does_not_become_its_midnight(files):
    expected = load(files)
    frame = pd.read_csv(files / LONDON)
    hours = pd.to_datetime(frame["MeasurementDateGMT"], format="mixed")
    rows = hours[hours.dt.floor("D") == "2018-01-20"].index
    frame.loc[rows, "MeasurementDateGMT"] = "2018/1/20"
    frame.to_csv(files / LONDON, index=False)
    observations = load(files)
    (warning,) = observations.warnings
    assert f"{LONDON}: {len(rows)} rows are left out because their time has no hour, such as '2018/1/20'" in warning
    day = int((np.datetime64("2018-01-20T00") - observations.start) / HOUR)
    london = [observations.network.stations.index(name) for name in demo.LONDON]
    assert np.isnan(observations.values[day : day + 24, london]).all()
    changed = observations.values != expected.values
    assert not (changed & ~np.isnan(expected.values) & ~np.isnan(observations.values)).any()


def test_a_table_of_days_is_left_out(files):
    expected = load(files)
    (files / "zz_days.csv").write_text("stationId,utc_time,PM2.5\ndongsi_aq,2018-02-01,77\ndongsi_aq,2018-02-02,77\n")
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected.values)
    assert "zz_days.csv: 2 rows are left out because their time has no hour" in observations.warnings[0]


@pytest.mark.parametrize("layout", ["%Y-%m-%d", "%d/%m/%Y"])
def test_midnight_written_as_a_date_alone_is_midnight(files, layout):
    """R writes midnight as a date alone among the other hours; a repeated row counts once."""
    expected = load(files)
    frame = pd.read_csv(files / LONDON)
    hours = pd.to_datetime(frame["MeasurementDateGMT"], format="mixed")
    texts = hours.dt.strftime(f"{layout} %H:%M").where(hours.dt.hour != 0, hours.dt.strftime(layout))
    frame = frame.drop(columns=frame.columns[0]).assign(MeasurementDateGMT=texts)
    pd.concat([frame, frame[hours.dt.hour == 0].iloc[:9]]).to_csv(files / LONDON, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected.values)
    assert not observations.warnings


def test_series_of_something_else_are_named(files):
    (files / "tides.tsf").write_text("@attribute harbour string\n@data\nT1:Dover:3,4,5\n")
    (warning,) = load(files).warnings
    assert warning.startswith("tides.tsf was not read") and "air_quality_measurement" in warning


def test_files_of_other_kinds_are_listed(files):
    expected = load(files).values
    for name in ("more.xlsx", "beijing.csv.gz", "notes.txt", ".hidden"):
        (files / name).write_text("?")
    observations = load(files)
    (warning,) = observations.warnings
    assert "beijing.csv.gz, more.xlsx, notes.txt" in warning and "hidden" not in warning
    np.testing.assert_array_equal(observations.values, expected)


def test_a_file_that_is_no_table_is_named_and_left_out(files):
    expected = load(files).values
    (files / "notes.csv").write_bytes(b"a,b\n1,2,3\n1,2,3,4,5\n")
    observations = load(files)
    (warning,) = observations.warnings
    assert warning.startswith("notes.csv was not read: ")
    np.testing.assert_array_equal(observations.values, expected)


@pytest.mark.parametrize("others", ["", "dongsi_aq,2018-02-01 05:00:00,4,4,4\n"])
def test_rows_without_a_time_are_left_out(files, others):
    expected = load(files).values
    (files / "a_first.csv").write_text(f"stationId,utc_time,PM2.5,PM10,O3\n{others}dongsi_aq,,999,999,999\n")
    observations = load(files)
    (warning,) = observations.warnings
    assert "a_first.csv: 1 rows are left out" in warning
    assert not (observations.values == 999).any() and observations.values.shape == expected.shape


@pytest.mark.parametrize("layout", ["%d.%m.%Y %H:%M", "%m/%d/%Y %H:%M", "%Y-%m-%dT%H:%M:%SZ", "%d %B %Y %H:%M"])
def test_times_in_other_layouts_are_the_same_hours(files, layout):
    expected = load(files).values
    frame = pd.read_csv(files / LONDON)
    frame["MeasurementDateGMT"] = pd.to_datetime(frame["MeasurementDateGMT"], format="mixed").dt.strftime(layout)
    frame.to_csv(files / LONDON, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected)
    assert not observations.warnings


@pytest.mark.parametrize(
    "away, layout",
    [("-3us", "%Y-%m-%d %H:%M:%S.%f"), ("8h", "%Y-%m-%d %H:%M UTC+8")]
    + [("1h", "%a %b %d %Y %H:%M:%S GMT+0100 (BST)"), ("-3h", "%Y-%m-%d %H:%M GMT-3")],
)
def test_hours_are_not_moved_by_a_rest_of_a_second_or_the_sign_of_a_zone(files, away, layout):
    expected = load(files).values
    frame = pd.read_csv(files / LONDON)
    hours = pd.to_datetime(frame["MeasurementDateGMT"], format="mixed") + pd.Timedelta(away)
    frame.assign(MeasurementDateGMT=hours.dt.strftime(layout)).to_csv(files / LONDON, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected)
    assert not observations.warnings


def test_spaces_around_a_station_hide_nothing(files):
    expected = load(files).values
    frame = pd.read_csv(files / LONDON)
    frame.assign(station_id=frame["station_id"] + " ").to_csv(files / LONDON, index=False)
    np.testing.assert_array_equal(load(files).values, expected)


def test_times_with_and_without_a_zone_stand_side_by_side(files):
    expected = load(files).values
    frame = pd.read_csv(files / LONDON)
    hours = pd.to_datetime(frame["MeasurementDateGMT"], format="mixed")
    texts = hours.astype(str)
    texts[::3] += "Z"
    texts[1::3] = (hours[1::3] + pd.Timedelta(hours=8)).astype(str) + "+08:00"
    frame.assign(MeasurementDateGMT=texts).to_csv(files / LONDON, index=False)
    observations = load(files)
    np.testing.assert_array_equal(observations.values, expected)
    assert not observations.warnings


@pytest.mark.parametrize(
    "times, word",
    [
        (["05/01/2018 5:00", "06/01/2018 5:00"], "either day or month first"),
        (["25/01/2018 5:00", "01/25/2018 5:00"], "both day or month first"),
        (["1514764800", "1514768400"], "cannot be read, such as '1514764800'"),
        (["43101.25", "43101.2916667"], "cannot be read, such as '43101.25'"),
        (["2018010100", "2018010101"], "cannot be read, such as '2018010100'"),
        (["25/01/18 5:00", "05:00"], "cannot be read, such as '25/01/18 5:00'"),
    ],
)
def test_times_that_could_be_others_are_left_out(files, times, word):
    expected = load(files)
    rows = [f"{time},CD1,999,999" for time in times]
    (files / "more.csv").write_text("\n".join(["MeasurementDateGMT,station_id,PM2.5 (ug/m3),PM10 (ug/m3)", *rows]))
    observations = load(files)
    (warning,) = observations.warnings
    assert warning.startswith("more.csv") and word in warning and "as in 2018-01-31 05:00" in warning
    np.testing.assert_array_equal(observations.values, expected.values)
    assert observations.start == expected.start


def test_files_whose_times_cannot_be_read_are_no_files(tmp_path):
    (tmp_path / "epoch.csv").write_text("stationId,utc_time,PM2.5\ndongsi_aq,1514764800,3\n")
    with pytest.raises(UserError, match="has no file of air quality.*such as '1514764800'"):
        load(tmp_path)


@pytest.mark.parametrize("hour", ["2017-06-01 00:00:00", "2081-04-01 00:00:00"])
def test_rows_without_values_begin_and_end_nothing(files, hour):
    expected = load(files)
    (files / "blank.csv").write_text(f"stationId,utc_time,PM2.5,PM10,O3\ndongsi_aq,{hour},,,\n")
    observations = load(files)
    assert (observations.start, observations.end) == (expected.start, expected.end)


@pytest.mark.parametrize("year", [2017, 2081])
def test_a_mistyped_year_is_refused(files, year):
    (files / "more.csv").write_text(f"stationId,utc_time,PM2.5\ndongsi_aq,{year}-08-01 05:00:00,3\n")
    with pytest.raises(UserError, match=f"the 1 rows on one side, such as dongsi_aq at {year}-08-01T05"):
        load(files)


def test_a_folder_without_a_single_value_is_refused(tmp_path):
    (tmp_path / "blank.csv").write_text("stationId,utc_time,PM2.5\ndongsi_aq,2018-01-01 05:00:00,\n")
    with pytest.raises(UserError, match="has no row with a value of a known station such as dongsi_aq"):
        load(tmp_path)


def test_unknown_stations_are_listed(files):
    pd.read_csv(files / HISTORY).iloc[:5].assign(stationId="atlantis_aq").to_csv(files / "more.csv", index=False)
    (warning,) = load(files).warnings
    assert "atlantis_aq" in warning


def test_local_time_is_noticed_by_the_ozone(files):
    for name, column in ((HISTORY, "utc_time"), ("bj_aq_2018.csv", "time")):
        frame = pd.read_csv(files / name)
        frame[column] = pd.to_datetime(frame[column]) + pd.Timedelta(hours=8)
        frame.to_csv(files / name, index=False)
    warnings = load(files).warnings
    assert len(warnings) == 2 and all("local time" in text and "16:00" in text for text in warnings)


def test_an_empty_city_is_refused(files):
    for name in (LONDON, "ld_aq_2018.csv"):
        (files / name).unlink()
    with pytest.raises(UserError, match="no observation of London"):
        load(files)
    load(files, demo.BEIJING)


def test_an_empty_city_is_refused_with_the_reason(files):
    (files / LONDON).write_bytes((files / LONDON).read_bytes() + b"\xe9\n")  # no UTF-8
    others = pd.read_csv(files / "ld_aq_2018.csv")
    others["station_id"] = "london_" + others["station_id"]
    others.to_csv(files / "ld_aq_2018.csv", index=False)
    with pytest.raises(UserError, match=f"no observation of London.*{LONDON} was not read.*UTF-8.*london_"):
        load(files)


def test_a_gap_is_refused_with_the_files_that_were_not_read(files):
    old = pd.read_csv(files / HISTORY).iloc[:5].assign(utc_time="2016-01-01 00:00:00")
    old.to_csv(files / "old.csv", index=False)
    (files / "between.csv").write_bytes(b"\xe9\n")
    with pytest.raises(UserError, match="no value from.*between.csv was not read"):
        load(files)


def test_a_station_without_data_is_listed(files):
    warnings = load(files, (*demo.BEIJING, *demo.LONDON, "zhiwuyuan_aq")).warnings
    assert any("zhiwuyuan_aq PM2.5" in text for text in warnings)


def test_no_files_at_all(tmp_path):
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(UserError, match="make data COMP=kdd_air_quality"):
        load(tmp_path)


def test_nothing_is_left_after_the_origin(files):
    observations = load(files)
    day = np.datetime64("2018-02-10")
    known = known_before(observations, day)
    assert str(known.end) == "2018-02-11T00"
    np.testing.assert_array_equal(known.values, observations.values[: len(known.values)])
    with pytest.raises(UserError, match="2018-01-01 to 2018-03-31"):
        known_before(observations, np.datetime64("2019-01-01"))
    with pytest.raises(UserError, match="outside the data"):
        known_before(observations, np.datetime64("2017-12-01"))


def test_a_day_that_is_half_over_has_no_truth(files):
    observations = load(files)  # to 2018-03-31 23:00
    days = np.arange("2018-03-28", "2018-04-01", dtype="datetime64[D]")
    known = np.isfinite(observations.truth(days)).any(axis=(1, 2, 3))
    assert known.tolist() == [True, True, False, False]
    hours = np.flatnonzero(np.isfinite(observations.truth(days[1:2])).any(axis=(0, 2, 3)))
    assert hours[0] == 0 and hours[-1] == 47
    early = np.array([observations.start.astype("datetime64[D]")]) - 2
    assert np.isnan(observations.truth(early)).all(), "nor has one that began before the data"


def test_an_origin_after_the_last_hour_is_padded_with_missing_hours(files):
    observations = load(files)
    known = known_before(observations, np.datetime64("2018-04-01"))
    assert str(known.end) == "2018-04-02T00" and np.isnan(known.values[-24:]).all()


def sample_of(folder, lines):
    (folder / "sample_submission.csv").write_text("\n".join([*lines, ""]))
    return table.asked(RawData(folder, "kdd_air_quality"))


class TestTable:
    def test_both_spellings_keep_their_ids_and_order(self, real_data, tmp_path):
        for name in ("sample_submission.csv", "sample_submission_short_ids.csv"):
            lines = (real_data / "kdd_cup_2018" / name).read_text().splitlines()
            asked = sample_of(tmp_path, lines)
            assert asked.network == Network()
            forecast = np.arange(48 * 131, dtype=float).reshape(48, 131)
            rows = list(table.csv_rows(asked, forecast, Network()))
            assert [row[0] for row in rows] == [line.split(",")[0] for line in lines[1:]] and len(rows) == 2304
            assert rows[0][1:] == ["0.0000", "1.0000", "2.0000"]
            assert rows[-1][1:3] == [f"{48 * 131 - 2}.0000", f"{48 * 131 - 1}.0000"]
            assert rows[-1][3] == lines[-1].split(",")[3]

    def test_the_standard_sample_without_a_file(self, tmp_path):
        rows = table.asked(RawData(tmp_path, "kdd_air_quality")).rows
        assert len(rows) == 2304 and rows[0] == ["dongsi_aq#0", "0", "0", "0"] and rows[-1] == ["TH4#47", "0", "0", ""]

    @pytest.mark.parametrize(
        "name", ["Sample_Submission.csv", "SAMPLE_SUBMISSION.CSV", "2018/sample_submission_v2.csv"]
    )
    def test_the_sample_in_another_case_is_the_sample(self, tmp_path, name):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("test_id,PM2.5,PM10,O3\nCD1#0,0,0,\n")
        assert table.asked(RawData(tmp_path, "kdd_air_quality")).sample.ids == ("CD1#0",)
        (tmp_path / "sample_submission.csv").write_text("test_id,PM2.5,PM10,O3\nBL0#0,0,0,\n")
        if name != "Sample_Submission.csv":
            assert table.asked(RawData(tmp_path, "kdd_air_quality")).sample.ids == ("BL0#0",)

    def test_ids_are_joined_by_name_not_by_place(self, tmp_path):
        lines = ["test_id,PM2.5,PM10,O3", "CD1#1,0,0,", "dongsi_aq#0,0,0,0"]
        asked = sample_of(tmp_path, lines)
        assert asked.network.stations == ("dongsi_aq", "CD1"), "the order of the series is not the sample's"
        forecast = np.arange(48 * 5, dtype=float).reshape(48, 5)  # dongsi PM2.5, PM10, O3, CD1 PM2.5, PM10
        assert list(table.csv_rows(asked, forecast, asked.network)) == [
            ["CD1#1", "8.0000", "9.0000", ""],
            ["dongsi_aq#0", "0.0000", "1.0000", "2.0000"],
        ]

    @pytest.mark.parametrize("line", ["nowhere_aq#1,0,0,0", "CD1#48,0,0,0", "CD1,0,0,0"])
    def test_other_ids_are_refused(self, tmp_path, line):
        with pytest.raises(UserError, match="expected a station"):
            sample_of(tmp_path, ["test_id,PM2.5,PM10,O3", line])

    @pytest.mark.parametrize(
        "lines, fault",
        [
            ([], "a header and no rows"),
            (["CD1#0"], "line 2: 1 values, expected 4"),
            (["CD1#0,0,0"], "line 2: 3 values, expected 4"),
            (["   "], "line 2: 1 values, expected 4"),
            (["CD1#0,0,0,", "CD1#0,0,0,"], "line 3: id CD1#0 appears twice, first in line 2"),
            (["CD1#0,0,0,nan"], "id CD1#0 has the value 0.0000,0.0000,nan"),
            (["CD1#0,0,0,-1"], "O3 is -1, expected 0 or more"),
            (["CD1#0,0,0,none"], "O3 is 'none', expected a number"),
        ],
    )
    def test_what_no_submission_could_follow_is_refused(self, tmp_path, lines, fault):
        with pytest.raises(UserError) as caught:
            sample_of(tmp_path, ["test_id,PM2.5,PM10,O3", *lines])
        assert fault in str(caught.value)

    @pytest.mark.parametrize("header", ["", "id,PM2.5,PM10,O3", "test_id,PM2.5,PM10,O3 "])
    def test_other_headers_are_refused(self, tmp_path, header):
        with pytest.raises(UserError, match="expected test_id,PM2.5,PM10,O3|line 2: the header is 'CD1#0,0,0,'"):
            sample_of(tmp_path, [header, "CD1#0,0,0,"])

    @pytest.mark.parametrize(
        "values, fault",
        [
            (("1", "2", "3"), None),
            (("1", "2", ""), None),
            (("", "2", "3"), "expected a number"),
            (("1", "-2", "3"), "0 or more"),
            (("1", "x", "3"), "expected a number"),
        ],
    )
    def test_values(self, values, fault):
        found = table.valid(values)
        assert found is None if fault is None else fault in found
