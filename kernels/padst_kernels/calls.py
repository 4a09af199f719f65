"""How operations are called: as custom operators where PyTorch must see one, else directly."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, ParamSpec, cast, get_type_hints

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

P = ParamSpec("P")

# Of the custom operators; PyTorch has one set of them for a process.
NAMESPACE = "padst"

# Looked up once: a product of one token takes no longer than a few such look-ups.
_is_compiling = torch.compiler.is_compiling
_num_dispatch_modes = torch._C._len_torch_dispatch_stack

_PLAIN = frozenset((Tensor, torch.nn.Parameter))
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "SymInt", bool: "bool"}


def operator(
    name: str,
    forward: Callable[P, Tensor],
    fake: Callable[..., Tensor],
    *,
    gradients: Callable[..., Sequence[Tensor | None]] | None = None,
    prepare: Callable[..., tuple[Any, ...]] | None = None,
    forgotten: str | None = None,
) -> Callable[P, Tensor]:
    """`forward` as an operation with gradients, which graphs take whole and which costs little.

    Under torch.compile, and for tensors without memory of their own, it runs as the custom operator
    `padst::name`. That takes 20 us a call, so elsewhere an `autograd.Function` wraps `forward`, or
    nothing where no gradients are recorded.

    Args:
        forward: its parameters are annotated, and given by position: tensors first, at least two,
            then numbers and strings. One parameter may be a named tuple of tensors.
        fake: takes what `forward` takes; returns an empty tensor that looks like the result.
        gradients: takes which inputs need a gradient, the gradient of the result, and what
            `forward` took; returns the gradients of the first inputs. Runs without recording
            gradients of its own, and may call other operations. None: there are no gradients.
        prepare: takes what `forward` takes; returns the same with copies that `gradients` shall
            have too.
        forgotten: a tensor that `gradients` does without, and gets None for.
    """
    parameters = get_type_hints(forward)
    del parameters["return"]
    # Operators know no named tuples; the fields of ours stand from `begin` to `end` instead.
    kinds = list(parameters.values())
    begin = next((i for i, kind in enumerate(kinds) if hasattr(kind, "_fields")), len(kinds))
    bundle = get_type_hints(kinds[begin]) if begin < len(kinds) else {}
    end = begin + len(bundle)
    flat_parameters = [*parameters.items()]
    flat_parameters[begin : begin + 1] = bundle.items()
    schema = ", ".join(f"{_SCHEMA.get(kind, 'str')} {key}" for key, kind in flat_parameters)
    num_tensors = schema.count("Tensor")
    lost = [key for key, _ in flat_parameters].index(forgotten) if forgotten else None

    def flat(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not bundle:
            return arguments
        return *arguments[:begin], *arguments[begin], *arguments[begin + 1 :]

    def nested(arguments: tuple[Any, ...]) -> tuple[Any, ...]:
        if not bundle:
            return arguments
        return *arguments[:begin], kinds[begin]._make(arguments[begin:end]), *arguments[end:]

    custom = torch.library.custom_op(
        f"{NAMESPACE}::{name}",
        lambda *arguments: forward(*nested(arguments)),  # type: ignore[call-arg]
        mutates_args=(),
        schema=f"({schema}) -> Tensor",
    )
    custom.register_fake(lambda *arguments: fake(*nested(arguments)))

    def keep(ctx: Any, arguments: tuple[Any, ...]) -> None:
        tensors = arguments[:num_tensors]
        if lost is not None:
            tensors = *tensors[:lost], None, *tensors[lost + 1 :]
        ctx.save_for_backward(*tensors)
        ctx.rest = arguments[num_tensors:]

    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        assert gradients is not None
        needed = ctx.needs_input_grad
        found = gradients(needed, dy, *nested((*ctx.saved_tensors, *ctx.rest)))
        return *found, *[None] * (len(needed) - len(found))

    def recorded(ctx: Any, *arguments: Any) -> Tensor:
        if prepare is not None:
            arguments = prepare(*arguments)
        keep(ctx, flat(arguments))
        return forward(*arguments)  # type: ignore[call-arg]

    function: Any = None
    if gradients is not None:
        custom.register_autograd(
            backward, setup_context=lambda ctx, inputs, output: keep(ctx, inputs)
        )
        methods = {"forward": staticmethod(recorded), "backward": staticmethod(backward)}
        function = type(name, (torch.autograd.Function,), methods)

    def call(*arguments: Any) -> Tensor:
        if _needs_operator(arguments[0], arguments[1]):
            # Outside of it, so that PyTorch sees that both passes have the copies.
            return custom(*flat(arguments if prepare is None else prepare(*arguments)))
        if function is not None and torch.is_grad_enabled():
            return function.apply(*arguments)
        return forward(*arguments)  # type: ignore[call-arg]

    return cast(Callable[P, Tensor], call)


def is_recorded(tensor: Tensor) -> bool:
    """Whether what happens to `tensor` goes into a graph, or it has no memory: not to be read."""
    if _needs_operator(tensor, tensor):
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _needs_operator(x: Tensor, weight: Tensor) -> bool:
    """Whether PyTorch follows what happens to `x` and `weight`, or they have no memory."""
    return (
        _is_compiling()
        or _num_dispatch_modes() > 0
        or type(x) not in _PLAIN
        or type(weight) not in _PLAIN
        or x.is_meta
    )
