"""What a run starts from besides its seed: weights, units and permutations that stand elsewhere.

`init_from` takes dense weights and lets them choose: units by their score, permutations by what
keeps most. `init_values`, `init_topology` and `init_permutation` take one thing each.
"""

from __future__ import annotations

import copy
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from padst_exp import restore
from padst_exp.data.sampler import train_loader
from padst_exp.data.task import Task
from padst_exp.engine.distributed import World
from padst_exp.engine.evaluation import to_device
from padst_exp.engine.folders import is_run
from padst_exp.engine.settings import Trainer
from padst_exp.errors import UserError, require
from padst_exp.files import reading
from padst_exp.inference import load
from padst_exp.inference.files import DESCRIPTION, read_description
from padst_exp.inference.packing import dense_state, harden, pack
from padst_exp.layers.surgery import Scoring, Taken
from padst_exp.messages import say
from padst_exp.sparsify import Rule, match, output_layer
from padst_exp.targets import foreign
from padst_exp.train import Run, run_settings
from padst_exp.transforms import Original

ANY_WEIGHTS = (
    "a run directory, a checkpoint, an export, or weights of timm or transformers (a file, a "
    "folder, or a name on the hub)"
)
A_RUN = "a run directory or a checkpoint of a run"


@dataclass(frozen=True, kw_only=True)
class Inheritance:
    """What the run that `cfg` describes takes over.

    Args:
        cfg: composed config of a training.
        task: its data set.
        world: of this process.
    """

    cfg: DictConfig
    task: Task
    world: World

    @property
    def settings(self) -> Run:
        """The run's own keys."""
        return run_settings(self.cfg)

    @property
    def trained(self) -> bool:
        """Whether the dense weights are worth keeping."""
        model, run = self.cfg.model, self.settings
        pretrained = bool(model.get("pretrained")) or model.get("checkpoint") is not None
        return pretrained or run.init_from is not None or run.init_values is not None

    def check(self) -> None:
        """Refuse what contradicts itself, before anything is read.

        Raises:
            UserError: in one line that names the key.
        """
        run, model = self.settings, self.cfg.model
        given = {key: getattr(run, key) for key in ("init_from", "init_values")}
        for key, value in given.items():
            loaded = next((k for k in ("pretrained", "checkpoint") if model.get(k)), None)
            wanted = f"null beside model.{loaded}={model.get(loaded)}" if loaded else ""
            require(value is None or not loaded, key, value, wanted)
        both = None not in given.values()
        require(not both, "init_values", run.init_values, "null beside init_from")
        scored = self.trained and run.init_values is None
        require(
            run.init_score == "magnitude" or scored,
            "init_score",
            run.init_score,
            "magnitude where no trained weights choose the units",
        )

    def dense(self, original: Original) -> Original:
        """`original` with the weights that the run takes over, if any.

        Raises:
            UserError: there are none there, or those of another model.
        """
        for key in ("init_from", "init_values"):
            source = getattr(self.settings, key)
            if source is None:
                continue
            source = source.removeprefix("local-dir:")  # as timm says that it is a folder
            # So that nothing is rewritten before weights are loaded into it.
            keys = {**original.keys, "checkpoint": source}
            return replace(original, keys=keys, build=self._builder(key, source, original))
        return original

    def scores(self, model: nn.Module, rules: Sequence[Rule], trainer: Trainer) -> Scoring:
        """How the first units are chosen; see `sparsify`."""
        if not self.trained or self.settings.init_values is not None:
            return "random"
        if self.settings.init_score == "magnitude":
            return "magnitude"
        return saliency(
            model,
            rules,
            self.task,
            trainer,
            self.world,
            seed=self.settings.seed,
            steps=self.settings.init_batches,
        )

    def taken(self) -> Taken:
        """Units and permutations of other runs.

        Raises:
            UserError: no run is there, or one of another structure, or one that is still soft.
        """
        run, parts = self.settings, Taken()
        for key in ("init_topology", "init_permutation"):
            dense = str(self.cfg.structure.get("_target_")).endswith(".Dense")
            source = getattr(run, key)
            require(source is None or not dense, key, source, "null with structure=dense")
        if (topology := run.init_topology) is not None:
            state = self._state("init_topology", topology, ("structure",))
            parts = replace(
                parts,
                units={n: t.long() for n, t in _ending(state, ".active").items()},
                row_orders=_ending(state, ".row_order"),
                units_from=f"init_topology: expected a run like this one, got {topology}",
            )
        if (permutation := run.init_permutation) is not None:
            state = self._state("init_permutation", permutation, ())
            indices = _ending(state, ".index")
            soft = sum(bool((index < 0).any()) for index in indices.values())
            wanted = "a run whose permutations are hard"
            require(not soft, "init_permutation", f"{permutation} with {soft} soft ones", wanted)
            require(bool(indices), "init_permutation", permutation, "a run with permutations")
            parts = replace(
                parts,
                indices=indices,
                indices_from=f"init_permutation: expected a run like this one, got {permutation}",
            )
        return parts

    def _builder(self, key: str, source: str, original: Original) -> Any:
        """What builds the dense model with the weights of `source`."""
        if not (ours := _is_ours(Path(source))):
            changes = self._changes(key, source)

        def build(more: Mapping[str, object]) -> nn.Module:
            if not ours:
                with _called(key):
                    model = original.build({**more, **changes})
                if "name" in changes:  # it may name another model, not just its weights
                    with torch.device("meta"):
                        own = original.build(more)
                    alike = _shapes(own) == _shapes(model)
                    require(alike, key, f"{source}, another one", "weights of this model")
                return model
            model = original.build(more)
            _load(key, source, model, self._dense_state(key, source, model))
            return model

        return build

    def _changes(self, key: str, source: str) -> dict[str, object]:
        """The keys of the model that have it load weights of timm or transformers."""
        model = self.cfg.model
        require("checkpoint" in model, key, source, "a run, a checkpoint or an export of ours")
        if Path(source).exists():
            return {"checkpoint": source}
        # No path, or one that is not there: only then a name.
        is_name = not source.startswith((".", "/", "~")) and source.count("/") <= 1
        require(is_name and not source.endswith((".pt", ".pth")), key, source, ANY_WEIGHTS)
        return {"pretrained": True, "name": source}

    def _dense_state(self, key: str, source: str, plain: nn.Module) -> dict[str, Tensor]:
        """The weights of a run, a checkpoint or an export of ours, as `plain` would have them."""
        path = Path(source)
        with _called(key):
            if (path / DESCRIPTION).is_file():
                own = str(read_description(path)["model"]["_target_"]).startswith("padst_exp.")
                model = load(path, model=None if own else copy.deepcopy(plain))
            else:
                model = restore.restore_run(
                    path, World(), trust=self._trusted(), task=self._same_task
                ).model
                harden(model)
                pack(model)
            try:
                return dense_state(model, plain)
            except KeyError as error:
                what = f"{source} with a sparse layer {error.args[0]}"
                raise UserError(f"{key}: expected weights of this model, got {what}") from error

    def _trusted(self) -> list[str]:
        """The packages whose constructors this run names itself."""
        plain = cast(dict[str, object], OmegaConf.to_container(self.cfg, resolve=True))
        return sorted({str(target).partition(".")[0] for _, target in foreign(plain, ())})

    def _same_task(self, cfg: DictConfig) -> Task | None:
        """The data set of this run, if that of `cfg` is of the same kind."""
        own, other = (c.dataset.get("_target_") for c in (self.cfg, cfg))
        return self.task if own == other else None

    def _state(self, key: str, source: str, groups: tuple[str, ...]) -> Mapping[str, Tensor]:
        """The model's state in a run, whose `groups` are configured as here."""
        with _called(key):
            require(_is_ours(Path(source)), key, source, A_RUN)
            is_export = (Path(source) / DESCRIPTION).is_file()
            require(not is_export, key, f"{source}, an export", A_RUN)
            opened = restore.open_run(Path(source), trust=self._trusted())
        for group in groups:
            here, there = (OmegaConf.to_container(c[group]) for c in (self.cfg, opened.config))
            wanted = f"a run with {group} {_short(here)}"
            require(here == there, key, f"{source} with {_short(there)}", wanted)
        return opened.weights


def saliency(
    model: nn.Module,
    rules: Sequence[Rule],
    task: Task,
    trainer: Trainer,
    world: World,
    *,
    seed: int,
    steps: int,
) -> dict[str, Tensor]:
    """What the loss says every weight is worth: the mean of (w dL/dw)^2 over `steps` batches.

    First-order Taylor importance (Molchanov et al. 2019, equation 8).

    Args:
        model: dense, on the CPU; it comes back as it was.
        rules: its layers to be scored.
        task: data and loss.
        trainer: size of the batches.
        world: of this process; all ranks get the same.
        seed: of the batches.
        steps: how many.

    Returns:
        `[O, I]` for each layer by name, float32, as `LinearView.matrix` is.

    Raises:
        UserError: the loss is not finite.
    """
    views = [found for found, _ in match(model, rules)]
    flags = {p: p.requires_grad for p in model.parameters()}
    training, gradients = model.training, [found.parameter for found in views]
    for parameter in flags:
        parameter.requires_grad_(False)
    for parameter in gradients:
        parameter.requires_grad_(True)
    model.to(world.device).eval()
    batches = iter(
        train_loader(
            task,
            batch_size=trainer.batch_size,
            micro_batches=trainer.micro_batches,
            start_step=0,
            total_steps=steps,
            seed=seed,
            rank=world.rank,
            world_size=world.size,
            workers=trainer.workers,
        )
    )
    tables = {found.name: torch.zeros_like(found.matrix) for found in views}
    for _ in range(steps):
        total = [torch.zeros_like(parameter) for parameter in gradients]
        for _ in range(trainer.micro_batches):
            inputs, targets = to_device(next(batches), world.device, "float32")
            loss = task.loss(model(inputs), targets) / trainer.micro_batches
            require(bool(loss.isfinite()), "init_score", "saliency", "weights with a finite loss")
            found = torch.autograd.grad(loss, gradients, materialize_grads=True)
            torch._foreach_add_(total, found)
        world.mean_(total)
        for view, gradient in zip(views, total, strict=True):
            tables[view.name] += (view.flatten(gradient) * view.matrix).square() / steps
    for parameter, flag in flags.items():
        parameter.requires_grad_(flag)
    model.to("cpu").train(training)
    return {name: table.cpu() for name, table in tables.items()}


@contextmanager
def _called(key: str) -> Iterator[None]:
    """Whoever complains in this block about its own key means `key`."""
    try:
        yield
    except UserError as error:
        text = str(error)
        for own in ("model.checkpoint", "model.pretrained", "model.name", "run", "export"):
            text = text.removeprefix(f"{own}: ")
        raise UserError(text if text.startswith(f"{key}: ") else f"{key}: {text}") from error


def _is_ours(path: Path) -> bool:
    """Whether `path` is a run directory, one of our checkpoints, or an export of ours."""
    if path.is_dir():
        return (path / DESCRIPTION).is_file() or is_run(path)
    if not path.is_file() or not zipfile.is_zipfile(path):
        return False
    try:
        with reading("init_from", path, ANY_WEIGHTS):
            payload = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        return False  # whoever reads it as something else says what is wrong with it
    return isinstance(payload, dict) and "config_text" in payload


def _ending(state: Mapping[str, Tensor], suffix: str) -> dict[str, Tensor]:
    """What is called so, by the name of its module."""
    return {n.removesuffix(suffix): t for n, t in state.items() if n.endswith(suffix)}


def _load(key: str, source: str, model: nn.Module, state: Mapping[str, Tensor]) -> None:
    """Give `model` the weights of `state`; a classifier for other classes starts fresh."""
    own = model.state_dict()
    head = output_layer(model)
    names = {id(module): name for name, module in model.named_modules()}
    outputs = f"{names[id(head)]}." if head is not None else ""
    wrong = [
        name
        for name in {**own, **state}
        if name not in own or name not in state or own[name].shape != state[name].shape
    ]
    if wrong and outputs and all(name.startswith(outputs) for name in wrong):
        say(f"{key}: the classifier in {source} is for another number of classes, it starts fresh")
        state = {**state, **{name: own[name] for name in wrong if name in own}}
        wrong = []
    for name in wrong:
        there, here = (tuple(s[name].shape) if name in s else "not there" for s in (state, own))
        what = f"{source}, where {name} is {there} and not {here}"
        raise UserError(f"{key}: expected weights of this model, got {what}")
    finite = all(t.isfinite().all() for t in state.values() if t.is_floating_point())
    require(finite, key, f"{source} with others", "weights that are finite")
    model.load_state_dict(state)


def _shapes(model: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in model.state_dict().items()}


def _short(node: object) -> str:
    """A constructor call in one line."""
    call = cast(dict[str, object], node)
    rest = {key: value for key, value in call.items() if key != "_target_"}
    return f"{str(call.get('_target_')).rpartition('.')[2]} {json.dumps(rest)}"
