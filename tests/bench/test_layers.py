import importlib
import itertools
import warnings

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear

from bench.bench_cases import NM, STRUCTURES, keys, session
from padst_exp.bench import choices, contenders, layers
from padst_exp.bench.choices import Layer
from padst_exp.errors import UserError

PEERS = ("masked dense", "torch CSR", "torch BSR")
KINDS = [kind for entry in STRUCTURES for kind in choices.sparsities(entry)]
LABELS = list(dict.fromkeys(kind.label for kind in KINDS))
WIDE = Layer(inputs=32, outputs=48)
CONVOLUTION = Layer(inputs=16, outputs=32, kernel=3, pixels=5)


def test_every_contender_computes_its_dense_weight() -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    narrow, joined = Layer(inputs=48, outputs=32), Layer(inputs=32, outputs=96, split=3)
    for layer in (WIDE, narrow, joined, CONVOLUTION):
        expected = {"eager", "compiled", "packed, native", "exported, native"}
        made = layers._contenders(session(), layer, KINDS, 0.25)
        expected |= {"packed, scatter"} if layer.kernel else {*PEERS, "oneDNN"}
        assert expected <= {one.form for one in made}
        states = {one.permutation for one in made if one.structure == "nm group=16"}
        assert states == {"hard", "soft", "none"}
        x, dense = layer.example(5), made[0].modules[0].get_submodule("0").weight
        multiply = conv2d if layer.kernel else linear
        padding = {"padding": 1} if layer.kernel else {}
        weights = {(one.structure, one.permutation): contenders.sparse_layer(one).weight
                   for one in made if one.form == "packed, native"}  # fmt: skip
        for one in made:
            weight = weights.get((one.structure, one.permutation), dense)
            if one.structure != "dense" and one.permutation != "soft":
                share = float(weight.count_nonzero()) / weight.numel()
                assert one.density == pytest.approx(share, abs=1e-3)
            for module in one.modules:
                if one.form in PEERS:  # of a weight of their own
                    weight = module.weight if "masked" in one.form else module.weight.to_dense()
                y = multiply(x, weight, **padding)
                torch.testing.assert_close(module(x), y, atol=1e-5, rtol=1e-4)


def test_rows_of_a_layer() -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    for shape in ({"inputs": 32, "outputs": 48}, vars(CONVOLUTION)):
        rows = pd.concat(layers.run(keys("layers", shapes=[shape]), session()))
        cells = set(zip(rows.tokens, rows["pass"], strict=True))
        assert cells == {(5, "forward"), (5, "forward+backward"), (0, "conversion")}
        assert (rows.p50_ms > 0).all()
        timed = rows[rows.tokens > 0]
        assert (timed.ratio > 0).all() and (timed.floor_ms > 0).all()
        assert set(timed.dense_form) <= {"eager", "compiled"}
        made = rows[rows.tokens == 0]
        found = list(zip(made.structure, made.form, strict=True))
        assert found == list(itertools.product(LABELS, ["index", "export"]))


def test_structures_that_do_not_fit_are_named() -> None:
    said: list[str] = []
    odd = {"structure": "diag", "bundle": "stride", "stride": 32}
    shapes = [{"inputs": 30, "outputs": 50}]
    own = keys("layers", structures=[odd, NM], shapes=shapes)
    rows = pd.concat(layers.run(own, session(said)))
    assert any("diag bundle=stride stride=32 in 30->50: skipped" in line for line in said)
    assert set(rows.structure) == {"dense", "nm group=16"}
    none = keys("layers", structures=[odd], shapes=shapes)
    assert not list(layers.run(none, session()))


def test_kernels_that_are_wrong_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    # The function of that name hides the module.
    product = importlib.import_module("padst_exp.structures.product")
    right = product.tile_matmul

    def wrong(x: Tensor, *rest: object, backend: str, trusted: bool) -> Tensor:
        y: Tensor = right(x, *rest, backend=backend, trusted=trusted)
        return y * 1.1 if backend == "native" else y

    monkeypatch.setattr(product, "tile_matmul", wrong)
    made = layers._contenders(session(), CONVOLUTION, choices.sparsities(NM), 0.25)
    forms = [one.form for one in made if one.structure != "dense"]
    assert forms == ["packed, scatter", "exported, native"]


def test_entries_are_options_of_the_groups() -> None:
    assert LABELS[1] == "nm group=1" and LABELS[4] == "unstructured"
    assert [kind.permutation for kind in choices.sparsities("unstructured")] == ["hard"]
    for entry, message in (
        ("nmm", "structures: 'nmm' is unknown; did you mean nm?"),
        ({"structure": "nm", "size": 4}, "structures.size: unknown key"),
        ({"structure": "nm", "group": 0}, "structure"),
        ({"structure": "nm", "permutations": ["firm"]}, "structures.permutations: expected"),
    ):
        with pytest.raises(UserError) as error:
            choices.sparsities(entry)  # type: ignore[arg-type]
        assert str(error.value).startswith(message), error.value
