"""What stands beside the tensors of a language model: config, tokenizer, model card."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from padst_exp.data.corpora import END_OF_TEXT
from padst_exp.data.task import LanguageModeling
from padst_exp.errors import UserError
from padst_exp.inference.files import Layer
from padst_exp.integrations.model_card import DENSE, is_original, model_card, require_no_transform
from padst_exp.integrations.transformers import KEY, PadstConfig
from padst_exp.models.language import GPT2, Llama
from padst_exp.restore import RestoredRun

IMPORT = "import padst_exp.integrations.transformers\n"
PROGRAM = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>")"""
PACKED = (
    "layers packed, permutations folded into their indices. Reading them needs padst_exp, and its "
    "import once: without it transformers refuses the file"
)


def require_language_model(restored: RestoredRun) -> None:
    """Refuse a run whose model transformers has no class for.

    Raises:
        UserError: it is none of ours of GPT-2 or LLaMA, or was made another one.
    """
    if not isinstance(restored.model, GPT2 | Llama):
        raise UserError(
            "format: expected packed or dense for a model that is neither GPT-2 nor LLaMA, got "
            "transformers"
        )
    require_no_transform(restored, "transformers")


def is_language_model(restored: RestoredRun) -> bool:
    """Whether transformers has a class for the model of a run."""
    return isinstance(restored.model, GPT2 | Llama) and is_original(restored)


def hub_files(
    restored: RestoredRun,
    layers: Mapping[str, Layer] | None,
    metrics: Mapping[str, float],
    speed: str | None = None,
) -> dict[str, str]:
    """The text of each file by name.

    Args:
        restored: a language model, packed.
        layers: its packed layers, as `pack` described them; None: it is stored dense.
        metrics: of the checkpoint, by name.
        speed: for the card, as in `model_card`.
    """
    config = copy.deepcopy(configuration_of(restored.model))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = restored.trainer.dtype
    if layers is not None:
        setattr(config, KEY, PadstConfig(layers=dict(layers)))
    files = {}
    tokenizer = restored.task.tokenizer if isinstance(restored.task, LanguageModeling) else None
    if tokenizer is not None:
        special = {}
        end = tokenizer.token_to_id(END_OF_TEXT)
        if end is not None:
            config.bos_token_id = config.eos_token_id = end
            special = {"bos_token": END_OF_TEXT, "eos_token": END_OF_TEXT}
        described = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": restored.task.model_shape["context_length"],
            **special,
        }
        files["tokenizer.json"] = tokenizer.to_str()
        files["tokenizer_config.json"] = json.dumps(described, indent=2) + "\n"
    files["config.json"] = config.to_json_string()
    files["README.md"] = model_card(
        restored,
        metrics,
        architecture=config.architectures[0],
        library="transformers",
        task="text-generation",
        storage=DENSE if layers is None else PACKED,
        program=PROGRAM if layers is None else IMPORT + PROGRAM,
        speed=speed,
    )
    return files


def configuration_of(model: nn.Module) -> Any:
    """The configuration of transformers in a language model of ours; None in another model."""
    inner = getattr(model, "transformer", None) or getattr(model, "model", None)
    return getattr(inner, "config", None)
