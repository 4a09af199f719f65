import itertools
import warnings

import pytest
import torch
from torch.nn.functional import linear

from bench.bench_cases import NM, STRUCTURES, keys, session
from padst_exp.bench import choices, contenders, layers
from padst_exp.bench.choices import Layer
from padst_exp.errors import UserError

PEERS = ("masked dense", "torch CSR", "torch BSR")
LABELS = [choices.sparsity(entry).label for entry in STRUCTURES]  # type: ignore[arg-type]


def test_every_contender_computes_its_dense_weight() -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    for layer in (Layer(32, 48), Layer(48, 32), Layer(32, 96, split=3)):
        kinds = [choices.sparsity(entry) for entry in STRUCTURES]  # type: ignore[arg-type]
        made = layers._contenders(session(), layer, kinds, 0.25, first=True)
        forms = {one.form for one in made}
        assert {"eager", "compiled", "packed, native", "exported, native", *PEERS} <= forms
        states = {one.permutation for one in made if one.structure == "nm group=16"}
        assert states == {"hard", "soft", "none"}
        x, dense = torch.randn(5, layer.in_features), made[0].modules[0].get_submodule("0").weight
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
                torch.testing.assert_close(module(x), linear(x, weight), atol=1e-5, rtol=1e-4)


def test_rows_of_a_layer() -> None:
    warnings.filterwarnings("ignore", message="Sparse .* tensor support is in beta state")
    said: list[str] = []
    rows = [row for case in layers.run(keys("layers"), session(said)) for row in case]
    cells = {(row["tokens"], row["pass"]) for row in rows}
    assert cells == {(5, "forward"), (5, "forward+backward"), (0, "conversion")}
    for row in rows:
        assert row["p50_ms"] > 0 and not row["note"], row
        if row["pass"] != "conversion":
            assert row["floor_ms"] > 0 and row["ratio"] > 0
            assert row["dense_form"] in ("eager", "compiled")
    trained = [row for row in rows if row["form"].startswith("packed")]
    assert trained and all(" by " in row["dispatcher"] for row in trained)
    converted = [(row["structure"], row["form"]) for row in rows if row["pass"] == "conversion"]
    assert converted == list(itertools.product(LABELS, ["index", "export"]))
    assert any(line.startswith("2:4: skipped") for line in said)


def test_structures_that_do_not_fit_are_named() -> None:
    said: list[str] = []
    odd = {"structure": "diag", "bundle": "stride", "stride": 32}
    own = keys("layers", structures=[odd, NM], shapes=["50x30"])
    rows = [row for case in layers.run(own, session(said)) for row in case]
    assert any("diag bundle=stride stride=32 in 30->50: skipped" in line for line in said)
    assert {row["structure"] for row in rows} == {"dense", "nm group=16"}
    assert not list(layers.run(keys("layers", structures=[odd], shapes=["50x30"]), session()))


def test_entries_are_options_of_the_groups() -> None:
    assert LABELS[1] == "nm group=1" and LABELS[4] == "unstructured"
    assert choices.sparsity("unstructured").phases == ("hard", "soft")
    assert choices.layers(["768"])[3] == Layer(768, 2304, split=3)
    assert choices.layers(["3072x768", "768"])[0] == choices.layers(["768"])[0]
    for entry, message in (
        ("nmm", "structures: 'nmm' is unknown; did you mean nm?"),
        ({"structure": "nm", "size": 4}, "structures.size: unknown key"),
        ({"structure": "nm", "group": 0}, "structure"),
    ):
        with pytest.raises(UserError) as error:
            choices.sparsity(entry)  # type: ignore[arg-type]
        assert str(error.value).startswith(message), error.value
