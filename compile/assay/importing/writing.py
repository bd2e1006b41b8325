"""A draft as the text of a recipe, with comments that say what was chosen and what was not carried over."""

from __future__ import annotations

import json
import re
from typing import Any

from assay.errors import Problem
from assay.importing.reading import Draft
from assay.recipe_yaml import scalar

# Text that means no more and no less to every reader of YAML: not a number, not a word such as `no`, nothing that begins with a mark.
_PLAIN = re.compile(r"[A-Za-z_./][\w./:-]*[\w./-]|[A-Za-z_]")
_WIDTH = 118

# Metrics that say whether a decoder is still itself. Their numbers of samples can settle the gates below for a model that loses little.
_QUALITY = [
    {"metric": "kl_divergence", "tokens": 20000},
    {"metric": "top1_agreement", "tokens": 20000},
    {"metric": "cloze_accuracy", "samples": 1300},
]
# Windows that need no data set, and are what the demo calibrates on.
_CALIBRATION: dict[str, Any] = {"source": "python-docs", "samples": 64, "length": 512, "seed": 0}
_FOUR_BITS = ("W4A16", "W4A16_ASYM", "NVFP4A16", "NVFP4", "MXFP4A16", "MXFP4")


def complete(draft: Draft, model: dict[str, Any], name: str, context_length: int) -> dict[str, Any]:
    """The whole recipe: the draft, and what it leaves open.  context_length: the model's, 0 where it is not known."""
    window = min(_CALIBRATION["length"], context_length or _CALIBRATION["length"])
    schemes = {draft.quantize["scheme"], *(override["scheme"] for override in draft.quantize.get("overrides", []))}
    four_bits = bool(schemes & set(_FOUR_BITS))
    size = 0.95 if "none" in schemes else 0.6 if four_bits else 0.8
    return {
        "version": 1,
        "name": name,
        "model": model,
        "calibration": draft.calibration or _CALIBRATION | {"length": window},
        "quantize": draft.quantize,
        "target": draft.target,
        "evaluate": ({} if window == _CALIBRATION["length"] else {"length": window})
        | {"quality": _QUALITY, "speed": [{"metric": "size_on_disk"}]},
        "gate": {
            "kl_divergence": {"max": 0.1 if four_bits else 0.05},
            "cloze_accuracy": {"max_drop": 0.04},
            "size_on_disk": {"max_ratio": size},
        },
    }


def render(recipe: dict[str, Any], draft: Draft, origin: str, left_out: tuple[Problem, ...]) -> str:
    """The recipe's text.  origin: which file it comes from, and of which kind."""
    lines = [
        f"# From {_comment(origin)}, by `assay import`. What is marked as chosen is not in that file: look at it first."
    ]
    if left_out:
        lines.append("# Not carried over:")
        lines += [f"#   line {problem.line}: {_comment(problem.message)}" for problem in left_out]
    chosen = draft.chosen | {
        "evaluate": "what can be measured without a data set",
        "gate": "margins for a first run; set them to what your service can bear",
    }
    for key, value in recipe.items():
        remark = f"  # chosen: {chosen[key]}" if key in chosen else ""
        if key in ("version", "name"):
            lines.append(f"{key}: {_scalar(value)}")
        elif key in ("calibration", "target"):
            lines.append(f"{key}: {_flow(value)}{remark}")
        else:
            lines.append(f"{key}:{remark}")
            lines += _block(value, draft.remarks if key == "quantize" else {})
    return "\n".join([*lines, "# publish: {registry: artifacts/store, tags: [latest]}", ""])


def _block(content: dict[str, Any], remarks: dict[str, str]) -> list[str]:
    lines: list[str] = []
    for key, value in content.items():
        if isinstance(value, list):
            lines.append(f"  {key}:")
            lines += [f"    - {_flow(item)}" for item in value]
        else:
            shown = _flow(value) if isinstance(value, dict) else _scalar(value)
            lines.append(f"  {key}: {shown}" + (f"  # {remarks[key]}" if key in remarks else ""))
    return lines


def _flow(content: dict[str, Any]) -> str:
    return "{" + ", ".join(f"{key}: {_scalar(value)}" for key, value in content.items()) + "}"


def _scalar(value: Any) -> str:
    if isinstance(value, str) and _PLAIN.fullmatch(value) and scalar(value) == value:
        return value
    return json.dumps(value, ensure_ascii=False)


def _comment(text: str) -> str:
    """Text of a foreign file on one line, so that none of it can leave the comment."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return printable if len(printable) <= 400 else f"{printable[:396]} ..."
