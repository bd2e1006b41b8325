"""What networks and servers do to a publish and a pull: every one ends well or with a clear error, and never with wrong bytes."""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
from fault_proxy import Fault, FaultProxy, answer, running_fault_proxy
from oci_server import OciServer

from assay.artifact import directory_digest
from assay.errors import AssayError, IntegrityError, UnreachableError
from assay.files import canonical_json
from assay.registry import transport
from assay.registry.base import Part
from assay.registry.inspection import verify
from assay.registry.oci import MANIFEST_TYPE, describe
from assay.registry.open import create_registry, open_registry
from assay.registry.publish import publish
from assay.registry.pull import pull
from assay.registry.reference import parse_reference

MakeRun = Callable[..., Path]
DATA = os.urandom(3 << 20)
BLOB = describe(DATA, "application/octet-stream")


@pytest.fixture
def proxy(oci_server: OciServer) -> Iterator[FaultProxy]:
    with running_fault_proxy(oci_server.host) as running:
        yield running


@pytest.fixture
def address(proxy: FaultProxy) -> str:
    return f"oci://{proxy.host}/faults/{os.urandom(6).hex()}"


@pytest.fixture
def stored(proxy: FaultProxy, address: str) -> str:
    """An address whose repository `small` has BLOB; the proxy counts from here on."""
    create_registry(address).repository("small").put(Part(BLOB, DATA))
    proxy.seen.clear()
    proxy.sent_bytes = 0
    return address


def once(fault: Fault, *, method: str, times: int = 1, where: str = "/blobs/") -> Callable[[str], Fault | None]:
    """The fault for the first requests of a kind."""
    left = times

    def plan(request: str) -> Fault | None:
        nonlocal left
        if left and request.startswith(method) and where in request:
            left -= 1
            return fault
        return None

    return plan


@pytest.mark.slow
def test_cuts_at_random_bytes_in_both_directions(
    make_run: MakeRun, proxy: FaultProxy, address: str, tmp_path: Path
) -> None:
    """Publishes and pulls with connections that break anywhere; each ends with the right bytes."""
    cuts = 0
    for seed in range(6):
        chance = random.Random(seed)
        run = make_run(f"run{seed}", files={"model.onnx": b"graph", "a": chance.randbytes(200_000), "b": b"%d" % seed})
        broken: dict[str, int] = {}

        def plan(request: str, chance: random.Random = chance, broken: dict[str, int] = broken) -> Fault | None:
            nonlocal cuts
            key = request.split("?", maxsplit=1)[0][:120]
            if broken.get(key, 0) >= 2 or chance.random() > 0.3:
                return None
            broken[key] = broken.get(key, 0) + 1
            cuts += 1
            at = chance.choice([0, 1, chance.randrange(300), chance.randrange(200_000)])
            reset = chance.random() < 0.5
            # The server may have done what was asked although its answer is cut.
            return (
                Fault(cut_request_at=at, reset=reset)
                if chance.random() < 0.5
                else Fault(cut_response_at=at, reset=reset)
            )

        proxy.plan = plan
        receipt = publish(run / "artifact", run, address, "small", [f"1.{seed}"])
        pulled = pull(address, f"small:1.{seed}", tmp_path / f"out{seed}")
        proxy.plan = lambda _: None
        assert pulled.bundle_digest == receipt.bundle_digest == directory_digest(tmp_path / f"out{seed}")
        assert verify(address, f"small:1.{seed}").evidence == (receipt.evidence_digest,)
    assert cuts >= 30


@pytest.mark.parametrize("reset", [True, False])
def test_a_download_goes_on_after_a_cut(stored: str, proxy: FaultProxy, tmp_path: Path, reset: bool) -> None:
    proxy.plan = once(Fault(cut_response_at=1_000_000, reset=reset), method="GET", times=2)
    assert open_registry(stored).repository("small").fetch(BLOB, tmp_path / "file") == len(DATA)
    assert (tmp_path / "file").read_bytes() == DATA
    ranges = [line for head in proxy.heads for line in head.split("\r\n") if line.lower().startswith("range:")]
    assert len(ranges) == 2
    # What was there by then was not sent again, but for what was lost with a reset.
    assert proxy.sent_bytes < len(DATA) + 2_000_000


def test_a_server_without_ranges_sends_all_of_it_again(stored: str, proxy: FaultProxy, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(DATA[:1_500_000])
    whole = answer(200, DATA)
    proxy.plan = once(Fault(answer=whole), method="GET")
    repository = open_registry(stored).repository("small")
    assert repository.fetch(BLOB, tmp_path / "file") == len(DATA) - 1_500_000
    proxy.plan = once(
        Fault(answer=answer(206, DATA[:100], Content_Range=f"bytes 0-99/{len(DATA)}")), method="GET", times=99
    )
    (tmp_path / "file").write_bytes(DATA[:1_500_000])
    with pytest.raises(AssayError, match="206"):
        repository.fetch(BLOB, tmp_path / "file")


def test_corruption_on_the_way_down_is_an_integrity_error(stored: str, proxy: FaultProxy, tmp_path: Path) -> None:
    repository = open_registry(stored).repository("small")
    proxy.plan = once(Fault(flip_response_at=2_000_000), method="GET", times=99)
    with pytest.raises(IntegrityError, match="promised was"):
        repository.fetch(BLOB, tmp_path / "file")
    with pytest.raises(IntegrityError, match="promised was"):
        repository.copy_blob(BLOB, None)


def test_corruption_on_the_way_up_is_seen_by_the_server_and_mended(address: str, proxy: FaultProxy) -> None:
    repository = create_registry(address).repository("small")
    proxy.plan = once(Fault(flip_request_at=2_000_000), method="PUT")
    assert repository.put(Part(BLOB, DATA))
    repository.copy_blob(BLOB, None)
    assert sum(line.startswith("PUT") for line in proxy.seen) == 2


@pytest.mark.parametrize("lie", [10, len(DATA) - 1, len(DATA) + 1, 10 * len(DATA)])
def test_a_lie_about_the_length_ends_in_an_error(stored: str, proxy: FaultProxy, tmp_path: Path, lie: int) -> None:
    repository = open_registry(stored).repository("small")
    proxy.plan = once(Fault(content_length=lie), method="GET")
    assert repository.fetch(BLOB, tmp_path / "once") == len(DATA)
    proxy.plan = lambda request: Fault(content_length=lie) if request.startswith("GET") else None
    with contextlib.suppress(AssayError):  # a short answer may be completed by many of them
        repository.fetch(BLOB, tmp_path / "always")
        assert (tmp_path / "always").read_bytes() == DATA


def test_a_blob_that_the_server_has_in_another_repository_need_not_be_sent(
    stored: str, address: str, proxy: FaultProxy
) -> None:
    other = create_registry(address).repository("other")
    proxy.plan = once(
        Fault(answer=answer(201)), method="POST", where=f"/other/blobs/uploads/?mount={quote(BLOB.digest)}"
    )
    other.put(Part(BLOB, DATA))
    assert [line.split()[0] for line in proxy.seen] == ["HEAD", "POST"]
    # docker-registry does not look for it.
    other.put(Part(BLOB, DATA))
    assert [line.split()[0] for line in proxy.seen] == ["HEAD", "POST", "HEAD", "POST", "PUT"]
    other.copy_blob(BLOB, None)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_server_that_sends_a_few_bytes_at_a_time_is_given_up(stored: str, proxy: FaultProxy, ranges: bool) -> None:
    def crumb(_: str) -> Fault:
        wanted = re.search(r"(?i)range: bytes=(\d+)-", proxy.heads[-1])
        at = int(wanted[1]) if wanted else 0
        if ranges and wanted:
            said = answer(206, DATA[at : at + 10], Content_Range=f"bytes {at}-{at + 9}/{len(DATA)}")
        else:
            said = answer(200, DATA[: 10 * (len(proxy.heads))])
        return Fault(answer=said)

    proxy.heads.clear()
    proxy.plan = crumb
    with pytest.raises(UnreachableError, match=rf"ended {len(DATA) - 60} bytes short .*tried 6 times"):
        open_registry(stored).repository("small").copy_blob(BLOB, None)
    assert len(proxy.heads) == 6


def test_a_blob_that_is_shorter_on_a_server_is_damage(stored: str, proxy: FaultProxy) -> None:
    proxy.plan = lambda _: Fault(answer=answer(200, DATA[:1000]))
    with pytest.raises(IntegrityError, match=rf"ends {len(DATA) - 1000} bytes short"):
        open_registry(stored).repository("small").copy_blob(BLOB, None)


def test_more_than_promised_is_not_taken(stored: str, proxy: FaultProxy, tmp_path: Path) -> None:
    proxy.plan = once(Fault(answer=answer(200, DATA + bytes(5 << 20))), method="GET", times=99)
    with pytest.raises(IntegrityError, match="longer than"):
        open_registry(stored).repository("small").fetch(BLOB, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size <= len(DATA) + 1


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503, 504])
@pytest.mark.parametrize("after", [0, 1_000_000])
def test_what_may_pass_is_tried_again(address: str, proxy: FaultProxy, tmp_path: Path, status: int, after: int) -> None:
    repository = create_registry(address).repository("small")
    fault = Fault(answer=answer(status, Retry_After="0"), answer_after=after)
    for method in ("HEAD", "POST", "PUT"):
        proxy.plan = once(fault, method=method, times=2)
        blob = describe(DATA + method.encode(), "text/plain")
        assert repository.put(Part(blob, DATA + method.encode()))
        proxy.plan = once(fault, method="GET", times=2)
        assert repository.fetch(blob, tmp_path / method) == blob.size


@pytest.mark.parametrize("status", [400, 403, 405, 413, 422])
def test_what_will_not_pass_is_not_tried_again(stored: str, proxy: FaultProxy, tmp_path: Path, status: int) -> None:
    body = canonical_json({"errors": [{"code": "TOO_BAD", "message": "no\x1b[31m such luck"}]})
    proxy.plan = lambda request: Fault(answer=answer(status, body))
    with pytest.raises(AssayError, match=rf"{status}.*TOO_BAD: no\[31m such luck"):
        open_registry(stored).repository("small").fetch(BLOB, tmp_path / "file")
    assert len(proxy.seen) == 1


def test_retry_after_is_heeded(stored: str, proxy: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(transport.time, "sleep", waits.append)
    proxy.plan = once(Fault(answer=answer(429, Retry_After="7")), method="GET")
    open_registry(stored).repository("small").copy_blob(BLOB, None)
    proxy.plan = once(Fault(answer=answer(429, Retry_After="99999")), method="GET")
    open_registry(stored).repository("small").copy_blob(BLOB, None)
    assert [round(wait) for wait in waits if wait >= 1] == [7, 60]


def test_a_server_that_stalls_counts_as_broken(
    stored: str, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transport, "STALL_SECONDS", 0.2)
    proxy.plan = once(Fault(delay_seconds=1.0), method="GET")
    assert open_registry(stored).repository("small").fetch(BLOB, tmp_path / "file") == len(DATA)


def test_a_server_that_is_away_is_named_and_what_came_is_kept(
    make_run: MakeRun, proxy: FaultProxy, address: str, tmp_path: Path
) -> None:
    run = make_run(files={"model.onnx": b"graph", "a": DATA})
    receipt = publish(run / "artifact", run, address, "small")
    proxy.plan = once(Fault(cut_response_at=1_500_000), method="GET", times=1, where=BLOB.digest)

    def down(request: str, first: Callable[[str], Fault | None] = proxy.plan) -> Fault | None:
        if BLOB.digest in request:
            return first(request) or Fault(answer=answer(503))
        return None

    proxy.plan = down
    with pytest.raises(UnreachableError, match=r"503.*tried 6 times.*may work later") as away:
        pull(address, "small", tmp_path / "out")
    assert away.value.exit_code == 4 and not (tmp_path / "out").exists()
    proxy.plan = lambda _: None
    pulled = pull(address, "small", tmp_path / "out")
    assert pulled.moved_bytes < len(DATA) and directory_digest(tmp_path / "out") == receipt.bundle_digest
    assert [path.name for path in tmp_path.glob("*out*")] == ["out"]
    with pytest.raises(UnreachableError, match="ConnectError"):
        pull("oci://127.0.0.1:1/x", "small", tmp_path / "other")


def test_a_tag_that_moves_between_resolving_and_downloading(
    make_run: MakeRun, proxy: FaultProxy, address: str, tmp_path: Path
) -> None:
    one, two = make_run("one", files={"model.onnx": b"one"}), make_run("two", files={"model.onnx": b"two"})
    first = publish(one / "artifact", one, address, "small")
    moved = False

    def move(request: str) -> None:
        nonlocal moved
        if "/blobs/" in request and not moved:
            moved = True
            proxy.plan = lambda _: None
            direct = address.replace(proxy.host, proxy.upstream)
            publish(two / "artifact", two, direct, "small")

    proxy.plan = move
    assert pull(address, "small", tmp_path / "out").digest == first.digest
    assert moved and directory_digest(tmp_path / "out") == first.bundle_digest


def test_a_tag_that_another_publisher_takes_at_the_same_moment(
    make_run: MakeRun, proxy: FaultProxy, address: str
) -> None:
    one, two = make_run("one", files={"model.onnx": b"one"}), make_run("two", files={"model.onnx": b"two"})
    puts = 0

    def move(request: str) -> None:
        nonlocal puts
        if request.startswith("PUT") and "/manifests/latest" in request:
            puts = 1
        elif puts == 1 and request.startswith("GET"):
            puts = 2
            direct = address.replace(proxy.host, proxy.upstream)
            publish(two / "artifact", two, direct, "small")

    proxy.plan = move
    with pytest.raises(AssayError, match="somebody else published at the same moment"):
        publish(one / "artifact", one, address, "small")


# Servers that somebody else wrote


def test_redirects_are_followed_without_our_token(
    stored: str, oci_server: OciServer, proxy: FaultProxy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"auths": {proxy.host: {"username": "me", "password": "secret"}}}))
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    with running_fault_proxy(oci_server.host) as elsewhere:
        path = f"/v2/{stored.partition(proxy.host + '/')[2]}/small/blobs/{BLOB.digest}"
        refused = Fault(answer=answer(401, WWW_Authenticate='Basic realm="x"'))
        onward = Fault(answer=answer(307, Location=f"http://{elsewhere.host}{path}?X-Signature=sign"))
        plans = iter([refused, onward])
        proxy.plan = lambda _: next(plans)
        assert open_registry(stored).repository("small").fetch(BLOB, tmp_path / "file") == len(DATA)
        assert "Authorization: Basic" in proxy.heads[-1] and "Authorization" not in elsewhere.heads[-1]
        # A loop, and an address that is no web page, lead nowhere.
        proxy.plan = lambda _: Fault(answer=answer(307, Location=path))
        with pytest.raises(AssayError, match="307"):
            open_registry(stored).repository("small").fetch(BLOB, tmp_path / "loop")
        for place in ("file:///etc/passwd", "http://example.test/blob"):
            proxy.plan = lambda _, place=place: Fault(answer=answer(307, Location=place))
            with pytest.raises(AssayError, match="only https is followed"):
                open_registry(stored).repository("small").fetch(BLOB, tmp_path / "loop")


LAYER = {"mediaType": "x", "digest": "sha256:" + "0" * 64, "size": 1}
HOSTILE: dict[str, Callable[[], bytes]] = {
    "100,000 layers": lambda: canonical_json(
        {"schemaVersion": 2, "mediaType": MANIFEST_TYPE, "layers": [LAYER] * 100_000}
    ),
    "100 MB": lambda: b'{"a":"' + bytes(100 << 20) + b'"}',
    "deep": lambda: b"[" * 1_000_000,
    "not JSON": lambda: b"<html>",
    "a list": lambda: b"[]",
    "nothing": lambda: b"",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_manifests_are_refused_and_cost_little(
    stored: str, proxy: FaultProxy, tmp_path: Path, kind: str
) -> None:
    said = answer(200, HOSTILE[kind]())
    proxy.plan = lambda request: Fault(answer=said) if "/manifests/" in request else None
    started = time.monotonic()
    with pytest.raises(IntegrityError):
        pull(stored, "small:1", tmp_path / "out")
    assert time.monotonic() - started < 5 and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("path", "body"),
    [("/tags/list", b'{"tags":[1]}'), ("/tags/list", b'{"tags":"x"}'), ("_catalog", b'{"repositories":{}}')],
)
def test_hostile_lists_are_refused(stored: str, proxy: FaultProxy, path: str, body: bytes) -> None:
    proxy.plan = lambda request: Fault(answer=answer(200, body)) if path in request else None
    opened = open_registry(stored)
    with pytest.raises(IntegrityError):
        opened.names()
        opened.repository("small").models()


def test_lists_are_read_page_by_page_and_end(stored: str, proxy: FaultProxy) -> None:
    more = answer(200, b'{"tags":[]}', Link='<http://evil.test/v2/x/tags/list?last=y>; rel="next"')
    proxy.plan = lambda request: Fault(answer=more) if "/tags/list" in request else None
    with pytest.raises(AssayError, match="more than 100 pages"):
        open_registry(stored).repository("small").models()


# Kills


@pytest.mark.slow
def test_kills_at_random_moments_of_publish_and_pull(
    make_run: MakeRun, proxy: FaultProxy, address: str, tmp_path: Path
) -> None:
    run = make_run(files={"model.onnx": b"graph", "a": DATA, "b": DATA[::-1]})
    digest = directory_digest(run / "artifact")
    publishing = (
        "from assay.registry.publish import publish; publish(Path(a) / 'artifact', Path(a), r, 'small', ['1.0'])"
    )
    pulling = "from assay.registry.pull import pull; pull(r, 'small', Path(a))"

    def start(code: str, argument: Path) -> subprocess.Popen[bytes]:
        program = f"import sys; from pathlib import Path; r, a = sys.argv[1:]; {code}"
        return subprocess.Popen([sys.executable, "-c", program, address, str(argument)])

    def kill_at(requests: int, code: str, argument: Path) -> int:
        proxy.seen.clear()
        process = start(code, argument)
        while process.poll() is None and len(proxy.seen) < requests:
            time.sleep(0.001)
        process.send_signal(signal.SIGKILL)
        return process.wait()

    kills = 0
    for requests in range(1, 60, 12):
        kills += kill_at(requests, publishing, run) == -signal.SIGKILL
        with contextlib.suppress(AssayError):
            assert verify(address, "small:1.0").bundle_digest == digest
    publish(run / "artifact", run, address, "small", ["1.0", "latest"])
    assert verify(address, "small:1.0").bundle_digest == digest
    for requests in range(1, 8, 2):
        out = tmp_path / f"out{requests}"
        kills += kill_at(requests, pulling, out) == -signal.SIGKILL
        assert not out.exists() or directory_digest(out) == digest
        assert pull(address, "small", out).bundle_digest == digest
    assert kills >= 6
    assert open_registry(address).repository("small").resolve(parse_reference("small:1.0"))
