"""Write the kernels as a repository of the kernels hub: what `get_local_kernel` loads, or uploads.

    python scripts/hub_kernels.py FOLDER

The sources are in `torch-ext/`, where kernel-builder looks for them. Nothing is compiled ahead, so
`build/` has them too, once for each backend. There a package is loaded under any name, beside other
versions of itself: imports are relative, and operators have a namespace of their own.
"""

import argparse
import hashlib
import json
import re
import shutil
import sys
import tomllib
from pathlib import Path

KERNELS = Path(__file__).parents[1] / "kernels"
PACKAGE, HUB = KERNELS / "padst_kernels", KERNELS / "hub"
IMPORT = re.compile(r"^( *)from padst_kernels\.?([\w.]*) import ", re.MULTILINE)
NAMESPACE = '\nNAMESPACE = "padst"\n'


def main() -> None:
    """Write the folder that the command line names."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("folder", type=Path, help="is made; must not exist")
    folder = parser.parse_args().folder
    if folder.exists():
        sys.exit(f"folder: expected one that does not exist, got {folder}")
    write(folder)
    print(f"{folder} is for kernels.get_local_kernel, and for a repository of the hub")


def write(folder: Path) -> None:
    """Write the repository into `folder`, which does not exist."""
    build = tomllib.loads((HUB / "build.toml").read_text())
    about, suffixes = build["general"], {f".{end}" for end in build["torch-noarch"]["pyext"]}
    files = {
        path.relative_to(PACKAGE): path.read_text()
        for path in sorted(PACKAGE.rglob("*"))
        if path.suffix in suffixes
    }
    files[Path("layers.py")] = (HUB / "layers.py").read_text()
    name = about["name"].replace("-", "_")
    digest = hashlib.sha256(repr(files).encode()).hexdigest()[:12]
    # Whoever loads a kernel has the package alone.
    files[Path("__init__.py")] += "\nfrom . import diagonals, entries, layers, scatter, tiles\n"
    write_package(folder / "torch-ext" / name, files, f"_{name}_{digest}")
    for backend in about["backends"]:
        variant, own_name = folder / "build" / f"torch-{backend}", f"_{name}_{backend}_{digest}"
        write_package(variant, files, own_name)
        metadata = {
            "id": own_name,
            "name": about["name"],
            "version": about["version"],
            "license": about["license"],
            "python-depends": [],
            "backend": {"type": backend},
        }
        (variant / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    for path in (HUB / "build.toml", HUB / "README.md", KERNELS.parent / "LICENSE"):
        shutil.copy(path, folder)


def write_package(folder: Path, files: dict[Path, str], namespace: str) -> None:
    """Write a package that imports nothing by its own name."""
    for path, text in files.items():
        dots = "." * len(path.parts)
        text = IMPORT.sub(rf"\1from {dots}\2 import ", text)
        if path == Path("calls.py"):
            assert NAMESPACE in text
            text = text.replace(NAMESPACE, f'\nNAMESPACE = "{namespace}"\n')
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(text)


if __name__ == "__main__":
    main()
