"""What stands beside the tensors of a packed language model: config, tokenizer, model card."""

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
from padst_exp.integrations.model_card import model_card, require_no_transform
from padst_exp.integrations.transformers import KEY, PadstConfig
from padst_exp.models.language import GPT2, Llama
from padst_exp.restore import RestoredRun

PROGRAM = """import padst_exp.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>")"""


def require_language_model(restored: RestoredRun) -> None:
    """Refuse a run whose model transformers has no class for.

    Raises:
        UserError: it is none of ours of GPT-2 or LLaMA, or was made another one.
    """
    model = restored.model
    if not isinstance(model, GPT2 | Llama):
        raise UserError(
            "format: expected packed or dense for a model that is neither GPT-2 nor LLaMA, got "
            "transformers"
        )
    require_no_transform(restored, "transformers")


def hub_files(
    restored: RestoredRun, layers: Mapping[str, Layer], metrics: Mapping[str, float]
) -> dict[str, str]:
    """The text of each file by name.

    Args:
        restored: a language model, packed.
        layers: its packed layers, as `pack` described them.
        metrics: of the checkpoint, by name.
    """
    config = copy.deepcopy(configuration_of(restored.model))
    config.architectures = [MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[config.model_type]]
    config.dtype = restored.trainer.dtype
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
        storage="layers packed, permutations folded into their indices",
        program=PROGRAM,
    )
    return files


def configuration_of(model: nn.Module) -> Any:
    """The configuration of transformers in a language model of ours; None in another model."""
    inner = getattr(model, "transformer", None) or getattr(model, "model", None)
    return getattr(inner, "config", None)
