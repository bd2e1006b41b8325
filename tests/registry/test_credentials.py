"""Logging in: Docker's configuration, Basic and token authentication against a server that checks both."""

from __future__ import annotations

import base64
import contextlib
import http.server
import json
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest
from fault_proxy import Fault, answer, running_fault_proxy
from oci_server import MISSING, PROGRAM, OciServer, running_oci_server

from assay.errors import AccessDeniedError, AssayError, UsageError
from assay.files import canonical_json
from assay.registry.base import part
from assay.registry.credentials import Credentials, find_credentials
from assay.registry.inspection import list_artifacts
from assay.registry.open import check_registry, create_registry, open_registry
from assay.registry.publish import publish
from assay.registry.pull import pull

SECRET = "secret-word"
# "me" with SECRET, as htpasswd writes it (bcrypt, 4 rounds).
HTPASSWD = "me:$2b$04$BTfupAF/z3qjit6zejshtuc.IOnU9W/MFr68jLUcCSbuwFyT3FOsK\n"


@pytest.fixture
def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Write Docker's config.json."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path / "docker"))
    (tmp_path / "docker").mkdir()

    def write(**config: Any) -> None:
        (tmp_path / "docker/config.json").write_text(json.dumps(config))

    return write


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Install docker-credential-test with a shell script as its body."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=":")

    def install(body: str) -> None:
        path = tmp_path / "bin/docker-credential-test"
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{body}\n")
        path.chmod(0o755)

    return install


def test_nothing_is_configured(configure: Callable[..., None]) -> None:
    assert find_credentials("host:5000") is None
    configure(auths={"other": {"auth": "bWU6eA=="}})
    assert find_credentials("host:5000") is None


@pytest.mark.parametrize("key", ["host:5000", "https://host:5000", "http://host:5000/v2/"])
def test_entries_of_the_file(configure: Callable[..., None], key: str) -> None:
    configure(auths={key: {"auth": base64.b64encode(b"me:a:b").decode()}})
    assert find_credentials("host:5000") == Credentials("me", "a:b")
    configure(auths={key: {"username": "me", "password": "x"}})
    assert find_credentials("host:5000") == Credentials("me", "x")
    configure(auths={key: {"identitytoken": "t"}})
    assert find_credentials("host:5000") == Credentials(refresh_token="t")


def test_docker_hub_has_a_key_of_its_own(configure: Callable[..., None]) -> None:
    configure(auths={"https://index.docker.io/v1/": {"username": "me", "password": "x"}})
    assert find_credentials("docker.io") == Credentials("me", "x")


def test_helpers(configure: Callable[..., None], helper: Callable[[str], None], tmp_path: Path) -> None:
    helper(f"""[ "$1" = get ] && cat > {tmp_path}/asked && echo '{{"Username":"me","Secret":"x"}}'""")
    for config in ({"credHelpers": {"host": "test"}}, {"credsStore": "test"}):
        configure(**config, auths={"host": {"username": "other", "password": "y"}})
        assert find_credentials("host") == Credentials("me", "x")
        assert (tmp_path / "asked").read_text() == "host"
    helper("""echo '{"Username":"<token>","Secret":"refresh"}'""")
    assert find_credentials("host") == Credentials(refresh_token="refresh")
    helper("echo credentials not found in native keychain; exit 1")
    assert find_credentials("host") == Credentials("other", "y")


@pytest.mark.parametrize("body", [f"echo {SECRET}; exit 1", f"echo {SECRET}", f"echo '[\"{SECRET}\"]'"])
def test_broken_helpers_are_named_without_what_they_say(
    configure: Callable[..., None], helper: Callable[[str], None], body: str
) -> None:
    configure(credsStore="test")
    helper(body)
    with pytest.raises(AssayError, match="docker-credential-test") as broken:
        find_credentials("host")
    assert SECRET not in str(broken.value) and broken.value.__cause__ is None


def test_broken_configurations_are_named(configure: Callable[..., None], tmp_path: Path) -> None:
    for config in ({"credsStore": "absent"}, {"credsStore": "../evil"}, {"auths": {"host": {"auth": "!"}}}):
        configure(**config)
        with pytest.raises(AssayError, match=r"config\.json"):
            find_credentials("host")
    (tmp_path / "docker/config.json").write_text(f'{{"auth": "{SECRET}"')
    with pytest.raises(AssayError, match="cannot be read as JSON") as broken:
        find_credentials("host")
    assert SECRET not in str(broken.value)


def test_secrets_are_not_shown() -> None:
    assert SECRET not in repr(Credentials("me", SECRET, SECRET))
    with pytest.raises(UsageError, match="Credentials do not belong in an address") as refused:
        open_registry(f"oci://me:{SECRET}@host/path")
    assert SECRET not in str(refused.value)


# Against a server


@pytest.fixture
def guarded(tmp_path: Path, quick_path: Path) -> Iterator[OciServer]:
    """A server that wants a user and a password."""
    if PROGRAM is None:
        pytest.skip(MISSING)
    (tmp_path / "htpasswd").write_text(HTPASSWD)
    auth = f"auth: {{htpasswd: {{realm: test, path: {tmp_path / 'htpasswd'}}}}}"
    with running_oci_server(quick_path / "oci", auth) as server:
        yield server


def test_a_user_and_a_password(run: Path, guarded: OciServer, configure: Callable[..., None], tmp_path: Path) -> None:
    address = f"oci://{guarded.host}/team"
    with pytest.raises(AccessDeniedError, match=r"access denied \(401\).*there are no credentials.*docker login"):
        check_registry(address)
    configure(auths={guarded.host: {"username": "me", "password": "wrong-word"}})
    with pytest.raises(AccessDeniedError, match="were not accepted") as denied:
        publish(run / "artifact", run, address, "small")
    assert "wrong-word" not in str(denied.value) and denied.value.exit_code == 4
    configure(auths={guarded.host: {"username": "me", "password": SECRET}})
    check_registry(address)
    receipt = publish(run / "artifact", run, address, "small")
    assert pull(address, "small", tmp_path / "out").digest == receipt.digest
    assert [row.name for row in list_artifacts(address)] == ["small"]


@dataclass
class TokenServer:
    """Gives out tokens that docker-registry believes.  lifetime_seconds: of the next ones.  asked: scopes."""

    realm: str
    directory: Path
    lifetime_seconds: int = 300
    asked: list[str] = field(default_factory=list)

    def token(self, scope: str) -> str:
        """A JSON Web Token for a scope, signed with our key (RFC 7515, RS256; the certificate travels along)."""
        certificate = "".join((self.directory / "certificate").read_text().splitlines()[1:-1])
        kind, name, actions = scope.split(":") if scope else ("", "", "")
        access = [{"type": kind, "name": name, "actions": actions.split(",")}] if scope else []
        now = int(time.time())
        claims = {"iss": "test", "sub": "me", "aud": "registry", "access": access, "iat": now, "nbf": now - 5}
        claims |= {"exp": now + self.lifetime_seconds, "jti": str(len(self.asked))}
        head = {"typ": "JWT", "alg": "RS256", "x5c": [certificate]}
        signed = b".".join(base64.urlsafe_b64encode(canonical_json(part)).rstrip(b"=") for part in (head, claims))
        command = ["openssl", "dgst", "-sha256", "-sign", str(self.directory / "key")]
        signature = subprocess.run(command, input=signed, check=True, capture_output=True).stdout
        return (signed + b"." + base64.urlsafe_b64encode(signature).rstrip(b"=")).decode()


@pytest.fixture
def tokens(tmp_path: Path) -> Iterator[TokenServer]:
    if shutil.which("openssl") is None:
        pytest.skip("openssl is not installed")
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=test -keyout key -out certificate"
    subprocess.run(command.split(), cwd=tmp_path, check=True, capture_output=True)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            scope = parse_qs(urlsplit(self.path).query).get("scope", [""])[0]
            wanted = "Basic " + base64.b64encode(f"me:{SECRET}".encode()).decode()
            server.asked.append(scope)
            known = self.headers["Authorization"] == wanted
            body = canonical_json({"token": server.token(scope)}) if known else b"{}"
            self.send_response(200 if known else 401)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: Any) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listener:
        server = TokenServer(f"http://127.0.0.1:{listener.server_address[1]}/token", tmp_path)
        thread = threading.Thread(target=listener.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            listener.shutdown()
            thread.join()


@pytest.fixture
def token_registry(tmp_path: Path, quick_path: Path, tokens: TokenServer) -> Iterator[OciServer]:
    if PROGRAM is None:
        pytest.skip(MISSING)
    auth = (
        f"auth: {{token: {{realm: '{tokens.realm}', service: registry, issuer: test, "
        f"rootcertbundle: {tmp_path / 'certificate'}}}}}"
    )
    with running_oci_server(quick_path / "oci", auth) as server:
        yield server


def test_tokens(
    run: Path, token_registry: OciServer, tokens: TokenServer, configure: Callable[..., None], tmp_path: Path
) -> None:
    address = f"oci://{token_registry.host}/team"
    configure(auths={token_registry.host: {"username": "me", "password": "wrong"}})
    with pytest.raises(AccessDeniedError, match="were not accepted"):
        publish(run / "artifact", run, address, "small")
    tokens.asked.clear()
    configure(auths={token_registry.host: {"username": "me", "password": SECRET}})
    check_registry(address)
    receipt = publish(run / "artifact", run, address, "small")
    assert pull(address, "small", tmp_path / "out").digest == receipt.digest
    # One token each: for the check, to publish, to pull.
    assert [scope.rpartition(":")[2] for scope in tokens.asked] == ["", "pull,push", "pull"]


def test_a_token_that_expires_in_the_middle(
    run: Path, token_registry: OciServer, tokens: TokenServer, configure: Callable[..., None], tmp_path: Path
) -> None:
    configure(auths={token_registry.host: {"username": "me", "password": SECRET}})
    # The server allows clocks a minute of difference.
    tokens.lifetime_seconds = -58
    repository = create_registry(f"oci://{token_registry.host}/team").repository("small")
    deadline = time.monotonic() + 30
    number = 0
    while len(tokens.asked) < 3 and time.monotonic() < deadline:
        number += 1
        assert repository.put(part("x", "text/plain", b"%d" % number))
        time.sleep(0.2)
    assert len(tokens.asked) >= 3


def test_what_a_server_says_shows_no_secret(oci_server: OciServer, configure: Callable[..., None]) -> None:
    with running_fault_proxy(oci_server.host) as proxy:
        configure(auths={proxy.host: {"username": "me", "password": SECRET}})

        def echo(_: str) -> Fault:
            sent = proxy.heads[-1].partition("Authorization: Basic ")[2].partition("\r")[0]
            said = canonical_json({"errors": [{"code": "X", "message": f"{sent} {SECRET}"}]})
            challenge = {"WWW_Authenticate": 'Basic realm="x"'}
            return Fault(answer=answer(400, said) if sent else answer(401, **challenge))

        proxy.plan = echo
        with pytest.raises(AssayError, match=r"400.*\*\*\*") as failed:
            check_registry(f"oci://{proxy.host}/x")
        encoded = Credentials("me", SECRET).basic[6:]
        assert SECRET not in str(failed.value) and encoded not in str(failed.value)


def test_only_loopback_is_spoken_to_in_the_clear() -> None:
    def origin(address: str) -> str:
        return open_registry(address)._transport.origin  # type: ignore[attr-defined]

    assert origin("oci://127.0.0.1:5000/x") == "http://127.0.0.1:5000"
    assert origin("oci://localhost/x") == "http://localhost"
    assert origin("oci://[::1]:5000") == "http://[::1]:5000"
    assert origin("oci://localhost.evil.test/x") == "https://localhost.evil.test"
    assert origin("oci://127.0.0.1.evil.test/x") == "https://127.0.0.1.evil.test"
    assert origin("oci+http://registry.test/x") == "http://registry.test"
    assert origin("oci://docker.io/me") == "https://registry-1.docker.io"
    for address in ("oci://", "oci:///x", "oci://ho st/x", "oci://host/UPPER", "oci://host/a//b", "oci://host:x/y"):
        with pytest.raises(UsageError), contextlib.suppress(OSError):
            open_registry(address)
