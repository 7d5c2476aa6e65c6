"""The templates that `make new` copies are one page and train at once, like three trials as a newcomer writes them."""

import csv
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

import competitions
from common import cli, competition, config, new, raw
from common.config import folds_to_train
from common.files import read_json
from tests import test_competitions

ROOT = Path(__file__).parents[1]
TRIALS = ROOT / "tests" / "trials"
KINDS = ("images", "masks", "table")
CODE = ("config.py", "demo.py", "task.py")


def lines_of(folder: Path) -> int:
    assert sorted(file.name for file in folder.glob("*.py")) == list(CODE)
    return sum(len((folder / name).read_text().splitlines()) for name in CODE)


@pytest.fixture
def here(tmp_path, monkeypatch, no_page):
    """A temporary folder for competitions, data and runs, used by this process."""
    folder, loaded = tmp_path / "competitions", set(sys.modules)
    folder.mkdir()
    monkeypatch.setattr(competition, "COMPETITIONS", folder)
    monkeypatch.setattr(new, "COMPETITIONS", folder)
    monkeypatch.setattr(competitions, "__path__", [str(folder), str(TRIALS)])
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    for name in set(sys.modules) - loaded:
        if name.startswith("competitions."):
            del sys.modules[name]


@pytest.fixture
def checkout(tmp_path):
    """A checkout with links to this one's files but without its competitions, for commands in new processes."""
    for name in ("common", "templates", "benchmarks", "Makefile", "requirements.txt"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "competitions").mkdir()
    (tmp_path / "competitions" / "__init__.py").touch()
    return tmp_path


def trained(name: str, *flags: str) -> tuple[dict, list[dict[str, str]]]:
    """Train a run in this process; returns its result.json and the rows of its submission."""
    words = ["train", name, "--recipe", "smoke", "--run", "a", "--workers", "0", *flags]
    assert cli.main(words) == 0
    with open(Path("submissions") / name / "a-demo.csv", newline="") as stream:
        return read_json(Path("runs") / name / "a" / "result.json"), list(csv.DictReader(stream))


@pytest.mark.parametrize("kind", KINDS)
def test_a_template_is_one_page(kind):
    assert lines_of(ROOT / "templates" / kind) <= 150


@pytest.mark.parametrize(
    ("trial", "score"), [("auc_images", 0.9), ("rmse_table", 15.0), ("boosted_table", 15.0)]
)  # the two RMSEs; the standard deviation of the targets is 21
def test_a_trial_is_sixty_lines_and_finds_what_its_data_hold(here, trial, score):
    assert lines_of(TRIALS / trial) <= 60
    os.symlink(TRIALS / trial, here / "competitions" / trial)
    result, rows = trained(trial)
    found = result["score"]
    assert found >= score if result["monitor"] == "roc_auc" else found <= score
    with open(here / "data" / "demo" / trial / "sample_submission.csv", newline="") as stream:
        sample = list(csv.DictReader(stream))
    assert [row["id"] for row in rows] == [row["id"] for row in sample] and rows[0].keys() == sample[0].keys()
    right = np.array([[float(row[name]) for name in list(row)[1:]] for row in sample])
    told = np.array([[float(row[name]) for name in list(row)[1:]] for row in rows])
    assert np.corrcoef(right[:, 0], told[:, 0])[0, 1] > 0.6, "the test rows are predicted in their order"


@pytest.mark.parametrize("name", [*KINDS, "boosted_table"])
def test_a_new_competition_passes_the_test_of_every_competition(checkout, trainers, monkeypatch, name):
    """Killed twice, resumed to equal bits and predicted again, with only the new folder added to the checkout."""
    if name in KINDS:
        made = make(checkout, "new", f"COMP=my_{name}", f"KIND={name}")
        assert made.returncode == 0 and f"make train COMP=my_{name}" in made.stdout, made.stderr
        name = f"my_{name}"
    else:
        (checkout / "competitions" / name).symlink_to(TRIALS / name)
    monkeypatch.setattr(test_competitions, "ROOT", checkout)
    work = checkout / "work"
    work.mkdir()
    monkeypatch.setattr(test_competitions, "run", partial(test_competitions.run_fork, trainers))
    test_competitions.test_sample_to_submission_killed_and_resumed(name, work, trainers)
    test_competitions.test_help_is_generated_and_needs_no_torch(name)


def make(folder: Path, *words: str) -> subprocess.CompletedProcess:
    line = ["make", *words, f"PYTHON={sys.executable}"]
    return subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=120)


@pytest.mark.parametrize("kind", KINDS)
def test_every_recipe_of_a_template_is_allowed(here, kind):
    new.new("lynx", kind)
    recipes = competition.load("lynx").recipes
    assert {"default", "demo", "smoke"} <= set(recipes)
    assert kind == "table" or recipes["default"].cache_gb, "the flag that the messages of ImageStore advise"
    for name, recipe in recipes.items():
        assert config.checked(recipe) == recipe and folds_to_train(recipe), name


def test_the_table_is_boosted_by_one_flag(here):
    new.new("lynx", "table")
    result, rows = trained("lynx", "--model", "boosting", "--fold", "all", "--trees", "100")
    assert result["rows"] == 1500 and len(result["folds"]) == 5 and len(rows) == 300
    assert result["score"] < 80 < np.std([float(row["price"]) for row in rows])
    run, file = here / "runs" / "lynx" / "a", here / "submissions" / "lynx" / "a-demo.csv"
    before = file.read_bytes()
    file.unlink()
    assert cli.main(["predict", "lynx", "--run", "a"]) == 0 and file.read_bytes() == before
    kept = np.mean([np.load(run / f"fold-{fold}" / "test.npy") for fold in range(5)], axis=0)
    assert np.allclose(kept[:, 0], [float(row["price"]) for row in rows])
    assert cli.main(["train", "lynx", "--recipe", "smoke", "--run", "b", "--fold", "all"]) == 0
    assert cli.main(["blend", "lynx", "--run", "a,b"]) == 0, "with the network"


@pytest.mark.parametrize("model", ["network", "boosting"])
def test_a_table_may_have_unknown_targets(here, model):
    new.new("lynx", "table")
    for name, old, changed in (
        ("task.py", "dict.fromkeys(TARGETS, float)", "dict.fromkeys(TARGETS, tables.number(blank=True))"),
        ("demo.py", "    table[:ROWS]", "    table.loc[table.index % 3 > 0, 'price'] = None\n    table[:ROWS]"),
    ):
        file = here / "competitions" / "lynx" / name
        assert old in (text := file.read_text())
        file.write_text(text.replace(old, changed, 1))
    _, rows = trained("lynx", "--model", model)
    found = np.mean([float(row["price"]) for row in rows])
    assert 230 < found < 290, "as the known prices; two thirds of zeros would make it 90"


def test_lightgbm_takes_a_column_of_more_texts_than_a_network(here, capsys):
    new.new("lynx", "table")
    demo = here / "competitions" / "lynx" / "demo.py"
    text = demo.read_text()
    assert '"town": town,' in text
    demo.write_text(
        text.replace('"town": town,', '"town": town, "seller": [f"s{row % 1200}" for row in range(count)],')
    )
    assert len(trained("lynx", "--model", "boosting")[1]) == 300
    assert cli.main(["train", "lynx", "--recipe", "smoke"]) == 1
    assert "column seller has 1,200 different texts" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("kind", "flags"), [("images", ()), ("masks", ("--pseudo-min", "0.5")), ("table", ()), ("table", ("boosting",))]
)
def test_a_template_trains_on_pseudo_labels(here, kind, flags):
    """The pseudo-labels come from a run of the same network; for the table also from LightGBM."""
    new.new("lynx", kind)
    teacher = ("--model", "boosting", "--trees", "20") if "boosting" in flags else ()
    trained("lynx", *teacher)
    words = ["train", "lynx", "--recipe", "smoke", "--run", "b", "--workers", "0", "--pseudo", "a"]
    assert cli.main([*words, *(flag for flag in flags if flag != "boosting")]) == 0
    with open(here / "submissions" / "lynx" / "a-demo.csv", newline="") as stream:
        count = len({row["id"] for row in csv.DictReader(stream)})
    log = (here / "runs" / "lynx" / "b" / "log.txt").read_text()
    assert f"fold 0: {count} of {count} test rows join its training, with the predictions of a and weight 1" in log
    assert (here / "submissions" / "lynx" / "b-demo.csv").is_file()


def test_masks_of_the_template_may_be_files(here, capsys):
    """The change that the comment in the template's task.py describes works."""
    new.new("lynx", "masks")
    task = here / "competitions" / "lynx" / "task.py"
    text = task.read_text()
    assert 'masks = stored("masks", ids, "train.csv", gray=True), and of_mask=binary below' in text
    start = text.index("    masks = rle.RunMasks(")
    text = (
        text[:start]
        + '    masks = stored("masks", ids, "train.csv", gray=True)\n'
        + text[text.index("\n", start) + 1 :]
    )
    text = text.replace("masks=masks", "masks=masks, of_mask=binary")
    text = text.replace("import ImageDataset", "import ImageDataset, binary")
    task.write_text(text)
    from competitions.lynx import demo  # not at the top: `new` has just made it

    def with_files(folder: Path, write=demo.write_demo) -> None:
        from common.vision import rle

        write(folder)
        (folder / "masks").mkdir()
        lines = (folder / "train.csv").read_text().splitlines()
        for name, runs in (line.split(",") for line in lines[1:]):
            mask = rle.decode(rle.parse(runs), demo.HEIGHT, demo.WIDTH)
            cv2.imwrite(str(folder / "masks" / f"{name}.png"), mask * np.uint8(255))
        (folder / "train.csv").write_text("\n".join([lines[0], *(f"{line.split(',')[0]}," for line in lines[1:])]))

    demo.write_demo = with_files
    result, rows = trained("lynx", "--epochs", "2")
    assert len(rows) == 12 and 0 < result["score"] < 1
    (here / "data" / "demo" / "lynx" / "masks" / "image_007.png").write_bytes(b"")
    assert cli.main(["check", "lynx", "--recipe", "smoke"]) == 1, "masks are images that can be damaged"
    for file in (here / "data" / "demo" / "lynx" / "masks").iterdir():
        cv2.imwrite(str(file), np.full((demo.HEIGHT, demo.WIDTH), 3, np.uint8))
    capsys.readouterr()
    assert cli.main(["check", "lynx", "--recipe", "smoke"]) == 1
    assert "the brightest pixel of this mask is 3 in 8 bits" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("comp", "kind", "words"),
    [
        ("", "images", ["COMP= is missing", "make new COMP=name KIND=images"]),
        ("2-cats", "table", ["COMP=2-cats", "make new COMP=comp_2_cats KIND=table"]),
        ("Cats & Dogs", "table", ["make new COMP=cats_dogs KIND=table"]),
        ("../cats", "table", ["make new COMP=cats KIND=table"]),
        ("größe", "table", ["COMP=größe", "letters, digits and _"]),
        ("class", "masks", ["COMP=class", "make new COMP=comp_class KIND=masks"]),
        ("demo", "masks", ["COMP=demo", "make new COMP=comp_demo"]),
        ("there", "masks", ["competitions/there already exists", "another COMP="]),
        ("There", "masks", ["competitions/there already exists"]),  # the same folder on a Mac
        ("cats", "", ["KIND= is missing", "images, masks, table"]),
        ("cats", "image", ["KIND=image", "make new COMP=cats KIND=images"]),
        ("cats", "segmentation", ["KIND=segmentation: expected one of images, masks, table"]),
        ("cats", "../table", ["make new COMP=cats KIND=table"]),
    ],
)
def test_what_new_refuses_leaves_nothing(here, capsys, comp, kind, words):
    (here / "competitions" / "there").mkdir()
    (here / "competitions" / "there" / "task.py").write_text("mine")
    assert cli.main(["new", *([comp] if comp else []), f"--kind={kind}"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and all(word in told for word in words), told
    assert [file.name for file in here.rglob("*")] == ["competitions", "there", "task.py"]
    assert (here / "competitions" / "there" / "task.py").read_text() == "mine"


def test_a_disk_that_takes_nothing_leaves_no_half_folder(here, capsys, monkeypatch):
    def full(self, text, *given, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    assert cli.main(["new", "cats", "--kind", "table"]) == 1
    assert "No space left on device" in capsys.readouterr().err and not list((here / "competitions").iterdir())


def test_new_needs_no_package_and_no_installation(checkout):
    told = subprocess.run(
        [sys.executable, "-S", "-m", "common", "new", "cats", "--kind", "table"],
        cwd=checkout, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": ""},
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    made = make(checkout, "new", "COMP=dogs", "KIND=images")
    assert made.returncode == 0 and not (checkout / ".venv").exists(), made.stderr
    assert sorted(file.name for file in (checkout / "competitions" / "dogs").iterdir()) == list(CODE)
    refused = make(checkout, "new", "COMP=dogs", "KIND=images", "RECIPE=best")
    assert refused.returncode and "make new takes only COMP KIND" in refused.stderr


@pytest.mark.parametrize("kind", KINDS)
def test_no_word_of_the_template_is_left(here, kind):
    new.new("big_cats", kind)
    for name in CODE:
        text = (here / "competitions" / "big_cats" / name).read_text()
        assert not any(word in text for word in (new.NAME, new.SLUG, new.CLASS)), name
    loaded = competition.load("big_cats")
    assert loaded.source.slug == "big-cats" and loaded.config_class.__name__ == "BigCatsConfig"


@pytest.mark.parametrize(
    ("kind", "old", "other", "words"),
    [
        ("table", '("price",)', '("cost",)',
         ["missing: cost", "train.csv", "name the file's columns in task.py", "lynx/demo.py"]),
        ("table", "(network, config, rows, targets)", "(network, config, rows, np.c_[targets, targets])",
         ["the loss does not take the outputs float32 [2, 2]", "targets float32 [2, 1]", "build()"]),
        ("table", "    return task(network", "    task(network",
         ["build() of", "return Task(...)"]),
        ("table", "score = (rmse(),)", "score = (roc_auc(),)", ["SOURCE.higher_is_better is False", "roc_auc is True"]),
        ("table", "test.pop(ID).tolist()", "test.pop(ID).str.upper().tolist()",
         ["sample_submission.csv", "id FLAT_1500 is not in"]),
        ("images", "loss=BCE()", "loss=CrossEntropy()", ["CrossEntropy of a single class", "use BCE"]),
        ("images", "outputs.sigmoid()", "outputs.sigmoid()[:, 0].expand(9, 2)",
         ["predictions of 2 samples", "expected [B, ...]"]),
        ("images", 'stored("test",', 'stored("tests",',
         ["tests is missing (beside it: test, train)", "make data COMP=lynx"]),
        ("masks", "FULL = (96, 128)", "FULL = (48, 64)", ["the mask of image_001", "out of range", "48x64"]),
        ("masks", "yield name, rle.encode", "yield rle.encode", ["the submission would begin with", "a row of id,rle"]),
    ],
)  # fmt: skip
def test_a_mistake_in_the_page_is_one_line_before_the_training(here, capsys, kind, old, other, words):
    new.new("lynx", kind)
    task = here / "competitions" / "lynx" / "task.py"
    text = (
        task.read_text()
        .replace("import BCE\n", "import BCE, CrossEntropy\n")
        .replace("import rmse\n", "import rmse, roc_auc\n")
    )
    assert text.count(old) == 1
    task.write_text(text.replace(old, other))
    capsys.readouterr()
    assert cli.main(["train", "lynx", "--recipe", "smoke", "--workers", "0"]) == 1
    told = capsys.readouterr().err.splitlines()[-1]
    assert told.startswith("error: ") and all(word in told for word in words), told
    assert not (here / "runs").exists()


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("task.py", "import xgb_of_nobody", ["imports xgb_of_nobody", "to requirements.txt"]),
        (
            "task.py",
            "from competitions.lynx.mytools import x",
            ["imports competitions.lynx.mytools", "write that file"],
        ),
        ("config.py", "import common.lossses", ["imports common.lossses", "correct the import"]),
        ("demo.py", "import xgb_of_nobody.trees", ["imports xgb_of_nobody", "to requirements.txt"]),
    ],
)
def test_a_module_that_is_missing_is_one_line(here, capsys, file, line, words):
    new.new("lynx", "table")
    code = here / "competitions" / "lynx" / file
    code.write_text(f"{line}\n{code.read_text()}")
    assert cli.main(["train", "lynx", "--recipe", "smoke"]) == 1
    told = capsys.readouterr().err
    assert told.startswith("error: ") and told.count("\n") == 1 and all(word in told for word in words), told


def test_a_competition_may_get_another_name(here, capsys):
    """Its imports are asked for, and its finished runs go on under the new name, with the data of that name."""
    new.new("lynx", "table")
    trained("lynx")
    for folder in ("competitions", "data/demo", "runs"):
        (here / folder / "lynx").rename(here / folder / "wolf")
    for name in [name for name in sys.modules if name.startswith("competitions.lynx")]:
        del sys.modules[name]  # as in the next process
    assert cli.main(["predict", "wolf"]) == 1
    told = capsys.readouterr().err
    assert "imports competitions.lynx" in told and "grep -n lynx competitions/wolf/*.py" in told, told
    for file in (here / "competitions" / "wolf").glob("*.py"):
        file.write_text(file.read_text().replace("lynx", "wolf"))
    # Python would use the old bytecode of a file that is as long and, within a second, as old as before.
    shutil.rmtree(here / "competitions" / "wolf" / "__pycache__", ignore_errors=True)  # some write none
    assert cli.main(["predict", "wolf"]) == 0, capsys.readouterr().err
    assert [folder.name for folder in (here / "data" / "demo").iterdir()] == ["wolf"]


@pytest.mark.parametrize(("kind", "names"), [("images", ("ring",)), ("table", ("price",))])
def test_the_report_has_the_names_of_the_columns(here, kind, names):
    new.new("lynx", kind)
    found = competition.load("lynx")
    task = found.build(found.recipes["smoke"], raw.find("lynx", None, found.write_demo, print), print)
    assert task.names == names
