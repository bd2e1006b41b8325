"""Walk a decoder layer by layer: only one layer's weights are in memory at a time.

transformers' own modules do the computing. The skeleton of the model is built without weights (accelerate); a layer gets its
weights from the checkpoint when its turn comes. What each layer is called with (masks, rotary embeddings) is learnt by running
the skeleton once with every layer replaced by a recorder.
"""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from assay.errors import AssayError
from assay.models.checkpoint import Checkpoint


class _Recorder(nn.Module):
    """Stands in for a layer: keeps what it is called with, passes its input on."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.attention_type = getattr(layer, "attention_type", None)
        self.arguments: dict[str, Any] = {}

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        self.arguments = arguments
        return hidden_states


class Decoder:
    """The parts of a decoder, each loaded in float32 on request."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint
        self.architecture = checkpoint.shape.architecture
        try:
            config = AutoConfig.from_pretrained(checkpoint.directory, trust_remote_code=False)
            config.use_cache = False
            with init_empty_weights(include_buffers=False):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
        except Exception as error:
            # Any kind: what transformers raises for a wrong value depends on which value it is.
            raise AssayError(
                f"{checkpoint.directory}: transformers cannot build the model that config.json describes "
                f"({type(error).__name__}: {error})."
            ) from error
        self._skeleton = model.eval()
        self._layers = cast(nn.ModuleList, self._skeleton.get_submodule(self.architecture.layers))

    @property
    def layer_count(self) -> int:
        return len(self._layers)

    def layer_name(self, index: int) -> str:
        return f"{self.architecture.layers}.{index}"

    def embed(self, tokens: Tensor) -> Tensor:
        """float32 [batch, length, hidden] of int64 [batch, length]."""
        weight = self.checkpoint.weight(self.architecture.embedding)
        return nn.functional.embedding(tokens, weight)

    def layer_arguments(self, batch: int, length: int) -> list[dict[str, Any]]:
        """The keyword arguments each layer is called with for batches of this shape."""
        recorders = nn.ModuleList(_Recorder(layer) for layer in self._layers)
        body_name, _, list_name = self.architecture.layers.rpartition(".")
        body = cast(Any, self._skeleton.get_submodule(body_name))
        hidden = torch.zeros(batch, length, self.checkpoint.shape.hidden_size)
        setattr(body, list_name, recorders)
        norm_name = self.architecture.final_norm.rpartition(".")[2]
        norm = getattr(body, norm_name)
        setattr(body, norm_name, nn.Identity())
        try:
            body(inputs_embeds=hidden, use_cache=False)
        finally:
            setattr(body, list_name, self._layers)
            setattr(body, norm_name, norm)
        return [cast(_Recorder, recorder).arguments for recorder in recorders]

    def layer(self, index: int) -> nn.Module:
        """One layer with its float weights."""
        return self._loaded(self._layers[index], self.layer_name(index))

    def final_norm(self) -> nn.Module:
        """The norm before the head, with its weights."""
        return self._loaded(self._skeleton.get_submodule(self.architecture.final_norm), self.architecture.final_norm)

    def _loaded(self, empty: nn.Module, name: str) -> nn.Module:
        module = copy.deepcopy(empty)
        state = {
            key: self.checkpoint.tensor(f"{name}.{key}", tuple(parameter.shape))
            for key, parameter in module.state_dict().items()
        }
        module.load_state_dict(state, strict=True, assign=True)
        return module.requires_grad_(False)
