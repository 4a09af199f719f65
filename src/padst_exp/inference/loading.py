"""An exported model as an `nn.Module`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from padst_exp.errors import UserError
from padst_exp.files import one_line, reason
from padst_exp.inference.files import (
    DESCRIPTION,
    WEIGHTS,
    Layer,
    construct,
    empty_layer,
    guards,
    read_description,
    read_state,
)
from padst_exp.layers.views import view_of


def load(
    path: Path | str,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
) -> nn.Module:
    """Load what `python -m padst_exp.export` wrote, packed or dense. Measures nothing; see `tune`.

    Args:
        path: folder of the export.
        device: to put the model on.
        dtype: of its floating-point tensors; None keeps those of the export.
        model: the dense model of a constructor outside `padst_exp.models`; it is changed.

    Returns:
        The model in eval mode, no parameter needing a gradient, with the outputs of the model
        that was trained. Sparse layers are `PackedLinear`, in plain PyTorch until it is tuned.

    Raises:
        UserError: in one line, when the export is missing, damaged or foreign.
    """
    folder = Path(path)
    description = read_description(folder)
    own = model is not None
    if model is None:
        model = construct(description["model"], folder / DESCRIPTION)
    state = read_state(folder, description)
    put_layers(model, description["layers"], state, folder / WEIGHTS, own=own)
    _load_state(model, state, folder / WEIGHTS, own=own)
    _tie(model, description["shared"])
    return model.eval().requires_grad_(False).to(device=device, dtype=dtype)


def put_layers(
    model: nn.Module,
    layers: Mapping[str, Layer],
    state: dict[str, Tensor],
    path: Path,
    *,
    own: bool = False,
) -> None:
    """Let packed layers, with their tensors of `state`, take the place of dense ones.

    Args:
        model: the dense model.
        layers: described, by name.
        state: all tensors by name; loses the guards of these layers.
        path: where these are from.
        own: whether the model is the user's, and may as well be the wrong one.

    Raises:
        UserError: they do not fit each other, or are none that kernels may multiply by.
    """
    for name, guard in guards(layers).items():
        if name in state and state[name].shape == guard.shape:
            del state[name]
    for name, described in layers.items():
        try:
            _, dense = view_of(model, name)
            dense.replace(model, empty_layer(described, state, f"{name}.", dense))
        except (KeyError, TypeError, ValueError, IndexError, AttributeError, RuntimeError) as error:
            where = f"model: not the one in {path}, or that is" if own else f"{path}:"
            raise UserError(f"{where} damaged at layer {name}: {reason(error)}") from error


def _load_state(
    model: nn.Module, state: Mapping[str, Tensor], path: Path, *, own: bool = False
) -> None:
    misfit = f"model: not the one in {path}" if own else f"{path}: does not fit its {DESCRIPTION}"
    for name, expected in model.state_dict().items():
        found = state.get(name, expected)
        if found.is_floating_point() != expected.is_floating_point():
            raise UserError(f"{misfit}: {name} is of {found.dtype}")
    try:
        model.load_state_dict(state, assign=True)
    except RuntimeError as error:
        # torch lists one mismatch a line, below a title.
        lines = str(error).splitlines()
        first = lines[1] if len(lines) > 1 else str(error)
        raise UserError(f"{misfit}: {one_line(first)}") from error
    for name, tensor in (*model.named_parameters(), *model.named_buffers()):
        if tensor.is_meta:
            raise UserError(f"{path}: has nothing for {name}; load it with model=...")


def _tie(model: nn.Module, shared: Mapping[str, str]) -> None:
    """Make shared tensors one parameter again, which moves and casts once."""
    for name, source in shared.items():
        owner, _, attribute = name.rpartition(".")
        source_owner, _, source_attribute = source.rpartition(".")
        tensor = getattr(model.get_submodule(source_owner), source_attribute)
        setattr(model.get_submodule(owner), attribute, tensor)
