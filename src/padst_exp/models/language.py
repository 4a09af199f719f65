"""Language models over transformers: targets of conf/model/*.yaml. Tokens to logits."""

import math
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from padst_exp.errors import require
from padst_exp.files import reading
from padst_exp.models.sizes import require_depth, require_rate

FUSED_GELU = "gelu_pytorch_tanh"
"""GPT-2's own activation, the tanh form, as one operation: 2.3 ms for 1,024 x 512 with gradients on
one core, where "gelu_new", the same formula in eight operations, takes 6.1 ms."""


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
    init_std: float,
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
        init_std: of fresh weights; of those that end a residual branch over sqrt(2 depth). GPT-2
            has 0.02; as many steps of a model 128 wide end at a perplexity of 35.3 with 0.05
            and of 58.6 with 0.02.
        vocab_size: number of tokens.
        context_length: the longest sequence.

    Raises:
        UserError: sizes that do not fit each other, or unavailable weights.
    """
    fits = dim >= 1 and heads >= 1 and dim % heads == 0
    require(fits, "model.heads", heads, f"a divisor of model.dim={dim}")
    require_depth(depth)
    require_rate("dropout", dropout)
    _require_init_std(init_std)
    config = GPT2Config(
        vocab_size=vocab_size,
        n_positions=context_length,
        n_embd=dim,
        n_layer=depth,
        n_head=heads,
        activation_function=FUSED_GELU,
        initializer_range=init_std,
        resid_pdrop=dropout,
        embd_pdrop=dropout,
        attn_pdrop=dropout,
        bos_token_id=None,
        eos_token_id=None,
    )
    # Embedding and head are tied.
    return GPT2(_load(GPT2LMHeadModel, config, name, pretrained, checkpoint, {"lm_head.weight"}))


class Llama(nn.Module):
    """LLaMA as a plain function of tokens; modules keep the names of transformers.

    Args:
        lm: whose parts this model takes over.
    """

    def __init__(self, lm: LlamaForCausalLM) -> None:
        super().__init__()
        self.model = lm.model
        self.lm_head = lm.lm_head
        # Its frequencies stand in no state, also where a model is built without any memory.
        with torch.device("cpu"):
            self.model.rotary_emb = LlamaRotaryEmbedding(lm.config)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map tokens, int64 `[B, T]`, to logits of the next ones, `[B, T, V]`."""
        hidden = self.model(tokens, use_cache=False).last_hidden_state
        return cast(Tensor, self.lm_head(hidden))


def llama(
    *,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    dim: int,
    mlp_dim: int,
    depth: int,
    heads: int,
    init_std: float,
    vocab_size: int,
    context_length: int,
) -> Llama:
    """LLaMA (Touvron et al. 2023): rotary embeddings, gated MLPs, RMS norms, no biases.

    Args:
        name: as in `gpt2`, like all others not named here.
        dim: width of the residual stream, an even multiple of `heads`.
        mlp_dim: hidden width of the MLPs.
        init_std: of fresh weights.

    Raises:
        UserError: sizes that do not fit each other, or unavailable weights.
    """
    fits = dim >= 1 and heads >= 1 and dim % (2 * heads) == 0
    require(fits, "model.heads", heads, f"one whose double divides model.dim={dim}")
    require_depth(depth)
    require(mlp_dim >= 1, "model.mlp_dim", mlp_dim, "at least 1")
    _require_init_std(init_std)
    config = LlamaConfig(
        vocab_size=vocab_size,
        max_position_embeddings=context_length,
        hidden_size=dim,
        intermediate_size=mlp_dim,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        initializer_range=init_std,
        bos_token_id=None,
        eos_token_id=None,
    )
    return Llama(_load(LlamaForCausalLM, config, name, pretrained, checkpoint, set()))


def _require_init_std(value: float) -> None:
    require(0 < value < math.inf, "model.init_std", value, "a number above 0")


def _load(
    kind: Any,
    config: Any,
    name: str,
    pretrained: bool,
    checkpoint: str | None,
    tied: set[str],
) -> Any:
    """A model of transformers with the weights that are asked for, or fresh ones."""
    if checkpoint is not None:
        require(not pretrained, "model.checkpoint", checkpoint, "null beside model.pretrained=true")
        require(Path(checkpoint).is_dir(), "model.checkpoint", checkpoint, "an existing folder")
    # Set afterwards: the constructor takes it but does not declare it.
    config._attn_implementation = "sdpa"
    if not pretrained and checkpoint is None:
        return kind(config)
    key = "model.checkpoint" if checkpoint else "model.pretrained"
    source = checkpoint or name
    with reading(key, source, "weights to load"):
        stored, _ = type(config).get_config_dict(source)
        _require_same(stored, config, key, source)
        # By default the weights would keep the precision of the file, and so would training.
        loading: Any = kind.from_pretrained(
            source,
            config=config,
            dtype=torch.float32,
            output_loading_info=True,
            weights_only=True,
            trust_remote_code=False,
        )
    lm, loaded = loading
    missing = sorted(set(loaded["missing_keys"]) - tied)
    found = f"{source} without {', '.join(missing[:1])}"
    require(not missing, key, found, "weights of these sizes")
    finite = all(parameter.isfinite().all() for parameter in lm.parameters())
    require(finite, key, f"{source} with others", "weights that are finite")
    return lm


COMPUTES: dict[str, dict[str, object]] = {
    "gpt2": {
        "activation_function": FUSED_GELU,
        "layer_norm_epsilon": 1e-5,
        "n_inner": None,
        "scale_attn_weights": True,
        "scale_attn_by_inverse_layer_idx": False,
        "add_cross_attention": False,
        "tie_word_embeddings": True,
    },
    "llama": {
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_type": "default",
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "num_key_value_heads": None,
        "head_dim": None,
    },
}
"""What our models compute, in the words of a config of transformers; None: what sizes make it."""

SIZES = {
    "gpt2": {"n_layer": "depth", "n_head": "heads", "n_embd": "dim"},
    "llama": {
        "num_hidden_layers": "depth",
        "num_attention_heads": "heads",
        "hidden_size": "dim",
        "intermediate_size": "mlp_dim",
    },
}
"""Sizes in a config of transformers, and the keys of ours."""


def _require_same(stored: dict[str, Any], ours: Any, key: str, source: str) -> None:
    """Refuse weights whose own config describes another function than our model computes."""
    kind = ours.model_type
    # Rotary embeddings are described in several ways.
    rope = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    theta = stored.get("rope_theta", rope.get("rope_theta", 10000.0))
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    stored = {**stored, "rope_theta": theta, "rope_type": rope_type}
    if stored.get("activation_function") == "gelu_new":
        stored["activation_function"] = FUSED_GELU
    made = {"n_inner": 4 * ours.hidden_size}
    for name, right in {"model_type": kind, **COMPUTES[kind]}.items():
        value = stored.get(name, right)
        derived = made.get(name, getattr(ours, name)) if right is None else right
        found = f"{source} with {name}={value}"
        require(value in (right, derived), key, found, f"a model with {name}={derived}")
    for name, mine in SIZES[kind].items():
        found = getattr(ours, name)
        right = stored.get(name, found)
        require(found == right, f"model.{mine}", found, f"{right} as in {source}")
