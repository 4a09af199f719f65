"""Which runs a sweep consists of."""

from typing import Any

import pytest

from padst_exp.errors import UserError
from padst_exp.sweeps import Job, expand

PARAMS = {"sparsity": "0.8,0.9", "structure.size": 16}
ARMS: dict[str, dict[str, Any]] = {
    "dense": {"structure": "dense", "sparsity": 0, "structure.size": None},
    "few": {"structure": "butterfly", "sparsity": [0.9, 0.95]},
    "learned": {"permutation": "doubly_stochastic", "betas": [0.9, 0.99], "clip": None},
    "taken": {"permutation": "random", "init_permutation": {"arm": "learned", "shift": 2}},
}


def told(jobs: list[Job]) -> list[tuple[str | None, dict[str, Any]]]:
    return [(job.arm, job.swept) for job in jobs]


def test_arms_take_part_in_what_is_listed() -> None:
    jobs = expand(PARAMS, ARMS, [])
    size = {"structure.size": 16}
    assert told(jobs) == [
        ("dense", {"sparsity": 0}),
        ("learned", {"sparsity": 0.8} | size),
        ("taken", {"sparsity": 0.8} | size),
        ("few", {"sparsity": 0.9} | size),
        ("learned", {"sparsity": 0.9} | size),
        ("taken", {"sparsity": 0.9} | size),
    ]
    assert jobs[0].overrides == ["arm=dense", "sparsity=0", "structure=dense"]
    assert jobs[1].overrides[3:] == [
        "permutation=doubly_stochastic",
        "betas=[0.9,0.99]",
        "clip=null",
    ]


def test_seeds_come_one_after_the_other_so_that_pairs_are_whole_early() -> None:
    jobs = expand(PARAMS, ARMS, ["arm=dense,learned", "seed=range(2)", "sparsity=0.8", "a=1"])
    seeds = [next(o for o in job.overrides if o.startswith("seed=")) for job in jobs]
    assert seeds == ["seed=0"] * 2 + ["seed=1"] * 2
    assert [job.arm for job in jobs] == ["dense", "learned"] * 2
    assert all("a=1" in job.overrides and "a" not in job.swept for job in jobs)


def test_a_run_that_starts_from_another_knows_which() -> None:
    (job,) = expand(PARAMS, ARMS, ["arm=taken", "seed=5", "sparsity=0.9"])
    source = job.starts_from["init_permutation"]
    (learned,) = expand(PARAMS, ARMS, ["arm=learned", "seed=7", "sparsity=0.9"])
    assert source == learned and not any("init_permutation" in o for o in job.overrides)


def test_sweeps_without_arms_are_products() -> None:
    jobs = expand({"structure": "nm,block"}, {}, ["structure=block,diag", "seed=1,0", "x=[1,2]"])
    assert [job.overrides for job in jobs] == [
        [f"seed={seed}", f"structure={structure}", "x=[1,2]"]
        for seed in (1, 0)
        for structure in ("block", "diag")
    ]
    assert told(expand({}, {}, [])) == [(None, {})]
    # Again what a run was made from gives that run.
    assert expand({}, {}, jobs[0].overrides)[0].overrides == jobs[0].overrides


def test_mistakes_name_the_key() -> None:
    with pytest.raises(UserError, match=r"^arm: expected .*; did you mean learned.*, got lerned$"):
        expand(PARAMS, ARMS, ["arm=lerned"])
    with pytest.raises(UserError, match=r"^permutation=none: arm=learned has permutation=doubly"):
        expand(PARAMS, ARMS, ["permutation=none", "arm=learned"])
    # What an arm says itself may be said again.
    assert len(expand(PARAMS, ARMS, ["permutation=doubly_stochastic", "arm=learned"])) == 2
    with pytest.raises(UserError, match=r"^seed=interval\(0,1\): expected a list"):
        expand(PARAMS, ARMS, ["seed=interval(0,1)"])
    with pytest.raises(UserError, match=r"^arms\.a\.init_from\.arm: expected an arm, got b$"):
        expand({}, {"a": {"init_from": {"arm": "b"}}}, [])
