"""A training that is refused, before its first step or in it, leaves the disk as it was."""

from __future__ import annotations

from pathlib import Path

from fuzz.command_lines import base
from fuzz.program import fault
from padst_exp import train


def test_a_refused_run_leaves_no_directory(tmp_path: Path) -> None:
    refused = {
        "trainer.batch_size=100000": "trainer.batch_size: ",
        "trainer.batch_size=63 trainer.micro_batches=2": "trainer.batch_size: ",
        "trainer.batch_size=3 dataset=fashion_mnist dataset.mixup=0.5 dataset.root=x": "dataset.",
        "trainer.epochs=1e30 trainer.steps=null": "trainer.epochs: ",
        "permutation=doubly_stochastic permutation.iterations=1000000000": "permutation.iteration",
        "model.dim=100000000 model.heads=1": "model: expected what fits into ",
        "sparse=[]": "sparse: ",
        "runs=/dev/null/x": "runs: expected a folder that can be written",
    }
    for overrides, message in refused.items():
        arguments = [*base("vit", []), "runs=a/b", "name=c", *overrides.split()]
        assert fault(train.main, arguments, tmp_path, message) is None, overrides
        assert not list(tmp_path.iterdir()), overrides
