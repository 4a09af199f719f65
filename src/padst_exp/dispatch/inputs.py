"""What reaches the layers of a model, seen by hooks."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Input:
    """What one call gave a layer, without the numbers.

    Args:
        shape: shape of x.
        order: dimensions of x from the slowest in memory to the fastest; token mixing and
            convolutions get others than 0, 1, 2.
        tokens: vectors that the layer multiplied: rows of x, output positions of a convolution.
        dtype: dtype of the product: autocast's, or that of the layer's parameters.
    """

    shape: tuple[int, ...]
    order: tuple[int, ...]
    tokens: int
    dtype: torch.dtype

    def random(self, generator: torch.Generator) -> Tensor:
        """Another such x, standard normal."""
        x = random([self.shape[dim] for dim in self.order], self.dtype, generator)
        return x.permute(*[self.order.index(dim) for dim in range(len(self.order))])


def inputs_of(run: Callable[[], object], layers: Mapping[str, nn.Module]) -> dict[str, list[Input]]:
    """The inputs of each call of `layers` (by name) while `run` runs; none of those not called."""
    seen: dict[str, list[Input]] = defaultdict(list)

    def watch(name: str) -> Callable[..., None]:
        def hook(
            layer: nn.Module, inputs: tuple[Tensor, ...], named: Mapping[str, Tensor], y: Tensor
        ) -> None:
            (x,) = (*inputs, *named.values())
            cast = torch.is_autocast_enabled(x.device.type)
            own = next(layer.parameters()).dtype
            order = sorted(range(x.dim()), key=lambda dim: -x.stride()[dim])
            seen[name].append(
                Input(
                    shape=tuple(x.shape),
                    order=tuple(range(x.dim()) if x.is_contiguous() else order),
                    tokens=y.numel() // int(layer.out_features),  # type: ignore[arg-type]
                    dtype=torch.get_autocast_dtype(x.device.type) if cast else own,
                )
            )

        return hook

    handles = [
        layer.register_forward_hook(watch(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def random(shape: Sequence[int], dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """Standard normal numbers, where the generator is: a CPU takes seconds for those of a GPU."""
    # Drawn in float32: not every device draws every dtype.
    return torch.randn(*shape, generator=generator, device=generator.device).to(dtype)
