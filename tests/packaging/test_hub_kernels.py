"""What scripts/hub_kernels.py writes is loaded by Hugging Face's library, from that folder."""

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import nn

from kernel_cases import DEVICE, assert_agrees, random_entries, random_tiles, relative_error
from padst_kernels.tiles import tile_matmul, tile_matmul_reference

pytest.importorskip("kernels._rust", reason="pip install kernels")

from kernels._rust import Build

from kernels import (
    LocalLayerRepository,
    Mode,
    get_local_kernel,
    kernelize,
    use_kernel_forward_from_hub,
    use_kernel_mapping,
)

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub") / "padst-kernels"
    subprocess.run([sys.executable, ROOT / "scripts" / "hub_kernels.py", folder], check=True)
    return folder


@pytest.fixture(params=["cpu", "cuda"])
def kernel(
    request: pytest.FixtureRequest, repository: Path, monkeypatch: pytest.MonkeyPatch
) -> ModuleType:
    """The package of one backend, where none of our name can be imported."""
    if request.param == "cuda" and torch.version.cuda is None:
        pytest.skip("PyTorch without CUDA")
    for name in [name for name in sys.modules if name.split(".")[0] == "padst_kernels"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "padst_kernels", None)
    loaded = get_local_kernel(repository, backend=request.param)
    assert re.fullmatch(rf"_padst_kernels_{request.param}_[0-9a-f]+", loaded.__name__)
    return loaded


def test_products_of_a_loaded_kernel_are_those_of_the_reference(kernel: ModuleType) -> None:
    tiled, single = random_tiles(33, 6, 5, 16, 3, 45, True), random_entries((67, 41), 300, 5)
    for backend in ("triton", "native") if DEVICE == "cpu" else ("triton",):

        def product(x: torch.Tensor, weight: torch.Tensor, backend: str = backend) -> torch.Tensor:
            return kernel.tiles.tile_matmul(x, weight, tiled.index, 45, backend=backend)

        assert_agrees(product, tiled.reference, tiled.x(9), tiled.weight)

    def of_entries(x: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        return kernel.entries.entry_matmul(x, values, single.index, 67, backend="torch")

    assert_agrees(of_entries, single.reference, single.x(9), single.values)


def test_its_operators_stand_beside_ours(kernel: ModuleType) -> None:
    case = random_tiles(33, 6, 5, 16, 3, 45, False)
    x, found = case.x(9), []
    for product in (tile_matmul, kernel.tiles.tile_matmul):
        graphs: list[torch.fx.GraphModule] = []

        def keep(graph: torch.fx.GraphModule, _: object, graphs: list = graphs) -> object:
            graphs.append(graph)
            return graph

        compiled = torch.compile(
            lambda x, w, product=product: product(x, w, case.index, 45, trusted=True),
            fullgraph=True, backend=keep,
        )  # fmt: skip
        assert relative_error(compiled(x, case.weight), case.reference(x, case.weight)) < 1e-5
        found += [str(node.target) for node in graphs[0].graph.nodes if "padst" in str(node.target)]
    ours, other = (name.split(".")[0] for name in found)
    assert (ours, other) == ("padst", kernel.__name__)


def test_kernelize_gives_a_layer_its_forward_pass(repository: Path) -> None:
    case = random_tiles(33, 6, 5, 16, 3, 45, True)

    @use_kernel_forward_from_hub("TileLinear")
    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight, self.bias = nn.Parameter(case.weight), nn.Parameter(torch.randn(45))
            self.index, self.out_features = case.index, 45

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return tile_matmul_reference(x, self.weight, self.index, 45) + self.bias

    layer, x = Layer().to(DEVICE), case.x(9)
    wanted, own = layer(x), layer.forward
    mapping = {"TileLinear": {DEVICE: LocalLayerRepository(repository, layer_name="TileLinear")}}
    with use_kernel_mapping(mapping):
        kernelize(layer, mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=DEVICE, use_fallback=False)
    assert layer.forward != own
    assert relative_error(layer(x), wanted) < 1e-5
    layer(x).sum().backward()
    assert layer.weight.grad is not None


def test_kernel_builder_reads_its_description(repository: Path) -> None:
    backends = {str(backend).lower() for backend in Build.open(repository).general.backends}
    assert {f"torch-{name}" for name in backends} == {
        path.name for path in (repository / "build").iterdir()
    }
    # Kernels are loaded under other names than their own.
    for path in repository.rglob("*.py"):
        assert not re.search(r"^\s*(from|import) padst_kernels", path.read_text(), re.MULTILINE)


def test_the_card_shows_what_runs(repository: Path) -> None:
    (program,) = re.findall(r"```python\n(.*?)```", (repository / "README.md").read_text(), re.S)
    names: dict[str, torch.Tensor] = {}
    exec(program.replace("<this folder>", str(repository)), names)
    assert names["y"].shape == (3, 32)
