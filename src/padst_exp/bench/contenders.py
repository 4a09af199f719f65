"""Ways to compute one linear layer or one model: dense ones, sparse ones, and their peers."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from dataclasses import replace
from math import inf

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from padst_exp import dispatch
from padst_exp.bench.choices import Layer, Model, Sparsity, learner
from padst_exp.bench.floors import rotation
from padst_exp.bench.onednn import has_onednn, use_onednn
from padst_exp.bench.session import Contender, Session
from padst_exp.engine.backends import describe
from padst_exp.inference import CondensedLinear, PackedLinear, TiledLinear, pack, tune
from padst_exp.layers import SparseLinear, sparse_layers
from padst_exp.sparsify import sparsify
from padst_kernels import Backend
from padst_kernels.entries.passes import MAX_TRITON_TOKENS

# Backends that every layer has; timed where there is nothing better.
PLAIN = ("torch", "scatter")
# oneDNN packs weights for so many tokens; their order depends on it only where they are few.
PACKED_TOKENS = 4096


def dense(
    session: Session, subject: Layer | Model, dtype: torch.dtype, packed: int | None = None
) -> list[Contender]:
    """Eager, compiled, and by oneDNN where it is there; see `onednn` for `packed`."""
    module = subject.build().to(session.device, dtype)
    eager = Contender(form="eager", kind="dense", modules=[module])
    if isinstance(subject, Layer):
        eager = several(session, eager)
    made = [eager, compiled(eager, subject)]
    if has_onednn(session.device, session.dtype):
        made.append(onednn(eager, subject, packed))
    return made


def onednn(one: Contender, subject: Layer | Model, num_tokens: int | None = None) -> Contender:
    """A dense contender by oneDNN; with weights packed for inference with `num_tokens`."""
    modules = [twin(module) for module in one.modules]
    for module in modules:
        use_onednn(module, num_tokens)
        if isinstance(subject, Model):
            subject.compile(module)
    form = "oneDNN" if num_tokens is None else "oneDNN, packed"
    return replace(one, form=form, kind="strong", modules=modules, trained=num_tokens is None)


def sparse(
    session: Session,
    subject: Layer | Model,
    kind: Sparsity,
    density: float,
    *,
    dtype: torch.dtype | None = None,
    scope: str = "all",
    permutation: str = "",
) -> Contender:
    """What `sparsify` makes of a layer or a model.

    Args:
        session: where.
        subject: dense, to be made sparse.
        kind: structure of the sparse layers.
        density: density of those, asked for.
        dtype: dtype of the weights; None for that of the session.
        scope: which layers are sparse, see `choices.Model.rules`.
        permutation: "none", "soft" or "hard"; by default what a training ends with.

    Raises:
        UserError: the structure cannot hold that density in a layer.
    """
    module, permutation = subject.build(), permutation or kind.phases[0]
    trained_by = learner(permutation)
    report = sparsify(
        module, subject.rules(scope), structure=kind.structure, density=density, learner=trained_by
    )
    module.to(session.device, dtype or session.dtype)
    return Contender(
        structure=kind.label, form="eager", modules=[module], scope=scope, permutation=permutation,
         density_asked=density, density=report.density("layers"),
        learner=trained_by,
    )  # fmt: skip


def by_backend(session: Session, one: Contender) -> Iterator[Contender]:
    """A sparse layer by each backend that it has, and what export makes of it."""
    layer = sparse_layer(one)
    possible = layer.backends(session.device)
    for backend in [b for b in possible if b not in PLAIN] or possible:
        layer.use_backend(backend)
        yield several(session, replace(one, form=f"packed, {backend}"))
    if one.permutation != "soft":
        for backend in EXPORTED[session.device.type]:
            yield several(session, exported_layer(one, backend))


EXPORTED: dict[str, tuple[Backend, ...]] = {"cpu": ("native",), "cuda": ("torch", "triton")}


def exported_layer(one: Contender, backend: Backend) -> Contender:
    """What export makes of a sparse layer, by one backend."""
    module = copy.deepcopy(one.modules[0])
    pack(module)
    packed = [part for part in module.modules() if isinstance(part, PackedLinear)]
    for part in packed:
        part.backend = backend
    # On a GPU products of single entries take a few tokens at a time.
    single = isinstance(packed[0], CondensedLinear) and packed[0].weight.is_cuda
    most = MAX_TRITON_TOKENS if single else inf
    form = f"exported, {backend}"
    return replace(one, form=form, modules=[module], trained=False, most_tokens=most)


def peers(session: Session, one: Contender, known: Collection[str]) -> Iterator[Contender]:
    """The weight of a sparse layer as others would have it: masked, in CSR, in BSR.

    A format of PyTorch is there where it stores the entries of the weight and no zeros.

    Args:
        session: where.
        one: a sparse layer without permutations.
        known: forms that are left out; masks and CSR take as long whatever the structure is.
    """
    weight = sparse_layer(one).weight.detach()
    tiles = exported_layer(one, "torch").modules[0][0]  # type: ignore[index]

    def peer(form: str, module: nn.Module, trained: bool = True) -> Contender:
        return several(session, replace(one, form=form, modules=[module], trained=trained))

    if "masked dense" not in known:
        yield peer("masked dense", Masked(weight))
    if session.device.type == "cpu" and session.dtype != torch.float32:
        return  # these formats know single precision only
    if isinstance(tiles, CondensedLinear) and "torch CSR" not in known:
        yield peer("torch CSR", Peer(weight.to_sparse_csr()))
    if isinstance(tiles, TiledLinear):
        size = tiles.weight.shape[2]
        fits = not any(side % size for side in weight.shape)
        blocks = weight.to_sparse_bsr((size, size)) if fits else None
        if blocks is not None and blocks.values().numel() == tiles.weight.numel():
            yield peer("torch BSR", Peer(blocks), trained=False)


def two_of_four(session: Session, layer: Layer) -> Contender:
    """PyTorch's 2:4, at its one density."""
    quads = session.random(layer.out_features * layer.in_features // 4, 4)
    kept = torch.zeros_like(quads, dtype=torch.bool)
    kept.scatter_(1, quads.abs().topk(2, dim=1).indices, True)
    pruned = (quads * kept).view(layer.out_features, layer.in_features)
    module = Peer(torch.sparse.to_sparse_semi_structured(pruned))
    one = Contender(structure="2:4", form="torch 2:4", modules=[module], trained=False,
                    density_asked=0.5, density=0.5)  # fmt: skip
    return several(session, one)


def choose(session: Session, one: Contender, example: Callable[[], object], samples: int) -> str:
    """Let a sparse contender use the fastest backends; what the dispatcher took, in one line.

    Args:
        session: its device, and which backends may be used.
        one: layer or model; only its backends change.
        example: runs it on one sample.
        samples: how many there will be at once.
    """
    chosen = dispatch.choose(
        one.modules[0], example, samples=samples, device=session.device, compiled=False,
        allowed=session.backends(one.structure),
    )  # fmt: skip
    return describe(chosen).partition(": ")[2]


def exported_model(session: Session, one: Contender, inputs: Tensor) -> Contender:
    """What export and `tune` make of an eager sparse model.

    Raises:
        ValueError: the kernels that it would use have failed their checks.
    """
    allowed = [
        backend
        for backend in EXPORTED[session.device.type]
        if not session.refusal(one.structure, f"exported, {backend}")
        and not session.refusal(one.structure, f"features, {backend}")
    ]
    if not allowed:
        raise ValueError("its kernels did not pass their checks")
    module = copy.deepcopy(one.modules[0])
    pack(module)
    report = tune(module, inputs, backends=allowed)
    layers = {"token-major": report.layers, "feature-major": report.feature_layers}
    counts = Counter(layer.choice for layer in layers.get(report.layout, []))
    how = ", ".join(f"{count} by {choice}" for choice, count in counts.items())
    how = f"{report.layout}: {how}" if how else report.layout
    return replace(one, form="exported, eager", modules=[module], dispatcher=how)


def compiled(one: Contender, subject: Layer | Model) -> Contender:
    """An eager contender, compiled; it shares the parameters."""
    modules = [twin(module) for module in one.modules]
    for module in modules:
        subject.compile(module)
    return replace(one, form=one.form.replace("eager", "compiled"), modules=modules)


def twin(module: nn.Module) -> nn.Module:
    """A copy of the modules over the same parameters and buffers."""
    shared = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor for tensor in shared})


def several(session: Session, one: Contender) -> Contender:
    """A contender with so many copies of its module that they exceed the last-level cache."""
    (module,) = one.modules
    size = sum(_bytes(tensor) for tensor in (*module.parameters(), *module.buffers()))
    copies = [copy.deepcopy(module) for _ in range(rotation(size, session.device) - 1)]
    return replace(one, modules=[module, *copies])


def sparse_layer(one: Contender) -> SparseLinear:
    """The only sparse layer of a contender."""
    (layer,) = sparse_layers(one.modules[0]).values()
    return layer


class Masked(nn.Module):
    """A dense weight times a mask: what sparse training is in most code bases."""

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

    def forward(self, x: Tensor) -> Tensor:
        # The Triton kernel of BSR and 2:4 are behind `linear`; elsewhere this order is several
        # times as fast, and y comes feature-major.
        if x.is_cuda and self.weight.layout != torch.sparse_csr:
            return linear(x, self.weight)
        return torch.sparse.mm(self.weight, x.t()).t()


def _bytes(tensor: Tensor) -> int:
    compressed = tensor.layout in (torch.sparse_csr, torch.sparse_bsr)
    return tensor.values().nbytes if compressed else tensor.nbytes
