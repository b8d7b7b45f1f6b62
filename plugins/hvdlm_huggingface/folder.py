"""Reads a Hugging Face folder: the model's sizes, and any box of any parameter without reading the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from hvdlm.checkpoints.safetensors_io import open_tensors
from hvdlm.config import Config, DataConfig, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm_huggingface.formats import FORMATS, TensorLocation

_CONFIG_BYTES, _INDEX_BYTES = 2**20, 2**26  # largest files that are read
Value = TypeVar("Value")
Box = tuple[slice, ...]


class Folder:
    """An open folder (an ``PretrainedFolder``).

    Attributes:
        settings: the model's values of ``ModelConfig``.
        context: its number of positions.

    Raises:
        HvdlmError: it holds no GPT-2 or Llama that hvdlm computes, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = self._guarded(lambda: untrusted_input.read_json(path / "config.json", _CONFIG_BYTES))
        kind = config.get("model_type") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in FORMATS:
            raise HvdlmError(f"{path} holds a {shown(repr(kind))} model, hvdlm reads {' and '.join(FORMATS)}.")
        self.format = FORMATS[kind]
        self.settings = self._guarded(lambda: self.format.settings(config))
        self.context = self.settings.pop("context")
        self._files: dict[str, str] | None = None
        self._opened: dict[str, Any] = {}

    def resolve(self, config: Config) -> Config:
        """Return ``config`` with this folder's sizes, and its tokenizer unless another one is chosen.

        Raises:
            HvdlmError: ``config`` asks for other sizes than the folder's, or there is no tokenizer.
        """
        defaults = ModelConfig()
        for key, value in self.settings.items():
            asked = getattr(config.model, key)
            if asked not in (getattr(defaults, key), value) and not (key == "name" and asked == "gpt"):
                raise HvdlmError(f"model.{key} is {asked}, but {self.path} has {value}: leave --model.{key} out.")
        if config.data.context > self.context:
            raise HvdlmError(
                f"data.context {config.data.context} is more than the {self.context} positions of {self.path}: "
                f"--data.context {self.context} or less."
            )
        config = replace(config, model=replace(config.model, **self.settings))
        if config.data.tokenizer != DataConfig().tokenizer:
            return config
        tokenizer = self.path / "tokenizer.json"
        if not tokenizer.exists():
            raise HvdlmError(f"{self.path} has no tokenizer.json: name the model's tokenizer with --data.tokenizer.")
        return replace(config, data=replace(config.data, tokenizer=str(tokenizer)))

    def attach(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with this folder's weights as those of its frozen parameters, or, without any, of all.

        Raises:
            HvdlmError: a tensor is missing or has another shape.
        """
        if spec.frozen:
            return replace(spec, frozen=tuple(self._with_source(param) for param in spec.frozen))
        return replace(spec, params=tuple(self._with_source(param) for param in spec.params))

    def fingerprint(self) -> str:
        """Return a hash of the files with the weights, independent of their names."""
        self._files = self._list() if self._files is None else self._files
        names = sorted(set(self._files.values()))
        for name in names:
            self._file(name)  # checks that it is a file within the folder
        digests = sorted(self._guarded(lambda: [sha256(self.path / name) for name in names]))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def _with_source(self, param: ParamSpec) -> ParamSpec:
        """Return ``param`` with initial values that are read from the folder."""
        location = self.format.location(param.name)
        shape = self._shape(location)
        # A shorter context uses the first positions: there may be more rows.
        rows = slice(0, 1) if param.name == "embed.positions" else slice(0, 0)
        if shape[rows] < param.shape[rows] or shape[rows.stop :] != param.shape[rows.stop :]:
            raise HvdlmError(
                f"{self.path}: {location.tensor} has the shape {list(shape)}, its config.json asks for "
                f"{list(param.shape)}: download the folder again."
            )
        return replace(param, source=lambda _, box: self._read(location, box))

    def _shape(self, location: TensorLocation) -> tuple[int, ...]:
        """Return the shape of the parameter at ``location``."""
        name, file = self._open(location.tensor)
        shape = tuple(self._guarded(lambda: file.get_slice(name).get_shape()))
        shape = shape[::-1] if location.transposed else shape
        if not shape:
            return shape
        return (*shape[:-1], shape[-1] // location.chunk[1])

    def _read(self, location: TensorLocation, box: Box) -> np.ndarray:
        """Return ``box`` of the parameter at ``location``, as float32."""
        name, file = self._open(location.tensor)
        index, count = location.chunk
        if count > 1:
            offset = index * self._shape(location)[-1]
            box = (*box[:-1], slice(box[-1].start + offset, box[-1].stop + offset))
        array = self._guarded(lambda: file.get_slice(name)[box[::-1] if location.transposed else box])
        return np.ascontiguousarray(array.T if location.transposed else array, np.float32)

    def _open(self, tensor: str) -> tuple[str, Any]:
        """Return a tensor's name in its file, and the open file; base models are stored without the prefix."""
        files = self._files = self._list() if self._files is None else self._files
        name = tensor if tensor in files else tensor.removeprefix(self.format.prefix)
        if name not in files:
            raise HvdlmError(f"{self.path}: there is no tensor {tensor}: download the folder again.")
        return name, self._file(files[name])

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            import ml_dtypes  # noqa: F401  registers bfloat16 with numpy

            self._opened[name] = self._guarded(lambda: open_tensors(self.path / name, self.path))
        return self._opened[name]

    def _list(self) -> dict[str, str]:
        """Return {tensor: file}, from the index, or of the only file."""
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            if not (self.path / "model.safetensors").exists():
                raise HvdlmError(
                    f"{self.path} has no model.safetensors: pickled weights are not read, save them with "
                    "safe_serialization=True."
                )
            file = self._file("model.safetensors")
            return dict.fromkeys(self._guarded(file.keys), "model.safetensors")
        files = self._guarded(lambda: untrusted_input.read_json(index, _INDEX_BYTES)["weight_map"])
        if not isinstance(files, dict) or not all(isinstance(f, str) and Path(f).name == f for f in files.values()):
            raise HvdlmError(f"{index} names files outside of its folder: download it again.")
        return files

    def _guarded(self, action: Callable[[], Value]) -> Value:
        """Return the result of ``action``; every error about the folder becomes an ``HvdlmError``."""

        def attempt() -> Value:
            try:
                return action()
            except OSError as error:
                cause = f"{error.filename or self.path}: {error.strerror or error}"
                sentence = f"model.pretrained {cause}: name a Hugging Face folder of a GPT-2 or Llama."
                raise HvdlmError(sentence) from error
            except KeyError as error:
                sentence = f"model.pretrained {self.path}: {error} is missing: download the folder again."
                raise HvdlmError(sentence) from error

        try:
            return untrusted_input.guarded(attempt)
        except ValueError as error:
            raise HvdlmError(f"model.pretrained {self.path} is not a folder that hvdlm can read: {error}.") from error
