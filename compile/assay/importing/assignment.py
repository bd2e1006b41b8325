"""Which modules get which scheme: llm-compressor's targets and ignore list as one scheme and its overrides.

There, a module has the scheme of the most specific target that means it: its name, then an expression, then its class; unless an entry of
`ignore` means it. Here, the first override that matches decides. That both choose the same is checked on every Linear of the
model, or, where that is not on this machine, of decoders of every family that is known here.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from assay.importing.patterns import UnreadableError, globs, is_expression, matches
from assay.importing.reading import Reading, shown
from assay.importing.schemes import Chosen
from assay.models.architectures import ARCHITECTURES, DecoderShape, decoder_shape
from assay.recipe_yaml import Location

_CLASS = "Linear"
_HEAD = "lm_head"
# Enough layers that numbers of one and of two digits occur; those that targets name are added.
_LAYERS, _EXPERTS = 24, 2
_SIZES = (
    "hidden_size",
    "intermediate_size",
    "moe_intermediate_size",
    "vocab_size",
    "num_attention_heads",
    "num_key_value_heads",
)


@dataclass(frozen=True)
class Targets:
    """What a modifier says of modules.

    schemes: target → its scheme.  ignore: what stays unquantized.  location: of the modifier.
    """

    schemes: dict[str, Chosen]
    ignore: list[str]
    location: Location

    @property
    def specific(self) -> list[str]:
        """Targets other than the class, in the order in which they decide."""
        return sorted(self.schemes.keys() - {_CLASS}, key=lambda target: (is_expression(target), target))

    def ignores(self, names: tuple[str, ...]) -> bool:
        return any(matches(target, names) for target in self.ignore)

    def scheme(self, names: tuple[str, ...]) -> Chosen | None:
        """What the Linear of these names gets."""
        if self.ignores(names):
            return None
        found = next((target for target in self.specific if matches(target, names)), _CLASS)
        return self.schemes.get(found)


@dataclass(frozen=True)
class Assigned:
    """The scheme of `quantize`, and globs with what the modules that match get instead; the first match decides."""

    base: Chosen
    rules: tuple[tuple[str, Chosen | None], ...]

    def scheme(self, name: str) -> Chosen | None:
        default = None if name == _HEAD else self.base
        return next((chosen for glob, chosen in self.rules if fnmatch.fnmatchcase(name, glob)), default)

    def overrides(self) -> list[dict[str, Any]]:
        return [{"match": glob} | (chosen.words() if chosen else {"scheme": "none"}) for glob, chosen in self.rules]


def assign(reading: Reading, targets: Targets, shape: DecoderShape | None) -> Assigned | None:
    """The same in a recipe's words; None when something was refused.  shape: the model's, where it is on this machine."""
    said = [(target, None) for target in targets.ignore]
    said += [(target, targets.schemes[target]) for target in targets.specific]
    read = [(target, _globs(reading, target, targets.location), chosen) for target, chosen in said]
    if reading.problems:
        return None
    modules = _names(shape) if shape else _names_of_families(_numbers(target for target, _ in said))
    rules: list[tuple[str, Chosen | None]] = []
    for target, found, chosen in read:
        if any(matches(target, names) for names in modules.values()):
            rules += [(_simplest(glob, modules), chosen) for glob in found]
        elif chosen is not None:
            message = f"the target {shown(target)} means no Linear that Assay quantizes; remove it."
            reading.refuse(targets.location, message)
        elif target == _CLASS:
            reading.refuse((*targets.location, "ignore"), "every Linear is ignored, so nothing is quantized.")
        else:
            reading.leave_out((*targets.location, "ignore"), f"{shown(target)} means no Linear that Assay quantizes.")
    if reading.problems:
        return None
    base = targets.schemes.get(_CLASS)
    if base is None:
        base = targets.schemes[targets.specific[0]]
        rules.append(("*", None))
    elif _HEAD in modules and not targets.ignores((_HEAD,)):
        rules.append((_HEAD, base))
    if not any(matches(target, (_HEAD,)) for target in targets.specific):
        # It stays as it is without being named.
        rules = [(glob, chosen) for glob, chosen in rules if chosen or _matching(glob, modules) != [_HEAD]]
    assigned = Assigned(base, tuple(rule for rule in rules if _matching(rule[0], modules)))
    for name, names in modules.items():
        wanted, given = targets.scheme(names), assigned.scheme(name)
        if (wanted and wanted.words()) != (given and given.words()):
            how = "Write them with .* alone, or name the modules."
            message = f"targets and ignore cannot be said with globs: {name} would come out otherwise. {how}"
            reading.refuse(targets.location, message)
            return None
    return assigned


def _simplest(glob: str, modules: Mapping[str, tuple[str, ...]]) -> str:
    """A glob that is easier to read and matches the same modules: a dot of an expression usually means a dot."""
    dotted, wanted = glob.replace("?", "."), _matching(glob, modules)
    return next(simpler for simpler in (dotted.rstrip("*"), dotted, glob) if _matching(simpler, modules) == wanted)


def _matching(glob: str, modules: Mapping[str, tuple[str, ...]]) -> list[str]:
    return [name for name in modules if fnmatch.fnmatchcase(name, glob)]


def _globs(reading: Reading, target: str, location: Location) -> tuple[str, ...]:
    """The globs of a target; () when it was refused."""
    try:
        return globs(target)
    except UnreadableError as reason:
        wanted = "Write it with letters, .*, [...] and (a|b), or name the modules."
        reading.refuse(location, f"the expression {shown(target)} is not read: {reason}. {wanted}")
        return ()


def _names(shape: DecoderShape) -> dict[str, tuple[str, ...]]:
    """Every Linear's name in the checkpoint → all its names: transformers may have another, which is the one that targets mean."""
    path = shape.architecture.module_path
    return {linear.name: tuple(dict.fromkeys((linear.name, path(linear.name)))) for linear in shape.linears}


def _numbers(targets: Iterable[str]) -> frozenset[int]:
    """Numbers of layers and experts that targets may mean, besides the first few."""
    numbers: set[int] = set()
    for target in targets:
        for word in re.findall(r"[0-9]{1,4}", target):
            numbers.add(int(word))
            if is_expression(target):
                # Another digit may follow, as in 1[0-5].
                numbers.update(range(int(word) * 10, int(word) * 10 + 10))
    return frozenset(numbers)


def _names_of_families(numbers: frozenset[int]) -> dict[str, tuple[str, ...]]:
    """The same of a decoder of every family, by its names in a checkpoint alone."""
    layers, experts = numbers | frozenset(range(_LAYERS)), numbers | frozenset(range(_EXPERTS))
    return {
        (name := form.format(layer=layer, expert=expert)): (name,)
        for form in _forms()
        for layer in (layers if "{layer}" in form else (0,))
        for expert in (experts if "{expert}" in form else (0,))
    }


@cache
def _forms() -> tuple[str, ...]:
    """Names of Linears in all families, with {layer} and {expert} for the numbers in them."""
    config = dict.fromkeys((*_SIZES, "num_hidden_layers", "num_experts"), 1)
    shapes = (decoder_shape(config | {"architectures": [row]}, row) for row in ARCHITECTURES)
    names = (linear.name.replace(".layers.0.", ".layers.{layer}.") for shape in shapes for linear in shape.linears)
    return tuple(dict.fromkeys(name.replace(".experts.0.", ".experts.{expert}.") for name in names))
