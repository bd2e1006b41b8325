"""Walk a model layer by layer: only one layer's weights are in memory at a time.

transformers' own modules do the computing. The skeleton of the model is built without weights (accelerate); a layer gets its
weights from the checkpoint when its turn comes. What the layers are called with (embeddings as a family scales them, masks, rotary
embeddings) is learnt by running the skeleton with every layer replaced by a recorder.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import suppress
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel

from assay.errors import AssayError
from assay.models.checkpoint import Checkpoint
from assay.models.experts import SeparateExperts

# Embedding is done in pieces of so many tokens: transformers makes the masks for them too, which grow with each.
_TOKENS_AT_ONCE = 2048


class _AllRecorded(Exception):
    """The last layer has been reached: what would follow needs weights."""


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with, passes its input on."""

    hidden_states: Tensor
    arguments: dict[str, Any]

    def __init__(self, layer: nn.Module, last: bool) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self._names = list(inspect.signature(layer.forward).parameters)[1:]
        self._last = last

    def forward(self, hidden_states: Tensor, *positional: Any, **named: Any) -> Tensor:
        self.hidden_states = hidden_states
        self.arguments = dict(zip(self._names, positional, strict=False)) | named
        if self._last:
            raise _AllRecorded
        return hidden_states


class _Zeros(nn.Module):
    """Stands in for an embedding without weights."""

    def __init__(self, *shape: int) -> None:
        super().__init__()
        self._shape = shape

    def forward(self, *_positional: Any, **_named: Any) -> Tensor:
        return torch.zeros(self._shape)


class Decoder:
    """The parts of a decoder or an encoder, each loaded in float32 on request."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.shape.architecture
        try:
            config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
            config.use_cache = False
            with init_empty_weights(include_buffers=False):
                # None: PyTorch's own attention where the family supports it, whatever config.json asks for.
                model = AutoModel.from_config(config, dtype=torch.float32, attn_implementation=None)
        except Exception as error:
            # Any kind: what transformers raises for a wrong value depends on which value it is.
            raise AssayError(
                f"{checkpoint.directory}: transformers cannot build the model that config.json describes "
                f"({type(error).__name__}: {error})."
            ) from error
        self._skeleton = model.eval()
        self._layers = cast(nn.ModuleList, self._part(self.architecture.layers))

    @property
    def layer_count(self) -> int:
        return len(self._layers)

    def layer_name(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}"

    def embed(self, tokens: Tensor) -> Tensor:
        """What the first layer reads, float32 [batch, length, hidden], for int64 [batch, length]."""
        name = self.architecture.embedding_block or self.architecture.embedding
        block = self._loaded(copy.deepcopy(self._part(name)), name)
        rows = tokens.split(max(1, _TOKENS_AT_ONCE // tokens.shape[1]))
        return torch.cat([self._record(block, input_ids=part)[0].hidden_states for part in rows])

    def layer_arguments(self, batch: int, length: int, mask: Tensor | None = None) -> list[dict[str, Any]]:
        """The keyword arguments each layer is called with for batches of this shape.

        mask: int64 [batch, length], 0 where a text is padded; None: nowhere.
        """
        zeros = _Zeros(batch, length, self.checkpoint.shape.hidden_size)
        tokens = torch.zeros(batch, length, dtype=torch.int64)
        return [recorder.arguments for recorder in self._record(zeros, input_ids=tokens, attention_mask=mask)]

    def _record(self, embedding_block: nn.Module, **inputs: Tensor | None) -> list[_Recorder]:
        """Run the model with this embedding as far as its last layer; one recorder for each layer."""
        last = self.layer_count - 1
        recorders = [_Recorder(layer, index == last) for index, layer in enumerate(self._layers)]
        replaced = {
            self.architecture.embedding_block or self.architecture.embedding: embedding_block,
            self.architecture.layers: nn.ModuleList(recorders),
        }
        kept = {name: self._part(name) for name in replaced}
        for name, part in replaced.items():
            self._skeleton.set_submodule(self._path(name), part)
        try:
            with suppress(_AllRecorded):
                self._skeleton(**inputs)
        finally:
            for name, part in kept.items():
                self._skeleton.set_submodule(self._path(name), part)
        return recorders

    def layer(self, index: int) -> nn.Module:
        """One layer with its float weights, each expert's in Linears of its own."""
        layer = copy.deepcopy(self._layers[index])
        if self.architecture.experts and self.checkpoint.shape.experts[index]:
            path = self.architecture.experts.path
            layer.set_submodule(path, SeparateExperts.like(layer.get_submodule(path)))
        return self._loaded(layer, self.layer_name(index))

    def final_norm(self) -> nn.Module:
        """The norm before the head, with its weights."""
        name = self.architecture.final_norm
        return self._loaded(copy.deepcopy(self._part(name)), name) if name else nn.Identity()

    def _part(self, name: str) -> nn.Module:
        return self._skeleton.get_submodule(self._path(name))

    def _path(self, name: str) -> str:
        return self.architecture.module_path(name).removeprefix(f"{self.architecture.body}.")

    def _loaded(self, module: nn.Module, name: str) -> nn.Module:
        """Give an empty module its weights."""
        state = {
            key: self.checkpoint.tensor(self.architecture.hub_name(f"{name}.{key}"), tuple(parameter.shape))
            for key, parameter in module.state_dict().items()
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)
