"""A recipe of llm-compressor: stages of modifiers, of which those that quantize decoders after training have their like here.

Fields and defaults as in llm-compressor 0.14, and those that older recipes hold. It skips keys of a recipe that it does not know; here they are
errors. Nothing that a recipe names is imported.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from assay.errors import RecipeError
from assay.importing.assignment import Targets, assign
from assay.importing.reading import Draft, Reading, shown
from assay.importing.schemes import INPUTS, Chosen, config_group, is_fp8_cache, preset, range_of
from assay.models.architectures import DecoderShape
from assay.recipe_yaml import Location

_QUANTIZING = [
    "config_groups",
    "targets",
    "ignore",
    "scheme",
    "kv_cache_scheme",
    "weight_observer",
    "input_observer",
    "output_observer",
    "observer",
]
# Which fields each modifier has that decide what is made.
_FIELDS = {
    "QuantizationModifier": _QUANTIZING,
    "GPTQModifier": [*_QUANTIZING, "dampening_frac", "actorder"],
    "AWQModifier": [*_QUANTIZING, "mappings"],
    "SmoothQuantModifier": ["smoothing_strength", "mappings", "ignore", "algorithm", "calibration_function"],
}
# Those that have no place in a recipe, and why none is needed; older ones too.
_WITHOUT_PLACE = {
    "block_size": "GPTQ's block of columns changes how fast it is, and not what it finds",
    "batched_quantization": "how Linears are batched changes how fast it is, and not what it finds",
    "offload_hessians": "Assay keeps to the machine's memory by itself",
    "offload_device": "Assay keeps to the machine's memory by itself",
    "sequential_update": "Assay goes on with what the quantized layers give, always",
    "sequential_targets": "Assay goes from layer to layer, always",
    "true_sequential": "Assay goes from layer to layer, always",
    "max_chunk_memory": "Assay keeps to the machine's memory by itself",
    "duo_scaling": "Assay's search for AWQ's factors has settings of its own",
    "n_grid": "Assay's search for AWQ's factors has settings of its own",
    "num_calibration_steps": "how much text is calibrated on is in `calibration`",
    "bypass_divisibility_checks": "group sizes that do not divide the inputs are refused here",
    "disable_quantization_observer_epoch": "it is of training",
}
_INERT = ("index", "group", "requires_calibration_data")
_OF_TRAINING = ("start", "end", "update")
_REFUSED = {
    "SparseGPTModifier": "it prunes weights, and Assay does not",
    "WandaPruningModifier": "it prunes weights, and Assay does not",
    "MagnitudePruningModifier": "it prunes weights, and Assay does not",
    "ConstantPruningModifier": "it prunes weights, and Assay does not",
    "REAPPruningModifier": "it removes experts, and Assay does not",
    "AutoRoundModifier": "Assay has no AutoRound; GPTQModifier is the nearest",
    "SpinQuantModifier": "Assay has no rotations; AWQModifier or SmoothQuantModifier move outliers, too",
    "QuIPModifier": "Assay has no rotations; AWQModifier or SmoothQuantModifier move outliers, too",
    "LogarithmicEqualizationModifier": "Assay has no logarithmic equalization; SmoothQuantModifier is the nearest",
}
_MAPPINGS = "the places that factors are moved to follow from the architecture, which is checked"


@dataclass(frozen=True)
class Modifier:
    """One of a recipe's modifiers: its class's name, its place, and its fields."""

    kind: str
    location: Location
    fields: dict[str, Any]

    def place(self, field: str) -> Location:
        return (*self.location, field)

    @property
    def quantizes(self) -> bool:
        return self.kind in ("QuantizationModifier", "GPTQModifier") or (
            self.kind == "AWQModifier" and any(self.fields.get(name) for name in ("scheme", "config_groups"))
        )


def is_llm_compressor(data: dict[str, Any]) -> bool:
    """Whether a file looks like one of llm-compressor's recipes."""
    return any(key.endswith(("_stage", "_modifiers", "Modifier")) for key in data)


def read_llm_compressor(reading: Reading, shape: DecoderShape | None) -> Draft:
    """The job that a recipe describes; RecipeError with all that has no like here.

    shape: the model's, where it is on this machine: names of modules are then held against its own.
    """
    modifiers = list(_modifiers(reading))
    for modifier in modifiers:
        _check_fields(reading, modifier)
    reading.give_up()
    quantizing = [modifier for modifier in modifiers if modifier.quantizes]
    if not quantizing:
        reading.refuse(
            (), "nothing is quantized; there must be a GPTQModifier, an AWQModifier or a QuantizationModifier."
        )
    for extra in quantizing[1:]:
        message = (
            f"{quantizing[0].kind} quantizes already, and Assay has one method for all Linears; keep one of the two."
        )
        reading.refuse(extra.location, message)
    reading.give_up()
    return _draft(reading, quantizing[0], modifiers, shape)


def _modifiers(reading: Reading) -> Iterator[Modifier]:
    """Every modifier in the order of the recipe; what is none is refused."""
    for stage, groups in reading.document.data.items():
        if not stage.endswith("_stage"):
            reading.refuse(
                (stage,), f"unknown key {shown(stage)}; a recipe of llm-compressor holds stages, such as default_stage."
            )
            continue
        for group, members in reading.mapping(groups, (stage,)).items():
            if group == "run_type" and members == "oneshot":
                continue
            if not group.endswith("_modifiers"):
                message = f"unknown key {shown(group)}; llm-compressor reads only keys that end in _modifiers, such as default_modifiers."
                reading.refuse((stage, group), message)
                continue
            for kind, fields in reading.mapping(members, (stage, group)).items():
                place: Location = (stage, group, kind)
                if kind not in _FIELDS:
                    why = _REFUSED.get(kind, "Assay does not know it")
                    allowed = ", ".join(_FIELDS)
                    reading.refuse(
                        place,
                        f"{kind} cannot be imported: {why}. Allowed: {allowed}. Remove it, or quantize without Assay.",
                    )
                    continue
                yield Modifier(kind, place, reading.mapping(fields, place))


def _check_fields(reading: Reading, modifier: Modifier) -> None:
    """Sort a modifier's fields into those that are read, those without a place in a recipe, and those that nobody knows."""
    for name, value in modifier.fields.items():
        place = modifier.place(name)
        if name in _FIELDS[modifier.kind] or name in _INERT or name.endswith("_") or value is None:
            continue
        if name in _OF_TRAINING:
            if value not in (0, -1):
                reading.refuse(place, f"{name} is of training; Assay quantizes after it. Remove this line.")
        elif name in _WITHOUT_PLACE:
            reading.leave_out(place, f"{_WITHOUT_PLACE[name]}.")
        else:
            reading.unknown(place, [*_FIELDS[modifier.kind], *_WITHOUT_PLACE, *_OF_TRAINING])


def _draft(reading: Reading, main: Modifier, modifiers: list[Modifier], shape: DecoderShape | None) -> Draft:
    groups = dict(_groups(reading, main))
    if not groups and not reading.problems:
        reading.refuse(main.location, f"{main.kind} has no targets, so nothing is quantized.")
    reading.give_up()
    remarks: dict[str, str] = {}
    rest: dict[str, Any] = {"method": "gptq" if main.kind == "GPTQModifier" else "rtn"}
    observer = _weight_observer(reading, main, groups)
    if (found := range_of(reading, observer, main.location)) is not None:
        rest["range"] = found
        if found == "minmax":
            remarks["range"] = "as there; activation_weighted, which is Assay's default, loses less"
    if main.kind == "GPTQModifier":
        rest |= _gptq(reading, main)
        remarks["correction"] = "as there, where nothing undoes the errors of earlier layers; Assay's default is 0.5"
    rest |= _transform(reading, main, modifiers)
    if (cache := main.fields.get("kv_cache_scheme")) is not None and is_fp8_cache(
        reading, cache, main.place("kv_cache_scheme")
    ):
        rest["kv_cache"] = "fp8"
    ignore = reading.texts(main.fields.get("ignore") or [], main.place("ignore"))
    reading.give_up()
    assigned = assign(reading, Targets(groups, ignore, main.location), shape)
    if assigned is None:
        raise RecipeError(reading.problems)
    overrides = assigned.overrides()
    quantize = assigned.base.words() | rest | ({"overrides": overrides} if overrides else {})
    return Draft(
        quantize,
        {"format": "compressed-tensors", "engine": "vllm"},
        chosen={
            "calibration": "the file names no text; take some like what will be served",
            "target": "the engine, which decides what is refused",
        },
        remarks=remarks,
    )


def _groups(reading: Reading, main: Modifier) -> Iterator[tuple[str, Chosen]]:
    """Target → its scheme, of a modifier that quantizes."""
    scheme, groups = main.fields.get("scheme"), main.fields.get("config_groups")
    if scheme is not None and groups is not None:
        reading.refuse(main.place("scheme"), "there are both scheme and config_groups; keep one of the two.")
    elif isinstance(scheme, str):
        targets = reading.texts(main.fields.get("targets", "Linear"), main.place("targets"))
        if (found := preset(reading, scheme, main.place("scheme"))) is not None:
            yield from ((target, found) for target in targets)
    elif scheme is not None:
        for name, targets in reading.mapping(scheme, main.place("scheme")).items():
            place = (*main.place("scheme"), name)
            if (found := preset(reading, name, place)) is not None:
                yield from ((target, found) for target in reading.texts(targets, place))
    elif groups is not None:
        for name, group in reading.mapping(groups, main.place("config_groups")).items():
            place = (*main.place("config_groups"), name)
            content = reading.mapping(group, place)
            for key in content:
                if key not in ("targets", "weights", "input_activations", "output_activations", "format"):
                    reading.unknown(
                        (*place, key), ("targets", "weights", "input_activations", "output_activations", "format")
                    )
            targets = reading.texts(content.get("targets"), (*place, "targets"))
            if (found := config_group(reading, content, place)) is not None:
                yield from ((target, found) for target in targets)
    else:
        reading.refuse(main.location, f"{main.kind} says no number format; add scheme, or config_groups.")


def _weight_observer(reading: Reading, main: Modifier, groups: dict[str, Chosen]) -> Any:
    """How the weights' ranges are found, as the modifier says, or all its groups; minmax where nothing does."""
    given = reading.mapping(main.fields.get("observer"), main.place("observer"))
    for name in ("input_observer", "output_observer"):
        if main.fields.get(name) is not None:
            reading.leave_out(main.place(name), INPUTS)
    if given.keys() - {"weights"}:
        reading.leave_out(main.place("observer"), INPUTS)
    own = given.get("weights", main.fields.get("weight_observer"))
    if own is not None:
        return own
    found = {chosen.observer or "minmax" for chosen in groups.values()}
    if len(found) > 1:
        reading.refuse(
            main.location,
            f"groups with different observers ({', '.join(sorted(found))}); Assay has one `range` for all.",
        )
    return next(iter(found), "minmax")


def _gptq(reading: Reading, main: Modifier) -> dict[str, Any]:
    damping = main.fields.get("dampening_frac")
    found: dict[str, Any] = {"correction": 0}
    if damping is not None:
        found = {"damping": reading.number(damping, main.place("dampening_frac"), 1e-9, 1)} | found
    order = main.fields.get("actorder", "static")
    if order not in ("static", "weight"):
        reading.leave_out(
            main.place("actorder"), "Assay takes the columns in order of input power, as with actorder: static."
        )
    return found


def _transform(reading: Reading, main: Modifier, modifiers: list[Modifier]) -> dict[str, Any]:
    """AWQ's or SmoothQuant's factors, which have to be found before anything is quantized."""
    found = [modifier for modifier in modifiers if modifier.kind in ("AWQModifier", "SmoothQuantModifier")]
    for modifier in found:
        if modifier.fields.get("mappings"):
            reading.leave_out(modifier.place("mappings"), f"{_MAPPINGS}.")
    for extra in found[1:]:
        reading.refuse(
            extra.location, f"{found[0].kind} is there already, and Assay has one transform; keep one of the two."
        )
    if not found:
        return {}
    modifier = found[0]
    if modifiers.index(modifier) > modifiers.index(main):
        reading.refuse(
            modifier.location, f"{modifier.kind} comes after {main.kind}, which has quantized by then; put it first."
        )
    if modifier.kind == "AWQModifier":
        return {"transform": "awq"}
    if modifier.fields.get("algorithm", "smoothquant") != "smoothquant":
        reading.refuse(
            modifier.place("algorithm"), f"algorithm: {shown(modifier.fields['algorithm'])}; allowed: smoothquant."
        )
    if modifier.fields.get("calibration_function") is not None:
        reading.refuse(modifier.place("calibration_function"), "a recipe names no functions; remove this line.")
    if modifier.fields.get("ignore"):
        reading.leave_out(modifier.place("ignore"), "Assay smooths wherever the architecture allows it.")
    strength = modifier.fields.get("smoothing_strength", 0.5)
    return {
        "transform": "smoothquant",
        "strength": reading.number(strength, modifier.place("smoothing_strength"), 0, 1),
    }
