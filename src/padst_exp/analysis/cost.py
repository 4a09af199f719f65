"""What one pass of a model computes and moves: every operation counted, none calculated."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from padst_exp.analysis.fake import fake_pass
from padst_exp.layers import SparseConv2d, SparseLinear, sparse_layers

Kind = Literal["sparse", "product", "attention", "norm", "activation", "other"]

# Floating-point operations for each element of the output (of the input, for reductions); what is
# neither here nor below counts as one.
_PER_ELEMENT = {
    "native_layer_norm": 7,  # mean; subtract, square, sum; divide, scale, shift
    "native_group_norm": 7,
    "native_batch_norm": 4,  # in evaluation: subtract, divide, scale, shift
    "_softmax": 5,  # maximum, subtract, exponential, sum, divide
    "_safe_softmax": 5,
    "gelu": 8,
    "silu": 4,
    "hardswish": 4,
    "hardtanh": 2,
}
_MOVES = frozenset({
    "_to_copy", "_unsafe_view", "alias", "arange", "as_strided_", "bernoulli", "bitwise_and", "cat",
    "clone", "constant_pad_nd", "contiguous", "copy", "copy_", "cumsum", "detach", "embedding",
    "empty", "empty_like", "eq", "expand", "fill", "full", "full_like", "ge", "gt", "im2col",
    "index", "index_select", "le", "lift_fresh", "lt", "masked_fill", "ne", "new_empty",
    "new_ones", "new_zeros", "ones", "ones_like", "pad", "permute", "repeat", "roll",
    "scalar_tensor", "select", "slice", "split", "stack", "t", "transpose", "unbind", "unsqueeze",
    "view", "where", "zeros", "zeros_like",
})  # fmt: skip
_REDUCTIONS = frozenset({"mean", "sum", "var", "var_mean", "amax", "amin", "max", "prod"})
_ATTENTION = frozenset({"bmm", "baddbmm", "_softmax", "_safe_softmax"})


@dataclass(frozen=True)
class Cost:
    """Floating-point operations and bytes of one part of a pass.

    Args:
        module: name of the innermost module that did it.
        kind: "sparse": products of sparse layers, with their companions and soft permutations;
            "product": of all other layers (stem, head, what stays dense); "attention": scores,
            softmax and weighted sums; "norm"; "activation"; "other": biases, sums of branches,
            pooling, embeddings, copies.
        flops: additions and multiplications; a multiply-accumulate is two.
        bytes: read and written, each operation by itself: an upper bound for fused kernels.
    """

    module: str
    kind: Kind
    flops: int
    bytes: int


@dataclass(frozen=True)
class Costs:
    """The costs of one pass, by module and kind."""

    rows: tuple[Cost, ...]

    @property
    def flops(self) -> int:
        """Of the whole pass."""
        return sum(row.flops for row in self.rows)

    @property
    def bytes(self) -> int:
        """Of the whole pass."""
        return sum(row.bytes for row in self.rows)

    def by_kind(self) -> dict[Kind, tuple[int, int]]:
        """FLOPs and bytes of each kind that occurs, the most FLOPs first."""
        kinds: dict[Kind, tuple[int, int]] = {}
        for row in self.rows:
            flops, moved = kinds.get(row.kind, (0, 0))
            kinds[row.kind] = flops + row.flops, moved + row.bytes
        return dict(sorted(kinds.items(), key=lambda item: -item[1][0]))

    def products(self) -> dict[str, int]:
        """FLOPs of the products of each layer by its name, dense or sparse."""
        found: dict[str, int] = {}
        for row in self.rows:
            if row.kind in ("sparse", "product"):
                found[row.module] = found.get(row.module, 0) + row.flops
        return found


def count(model: nn.Module, inputs: Tensor) -> Costs:
    """Count a forward pass in evaluation.

    Args:
        model: any module; its parameters may be on the meta device.
        inputs: one batch for it, on the device of the model; only shape and dtype matter.
    """
    counter = _Counter()
    with _watched(model, counter), fake_pass(model), counter:
        model(inputs)
    return Costs(tuple(Cost(m, k, f, b) for (m, k), (f, b) in counter.costs.items()))


class _Counter(TorchDispatchMode):
    """Adds up the operations of each module; those inside a sparse layer are its own affair."""

    def __init__(self) -> None:
        super().__init__()
        self.costs: dict[tuple[str, Kind], tuple[int, int]] = {}
        self.modules: list[tuple[str, nn.Module]] = []
        self.inside_sparse = 0

    def __torch_dispatch__(
        self, func: Any, types: object, args: Any = (), kwargs: Any = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if not self.inside_sparse and isinstance(func, OpOverload):
            self._count(func, args, kwargs or {}, out)
        return out

    def add(self, module: str, kind: Kind, flops: int, moved: int) -> None:
        """Add to what a module did."""
        before = self.costs.get((module, kind), (0, 0))
        self.costs[module, kind] = before[0] + flops, before[1] + moved

    def _count(self, func: OpOverload, args: Any, kwargs: Any, out: Any) -> None:
        tensors = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        name = func._schema.name.split("::")[-1]
        name = name if name in _MOVES else name.removesuffix("_")
        if not tensors or func.is_view or name == "_unsafe_view":
            return
        path, module = self.modules[-1] if self.modules else ("", nn.Identity())
        formula = flop_registry.get(func._overloadpacket)
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if formula is not None:
            flops = int(formula(*args, **kwargs, out_val=out))
        elif name in _MOVES or not tensors[0].is_floating_point():
            flops = 0
        elif name == "max_pool2d_with_indices":
            flops = tensors[0].numel() * math.prod(_pair(args[1]))
        else:
            counted = inputs[0] if name in _REDUCTIONS and inputs else tensors[0]
            flops = counted.numel() * _PER_ELEMENT.get(name, 1)
        self.add(path, _kind(name, module, formula is not None), flops, _size(inputs + tensors))
        if name in ("addmm", "convolution") and len(inputs) == 3:
            self.add(path, "other", tensors[0].numel(), 0)


def _kind(name: str, module: nn.Module, multiplies: bool) -> Kind:
    if name in _ATTENTION:
        return "attention"
    if multiplies:
        return "product"
    if "norm" in name or "Norm" in type(module).__name__:
        return "norm"
    if name in ("relu", "gelu", "silu", "hardtanh", "hardswish", "tanh", "sigmoid"):
        return "activation"
    # transformers and timm write some activations out in plain operations.
    home = type(module).__module__
    activation = "activation" in home and not isinstance(module, nn.MultiheadAttention)
    return "activation" if activation else "other"


@contextmanager
def _watched(model: nn.Module, counter: _Counter) -> Iterator[None]:
    """Let `counter` know in which module it is; sparse layers only say their shapes."""
    handles = []
    sparse = {layer: _sparse_cost(layer) for layer in sparse_layers(model).values()}

    def enter(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, _: object) -> None:
            counter.modules.append((name, module))
            counter.inside_sparse += module in sparse

        return hook

    def leave(module: nn.Module, inputs: Any, output: Any) -> None:
        name, _ = counter.modules.pop()
        if isinstance(module, SparseLinear):
            counter.inside_sparse -= 1
            macs, size = sparse[module]
            flops = 2 * macs * (output.numel() // module.out_features)
            counter.add(name, "sparse", flops, size + _size([inputs[0], output]))
            if module.bias is not None:
                counter.add(name, "other", output.numel(), 0)

    try:
        for name, module in model.named_modules():
            handles.append(module.register_forward_pre_hook(enter(name)))
            handles.append(module.register_forward_hook(leave))
        for layer in sparse:
            layer.forward = partial(_shape_only, layer)  # type: ignore[method-assign]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in sparse:
            vars(layer).pop("forward", None)


def _shape_only(layer: SparseLinear, x: Tensor) -> Tensor:
    """What stands for the forward pass of a sparse layer."""
    if isinstance(layer, SparseConv2d):
        channels = layer.in_features // layer.taps
        kernel = x.new_empty(layer.out_features, channels, *layer.window.kernel_size)
        return layer.window.convolve(x, kernel)
    return x.new_empty(*x.shape[:-1], layer.out_features)


def _sparse_cost(layer: SparseLinear) -> tuple[int, int]:
    """Multiply-accumulates of a sparse layer at one position, and the bytes that it keeps."""
    macs = sum(weight.topology().num_entries for weight in layer.parts())
    if layer.companion is not None:
        macs += sum(parameter.numel() for parameter in layer.companion.parameters())
    # At every tap of a kernel; hard permutations are folded into the indices.
    soft = [p for p in layer.permutations().values() if p.soft]
    macs += sum(p.size**2 * (layer.taps if p is layer.input_permutation else 1) for p in soft)
    indices = [buffer for multiply in layer.products for buffer in multiply.buffers()]
    return macs, _size([*layer.parameters(), *indices])


def _size(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _pair(size: int | Iterable[int]) -> tuple[int, ...]:
    return (size, size) if isinstance(size, int) else tuple(size)


def sparse_ift_flops(
    model: nn.Module,
    inputs: Tensor,
    densities: Mapping[str, float] | None = None,
    *,
    skip: Iterable[str] = ("*act*", "*relu*"),
) -> int:
    """FLOPs of a forward pass as Sparse-IFT's profiler counts them.

    It reports 1,115,226,800 for ResNet-18 on CIFAR-100, 3,647,128,359 and 7,355,270,501 for
    ResNet-18 and ResNet-34 on ImageNet. It counts what hooks on modules see: convolutions, linear
    layers and their biases, norms as in training, pooling; neither attention, nor sums of branches,
    nor what is a function call in the authors' models.

    Args:
        model: dense.
        inputs: one sample.
        densities: of layers, by module name; those not named are dense.
        skip: patterns of modules that are function calls in their models: the activations
            everywhere, the average pooling in those for CIFAR.
    """
    total = 0

    def counted(name: str, module: nn.Module) -> Callable[..., None]:
        def hook(_: nn.Module, args: Any, y: Any) -> None:
            nonlocal total
            density = (densities or {}).get(name)
            total += sum(
                round_down(density, part) for part in _paper_products(module, args[0], y)
            ) + _paper_rest(module, args[0], y)

        return hook

    def round_down(density: float | None, part: int) -> int:
        return part if density is None else int(part * density)

    handles = [
        module.register_forward_hook(counted(name, module))
        for name, module in model.named_modules()
        if not any(fnmatchcase(name, pattern) for pattern in skip)
    ]
    try:
        with fake_pass(model):
            model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return total


def _paper_products(module: nn.Module, x: Tensor, y: Tensor) -> tuple[int, ...]:
    """Additions and multiplications of a layer with a weight."""
    if isinstance(module, nn.Conv2d):
        positions, weights = y.shape[0] * y[0, 0].numel(), module.weight.numel()
        return positions * (weights - 1), positions * weights
    if isinstance(module, nn.Linear):
        positions = x.numel() // module.in_features
        return (
            positions * (module.in_features - 1) * module.out_features,
            positions * module.in_features * module.out_features,
        )
    return ()


def _paper_rest(module: nn.Module, x: Tensor, y: Tensor) -> int:
    """All that no density makes less."""
    if isinstance(module, nn.Conv2d | nn.Linear):
        return 0 if module.bias is None else y.numel()
    if isinstance(module, nn.BatchNorm2d):
        channels = x.shape[1]
        return 2 * (x.numel() - channels) + 5 * x.numel() + channels
    if isinstance(module, nn.MaxPool2d):
        return y.numel() * (math.prod(_pair(module.kernel_size)) - 1)
    if isinstance(module, nn.AdaptiveAvgPool2d):
        return x.numel()
    return 0
