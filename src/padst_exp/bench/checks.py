"""Every kernel of a device against float64, before anything of it is timed.

A kernel passes when its error is at most twice that of PyTorch's dense product in the same dtype.
Checked are, for each structure and dtype: the products of training with every backend, forward,
dX and dW, plain and with both sides permuted; the feature-major products of inference with each
epilogue; condensed weights. That is at the shapes, densities and token counts of `gpu_all.Plan`;
other ones are timed by the same kernels unchecked. What has no check at all is not timed.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import gelu, layer_norm, linear

from padst_exp.bench.check_case import PASSES, Case, Check
from padst_exp.bench.configurations import Shape
from padst_exp.bench.forms import CONDENSED, CUDA, FEATURES, TRITON, Inference, condensed, packed
from padst_exp.bench.topology import Topology
from padst_exp.errors import UserError
from padst_exp.structures import Backend, Diagonal, Product, Structure, permuted_tiles
from padst_kernels.entries import condense, condensed_matmul
from padst_kernels.tiles import aligned_features, tile_matmul_fused

EPILOGUES = ("", "bias", "bias gelu", "bias gelu residual", "norm bias")
NORM_EPSILON = 1e-6
Verdicts = dict[tuple[str, str, bool], str]


def run(
    structure: Structure,
    shape: Shape,
    density: float,
    token_counts: Sequence[int],
    dtype: torch.dtype,
    device: torch.device,
) -> Iterator[Check]:
    """Check all kernels of a structure in one layer; nothing where the structure is not legal.

    Args:
        structure: of the weight.
        shape: of the layer; joined projections run as one product.
        density: of the weight.
        token_counts: odd ones too.
        dtype: of activations and values.
        device: a GPU, or a CPU with Triton's interpreter.
    """
    for num_tokens in token_counts:
        try:
            case = Case(structure, shape, density, num_tokens, dtype, device)
        except UserError:
            return
        topologies = {"": case.plain, ", permuted": case.permuted}
        for backend, (suffix, topology) in itertools.product(_backends(case), topologies.items()):
            yield from _product(case, topology, backend, suffix)
        for suffix, topology in topologies.items():
            if case.tile_shape is not None:
                yield from _features(case, topology, suffix)
            else:
                yield from _condensed(case, topology, suffix)


def verdicts(checks: Sequence[Check], dtype: torch.dtype) -> Verdicts:
    """What may be timed in a dtype: kernel, structure and whether backward to "", or why not.

    What is not in there was not checked, and may not be timed either. A gradient that failed takes
    the backward row with it; a failed forward pass takes both.
    """
    found: Verdicts = {}
    for check in checks:
        if check.dtype != str(dtype).removeprefix("torch."):
            continue
        reason = "" if check.passed else f"failed its check: {check.what}, error {check.error:.2g}"
        for backward in (True,) if check.backward else (False, True):
            key = check.kernel, check.structure, backward
            found[key] = found.get(key) or reason
    # CUDA is Triton but for dX.
    for (kernel, structure, backward), reason in list(found.items()):
        key = CUDA, structure, backward
        if kernel == TRITON and key in found:
            found[key] = found[key] or reason
    return found


def _backends(case: Case) -> list[Backend]:
    """Those of the device; in the interpreter Triton too."""
    found = Product(case.layouts, "packed").backends(case.device)
    structure = case.structure
    single = isinstance(structure, Diagonal) and structure.bundle == 1
    if case.device.type == "cpu" and (single or case.tile_shape is not None):
        found.append("triton")
    return found


def _product(case: Case, topology: Topology, backend: Backend, suffix: str) -> Iterator[Check]:
    """The product that training uses."""

    def ours() -> Sequence[Tensor]:
        product = Product(case.layouts, "packed", backend)
        topology.fold(product)
        return case.differentiated(product, case.x, case.dy)

    names = [name + suffix for name in PASSES]
    yield from case.compare(packed(backend), names, ours, case.expected(topology))


def _features(case: Case, topology: Topology, suffix: str) -> Iterator[Check]:
    """The feature-major product of inference with each epilogue."""
    bias, residual = case.random(case.shape.out_features), case.dy

    def ours(backend: Backend, epilogue: str) -> Sequence[Tensor]:
        assert case.tile_shape is not None and backend != "dense"
        tiles = -1, *case.tile_shape
        index = permuted_tiles(
            topology.layouts, topology.units, topology.input_index, topology.output_indices
        )
        norm = None
        if "norm" in epilogue:
            wide = case.x.float()
            rstd = (wide.var(1, unbiased=False) + NORM_EPSILON).rsqrt()
            norm = wide.mean(1), rstd, case.weight(torch.float32, topology).sum(1)

        def product(x: Tensor, values: Sequence[Tensor]) -> Tensor:
            return tile_matmul_fused(
                x,
                torch.cat([part.reshape(tiles) for part in values]),
                index,
                case.shape.out_features,
                backend="native" if x.is_cpu and backend == "torch" else backend,
                bias=bias if "bias" in epilogue else None,
                gelu="gelu" in epilogue,
                residual=aligned_features(residual) if "residual" in epilogue else None,
                norm=norm,
            )

        x = aligned_features(case.x)
        if norm is not None:
            with torch.no_grad():
                return [product(x, case.values).t()]
        y, dx, dvalues = case.differentiated(product, x, aligned_features(case.dy))
        return y.t(), dx.t(), dvalues

    def plain(epilogue: str, x: Tensor, weight: Tensor) -> Tensor:
        x = layer_norm(x, x.shape[-1:], eps=NORM_EPSILON) if "norm" in epilogue else x
        y = linear(x, weight)
        y = y + bias.to(y.dtype) if "bias" in epilogue else y
        y = gelu(y) if "gelu" in epilogue else y
        return y + residual.to(y.dtype) if "residual" in epilogue else y

    for backend, epilogue in itertools.product(FEATURES, EPILOGUES):
        backward = "norm" not in epilogue
        how = f", feature-major {epilogue}".rstrip() + suffix
        yield from case.compare(
            FEATURES[backend],
            [name + how for name in (PASSES if backward else PASSES[:1])],
            partial(ours, backend, epilogue),
            case.expected(topology, partial(plain, epilogue), backward=backward),
        )


def _condensed(case: Case, topology: Topology, suffix: str) -> Iterator[Check]:
    """Weights of single entries, for inference."""
    for backend, most in condensed(case.device).items():
        if len(case.x) > most:
            continue

        def ours(backend: Inference = backend) -> Sequence[Tensor]:
            flat = torch.cat([values.flatten() for values in case.values])
            weight = condense(flat, topology.entries(), *topology.shape)
            on_cpu = case.device.type == "cpu"
            return [condensed_matmul(case.x, weight, backend="native" if on_cpu else backend)]

        yield from case.compare(
            CONDENSED[backend],
            [f"forward{suffix}"],
            ours,
            case.expected(topology, backward=False),
        )
