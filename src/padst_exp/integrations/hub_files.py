"""What stands beside the tensors of a packed language model: config, model card, tokenizer."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from padst_exp.data.corpora import END_OF_TEXT
from padst_exp.data.task import LanguageModeling
from padst_exp.errors import UserError
from padst_exp.inference.files import Layer
from padst_exp.integrations.transformers import KEY, PadstConfig
from padst_exp.models.language import GPT2, Llama
from padst_exp.restore import RestoredRun
from padst_exp.transforms import NoTransform

CARD = """---
library_name: transformers
pipeline_tag: text-generation
tags: [sparse, padst]
---
# {architecture}, {structure}, density {density:.4g}

Trained sparse by padst_exp, layers packed, permutations folded into their indices.

```python
import padst_exp.integrations.transformers
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("<this folder>")
```

| | |
|---|---|
{facts}

| scope | density | weights kept | of |
|---|---|---|---|
{scopes}

Speed was not measured for this card; `padst_exp.inference.tune` measures it where the model runs.
"""


def require_language_model(restored: RestoredRun) -> None:
    """Refuse a run whose model transformers has no class for.

    Raises:
        UserError: it is none of ours of GPT-2 or LLaMA, or was made another one.
    """
    model, transform = restored.model, restored.config.transform._target_
    if not isinstance(model, GPT2 | Llama):
        raise UserError(
            "format: expected packed or dense for a model that is neither GPT-2 nor LLaMA, got "
            "transformers"
        )
    if not transform.endswith(f".{NoTransform.__name__}"):
        raise UserError(
            f"format: expected packed or dense for a model with transform {transform}, which "
            "transformers does not have, got transformers"
        )


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
    files["README.md"] = _card(restored, config.architectures[0], metrics)
    return files


def configuration_of(model: nn.Module) -> Any:
    """The configuration of transformers in a language model of ours; None in another model."""
    inner = getattr(model, "transformer", None) or getattr(model, "model", None)
    return getattr(inner, "config", None)


def _card(restored: RestoredRun, architecture: str, metrics: Mapping[str, float]) -> str:
    report, config = restored.report, restored.config
    facts = {
        "structure": report.structure,
        "permutation": _short(config.permutation._target_),
        "algorithm": _short(config.dst._target_),
        "data": _short(config.dataset._target_),
        "optimizer steps": restored.step,
        **{name: f"{value:.4g}" for name, value in metrics.items() if "perplexity" in name},
    }
    counts: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for layer in report.layers:
        # The name of a weight is <layer>.weights.<part>; layers of all blocks are one scope.
        name = ".".join(
            "*" if part.isdecimal() else part
            for part in layer.name.split(".weights.")[0].split(".")
        )
        counts[name][0] += layer.parameters
        counts[name][1] += layer.shape[0] * layer.shape[1]
    scopes = [
        f"| `{name}` | {kept / total:.4g} | {kept:,.0f} | {total:,.0f} |"
        for name, (kept, total) in counts.items()
    ]
    scopes += [
        f"| all {scope} | {report.density(scope):.4g} | | |" for scope in ("layers", "model")
    ]
    return CARD.format(
        architecture=architecture,
        structure=report.structure,
        density=report.density("layers"),
        facts="\n".join(f"| {name} | {value} |" for name, value in facts.items()),
        scopes="\n".join(scopes),
    )


def _short(target: str) -> str:
    return target.rpartition(".")[2]
