"""Activations of the calibration text on disk, where they would take too much of the memory.

A spilled tensor is a mapping of a file that has no name any more: the system writes it out when memory runs short and reads it back
when it is used, and its room on the disk is free again when the tensor is gone, however the process ends.
"""

from __future__ import annotations

import mmap
import os
import tempfile
from pathlib import Path

import torch
from torch import Tensor

# Of the machine's memory. Weights, Gram matrices and the rest of the machine want some, too.
MEMORY_SHARE = 0.25


def activation_bytes(tokens: float, hidden_size: int, widest: int) -> float:
    """What a layer's walk holds of so many float32 tokens: its input, what waits before the widest Linear, and what else is in between."""
    return 4 * tokens * (2 * hidden_size + widest)


class Spill:
    """Moves tensors to files of a directory, in place: whoever holds them does not notice."""

    def __init__(self, directory: Path) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self.spilled_bytes = 0

    def __call__(self, tensor: Tensor) -> None:
        """OSError when the disk is full: its room is taken at once, not when it is written to."""
        if not tensor.nbytes:
            return
        with tempfile.TemporaryFile(dir=self._directory) as file:
            os.posix_fallocate(file.fileno(), 0, tensor.nbytes)
            room = mmap.mmap(file.fileno(), tensor.nbytes)
        mapped = torch.frombuffer(room, dtype=tensor.dtype).view(tensor.shape)
        mapped.copy_(tensor)
        tensor.data = mapped
        self.spilled_bytes += tensor.nbytes
