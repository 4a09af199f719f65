"""One view of all layers that multiply: `nn.Linear`, `Conv1D`, attention, convolutions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn

from padst_exp.layers.sparse_conv import SparseConv2d
from padst_exp.layers.sparse_linear import SparseLinear


class SparseAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose packed input projection is the layer `in_proj`.

    Attention reads `in_proj_weight` instead of calling a layer; it finds the dense matrix there.
    `in_proj` is sparse, or what an export made of it.
    """

    in_proj: nn.Module

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """`[3 * E, E]`, differentiable."""
        weight = self.in_proj.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """`[3 * E]`, or None."""
        layer = self.in_proj
        bias = layer.live_bias() if isinstance(layer, SparseLinear) else layer.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias


@dataclass(frozen=True, kw_only=True)
class LinearView:
    """A layer as one matrix.

    Args:
        module: the layer.
        name: where its sparse layer goes: the module's own name, or a name inside it.
        matrix: `[O, I]`, detached; a convolution's has its channels fastest.
        weight: name of its weight parameter in `module`, e.g. `weight`.
        bias: name of its bias parameter.
        taps: positions of a convolution's kernel, 1 for others.
        restore: brings a matrix `[O, I]` into the shape of the weight parameter.
        build: makes the sparse layer, with the arguments of `SparseLinear`.
    """

    module: nn.Module
    name: str
    matrix: Tensor
    weight: str
    bias: str
    taps: int
    restore: Callable[[Tensor], Tensor]
    build: Callable[..., SparseLinear]

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        parameter = getattr(self.module, self.weight)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def bias_tensor(self) -> Tensor | None:
        """The bias `[O]`, or None."""
        bias = getattr(self.module, self.bias)
        assert bias is None or isinstance(bias, Tensor)
        return bias

    @property
    def features(self) -> int:
        """Input features that a permutation can move: inputs, or channels of a convolution."""
        return self.matrix.shape[1] // self.taps

    def replace(self, model: nn.Module, layer: nn.Module) -> None:
        """Put a sparse layer, or a packed one, where the dense one was."""
        if isinstance(self.module, nn.MultiheadAttention):
            del self.module.in_proj_weight, self.module.in_proj_bias
            self.module.__class__ = SparseAttention
            self.module.in_proj = layer
        else:
            model.set_submodule(self.name, layer)


def view(module: nn.Module, name: str) -> LinearView | None:
    """The view of `module`, called `name` in its model; None if it is no such layer.

    Subclasses that compute something else are none: a `forward` of their own says so.
    """
    if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward:
        return _view(module, name, module.weight.detach(), lambda matrix: matrix)
    # transformers' Conv1D is a linear layer that stores its weight transposed, as [I, O].
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        weight = module.weight
        assert isinstance(weight, Tensor)
        return _view(module, name, weight.detach().t(), lambda matrix: matrix.t().contiguous())
    if isinstance(module, nn.Conv2d) and type(module).forward is nn.Conv2d.forward:
        return _conv2d_view(module, name) if module.groups == 1 else None
    if type(module) is nn.MultiheadAttention and module.in_proj_weight is not None:
        return LinearView(
            module=module,
            name=f"{name}.in_proj",
            matrix=module.in_proj_weight.detach(),
            weight="in_proj_weight",
            bias="in_proj_bias",
            taps=1,
            restore=lambda matrix: matrix,
            build=SparseLinear,
        )
    return None


def view_of(plain: nn.Module, sparse_name: str) -> tuple[str, LinearView]:
    """The module name and the view, in a dense model, of what became the layer `sparse_name`."""
    for name in (sparse_name, sparse_name.removesuffix(".in_proj")):
        try:
            found = view(plain.get_submodule(name), name)
        except AttributeError:
            continue
        if found is not None and found.name == sparse_name:
            return name, found
    raise KeyError(sparse_name)


def _view(
    module: nn.Module, name: str, matrix: Tensor, restore: Callable[[Tensor], Tensor]
) -> LinearView:
    return LinearView(
        module=module,
        name=name,
        matrix=matrix,
        weight="weight",
        bias="bias",
        taps=1,
        restore=restore,
        build=SparseLinear,
    )


def _conv2d_view(module: nn.Conv2d, name: str) -> LinearView:
    height, width = module.kernel_size

    def restore(matrix: Tensor) -> Tensor:
        kernel = matrix.unflatten(1, (height, width, -1))
        return kernel.permute(0, 3, 1, 2).contiguous()

    def build(*args: object) -> SparseLinear:
        return SparseConv2d(module, *args)  # type: ignore[arg-type]

    return LinearView(
        module=module,
        name=name,
        matrix=module.weight.detach().permute(0, 2, 3, 1).flatten(1),
        weight="weight",
        bias="bias",
        taps=height * width,
        restore=restore,
        build=build,
    )
