"""Who we are to a registry: what `docker login` and CI systems leave in Docker's config.json.

Source: docker/cli, cli/config and the docker-credential-helpers protocol.  Order: a helper for this host (credHelpers),
the helper for all (credsStore), the file itself (auths).  Secrets stay in this process: no message shows them.
"""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from assay.errors import AssayError

_HELPER = re.compile(r"[A-Za-z0-9._-]+")
_HELPER_SECONDS = 30.0
# What a helper answers as the user's name when its secret is an OAuth2 refresh token.
_IS_TOKEN = "<token>"
# The key of Docker Hub, which is older than the rule.
_HUB_KEY = "https://index.docker.io/v1/"


@dataclass(frozen=True)
class Credentials:
    """A user with a password, or an OAuth2 refresh token."""

    user: str = ""
    password: str = field(default="", repr=False)
    refresh_token: str = field(default="", repr=False)

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


def config_path() -> Path:
    """Where Docker's configuration is."""
    return Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"


def find_credentials(host: str) -> Credentials | None:
    """Credentials for HOST or HOST:PORT; None when there are none.  AssayError when a file or a helper is broken."""
    config = _read_config(config_path())
    keys = (_HUB_KEY, host) if host == "docker.io" else (host,)
    for key in keys:
        helper = _text(config.get("credHelpers"), key) or config.get("credsStore")
        if isinstance(helper, str) and helper and (found := _ask_helper(helper, key)):
            return found
    entries = config.get("auths")
    for key, entry in cast("dict[str, Any]", entries if isinstance(entries, dict) else {}).items():
        if (key in keys or _host(key) == host) and (found := _read_entry(entry, key)):
            return found
    return None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        # The text of a JSON error may quote the file.
        raise AssayError(f"{path}: cannot be read as JSON ({type(error).__name__}). Log in again.") from None
    return cast("dict[str, Any]", value) if isinstance(value, dict) else {}


def _ask_helper(helper: str, key: str) -> Credentials | None:
    program = f"docker-credential-{helper}"
    if not _HELPER.fullmatch(helper):
        raise AssayError(f"{config_path()}: {helper!r} cannot be the name of a credential helper.")
    try:
        done = subprocess.run(
            [program, "get"], input=key.encode(), capture_output=True, timeout=_HELPER_SECONDS, check=False
        )
    except FileNotFoundError:
        raise AssayError(f"{config_path()}: names the credential helper {program}, which is not installed.") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise AssayError(f"{program}: failed ({type(error).__name__}).") from None
    if done.returncode:
        if b"credentials not found" in done.stdout.lower() + done.stderr.lower():
            return None
        raise AssayError(f"{program}: ended with code {done.returncode} when it was asked for {key}.")
    try:
        answer = json.loads(done.stdout)
        user, secret = answer["Username"], answer["Secret"]
    except (ValueError, KeyError, TypeError):
        raise AssayError(f"{program}: answered no credentials that can be read.") from None
    return Credentials(refresh_token=str(secret)) if user == _IS_TOKEN else Credentials(str(user), str(secret))


def _read_entry(entry: Any, key: str) -> Credentials | None:
    if token := _text(entry, "identitytoken"):
        return Credentials(refresh_token=token)
    if user := _text(entry, "username"):
        return Credentials(user, _text(entry, "password"))
    if not (encoded := _text(entry, "auth")):
        return None
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except (binascii.Error, UnicodeDecodeError):
        colon = user = password = ""
    if not colon:
        raise AssayError(f"{config_path()}: the entry for {key} is not base64 of USER:PASSWORD. Log in again.")
    return Credentials(user, password.rstrip("\0"))


def _host(key: str) -> str:
    """The host of an entry's key, which may be an address."""
    return re.sub(r"^https?://", "", key).partition("/")[0]


def _text(value: Any, key: str) -> str:
    text = cast("dict[str, Any]", value).get(key) if isinstance(value, dict) else None
    return text if isinstance(text, str) else ""
