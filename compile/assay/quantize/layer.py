"""A decoder's layer in memory, its Linears found by the names that checkpoints use and replaced by their quantized forms."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import cast

from torch import Tensor, nn

from assay.models.architectures import DecoderShape
from assay.models.decoder import Decoder
from assay.quantize.activations import quantize_inputs
from assay.quantize.schemes import ActivationScheme, WeightScheme
from assay.quantize.statistics import Seen
from assay.quantize.store import QuantizedModule


def quantizing(activations: ActivationScheme, input_scale: Tensor | None) -> Seen:
    return lambda values: quantize_inputs(values, activations, input_scale)


@dataclass(frozen=True)
class LoadedLayer:
    """A loaded layer, its parts found by the names that checkpoints use."""

    module: nn.Module
    prefix: str
    index: int
    shape: DecoderShape
    seen: dict[str, Seen] = field(default_factory=dict[str, Seen])

    @staticmethod
    def of(decoder: Decoder, index: int) -> LoadedLayer:
        return LoadedLayer(decoder.layer(index), decoder.layer_name(index), index, decoder.checkpoint.shape)

    def float_twin(self, share: bool) -> nn.Module:
        """The layer again. share: its weights have the same memory, so they must be replaced, never written to."""
        shared = {
            id(parameter): nn.Parameter(parameter.data, requires_grad=False) for parameter in self.module.parameters()
        }
        return copy.deepcopy(self.module, dict(shared) if share else {})

    def put(self, name: str, module: QuantizedModule) -> None:
        """Make a Linear compute as its quantized form does."""
        self.linear(name).weight.data = module.weight.dequantize()
        activations = module.weight.scheme.activations
        if activations is not None:
            self.seen[name] = quantizing(activations, module.input_scale)

    def quantize_inputs(self, schemes: Mapping[str, WeightScheme]) -> None:
        """Let the Linears whose scheme says so quantize their inputs, once they are `put`.

        Asked before the layer runs: PyTorch does not call hooks that are added while it waits in an earlier one.
        """

        def hook(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], Tensor | None]:
            return lambda _module, inputs: self.seen[name](inputs[0]) if name in self.seen else None

        for group in self.groups(schemes):
            for name in group:
                if schemes[f"{self.prefix}.{name}"].activations is not None:
                    self.linear(name).register_forward_pre_hook(hook(name))

    def path(self, name: str) -> str:
        """Where transformers keeps what the checkpoint calls `name`, within the layer."""
        return self.shape.architecture.module_path(name)

    def linear(self, name: str) -> nn.Linear:
        return cast(nn.Linear, self.module.get_submodule(self.path(name)))

    def is_expert(self, name: str) -> bool:
        experts = self.shape.architecture.experts
        return experts is not None and self.path(name).startswith(f"{experts.path}.")

    def groups(self, schemes: Mapping[str, WeightScheme]) -> list[list[str]]:
        """Linears that are to be quantized and share an input, in order of execution."""
        groups = [
            [name for name in group if f"{self.prefix}.{name}" in schemes] for group in self.shape.groups(self.index)
        ]
        return [group for group in groups if group]
