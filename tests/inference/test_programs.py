"""Exported models as programs that PyTorch and others save: loaded elsewhere, for any batch."""

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from inference.small_models import (
    Family,
    assert_equal,
    constructor,
    example,
    exported,
    sparse_model,
)
from padst_exp.export import TOLERANCE
from padst_exp.inference import PackedLinear, load, pack
from padst_exp.inference.convert import feature_stack, stack_name
from padst_exp.inference.features import FeatureLinear, Fusion, TiledFeatureLinear
from padst_kernels import Backend

KERNELS = Path(__file__).parents[2] / "kernels"
# Both products, each by both of its backends, and both layouts of activations.
CASES: list[tuple[Family, str, Backend, bool]] = [
    ("vit", "nm-16", "native", False),
    ("vit", "unstructured", "torch", False),
    ("gpt2", "nm-16", "torch", False),
    ("gpt2", "diag", "native", False),
    ("vit", "block-8", "native", True),
    ("gpt2", "nm-16", "torch", True),
]
# Knows the operators, and nothing else of ours.
READER = """
import sys
import torch
import padst_kernels
x, expected = torch.load("example.pt")
with torch.no_grad():
    for model in (
        torch.export.load("program.pt2").module(),
        torch._inductor.aoti_load_package("package.pt2"),
    ):
        torch.testing.assert_close(model(x), expected)
assert "padst_exp" not in sys.modules
"""


def loaded(
    folder: Path, family: Family, structure: str, backend: Backend, feature_major: bool
) -> nn.Module:
    """An export, loaded and multiplied as `tune` may have it."""
    model = sparse_model(family, structure, "hardened")
    model = load(exported(folder / "export", model, constructor(family)))
    for layer in model.modules():
        if isinstance(layer, PackedLinear):
            layer.backend = backend
    if feature_major:

        def build(name: str, layer: Any, fusion: Fusion) -> FeatureLinear:
            return TiledFeatureLinear(layer, backend, fusion)

        stack = feature_stack(model, build)
        owner, _, attribute = stack_name(model).rpartition(".")
        setattr(model.get_submodule(owner), attribute, stack)
    return model


@torch.no_grad()
def program(model: nn.Module, x: Tensor) -> torch.export.ExportedProgram:
    """For a batch of any size."""
    return torch.export.export(
        model,
        (x,),
        dynamic_shapes=({0: torch.export.Dim("batch")},),
        prefer_deferred_runtime_asserts_over_guards=True,
    )


@torch.no_grad()
def outputs(model: Any, x: Tensor) -> Tensor:
    found: Tensor = model(x)
    return found


def read_back(whole: torch.export.ExportedProgram) -> nn.Module:
    file = io.BytesIO()
    torch.export.save(whole, file)
    file.seek(0)
    read: nn.Module = torch.export.load(file).module()
    return read


@pytest.mark.parametrize("structure", ["nm-16", "unstructured"])
def test_a_program_of_a_layer_takes_a_batch_of_any_size(structure: str) -> None:
    model = sparse_model("vit", structure, "hardened")
    pack(model)
    layer = model.get_submodule("blocks.0.mlp.fc1")
    read = read_back(program(layer, torch.randn(3, 5, 64)))
    for batch in (1, 2, 7):
        x = torch.randn(batch, 5, 64)
        assert_equal(outputs(read, x), outputs(layer, x), batch)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_program_takes_a_batch_of_any_size(
    tmp_path: Path, case: tuple[Family, str, Backend, bool]
) -> None:
    family = case[0]
    model = loaded(tmp_path, *case)
    read = read_back(program(model, example(family)))
    for batch in (1, 2, 7):
        x = example(family, batch)
        assert_equal(outputs(read, x), outputs(model, x), batch)


@pytest.mark.thorough
@pytest.mark.parametrize("case", CASES, ids=str)
def test_a_process_with_the_kernels_alone_reads_programs_and_packages(
    tmp_path: Path, case: tuple[Family, str, Backend, bool]
) -> None:
    family = case[0]
    model, x = loaded(tmp_path, *case), example(family, 7)
    whole = program(model, example(family))
    torch.export.save(whole, tmp_path / "program.pt2")
    torch._inductor.aoti_compile_and_package(whole, package_path=str(tmp_path / "package.pt2"))
    torch.save((x, outputs(model, x)), tmp_path / "example.pt")
    environment = {**os.environ, "PYTHONPATH": str(KERNELS)}
    command = [sys.executable, "-c", READER]
    ended = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.thorough
def test_a_packed_model_compiles_in_every_mode(tmp_path: Path) -> None:
    model, x = loaded(tmp_path, "vit", "nm-16", "native", False), example("vit", 7)
    for mode in ("default", "reduce-overhead", "max-autotune"):
        torch._dynamo.reset()
        compiled = torch.compile(model, mode=mode, fullgraph=True)
        assert_equal(outputs(compiled, x), outputs(model, x), mode)


@pytest.mark.thorough
@pytest.mark.parametrize("family", ["vit", "gpt2"])
def test_what_is_dense_becomes_onnx(tmp_path: Path, family: Family) -> None:
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    model = load(exported(tmp_path / "export", sparse_model(family, "nm-16"), constructor(family)))
    for name, layer in list(model.named_modules()):
        if isinstance(layer, PackedLinear):
            model.set_submodule(name, layer.dense())
    x, path = example(family, 7), str(tmp_path / "model.onnx")
    shapes = ({0: torch.export.Dim("batch")},)
    torch.onnx.export(model, (example(family),), path, dynamo=True, dynamic_shapes=shapes)
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    assert_equal(torch.from_numpy(found), outputs(model, x), family, TOLERANCE)
