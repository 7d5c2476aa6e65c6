"""Which account is used and how it is reported without its secret; the kaggle program makes the same choice."""

import base64
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from common.kaggle import credentials
from common.kaggle.client import Site
from common.kaggle.client import kaggle as run_kaggle
from common.kaggle.kernel.push import username
from tests.common.kaggle.server import KEY, SLUG, TOKEN, USER, Reply

BASIC = "Basic " + base64.b64encode(f"{USER}:{KEY}".encode()).decode()


def place(home: Path, name: str, content: str, mode: int = 0o600) -> Path:
    file = home / name
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(mode)
    return file


def login() -> dict:
    """A login with its entries in the order in which `kaggle auth login` saves them."""
    return {"refresh_token": "oauth-refresh-secret", "access_token": "oauth-access-secret",
            "access_token_expiration": "2099-01-01T00:00:00+00:00", "username": USER, "scopes": []}  # fmt: skip


def test_nothing_found_gives_a_recipe(tmp_path):
    with pytest.raises(UserError, match="no Kaggle credentials found.*settings/api.*export KAGGLE_API_TOKEN") as raised:
        credentials.find({"HOME": str(tmp_path)})
    assert "\n" not in str(raised.value)


def test_the_order_is_environment_then_files(tmp_path):
    files = [
        ("kaggle/credentials.json", json.dumps(login()), "login"),
        ("kaggle/kaggle.json", json.dumps({"username": "filed", "key": "filed-key-123"}), "key of filed"),
        ("kaggle/access_token", "filed-token-123\n", "access_token"),
    ]
    environment = {"HOME": str(tmp_path)}
    for name, content, where in files:  # each file takes precedence over those placed before
        place(tmp_path, f".{name}", content)
        account = credentials.find(environment)
        assert where in account.where
    account = credentials.find(environment | {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "my-key-123"})
    assert account.where == "KAGGLE_USERNAME and KAGGLE_KEY of me"
    account = credentials.find(
        environment | {"KAGGLE_USERNAME": "me", "KAGGLE_KEY": "k12345", "KAGGLE_API_TOKEN": TOKEN}
    )
    assert account.where == "the token in KAGGLE_API_TOKEN" and account.hide(f"x {TOKEN} y") == "x *** y"


def test_a_token_may_be_a_path_to_a_file(tmp_path):
    file = place(tmp_path, "token", TOKEN + "\n")
    account = credentials.find({"HOME": str(tmp_path), "KAGGLE_API_TOKEN": str(file)})
    assert str(file) in account.where and TOKEN not in account.where and account.hide(TOKEN) == "***"
    with pytest.raises(UserError, match="is empty or not text in UTF-8 .IndexError., expected a Kaggle token"):
        credentials.find({"HOME": str(tmp_path), "KAGGLE_API_TOKEN": str(place(tmp_path, "empty", " \n"))})


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"username": "x"}', '{"username": "x", "key": 1}', '{"username": "x", "key": null}']
)
def test_a_broken_key_file_is_told(tmp_path, content):
    place(tmp_path, ".config/kaggle/kaggle.json", content)
    with pytest.raises(UserError, match="kaggle.json cannot be used.*expected JSON with username and key"):
        credentials.find({"HOME": str(tmp_path)})


def test_folders_of_the_key_file(tmp_path):
    content = json.dumps({"username": "x", "key": "key-123"})
    for name, more in (
        ("xdg/kaggle", {"XDG_CONFIG_HOME": str(tmp_path / "xdg")}),
        ("given", {"KAGGLE_CONFIG_DIR": str(tmp_path / "given")}),
    ):
        file = place(tmp_path, f"{name}/kaggle.json", content)
        assert str(file) in credentials.find({"HOME": str(tmp_path), **more}).where


def test_half_of_an_account_is_refused(tmp_path):
    with pytest.raises(UserError, match="KAGGLE_USERNAME is set but KAGGLE_KEY is not"):
        credentials.find({"HOME": str(tmp_path), "KAGGLE_USERNAME": "x"})
    with pytest.raises(UserError, match="KAGGLE_KEY is set but KAGGLE_USERNAME is not"):
        credentials.find({"HOME": str(tmp_path), "KAGGLE_KEY": KEY})


def test_a_readable_key_file_is_noted(tmp_path, capsys):
    place(tmp_path, ".kaggle/kaggle.json", json.dumps({"username": "x", "key": "key-123"}), 0o644)
    credentials.find({"HOME": str(tmp_path)})
    assert "can be read by other users" in capsys.readouterr().out


def test_secrets_are_hidden_in_every_form(tmp_path):
    account = credentials.find({"HOME": str(tmp_path), "KAGGLE_USERNAME": USER, "KAGGLE_KEY": KEY})
    text = f"{KEY} {BASIC} http://u:pass-word@proxy:8080/x https://host/a.zip?sig=abcdef&x=1 /storage/a.zip?sig=abcdef"
    hidden = account.hide(text)
    assert hidden == "*** Basic *** http://***@proxy:8080/x https://host/a.zip?*** /storage/a.zip?***"
    assert KEY not in repr(account) and KEY not in str(vars(account)["where"])


def test_what_the_kaggle_program_would_do_behind_the_kits_back_is_dropped(tmp_path):
    environment = {"HOME": str(tmp_path), "KAGGLE_API_TOKEN": TOKEN, "HTTPS_PROXY": "http://proxy:1"}
    leaking = {"KAGGLE_PATH": "/elsewhere", "KAGGLE_COMPETITION": "titanic", "VERBOSE": "1"}
    child = credentials.find(environment | leaking).environment
    assert not leaking.keys() & child.keys() and child["HTTPS_PROXY"] == "http://proxy:1"


@pytest.mark.parametrize("secret", [f"{TOKEN}\r{KEY}", f"{TOKEN}\0", f"tökén-{TOKEN}"])
def test_what_no_header_can_hold_is_refused_without_showing_it(tmp_path, secret):
    legacy = place(tmp_path, ".kaggle/kaggle.json", json.dumps({"username": "x", "key": secret}))
    for where, environment in (
        ("the token in KAGGLE_API_TOKEN", {"KAGGLE_API_TOKEN": secret}),
        ("KAGGLE_KEY", {"KAGGLE_USERNAME": USER, "KAGGLE_KEY": secret}),
        (str(legacy), {}),
    ):
        with pytest.raises(UserError, match="it holds a control character or an accented letter") as raised:
            credentials.find({"HOME": str(tmp_path), **environment})
        assert str(raised.value).startswith(where) and TOKEN not in str(raised.value)


def test_a_token_file_in_another_encoding_is_told(tmp_path):
    place(tmp_path, ".kaggle/access_token", "").write_bytes(f"{TOKEN}\r\n".encode("utf-16"))
    with pytest.raises(UserError, match="access_token is empty or not text in UTF-8.*settings/api"):
        credentials.find({"HOME": str(tmp_path)})


def test_only_the_tokens_of_a_login_are_hidden(tmp_path):
    place(tmp_path, ".kaggle/credentials.json", json.dumps(login()))
    account = credentials.find({"HOME": str(tmp_path)})
    assert account.hide(f"{USER}: oauth-access-secret oauth-refresh-secret") == f"{USER}: *** ***"


NOTEBOOK = {"KAGGLE_KERNEL_RUN_TYPE": "Interactive", "KAGGLE_DATA_PROXY_URL": "http://proxy"}


def test_the_token_of_a_kaggle_notebook(tmp_path):
    file = str(place(tmp_path, "mounted", "mounted-token"))
    mounted = NOTEBOOK | {"HOME": str(tmp_path), "KAGGLE_API_V1_TOKEN": file}
    account = credentials.find(mounted)
    assert account.where == "the token of this Kaggle notebook" and account.hide("mounted-token") == "***"
    assert account.environment["KAGGLE_API_V1_TOKEN"] == file
    with pytest.raises(UserError, match="no Kaggle credentials found"):  # the kaggle program does not use it either
        credentials.find({name: value for name, value in mounted.items() if name != "KAGGLE_DATA_PROXY_URL"})


# With the real program.


def test_the_environment_wins_over_a_token_file(kaggle, tmp_path):
    place(tmp_path / "home", ".kaggle/access_token", TOKEN)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0
    assert [headers["Authorization"] for _, _, headers in kaggle.asked] == [BASIC]


def test_the_kaggle_program_is_found_in_a_checkout_that_was_moved(kaggle, tmp_path, monkeypatch):
    """The first lines of the scripts in its .venv/bin still name the old path of the interpreter."""
    moved = tmp_path / "moved"
    (moved / "bin").mkdir(parents=True)
    for path in Path(sys.prefix).iterdir():
        if path.name != "bin":
            (moved / path.name).symlink_to(path)
    (moved / "bin" / "python").symlink_to(Path(sys.executable).resolve())
    place(moved, "bin/kaggle", "#!/gone/bin/python\n", 0o700)
    code = "from common.kaggle.client import kaggle; from common.kaggle.credentials import find\n"
    code += f"sys.exit(kaggle(find(), 'competitions', 'files', '{SLUG}').status)"
    code = f"import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})\n{code}"
    done = subprocess.run([moved / "bin" / "python", "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert kaggle.asked[-1][2]["Authorization"] == BASIC


def test_files_are_used_where_the_kit_says(kaggle, tmp_path, monkeypatch):
    monkeypatch.delenv("KAGGLE_USERNAME")
    monkeypatch.delenv("KAGGLE_KEY")
    place(tmp_path / "home", ".config/kaggle/kaggle.json", json.dumps({"username": USER, "key": KEY}))
    account = credentials.find()
    assert "kaggle.json" in account.where and run_kaggle(account, "competitions", "files", SLUG).status == 0
    assert kaggle.asked[-1][2]["Authorization"] == BASIC
    place(tmp_path / "home", ".kaggle/access_token", TOKEN)
    account = credentials.find()
    assert "access_token" in account.where and run_kaggle(account, "competitions", "files", SLUG).status == 0
    assert kaggle.asked[-1][2]["Authorization"] == f"Bearer {TOKEN}"


def test_the_environment_wins_over_the_token_of_a_kaggle_notebook(kaggle, tmp_path, monkeypatch):
    for name, value in (NOTEBOOK | {"KAGGLE_API_V1_TOKEN": str(place(tmp_path, "mounted", TOKEN))}).items():
        monkeypatch.setenv(name, value)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0
    assert [headers["Authorization"] for _, _, headers in kaggle.asked] == [BASIC]


@pytest.mark.parametrize("end", ["\r", "\n", " \r\n"])
def test_line_ends_around_a_secret_are_left_out(kaggle, monkeypatch, end):
    """An .env file written on Windows brings such line ends, and the kaggle program then prints the whole token."""
    monkeypatch.setenv("KAGGLE_KEY", KEY + end)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0
    assert kaggle.asked[-1][2]["Authorization"] == BASIC
    monkeypatch.setenv("KAGGLE_API_TOKEN", TOKEN + end)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0
    assert kaggle.asked[-1][2]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("content", [f"{TOKEN}\r\n# for the laptop\r\n", f"\ufeff{TOKEN}\n"])
def test_a_token_file_may_hold_more_than_the_token(kaggle, tmp_path, monkeypatch, content):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    place(tmp_path / "home", ".kaggle/access_token", content)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0
    assert kaggle.asked[-1][2]["Authorization"] == f"Bearer {TOKEN}"


@pytest.mark.parametrize("content", [json.dumps(login()), ""])
def test_a_login_names_the_owner_of_a_notebook(kaggle, source, tmp_path, monkeypatch, content):
    for name in ("KAGGLE_USERNAME", "KAGGLE_KEY"):
        monkeypatch.delenv(name)
    place(tmp_path / "home", ".kaggle/credentials.json", content)
    if content:
        assert username(Site("toy", source, credentials.find())) == USER
    else:
        with pytest.raises(UserError, match="does not accept the login in .*credentials.json .401"):
            username(Site("toy", source, credentials.find()))


@pytest.mark.parametrize("home", [None, "/proc/none"])
def test_no_home_folder(kaggle, real_start, tmp_path, monkeypatch, home):
    """Some containers have no home folder or a read-only one: without the kit, kaggle fails with a traceback there."""
    if home is None:
        monkeypatch.delenv("HOME")
    else:
        monkeypatch.setenv("HOME", home)
    assert run_kaggle(credentials.find(), "competitions", "files", SLUG).status == 0


def test_a_bad_token_is_told_with_what_it_hides(kaggle, source, monkeypatch):
    from common.kaggle import data

    monkeypatch.setenv("KAGGLE_API_TOKEN", "bad-token-123")
    kaggle.on = {name: Reply(401) for name in ("ListDataFiles", "DownloadDataFiles")}
    with pytest.raises(UserError, match="token in KAGGLE_API_TOKEN .401.; it also hides KAGGLE_USERNAME") as raised:
        data.fetch("toy", source)
    assert "bad-token-123" not in str(raised.value)
