"""What evidence and cache keys say of this machine is true and does not change between two looks."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from importlib import metadata

import pytest

from assay import __version__
from assay.files import canonical_json
from assay.host import cores, cpu_facts, environment, memory_bytes, offline_environment, package_versions


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


def test_children_stay_offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv("ANOTHER", "kept")
    child = offline_environment()
    assert child["HF_HUB_OFFLINE"] == "1" and child["ANOTHER"] == "kept"
    assert "HF_HUB_OFFLINE" not in os.environ
