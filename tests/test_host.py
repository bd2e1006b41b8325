"""What evidence and cache keys say of this machine is true and does not change between two looks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from assay import __version__
from assay.files import canonical_json
from assay.host import (
    code_digest,
    cores,
    cpu_facts,
    environment,
    machine_facts,
    memory_bytes,
    offline_environment,
    package_versions,
)


def test_versions_are_those_installed() -> None:
    versions = package_versions()
    assert versions["assay"] == __version__
    for name, version in versions.items():
        assert version == metadata.version(name)
    assert {"torch", "transformers", "safetensors"} <= versions.keys()


def test_facts_are_stable_and_fit_into_json() -> None:
    assert cpu_facts() == cpu_facts() and environment() == environment()
    assert canonical_json(environment())
    assert environment()["python"] == platform.python_version() and cpu_facts()["machine"] == platform.machine()


def test_cores_are_those_this_process_may_use() -> None:
    if len(allowed := os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    code = f"import os; os.sched_setaffinity(0, {{{min(allowed)}}}); from assay.host import cores; print(cores())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (cores(), done.stdout.strip()) == (len(allowed), "1")


def test_memory_is_plausible() -> None:
    assert 1 << 28 < memory_bytes() < 1 << 50


def test_machine_facts_are_stable_and_fit_into_json() -> None:
    assert machine_facts() == machine_facts() and canonical_json(machine_facts())
    assert machine_facts()["memory_bytes"] == memory_bytes()


def test_the_digest_of_code_follows_every_file_of_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "some_code/inner").mkdir(parents=True)
    for name in ("__init__.py", "inner/__init__.py", "inner/deep.py"):
        (tmp_path / "some_code" / name).write_text("x = 1\n")
    digests = {code_digest("some_code"), code_digest("some_code.inner"), code_digest("some_code.inner.deep")}
    assert len(digests) == 3
    (tmp_path / "some_code/inner/deep.py").write_text("x = 2\n")
    assert code_digest("some_code") in digests, "asked once in a process"
    code_digest.cache_clear()
    digests |= {code_digest("some_code"), code_digest("some_code.inner"), code_digest("some_code.inner.deep")}
    assert len(digests) == 6
    (tmp_path / "some_code/notes.txt").write_text("not code")
    code_digest.cache_clear()
    assert code_digest("some_code") in digests
    with pytest.raises(ModuleNotFoundError):
        code_digest("some_code.nowhere")


def test_children_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("ANOTHER", "kept")
    child = offline_environment()
    assert child["HF_HUB_OFFLINE"] == "1" and child["ANOTHER"] == "kept"
    assert "HF_HUB_OFFLINE" not in os.environ


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_holes_in_the_heap_are_given_back() -> None:
    """Small blocks that stay keep the heap's end from moving; what was freed between them is 100 MB."""
    code = """
from pathlib import Path
from assay.host import release_free_memory

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

blocks = [bytearray(10_000) for _ in range(20_000)]
del blocks[::2]
before = resident()
release_free_memory()
print(before - resident())
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) > 30_000_000


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries decide for themselves")
def test_large_tensors_do_not_keep_each_others_room() -> None:
    """A first block that is freed makes glibc put the others of its size on the heap, where the last one keeps the room of all."""
    code = """
import sys
from pathlib import Path
from assay.host import map_large_tensors

def resident():
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

if sys.argv[1] == "mapped":
    map_large_tensors()
first = bytearray(b"x" * 10_000_000)
del first
blocks = [bytearray(b"x") * 5_000_000 for _ in range(20)]
del blocks[:-1]
print(resident())
"""

    def resident(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", code, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert resident("mapped") < resident("left alone") - 50_000_000
