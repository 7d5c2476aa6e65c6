"""make submit and make board: no bad file is sent, Kaggle's list decides what arrived, and no entry is lost."""

import _thread
import csv
import hashlib
import json
import re
import shutil
import subprocess
import sys
import threading
import zipfile
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from common import run as runs
from common.errors import UserError
from common.kaggle import board as boards
from common.kaggle import ledger as ledgers
from common.kaggle import submit as submits
from common.kaggle.asked import PAGE
from common.kaggle.ledger import SCORED, Row
from common.kaggle.source import Source
from common.task import Submission
from tests.common.kaggle.server import DROP, HANG, SLUG, Reply

pytestmark = pytest.mark.usefixtures("no_secrets")
CREATED, GOOD = "2026-01-02T00:00:00Z", "id,label\n1,0\n2,1\n"
HOME = Path("submissions/toy")


@pytest.fixture
def module(source):
    def build(config, raw, log):
        return SimpleNamespace(submission=Submission(valid=valid))

    def valid(values):
        return None if values[0] in "01" else f"label {values[0]} is not 0 or 1"

    return SimpleNamespace(source=source, recipes={"default": None}, build=build)


@pytest.fixture(autouse=True)
def _data(kaggle):
    Path("data/toy").mkdir(parents=True)
    Path("data/toy/sample_submission.csv").write_text("id,label\n1,0\n2,0\n")


def written(run="001-best", score=0.9, text=GOOD, finished="2026-01-01T00:00:00Z", fold=None, **provenance) -> Path:
    """Write a submission with its sidecar and its finished run, as make train leaves them; returns the CSV's path."""
    path = HOME / f"{run}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    facts = {
        "competition": "toy", "run": run, "recipe": "best", "score": score, "monitor": "accuracy", "commit": "abc123",
        "data_fingerprint": "f", "demo": False, "created": CREATED,
        "sha256": hashlib.sha256(text.encode()).hexdigest(),
    }  # fmt: skip
    path.with_suffix(".json").write_text(json.dumps(facts | provenance))
    folder = Path("runs/toy") / run
    folder.mkdir(parents=True)
    of_run = {name: facts[name] for name in ("competition", "recipe", "demo", "data_fingerprint", "created")}
    of_run |= {"format": runs.FORMAT, "data": str(Path("data/toy").resolve()), "folds_fingerprint": "f"}
    (folder / "run.json").write_text(json.dumps(of_run))
    (folder / "config.json").write_text(json.dumps({"fold": "all" if score is None or fold is None else fold}))
    of_folds = {} if score is None else {"0": score, "1": score} if fold is None else {fold: score}
    result = {"score": score, "monitor": "accuracy", "rows": 100 * len(of_folds), "fold_scores": of_folds}
    (folder / "result.json").write_text(json.dumps(result | {"errors": {"accuracy": 0.02}, "finished": finished}))
    (folder / "folds.csv").write_text("id,fold\n1,0\n2,1\n")
    return path


def submit(module, **options):
    submits.submit("toy", module, **{"poll": 0.05, "wait": 30, **options})


def ledger() -> list[dict]:
    path = HOME / "ledger.csv"
    return list(csv.DictReader(open(path))) if path.is_file() else []


def sent(kaggle) -> list[str]:
    return [text.decode() for text in kaggle.uploads]


# Files that are chosen or refused; no request is sent to Kaggle.


@pytest.mark.parametrize("change", [{"run": ["a"]}, {"demo": "no"}, {"score": "0.9"}, {"text_columns": None}])
def test_a_sidecar_with_other_values_than_the_kit_writes_is_named(module, kaggle, change):
    written()
    sidecar = HOME / "001-best.json"
    sidecar.write_text(json.dumps(json.loads(sidecar.read_text()) | change))
    with pytest.raises(UserError, match=f"001-best.json cannot be read .{list(change)[0]} is .*make predict"):
        submit(module)
    sidecar.write_text("")  # by a full disk
    with pytest.raises(UserError, match="holds nothing: train"):
        submit(module)
    assert not sent(kaggle)


def test_a_run_whose_files_have_other_values_than_the_kit_writes_is_named(module, kaggle):
    written()
    for name, key in (("result.json", "finished"), ("run.json", "data")):
        file = Path("runs/toy/001-best") / name
        before = file.read_text()
        file.write_text(json.dumps(json.loads(before) | {key: [1]}))
        with pytest.raises(UserError, match=f"{name} cannot be read .{key} is .*expected a text"):
            submit(module, run="001-best")
        file.write_text(before)
    assert not sent(kaggle)


def choice(module, **options):
    return submits.choose("toy", module.source, options.get("run"), options.get("file")).path.stem


def test_the_newest_file_of_the_best_run_is_chosen(module):
    written("001-a", 0.8)
    written("002-b", 0.9)
    written("003-c", 0.9, created="2026-01-03T00:00:00Z")
    written("004-d", 0.85, created="2026-01-04T00:00:00Z")
    written("005-everything", None, created="2026-01-05T00:00:00Z")
    written("006-demo", 0.99, demo=True)
    assert choice(module) == "003-c"
    module.source = replace(module.source, higher_is_better=False)
    assert choice(module) == "001-a"
    assert choice(module, run="004-d") == "004-d" and choice(module, run="005-everything") == "005-everything"
    assert choice(module, file="submissions/toy/002-b.csv") == "002-b"


def test_no_score_is_not_the_best_one_where_the_runs_are_gone(module):
    written("001-a", 0.95)
    written("002-b", 0.9)
    written("003-none", float("nan"), created="2026-01-03T00:00:00Z")
    shutil.rmtree("runs")
    assert choice(module) == "001-a"


def test_a_lucky_fold_is_not_sent_and_the_choice_is_explained(module, capfd):
    written("001-all", 0.9)
    written("002-lucky", 0.91, fold="1", created="2026-01-03T00:00:00Z")
    assert choice(module) == "001-all"
    told = capfd.readouterr().out
    assert "001-all: CV 0.90000 ± 0.02000 on 200 rows" in told and "002-lucky has 0.91000" in told
    assert "on common rows (fold 1) it has 0.91000 and 001-all 0.90000, not better by 2 standard errors" in told


@pytest.mark.parametrize(
    ("prepare", "options", "message"),
    [
        (lambda: None, {}, "submissions/toy holds nothing: train on the real data first: make data COMP=toy"),
        (
            lambda: written(demo=True),
            {},
            r"holds only submissions made from demo data \(submissions/toy/001-best.csv\)",
        ),
        (lambda: written(demo=True), {"run": "001-best"}, "made from demo data and means nothing"),
        (lambda: written(), {"run": "002"}, r"RUN=002 has no submission \(there are: 001-best\)"),
        (lambda: written(), {"file": "x.csv"}, "FILE=x.csv does not exist.*submissions/toy/001-best.csv"),
        (lambda: written().write_text(GOOD + "3,1\n"), {}, "was changed after it was checked.*make predict COMP=toy"),
        (
            lambda: written(finished="2026-01-02T00:00:01Z"),
            {},
            r"older than its run \(2026-01-02T00:00:00Z, 001-best finished 2026-01-02T00:00:01Z\)",
        ),
        (lambda: written(text="id,label\n1,0\n"), {}, "line 3: id 2 is missing"),
        (lambda: written(text="id,label\n1,0\n2,nan\n"), {}, "id 2 has the value nan"),
        (lambda: Path("mine.csv").write_text("id,label\n1,0\n2,7\n"), {"file": "mine.csv"}, "label 7 is not 0 or 1"),
    ],
)
def test_what_is_not_sent(kaggle, module, prepare, options, message):
    prepare()
    with pytest.raises(UserError, match=message):
        submit(module, **options)
    assert kaggle.asked == [] and ledger() == []


def test_any_stage_of_a_competition_is_checked_against_its_own_sample(kaggle, module):
    module.source = replace(module.source, sample_submission="stage_*.csv")
    Path("data/toy/stage_1.csv").write_text("id,label\n1,0\n2,0\n")
    Path("data/toy/stage_2.csv").write_text("id,label\n8,0\n")
    for run, text, rows in (("one", GOOD, 2), ("two", "id,label\n8,1\n", 1)):
        written(run, text=text)
        assert submits.check(submits.choose("toy", module.source, run, None), "toy", module, None) == rows
    written("three", text="id,label\n9,1\n")
    with pytest.raises(UserError, match="id 9, expected 1"):
        submits.check(submits.choose("toy", module.source, "three", None), "toy", module, None)


def test_a_copy_of_a_demo_file_is_still_one(kaggle, module):
    Path("copy.csv").write_bytes(written(demo=True).read_bytes())
    with pytest.raises(UserError, match="copy.csv was made from demo data"):
        submit(module, file="copy.csv")


def test_without_data_it_says_how_to_get_them(kaggle, module):
    written()
    Path("data/toy/sample_submission.csv").unlink()
    Path("data/toy").rmdir()
    with pytest.raises(UserError, match="cannot be compared with the sample submission.*make data COMP=toy"):
        submit(module)


def test_nowhere_to_submit(kaggle, module):
    module.source = Source("", ("*.tsf",), False, nowhere_to_submit="the contest ended in 2018: score it with backtest")
    with pytest.raises(UserError, match="there is nowhere to submit .the contest ended in 2018"):
        submit(module)
    with pytest.raises(UserError, match="there is nowhere to submit"):
        boards.board("toy", module.source)
    module.source = Source("", (), True)
    for command in (lambda: submit(module), lambda: boards.board("toy", module.source)):
        with pytest.raises(UserError, match="there is nowhere to submit .it is not on Kaggle"):
            command()


# Sending, and Kaggle's answers.


def test_the_round_trip(kaggle, module, real_start, capfd):
    written()
    submit(module)
    assert sent(kaggle) == [GOOD]
    (created,) = kaggle.calls("CreateSubmission")
    message = created["submissionDescription"]
    assert re.fullmatch(r"001-best, recipe best, accuracy 0.90000, commit abc123 \[kit-[0-9a-f]{12}\]", message)
    out = capfd.readouterr().out
    assert "submissions/toy/001-best.csv (2 rows) of run 001-best, accuracy 0.90000\nsending to https://www.kag" in out
    assert "submissions left today: 9" in out and "public 0.9, private 0.8, validation 0.90000" in out
    (row,) = ledger()
    assert row.pop("time").endswith("Z")
    assert row == {
        "file": "submissions/toy/001-best.csv", "sha256": hashlib.sha256(GOOD.encode()).hexdigest(), "run": "001-best",
        "commit": "abc123", "validation": "0.9", "public": "0.9", "private": "0.8", "status": "COMPLETE",
        "ref": "1000", "reason": "", "message": message,
    }  # fmt: skip

    with pytest.raises(UserError, match="was sent before .*COMPLETE 0.9.*FORCE=1"):
        submit(module)
    assert len(kaggle.uploads) == 1
    submit(module, force=True, message="again")
    assert [row["ref"] for row in ledger()] == ["1000", "1001"]
    assert kaggle.calls("CreateSubmission")[1]["submissionDescription"].startswith("again [kit-")


def test_slow_scoring_is_waited_for(kaggle, module):
    written()
    kaggle.polls_until_score = 3
    submit(module)
    assert ledger()[0]["status"] == "COMPLETE" and len(kaggle.calls("ListSubmissions")) == 4


def test_scoring_that_takes_too_long_is_left_to_the_board(kaggle, module, capfd):
    written()
    kaggle.polls_until_score = 1000
    submit(module, wait=0.01)
    assert "sent but not scored after 0 s: make board COMP=toy" in capfd.readouterr().out
    assert ledger()[0]["status"] == "PENDING"
    kaggle.polls_until_score = 1
    boards.board("toy", module.source)
    assert (ledger()[0]["status"], ledger()[0]["public"]) == ("COMPLETE", "0.9")


def test_a_submission_that_cannot_be_scored_gives_kaggles_reason(kaggle, module):
    written()
    kaggle.outcome, kaggle.reason = "ERROR", "Submission must\n\thave 3 rows"
    with pytest.raises(UserError, match="could not score 001-best.csv: Submission must have 3 rows.*/submissions"):
        submit(module)
    assert (ledger()[0]["status"], ledger()[0]["reason"]) == ("ERROR", "Submission must have 3 rows")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ({"PUT": Reply(403)}, "the upload failed .Could not submit to competition.*It did not arrive: Kaggle does not"),
        ({"PUT": Reply(503)}, "the upload failed .Could not submit to competition"),
        ({"CreateSubmission": Reply(400, "Submission not allowed: wrong file name")}, "wrong file name"),
        (
            {"CreateSubmission": Reply(403, "You cannot submit until you accept the competition rules")},
            f"Open https://www.kaggle.com/c/{SLUG}/rules in a browser, accept the rules",
        ),
        ({"StartSubmissionUpload": Reply(403)}, "rules are not accepted"),
        (
            {"CreateSubmission": Reply(400, "This competition only accepts Submissions from Notebooks")},
            "only from notebooks: make notebook.*ARGS=--submit",
        ),
        ({"CreateSubmission": Reply(500)}, "Kaggle itself fails"),
        ({"CreateSubmission": {"message": "We will think about it"}}, "the upload failed .*We will think about it"),
    ],
)
def test_a_submission_that_fails(kaggle, module, fault, message):
    written()
    kaggle.on = fault
    with pytest.raises(UserError, match=message) as raised:
        submit(module)
    assert "\n" not in str(raised.value)
    assert ledger() == [] and kaggle.submissions == []


@pytest.mark.parametrize("number", [401, 404])
def test_a_number_in_kaggles_reason_is_not_taken_for_a_status(kaggle, module, number):
    written()
    kaggle.on = {"CreateSubmission": Reply(400, f"Submission must have {number} rows")}
    with pytest.raises(UserError, match=f"submitting 001-best.csv: Submission must have {number} rows. Repeat"):
        submit(module)
    assert ledger() == []


@pytest.mark.parametrize(
    "message",
    [
        "--best",
        'größe 🎉 of https://host/run?sweep=1, "quoted", [kit-000000000000] \\',
        'https://host/run?name="quoted"',
        "=1+1",
        "long " * 200,
    ],
)
def test_a_message_is_sent_and_found_as_it_was_typed(kaggle, module, message):
    written()
    submit(module, message=message)
    sent, (row,) = kaggle.submissions[0]["description"], ledgers.read("toy")
    assert row.message == sent and row.status == "COMPLETE"
    assert len(sent) <= 500 and sent.rpartition(" [kit-")[0] == message[: 500 - len(" [kit-0123456789ab]")]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Reply(401), "does not accept KAGGLE_USERNAME and KAGGLE_KEY of someone .401."),
        (Reply(404, "Not Found"), "does not find it"),
        (DROP, "cannot be reached"),
    ],
)
def test_a_list_that_cannot_be_read_stops_before_anything_is_sent(kaggle, module, fault, message):
    written()
    kaggle.on = {"ListSubmissions": fault}
    with pytest.raises(UserError, match=message):
        submit(module)
    assert kaggle.uploads == []


@pytest.mark.parametrize("where", ["PUT", "CreateSubmission"])
def test_a_silent_server_is_left_in_bounded_time(kaggle, module, monkeypatch, where):
    written()
    kaggle.on = {where: HANG}
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    with pytest.raises(UserError, match="no answer from Kaggle for 1 s.*It did not arrive: Kaggle does not list it"):
        submit(module)
    assert ledger() == []


def test_an_answer_that_gets_lost_after_the_submission_arrived(kaggle, module, real_start, monkeypatch):
    def lost(body):
        kaggle.CreateSubmission(body)
        return HANG

    written()
    kaggle.on = {"CreateSubmission": lost}
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    submit(module)
    assert ledger()[0]["status"] == "COMPLETE"


def test_an_upload_that_is_dropped_is_not_retried_for_six_minutes(kaggle, module, monkeypatch):
    written()
    kaggle.on = {"PUT": DROP}
    monkeypatch.setenv("KIT_PATIENCE", "1.2")
    with pytest.raises(UserError, match="001-best.csv: no answer|the upload failed"):
        submit(module)
    assert ledger() == [] and kaggle.submissions == []


def test_success_that_is_not_listed_is_not_believed(kaggle, module, monkeypatch):
    written()
    monkeypatch.setattr(submits, "LISTED_TRIES", 2)
    kaggle.on = {"CreateSubmission": {"message": "Successfully submitted to Toy", "ref": 5}}
    with pytest.raises(UserError, match="said that 001-best.csv was submitted but does not list it"):
        submit(module)
    assert [(row["status"], row["ref"]) for row in ledger()] == [("PENDING", "")]
    with pytest.raises(UserError, match="was sent before .*PENDING.*FORCE=1"):
        submit(module)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: text.replace(",", ";").encode(), "no column time, file, sha256"),
        (lambda text: text.replace("time,", "Zeit,").encode(), "no column time"),
        (lambda text: text.replace(",0.9,", ',"0,9",', 1).encode(), "could not convert string to float: '0,9'"),
        (lambda text: text.replace("T", " at ").encode(), "Invalid isoformat string"),
        (lambda text: text.replace("recipe", "größe").encode("cp1252"), "can't decode byte"),
    ],
)
def test_a_ledger_that_a_spreadsheet_has_changed_is_not_emptied(kaggle, module, spoil, message):
    written()
    ledgers.claim("toy", Row("2026-01-02T00:00:00Z", "x.csv", validation="0.9", message="recipe best"))
    path = HOME / "ledger.csv"
    spoilt = spoil(path.read_text())
    path.write_bytes(spoilt)
    for command in (lambda: submit(module), lambda: boards.board("toy", module.source)):
        with pytest.raises(UserError, match=f"ledger.csv cannot be read .*{message}.*mend it, or move it away"):
            command()
    assert path.read_bytes() == spoilt and kaggle.uploads == []


def test_a_ledger_with_a_byte_order_mark_is_read(kaggle, module):
    written()
    submit(module)
    before, path = ledger(), HOME / "ledger.csv"
    path.write_text(path.read_text(), encoding="utf-8-sig")
    boards.board("toy", module.source)
    assert ledger() == before


@pytest.fixture
def after_sending(kaggle):
    """Set the answers that the listing gives one after the other once a file was submitted; the last one repeats."""

    def answers(*replies):
        left = list(replies)

        def listed(body):
            if not kaggle.submissions or not left:
                return kaggle.ListSubmissions(body)
            reply = left.pop(0) if len(left) > 1 else left[0]
            return reply() if callable(reply) else reply

        kaggle.on = {"ListSubmissions": listed}

    return answers


def list_again(kaggle):
    return lambda: kaggle.ListSubmissions({})


def test_a_blip_after_sending_is_waited_out(kaggle, module, after_sending):
    written()
    after_sending(Reply(503), Reply(429), DROP, list_again(kaggle))
    submit(module)
    assert len(kaggle.uploads) == 1 and [(row["status"], row["ref"]) for row in ledger()] == [("COMPLETE", "1000")]


def test_a_longer_failure_after_sending_leaves_it_to_the_board(kaggle, module, after_sending):
    written()
    after_sending(Reply(503))
    with pytest.raises(UserError, match="001-best.csv was sent, but its score is not known: .*503") as raised:
        submit(module, wait=0.01)
    assert "go on with make board COMP=toy" in str(raised.value) and "same command" not in str(raised.value)
    assert [(row["status"], row["ref"]) for row in ledger()] == [("PENDING", "")]
    with pytest.raises(UserError, match="was sent before .*PENDING"):
        submit(module)
    assert len(kaggle.submissions) == 1
    kaggle.on = {}
    boards.board("toy", module.source)
    (row,) = ledger()
    assert (row["status"], row["ref"], row["run"], row["validation"]) == ("COMPLETE", "1000", "001-best", "0.9")


@pytest.mark.parametrize("fault", [Reply(401), Reply(400, "odd")])
def test_a_refusal_after_sending_names_the_board(kaggle, module, after_sending, fault):
    written()
    after_sending(fault)
    with pytest.raises(UserError, match="[Gg]o on with make board COMP=toy") as raised:
        submit(module)
    assert "same command" not in str(raised.value) and len(ledger()) == 1


def test_the_list_is_not_readable_when_it_alone_can_tell(kaggle, module, after_sending):
    def lost(body):
        kaggle.CreateSubmission(body)
        return Reply(500)

    written()
    after_sending(Reply(503))
    kaggle.on["CreateSubmission"] = lost
    with pytest.raises(UserError, match="go on with make board COMP=toy"):
        submit(module)
    kaggle.on = {}
    with pytest.raises(UserError, match="was sent before .*PENDING"):
        submit(module)
    boards.board("toy", module.source)
    (row,) = ledger()
    assert row["run"] == "001-best" and row["status"] == "COMPLETE" and len(kaggle.submissions) == 1


CHILD = """
import sys; sys.path.insert(0, sys.argv[1])
from types import SimpleNamespace
from common.errors import UserError
from common.kaggle.submit import submit
from tests.common.kaggle.conftest import SOURCE
try: submit("toy", SimpleNamespace(source=SOURCE), poll=0.05, wait=30)
except UserError as error: sys.exit(str(error))
"""


def started() -> subprocess.Popen:
    """Start make submit in its own process."""
    return subprocess.Popen([sys.executable, "-c", CHILD, Path(__file__).parents[3]], stderr=subprocess.PIPE, text=True)


def test_killed_while_kaggle_answers(kaggle, module):
    child = None

    def killed(body):
        child.kill()
        child.wait()
        return kaggle.CreateSubmission(body)

    written()
    kaggle.on = {"CreateSubmission": killed}
    child = started()
    child.communicate(timeout=60)
    kaggle.on = {}
    with pytest.raises(UserError, match="was sent before .*PENDING -; make board COMP=toy shows whether it arrived"):
        submit(module)
    assert len(kaggle.calls("CreateSubmission")) == 1


def test_two_commands_at_once_send_it_once(kaggle):
    both = threading.Barrier(2)

    def together(body):
        with suppress(threading.BrokenBarrierError):
            both.wait(timeout=20)
        both.abort()  # only each process's first request, before it sends, waits for the other's
        return kaggle.ListSubmissions(body)

    written()
    kaggle.on = {"ListSubmissions": together}
    children = [started(), started()]
    errors = [child.communicate(timeout=60)[1] for child in children]
    assert sorted(child.returncode for child in children) == [0, 1] and "was sent before" in "".join(errors)
    assert len(kaggle.calls("CreateSubmission")) == 1 and [row["status"] for row in ledger()] == ["COMPLETE"]


def test_a_submission_is_not_lost_while_the_board_is_refreshed(kaggle, module):
    def meanwhile(body):
        ledgers.claim("toy", Row(time="2026-01-02T00:00:00Z", file="other.csv", message="another"))
        return kaggle.ListSubmissions(body)

    written()
    submit(module)
    kaggle.on = {"ListSubmissions": meanwhile}
    boards.board("toy", module.source)
    assert {row["file"] for row in ledger()} == {"submissions/toy/001-best.csv", "other.csv"}


def test_ctrl_c_after_sending_names_the_board(kaggle, module, after_sending, capfd):
    def interrupted():
        _thread.interrupt_main()
        return HANG

    written()
    after_sending(interrupted)
    with pytest.raises((SystemExit, KeyboardInterrupt)) as raised:
        submit(module)
    assert raised.type is SystemExit and raised.value.code == 130
    assert "stopped: go on with make board COMP=toy" in capfd.readouterr().err
    assert [(row["status"], row["ref"]) for row in ledger()] == [("PENDING", "")]


def test_rows_without_a_number_get_theirs_by_their_tag():
    def listed(ref, message):
        return Row(f"2026-01-0{ref}", "x.csv", ref=ref, message=message, status=SCORED, public=f"0.{ref}")

    first, second = ledgers.tagged("equal"), ledgers.tagged("equal")
    rows = [
        Row("2026-01-01T00:00:00Z", "a/x.csv", run="first", message=first),
        Row("2026-01-02T00:00:00Z", "a/x.csv", run="second", message=second),
        Row("2026-01-03T00:00:00Z", "a/x.csv", run="third", message="of an earlier version", ref="3"),
        Row("2026-01-03T01:00:00Z", "a/x.csv", run="lost", message="equal"),
    ]
    listing = [listed("4", "equal"), listed("3", "changed there"), listed("1", f"{first} "), listed("2", second)]
    found = boards.refreshed(rows, listing)
    assert [(row.run, row.public) for row in found] == [
        ("first", "0.1"), ("second", "0.2"), ("third", "0.3"), ("lost", ""), ("", "0.4")
    ]  # fmt: skip


@pytest.mark.parametrize("text", ["=1+1", "+a", "-a", "@a", "\ta", "'=1", "''=1", "-0.5", "1e-3", "'a", "", "a=1", "-"])
def test_no_cell_is_a_formula_and_every_one_comes_back(text):
    ledgers.claim("toy", Row("2026-01-01T00:00:00Z", f"{text}.csv", run=text, message=text, public=text))
    (row,) = ledger()
    assert row["run"][:1] not in tuple("=+-@\t") or row["run"] in ("", "-0.5")
    assert ledgers.read("toy") == [Row("2026-01-01T00:00:00Z", f"{text}.csv", run=text, message=text, public=text)]


def test_somebody_elses_submission_is_not_taken_for_ours(kaggle, module):
    """A teammate submits a file of the same name at the same moment."""

    def both(body):
        answer = kaggle.submitted(body["submissionDescription"], "001-best.csv")
        kaggle.submitted("by a team mate", "001-best.csv")
        return answer

    written()
    kaggle.on = {"CreateSubmission": both}
    submit(module)
    assert ledger()[0]["ref"] == "1000"


def test_no_submissions_left_today(kaggle, module):
    written()
    kaggle.allowed_now = 0
    with pytest.raises(UserError, match="no submission to toy-competition is left today.*after midnight UTC"):
        submit(module)
    assert kaggle.uploads == []


def test_unknown_limits_do_not_stop_a_submission(kaggle, module, capfd):
    written()
    kaggle.on = {"GetSubmissionLimits": Reply(500)}
    submit(module)
    assert "submissions left today: unknown" in capfd.readouterr().out and ledger()[0]["status"] == "COMPLETE"


@pytest.mark.parametrize("neighbour", [None, '{"weights": [0.5, 0.5]}', "[1, 2]"])
def test_a_file_of_the_users_own_is_sent_without_a_score(kaggle, module, neighbour):
    Path("mine.csv").write_text(GOOD)
    if neighbour:
        Path("mine.json").write_text(neighbour)
    submit(module, file="mine.csv")
    assert (ledger()[0]["file"], ledger()[0]["run"], ledger()[0]["validation"]) == ("mine.csv", "", "")


def test_columns_of_words_may_hold_words_whatever_the_sample_has_there(kaggle, module):
    """Numbers in such a column of the sample are placeholders: the sidecar, or else the Task, declares text columns."""
    words = "id,label\n1,cat\n2,dog\n"
    written(text=words)
    with pytest.raises(UserError, match="expected a finite number in label"):
        submit(module)
    written("002-best", text=words, text_columns=["label"])
    Path("mine.csv").write_text(words.replace("dog", "cow"))
    module.build = lambda *_: SimpleNamespace(submission=Submission(text=("label",)))
    submit(module)
    submit(module, file="mine.csv")
    assert len(kaggle.submissions) == 2


def test_ids_may_have_several_rows_where_the_task_says_so(kaggle, module):
    text = "id,label\n1,5\n1,6\n2,7\n"
    written(text=text)
    with pytest.raises(UserError, match="id 1 appears twice"):
        submit(module)
    written("002-best", text=text, several_rows=True)
    Path("mine.csv").write_text(text.replace("7", "8"))
    module.build = lambda *_: SimpleNamespace(submission=Submission(several=True))
    submit(module)
    submit(module, file="mine.csv")
    assert len(kaggle.submissions) == 2


# The board.


def test_the_board_joins_the_ledger_and_kaggle(kaggle, module, real_start, capfd):
    written()
    kaggle.submitted("by hand, in a browser", "byhand.csv")
    submit(module)
    kaggle.public = "0.95"
    boards.board("toy", module.source)
    out = capfd.readouterr().out
    table = [line.split() for line in out[out.index("time ") :].splitlines()]
    assert table[0] == ["time", "run", "validation", "public", "private", "rank", "status"]
    assert sorted(line[2:] for line in table[1:3]) == [
        ["001-best", "0.90000", "0.95", "0.8", "2", "of", "3", "COMPLETE"],
        ["byhand.csv", "-", "0.95", "0.8", "2", "of", "3", "COMPLETE"],
    ]
    assert (HOME / "board.png").read_bytes().startswith(b"\x89PNG")
    assert {(row["run"], row["public"]) for row in ledger()} == {("001-best", "0.95"), ("", "0.95")}


def test_submissions_on_later_pages_of_kaggles_list_are_joined_too(kaggle, module, capfd):
    """Daily submissions over a whole competition fill more than the largest page."""
    written()
    submit(module)
    for number in range(PAGE):
        kaggle.submitted("by hand", f"{number}.csv")
    kaggle.public = "0.95"
    boards.board("toy", module.source)
    assert {(row["run"], row["public"]) for row in ledger()} == {("001-best", "0.95"), ("", "0.95")}
    assert len(ledger()) == 1 + PAGE


def test_ranks_follow_the_direction_of_the_metric():
    scores = [0.5, 0.4, 0.4, 0.1]
    assert [boards.rank(score, scores, True) for score in ("0.5", "0.4", "0.05", "")] == [1, 2, 5, None]
    assert [boards.rank(score, scores, False) for score in ("0.5", "0.4", "0.05")] == [4, 2, 1]


def test_a_leaderboard_with_a_cell_too_many_keeps_its_columns(source):
    """pandas would take the first column for an index, and its neighbour's cells for the scores."""
    lines = "TeamId,Score,SubmissionCount\n1,0.5,7,\n2,0.25,8,\n"

    def told(*command):
        with zipfile.ZipFile(Path(command[-1], "leaderboard.zip"), "w") as archive:
            archive.writestr("leaderboard.csv", lines)

    assert boards.leaderboard(SimpleNamespace(source=source, told=told)) == [0.5, 0.25]


def test_a_leaderboard_that_is_not_public(kaggle, module, capfd):
    written()
    submit(module)
    kaggle.on = {"DownloadLeaderboard": Reply(403, "Permission denied")}
    boards.board("toy", module.source)
    out = capfd.readouterr().out
    assert "no ranks are shown: reading the leaderboard of toy-competition: Kaggle refuses it" in out
    assert (HOME / "board.png").is_file()


def test_a_runs_name_is_text_and_no_formula(source, tmp_path):
    names = (r"$\frac{$", "$x^2$", "a_b\\%", "größe 🎉")
    boards.draw([Row("", "", run=run, validation="0.9", public="0.8") for run in names], source, tmp_path / "board.png")
    assert (tmp_path / "board.png").read_bytes().startswith(b"\x89PNG")


def test_the_board_without_network_shows_the_ledger_and_says_so(kaggle, module, monkeypatch, capfd):
    written()
    submit(module)
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(UserError, match="not refreshed: .*cannot be reached"):
        boards.board("toy", module.source)
    assert "001-best" in capfd.readouterr().out and ledger()[0]["public"] == "0.9"


def test_an_empty_board(kaggle, module, capfd):
    boards.board("toy", module.source)
    assert "nothing was submitted to https://www.kaggle.com/c/toy-competition yet" in capfd.readouterr().out
