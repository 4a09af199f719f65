"""One view of all layers that multiply: `nn.Linear`, `Conv1D`, attention, convolutions."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from padst_exp.layers.sparse_conv import SparseConv2d
from padst_exp.layers.sparse_linear import SparseLinear


class SparseAttention(nn.MultiheadAttention):
    """An `nn.MultiheadAttention` whose packed input projection is the layer `in_proj`.

    Attention reads `in_proj_weight` instead of calling a layer; it finds the dense matrix there.
    `in_proj` is sparse, or what an export made of it.
    """

    in_proj: nn.Module
    _built: Tensor | None = None

    @property
    def in_proj_weight(self) -> Tensor:  # type: ignore[override]
        """`[3 * E, E]`, differentiable."""
        if self._built is not None:
            return self._built
        weight = self.in_proj.weight
        assert isinstance(weight, Tensor)
        return weight

    @property
    def in_proj_bias(self) -> Tensor | None:  # type: ignore[override]
        """`[3 * E]`, or None."""
        bias = self.in_proj.bias
        assert bias is None or isinstance(bias, Tensor)
        return bias

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """As of `nn.MultiheadAttention`, which reads its weight several times: built once."""
        # Past Module's own way, which takes the parameter of a dense projection for one of ours.
        self.__dict__["_built"] = self.in_proj_weight
        try:
            return super().forward(*args, **kwargs)
        finally:
            del self.__dict__["_built"]


# Move along with a layer that takes the place of another; handles of the user remain valid.
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_is_full_backward_hook",
)
# Know the names and shapes of a state that the new layer does not have.
_STATE_HOOKS = (
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True, kw_only=True)
class LinearView:
    """A layer as one matrix.

    Args:
        module: the layer.
        name: where its sparse layer goes: the module's own name, or a name inside it.
        weight: name of its weight parameter in `module`, e.g. `weight`.
        bias: name of its bias parameter.
        taps: positions of a convolution's kernel, 1 for others.
        flatten: brings the weight parameter into the shape `[O, I]`.
        restore: brings a matrix `[O, I]` into the shape of the weight parameter.
        build: makes the sparse layer, with the arguments of `SparseLinear`.
    """

    module: nn.Module
    name: str
    weight: str
    bias: str
    taps: int
    flatten: Callable[[Tensor], Tensor]
    restore: Callable[[Tensor], Tensor]
    build: Callable[..., SparseLinear]

    @property
    def parameter(self) -> nn.Parameter:
        """The weight itself."""
        parameter = getattr(self.module, self.weight)
        assert isinstance(parameter, nn.Parameter)
        return parameter

    @property
    def matrix(self) -> Tensor:
        """The weight as `[O, I]`, detached; a convolution's has its channels fastest."""
        return self.flatten(getattr(self.module, self.weight).detach())

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

    def obstacle(self) -> str | None:
        """What of the layer would be lost with it, in words that follow its name; or None."""
        module, inside = self.module, isinstance(self.module, nn.MultiheadAttention)
        weight = getattr(module, self.weight)
        if is_lazy(weight):
            return "whose weight has no shape before the model has seen a batch"
        own = {key for key, value in module._parameters.items() if value is not None}
        others = sorted({*own, *module._buffers, *module._modules} - {self.weight, self.bias})
        if not isinstance(weight, nn.Parameter):
            # By weight_norm, spectral_norm, pruning, a parametrization.
            return f"whose weight is computed from {', '.join(others) or 'something else'}"
        if not weight.is_floating_point():
            return f"whose weight is {str(weight.dtype).removeprefix('torch.')}"
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            return f"which has hooks on its {self.weight}"
        if inside:
            return None  # all else stays where it is
        if others:
            return f"which holds {', '.join(others)} besides its weight and bias"
        if "forward" in vars(module):
            return "whose forward was replaced"
        hooks = [name for name in _STATE_HOOKS if getattr(module, name)]
        return f"which has {hooks[0].strip('_')}" if hooks else None

    def replace(self, model: nn.Module, layer: nn.Module) -> None:
        """Put a sparse layer, or a packed one, where the dense one was, under all its names.

        Hooks of forward and backward passes go with it.
        """
        if isinstance(self.module, nn.MultiheadAttention):
            del self.module.in_proj_weight, self.module.in_proj_bias
            self.module.__class__ = SparseAttention
            self.module.in_proj = layer
            return
        for name in _HOOKS:
            setattr(layer, name, getattr(self.module, name))
        replace_module(model, self.module, layer)


def replace_module(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Let `new` stand wherever `old` stands in `model`, which may be in several places."""
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is old:
                parent._modules[name] = new


def imported(module: str, name: str) -> Any:
    """A class of a library, without importing that: where it is not, there are no layers of it.

    Returns:
        The class, or what nothing is an instance of.
    """
    return getattr(sys.modules.get(module), name, ())


def view(module: nn.Module, name: str) -> LinearView | None:
    """The view of `module`, called `name` in its model; None if it is no such layer.

    Subclasses that compute something else are none: methods of their own say so.
    """
    if _computes_like(module, nn.Linear, "forward"):
        return _view(module, name, lambda weight: weight, lambda matrix: matrix)
    conv1d = imported("transformers.pytorch_utils", "Conv1D")
    if conv1d and _computes_like(module, conv1d, "forward"):
        # Its weight is transposed, `[I, O]`.
        return _view(module, name, Tensor.t, lambda matrix: matrix.t().contiguous())
    if _computes_like(module, nn.Conv2d, "forward", "_conv_forward"):
        assert isinstance(module, nn.Conv2d)
        return _conv2d_view(module, name) if module.groups == 1 else None
    if type(module) is nn.MultiheadAttention and module.in_proj_weight is not None:
        return LinearView(
            module=module,
            name=f"{name}.in_proj",
            weight="in_proj_weight",
            bias="in_proj_bias",
            taps=1,
            flatten=lambda weight: weight,
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


def _computes_like(module: nn.Module, kind: type[nn.Module], *methods: str) -> bool:
    """Whether `module` is a `kind` and has its methods."""
    own = type(module)
    return (
        isinstance(module, kind)
        and own.__call__ is nn.Module.__call__
        and all(getattr(own, method) is getattr(kind, method) for method in methods)
    )


def _view(
    module: nn.Module,
    name: str,
    flatten: Callable[[Tensor], Tensor],
    restore: Callable[[Tensor], Tensor],
) -> LinearView:
    return LinearView(
        module=module,
        name=name,
        weight="weight",
        bias="bias",
        taps=1,
        flatten=flatten,
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
        weight="weight",
        bias="bias",
        taps=height * width,
        flatten=lambda kernel: kernel.permute(0, 2, 3, 1).flatten(1),
        restore=restore,
        build=build,
    )
