"""One sparse weight with activations, and what must come out: plain PyTorch in float64."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import linear

from padst_exp.bench.configurations import Shape, describe
from padst_exp.bench.timing import reason
from padst_exp.bench.topology import Topology
from padst_exp.structures import Structure, gather_entries, scatter_entries

# What two roundings of a result may differ by where a dense product happens to be exact.
EXACT = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}
PASSES = ("forward", "dX", "dW")


@dataclass(frozen=True)
class Check:
    """One comparison.

    Args:
        kernel: as rows of timings name its form.
        structure: of the weight.
        what: pass, layout and epilogue, tokens and shape.
        dtype: of weights and activations.
        error: relative, in the Frobenius norm; infinite where the kernel did not run.
        limit: at which it passes.
        note: why it did not run.
    """

    kernel: str
    structure: str
    what: str
    dtype: str
    error: float
    limit: float
    note: str = ""

    @property
    def passed(self) -> bool:
        """False for results that are no numbers, too."""
        return self.error <= self.limit

    @property
    def backward(self) -> bool:
        """Whether it is about a gradient."""
        return not self.what.startswith(PASSES[0])


class Case:
    """One weight, plain and with both sides permuted, and activations, all random from seed 0.

    Args:
        structure: of each projection.
        shape: of the layer.
        density: of the weight.
        num_tokens: rows of x.
        dtype: of values and activations.
        device: of all of them.

    Raises:
        UserError: the structure cannot hold that density in this shape.
    """

    def __init__(
        self,
        structure: Structure,
        shape: Shape,
        density: float,
        num_tokens: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        rows, columns = shape.out_features // shape.split, shape.in_features
        layout = structure.layout(rows, columns, density)
        self.shape, self.dtype, self.device = shape, dtype, device
        self.structure, self.name = structure, describe(structure)
        self.layouts = [layout] * shape.split
        self.tile_shape = layout.tile_shape
        self.generator = torch.Generator().manual_seed(0)
        self.permuted = Topology(
            structure,
            self.layouts,
            [layout.random_units(self.generator).to(device) for _ in self.layouts],
            self._permutation(columns),
            [self._permutation(rows) for _ in self.layouts],
        )
        self.plain = self.permuted.plain()
        # What the padding of ragged frames holds must not matter.
        inside = self.plain.entries() < shape.out_features * columns
        size = layout.num_active, layout.unit_size
        flat = self.random(len(inside)) * inside
        self.values = [part.view(size) for part in flat.chunk(shape.split)]
        self.x, self.dy = (
            self.random(num_tokens, columns),
            self.random(num_tokens, rows * shape.split),
        )

    def random(self, *size: int) -> Tensor:
        """Normal."""
        return torch.randn(*size, generator=self.generator).to(self.device, self.dtype)

    def _permutation(self, size: int) -> Tensor:
        return torch.randperm(size, generator=self.generator).to(self.device)

    def weight(self, dtype: torch.dtype, topology: Topology) -> Tensor:
        """P_out S P_in, dense."""
        flat = torch.cat([values.flatten() for values in self.values]).to(dtype)
        return scatter_entries(flat, topology.entries(), topology.shape)

    def differentiated(
        self, product: Callable[[Tensor, Sequence[Tensor]], Tensor], x: Tensor, dy: Tensor
    ) -> list[Tensor]:
        """y, dX and the gradient of all values of a product."""
        leaf = x.detach().requires_grad_()
        values = [part.detach().requires_grad_() for part in self.values]
        y = product(leaf, values)
        dx, *dvalues = torch.autograd.grad(y, (leaf, *values), dy)
        return [y.detach(), dx, torch.cat([part.flatten() for part in dvalues])]

    def expected(
        self,
        topology: Topology,
        layer: Callable[[Tensor, Tensor], Tensor] = linear,
        *,
        backward: bool = True,
    ) -> Callable[[torch.dtype], Sequence[Tensor]]:
        """What `differentiated` must return, or y alone; `layer` is of x and the dense weight."""

        def plain(dtype: torch.dtype) -> Sequence[Tensor]:
            weight, x = self.weight(dtype, topology), self.x.to(dtype)
            if not backward:
                return [layer(x, weight)]
            x, weight = x.detach().requires_grad_(), weight.requires_grad_()
            y = layer(x, weight)
            dx, dweight = torch.autograd.grad(y, (x, weight), self.dy.to(dtype))
            return [y.detach(), dx, gather_entries(dweight, topology.entries())]

        return plain

    def compare(
        self,
        kernel: str,
        names: Sequence[str],
        ours: Callable[[], Sequence[Tensor]],
        plain: Callable[[torch.dtype], Sequence[Tensor]],
    ) -> Iterator[Check]:
        """A check for each result of `ours`; `plain` computes them in any dtype."""
        truth, usual = plain(torch.float64), plain(self.dtype)
        dtype = str(self.dtype).removeprefix("torch.")
        try:
            results = ours()
            errors = [_error(result, true) for result, true in zip(results, truth, strict=True)]
            note = ""
        except Exception as failure:
            # A kernel that does not compile or run fails its check; the others go on.
            errors = [float("inf")] * len(names)
            note = reason(failure)
        joined = "" if self.shape.split == 1 else f" of {self.shape.split}"
        for name, error, low, true in zip(names, errors, usual, truth, strict=True):
            limit = 2 * _error(low, true) + EXACT[self.dtype]
            what = f"{name}, {len(self.x)} tokens, {self.shape}{joined}"
            yield Check(kernel, self.name, what, dtype, error, limit, note)


def _error(result: Tensor, truth: Tensor) -> float:
    difference = result.double() - truth
    return float(difference.norm() / truth.norm().clamp_min(1e-30))
