"""The safetensors files of a Hugging Face folder: which tensors they hold, and boxes of them as float32."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hvdlm.checkpoints.safetensors_io import open_tensors
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env, untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_corpora.progress_bar import print_line

FILE, INDEX = "model.safetensors", "model.safetensors.index.json"
_INDEX_BYTES = 2**26  # largest index that is read
_FLOATS = ("F64", "F32", "F16", "BF16")
_COMPARED = 2**22  # elements of two tensors that are compared at a time
Value = TypeVar("Value")
Box = tuple[slice, ...]


def root_of(folder: Path) -> Path:
    """Return the folder that the files of ``folder`` may be linked to: itself, or its repository in the hub's cache.

    The cache of huggingface_hub has links in ``models--NAME/snapshots/REVISION`` to ``models--NAME/blobs``.
    """
    path = Path(os.path.realpath(folder))
    cached = path.parent.name == "snapshots" and path.parent.parent.name.startswith("models--")
    return path.parent.parent if cached else path


def print_note(text: str) -> None:
    """Print a sentence about a folder, on one rank."""
    if launcher_env.rank_for_messages() == 0:
        print_line(f"hvdlm: {text}")


def guarded(folder: Path, action: Callable[[], Value]) -> Value:
    """Return the result of ``action``; every error about ``folder`` becomes an ``HvdlmError``."""

    def attempt() -> Value:
        try:
            return action()
        except OSError as error:
            cause = f"{shown(str(error.filename or folder), 300)}: {error.strerror or error}"
            raise HvdlmError(f"model.pretrained {cause}: name a Hugging Face folder of a language model.") from error
        except KeyError as error:
            sentence = f"model.pretrained {folder}: {shown(str(error))} is missing: download the folder again."
            raise HvdlmError(sentence) from error

    try:
        return untrusted_input.guarded(attempt)
    except ValueError as error:
        raise HvdlmError(
            f"model.pretrained {folder} is not a folder that hvdlm can read: {shown(str(error), 300)}."
        ) from error


class Weights:
    """The tensors of a folder; files are opened when one of their tensors is read.

    Args:
        folder: its path.
        prefix: how names begin; a base model, stored without its head, has names without it.

    Attributes:
        files: {tensor: file}.

    Raises:
        HvdlmError: there are none, or the index is damaged.
    """

    def __init__(self, folder: Path, prefix: str) -> None:
        self._folder = folder
        self._root = root_of(folder)
        self._prefix = prefix
        self._opened: dict[str, Any] = {}
        self.files = self._list()

    @staticmethod
    def exist(folder: Path) -> bool:
        """Return whether a folder has weights that can be read."""
        return (folder / FILE).exists() or (folder / INDEX).exists()

    def _list(self) -> dict[str, str]:
        """Return {tensor: file}: of the only file, or else from the index, in transformers' order."""
        if (self._folder / FILE).exists():
            return dict.fromkeys(self._guarded(self._file(FILE).keys), FILE)
        if not (self._folder / INDEX).exists():
            raise HvdlmError(
                f"{self._folder} has no model.safetensors: pickled weights are not read, save them with "
                "safe_serialization=True."
            )
        index = self._guarded(lambda: untrusted_input.read_json(self._folder / INDEX, _INDEX_BYTES, self._root))
        files = index.get("weight_map") if isinstance(index, dict) else None
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise HvdlmError(f"{self._folder / INDEX} names files outside of its folder: download it again.")
        return files

    def __contains__(self, tensor: str) -> bool:
        """Return whether there is such a tensor, with or without the prefix."""
        return tensor in self.files or tensor.removeprefix(self._prefix) in self.files

    def name(self, tensor: str) -> str:
        """Return a tensor's name in its file.

        Raises:
            HvdlmError: there is no such tensor.
        """
        if tensor not in self:
            raise HvdlmError(f"{self._folder}: there is no tensor {tensor}: download the folder again.")
        return tensor if tensor in self.files else tensor.removeprefix(self._prefix)

    def shape(self, tensor: str) -> tuple[int, ...]:
        """Return a tensor's shape; raise HvdlmError where its elements are no floating-point numbers."""
        tensor_slice = self._slice(tensor)
        if (dtype := str(self._guarded(tensor_slice.get_dtype))) not in _FLOATS:
            raise HvdlmError(
                f"{self._folder}: {shown(tensor)} holds {dtype}, hvdlm reads {', '.join(_FLOATS)}: quantised weights "
                "have to be converted back first."
            )
        return tuple(self._guarded(tensor_slice.get_shape))

    def read(self, tensor: str, box: Box) -> np.ndarray:
        """Return a box of a tensor, in its own dtype."""
        tensor_slice = self._slice(tensor)
        return self._guarded(lambda: tensor_slice[box])

    def equal(self, first: str, second: str) -> bool:
        """Return whether two matrices have equal elements, comparing some rows at a time."""
        shape = self.shape(first)
        if len(shape) != 2 or shape != self.shape(second):
            return False
        return all(np.array_equal(self.read(first, box), self.read(second, box)) for box in _rows(*shape))

    def digest_names(self) -> list[str]:
        """Return the names of all files, each checked to be a file of the folder."""
        names = sorted(set(self.files.values()))
        for name in names:
            self._file(name)
        return names

    def unused_files(self) -> list[str]:
        """Return the files with weights that are not read: of an index beside a single file, pickled ones, adapters."""
        names = self._guarded(lambda: os.listdir(self._folder))
        kinds = (".safetensors", INDEX, ".bin", ".bin.index.json", ".pt", ".pth", ".h5", ".msgpack", ".gguf")
        read = {*self.files.values(), *(() if (self._folder / FILE).exists() else (INDEX,))}
        return sorted(n for n in names if n.endswith(kinds) and n not in read and not n.startswith((".", "training_")))

    def _slice(self, tensor: str) -> Any:
        name = self.name(tensor)
        file = self._file(self.files[name])
        return self._guarded(lambda: file.get_slice(name))

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

            self._opened[name] = self._guarded(lambda: open_tensors(self._folder / name, self._root))
        return self._opened[name]

    def _guarded(self, action: Callable[[], Value]) -> Value:
        return guarded(self._folder, action)


def _rows(rows: int, columns: int) -> Iterator[Box]:
    """Yield boxes of a few rows each that cover a matrix."""
    step = max(1, _COMPARED // max(1, columns))
    for start in range(0, rows, step):
        yield (slice(start, min(rows, start + step)), slice(0, columns))
