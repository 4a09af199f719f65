"""Transformer blocks that keep the residual stream feature-major between entry and exit.

The columns of a sparse product are then whole rows of memory, whatever they are, where a
token-major gather touches single elements. Each block is four products; its norms, biases, GELU,
LayerScale and residuals live in what surrounds them (`features.Fusion`). Attention reads QKV
token-major and writes token-major.

The two products of the MLP are two launches: every column of fc2 may need any feature of hidden,
so all of hidden must be there first, and what fusion saves elsewhere, GELU and bias, are in the
epilogue of fc1 already.

Shape letters: B sequences of N tokens, T = B * N rounded up to a multiple of 16, C features, H
heads of D features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from padst_exp.inference.features import FeatureLinear, Statistics
from padst_kernels.tiles import aligned_features

# Tokens are padded to multiples of this, which aligns every row of a feature-major activation.
TOKENS = 16


class FeatureBlock(nn.Module):
    """One pre-norm transformer block, x + proj(attention(qkv(x))), then x + fc2(fc1(x)).

    Args:
        qkv: norm folded in, token-major output.
        proj: token-major input.
        fc1: norm and activation folded in.
        fc2: the rest of the MLP.
        epsilons: of the two norms.
        heads: H.
        scale: of attention logits.
        causal: whether tokens see only those before them.
    """

    def __init__(
        self,
        qkv: FeatureLinear,
        proj: FeatureLinear,
        fc1: FeatureLinear,
        fc2: FeatureLinear,
        epsilons: tuple[float, float],
        *,
        heads: int,
        scale: float,
        causal: bool,
    ) -> None:
        super().__init__()
        self.qkv, self.proj, self.fc1, self.fc2 = qkv, proj, fc1, fc2
        self.epsilons, self.heads, self.scale, self.causal = epsilons, heads, scale, causal

    def forward(self, x: Tensor, shape: tuple[int, int], mask: Tensor | None) -> Tensor:
        """x `[T, C]` to the same; `shape` is (B, N), `mask` is added to attention logits."""
        qkv = self.qkv(x, statistics=_statistics(x, self.epsilons[0]))
        x = self.proj(self._attention(qkv, shape, mask), residual=x)
        hidden = self.fc1(x, statistics=_statistics(x, self.epsilons[1]))
        return self.fc2(hidden, residual=x)

    def _attention(self, qkv: Tensor, shape: tuple[int, int], mask: Tensor | None) -> Tensor:
        """`[T, 3 C]` to `[T, C]`, both token-major."""
        num_tokens = shape[0] * shape[1]
        parts = qkv[:num_tokens].view(*shape, 3, self.heads, -1)
        q, k, v = parts.permute(2, 0, 3, 1, 4).unbind(0)
        y = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=self.causal and mask is None, scale=self.scale
        )
        y = y.transpose(1, 2).reshape(num_tokens, -1)
        return _padded(y)


class FeatureStack(nn.Module):
    """All blocks of a model, from token-major to token-major `[B, N, C]`.

    Called like timm's `VisionTransformer.blocks`, and like a block of GPT-2 in transformers, which
    gives a causal mask (or None) and, as this runs without a cache of keys and values, nothing
    else that matters.

    Args:
        blocks: in order.
    """

    def __init__(self, blocks: Sequence[FeatureBlock]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    @torch.no_grad()
    def forward(
        self,
        x: Tensor,
        past_key_values: None = None,
        mask: Tensor | None = None,
        encoder_hidden_states: None = None,
        *,
        encoder_attention_mask: None = None,
        use_cache: bool | None = None,
        position_ids: Tensor | None = None,
    ) -> Tensor:
        if past_key_values is not None:
            raise ValueError("feature-major blocks keep no keys and values; use_cache=False")
        batch, length, _ = x.shape
        count = batch * length
        features = aligned_features(_padded(x.reshape(count, -1))).t()
        for block in self.blocks:
            features = block(features, (batch, length), mask)
        return features[:count].contiguous().view(x.shape)


def _padded(x: Tensor) -> Tensor:
    """`x` `[T, C]` with tokens of zeros up to a multiple of 16, which no result is made of."""
    count = x.shape[0]
    more = -(-count // TOKENS) * TOKENS - count
    # torch.export gives a symbol for any number, by which nothing can be decided.
    is_none = isinstance(count, int) and more == 0
    return x if is_none else nn.functional.pad(x, (0, 0, 0, more))


def _statistics(x: Tensor, epsilon: float) -> Statistics:
    """Mean and reciprocal standard deviation of each token, as LayerNorm has them."""
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    variance, mean = torch.var_mean(wide, dim=1, correction=0)
    return mean, (variance + epsilon).rsqrt()
