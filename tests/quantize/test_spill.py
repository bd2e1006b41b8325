"""Activations that wait on disk: the same numbers, and no room on the disk is an error before anything is written to it."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter

from assay.models.checkpoint import Checkpoint
from assay.progress import Progress
from assay.quantize.model import quantize_model
from assay.quantize.spill import Spill
from assay.quantize.store import LayerStore
from assay.recipe import Quantize

GPTQ = {"method": "gptq", "scheme": "W4A16", "group_size": 32}
SMOOTH = {"method": "gptq", "scheme": "W8A8", "transform": "smoothquant"}


def quantized(model: Path, chosen: dict[str, Any], directory: Path) -> dict[str, bytes]:
    settings = TypeAdapter[Quantize](Quantize).validate_json(json.dumps(chosen))
    tokens = torch.randint(1, 512, (12, 256), generator=torch.Generator().manual_seed(9))
    quantize_model(Checkpoint(model), tokens, settings, LayerStore(directory), Progress())
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize(("family", "chosen"), [("llama", GPTQ), ("mixtral", GPTQ), ("qwen3", SMOOTH)])
def test_a_model_is_quantized_to_the_same_bytes(
    tiny_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    family: str,
    chosen: dict[str, Any],
) -> None:
    spills: list[Spill] = []

    def made(directory: Path) -> Spill:
        spills.append(Spill(directory))
        return spills[0]

    monkeypatch.setattr("assay.quantize.model.Spill", made)
    in_memory = quantized(tiny_model(family), chosen, tmp_path / "memory")
    assert not spills
    monkeypatch.setattr("assay.quantize.model.MEMORY_SHARE", 0.0)
    assert quantized(tiny_model(family), chosen, tmp_path / "disk") == in_memory
    hidden, layers, tokens = 64, 2, 12 * 256
    assert spills[0].spilled_bytes >= 4 * tokens * hidden * layers, "every layer's outputs were on the disk"


def test_who_holds_a_tensor_does_not_notice(tmp_path: Path) -> None:
    tensor = torch.randn(30, 50)
    view, before = tensor[3:7].T, tensor.clone()
    Spill(tmp_path)(tensor)
    assert torch.equal(tensor, before) and torch.equal(view, before[3:7].T)
    tensor.mul_(2)
    assert torch.equal(tensor, 2 * before)
    empty = torch.empty(0, 4)
    Spill(tmp_path)(empty)
    assert empty.shape == (0, 4)
    assert not any(tmp_path.iterdir()), "its file has no name that could stay behind"


def test_a_full_disk_is_an_error_and_not_a_crash(make_disk: Callable[[int], Any]) -> None:
    disk = make_disk(1 << 20)
    tensor = torch.randn(1 << 20)
    before = tensor.clone()
    with pytest.raises(OSError) as caught:
        Spill(disk.place)(tensor)
    assert caught.value.errno == errno.ENOSPC and torch.equal(tensor, before)
