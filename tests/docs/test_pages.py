"""Every command and program that a page of docs/ shows runs, in the order it shows them.

A block of `bash` or `python` runs; trainings are cut to a few steps. An indented command
needs a cluster, data or hours, and has its names checked. `make docs-test` does all pages.
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from padst_exp.config import GROUPS, build, config_dir
from padst_exp.sweeps import jobs
from padst_exp.train import run_settings

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NOT_RUN = re.compile(r"^    (\S.*(?:\n {8,}\S.*)*)$|`([^`\n]+)`", re.MULTILINE)
LINK = re.compile(r"\]\(([^)#:]+)\)")
SHOWN = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [path for path in SHOWN if path.parent.name == "docs" and BLOCK.search(path.read_text())]
SHORT = """
python() {
    case "$*" in
        *padst_exp.train*) command python "$@" trainer.epochs=null trainer.steps=12 logger=none ;;
        *) command python "$@" ;;
    esac
}
"""


def script(page: str) -> str:
    parts = [SHORT]
    for number, (language, text) in enumerate(BLOCK.findall(page)):
        end = f"END_OF_PROGRAM_{number}"
        parts.append(text if language == "bash" else f"python - <<'{end}'\n{text}{end}\n")
    return "\n".join(parts)


@pytest.mark.docs
@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.stem)
def test_what_a_page_shows_runs(page: Path, tmp_path: Path) -> None:
    own = os.pathsep.join([".", *(str(ROOT / part) for part in ("src", "kernels"))])
    environment = {**os.environ, "PYTHONPATH": own, "PADST_CACHE": str(tmp_path / "cache")}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script(page.read_text())],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("page", SHOWN, ids=lambda path: path.stem)
def test_what_a_page_names_beside_exists(page: Path) -> None:
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        for command in named(page.read_text()):
            assert is_right(command), command


def named(page: str) -> Iterator[str]:
    """The commands that a page shows and does not run."""
    for line, inline in NOT_RUN.findall(re.sub(r"^```.*?^```$", "", page, flags=re.M | re.S)):
        command = (line or inline).replace("\\\n", " ")
        if re.match(r"(python|torchrun|srun|pip|make|padst-\w+|lm_eval)\b(?!\.)", command):
            yield command


def is_right(command: str) -> bool:
    """Whether it names modules, keys, options, extras, targets and scripts that there are."""
    words = shlex.split(re.sub("<[^>]*>", "some", command), comments=True)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [extra for found in re.findall(r"\[(.+)\]", words[-1]) for extra in found.split(",")]
    match words:
        case ["make", *targets]:
            known = re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
            return set(targets) <= set(known)
        case ["pip", "install", what] | [what] if what.startswith(
            (".", "padst-exp[", "padst_exp-")
        ):
            return set(extras) <= set(project["optional-dependencies"])
        case ["python", script, *_] if script.startswith("scripts/"):
            return (ROOT / script).is_file()
        case ["python", "-c" | "-m", program, *_] if not program.startswith("padst_exp."):
            return program == "build" or compile(program, "program", "exec") is not None
        case ["lm_eval", "--model", "padst", *_]:
            return True
        case [script] if script in ("lm_eval", *project["scripts"]):
            return True
    _, module, *arguments = words[words.index("-m") :]
    return module.startswith("padst_exp.") and composes(module.partition(".")[2], arguments)


def composes(program: str, arguments: list[str]) -> bool:
    """Whether a command has a config: an unknown key or option raises."""
    given = [word for word in arguments if not re.search(r"=(some|\.\.\.)$|^[-&]", word)]
    if program != "train":
        words = [word for word in given if word != "plan"]
        own = OmegaConf.load(config_dir() / f"{program}.yaml").keys()
        foreign = [word for word in words if re.split("[.=]", word)[0] not in own]
        compose("config", ["dataset=imagenet1k", *foreign])
        compose(program, [word for word in words if word not in foreign])
        return True
    if "-m" not in arguments:
        cfg = compose("config", given)
        run_settings(cfg)
        for group in set(GROUPS) - {"dataset", "model"}:
            build(cfg[group], group)
        return True
    launcher = [word for word in given if word.startswith("hydra")]
    sweep = [word for word in given if word not in launcher]
    compose("config", launcher)
    return bool(jobs(sweep))


def test_links_of_pages_lead_somewhere() -> None:
    broken = [
        f"{page.name}: {target}"
        for page in SHOWN
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken
