"""What an artifact needs against what a machine is: made manifests, made machines, and this one."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from assay.errors import AssayError, IntegrityError, NotSupportedError
from assay.host import Gpu, gpus
from assay.requirements import Host, built_with, check_host, this_host

A100, L4, B200 = (
    Gpu(name, capability, "580.65") for name, capability in (("A100", "8.0"), ("L4", "8.9"), ("B200", "10.0"))
)


def host(
    *,
    system: str = "Linux",
    machine: str = "x86_64",
    sets: tuple[str, ...] = ("avx2",),
    gpus: tuple[Gpu, ...] = (),
    **packages: str,
) -> Host:
    return Host(system, machine, lambda: sets, lambda: gpus, lambda name: packages.get(name.replace("-", "_")))


def refusal(requires: dict[str, Any], here: Host) -> str:
    with pytest.raises(NotSupportedError) as refused:
        check_host({"requires": requires}, "m", here)
    return str(refused.value)


def test_nothing_required_is_nothing_asked() -> None:
    asked: list[str] = []
    here = Host("Plan 9", "mips", lambda: asked.append("cpu") or (), lambda: asked.append("gpu") or (), asked.append)
    for manifest in ({}, {"requires": {}}):
        assert check_host(manifest, "m", here) == ()
    assert check_host({"requires": {"systems": ["Plan 9"]}}, "m", here) == () and not asked


@pytest.mark.parametrize(
    ("wanted", "found", "fits"),
    [
        (["8.9"], (L4,), True),
        (["8.9"], (A100,), False),
        (["8.9"], (A100, L4), True),
        (["8.0+"], (L4,), True),
        (["8.9+"], (B200,), True),
        (["8.9", "12.0+"], (B200,), False),
        (["10.0"], (B200,), True),
        (["8.0"], (), False),
    ],
)
def test_compute_capabilities(wanted: list[str], found: tuple[Gpu, ...], fits: bool) -> None:
    requires = {"compute_capabilities": wanted}
    if fits:
        assert check_host({"requires": requires}, "m", host(gpus=found)) == ()
        return
    message = refusal(requires, host(gpus=found))
    assert "compute capability" in message and "--any-host" in message
    assert all(f"{gpu.name} ({gpu.compute_capability})" in message for gpu in found) and (
        found or "nvidia-smi lists none" in message
    )


def test_versions_of_the_runtime() -> None:
    requires = {"packages": {"tensorrt": "==11.4.*"}}
    assert check_host({"requires": requires}, "m", host(tensorrt="11.4.0.12")) == ()
    message = refusal(requires, host(tensorrt="11.2.1"))
    assert "needs tensorrt ==11.4.*; this machine has tensorrt 11.2.1: pip install 'tensorrt==11.4.*'" in message
    (unknown,) = check_host({"requires": requires}, "m", host())
    assert "tensorrt is not installed" in unknown and "was not checked" in unknown


def test_a_release_candidate_counts_as_what_it_precedes() -> None:
    assert check_host({"requires": {"packages": {"onnxruntime": ">=1.31"}}}, "m", host(onnxruntime="1.32.0rc1")) == ()


def test_everything_that_is_missing_is_named_at_once() -> None:
    requires = {
        "systems": ["Windows"],
        "machines": ["aarch64", "arm64"],
        "instruction_sets": ["avx2", "avx512_vnni"],
        "packages": {"onnxruntime": ">=2"},
    }
    message = refusal(requires, host(onnxruntime="1.32.0"))
    for part in (
        "Windows; this machine has Linux",
        "aarch64 or arm64",
        "instructions avx512_vnni",
        "has avx2",
        "onnxruntime >=2",
    ):
        assert part in message


@pytest.mark.parametrize(
    ("sets", "fits"), [(("avx2", "avx_vnni"), True), (("asimd",), True), (("avx2",), False), ((), False)]
)
def test_one_of_several_instruction_sets(sets: tuple[str, ...], fits: bool) -> None:
    requires = {"instruction_sets": ["avx_vnni|avx512_vnni|asimd"]}
    if fits:
        assert check_host({"requires": requires}, "m", host(sets=sets)) == ()
    else:
        assert "needs the instructions avx_vnni or avx512_vnni or asimd" in refusal(requires, host(sets=sets))


def test_what_a_newer_release_requires_is_not_skipped() -> None:
    assert "requires 'driver', which this release of Assay cannot check" in refusal({"driver": ">=580"}, host())


@pytest.mark.parametrize(
    "requires",
    [
        [],
        {"systems": "Linux"},
        {"machines": []},
        {"instruction_sets": [1]},
        {"compute_capabilities": ["8"]},
        {"packages": {"x": "new"}},
        {"packages": {"x; rm": ">=1"}},
        {"packages": {"x": None}},
        {"packages": []},
    ],
)
def test_a_form_that_nobody_writes_is_damage(requires: Any) -> None:
    with pytest.raises(IntegrityError, match="not of the form"):
        check_host({"requires": requires}, "m", host())


def test_this_machine_is_what_it_is() -> None:
    here = this_host()
    assert here.system == os.uname().sysname and here.machine == os.uname().machine
    assert check_host({"requires": {"systems": [here.system], "machines": [here.machine]}}, "m") == ()
    assert here.version("pytest") == pytest.__version__ and here.version("no-such-package") is None


def test_an_artifact_needs_the_release_that_built_it() -> None:
    major, minor, *_ = pytest.__version__.split(".")
    assert built_with("pytest") == {"packages": {"pytest": f">={major}.{minor}"}}
    with pytest.raises(AssayError, match="not installed"):
        built_with("no-such-package")


def test_gpus_are_those_that_the_driver_lists(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus() == ()
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho 'NVIDIA L4, 8.9, 580.65.06'\necho 'NVIDIA A100-SXM4-80GB, 8.0, 580.65.06'\n")
    tool.chmod(0o755)
    assert gpus() == (Gpu("NVIDIA L4", "8.9", "580.65.06"), Gpu("NVIDIA A100-SXM4-80GB", "8.0", "580.65.06"))
    tool.write_text("#!/bin/sh\necho 'No devices were found'\nexit 6\n")
    assert gpus() == ()
