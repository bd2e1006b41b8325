"""What turns an encoder's hidden states into one embedding of a text, as sentence-transformers' files beside a model declare it.

    modules.json                 which modules follow the encoder: pooling, then perhaps a normalization
    1_Pooling/config.json        how tokens are pooled
    sentence_bert_config.json    how many tokens of a text are read

A directory without modules.json is pooled by the mean and not normalized, which is what sentence-transformers does with it.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from assay.errors import IntegrityError, NotSupportedError, UsageError
from assay.files import read_json

POOLING_FILE = "1_Pooling/config.json"
Pooled = Literal["mean", "cls"]
_MODULES, _LENGTHS = "modules.json", "sentence_bert_config.json"
# The names that configurations had before there was one `pooling_mode`.
_FLAGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
_FOLLOWING = ("Transformer", "Pooling", "Normalize")


@dataclass(frozen=True)
class SentenceSettings:
    """pooling: over the tokens that are no padding, or the first one.  max_tokens: None where the files do not say."""

    pooling: Pooled = "mean"
    normalize: bool = False
    max_tokens: int | None = None


def read_sentence_settings(directory: Path) -> SentenceSettings:
    """The settings of a model directory; NotSupportedError for what cannot be part of the graph."""
    path = directory / _MODULES
    if not path.is_file():
        return SentenceSettings()
    modules = read_json(path)
    if not isinstance(modules, list) or not all(isinstance(one, dict) for one in modules):
        raise IntegrityError(f"{path}: damaged: it holds no list of modules. Fetch the model again.")
    kinds = [str(one.get("type", "")).rpartition(".")[2] for one in modules]
    if unknown := [kind for kind in kinds if kind not in _FOLLOWING]:
        raise NotSupportedError(
            f"{path}: the module {unknown[0]} follows the encoder, which the compiled graph would lack; supported: "
            f"{', '.join(_FOLLOWING)}."
        )
    pooling = next((one for one, kind in zip(modules, kinds, strict=True) if kind == "Pooling"), None)
    mode: Pooled = "mean" if pooling is None else _mode(directory, pooling)
    return SentenceSettings(mode, "Normalize" in kinds, _max_tokens(directory))


def _mode(directory: Path, module: dict[str, Any]) -> Pooled:
    path = directory / POOLING_FILE
    if module.get("path") != POOLING_FILE.partition("/")[0] or not path.is_file():
        raise UsageError(
            f"{directory}: {_MODULES} names a pooling whose {POOLING_FILE} is not there; take all of the model."
        )
    config = read_json(path)
    config = config if isinstance(config, dict) else {}
    declared = config.get("pooling_mode")
    modes = (
        [declared]
        if isinstance(declared, str)
        else [
            _FLAGS.get(name, name.removeprefix("pooling_mode_"))
            for name, value in config.items()
            if name.startswith("pooling_mode_") and value is True
        ]
    )
    if len(modes) != 1 or modes[0] not in get_args(Pooled):
        shown = " and ".join(map(str, modes)) or "nothing"
        raise NotSupportedError(f"{path}: it pools by {shown}; supported: {', '.join(get_args(Pooled))}.")
    return cast(Pooled, modes[0])


def _max_tokens(directory: Path) -> int | None:
    path = directory / _LENGTHS
    config = read_json(path) if path.is_file() else {}
    length = config.get("max_seq_length") if isinstance(config, dict) else None
    return length if isinstance(length, int) and length > 0 else None
