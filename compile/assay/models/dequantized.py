"""Quantized Hugging Face checkpoints made float again: what their files say, by code that did not write them.

Packages that read a format are asked: compressed-tensors for its own, for AWQ, and for what becomes of activations. GPTQ, ModelOpt and
fine-grained fp8, which none here reads, are dequantized by their definition. All in float32, so that weights are exactly what the files say.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import readable_json
from assay.models.architectures import ARCHITECTURES, read_config
from assay.models.checkpoint import FLOATS, copy_tokenizer, open_tensors, stored_files
from assay.models.experts import SeparateExperts
from assay.models.shards import save_shards

_INPUTS = re.compile(r"\.input(_global)?_scale$")
_CACHE = re.compile(r"\.layers\.(\d+)\..*\.([kv])_scale$")
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
Tensors = dict[str, Tensor]
Hook = Callable[[nn.Module, tuple[Tensor, ...]], Tensor]


class Dequantized(Protocol):
    """A checkpoint whose weights are float.

    weights: all of them by name.  cache_scales: layer → the scales of its keys and of its values, where the cache is quantized.
    """

    weights: Tensors
    cache_scales: dict[int, tuple[float, float]]

    def quantize_activations(self, model: Any) -> None:
        """Make every Linear whose scheme says so quantize its inputs first."""
        ...


def dequantize(directory: Path, quantization: Mapping[str, Any], tensors: Tensors) -> Dequantized:
    """Make tensors of a checkpoint float; they are used up.

    quantization: the quantization_config of the directory's config.json.  tensors: all of each module that is there.
    NotSupportedError for a method that is not known here.
    """
    method = quantization.get("quant_method")
    if method not in _METHODS:
        raise NotSupportedError(
            f"{directory}: there is no reader of quant_method {method}; this release has {', '.join(_METHODS)}."
        )
    try:
        return _METHODS[method](directory, quantization, tensors)
    except ImportError as error:
        raise UsageError(
            f"{directory}: to read it takes the package compressed-tensors ({error}): pip install compressed-tensors."
        ) from error


def write_dequantized(directory: Path, destination: Path) -> None:
    """Write a quantized checkpoint as a float one, in the dtype that its config.json names, module by module.

    Scales of activations and of the key/value cache are left out: nothing of the new checkpoint is quantized.
    """
    config = read_config(directory)
    quantization = config.pop("quantization_config")
    dtype = _DTYPES.get(str(config.get("dtype", config.get("torch_dtype"))), torch.bfloat16)
    copy_tokenizer(directory, destination)
    (destination / "config.json").write_bytes(readable_json(config))
    save_shards(_float_tensors(directory, quantization, dtype), destination)


def _float_tensors(
    directory: Path, quantization: Mapping[str, Any], dtype: torch.dtype
) -> Iterator[tuple[str, Tensor]]:
    places = stored_files(directory)
    # By module first: in the order of whole names, those of its children lie between.
    ordered = sorted(places, key=lambda name: name.rpartition("."))
    for module, names in groupby(ordered, lambda name: name.rpartition(".")[0]):
        tensors: Tensors = {}
        for name in names:
            with open_tensors(places[name]) as file:
                tensors[name] = file.get_tensor(name)
        try:
            weights = dequantize(directory, quantization, tensors).weights
        except (KeyError, ValueError, RuntimeError) as error:
            # What a method's reader says of tensors that it does not expect depends on what they are.
            raise IntegrityError(
                f"{directory}: the tensors of {module} are not what quant_method {quantization['quant_method']} makes of a module "
                f"({type(error).__name__}: {error})."
            ) from error
        for name, value in sorted(weights.items()):
            if value.dtype not in FLOATS:
                kind = str(value.dtype).removeprefix("torch.")
                raise IntegrityError(
                    f"{directory}: {name} is {kind}, and no scale beside it says what its values are; the checkpoint is damaged."
                )
            yield name, value.to(dtype)


class _CompressedTensors:
    """As the package compressed-tensors reads it."""

    def __init__(self, directory: Path, _: Mapping[str, Any], tensors: Tensors) -> None:
        from compressed_tensors.entrypoints.convert import CompressedTensorsDequantizer

        self._inputs = {name: tensors.pop(name).float() for name in list(tensors) if _INPUTS.search(name)}
        self.cache_scales = _take_cache_scales(tensors)
        # It multiplies in the scales' dtype, and bfloat16 products are rounded; exponents and 8-bit floats stay what they are.
        tensors = {
            name: value.float() if name.endswith(".weight_scale") and value.is_floating_point() else value
            for name, value in tensors.items()
        }
        modules = {name.rpartition(".")[0] for name in tensors}
        # The package tells a Linear from an embedding by its class, which files do not have.
        plain = [name for name in modules if f"{name}.weight_scale" not in tensors]
        exact: Tensors = {}
        for name in modules:
            if f"{name}.weight_global_scale" in tensors:
                parts = ("packed", "scale", "global_scale")
                packed, scale, global_scale = (tensors.pop(f"{name}.weight_{part}") for part in parts)
                exact[f"{name}.weight"] = _nvfp4(packed, scale.float() / global_scale)
        dequantizer = CompressedTensorsDequantizer(directory, plain, torch.float32)
        settings: Any = dequantizer.quant_config
        self._ignored: list[str] = settings.ignore
        groups = settings.config_groups.values()
        self._groups = [(group.targets, group.input_activations) for group in groups if group.input_activations]
        self.weights = dequantizer.validate(tensors) | exact

    def quantize_activations(self, model: Any) -> None:
        from compressed_tensors.utils.match import is_match

        for name, linear in _linears(model).items() if self._groups else ():
            for targets, arguments in self._groups:
                if is_match(name, linear, targets, self._ignored):
                    static, shared = (self._inputs.get(f"{name}.input_{kind}") for kind in ("scale", "global_scale"))
                    linear.register_forward_pre_hook(_fake_quantize(arguments, static, shared))


class _ModelOpt:
    """FP8: level · weight_scale.  NVFP4: level · (weight_scale · weight_scale_2)."""

    def __init__(self, _: Path, quantization: Mapping[str, Any], tensors: Tensors) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme

        self._grouped = quantization["quant_algo"] == "NVFP4"
        self._arguments = preset_name_to_scheme(quantization["quant_algo"], ["Linear"]).input_activations
        self._inputs = {
            name.removesuffix(".input_scale"): tensors.pop(name).view(1)
            for name in list(tensors)
            if name.endswith(".input_scale")
        }
        self.cache_scales = _take_cache_scales(tensors)
        self.weights = tensors
        for name in self._inputs:
            weight, scale = tensors[f"{name}.weight"], tensors.pop(f"{name}.weight_scale").float()
            if self._grouped:
                tensors[f"{name}.weight"] = _nvfp4(weight, scale * tensors.pop(f"{name}.weight_scale_2"))
            else:
                tensors[f"{name}.weight"] = weight.float() * scale

    def quantize_activations(self, model: Any) -> None:
        linears = _linears(model)
        for name, scale in self._inputs.items():
            if name not in linears:
                raise ValueError(f"{name} has an input_scale, but the model has no such Linear")
            static, shared = (None, 1 / scale) if self._grouped else (scale, None)
            linears[name].register_forward_pre_hook(_fake_quantize(self._arguments, static, shared))


class _Fp8:
    """Fine-grained fp8, as DeepSeek and Qwen publish it: level · weight_scale_inv, one for each block; inputs in groups of 128."""

    def __init__(self, _: Path, quantization: Mapping[str, Any], tensors: Tensors) -> None:
        from compressed_tensors.quantization import preset_name_to_scheme

        self._arguments = preset_name_to_scheme("FP8_BLOCK", ["Linear"]).input_activations
        self.cache_scales: dict[int, tuple[float, float]] = {}
        self.weights = tensors
        rows, columns = quantization["weight_block_size"]
        suffix = ".weight_scale_inv"
        self._quantized = [name.removesuffix(suffix) for name in tensors if name.endswith(suffix)]
        for name in self._quantized:
            scale, weight = tensors.pop(f"{name}{suffix}").float(), tensors[f"{name}.weight"].float()
            spread = scale.repeat_interleave(rows, 0).repeat_interleave(columns, 1)
            tensors[f"{name}.weight"] = weight * spread[: len(weight), : weight.shape[1]]

    def quantize_activations(self, model: Any) -> None:
        linears = _linears(model)
        for name in self._quantized:
            linears[name].register_forward_pre_hook(_fake_quantize(self._arguments, None, None))


class _Integers:
    """Weights alone are quantized.  weight: makes one of a module's tensors, which it takes by the last part of their names."""

    def __init__(self, tensors: Tensors, weight: Callable[[Callable[[str], Tensor]], Tensor]) -> None:
        self.weights = tensors
        self.cache_scales: dict[int, tuple[float, float]] = {}
        for name in [name.removesuffix(".qweight") for name in tensors if name.endswith(".qweight")]:
            tensors[f"{name}.weight"] = weight(lambda part, name=name: tensors.pop(f"{name}.{part}"))

    def quantize_activations(self, model: Any) -> None:
        """Activations stay floats."""


def _awq(_: Path, quantization: Mapping[str, Any], tensors: Tensors) -> Dequantized:
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.entrypoints.convert import AutoAWQConverter
    from compressed_tensors.quantization import QuantizationScheme

    converter = AutoAWQConverter.from_autoawq_config(dict(quantization))
    group_size = quantization["group_size"]
    grouped = {"strategy": "group", "group_size": group_size} if group_size > 0 else {"strategy": "channel"}
    weights = {"num_bits": quantization["bits"], "symmetric": False} | grouped
    scheme = QuantizationScheme.model_validate({"targets": ["Linear"], "weights": weights, "format": "pack-quantized"})
    compressor: Any = BaseCompressor.get_value_from_registry("pack-quantized")

    def weight(take: Callable[[str], Tensor]) -> Tensor:
        # It multiplies in the scales' dtype.
        parts = {"qweight": take("qweight"), "qzeros": take("qzeros"), "scales": take("scales").float()}
        converted = converter.process({f"module.{part}": value for part, value in parts.items()})
        named = {name.removeprefix("module."): value for name, value in converted.items()}
        return compressor.decompress(named, scheme)["weight"]

    return _Integers(tensors, weight)


def _gptq(_: Path, quantization: Mapping[str, Any], tensors: Tensors) -> Dequantized:
    bits = quantization["bits"]
    shifts, mask = torch.arange(0, 32, bits), (1 << bits) - 1
    # checkpoint_format "gptq" stores zero points less one.
    offset = 1 if quantization["checkpoint_format"] == "gptq" else 0

    def weight(take: Callable[[str], Tensor]) -> Tensor:
        codes = (take("qweight")[:, None, :] >> shifts[:, None]) & mask
        points = (take("qzeros")[:, :, None] >> shifts) & mask
        group = take("g_idx").long()
        levels = codes.flatten(0, 1) - (points.flatten(1) + offset)[group]
        return (levels.float() * take("scales").float()[group]).T.contiguous()

    return _Integers(tensors, weight)


_METHODS: dict[str, Callable[[Path, Mapping[str, Any], Tensors], Dequantized]] = {
    "compressed-tensors": _CompressedTensors,
    "awq": _awq,
    "gptq": _gptq,
    "modelopt": _ModelOpt,
    "fp8": _Fp8,
}


def _take_cache_scales(tensors: Tensors) -> dict[int, tuple[float, float]]:
    found = {
        (int(match[1]), match[2]): float(tensors.pop(name)) for name in list(tensors) if (match := _CACHE.search(name))
    }
    return {layer: (found[layer, "k"], found[layer, "v"]) for layer, part in found if part == "k"}


def _linears(model: Any) -> dict[str, nn.Module]:
    """The model's Linears by the names of the Hub, which files use; the experts that transformers keeps in one tensor are taken apart."""
    row = ARCHITECTURES[type(model).__name__]
    fused = [name for name, _ in model.named_modules() if row.experts and name.endswith(f".{row.experts.path}")]
    for name in fused:
        together = model.get_submodule(name)
        apart = SeparateExperts.like(together)
        for expert, both, down in zip(apart, together.gate_up_proj, together.down_proj, strict=True):
            gate, up = both.chunk(2)
            expert.load_state_dict({"gate_proj.weight": gate, "up_proj.weight": up, "down_proj.weight": down})
        model.set_submodule(name, apart)
    return {row.hub_name(name): module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _fake_quantize(arguments: Any, static: Tensor | None, shared: Tensor | None) -> Hook:
    """What makes a Linear's inputs those of the scheme; static: their scale; shared: the global scale over those of groups."""
    from compressed_tensors.quantization.lifecycle import forward
    from compressed_tensors.quantization.utils import compute_dynamic_scales_and_zp

    fake_quantize: Any = forward.fake_quantize

    def quantize(module: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
        if not inputs[0].numel():
            # An expert that no token goes to.
            return inputs[0]
        # Experts are given [tokens, features], of which it would not know what a token is.
        values = inputs[0].view(1, -1, inputs[0].shape[-1])
        scale, zero_point = static, None
        if arguments.dynamic:
            scale, zero_point = compute_dynamic_scales_and_zp(values, arguments, module, shared)
        return fake_quantize(values, scale, zero_point, arguments, shared).view_as(inputs[0])

    return quantize


def _nvfp4(packed: Tensor, scales: Tensor) -> Tensor:
    """float32 [out, in]; the package's own decompressor rounds the products to bfloat16, as no kernel does."""
    from compressed_tensors.compressors.nvfp4.helpers import unpack_fp4_from_uint8

    rows, columns = packed.shape[0], 2 * packed.shape[1]
    levels = unpack_fp4_from_uint8(packed, rows, columns, dtype=torch.float32)
    return (levels.view(*scales.shape, -1) * scales[:, :, None]).view(rows, columns)
