"""llm-compressor's words for number formats, and the scheme of a recipe that each means.

A preset's name, or the arguments of a config group (compressed-tensors' QuantizationArgs), of weights and of inputs. Read in compressed-tensors
0.20, `quantization/quant_scheme.py` and `quant_args.py`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from assay.importing.reading import Reading, shown
from assay.recipe_yaml import Location

# Presets are read whatever their capitals.  Their groups are of 128, where a recipe's are of 64.
_GROUP = 128
PRESETS: dict[str, tuple[str, int | None]] = {
    "W4A16": ("W4A16", _GROUP),
    "W4A16_ASYM": ("W4A16_ASYM", _GROUP),
    "W8A16": ("W8A16", _GROUP),
    "W8A8": ("W8A8", None),
    "INT8": ("W8A8", None),
    "FP8": ("FP8", None),
    "FP8_DYNAMIC": ("FP8_DYNAMIC", None),
    "FP8_BLOCK": ("FP8_BLOCK", None),
    "NVFP4A16": ("NVFP4A16", None),
    "NVFP4": ("NVFP4", None),
    "MXFP4A16": ("MXFP4A16", None),
    "MXFP4": ("MXFP4", None),
}
# What finds the weights' ranges there → the recipe's `range`. The last weights errors by the inputs' mean squares, as
# activation_weighted does.
_RANGES = {
    "minmax": "minmax",
    "static_minmax": "minmax",
    "memoryless_minmax": "minmax",
    "memoryless": "minmax",
    "mse": "mse",
    "memoryless_mse": "mse",
    "imatrix_mse": "activation_weighted",
}
_PLAIN_OBSERVERS = ("minmax", "static_minmax", "memoryless_minmax", "memoryless")
_ARGUMENTS = [
    "num_bits",
    "type",
    "symmetric",
    "group_size",
    "strategy",
    "block_structure",
    "dynamic",
    "actorder",
    "scale_dtype",
    "zp_dtype",
    "observer",
    "observer_kwargs",
]


# What is left out in more places than one, and why.
INPUTS = "Assay calibrates scales of inputs by their largest magnitudes."
ORDER = "Assay takes the columns in order of input power, as with actorder: static."
STATIC_ORDERS = ("static", "weight")


@dataclass(frozen=True)
class Format:
    """One number format: (bits, type, symmetric, what shares a scale, how many, dynamic)."""

    bits: int
    kind: str
    symmetric: bool
    strategy: str
    group: int | tuple[int, ...] | None = None
    dynamic: bool | str = False


_INT8_TOKEN = Format(8, "int", True, "token", None, True)
_FP8_TENSOR = Format(8, "float", True, "tensor")
_FP4_GROUP, _FP4_TENSOR_GROUP = Format(4, "float", True, "group", 32), Format(4, "float", True, "tensor_group", 16)
_FORMATS: dict[tuple[Format, Format | None], str] = {
    (Format(8, "int", True, "channel"), _INT8_TOKEN): "W8A8",
    (Format(8, "int", True, "channel"), Format(8, "int", True, "tensor")): "W8A8_STATIC",
    (_FP8_TENSOR, _FP8_TENSOR): "FP8",
    (Format(8, "float", True, "channel"), Format(8, "float", True, "token", None, True)): "FP8_DYNAMIC",
    (Format(8, "float", True, "block", (128, 128)), Format(8, "float", True, "group", 128, True)): "FP8_BLOCK",
    (_FP4_GROUP, None): "MXFP4A16",
    (_FP4_GROUP, Format(4, "float", True, "group", 32, True)): "MXFP4",
    (_FP4_TENSOR_GROUP, None): "NVFP4A16",
    (_FP4_TENSOR_GROUP, Format(4, "float", True, "tensor_group", 16, "local")): "NVFP4",
}
_GROUPED = {(4, True): "W4A16", (4, False): "W4A16_ASYM", (8, True): "W8A16"}
_GROUP_SIZES = (32, 64, 128)


@dataclass(frozen=True)
class Chosen:
    """A scheme of a recipe, and how the weights' ranges are found where that is said (in the words there)."""

    scheme: str
    group_size: int | str | None = None
    observer: str | None = None

    def words(self) -> dict[str, Any]:
        """As an override or `quantize` says it."""
        return {"scheme": self.scheme} | ({} if self.group_size is None else {"group_size": self.group_size})


def preset(reading: Reading, name: str, location: Location) -> Chosen | None:
    """The scheme of a preset's name."""
    if name.upper() in PRESETS:
        return Chosen(*PRESETS[name.upper()])
    reading.refuse(
        location,
        f"the scheme {shown(name)} has none like it in Assay; schemes that have: {', '.join(PRESETS)}. Choose one of them.",
    )
    return None


def config_group(reading: Reading, group: dict[str, Any], location: Location) -> Chosen | None:
    """The scheme of a config group's arguments."""
    if group.get("output_activations") is not None:
        reading.refuse(
            (*location, "output_activations"), "outputs of Linears are not quantized in Assay; remove this key."
        )
        return None
    if group.get("weights") is None:
        reading.refuse(location, "this group quantizes no weights; give it weights, or remove it.")
        return None
    weights = _format(reading, group["weights"], (*location, "weights"))
    inputs = group.get("input_activations")
    activations = None if inputs is None else _format(reading, inputs, (*location, "input_activations"))
    if weights is None or (inputs is not None and activations is None):
        return None
    observer = group["weights"].get("observer")
    if inputs is not None and inputs.get("observer") not in (None, *_PLAIN_OBSERVERS):
        reading.leave_out((*location, "input_activations", "observer"), INPUTS)
    if inputs is None and weights.kind == "int" and (weights.bits, weights.symmetric) in _GROUPED:
        name = _GROUPED[weights.bits, weights.symmetric]
        if weights.strategy == "channel":
            return Chosen(name, "channel", observer)
        if weights.strategy == "group" and weights.group in _GROUP_SIZES:
            return Chosen(name, weights.group, observer)
        if weights.strategy == "group":
            allowed = f"{', '.join(map(str, _GROUP_SIZES))}, or strategy: channel"
            reading.refuse(
                (*location, "weights", "group_size"), f"groups of {weights.group} weights; allowed: {allowed}."
            )
            return None
    if (scheme := _FORMATS.get((weights, activations))) is None:
        reading.refuse(
            location,
            f"no scheme of Assay has {_described(weights)} weights with {_described(activations)} inputs; schemes: "
            f"{', '.join(dict.fromkeys([*(name for name, _ in PRESETS.values()), *_FORMATS.values()]))} (docs/recipe.md says what each is).",
        )
        return None
    return Chosen(scheme, None, observer)


def range_of(reading: Reading, observer: Any, location: Location) -> str | None:
    """The recipe's `range` for an observer of weights."""
    if isinstance(observer, str) and observer in _RANGES:
        return _RANGES[observer]
    reading.refuse(
        location, f"the observer {shown(observer)} has none like it in Assay; allowed: {', '.join(_RANGES)}."
    )
    return None


def is_fp8_cache(reading: Reading, value: Any, location: Location) -> bool:
    """Whether the key/value cache's arguments are those of `kv_cache: fp8`; anything else is refused."""
    found = _format(reading, reading.mapping(value, location), location)
    if found == _FP8_TENSOR:
        return True
    if found is not None:
        reading.refuse(
            location,
            f"a cache of {_described(found)}; allowed: num_bits: 8, type: float, strategy: tensor, dynamic: false, symmetric: true.",
        )
    return False


def _format(reading: Reading, arguments: Any, location: Location) -> Format | None:
    """A number format from its arguments, with the defaults that compressed-tensors gives them; None when it was refused."""
    before = len(reading.problems)
    found = reading.mapping(arguments, location)
    for key in found:
        if key not in _ARGUMENTS:
            reading.unknown((*location, key), _ARGUMENTS)
    group = found.get("group_size")
    if group is not None:
        group = int(reading.number(group, (*location, "group_size"), -1, 1 << 20, whole=True) or 0)
    strategy = found.get("strategy") or {None: "tensor", -1: "channel"}.get(group, "group")
    group = group if strategy in ("group", "tensor_group") else None
    if (block := found.get("block_structure")) is not None:
        sides = block if isinstance(block, list) else [block]
        numbers = [reading.number(side, (*location, "block_structure"), 1, 1 << 20, whole=True) for side in sides]
        group = tuple(int(number or 0) for number in numbers)
    bits = reading.number(found.get("num_bits", 8), (*location, "num_bits"), 1, 16, whole=True)
    kind, dynamic = str(found.get("type", "int")).lower(), found.get("dynamic", False)
    if not isinstance(dynamic, bool | str):
        reading.refuse((*location, "dynamic"), f"dynamic is {shown(dynamic)}; allowed: true, false, local.")
    if found.get("observer") is not None:
        reading.text(found["observer"], (*location, "observer"))
    if kind == "float" and bits == 4 and strategy == "group" and "uint8" not in str(found.get("scale_dtype", "uint8")):
        reading.refuse(
            (*location, "scale_dtype"), "4-bit floats in groups have scales of torch.uint8 (powers of two) in Assay."
        )
    if found.get("actorder") not in (None, False, *STATIC_ORDERS):
        reading.leave_out((*location, "actorder"), ORDER)
    if found.get("observer_kwargs"):
        reading.leave_out((*location, "observer_kwargs"), "Assay's searches have settings of their own.")
    if len(reading.problems) > before or bits is None:
        return None
    return Format(int(bits), kind, found.get("symmetric", True) is True, str(strategy).lower(), group, dynamic)


def _described(found: Format | None) -> str:
    if found is None:
        return "unquantized"
    grouped = f" of {found.group}" if found.group is not None else ""
    symmetric = "symmetric" if found.symmetric else "asymmetric"
    dynamic = {True: "dynamic ", False: "", "local": "locally dynamic "}.get(found.dynamic, "")
    return f"{symmetric} {dynamic}{found.bits}-bit {found.kind} (a scale for each {found.strategy}{grouped})"
