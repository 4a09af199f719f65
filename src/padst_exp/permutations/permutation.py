"""The state of one permutation: a doubly stochastic matrix while soft, an index once hard."""

import math
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn
from torch.nn import functional

from padst_exp.errors import UserError
from padst_exp.permutations.exchange import Exchange
from padst_exp.permutations.sinkhorn import project, sharpness_penalty, sinkhorn
from padst_exp.seal import Seal
from padst_exp.soft import Soft


def is_bijection(index: Tensor) -> bool:
    """Tell whether `index` `[d]`, integer, holds each of 0 .. d-1 once."""
    return torch.equal(index.long().sort().values, torch.arange(len(index), device=index.device))


def assign(matrix: Tensor) -> Tensor:
    """Return the permutation `[d]`, int64, that keeps most of the mass of `matrix` `[d, d]`.

    A linear assignment: the argmax of each row is not a bijection in 1 to 12% of the rows.
    """
    _, columns = linear_sum_assignment(matrix.detach().cpu().numpy(), maximize=True)
    return torch.as_tensor(columns, dtype=torch.int64, device=matrix.device)


class Permutation(Soft):
    """A permutation P of `size` features, (P x)[i] = x[index[i]]. Soft, then hard, one way.

    While soft, P is a doubly stochastic matrix M, (M x)[i] = sum_j M[i, j] x[j], given by `logits`
    `[size, size]`: through Sinkhorn's iterations at every call, or, in the projected form, as the
    entries themselves. `project_` must follow each optimizer step. Loading the state of a hard
    permutation hardens.

    Other relaxations derive from it: they call `_soften` with logits of their own shape and say
    what `relaxed` makes of them.

    Attributes:
        size: number of features d.
        index: `[d]`, int64; -1 everywhere while soft.
        initial: `[d]`, int64; what the initial matrix rounds to, to tell learning from kept noise.
        logits: `[d, d]`, float32 (or wider); None once hard.

    Args:
        start: `[d]`, integer: hard from the start. `[d, d]`, float: the initial `logits`.
        projected: `start` holds the entries of the matrix; they are projected at once.
        iterations: rounds of row and column normalisation.
    """

    index: Tensor
    initial: Tensor
    logits: nn.Parameter | None

    def __init__(self, start: Tensor, *, projected: bool = False, iterations: int = 10) -> None:
        super().__init__()
        self._seal = Seal(torch.clone)
        self.size = len(start)
        self.projected = projected
        self.iterations = iterations
        self.register_buffer("index", torch.full((self.size,), -1, device=start.device))
        self.register_buffer("initial", self.index.clone())
        self.logits = None
        if start.is_floating_point():
            assert start.shape == (self.size, self.size) and self.size > 1, start.shape
            self._soften(start)
        else:
            self.harden(start)
            self.initial.copy_(start)

    def _soften(self, logits: Tensor) -> None:
        """Begin soft, with `logits` of the shape that `relaxed` reads."""
        self.index.fill_(-1)
        self.logits = nn.Parameter(logits.detach().clone())
        self.project_()
        self.initial.copy_(self.nearest())
        self._seal.close(self.index)

    def matrix(self) -> Tensor:
        """Return what multiplies, M `[size, size]`, in float32 or wider, also under autocast.

        Differentiable.
        """
        if self.logits is None:
            return torch.eye(self.size, device=self.index.device)[self.index]
        with torch.autocast(self.logits.device.type, enabled=False):
            return self.relaxed()

    def relaxed(self) -> Tensor:
        """Return the doubly stochastic matrix `[size, size]` of the logits, differentiable.

        To be called while soft, without autocast. It is what multiplies, unless a derived class
        says otherwise in `matrix`.
        """
        logits = self._wide_logits()
        return logits if self.projected else sinkhorn(logits, self.iterations)

    def _wide_logits(self) -> Tensor:
        # A model cast to half precision as a whole still computes its permutations in float32.
        assert self.logits is not None, "hard permutations have no logits"
        return self.logits.to(torch.promote_types(self.logits.dtype, torch.float32))

    def forward(self, x: Tensor) -> Tensor:
        """Return M applied to the last dimension of `x` `[..., size]`; `x` itself once hard.

        The layer that owns a hard permutation folds `index` into its own gathers.
        """
        if self.logits is None:
            return x
        return functional.linear(x, self.matrix().to(x.dtype))

    def penalty(self) -> Tensor:
        """Return the distance to a permutation: 1 at the uniform matrix, 0 at a permutation."""
        if self.logits is None:
            return torch.zeros((), device=self.index.device)
        return sharpness_penalty(self.relaxed())

    def tangent(self, gradient: Tensor) -> Tensor:
        """Return a gradient of the logits without the directions along which M does not change."""
        centred = gradient - gradient.mean(-2, keepdim=True)
        return centred - centred.mean(-1, keepdim=True)

    @torch.no_grad()
    def nearest(self) -> Tensor:
        """Return the index `[size]`, int64, of the permutation nearest to the relaxed matrix."""
        return self.index.clone() if self.logits is None else assign(self.relaxed())

    @torch.no_grad()
    def harden(self, choice: Tensor | None = None) -> None:
        """Become hard for good and drop the matrix.

        Args:
            choice: `[size]`, integer: the permutation to adopt; by default the nearest one.
        """
        index = self.nearest() if choice is None else choice
        assert index.shape == (self.size,) and is_bijection(index), "not a permutation"
        self.index.copy_(index)
        self.logits = None
        self.changed()

    def changed(self) -> None:
        self._seal.close(self.index)
        super().changed()

    def check_written(self) -> None:
        """Refuse an index that somebody else wrote, from which nothing was derived.

        Raises:
            UserError: it was written in place, and is another one than before.
        """
        if not torch.compiler.is_compiling() and not self._seal.intact(self.index):
            raise UserError(
                "permutation: its index was overwritten in place, as averages of torch's "
                "swa_utils and copies of single tensors do; products would still go by the one "
                "before: take states over by load_state_dict, average by trainer.ema_decay"
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._seal.close(self.index)

    def held(self) -> Tensor:
        """Return the hard permutation that multiplies now, int64 `[size]`, if there is one."""
        return self.index

    @torch.no_grad()
    def exchange(self, proposal: Exchange) -> None:
        """Let another hard permutation take the place of a hard one. Values are moved by others."""
        assert self.logits is None and is_bijection(proposal.index), "only hard ones are exchanged"
        self.index.copy_(proposal.index)
        self.changed()

    @torch.no_grad()
    def project_(self) -> None:
        """Normalise `logits` after an optimizer step, so that M stays doubly stochastic.

        Sharp logits need far more rounds than one call of `matrix` makes: two rows would share a
        column, each at 0.5 and without penalty. A round that is kept at every step adds up.
        """
        if self.logits is None:
            return
        if self.projected:
            self.logits.copy_(project(self.logits, self.iterations))
        else:
            self.logits.copy_(self.logits.log_softmax(1).log_softmax(0))

    @torch.no_grad()
    def gain(self) -> Tensor:
        """Return |M - 11'/d|_F / sqrt(d): what M leaves of an input of zero mean; near 1 if hard.

        A near-uniform matrix nearly annihilates the output of a LayerNorm.
        """
        return (self.matrix() - 1 / self.size).norm() / math.sqrt(self.size)

    def agreement(self) -> float:
        """Return the share of rows on which the nearest permutation is the initial one."""
        return float((self.nearest() == self.initial).double().mean())

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        index = state_dict.get(f"{prefix}index")
        if index is not None and index.shape == (self.size,):
            soft = bool((index == -1).all())
            if not soft and not is_bijection(index):
                raise UserError(
                    f"{prefix}index: not a permutation of {self.size} features; "
                    "the checkpoint is damaged"
                )
            if soft and not self.soft:
                raise UserError(
                    f"{prefix}index: still soft in the checkpoint, hard in the model; "
                    "use the permutation learner of the checkpoint"
                )
            if not soft:
                self.logits = None
        initial = state_dict.get(f"{prefix}initial")
        if initial is not None and initial.shape == (self.size,) and not is_bijection(initial):
            raise UserError(
                f"{prefix}initial: not a permutation of {self.size} features; "
                "the checkpoint is damaged"
            )
        super()._load_from_state_dict(state_dict, prefix, *args)
        self.changed()
