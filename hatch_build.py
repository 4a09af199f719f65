"""Compiles the C++ kernels into a wheel, where a compiler is present; without one they wait."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CompileKernels(BuildHookInterface[Any]):
    """Puts libraries for levels of x86-64 beside the kernels, which take the best that runs.

    The wheel is then one of this platform, for any Python. PADST_NATIVE=0 in the environment, or no
    compiler, makes one for any platform. A checkout compiles for the CPU it is on, at first use.
    """

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        self.folder = tempfile.TemporaryDirectory()
        if version == "editable" or os.environ.get("PADST_NATIVE") == "0":
            return
        try:
            libraries = self._compiled().compile_ahead(Path(self.folder.name))
        except (OSError, subprocess.SubprocessError) as error:
            self.app.display_warning(f"CPU kernels are compiled at first use instead: {error}")
            return
        for library in libraries:
            build_data["force_include"][str(library)] = f"padst_kernels/ahead/{library.name}"
        if libraries:
            build_data.update(pure_python=False, tag="py3-none-linux_x86_64")

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:
        self.folder.cleanup()

    def _compiled(self) -> Any:
        """The module that compiles; its package wants more than is there while a wheel is built."""
        path = Path(self.root, "kernels", "padst_kernels", "compiled.py")
        spec = importlib.util.spec_from_file_location("compiled", path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
