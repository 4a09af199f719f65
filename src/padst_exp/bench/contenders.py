"""Ways to compute one linear layer or one model: dense ones, sparse ones, and their peers."""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from padst_exp.bench.choices import Layer, Model, Sparsity
from padst_exp.bench.onednn import has_onednn, use_onednn
from padst_exp.bench.session import Contender, Session, rotation
from padst_exp.dispatch import agrees
from padst_exp.engine.step import compile_blocks
from padst_exp.inference import PackedLinear, graphed, pack, tune
from padst_exp.layers import SparseLinear, sparse_layers
from padst_exp.sparsify import match, sparsify
from padst_kernels import Backend, is_here

# Modules whose passes one CUDA graph holds at most.
MAX_CAPTURED = 16


def dense(session: Session, subject: Layer | Model, packed: int | None = None) -> list[Contender]:
    """Eager, compiled, and by oneDNN where it is there; see `onednn` for `packed`."""
    module = subject.build().to(session.device, session.dtype)
    eager = Contender(form="eager", kind="dense", modules=[module])
    if isinstance(subject, Layer):
        eager = several(session, eager)
    # PyTorch convolves by oneDNN anyway.
    linear = all(isinstance(v.module, nn.Linear) for v, _ in match(module, subject.rules("all")))
    known = has_onednn(session.device, session.dtype) and session.autocast is None and linear
    return [eager, compiled(eager), *([onednn(eager, packed)] if known else [])]


def onednn(one: Contender, packed: int | None = None) -> Contender:
    """A dense contender by oneDNN, with weights packed for inference with so many tokens."""
    modules = [twin(module) for module in one.modules]
    for module in modules:
        use_onednn(module, packed)
        compile_blocks(module)
    form = "oneDNN" if packed is None else "oneDNN, packed"
    return replace(one, form=form, kind="strong", modules=modules, trained=packed is None)


def compiled(one: Contender) -> Contender:
    """An eager contender, compiled as training compiles it; it shares the parameters."""
    modules = [twin(module) for module in one.modules]
    for module in modules:
        if isinstance(module, nn.Sequential):  # a single layer
            module.compile(dynamic=False)
        else:
            compile_blocks(module)
    return replace(one, form=one.form.replace("eager", "compiled"), modules=modules)


def captured(one: Contender, inputs: Tensor) -> Contender:
    """A forward pass of every module of a contender as one CUDA graph."""
    some = one.modules[:MAX_CAPTURED]
    graph, form = graphed(Turns(some).eval(), inputs), f"{one.form}, CUDA graph"
    return replace(one, form=form, modules=[graph], trained=False, passes=len(some))


class Turns(nn.Module):
    """Modules that read the same input, one after the other; what the last one computes."""

    def __init__(self, modules: Collection[nn.Module]) -> None:
        super().__init__()
        self.turns = nn.ModuleList(modules)

    def forward(self, x: Tensor) -> Tensor:
        return [module(x) for module in self.turns][-1]


def sparse(
    session: Session, subject: Layer | Model, kind: Sparsity, density: float, scope: str = "all"
) -> Contender:
    """What `sparsify` makes of a layer or a model.

    Raises:
        UserError: the structure cannot hold that density in a layer.
    """
    module, learner = subject.build(), kind.learner()
    report = sparsify(
        module, subject.rules(scope), structure=kind.structure, density=density, learner=learner
    )
    module.to(session.device, session.dtype)
    return Contender(
        structure=kind.label, form="eager", modules=[module], scope=scope, learner=learner,
        permutation=kind.permutation, density_asked=density, density=report.density("layers"),
    )  # fmt: skip


def by_backend(
    session: Session, one: Contender, x: Tensor, plain: Collection[Backend]
) -> Iterator[Contender]:
    """A sparse layer by each backend that is right on `x`, and what export makes of it.

    Backends that every layer has are `plain`, and timed where there is nothing else.
    """
    layer = sparse_layer(one)
    leaf, values = x.clone().requires_grad_(), [weight.values for weight in layer.parts()]
    truth = _results(layer.dense_forward(leaf, layer.weight), leaf, *values)

    def timed(backends: list[Backend]) -> list[Backend]:
        here = [backend for backend in backends if is_here(backend)]
        return [backend for backend in here if backend not in plain] or here

    for backend in timed(layer.backends(session.device)):
        layer.use_backend(backend)
        if agrees(backend, lambda: _results(layer(leaf), leaf, *values), truth):
            yield several(session, replace(one, form=f"packed, {backend}"))
    if one.permutation != "soft":
        packed = exported_layer(one)
        for backend in timed(packed.backends()):
            packed.backend = backend
            if agrees(backend, lambda: [packed(x)], truth[:1]):
                form = f"exported, {backend}"
                yield several(session, replace(one, form=form, modules=[packed], trained=False))


def _results(y: Tensor, *inputs: Tensor) -> list[Tensor]:
    return [y.detach(), *torch.autograd.grad(y, inputs, torch.ones_like(y))]


def exported_layer(one: Contender) -> PackedLinear:
    """What export makes of a sparse layer."""
    module = copy.deepcopy(one.modules[0])
    pack(module)
    (packed,) = (part for part in module.modules() if isinstance(part, PackedLinear))
    return packed


def exported_model(one: Contender, inputs: Tensor) -> Contender:
    """What export and `tune` make of an eager sparse model."""
    module = copy.deepcopy(one.modules[0])
    pack(module)
    report = tune(module, inputs)
    how = f"{report.form}, {report.speedup:.2f}x dense"
    return replace(one, form="exported, eager", modules=[module], dispatcher=how)


def peers(session: Session, one: Contender, known: Collection[str]) -> Iterator[Contender]:
    """The weight of a sparse linear layer without permutations as others would have it.

    A format of PyTorch is there where it stores the entries of the weight and no zeros. Masks and
    CSR take as long whatever the structure is; they are left out where they are `known`.
    """
    weight = sparse_layer(one).weight.detach()
    tiles = exported_layer(one).tiles

    def peer(form: str, module: nn.Module, trained: bool = True) -> Contender:
        return several(session, replace(one, form=form, modules=[module], trained=trained))

    if "masked dense" not in known:
        yield peer("masked dense", Masked(weight))
    if session.device.type == "cpu" and session.dtype != torch.float32:
        return  # these formats know single precision only
    if tiles is None and "torch CSR" not in known:
        yield peer("torch CSR", Peer(weight.to_sparse_csr()))
    size = 0 if tiles is None else tiles.values.shape[2]
    if size and not any(side % size for side in weight.shape):
        blocks = weight.to_sparse_bsr((size, size))
        if blocks.values().numel() == sum(w.values.numel() for w in sparse_layer(one).parts()):
            yield peer("torch BSR", Peer(blocks), trained=False)


def twin(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def several(session: Session, one: Contender) -> Contender:
    """A contender with so many copies of its module that they exceed the last-level cache."""
    (module,) = one.modules
    tensors = [t if t.layout == torch.strided else t.values() for t in module.parameters()]
    size = sum(tensor.nbytes for tensor in (*tensors, *module.buffers()))
    copies = [copy.deepcopy(module) for _ in range(rotation(size, session.device) - 1)]
    return replace(one, modules=[module, *copies])


def sparse_layer(one: Contender) -> SparseLinear:
    """The only sparse layer of a contender."""
    (layer,) = sparse_layers(one.modules[0]).values()
    return layer


class Masked(nn.Module):
    """A dense weight times a mask: what sparse training is in most code bases."""

    mask: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)
        self.register_buffer("mask", weight != 0)

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight * self.mask)


class Peer(nn.Module):
    """A weight in a format of PyTorch."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight)

    def __deepcopy__(self, _: object) -> Peer:
        return Peer(self.weight.detach().clone())  # parameters in such formats cannot be copied

    def forward(self, x: Tensor) -> Tensor:
        # The Triton kernel of BSR is behind `linear`; elsewhere this order is several times as
        # fast, and y comes feature-major.
        if x.is_cuda and self.weight.layout == torch.sparse_bsr:
            return linear(x, self.weight)
        return torch.sparse.mm(self.weight, x.t()).t()
