"""What a target's format cannot say, and what serving engines are known not to read: refused before anything is computed. Imports no torch.

The formats' limits are data in TARGETS; the engines' are data here, read in their sources: vLLM 0.32 `model_executor/layers/quantization`;
TensorRT-LLM (2026) `models/quant_config_utils.py`, `_torch/model_config.py` and `llmapi/llm_utils.py`; SGLang
`srt/layers/quantization/gptq.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from assay.errors import NotSupportedError
from assay.models.architectures import DecoderShape, LinearShape
from assay.quantize.schemes import WeightScheme
from assay.recipe import Engine
from assay.targets import TARGETS

Assigned = Mapping[str, WeightScheme]


@dataclass(frozen=True)
class Refusal:
    """Why something cannot be, and a module that it is about."""

    module: str
    message: str


@dataclass(frozen=True)
class Misread:
    """What an engine does not read, or reads as something else.  multiple: only where a Linear's rows or columns are no multiple of it."""

    engine: Engine
    format: str
    schemes: tuple[str, ...]
    reason: str
    multiple: int = 1


_WEIGHT_ONLY = (
    "TensorRT-LLM asks a compressed-tensors checkpoint how its activations are quantized and fails where they are not; "
    "use FP8_DYNAMIC, NVFP4 or MXFP4A16, or target modelopt"
)
_UNKNOWN = "TensorRT-LLM loads no {0} checkpoints (unsupported quantization_config); use target modelopt"

ENGINES = (
    Misread(
        "tensorrt-llm",
        "compressed-tensors",
        ("W8A8",),
        "TensorRT-LLM looks at the number of bits and not at their type, and would take the INT8 weights for FP8; use FP8_DYNAMIC",
    ),
    Misread(
        "tensorrt-llm",
        "compressed-tensors",
        ("W8A8_STATIC",),
        "TensorRT-LLM loads no 8-bit weights whose activations have a static scale; use FP8_DYNAMIC, or FP8 with target modelopt",
    ),
    Misread("tensorrt-llm", "compressed-tensors", ("W4A16", "W4A16_ASYM", "W8A16", "NVFP4A16"), _WEIGHT_ONLY),
    Misread(
        "tensorrt-llm",
        "compressed-tensors",
        ("FP8",),
        "TensorRT-LLM loads no compressed-tensors weights with one scale for the whole tensor; use target modelopt, which it does load",
    ),
    Misread(
        "tensorrt-llm",
        "compressed-tensors",
        ("MXFP4",),
        "TensorRT-LLM would leave the activations unquantized, which is not what is evaluated here; use MXFP4A16 or NVFP4",
    ),
    Misread("tensorrt-llm", "awq", ("W4A16", "W4A16_ASYM"), _UNKNOWN.format("awq")),
    Misread("tensorrt-llm", "gptq", ("W4A16", "W4A16_ASYM", "W8A16"), _UNKNOWN.format("gptq")),
    Misread(
        "vllm",
        "gptq",
        ("W4A16_ASYM",),
        "vLLM loads no gptq checkpoint with zero points of its own (sym false); use target awq or compressed-tensors",
    ),
    Misread(
        "sglang",
        "gptq",
        ("W4A16_ASYM",),
        "SGLang's kernel would take every zero point of gptq_v2 for one more than it is; use target awq or compressed-tensors",
    ),
    Misread(
        "vllm",
        "compressed-tensors",
        ("FP8_BLOCK",),
        "vLLM needs whole blocks of 128 rows and columns; use FP8_DYNAMIC",
        multiple=128,
    ),
)


def check_format(target: str, shape: DecoderShape, assigned: Assigned) -> None:
    """NotSupportedError for the first thing that a checkpoint's format cannot say, or that no engine computes."""
    for refusal in format_refusals(target, shape, assigned):
        raise NotSupportedError(refusal.message)
    if names := split_product(shape, assigned):
        raise NotSupportedError(
            f"serving engines such as vLLM compute {', '.join(names)} as one product: they need the same scheme and "
            "group size. Let one override match all of them."
        )


def format_refusals(target: str, shape: DecoderShape, assigned: Assigned) -> Iterator[Refusal]:
    """What this target's format cannot say of these schemes."""
    row, head = TARGETS[target], shape.architecture.head
    other = "compressed-tensors takes"
    if row.float_head and head in assigned:
        message = f"{target} keeps {head} in floats: most of its readers look for a plain {head}.weight; {other} it."
        yield Refusal(head, message)
        assigned = {name: scheme for name, scheme in assigned.items() if name != head}
    unknown = [name for name, scheme in assigned.items() if scheme.name not in row.schemes]
    for scheme in dict.fromkeys(assigned[name].name for name in unknown):
        module = next(name for name in unknown if assigned[name].name == scheme)
        works = ", ".join(row.schemes)
        elsewhere = "" if row.encoders else f" {other} {scheme}."
        yield Refusal(module, f"{target} cannot hold {scheme}; schemes that work: {works}.{elsewhere}")
    layers = [linear.name for linear in shape.linears if linear.name != head]
    if row.every_linear and (left := [name for name in layers if name not in assigned]):
        message = f"{target} has no list of Linears that stay as they are, but {_some(left)} would; {other} it, and so does awq."
        yield Refusal(left[0], message)
    known = [name for name in assigned if name not in unknown]
    if row.one_scheme and (differing := [name for name in known if assigned[name] != assigned[known[0]]]):
        message = f"{target} has one scheme and group size for all, but {_some(differing)} would differ from {known[0]}; {other} it."
        yield Refusal(differing[0], message)
    for linear in shape.linears:
        if linear.name in known and (ragged := _ragged(linear, assigned[linear.name], row.words)):
            message = f"{target} packs codes into words of 32 bits, which the {ragged} of {linear.name} do not fill; {other} it."
            yield Refusal(linear.name, message)
            return


def engine_refusals(target: str, engine: Engine, shape: DecoderShape, assigned: Assigned) -> Iterator[Refusal]:
    """What this engine is known not to read, or to read as something else."""
    sizes = {linear.name: (linear.out_features, linear.in_features) for linear in shape.linears}
    yield from misreadings(target, engine, [(name, scheme.name, sizes[name]) for name, scheme in assigned.items()])


def misreadings(target: str, engine: Engine, linears: Sequence[tuple[str, str, tuple[int, ...]]]) -> Iterator[Refusal]:
    """The same of Linears that are compiled already: name, name of the scheme, shape of each."""
    for row in ENGINES:
        if (row.engine, row.format) != (engine, target):
            continue
        hits = [
            (name, scheme)
            for name, scheme, sizes in linears
            if scheme in row.schemes and (row.multiple == 1 or any(size % row.multiple for size in sizes))
        ]
        if hits:
            kinds, names = ", ".join(sorted({scheme for _, scheme in hits})), [name for name, _ in hits]
            yield Refusal(names[0], f"{engine} cannot serve {kinds} ({_some(names)}) from {target}: {row.reason}.")


def split_product(shape: DecoderShape, assigned: Assigned, only: tuple[str, ...] | None = None) -> tuple[str, ...]:
    """The first Linears that engines compute as one product and that differ in scheme; () if there are none.

    Those are Linears that share an input, and all experts of a layer, which one kernel computes: of these, two that differ.
    only: the one group, by names within a layer, that is asked about; None: every one.
    """
    for layer in range(shape.layers):
        groups = shape.groups(layer)
        prefix = f"{shape.architecture.layers}.{layer}"
        for group in groups:
            names = tuple(f"{prefix}.{name}" for name in group)
            if only in (None, group) and len({assigned.get(name) for name in names}) > 1:
                return names
        if only is None and shape.experts[layer]:
            experts = [f"{prefix}.{name}" for group in groups[len(shape.architecture.attention) :] for name in group]
            first = assigned.get(experts[0])
            if differing := [name for name in experts if assigned.get(name) != first]:
                return (experts[0], differing[0])
    return ()


def _ragged(linear: LinearShape, scheme: WeightScheme, words: tuple[str, ...]) -> str:
    """ "100 outputs" of a Linear that do not fill words; empty when all do."""
    sizes = {"outputs": linear.out_features, "inputs": linear.in_features}
    return next((f"{sizes[side]} {side}" for side in words if sizes[side] * scheme.bits % 32), "")


def _some(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"
