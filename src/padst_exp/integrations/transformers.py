"""Packed language models in plain transformers: importing this module makes it know them.

import padst_exp.integrations.transformers
model = AutoModelForCausalLM.from_pretrained("runs/mine/export-transformers")

The folder is written by `python -m padst_exp.export format=transformers`, or by `save_pretrained`
of a model that was loaded, which keeps its model card. To transformers, packed layers are a way of
quantization.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import TypeAdapter, ValidationError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from padst_exp.errors import UserError, require
from padst_exp.files import reading
from padst_exp.inference.files import (
    DESCRIPTION,
    FORMAT,
    Layer,
    guards,
    read_description,
    read_tensors,
)
from padst_exp.inference.linear import PackedLinear
from padst_exp.inference.loading import put_layers
from padst_exp.inference.packing import harden, pack
from padst_exp.inference.weights import PackedEntries, PackedTiles

NAME = "padst"
KEY = "quantization_config"
CARD = "README.md"


@register_quantization_config(NAME)
class PadstConfig(QuantizationConfigMixin):
    """`quantization_config` in the config.json of a packed model.

    Args:
        layers: the packed layers by name, described as in `model.json`.
        format: of these and of their tensors.
        quant_method: always "padst".

    Raises:
        UserError: they are none, or of another version.
    """

    def __init__(
        self, layers: object = None, format: object = FORMAT, quant_method: str = NAME, **_: object
    ) -> None:
        if format != FORMAT:
            raise UserError(f"{KEY}.format: expected {FORMAT}, got {format}")
        try:
            checked = TypeAdapter(dict[str, Layer]).validate_python(layers, strict=True)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, ("layers", *first["loc"])))
            raise UserError(
                f"{KEY}.{where}: expected packed layers as padst_exp.export wrote them, got "
                f"something else ({first['msg']})"
            ) from error
        self.quant_method = quant_method  # type: ignore[assignment]
        self.format = FORMAT
        self.layers = checked


@register_quantizer(NAME)
class PadstQuantizer(HfQuantizer):
    """Puts packed layers where dense ones are; transformers then fills them like any others.

    What a file holds is checked before that as `padst_exp.inference.load` checks it. No parameter
    needs a gradient until `model.requires_grad_()`: training then changes values and leaves the
    topology, see `padst_exp.inference.PackedLinear`.
    """

    requires_calibration = True
    quantization_config: PadstConfig
    card: str | None = None

    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        checkpoint_files: Sequence[str] | None = None,
        **unused: object,
    ) -> None:
        if not checkpoint_files:
            raise UserError("from_pretrained: expected a folder with tensors, got a state_dict")
        paths, dtype = [Path(name) for name in checkpoint_files], model.dtype
        # Of a whole language model; the model at hand may be the part without its head.
        prefix = "" if hasattr(model, model.base_model_prefix) else f"{model.base_model_prefix}."
        # transformers builds models where tensors hold nothing, and ours are read and checked.
        with torch.device("cpu"):
            state = {name.removeprefix(prefix): tensor for name, tensor in _read_all(paths).items()}
            layers = self.quantization_config.layers
            layers = {name.removeprefix(prefix): layer for name, layer in layers.items()}
            put_layers(model, layers, state, paths[0])
        self.quantization_config.layers = layers
        known = model._keys_to_ignore_on_load_unexpected or ()
        model._keys_to_ignore_on_load_unexpected = {*known, *map(re.escape, guards(layers))}
        if (beside := paths[0].with_name(CARD)).is_file():
            with reading("from_pretrained", beside, "UTF-8 text"):
                self.card = beside.read_text("utf-8")
        for name in layers:
            _prepare(model.get_submodule(name), dtype)
        _require_fit(model, state, paths[0])

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **unused: object) -> None:
        model.requires_grad_(False)
        for part in model.modules():
            if isinstance(part, PackedTiles):
                part.column_pointer.zero_()  # in no file: it was filled with whatever was there
        if self.card is not None:
            _keep_card(model, self.card)

    def get_state_dict_and_metadata(
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Any], dict[str, str]]:
        """What `save_pretrained` writes."""
        return {**model.state_dict(), **guards(self.quantization_config.layers)}, {}

    def is_serializable(self) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_qat_trainable(self) -> bool:
        """Whether `Trainer` may train without adapters."""
        return True


def pack_pretrained(model: PreTrainedModel) -> None:
    """Pack a sparse model of transformers, in place: `save_pretrained` then writes it packed.

    Args:
        model: after `padst_exp.sparsify.sparsify` and training; what is soft still is hardened.

    Raises:
        UserError: no layer of it is sparse.
    """
    harden(model)
    layers = pack(model)
    require(bool(layers), "model", "a dense one", "one after sparsify")
    quantizer = PadstQuantizer(PadstConfig(layers=layers))
    attributes = {"hf_quantizer": quantizer, "is_quantized": True, "quantization_method": NAME}
    for name, value in attributes.items():  # as from_pretrained leaves them
        setattr(model, name, value)
    quantizer.postprocess_model(model)


def _keep_card(model: PreTrainedModel, card: str) -> None:
    """Let it be saved and pushed with the model; transformers itself would push a template's."""
    versions = {name: parameter._version for name, parameter in model.named_parameters()}
    for method in ("save_pretrained", "_upload_modified_files"):
        setattr(model, method, partial(_with_card, model, method, card, versions))


def _with_card(
    model: PreTrainedModel,
    method: str,
    card: str,
    versions: Mapping[str, int],
    folder: str | Path,
    *arguments: Any,
    **options: Any,
) -> Any:
    """Call a method of the class of `model` that is about a folder, with the card in there."""
    if any(p._version != versions.get(name) for name, p in model.named_parameters()):
        card += "\nTrained further since: what was measured is of the model before.\n"
    Path(folder).mkdir(parents=True, exist_ok=True)
    (Path(folder) / CARD).write_text(card, "utf-8")
    return getattr(type(model), method)(model, folder, *arguments, **options)


def _read_all(paths: Sequence[Path]) -> dict[str, Tensor]:
    """The tensors of all files of a model, on the CPU.

    Raises:
        UserError: one is missing or damaged, or another than the `model.json` beside it describes.
    """
    state: dict[str, Tensor] = {}
    for path in paths:
        description = path.with_name(DESCRIPTION)
        digest = read_description(path.parent)["tensors"] if description.is_file() else None
        state |= read_tensors("from_pretrained", path, "tensors of a packed model", digest=digest)
    return state


def _prepare(layer: torch.nn.Module, dtype: torch.dtype) -> None:
    """Let tensors of the layer be of the dtypes and shapes in which they are filled."""
    assert isinstance(layer, PackedLinear)
    for part in layer.weights():
        if isinstance(part, PackedEntries):
            part.columns = part.features()  # as in files; a module has them as bytes
    layer.to(dtype=dtype)


def _require_fit(model: PreTrainedModel, state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not those of `model`, which transformers would start at random."""
    own: dict[str, Any] = model.state_dict()
    if type(model).__name__ in (model.config.architectures or ()):
        tied = model.all_tied_weights_keys
        missing = sorted(own.keys() - state.keys() - tied.keys())
        foreign = sorted(state.keys() - own.keys())
        for name in [*missing[:1], *foreign[:1]]:
            what = "has nothing for" if missing else "has no place in its model for"
            raise UserError(f"{path}: does not fit its config.json: it {what} {name}")
    for name in own.keys() & state.keys():
        wanted, found = own[name], state[name]
        same = wanted.is_floating_point() == found.is_floating_point()
        if wanted.shape != found.shape or not same:
            raise UserError(
                f"{path}: does not fit its config.json: {name} is {found.dtype} "
                f"{tuple(found.shape)}, not {tuple(wanted.shape)}"
            )
