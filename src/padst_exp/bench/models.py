"""Whole models for the suites that time or weigh them: dense, sparse, eager, compiled."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from padst_exp import dispatch
from padst_exp.bench import dense
from padst_exp.bench.configurations import Model, describe
from padst_exp.bench.forms import CONDENSED, FEATURES, packed
from padst_exp.bench.session import Session
from padst_exp.bench.topology import is_permuted
from padst_exp.engine.backends import describe as describe_backends
from padst_exp.engine.step import compile_blocks
from padst_exp.inference import pack, tune
from padst_exp.inference.linear import TiledLinear
from padst_exp.permutations import DoublyStochastic, Learner, NoPermutation, RandomPermutation
from padst_exp.sparsify import sparsify
from padst_exp.structures import Structure

# Tokens that dense weights are packed for; the order depends on them only where they are few.
PACKED_TOKENS = 4096
EAGER = "eager"


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One model to run.

    Args:
        structure: of its sparse layers, "dense" where there are none.
        form: how it is computed.
        module: the model on its device.
        side: see `report.Line`.
        backends: what the dispatcher chose, in one line.
        learner: of soft permutations.
    """

    structure: str
    form: str
    module: nn.Module
    side: Literal["dense", "strong", "sparse"] = "sparse"
    scope: str = "all"
    permutation: str = "none"
    density_asked: float = 1.0
    density: float = 1.0
    backends: str = ""
    learner: Learner | None = None

    @property
    def sparse_scope(self) -> str:
        """Which layers are sparse; "" for none."""
        return self.scope if self.side == "sparse" else ""

    @property
    def name(self) -> str:
        """Unlike that of any other variant of a model."""
        parts = [self.structure, self.form]
        parts += [] if self.side != "sparse" else [self.scope, f"{self.permutation} permutations"]
        return ", ".join(parts)


def dense_variants(session: Session, model: Model, *, training: bool) -> list[Variant]:
    """Eager and compiled; and by oneDNN where there is one, in inference with packed weights."""
    eager = model.build().to(session.device, weights_dtype(session, training))
    variants = [
        Variant(structure="dense", form=form, module=module, side="dense", scope="")
        for form, module in ((EAGER, eager), ("compiled", compiled_twin(eager)))
    ]
    if dense.has_onednn(session.device, session.dtype):
        fast = twin(eager)
        layers = [name for name, inside in eager.named_modules() if dense.is_linear(inside)]
        dense.use_onednn(fast, layers, None if training else PACKED_TOKENS)
        compile_blocks(fast)
        variants.append(
            Variant(structure="dense", form="oneDNN", module=fast, side="strong", scope="")
        )
    return variants


def sparse_variants(
    session: Session,
    model: Model,
    structure: Structure,
    density: float,
    scope: str,
    *,
    batch: int,
    training: bool,
    soft: bool = False,
) -> list[Variant]:
    """Eager and compiled, with the kernels that the dispatcher chooses for `batch` samples.

    Raises:
        UserError: the structure cannot hold that density in a layer of the model.
    """
    module = model.build()
    learner: Learner = NoPermutation()
    if is_permuted(structure):
        learner = DoublyStochastic() if soft else RandomPermutation()
    report = sparsify(
        module, model.rules(scope), structure=structure, density=density, learner=learner
    )
    module.to(session.device, weights_dtype(session, training))
    backends = choose_backends(session, model, module, describe(structure), batch, training)
    return [
        Variant(
            structure=describe(structure),
            form=form,
            module=variant,
            scope=scope,
            permutation=permutation(structure, soft=soft),
            density_asked=density,
            density=report.density("layers"),
            backends=backends,
            learner=learner if soft else None,
        )
        for form, variant in ((EAGER, module), ("compiled", compiled_twin(module)))
    ]


def phases(structure: Structure) -> tuple[bool, ...]:
    """Whether permutations are soft, in each phase of training."""
    return (False, True) if is_permuted(structure) else (False,)


def permutation(structure: Structure, *, soft: bool) -> str:
    """As in `report.Line`."""
    if not is_permuted(structure):
        return "none"
    return "soft" if soft else "hard"


def exported_variants(session: Session, variant: Variant, inputs: Tensor) -> list[Variant]:
    """What `padst_exp.export` and `tune` make of an eager sparse model; eager and compiled.

    Empty, and a message, where the kernels they would use have failed their checks.
    """
    module = copy.deepcopy(variant.module)
    pack(module)
    tiled = any(isinstance(layer, TiledLinear) for layer in module.modules())
    backends = [
        backend
        for backend in FEATURES
        if not any(
            session.refusal(kernel, variant.structure, backward=False)
            for kernel in ((packed(backend), FEATURES[backend]) if tiled else (CONDENSED[backend],))
        )
    ]
    if not backends:
        session.say(f"{variant.name}: not exported, its kernels did not pass their checks")
        return []
    report = tune(module, inputs, backends=backends)
    chosen = {"token-major": report.layers, "feature-major": report.feature_layers}
    counts = Counter(choice.choice for choice in chosen.get(report.layout, []))
    chosen_by = ", ".join(f"{count} by {name}" for name, count in counts.items())
    how = f"{report.layout}: {chosen_by}" if chosen_by else report.layout
    return [
        replace(variant, form=f"exported, {form}", module=made, backends=how)
        for form, made in (("eager", module), ("compiled", compiled_twin(module)))
    ]


def choose_backends(
    session: Session, model: Model, module: nn.Module, structure: str, batch: int, training: bool
) -> str:
    """Let every product use the fastest kernel that may be used; what was chosen, in one line."""
    inputs, _ = model.example(1, torch.Generator().manual_seed(0))
    inputs = to_device(session, inputs, training=training)

    def one_sample() -> None:
        with torch.no_grad(), forward_context(session, training):
            module(inputs)

    choices = dispatch.choose(
        module,
        one_sample,
        samples=batch,
        device=session.device,
        compiled=False,
        allowed=session.backends(structure),
    )
    return describe_backends(choices).partition(": ")[2]


def weights_dtype(session: Session, training: bool) -> torch.dtype:
    """Training keeps single precision and multiplies under autocast."""
    return torch.float32 if training else session.dtype


def forward_context(session: Session, training: bool) -> torch.autocast:
    """Autocast to the session's dtype where weights are wider."""
    lower = session.dtype != torch.float32
    return torch.autocast(session.device.type, session.dtype, enabled=training and lower)


def to_device(session: Session, tensor: Tensor, *, training: bool) -> Tensor:
    """Inputs or targets where the model is, in the dtype of its weights."""
    dtype = weights_dtype(session, training) if tensor.is_floating_point() else tensor.dtype
    return tensor.to(session.device, dtype)


def twin(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def compiled_twin(module: nn.Module) -> nn.Module:
    """A twin whose blocks are compiled, as training compiles them."""
    second = twin(module)
    compile_blocks(second)
    return second
