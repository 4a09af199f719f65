"""From YAML to objects: the schema of a run, strict constructor calls, and the name of a run.

Imports neither torch nor anything that does, so that `--help` answers at once.
"""

import difflib
import hashlib
import importlib
import inspect
import json
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar, cast, get_args, get_origin

from hydra.core.config_store import ConfigStore
from omegaconf import MISSING, DictConfig, OmegaConf
from pydantic import ConfigDict, TypeAdapter, ValidationError

from padst_exp.errors import UserError

if TYPE_CHECKING:
    Storage = Literal["packed", "masked"]
    Backend = Literal["auto", "native", "torch", "triton", "cuda", "scatter"]
else:
    Storage = Backend = str  # OmegaConf knows no Literal; `validate` checks

DISTRIBUTIONS = ("uniform", "erk")
STORAGES = ("packed", "masked")
RESUMES = ("never", "auto")
DEVICES = ("auto", "cpu", "cuda")
BACKENDS = ("auto", "native", "torch", "triton", "cuda", "scatter")
EXPORT_FORMATS = ("packed", "dense")
SUITES = ("layers", "model_inference", "model_train", "memory", "gpu_all")
DTYPES = ("float32", "bfloat16", "float16")
CLOCKS = ("wall", "cpu")

# Keys that say where and how a run is watched, not what it computes.
NOT_RESULTS = ("logger", "runs", "resume", "name", "device", "backend")

_PLAIN = (bool, int, float, str, list, dict, type(None))

Settings = TypeVar("Settings", "Run", "BenchSchema", "EvaluateSchema", "ExportSchema")


@dataclass(kw_only=True)
class SparseRule:
    """Layers to make sparse.

    Args:
        pattern: shell-style pattern over module names.
        split: how many projections a layer fuses on its output (3 for QKV).
    """

    pattern: str = MISSING
    split: int = 1


@dataclass(kw_only=True)
class Run:
    """A run's own keys; everything else is one constructor call in a config group.

    Args:
        sparse: which layers are sparse; the model's file says so.
        sparsity: share of zeros in these layers, in [0, 1).
        distribution: how the layers share it: "uniform", "erk", or a mapping from patterns on
            module names to sparsities.
        storage: "packed" keeps active entries only, "masked" is the dense reference.
        seed: of everything random; 0 is a seed like any other.
        resume: "auto" continues from the newest checkpoint of the same run, "never" does not.
        runs: folder that holds the run directories.
        name: of the run directory; null derives it from the config.
        device: "auto" takes the GPU where there is one.
        backend: of sparse layers: "native", "torch", "triton", "cuda", "scatter", or "auto", which
            measures.
    """

    sparse: list[SparseRule] = MISSING
    sparsity: float = MISSING
    distribution: Any = MISSING
    storage: Storage = MISSING
    seed: int = MISSING
    resume: str = MISSING
    runs: str = MISSING
    name: str | None = None
    device: str = MISSING
    backend: Backend = MISSING

    def validate(self) -> None:
        """Check values (the types were checked on composition); `UserError` names the key."""
        _require_sparsity("sparsity", self.sparsity)
        if isinstance(self.distribution, Mapping):
            for pattern, sparsity in self.distribution.items():
                _require_sparsity(f"distribution.{pattern}", sparsity)
        elif self.distribution not in DISTRIBUTIONS:
            raise UserError(
                f"distribution: expected uniform, erk or a mapping from patterns to sparsities, "
                f"got {self.distribution!r}"
            )
        _require_choice("storage", self.storage, STORAGES)
        _require_choice("resume", self.resume, RESUMES)
        _require_choice("device", self.device, DEVICES)
        _require_choice("backend", self.backend, BACKENDS)
        for index, rule in enumerate(self.sparse):
            if rule.split < 1:
                raise UserError(f"sparse[{index}].split: expected at least 1, got {rule.split}")
        if not 0 <= self.seed < 2**63:
            raise UserError(f"seed: expected an integer from 0 to 2^63 - 1, got {self.seed}")
        if self.name is not None and (self.name in ("", ".", "..") or "/" in self.name):
            raise UserError(f"name: expected the name of one folder, got {self.name!r}")


@dataclass(kw_only=True)
class TrainSchema(Run):
    """The whole tree of `padst_exp.train`; the groups are checked when they are built."""

    model: Any = MISSING
    dataset: Any = MISSING
    structure: Any = MISSING
    dst: Any = MISSING
    permutation: Any = MISSING
    optimizer: Any = MISSING
    trainer: Any = MISSING
    logger: Any = MISSING


@dataclass(kw_only=True)
class EvaluateSchema:
    """The whole tree of `padst_exp.evaluate`.

    Args:
        run: run directory, as printed at the end of a training.
        batch_size: null takes the run's own evaluation batch size.
        device: "auto" takes the GPU where there is one.
    """

    run: str = MISSING
    batch_size: int | None = None
    device: str = MISSING

    def validate(self) -> None:
        """Check values (the types were checked on composition); `UserError` names the key."""
        _require_choice("device", self.device, DEVICES)
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size: expected at least 1, got {self.batch_size}")


@dataclass(kw_only=True)
class BenchSchema:
    """The whole tree of `padst_exp.bench`. Null leaves a choice to the suite and the device.

    Args:
        suite: what to measure.
        device: "auto" takes the GPU where there is one.
        dtype: of weights and activations; of autocast in training.
        threads: of a CPU.
        rounds: timings of each contender; they take turns.
        clock: "wall", or "cpu": time of one thread, for a machine that others share.
        budget: seconds that a suite may take; what is left then is named and skipped.
        out: folder of the results.
        sparsities: of single layers and of models.
        structures: options of the group `structure`, or mappings with their keys.
        shapes: of single layers, outputs x inputs, or the width of a transformer.
        tokens: that single layers multiply.
        models: options of the group `model`, or mappings with their keys.
        batches: of the models; or a mapping from `images` and `text` to batches.
        scopes: which layers of a model are sparse: "all" block linears, or "dense_qkv".
        images: size of the inputs of a vision model.
        text: size of the inputs of a language model.
        usual: by suite, and by device therein, what null keys are.
        gpu_all: suites with keys of theirs, and a `share` of the time that is left.
    """

    suite: str = MISSING
    device: str = MISSING
    dtype: str | None = None
    threads: int = MISSING
    rounds: int | None = None
    clock: str = MISSING
    budget: float | None = None
    out: str = MISSING
    sparsities: list[float] | None = None
    structures: list[Any] | None = None
    shapes: list[str] | None = None
    tokens: list[int] | None = None
    models: list[Any] | None = None
    batches: Any = None
    scopes: list[str] | None = None
    images: dict[str, int] = MISSING
    text: dict[str, int] = MISSING
    usual: dict[str, Any] = MISSING
    gpu_all: list[Any] = MISSING

    def validate(self) -> None:
        """Check values (the types were checked on composition); `UserError` names the key."""
        _require_choice("suite", self.suite, SUITES)
        _require_choice("device", self.device, DEVICES)
        _require_choice("clock", self.clock, CLOCKS)
        if self.dtype is not None:
            _require_choice("dtype", self.dtype, DTYPES)
        for scope in self.scopes or ():
            _require_choice("scopes", scope, ("all", "dense_qkv"))
        for sparsity in self.sparsities or ():
            _require_sparsity("sparsities", sparsity)
        for key in ("threads", "rounds", "tokens", "batches"):
            value = getattr(self, key)
            for count in value if isinstance(value, list) else [value]:
                if count is not None and count < 1:
                    raise UserError(f"{key}: expected at least 1, got {count}")
        if self.clock == "cpu" and self.threads > 1:
            raise UserError("clock: cpu counts the time of one thread; set threads=1 or clock=wall")
        if self.budget is not None and not self.budget > 0:  # nor NaN
            raise UserError(f"budget: expected seconds, got {self.budget}")


@dataclass(kw_only=True)
class ExportSchema:
    """The whole tree of `padst_exp.export`.

    Args:
        run: run directory, as printed at the end of a training, or a checkpoint file.
        format: "packed" for `padst_exp.inference`, "dense" for plain timm and transformers.
        out: folder to write; null is `export` (or `export-dense`) in the run.
        overwrite: whether an earlier export there may be replaced.
        device: "auto" takes the GPU where there is one.
    """

    run: str = MISSING
    format: str = MISSING
    out: str | None = None
    overwrite: bool = MISSING
    device: str = MISSING

    def validate(self) -> None:
        """Check values (the types were checked on composition); `UserError` names the key."""
        _require_choice("format", self.format, EXPORT_FORMATS)
        _require_choice("device", self.device, DEVICES)
        if self.out == "":
            raise UserError("out: expected a folder, got ''")


def register_schemas() -> None:
    """Make the schemas known to Hydra under the names that conf/*.yaml use."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainSchema)
    store.store(name="bench_schema", node=BenchSchema)
    store.store(name="evaluate_schema", node=EvaluateSchema)
    store.store(name="export_schema", node=ExportSchema)


def config_dir() -> Path:
    """The folder of YAML files: inside the wheel, or conf/ of the checkout."""
    here = Path(__file__).resolve().parent
    for candidate in (here / "conf", here.parents[1] / "conf"):
        if (candidate / "config.yaml").is_file():
            return candidate
    raise FileNotFoundError(f"no conf/config.yaml beside {here}")


def run_settings(cfg: DictConfig) -> Run:
    """The checked run keys of a composed (or reloaded) training config."""
    return _settings(cfg, Run)


def bench_settings(cfg: DictConfig) -> BenchSchema:
    """The checked keys of a composed benchmark config."""
    return _settings(cfg, BenchSchema)


def evaluate_settings(cfg: DictConfig) -> EvaluateSchema:
    """The checked keys of a composed evaluation config."""
    return _settings(cfg, EvaluateSchema)


def export_settings(cfg: DictConfig) -> ExportSchema:
    """The checked keys of a composed export config."""
    return _settings(cfg, ExportSchema)


def _settings(cfg: DictConfig, schema: type[Settings]) -> Settings:
    names = [field.name for field in fields(schema)]
    own = OmegaConf.masked_copy(cfg, names)
    settings = cast(Settings, OmegaConf.to_object(OmegaConf.merge(schema, own)))
    settings.validate()
    return settings


def build(node: DictConfig, key: str, extra: Mapping[str, object] | None = None) -> Any:
    """Call the constructor that `node._target_` names with the other keys of `node`.

    Constructors are keyword-only and annotated. Every key must be a parameter, every parameter
    without a default must be given, and every value must already have the annotated type: an int
    is a float, a list is a tuple, but "3", True and 3.0 are no int. Nested nodes that have a
    `_target_` are built first.

    Args:
        node: one config group, e.g. `cfg.structure`.
        key: its dotted key, for messages, e.g. "structure".
        extra: parameters that follow from other choices (the model's shape from the data).

    Returns:
        What the constructor returns.

    Raises:
        UserError: in one line that names the dotted key.
    """
    target = resolve_target(node, key)
    parameters = keyword_parameters(target)
    given = [str(name) for name in node if name != "_target_"]
    extra = extra or {}

    for name in given:
        if name not in parameters:
            raise UserError(f"{key}.{name}: unknown key{closest(name, parameters)}")
        if name in extra:
            raise UserError(f"{key}.{name}: follows from the data set; remove it")
    unfit = [name for name in extra if name not in parameters]
    if unfit:
        raise UserError(
            f"{key}: {node['_target_']} does not fit the data set, which gives {', '.join(extra)}; "
            f"it has no {', '.join(unfit)}"
        )

    arguments: dict[str, object] = dict(extra)
    for name in given:
        if OmegaConf.is_missing(node, name):
            raise UserError(f"{key}.{name}: missing, expected {_describe(parameters[name])}")
        arguments[name] = _argument(node[name], f"{key}.{name}", parameters[name])
    for name, parameter in parameters.items():
        if name not in arguments and parameter.default is inspect.Parameter.empty:
            raise UserError(f"{key}.{name}: missing, expected {_describe(parameter)}")

    try:
        return target(**arguments)
    except UserError as error:
        message, group = str(error), key.partition(".")[0]
        named = message.startswith((f"{group}.", f"{group}:", f"{group}="))
        raise UserError(message if named else f"{key}: {message}") from error


def resolve_target(node: DictConfig, key: str) -> Callable[..., object]:
    """The constructor that `node._target_` names."""
    path = node.get("_target_") if isinstance(node, DictConfig) else None
    if not isinstance(path, str) or "." not in path:
        raise UserError(f"{key}: expected a mapping with a _target_, got {node!r}")
    module_name, _, attribute = path.rpartition(".")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        # A missing dependency of an existing module is not a misspelt target.
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise
        raise UserError(f"{key}._target_: no module {module_name!r}") from error
    target = getattr(module, attribute, None)
    if not callable(target):
        raise UserError(f"{key}._target_: {module_name} has no {attribute!r}")
    return cast(Callable[..., object], target)


def keyword_parameters(target: Callable[..., object]) -> dict[str, inspect.Parameter]:
    """The parameters of a constructor, annotations evaluated; all must be keyword-only."""
    parameters = dict(inspect.signature(target, eval_str=True).parameters)
    for parameter in parameters.values():
        assert parameter.kind is parameter.KEYWORD_ONLY, f"{target}: {parameter} by position"
    return parameters


def closest(name: str, known: Iterable[str]) -> str:
    """A hint to append to "unknown": the likeliest spelling, else all of them."""
    names = sorted(known)
    matches = difflib.get_close_matches(name, names, n=1)
    if matches:
        return f"; did you mean {matches[0]}?"
    return f"; known: {', '.join(names)}" if names else "; there is none to set"


def results_config(cfg: DictConfig) -> dict[str, Any]:
    """The part of a training config that determines results, as plain resolved containers."""
    container = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(container, dict)
    return {str(name): value for name, value in container.items() if name not in NOT_RESULTS}


def config_hash(cfg: DictConfig) -> str:
    """Eight hex digits that change with everything that determines the results of a run."""
    text = json.dumps(results_config(cfg), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def run_name(cfg: DictConfig, choices: Mapping[str, str | None]) -> str:
    """The name of the run directory: `name` if set, else what was chosen and the config's hash.

    Args:
        cfg: composed training config.
        choices: the option chosen in each group (`HydraConfig.get().runtime.choices`).
    """
    if cfg.name is not None:
        return str(cfg.name)
    groups = ("model", "structure", "dst", "permutation")
    chosen = [str(choices[group]) for group in groups]
    return "-".join([*chosen, f"s{cfg.sparsity:g}", f"seed{cfg.seed}", config_hash(cfg)])


def _argument(value: object, key: str, parameter: inspect.Parameter) -> object:
    assert parameter.annotation is not inspect.Parameter.empty, f"{key}: not annotated"
    adapter = TypeAdapter[object](
        parameter.annotation, config=ConfigDict(arbitrary_types_allowed=True)
    )
    try:
        if isinstance(value, DictConfig) and "_target_" in value:
            plain = build(value, key)
            return adapter.validate_python(plain, strict=True)
        is_tree = OmegaConf.is_config(value)
        plain = OmegaConf.to_container(value, resolve=True) if is_tree else value
        # Strict JSON sees types as YAML does: a list is a tuple, but no string is a number.
        return adapter.validate_json(json.dumps(plain), strict=True)
    except ValidationError as error:
        got = repr(plain) if isinstance(plain, _PLAIN) else type(plain).__name__
        raise UserError(f"{key}: expected {_describe(parameter)}, got {got}") from error


def _describe(parameter: inspect.Parameter) -> str:
    return _describe_type(parameter.annotation)


def _describe_type(annotation: object) -> str:
    if annotation is None or annotation is type(None):
        return "null"
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return " or ".join(str(argument) for argument in arguments)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(_describe_type(argument) for argument in arguments)
    if origin is None:
        return getattr(annotation, "__name__", str(annotation))
    inside = ", ".join("..." if item is ... else _describe_type(item) for item in arguments)
    return f"{origin.__name__}[{inside}]"


def _require_sparsity(key: str, value: object) -> None:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 <= cast(float, value) < 1:
        raise UserError(f"{key}: expected a number in [0, 1), got {value!r}")


def _require_choice(key: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise UserError(f"{key}: expected {' or '.join(choices)}, got {value!r}")
