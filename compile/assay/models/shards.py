"""Write tensors as a Hugging Face directory's safetensors, shard by shard: no more than one is in memory."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from assay.files import readable_json
from assay.models.checkpoint import INDEX, SINGLE

SHARD_BYTES = 2 << 30


@dataclass
class _Shards:
    """Safetensors files of at most SHARD_BYTES each, one written when the next begins."""

    destination: Path
    names: list[list[str]] = field(default_factory=list[list[str]])
    pending: dict[str, Tensor] = field(default_factory=dict[str, Tensor])
    pending_bytes: int = 0

    def add(self, name: str, tensor: Tensor) -> None:
        if self.pending_bytes + tensor.nbytes > SHARD_BYTES:
            self.flush()
        self.pending[name] = tensor.clone(memory_format=torch.contiguous_format)
        self.pending_bytes += tensor.nbytes

    def flush(self) -> None:
        if self.pending:
            path = self.path(len(self.names))
            save_file(self.pending, path, metadata={"format": "pt"})
            path.chmod(0o644)
            self.names.append(list(self.pending))
        self.pending, self.pending_bytes = {}, 0

    def path(self, index: int) -> Path:
        return self.destination / f"shard-{index}.safetensors"


def save_shards(tensors: Iterable[tuple[str, Tensor]], destination: Path) -> None:
    """Write safetensors, in shards, with an index when there is more than one."""
    shards, total = _Shards(destination), 0
    for name, tensor in tensors:
        shards.add(name, tensor)
        total += tensor.nbytes
    shards.flush()
    count = len(shards.names)
    if count == 1:
        shards.path(0).rename(destination / SINGLE)
        return
    placed: dict[str, str] = {}
    for index, names in enumerate(shards.names):
        file = f"model-{index + 1:05d}-of-{count:05d}.safetensors"
        shards.path(index).rename(destination / file)
        placed |= dict.fromkeys(names, file)
    (destination / INDEX).write_bytes(readable_json({"metadata": {"total_size": total}, "weight_map": placed}))
