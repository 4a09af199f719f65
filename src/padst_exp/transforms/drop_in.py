"""Transforms of single layers, whose inputs and outputs stay: Parallel, Factorized, Doped.

Shape letters: O, I the rows and columns of a layer as one matrix (a convolution has I = kh * kw *
C), s the sparsity, f an activation, N the batch norm that reads the layer, or nothing.
"""

from __future__ import annotations

import abc
import copy
import math
from collections import OrderedDict
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp.errors import UserError, require
from padst_exp.layers.views import LinearView, replace_module
from padst_exp.sparsify import Rule
from padst_exp.transforms.chains import Chain, chains, model_activation
from padst_exp.transforms.transform import Original, Rewrite, Transform, whole

# More layers in place of one would take minutes to build.
MOST_BRANCHES = 1000


class Parallel(nn.Module):
    """The sum of several branches.

    Args:
        branches: each maps an input to the same shape.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of what the branches make of `x`."""
        y: Tensor = self.branches[0](x)
        for branch in self.branches[1:]:
            y = y + branch(x)
        return y


class Doped(nn.Module):
    """A sparse path beside a dense one of low rank, N U V x.

    Args:
        sparse: the layer that becomes sparse, as `layer`, and what follows it.
        down, up: V and U.
        norm: N, or None.
    """

    def __init__(
        self, sparse: nn.Module, down: nn.Module, up: nn.Module, norm: nn.Module | None
    ) -> None:
        super().__init__()
        self.sparse = sparse
        self.down = down
        self.up = up
        self.norm = norm

    def forward(self, x: Tensor) -> Tensor:
        """The sum of both paths."""
        low_rank = self.up(self.down(x))
        y: Tensor = self.sparse(x) + (low_rank if self.norm is None else self.norm(low_rank))
        return y


class DropIn(Transform):
    """A transform that replaces one layer after another.

    Args:
        scope: as in `Transform`.
        nonlinearity: "paper" has an activation inside of what takes the place of a layer: the one
            that reads the layer, which then moves there, or the model's first where none does;
            "code" is what the authors' models for CIFAR do.
        keep: patterns of layers that become sparse as they are, such as convolutions of shortcuts.
    """

    def __init__(
        self,
        *,
        scope: Literal["model", "layers"],
        nonlinearity: Literal["paper", "code"],
        keep: Sequence[str],
    ) -> None:
        super().__init__(scope=scope)
        self.nonlinearity = nonlinearity
        self.keep = tuple(keep)

    def rewrite(
        self,
        model: nn.Module,
        original: Original,
        chosen: Sequence[tuple[LinearView, Rule]],
        sparsity: float,
    ) -> Rewrite:
        replaced = {
            found.name
            for found, _ in chosen
            if not any(fnmatchcase(found.name, p) for p in self.keep)
        }
        if sparsity == 0:
            replaced = set()
        found_chains = chains(model, original.inputs, replaced)
        first = model_activation(model)
        rules: list[Rule] = []
        factors = 0
        for found, rule in chosen:
            if found.name not in replaced:
                rules.append(Rule(found.name, rule.split))
                continue
            if isinstance(found.module, nn.MultiheadAttention):
                raise UserError(
                    f"transform: expected linear layers or convolutions, got '{found.name}', a "
                    "MultiheadAttention"
                )
            try:
                made, inside, extra = self.replacement(
                    model, found, rule, found_chains[found.name], first, sparsity
                )
            except UserError as error:
                raise UserError(f"{error} (layer {found.name})") from None
            replace_module(model, found.module, made.train(found.module.training))
            rules += [Rule(f"{found.name}.{name}", split) for name, split in inside]
            factors += extra
        return Rewrite(model, rules, factors)

    @abc.abstractmethod
    def replacement(
        self,
        model: nn.Module,
        found: LinearView,
        rule: Rule,
        chain: Chain,
        first: nn.Module,
        sparsity: float,
    ) -> tuple[nn.Module, list[tuple[str, int]], int]:
        """What takes the place of one layer.

        Args:
            model: out of which the chain may be taken.
            found: the layer.
            rule: that chose it.
            chain: what reads it.
            first: the first activation of the model.
            sparsity: as asked.

        Returns:
            The new module; names and splits of the sparse layers in it; how many dense weights it
            has beside them.
        """


class SparseParallel(DropIn):
    """y = sum over k = 1 / (1 - s) branches of f(N W_i x).

    With nonlinearity "code" f comes after the sum: the branches then add up to one layer, apart
    from their norms. (The authors' models for ImageNet are the paper's.)
    """

    def replacement(
        self,
        model: nn.Module,
        found: LinearView,
        rule: Rule,
        chain: Chain,
        first: nn.Module,
        sparsity: float,
    ) -> tuple[nn.Module, list[tuple[str, int]], int]:
        inside = self.nonlinearity == "paper"
        number = whole(1 / (1 - sparsity), "branches", sparsity)
        most = f"at most {1 - 1 / MOST_BRANCHES}, which is {MOST_BRANCHES} branches"
        require(number <= MOST_BRANCHES, "sparsity", sparsity, most)
        # So that the sum starts at the scale of the one layer; norms see to it themselves.
        scale = 1.0 if chain.norm is not None else number ** (-1.0 if inside else -0.5)
        act = (chain.act or first) if inside else None
        branches = [
            _sequence(layer=_fresh(found, scale), norm=chain.norm, act=act) for _ in range(number)
        ]
        chain.take(model, act=inside)
        return (
            Parallel(branches),
            [(f"branches.{i}.layer", rule.split) for i in range(number)],
            0,
        )


class SparseFactorized(DropIn):
    """y = U f(N V x) of rank O I / ((O + I) (1 - s)), both factors sparse; N is a new batch norm
    where one reads the layer.

    With nonlinearity "code" the product is linear, U V x, as is the default there (its
    configuration of ResNet-18 is the paper's).
    """

    def replacement(
        self,
        model: nn.Module,
        found: LinearView,
        rule: Rule,
        chain: Chain,
        first: nn.Module,
        sparsity: float,
    ) -> tuple[nn.Module, list[tuple[str, int]], int]:
        inside = self.nonlinearity == "paper"
        size, sides = found.matrix.numel(), sum(found.matrix.shape)
        rank = math.ceil(size / (sides * (1 - sparsity)) - 1e-9)
        down, up = _factors(found, rank, 2.0 if inside else 1.0, bias=True)
        norm = nn.BatchNorm2d(rank).to(found.matrix) if inside and chain.norm is not None else None
        act = (chain.act or first) if inside else None
        made = _sequence(down=down, norm=norm, act=act, up=up)
        return made, [("down", 1), ("up", rule.split)], 0


class SparseDoped(DropIn):
    """y = f(N W x) + N' U V x, W sparse, U V dense and of rank s O I / (O + I).

    With nonlinearity "code" norm and activation come after the sum of both paths. There U and V
    are masked like all matrices, which leaves the model at 1 - s^2 of its FLOPs; here they are
    dense in both forms.
    """

    def replacement(
        self,
        model: nn.Module,
        found: LinearView,
        rule: Rule,
        chain: Chain,
        first: nn.Module,
        sparsity: float,
    ) -> tuple[nn.Module, list[tuple[str, int]], int]:
        inside = self.nonlinearity == "paper"
        rank = math.floor(sparsity * found.matrix.numel() / sum(found.matrix.shape) + 1e-9)
        if rank < 1:
            raise UserError(
                f"sparsity: expected one that pays for a factor of rank 1, got {sparsity:g}"
            )
        # Each path has half of the variance.
        down, up = _factors(found, rank, 0.5, bias=False)
        layer = _fresh(found, 1.0 if inside or chain.norm is not None else math.sqrt(0.5))
        if inside:
            path = _sequence(layer=layer, norm=chain.norm, act=chain.act or first)
            made = Doped(path, down, up, copy.deepcopy(chain.norm))
            chain.take(model, act=True)
        else:
            made = Doped(_sequence(layer=layer), down, up, None)
        factors = sum(part.weight.numel() for part in (down, up))
        return made, [("sparse.layer", rule.split)], factors


def _sequence(**modules: nn.Module | None) -> nn.Sequential:
    """What is not None, in order; layers are new already, norms and activations are copied."""
    return nn.Sequential(
        OrderedDict(
            (name, copy.deepcopy(module) if name in ("norm", "act") else module)
            for name, module in modules.items()
            if module is not None
        )
    )


@torch.no_grad()
def _fresh(found: LinearView, scale: float) -> nn.Module:
    """A layer like `found` with other random weights of the same variance, times `scale`^2."""
    layer = copy.deepcopy(found.module)
    weight = getattr(layer, found.weight)
    if not weight.is_meta:
        weight.normal_(std=float(found.matrix.std()) * scale)
    return layer


@torch.no_grad()
def _factors(
    found: LinearView, rank: int, gain: float, *, bias: bool
) -> tuple[nn.Linear | nn.Conv2d, nn.Linear | nn.Conv2d]:
    """V, which has the kernel of a convolution, and U; `gain` times the layer's variance."""
    rows, columns = found.matrix.shape
    layer, offset = found.module, found.bias_tensor if bias else None
    down: nn.Linear | nn.Conv2d
    up: nn.Linear | nn.Conv2d
    if isinstance(layer, nn.Conv2d):
        down = copy.deepcopy(layer)
        down.out_channels, down.bias = rank, None
        down.weight = nn.Parameter(layer.weight.new_empty(rank, *layer.weight.shape[1:]))
        up = nn.Conv2d(rank, rows, 1, bias=offset is not None)
    else:
        down = nn.Linear(columns, rank, bias=False)
        up = nn.Linear(rank, rows, bias=offset is not None)
    down, up = down.to(found.matrix), up.to(found.matrix)
    if not found.matrix.is_meta:
        down.weight.normal_(std=columns**-0.5)
        up.weight.normal_(std=float(found.matrix.std()) * math.sqrt(gain * columns / rank))
        if offset is not None and up.bias is not None:
            up.bias.copy_(offset)
    return down, up
