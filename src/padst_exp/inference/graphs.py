"""CUDA graphs: a forward pass of small batches as one launch."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

# Runs before the capture, so that kernels are compiled and libraries have their workspaces.
WARM_UP = 3


class Graphed(nn.Module):
    """Replays a captured forward pass for inputs like the example, and calls the model for others.

    Made by `graphed`. The weights may change in place, but nothing else of the model.
    """

    def __init__(
        self, model: nn.Module, graph: torch.cuda.CUDAGraph, inputs: Tensor, outputs: Tensor
    ) -> None:
        super().__init__()
        self.model = model
        self._graph, self._inputs, self._outputs = graph, inputs, outputs

    def forward(self, x: Tensor) -> Tensor:
        """A tensor of its own, which the next replay does not overwrite. Not differentiable."""
        ours = self._inputs
        if (x.shape, x.dtype, x.device) != (ours.shape, ours.dtype, ours.device):
            return cast(Tensor, self.model(x))
        ours.copy_(x)
        self._graph.replay()
        return self._outputs.clone()


@torch.no_grad()
def graphed(model: nn.Module, example: Tensor) -> Graphed:
    """Capture a forward pass of `model`, tuned already, for inputs like `example`.

    Args:
        model: in eval mode, maps one tensor to one tensor.
        example: on a GPU.

    Raises:
        ValueError: `example` is not on a GPU.
    """
    if not example.is_cuda:
        raise ValueError(f"graphed: CUDA graphs need a GPU, the example is on {example.device}")
    inputs = example.detach().clone()
    stream = torch.cuda.Stream(example.device)
    stream.wait_stream(torch.cuda.current_stream(example.device))
    with torch.cuda.stream(stream):
        for _ in range(WARM_UP):
            model(inputs)
    torch.cuda.current_stream(example.device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outputs = model(inputs)
    return Graphed(model, graph, inputs, outputs)
