"""Run a layer for many batches in lockstep, pausing before chosen Linears.

A layer's Linears must be quantized one after another, each on inputs that the ones before it, already quantized, produced. To
compute every product only once, each batch runs the layer's own forward in a greenlet that pauses when it reaches the next
Linear; when all batches wait there, the Linear is quantized and they go on. No assumption is made about what lies between.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from greenlet import getcurrent, greenlet
from torch import Tensor, nn

from assay.host import release_free_memory


class SteppedLayer:
    """One layer's forward over several batches, stopped before each of the named Linears in turn."""

    def __init__(
        self,
        layer: nn.Module,
        stops: Sequence[str],
        batches: Sequence[Tensor],
        arguments: Sequence[dict[str, Any]],
        keep: Callable[[Tensor], None] | None = None,
    ) -> None:
        """arguments: the layer's keyword arguments for each batch.  keep: called with every tensor that will wait for the other batches."""
        self._keep, self._layer = keep, layer
        self._scheduler = getcurrent()
        self._handles = [
            layer.get_submodule(name).register_forward_pre_hook(self._pause(name), prepend=True) for name in stops
        ]
        self._runs = [
            greenlet(lambda batch=batch, given=given: _output(layer(batch, **given)))
            for batch, given in zip(batches, arguments, strict=True)
        ]
        self._waiting: list[tuple[str, Tensor] | Tensor] = [self._step(run) for run in self._runs]

    def _step(self, run: greenlet) -> tuple[str, Tensor] | Tensor:
        """Let a batch go on to its next stop or to the end."""
        reached: tuple[str, Tensor] | Tensor = run.switch()
        if self._keep:
            self._keep(reached[1] if isinstance(reached, tuple) else reached)
        return reached

    def _pause(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._scheduler.switch((name, inputs[0]))

        return hook

    def inputs(self, name: str) -> list[Tensor]:
        """What each batch is about to put into the named Linear: [tokens, in] each."""
        result: list[Tensor] = []
        for waiting in self._waiting:
            if not isinstance(waiting, tuple) or waiting[0] != name:
                reached = waiting[0] if isinstance(waiting, tuple) else "the end"
                raise RuntimeError(f"expected the layer to reach {name}, but it reached {reached}")
            result.append(waiting[1].reshape(-1, waiting[1].shape[-1]))
        return result

    def through(self, name: str) -> list[Tensor]:
        """Resume from before the named Linear, and return what it makes of each batch: [tokens, out] each."""
        outputs: list[Tensor] = []

        def hook(_module: nn.Module, _inputs: tuple[Tensor, ...], output: Tensor) -> None:
            outputs.append(output.reshape(-1, output.shape[-1]))
            if self._keep:
                self._keep(outputs[-1])

        handle = self._layer.get_submodule(name).register_forward_hook(hook)
        self.resume()
        handle.remove()
        return outputs

    def resume(self) -> None:
        """Let every batch go on to its next stop or to the end."""
        for index, run in enumerate(self._runs):
            self._waiting[index] = self._step(run)
        # What waits lies between what came and went.
        release_free_memory()

    def outputs(self) -> list[Tensor]:
        """The layer's outputs; every batch must have reached the end."""
        for waiting in self._waiting:
            if isinstance(waiting, tuple):
                raise RuntimeError(f"expected the layer to reach the end, but it reached {waiting[0]}")
        for handle in self._handles:
            handle.remove()
        return [waiting for waiting in self._waiting if isinstance(waiting, Tensor)]


def _output(result: Any) -> Tensor:
    return result[0] if isinstance(result, tuple) else result
