"""Write a compressed-tensors checkpoint, which vLLM and transformers load.

How each of its formats lays out a module's tensors is in compressed_tensors_formats.py. Only configuration keys that every reader
since 0.11 knows are written, because readers refuse keys they do not know.
"""

from __future__ import annotations

from collections.abc import Iterable

from assay.quantize.schemes import WeightScheme
from assay.targets.checkpoint_writer import (
    CheckpointFormat,
    Configuration,
    Contents,
    build_baseline,
)
from assay.targets.compressed_tensors_formats import (
    KV_CACHE,
    arguments_of,
    format_of,
    pack_module,
    scheme_of,
    unpack_module,
)

__all__ = ["build_baseline", "build_candidate", "read_back"]

# The first release that reads everything written here: packed zero points came with 0.9.4, a format for each group with 0.11.
_VERSION = "0.11.0"
_ASYMMETRIC = (
    "transformers 5.23 with compressed-tensors 0.20 cannot load packed zero points by from_pretrained alone (it expects them "
    "unpacked); vLLM reads them, and so does compressed-tensors' own decompressor, which `assay` evaluates with."
)


def _configure(contents: Contents) -> Configuration:
    """One group per scheme.

    A decoder's single group targets every Linear, and the head by name, which vLLM does not count as a Linear. Several groups name
    all their modules: beside a group for every Linear, some readers would not look for the names inside a fused q/k/v. So does an
    encoder's: its task's head has Linears that are none of the layers'.
    """
    by_scheme: dict[WeightScheme, list[str]] = {}
    for name, scheme in contents.assigned.items():
        by_scheme.setdefault(scheme, []).append(name)
    ordered = sorted(by_scheme.items(), key=lambda item: -len(item[1]))
    head = contents.shape.architecture.head
    every = [head] * (head in contents.assigned) + ["Linear"]
    groups = {
        f"group_{index}": arguments_of(scheme) | {"targets": every if head and len(ordered) == 1 else names}
        for index, (scheme, names) in enumerate(ordered)
    }
    formats = {format_of(scheme) for scheme in by_scheme}
    return {
        "config_groups": groups,
        "format": formats.pop() if len(formats) == 1 else "mixed-precision",
        "ignore": contents.unquantized,
        "kv_cache_scheme": KV_CACHE if contents.kv_cache else None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "version": _VERSION,
    }


def _scheme_of(config: Configuration, module: str) -> WeightScheme:
    groups = {target: group for group in config["config_groups"].values() for target in group["targets"]}
    group = groups.get(module) or groups["Linear"]
    return scheme_of(group["weights"], group["format"])


def _notes(schemes: Iterable[WeightScheme]) -> tuple[str, ...]:
    return () if all(scheme.symmetric for scheme in schemes) else (_ASYMMETRIC,)


_FORMAT = CheckpointFormat(
    name="compressed-tensors",
    marks=("weight_scale", "weight_packed"),
    configure=_configure,
    pack=pack_module,
    scheme_of=_scheme_of,
    unpack=unpack_module,
    notes=_notes,
)
build_candidate, read_back = _FORMAT.build_candidate, _FORMAT.read_back
