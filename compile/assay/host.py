"""What this machine is, as far as it decides speed, numbers and what can run; and environments for child processes."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib.util
import os
import platform
import subprocess
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from assay.files import canonical_json, sha256_bytes, sha256_file

_PACKAGES = (
    "assay",
    "torch",
    "transformers",
    "onnx-ir",
    "onnxscript",
    "onnxruntime",
    "onnxruntime-genai",
    "safetensors",
    "tokenizers",
    "gguf",
    "numpy",
    "compressed-tensors",
)
# glibc's malloc.h. A system call for a tensor of 4 MB costs little beside writing it.
_M_MMAP_THRESHOLD, _LARGE_BYTES = -3, 4_000_000
_INSTRUCTION_SETS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "i8mm",
    "sve",
)


def package_versions() -> dict[str, str]:
    """Versions of the installed packages that decide an artifact's bytes or a measurement."""
    versions: dict[str, str] = {}
    for name in _PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


@functools.cache
def code_digest(*modules: str) -> str:
    """Digest of the source of modules, packages whole: what other code made is made anew."""
    sources: list[tuple[str, str]] = []
    for name in modules:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise ModuleNotFoundError(name)
        origin = Path(spec.origin)
        for path in sorted(origin.parent.rglob("*.py")) if spec.submodule_search_locations else [origin]:
            sources.append((path.relative_to(origin.parent).as_posix(), sha256_file(path)))
    return sha256_bytes(canonical_json(sources))


def cores() -> int:
    """CPU cores this process may use."""
    return len(os.sched_getaffinity(0))


def cpu_facts() -> dict[str, Any]:
    """Processor, its instruction sets that matter to kernels, and cores."""
    name, flags = platform.processor() or platform.machine(), ""
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for line in info.read_text(encoding="utf-8").splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                name = value.strip()
            elif key.strip() in ("flags", "Features"):
                flags = value
    sets = [name for name in _INSTRUCTION_SETS if name in flags.split()]
    return {"machine": platform.machine(), "cpu": name, "instruction_sets": sets, "cores": cores()}


@dataclass(frozen=True)
class Gpu:
    """An NVIDIA GPU as its driver names it.  compute_capability: such as "8.9"."""

    name: str
    compute_capability: str
    driver: str


def gpus() -> tuple[Gpu, ...]:
    """The NVIDIA GPUs of this machine, as nvidia-smi lists them; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,compute_cap,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ()
    rows = (
        [[cell.strip() for cell in line.split(",")] for line in done.stdout.splitlines()]
        if done.returncode == 0
        else []
    )
    return tuple(Gpu(*row) for row in rows if len(row) == 3)


def machine_facts() -> dict[str, Any]:
    """What else makes this machine's timings its own; no part of a lock, because it decides no bytes."""
    quota = Path("/sys/fs/cgroup/cpu.max")
    return {
        "name": platform.node(),
        "kernel": platform.release(),
        "memory_bytes": memory_bytes(),
        "cpu_quota": quota.read_text(encoding="utf-8").strip() if quota.is_file() else None,
    }


def environment() -> dict[str, Any]:
    """Everything about this machine and its tools that evidence has to name."""
    return cpu_facts() | {
        "os": f"{platform.system()} {platform.release()}",
        "memory_bytes": memory_bytes(),
        "python": platform.python_version(),
        "packages": package_versions(),
    }


def memory_bytes() -> int:
    """Physical memory of this machine."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def release_free_memory() -> None:
    """Give what the heap no longer uses back to the system, where the C library can (glibc).

    Large tensors that come and go among others that stay leave holes, which count as memory of this process.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def map_large_tensors() -> None:
    """From now on give every large tensor memory of its own, which the system has back when the tensor is gone (glibc).

    Left alone, the C library raises its threshold to the largest block that it has seen freed and puts all below it on the heap, where
    what stays keeps the room of what went: up to 0.2 GB of a job on a model of 0.1 billion parameters, by chance.
    """
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)


def offline_environment() -> dict[str, str]:
    """A child's environment in which no library reaches for a hub or reports home."""
    return os.environ | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "ORT_DISABLE_TELEMETRY": "1",
    }
