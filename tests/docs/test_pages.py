"""Every command and program that a page of docs/ shows runs, in the order it shows them.

A block of `bash` or `python` runs; an indented one, or one without a language, is not for running.
Trainings are cut to a few steps. `make docs-test` runs all pages.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(bash|python)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)")
PAGES = [path for path in sorted((ROOT / "docs").glob("*.md")) if BLOCK.search(path.read_text())]
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


def test_links_of_pages_lead_somewhere() -> None:
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    broken = [
        f"{page.name}: {target}"
        for page in pages
        for target in LINK.findall(page.read_text())
        if not (page.parent / target).exists()
    ]
    assert not broken
