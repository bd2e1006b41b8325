from __future__ import annotations

import stat
from pathlib import Path

import pytest

from assay.errors import AssayError, UsageError
from assay.registry import keys
from assay.registry.keys import (
    KeyKind,
    load_private_key,
    load_public_key,
    read_new_password,
    read_password,
    write_key_pair,
)

KINDS: tuple[KeyKind, ...] = ("ed25519", "ecdsa")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("password", [None, b"secret"])
def test_a_pair_signs_and_verifies(
    tmp_path: Path, kind: KeyKind, password: bytes | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = write_key_pair(tmp_path / "keys/release", kind, password)
    assert (files.private, files.public) == (tmp_path / "keys/release", tmp_path / "keys/release.pub")
    assert stat.S_IMODE(files.private.stat().st_mode) == 0o600
    assert (b"ENCRYPTED" in files.private.read_bytes()) == files.encrypted == (password is not None)
    monkeypatch.setenv("MINE", "secret")
    key = load_private_key(str(files.private), "MINE")
    public = load_public_key(files.public.read_bytes(), "public")
    assert public.key_id == key.public.key_id == files.key_id
    signature = key.sign(b"data")
    assert public.verifies(signature, b"data") and not public.verifies(signature, b"Data")
    assert not public.verifies(signature[:-1] + bytes([signature[-1] ^ 1]), b"data")
    assert not public.verifies(b"", b"data")
    assert sorted(path.name for path in files.private.parent.iterdir()) == ["release", "release.pub"]


@pytest.mark.parametrize("kind", KINDS)
def test_signatures_are_deterministic(tmp_path: Path, kind: KeyKind) -> None:
    write_key_pair(tmp_path / "key", kind, None)
    one, two = (load_private_key(str(tmp_path / "key")).sign(b"data") for _ in range(2))
    assert one == two


@pytest.mark.parametrize("existing", ["key", "key.pub"])
def test_nothing_is_overwritten(tmp_path: Path, existing: str) -> None:
    (tmp_path / existing).write_text("mine")
    with pytest.raises(UsageError, match="exists already, and keys are not overwritten"):
        write_key_pair(tmp_path / "key", "ed25519", None)
    assert [path.name for path in tmp_path.iterdir()] == [existing] and (tmp_path / existing).read_text() == "mine"


@pytest.mark.parametrize("place", [".", "..", "/", "absent/.."])
def test_a_directory_is_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "absent").mkdir()
    with pytest.raises(UsageError, match=r"a directory\. Name the file for the private key"):
        write_key_pair(Path(place), "ed25519", None)


def test_a_key_that_appears_meanwhile_is_not_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keys.os.path, "lexists", lambda _: False)
    (tmp_path / "key").write_text("mine")
    with pytest.raises(UsageError, match="exists already"):
        write_key_pair(tmp_path / "key", "ed25519", None)
    assert [path.name for path in tmp_path.iterdir()] == ["key"] and (tmp_path / "key").read_text() == "mine"


def test_a_key_from_the_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_key_pair(tmp_path / "key", "ed25519", None)
    monkeypatch.setenv("SIGNING_KEY", files.private.read_text())
    assert load_private_key("env:SIGNING_KEY").public.key_id == files.key_id
    with pytest.raises(UsageError, match="the environment variable OTHER is not set"):
        load_private_key("env:OTHER")


def test_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = write_key_pair(tmp_path / "key", "ed25519", b"right")
    for name in ("ASSAY_KEY_PASSWORD", "NAMED"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UsageError, match="ASSAY_KEY_PASSWORD is not set"):
        load_private_key(str(files.private))
    with pytest.raises(UsageError, match="NAMED is not set"):
        load_private_key(str(files.private), "NAMED")
    monkeypatch.setenv("NAMED", "wrong")
    with pytest.raises(UsageError, match="its password is another"):
        load_private_key(str(files.private), "NAMED")
    monkeypatch.setenv("ASSAY_KEY_PASSWORD", "right")
    assert load_private_key(str(files.private)).public.key_id == files.key_id
    monkeypatch.setenv("NAMED", "")
    with pytest.raises(UsageError, match="NAMED is empty"):
        read_password("NAMED", "?")


def test_whoever_sits_at_a_terminal_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_KEY_PASSWORD", raising=False)
    monkeypatch.setattr(keys.sys.stdin, "isatty", lambda: True)
    assert read_password(None, "?", ask=lambda _: "typed") == b"typed"
    with pytest.raises(UsageError, match="protects nothing"):
        read_password(None, "?", ask=lambda _: "")


def test_a_new_password_is_typed_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ASSAY_KEY_PASSWORD", raising=False)
    monkeypatch.setattr(keys.sys.stdin, "isatty", lambda: False)
    with pytest.raises(UsageError, match="a new key needs a password: name a variable"):
        read_new_password(None)
    monkeypatch.setattr(keys.sys.stdin, "isatty", lambda: True)
    assert read_new_password(None, ask=lambda _: "typed") == b"typed"
    answers = iter(["one", "other"])
    with pytest.raises(UsageError, match="the two passwords differ; no key was made"):
        read_new_password(None, ask=lambda _: next(answers))
    monkeypatch.setenv("ASSAY_KEY_PASSWORD", "set")
    assert read_new_password(None, ask=lambda _: next(answers)) == b"set"


def test_what_is_no_key_is_refused(tmp_path: Path) -> None:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, rsa

    files = write_key_pair(tmp_path / "key", "ed25519", None)
    with pytest.raises(UsageError, match="not a private key in PEM"):
        load_private_key(str(files.public))
    with pytest.raises(UsageError, match=r"a private key\. Give the public one"):
        load_public_key(files.private.read_bytes(), "here")
    with pytest.raises(UsageError, match="here: not a public key in PEM"):
        load_public_key(b"-----BEGIN nothing", "here")
    with pytest.raises(UsageError, match="cannot be read"):
        load_private_key(str(tmp_path / "absent"))
    (tmp_path / "long").write_bytes(bytes(70 << 10))
    with pytest.raises(UsageError, match="longer than"):
        load_private_key(str(tmp_path / "long"))
    for other in (rsa.generate_private_key(65537, 2048), ec.generate_private_key(ec.SECP384R1())):
        pem = other.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
        (tmp_path / "other").write_bytes(pem)
        with pytest.raises(UsageError, match="of another kind; allowed: ed25519, ecdsa"):
            load_private_key(str(tmp_path / "other"))


def test_a_place_that_cannot_be_written(read_only: Path) -> None:
    with pytest.raises(AssayError, match="cannot be written"):
        write_key_pair(read_only / "key", "ed25519", None)
