"""Every file of conf/experiment, at every scale."""

import re
from collections.abc import Iterator

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from padst_exp.config import GROUPS, build, config_dir, options
from padst_exp.report import store
from padst_exp.sweeps import Job, expand, jobs
from padst_exp.train import run_settings

SCALES = ("demo", "small", "paper")


@pytest.fixture(scope="module", autouse=True)
def hydra() -> Iterator[None]:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        yield


def described(name: str) -> tuple[list[Job], str]:
    path = config_dir() / "experiment" / f"{name}.yaml"
    sweeper = OmegaConf.to_container(OmegaConf.load(path))["hydra"]["sweeper"]  # type: ignore[index,call-overload]
    text = [line[1:] for line in path.read_text().splitlines() if line.startswith("#")]
    jobs = expand(sweeper.get("params", {}), sweeper.get("arms", {}), [f"experiment={name}"])
    return jobs, " ".join(" ".join(text).split())


def composed(job: Job, scale: str) -> DictConfig:
    starts = [f"{key}=elsewhere" for key in job.starts_from]
    return compose("config", [*job.overrides, *starts, f"scale={scale}"])


@pytest.mark.parametrize("name", options("experiment"))
def test_it_composes_at_every_scale_and_says_how_many_runs_it_is(name: str) -> None:
    jobs, text = described(name)
    seeds = len({o for job in jobs for o in job.overrides if o.startswith("seed=")} or {0})
    assert re.search(r"(\d+) runs a seed", text), text
    assert int(re.findall(r"(\d+) runs a seed", text)[0]) * seeds == len(jobs)
    for number, scale in enumerate(SCALES):
        cfg = composed(jobs[number * (len(jobs) - 1) // 2], scale)
        assert run_settings(cfg).scale == scale
        assert (cfg.runs, cfg.name, cfg.resume) == ("runs", None, "never")


@pytest.mark.parametrize("name", options("experiment"))
def test_its_contrasts_name_its_arms(name: str) -> None:
    pairs = store.contrasts(name)
    assert len({frozenset(pair) for pair in pairs}) == len(pairs)
    assert bool(pairs) == name.startswith("headline_")


@pytest.mark.slow
@pytest.mark.parametrize("name", options("experiment"))
def test_every_run_of_it_names_what_can_be_built(name: str) -> None:
    jobs, _ = described(name)
    # What is listed beside arms are numbers.
    first = {job.arm or tuple(map(str, job.swept.values())): job for job in jobs}
    for number, job in enumerate(first.values()):
        cfg = composed(job, SCALES[number % 3])
        run_settings(cfg)
        for group in set(GROUPS) - {"dataset", "model"}:
            build(cfg[group], group)


def test_several_experiments_are_one_sweep() -> None:
    both = jobs(["experiment=row_groups,delta", "seed=0,1", "scale=small"])
    assert len(both) == 2 * (4 + 7)
    assert all("scale=small" in job.overrides for job in both)
    every = jobs(["experiment=glob(*)", "seed=0"])
    found = {o for job in every for o in job.overrides if o.startswith("experiment=")}
    assert found == {f"experiment={name}" for name in options("experiment")}
