"""Which modules get which scheme: llm-compressor's targets and ignore list as one scheme and its overrides.

There, a module has the scheme of the most specific target that means it: its name, then an expression, then its class; unless an entry of
`ignore` means it. Here, the first override that matches decides. That both choose the same is checked on every Linear of the
model, or, where that is not on this machine, of decoders of every family that is known here.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Mapping
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
# Enough layers that numbers of one and of two digits occur.
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
    modules = _names(shape) if shape else _names_of_families()
    read = {target: _globs(reading, target, targets.location) for target in (*targets.ignore, *targets.specific)}
    rules: list[tuple[str, Chosen | None]] = []
    for target, found in {} if reading.problems else read.items():
        if any(matches(target, names) for names in modules.values()):
            rules += [(_simplest(glob, modules), targets.schemes.get(target)) for glob in found]
        elif target in targets.ignore and target != _CLASS:
            reading.leave_out((*targets.location, "ignore"), f"{shown(target)} means no Linear that Assay quantizes.")
        elif target in targets.ignore:
            reading.refuse((*targets.location, "ignore"), "every Linear is ignored, so nothing is quantized.")
        else:
            reading.refuse(
                targets.location, f"the target {shown(target)} means no Linear that Assay quantizes; remove it."
            )
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


@cache
def _names_of_families() -> dict[str, tuple[str, ...]]:
    """The same of a decoder of every family, by its names in a checkpoint alone."""
    config = dict.fromkeys(_SIZES, 8) | {"num_hidden_layers": _LAYERS, "num_experts": _EXPERTS}
    shapes = (decoder_shape(config | {"architectures": [row]}, row) for row in ARCHITECTURES)
    return {linear.name: (linear.name,) for shape in shapes for linear in shape.linears}
