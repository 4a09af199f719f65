"""Language models over transformers: targets of conf/model/gpt2*.yaml."""

from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from padst_exp.errors import require
from padst_exp.files import reading


class GPT2(nn.Module):
    """GPT-2 as a plain function of tokens; modules keep the names of transformers.

    Args:
        lm: whose parts this model takes over; the head stays tied to the token embedding.
    """

    def __init__(self, lm: GPT2LMHeadModel) -> None:
        super().__init__()
        self.transformer = lm.transformer
        self.lm_head = lm.lm_head
        assert self.lm_head.weight is self.transformer.wte.weight

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 `[B, T]`, to logits of the next ones, `[B, T, V]`."""
        hidden = self.transformer(tokens, use_cache=False).last_hidden_state
        return cast(Tensor, self.lm_head(hidden))


def gpt2(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    dim: int,
    depth: int,
    heads: int,
    dropout: float,
    vocab_size: int,
    context_length: int,
) -> GPT2:
    """GPT-2 (Radford et al. 2019).

    Args:
        name: on the hub, for `pretrained`.
        pretrained: load the weights of `name` from the hub; they must have these sizes.
        checkpoint: load weights from this folder, saved by transformers, instead.
        dim: width of the residual stream, a multiple of `heads`.
        depth: number of blocks.
        heads: per attention.
        dropout: of embeddings, attention and residual branches.
        vocab_size: number of tokens.
        context_length: the longest sequence.

    Raises:
        UserError: sizes that do not fit each other, or unavailable weights.
    """
    fits = dim >= 1 and heads >= 1 and dim % heads == 0
    require(fits, "model.heads", heads, f"a divisor of model.dim={dim}")
    if checkpoint is not None:
        require(not pretrained, "model.checkpoint", checkpoint, "null beside model.pretrained=true")
        require(Path(checkpoint).is_dir(), "model.checkpoint", checkpoint, "an existing folder")
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context_length,
        n_embd=dim,
        n_layer=depth,
        n_head=heads,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Set afterwards: the constructor takes it but does not declare it.
    config._attn_implementation = "sdpa"
    if not pretrained and checkpoint is None:
        return GPT2(GPT2LMHeadModel(config))
    key = "model.checkpoint" if checkpoint else "model.pretrained"
    source = checkpoint or name
    with reading(key, source, "weights to load"):
        stored, _ = GPT2Config.get_config_dict(source)
        _require_same(stored, config, key, source)
        # By default the weights would keep the precision of the file, and so would training.
        loading: Any = GPT2LMHeadModel.from_pretrained(
            source, config=config, dtype=torch.float32, output_loading_info=True
        )
    lm, loaded = loading
    missing = sorted(set(loaded["missing_keys"]) - {"lm_head.weight"})  # tied to the embedding
    found = f"{source} without {', '.join(missing[:1])}"
    require(not missing, key, found, "weights of these sizes")
    finite = all(parameter.isfinite().all() for parameter in lm.parameters())
    require(finite, key, f"{source} with others", "weights that are finite")
    return GPT2(lm)


COMPUTES = {
    "model_type": "gpt2",
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 1e-5,
    "n_inner": None,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}
"""What `gpt2` computes, in the words of a config of transformers."""

SIZES = {"n_layer": "depth", "n_head": "heads", "n_embd": "dim"}
"""Sizes in a config of transformers, and the keys of ours."""


def _require_same(stored: dict[str, Any], ours: GPT2Config, key: str, source: str) -> None:
    """Refuse weights whose own config describes another function than `gpt2` computes."""
    for name, right in COMPUTES.items():
        value = stored.get(name, right)
        same = value == right or (name == "n_inner" and value == 4 * ours.n_embd)
        require(same, key, f"{source} with {name}={value}", f"a model with {name}={right}")
    for name, mine in SIZES.items():
        found = getattr(ours, name)
        right = stored.get(name, found)
        require(found == right, f"model.{mine}", found, f"{right} as in {source}")
