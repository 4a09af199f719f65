"""Muon for weights of which only a part is active, beside AdamW for what is no hidden matrix."""

import math
from collections.abc import Callable, Collection
from typing import Any, overload

import torch
from torch import Tensor, nn

from padst_exp.engine.adamw import AgeAwareAdamW, risen
from padst_exp.layers import SparseWeight
from padst_exp.layers.views import view
from padst_exp.sparsify import output_layer

# Of the quintic that sends singular values towards 1 (Jordan 2024, github.com/KellerJordan/Muon).
QUINTIC = (3.4445, -4.7750, 2.0315)
# Root mean square of an update of AdamW, over its learning rate (Liu 2025, arXiv 2502.16982).
ADAMW_RMS = 0.2


class SparseMuon(AgeAwareAdamW):
    """Muon (Jordan 2024) for hidden matrices, sparse or dense, and AdamW for everything else.

    The momentum of a sparse weight is laid out as the dense `[O, I]` that it stands for and made
    orthogonal there. The active entries of that are the update, at the root mean square that the
    dense one has, so that at density 1 it is plain Muon; what was grown may rise slowly. So does
    TANS (CHTsNM, 2026), of which we know the abstract alone.

    Args:
        groups: as in `torch.optim.AdamW`; Muon takes those with `muon` set.
        weights: the sparse weights whose values they hold.
        adamw_lr: learning rate of AdamW as a share of that of Muon.
        momentum: decay of the average of gradients.
        nesterov: whether to look ahead.
        ns_steps: rounds of Newton-Schulz.
        regrowth_warmup: as in `AgeAwareAdamW`.
        arguments: of AdamW; Muon shares learning rate and weight decay.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        *,
        weights: Collection[SparseWeight],
        adamw_lr: float,
        momentum: float,
        nesterov: bool,
        ns_steps: int,
        regrowth_warmup: int = 0,
        **arguments: Any,
    ) -> None:
        super().__init__(groups, regrowth_warmup=regrowth_warmup, **arguments)
        self.weights = list(weights)
        self.adamw_lr = adamw_lr
        self.momentum = momentum
        self.nesterov = nesterov
        self.ns_steps = ns_steps

    @overload
    def step(self, closure: None = None) -> None: ...
    @overload
    def step(self, closure: Callable[[], float]) -> float: ...
    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        groups = self.param_groups
        self.param_groups = [
            {**group, "lr": group["lr"] * self.adamw_lr} for group in groups if not group["muon"]
        ]
        try:
            loss = super().step(closure)
        finally:
            self.param_groups = groups
        # A change of the number of entries makes other Parameters.
        owners = {weight.values: weight for weight in self.weights}
        for group in groups:
            for parameter in group["params"] if group["muon"] else ():
                if parameter.grad is not None:
                    self._update(parameter, owners.get(parameter), group)
        return loss

    def _update(
        self, parameter: Tensor, weight: SparseWeight | None, group: dict[str, Any]
    ) -> None:
        gradient, state = parameter.grad, self.state[parameter]
        assert gradient is not None
        if not state:
            state["step"] = torch.zeros(())
            state["momentum_buffer"] = torch.zeros_like(parameter)
        state["step"] += 1
        momentum = state["momentum_buffer"].lerp_(gradient, 1 - self.momentum)
        update = gradient.lerp(momentum, self.momentum) if self.nesterov else momentum
        if weight is None:
            rows, columns = len(update), update[0].numel()
            update = orthogonal(update.flatten(1), self.ns_steps).view_as(update)
        else:
            rows, columns = weight.shape
            update = _on_support(update, weight, self.ns_steps)
        if self.regrowth_warmup and "birth" in state:
            born = state["births"][state["birth"].int()]
            update = update * risen(born, state["step"] - born, self.regrowth_warmup)
        parameter.mul_(1 - group["lr"] * group["weight_decay"])
        scale = ADAMW_RMS * math.sqrt(max(rows, columns))
        parameter.add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrix: Tensor, steps: int) -> Tensor:
    """Return U V^T of `matrix` = U S V^T, `[O, I]`, nearly: singular values end about 1.

    By rounds of Newton-Schulz, in bfloat16 on a GPU and in the dtype of `matrix` elsewhere.
    """
    a, b, c = QUINTIC
    x = matrix.bfloat16() if matrix.is_cuda else matrix
    x = x / x.norm().clamp(min=1e-7)
    wide = len(x) <= x.shape[1]
    x = x if wide else x.T
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.T).to(matrix.dtype)


def _on_support(update: Tensor, weight: SparseWeight, steps: int) -> Tensor:
    """The active entries of the orthogonal update, scaled to the root mean square of all of it."""
    whole = orthogonal(weight.laid_out(update), steps)
    kept, active = weight.taken_from(whole), weight.taken_from(torch.ones_like(whole)).sum()
    rms = kept.norm() / active.sqrt()
    return kept * (whole.norm() / whole.numel() ** 0.5 / rms.clamp(min=torch.finfo(rms.dtype).tiny))


def hidden_matrices(model: nn.Module) -> set[Tensor]:
    """The weights of `model` that Muon takes: sparse ones, and dense ones of hidden layers.

    Those of a linear layer or an ungrouped convolution that neither gives the model's outputs nor
    reads its inputs; where there are embeddings, they read them.
    """
    layers: dict[nn.Module, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, SparseWeight):
            layers[module] = module.values
        elif (found := view(module, name)) is not None:
            layers[module] = getattr(module, found.weight)
    tables: set[Tensor] = {m.weight for m in model.modules() if isinstance(m, nn.Embedding)}
    outputs = [m for m in layers if isinstance(m, SparseWeight) and m.is_output]
    outer: set[nn.Module | None] = {*outputs} or {output_layer(model)}
    first = next(iter(layers), None)
    if not tables and not isinstance(first, SparseWeight):
        outer.add(first)
    return {weight for module, weight in layers.items() if module not in outer} - tables
