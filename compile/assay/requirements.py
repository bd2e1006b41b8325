"""What a machine must have for an artifact to run, as its manifest.json says it, held against a machine.

    "requires": {
      "packages": {"onnxruntime-genai": ">=0.18"},      where installed: versions, as in PEP 440
      "systems": ["Linux"],  "machines": ["x86_64"],     one of them
      "instruction_sets": ["avx2", "amx_int8|asimd"],    all of them, by the kernel's names; | is "or"
      "compute_capabilities": ["8.9", "12.0+"]           of an NVIDIA GPU, one of them; + is "or newer"
    }

A target writes only what its bytes depend on. A key that this release does not know is refused, not skipped: it may matter.
"""

from __future__ import annotations

import platform
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import Any, cast

from assay.errors import AssayError, IntegrityError, NotSupportedError
from assay.host import Gpu, cpu_facts, gpus

# Distributions that are one runtime under several names.
_DISTRIBUTIONS = {
    "onnxruntime": ("onnxruntime", "onnxruntime-gpu"),
    "onnxruntime-genai": ("onnxruntime-genai", "onnxruntime-genai-cuda"),
    "tensorrt": ("tensorrt", "tensorrt-cu13", "tensorrt-cu12"),
    "tensorrt-rtx": ("tensorrt-rtx", "tensorrt-rtx-cu13", "tensorrt-rtx-cu12"),
}
_CAPABILITY = re.compile(r"(\d+)\.(\d+)(\+?)")


@dataclass(frozen=True)
class Host:
    """What requirements are held against; the functions are asked only where something depends on them.

    version: of an installed runtime, None where it is not installed.
    """

    system: str
    machine: str
    instruction_sets: Callable[[], tuple[str, ...]]
    gpus: Callable[[], tuple[Gpu, ...]]
    version: Callable[[str], str | None]


@dataclass(frozen=True)
class Unmet:
    """A requirement that a host does not meet, and the way out."""

    needed: str
    here: str
    remedy: str

    def __str__(self) -> str:
        return f"it needs {self.needed}; this machine has {self.here}: {self.remedy}"


def this_host() -> Host:
    """This machine."""
    return Host(
        platform.system(),
        platform.machine(),
        lambda: tuple(cpu_facts()["instruction_sets"]),
        gpus,
        installed_version,
    )


def installed_version(runtime: str) -> str | None:
    """The version of a runtime in this environment, under whatever name it is distributed."""
    for name in _DISTRIBUTIONS.get(runtime, (runtime,)):
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def built_with(package: str) -> dict[str, Any]:
    """A `requires` of an artifact that loads in the release of a runtime that is installed here, or in a newer one."""
    version = installed_version(package)
    if version is None:
        raise AssayError(f"{package} is not installed, but something was built with it.")
    return {"packages": {package: ">=" + ".".join(version.split(".")[:2])}}


def check_host(manifest: Mapping[str, Any], where: str, host: Host | None = None) -> tuple[str, ...]:
    """NotSupportedError when a machine cannot run an artifact; returns sentences on what could not be found out.

    manifest: of the artifact.  host: this machine, unless given.
    """
    requires = _requires(manifest, where)
    if not requires:
        return ()
    host = host or this_host()
    unmet: list[Unmet] = []
    unknown: list[str] = []
    for found in _findings(requires, host):
        if isinstance(found, Unmet):
            unmet.append(found)
        else:
            unknown.append(found)
    if unmet:
        raise NotSupportedError(
            f"{where} cannot run on this machine: {'; '.join(map(str, unmet))}. On a machine that only hands it on, pull with --any-host."
        )
    return tuple(unknown)


def _findings(requires: Mapping[str, Any], host: Host) -> Iterator[Unmet | str]:
    elsewhere = "pull it on such a machine, or compile the recipe for this one"
    for key, here in (("systems", host.system), ("machines", host.machine)):
        if key in requires and here not in requires[key]:
            yield Unmet(_one_of(requires[key]), here, elsewhere)
    if wanted := requires.get("instruction_sets"):
        known = host.instruction_sets()
        if missing := [names for names in wanted if not set(names.split("|")) & set(known)]:
            shown = ", ".join(" or ".join(names.split("|")) for names in missing)
            yield Unmet(f"the instructions {shown}", ", ".join(known) or "none that are known", elsewhere)
    if wanted := requires.get("compute_capabilities"):
        found = host.gpus()
        if not any(_capable(gpu.compute_capability, wanted) for gpu in found):
            shown = (
                ", ".join(f"{gpu.name} ({gpu.compute_capability})" for gpu in found) or "none (nvidia-smi lists none)"
            )
            yield Unmet(f"an NVIDIA GPU of compute capability {_one_of(wanted)}", shown, elsewhere)
    for name, versions in requires.get("packages", {}).items():
        yield from _package(name, versions, host.version(name))


def _package(name: str, versions: str, installed: str | None) -> Iterator[Unmet | str]:
    from packaging.specifiers import SpecifierSet

    if installed is None:
        yield f"{name} is not installed in this environment: whether it is {versions}, as the artifact needs, was not checked."
    elif not SpecifierSet(versions, prereleases=True).contains(installed):
        yield Unmet(f"{name} {versions}", f"{name} {installed}", f"pip install '{name}{versions}'")


def _capable(capability: str, wanted: list[str]) -> bool:
    here = _CAPABILITY.fullmatch(capability)
    for text in wanted:
        asked = _CAPABILITY.fullmatch(text)
        if here is None or asked is None:
            continue
        pair, least = (int(here[1]), int(here[2])), (int(asked[1]), int(asked[2]))
        if pair == least or (asked[3] and pair > least):
            return True
    return False


def _requires(manifest: Mapping[str, Any], where: str) -> dict[str, Any]:
    """The manifest's `requires`, its form checked; artifacts of the first releases have none."""
    requires = manifest.get("requires", {})
    wrong = IntegrityError(f"{where}: `requires` in its manifest.json is not of the form that Assay writes.")
    if not isinstance(requires, dict):
        raise wrong
    checked = cast("dict[str, Any]", requires)
    for key, value in checked.items():
        form = _FORMS.get(key)
        if form is None:
            raise NotSupportedError(
                f"{where}: its manifest.json requires {key!r}, which this release of Assay cannot check. Use the release that built "
                "it, or pull with --any-host."
            )
        if not form(value):
            raise wrong
    return checked


def _is_words(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(item, str) for item in cast("list[Any]", value))


def _are_capabilities(value: Any) -> bool:
    return _is_words(value) and all(_CAPABILITY.fullmatch(item) for item in value)


def _are_packages(value: Any) -> bool:
    from packaging.specifiers import InvalidSpecifier, SpecifierSet

    if not isinstance(value, dict):
        return False
    try:
        for versions in cast("dict[str, Any]", value).values():
            SpecifierSet(versions)
    except (InvalidSpecifier, AttributeError, TypeError):
        return False
    return all(re.fullmatch(r"[a-z0-9][a-z0-9._-]*", name) for name in cast("dict[str, Any]", value))


_FORMS: dict[str, Callable[[Any], bool]] = {
    "packages": _are_packages,
    "systems": _is_words,
    "machines": _is_words,
    "instruction_sets": _is_words,
    "compute_capabilities": _are_capabilities,
}


def _one_of(words: list[str]) -> str:
    shown = [f"{word.removesuffix('+')} or newer" if word.endswith("+") else word for word in words]
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} or {shown[-1]}"
