"""Which Kaggle account is used: found before anything is asked of Kaggle, named without its secret."""

import base64
import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from common.errors import UserError

RECIPE = (
    "create a token at https://www.kaggle.com/settings/api and type `export KAGGLE_API_TOKEN=...`, or save it as "
    "~/.kaggle/access_token. KAGGLE_USERNAME with KAGGLE_KEY, a kaggle.json in ~/.kaggle, or `.venv/bin/kaggle auth "
    "login` work too"
)
# These change what the kaggle program does behind the kit's back: another competition or folder as the default, and
# printing every request with its password.
LEAKING = ("KAGGLE_COMPETITION", "KAGGLE_PATH", "VERBOSE", "VERBOSE_OUTPUT")
SHORTEST_SECRET = 5  # shorter ones cannot be told from ordinary text


@dataclass(frozen=True)
class Account:
    """Credentials that the kaggle program will use: where they are, its environment, and what must never be shown."""

    where: str
    kind: str  # token, key or oauth
    environment: dict[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    home: tempfile.TemporaryDirectory | None = field(default=None, repr=False)  # lives as long as the account

    def hide(self, text: str) -> str:
        """`text` without secrets: keys, tokens, passwords of proxies, signatures in addresses."""
        for secret in sorted(self.secrets, key=len, reverse=True):
            text = text.replace(secret, "***")
        return hide_addresses(text)


def hide_addresses(text: str) -> str:
    """Without `user:password@` and without the query of every address, which holds signatures."""
    text = re.sub(r"(\w+://)[^\s/@]+@", r"\1***@", text)
    return re.sub(r"((?:https?://|/)[^\s?'\"]+)\?[^\s'\")]+", r"\1?***", text)


def find(environment: Mapping[str, str] = os.environ) -> Account:
    """The account, in the kaggle program's order except that the environment always wins over files.

    Raises UserError with the recipe when there is none, or when one is only half there.
    """
    child = {name: value for name, value in environment.items() if name not in LEAKING}
    child |= {"PYTHONUNBUFFERED": "1", "PYTHONIOENCODING": "utf-8"}
    home = Path(environment["HOME"]) if environment.get("HOME") else _home_of_the_user()

    if token := environment.get("KAGGLE_API_TOKEN"):
        where = "the token in KAGGLE_API_TOKEN"
        if _is_file(token):
            where, token = f"the token in {token} (KAGGLE_API_TOKEN)", _first_line(Path(token))
        return _isolated(Account(where, "token", child, _variants(token)))
    name, key = environment.get("KAGGLE_USERNAME"), environment.get("KAGGLE_KEY")
    if name and key:
        return _isolated(Account(f"KAGGLE_USERNAME and KAGGLE_KEY of {name}", "key", child, _variants(key, name)))
    if name or key:
        given, absent = ("KAGGLE_USERNAME", "KAGGLE_KEY") if name else ("KAGGLE_KEY", "KAGGLE_USERNAME")
        raise UserError(f"{given} is set but {absent} is not: export both, or unset {given} to use a file")
    mounted = environment.get("KAGGLE_API_V1_TOKEN", "")
    if environment.get("KAGGLE_KERNEL_RUN_TYPE") and _is_file(mounted):
        return Account(
            "the token of this Kaggle notebook", "token", child, _variants(Path(mounted).read_text().strip())
        )

    for file in (home / ".kaggle" / "access_token", home / ".kaggle" / "access_token.txt"):
        if _is_file(file):
            return Account(f"the token in {file}", "token", child, _variants(_first_line(file)))
    legacy = _config_folder(environment, home) / "kaggle.json"
    if _is_file(legacy):
        name, key = _legacy(legacy)
        return Account(f"the key of {name} in {legacy}", "key", child, _variants(key, name))
    login = home / ".kaggle" / "credentials.json"
    if _is_file(login):
        return Account(f"the login in {login}", "oauth", child, _variants(*_strings(login)))
    raise UserError(f"no Kaggle credentials found (environment, {home / '.kaggle'}, {legacy}): {RECIPE}")


def _isolated(account: Account) -> Account:
    """The account with an empty home folder of its own.

    The kaggle program prefers a token in ~/.kaggle to KAGGLE_USERNAME, and fails where it cannot write to the home.
    """
    home = tempfile.TemporaryDirectory(prefix="kaggle-home-")
    environment = account.environment | {"HOME": home.name, "KAGGLE_CONFIG_DIR": home.name}
    return Account(account.where, account.kind, environment, account.secrets, home)


def _config_folder(environment: Mapping[str, str], home: Path) -> Path:
    if environment.get("KAGGLE_CONFIG_DIR"):
        return Path(environment["KAGGLE_CONFIG_DIR"])
    if (home / ".kaggle").exists():
        return home / ".kaggle"
    return Path(environment.get("XDG_CONFIG_HOME") or home / ".config") / "kaggle"


def _home_of_the_user() -> Path:
    """The home folder in the user database; a container's user may have none."""
    try:
        return Path.home()
    except RuntimeError:
        return Path("/nonexistent")


def _is_file(path: str | Path) -> bool:
    try:
        return Path(path).is_file()
    except OSError:  # a token is no file name: it may be too long for one
        return False


def _first_line(file: Path) -> str:
    text = file.read_text().strip()
    if not text:
        raise UserError(f"{file} is empty, expected a Kaggle token: {RECIPE}")
    return text


def _legacy(file: Path) -> tuple[str, str]:
    """Name and key of a kaggle.json; the kaggle program passes over a broken one without a word."""
    try:
        content = json.loads(file.read_text())
        name, key = content["username"], content["key"]
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise UserError(
            f"{file} cannot be used ({type(error).__name__}), expected JSON with username and key: {RECIPE}"
        ) from None
    if file.stat().st_mode & 0o044:
        print(f"note: {file} can be read by other users of this machine: chmod 600 {file}")
    return name, key


def _strings(file: Path) -> list[str]:
    """Every string of a JSON object, to be hidden; a broken file is the kaggle program's to report."""
    try:
        return [value for value in json.loads(file.read_text()).values() if isinstance(value, str)]
    except (ValueError, OSError, AttributeError):
        return []


def _variants(secret: str, name: str = "", *more: str) -> tuple[str, ...]:
    """The secret as it is and as it travels: basic authentication holds name:secret in base64."""
    found = [secret, *more]
    if name:
        found.append(base64.b64encode(f"{name}:{secret}".encode()).decode())
    return tuple(text for text in found if len(text) >= SHORTEST_SECRET)
