"""Find the Kaggle account before the first request to Kaggle, and name it without its secret."""

import base64
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from os.path import isfile
from pathlib import Path

from common.errors import UserError

RECIPE = (
    "create a token at https://www.kaggle.com/settings/api and type `export KAGGLE_API_TOKEN=...`, or save it as "
    "~/.kaggle/access_token. KAGGLE_USERNAME with KAGGLE_KEY, a kaggle.json in ~/.kaggle, or `.venv/bin/kaggle auth "
    "login` work too"
)
# These make the kaggle program use another competition or folder, or print every request with its password.
LEAKING = ("KAGGLE_COMPETITION", "KAGGLE_PATH", "VERBOSE", "VERBOSE_OUTPUT")
# In a Kaggle notebook these make the kaggle program prefer the notebook's own token to any account it is given.
NOTEBOOK = ("KAGGLE_KERNEL_RUN_TYPE", "KAGGLE_DATA_PROXY_URL", "KAGGLE_API_V1_TOKEN")


@dataclass(frozen=True)
class Account:
    """Credentials for the kaggle program: where they were found, its environment, and the secrets never to show."""

    where: str
    environment: dict[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    home: tempfile.TemporaryDirectory | None = field(default=None, repr=False)  # lives as long as the account

    def hide(self, text: str) -> str:
        """`text` without secrets: keys, tokens, passwords of proxies, signatures in addresses."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            if len(secret) > 4:  # shorter ones cannot be told from ordinary text
                text = text.replace(secret, "***")
        return hide_addresses(text)


def hide_addresses(text: str) -> str:
    """`text` with *** for `user:password@` and for the query, which may hold a signature, of every address."""
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1***@", text)
    # An escape of JSON belongs to the query as a whole (\u0026 is an &) or, like \", ends it: JSON stays readable.
    return re.sub(r"((?:https?://|/)[^\s?'\"]+)\?(?:[^\s'\")\\]|\\[^\s'\"])+", r"\1?***", text)


def find(environment: Mapping[str, str] = os.environ) -> Account:
    """Find the account in the kaggle program's order, except that environment variables always win over files."""
    left_out = {*LEAKING, *NOTEBOOK, "KAGGLE_API_TOKEN"}
    child = {name: value for name, value in environment.items() if name not in left_out}
    child |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    home = Path(environment.get("HOME") or os.path.expanduser("~"))  # stays "~" for a container user without a home

    if token := environment.get("KAGGLE_API_TOKEN", "").strip():
        if isfile(token):
            return _with_token(_first_line(token), f"the token in {token} (KAGGLE_API_TOKEN)", child)
        return _with_token(token, "the token in KAGGLE_API_TOKEN", child)
    name, key = (environment.get(variable, "").strip() for variable in ("KAGGLE_USERNAME", "KAGGLE_KEY"))
    if name and key:
        return _with_key(name, _sendable(key, "KAGGLE_KEY"), f"KAGGLE_USERNAME and KAGGLE_KEY of {name}", child)
    if name or key:
        given, absent = ("KAGGLE_USERNAME", "KAGGLE_KEY") if name else ("KAGGLE_KEY", "KAGGLE_USERNAME")
        raise UserError(f"{given} is set but {absent} is not: export both, or unset {given} to use a file")
    notebook = {variable: environment.get(variable, "") for variable in NOTEBOOK}
    if all(notebook.values()) and isfile(mounted := notebook["KAGGLE_API_V1_TOKEN"]):
        return Account("the token of this Kaggle notebook", child | notebook, (_first_line(mounted),))

    for file in (home / ".kaggle/access_token", home / ".kaggle/access_token.txt"):
        if isfile(file):
            return _with_token(_first_line(file), f"the token in {file}", child)
    folder = home / ".kaggle"
    if not folder.exists():
        folder = Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"
    legacy = Path(environment.get("KAGGLE_CONFIG_DIR") or folder) / "kaggle.json"
    if isfile(legacy):
        name, key = _legacy(legacy)
        return _with_key(name, key, f"the key of {name} in {legacy}", child)
    login = home / ".kaggle/credentials.json"
    if isfile(login):
        return Account(f"the login in {login}", child, _tokens(login))
    raise UserError(f"no Kaggle credentials found (environment, {home / '.kaggle'}, {legacy}): {RECIPE}")


def _with_token(token: str, where: str, child: dict[str, str]) -> Account:
    """The account of a token. It is checked here, because the kaggle program prints a malformed token in full."""
    return _isolated(where, child | {"KAGGLE_API_TOKEN": _sendable(token, where)}, (token,))


def _with_key(name: str, key: str, where: str, child: dict[str, str]) -> Account:
    """The account of a key, which basic authentication sends as name:key in base64."""
    secrets = key, base64.b64encode(f"{name}:{key}".encode()).decode()
    return _isolated(where, child | {"KAGGLE_USERNAME": name, "KAGGLE_KEY": key}, secrets)


def _sendable(secret: str, where: str) -> str:
    """The secret; raises UserError, without showing it, if it has a character that no HTTP header can hold."""
    if not (secret.isascii() and secret.isprintable()):
        raise UserError(f"{where}: it holds a control character or an accented letter, which no token has: {RECIPE}")
    return secret


def _isolated(where: str, child: dict[str, str], secrets: tuple[str, ...]) -> Account:
    """The account with an empty home folder of its own.

    The kaggle program prefers a token in ~/.kaggle to KAGGLE_USERNAME, and fails if it cannot write to the home.
    """
    home = tempfile.TemporaryDirectory(prefix="kaggle-home-")
    return Account(where, child | {"HOME": home.name, "KAGGLE_CONFIG_DIR": home.name}, secrets, home)


def _first_line(file: str | Path) -> str:
    """The token in the first line of a file, without a byte order mark; the lines below may hold a comment."""
    try:
        return Path(file).read_text(encoding="utf-8-sig").strip().splitlines()[0].strip()
    except (IndexError, OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file} is empty or not text in UTF-8 ({type(error).__name__}), expected a Kaggle token: {RECIPE}"
        ) from None


def _legacy(file: Path) -> tuple[str, str]:
    """Name and key of a kaggle.json; raises UserError for a broken one, which the kaggle program silently ignores."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        name, key = content["username"], content["key"]
        if not (name and isinstance(name, str) and key and isinstance(key, str)):
            raise TypeError
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{file} cannot be used ({type(error).__name__}), expected JSON with username and key: {RECIPE}"
        ) from None
    if file.stat().st_mode & 0o044:
        print(f"note: {file} can be read by other users of this machine: chmod 600 {file}")
    return name, _sendable(key, str(file))


def _tokens(login: Path) -> tuple[str, ...]:
    """The secrets in the file that `kaggle auth login` saved; a broken file is reported by the kaggle program."""
    try:
        content = json.loads(login.read_text(encoding="utf-8"))
        return tuple(str(content[name]) for name in ("access_token", "refresh_token") if content.get(name))
    except (ValueError, OSError, AttributeError):
        return ()
