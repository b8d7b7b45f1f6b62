"""What setup.cfg can't say: ``pip install -e .`` puts folders on ``sys.path`` instead of an import hook.

Python asks the import hook that setuptools would install after all folders of ``sys.path``. In the folder above a
clone that is called ``hvdlm``, the clone itself would then be taken for the package: for a namespace package, with
nothing in it. A package in a folder of ``sys.path`` comes before any namespace package.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from setuptools import setup
from setuptools.command.editable_wheel import editable_wheel

ROOT = Path(__file__).resolve().parent


class _Folders:
    """Writes the ``.pth`` file; a strategy of setuptools' ``editable_wheel``."""

    def __call__(self, wheel: Any, files: list[str], mapping: Mapping[str, str]) -> None:
        folders = [ROOT, ROOT / "backends", ROOT / "plugins"]
        wheel.writestr("__editable__.hvdlm.pth", "".join(f"{folder}\n" for folder in folders))

    def __enter__(self) -> _Folders:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class _EditableWheel(editable_wheel):
    def _select_strategy(self, name: str, tag: str, build_lib: Any) -> Any:
        return _Folders()


setup(cmdclass={"editable_wheel": _EditableWheel})
