"""Reads a Hugging Face folder: which model it is, and any box of any parameter, without reading the others."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from hvdlm_huggingface.formats import FORMATS, Place

from hvdlm.checkpoints.safetensors_io import open_tensors
from hvdlm.config import Config, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec, ParamSpec

_CONFIG_LIMIT, _INDEX_LIMIT = 2**20, 2**26
Value = TypeVar("Value")
Box = tuple[slice, ...]


class Folder:
    """An open folder; ``settings``: its model as values of ``ModelConfig``, ``context``: the most positions.

    Raises:
        HvdlmError: it holds no GPT-2 or Llama that hvdlm computes, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        config = self._guarded(lambda: untrusted_input.read_json(path / "config.json", _CONFIG_LIMIT))
        kind = config.get("model_type") if isinstance(config, dict) else None
        if not isinstance(kind, str) or kind not in FORMATS:
            raise HvdlmError(f"{path} holds a {shown(repr(kind))} model, hvdlm reads {' and '.join(FORMATS)}.")
        self.format = FORMATS[kind]
        self.settings = self._guarded(lambda: self.format.settings(config))
        self.context = self.settings.pop("context")
        self._files: dict[str, str] | None = None
        self._opened: dict[str, Any] = {}

    def attach(self, spec: ModelSpec) -> ModelSpec:
        """Return ``spec`` with this folder's weights as initial values, or as those that are frozen.

        Raises:
            HvdlmError: a tensor is missing or has another shape.
        """
        if spec.frozen:
            return replace(spec, frozen=tuple(self._attached(param) for param in spec.frozen))
        return replace(spec, params=tuple(self._attached(param) for param in spec.params))

    def fingerprint(self) -> str:
        """Return a hash of the weights' files, whatever they are called."""
        self._files = self._list() if self._files is None else self._files
        names = sorted(set(self._files.values()))
        for name in names:
            self._file(name)  # which checks that it is a file of its own
        digests = sorted(self._guarded(lambda: [sha256(self.path / name) for name in names]))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def _attached(self, param: ParamSpec) -> ParamSpec:
        place = self.format.place(param.name)
        shape = self._shape(place)
        # A shorter context uses the first positions.
        first = slice(0, 1) if param.name == "embed.positions" else slice(0, 0)
        if shape[first] < param.shape[first] or shape[first.stop :] != param.shape[first.stop :]:
            raise HvdlmError(
                f"{self.path}: {place.tensor} has the shape {list(shape)}, its config.json asks for "
                f"{list(param.shape)}: get the folder anew."
            )
        return replace(param, source=lambda _, box: self._read(place, box))

    def _shape(self, place: Place) -> tuple[int, ...]:
        name, file = self._open(place.tensor)
        shape = tuple(self._guarded(lambda: file.get_slice(name).get_shape()))
        shape = shape[::-1] if place.turned else shape
        if not shape:
            return shape
        return (*shape[:-1], shape[-1] // place.part[1])

    def _read(self, place: Place, box: Box) -> np.ndarray:
        """Return float32 ``box`` of what lies at ``place``."""
        name, file = self._open(place.tensor)
        which, parts = place.part
        if parts > 1:
            width = self._shape(place)[-1]
            last = slice(box[-1].start + which * width, box[-1].stop + which * width)
            box = (*box[:-1], last)
        found = self._guarded(lambda: file.get_slice(name)[box[::-1] if place.turned else box])
        return np.ascontiguousarray(found.T if place.turned else found, np.float32)

    def _open(self, tensor: str) -> tuple[str, Any]:
        """Return (its name there, the open file) of a tensor; base models are stored without the prefix."""
        files = self._files = self._list() if self._files is None else self._files
        name = tensor if tensor in files else tensor.removeprefix(self.format.prefix)
        if name not in files:
            raise HvdlmError(f"{self.path}: there is no tensor {tensor}: get the folder anew.")
        return name, self._file(files[name])

    def _file(self, name: str) -> Any:
        if name not in self._opened:
            import ml_dtypes  # noqa: F401  so that numpy knows bfloat16

            self._opened[name] = self._guarded(lambda: open_tensors(self.path / name, self.path))
        return self._opened[name]

    def _list(self) -> dict[str, str]:
        """Return {tensor: file}."""
        index = self.path / "model.safetensors.index.json"
        if not index.exists():
            if not (self.path / "model.safetensors").exists():
                raise HvdlmError(
                    f"{self.path} has no model.safetensors: pickled weights are not read, save them with "
                    "safe_serialization=True."
                )
            file = self._file("model.safetensors")
            return dict.fromkeys(self._guarded(file.keys), "model.safetensors")
        found = self._guarded(lambda: untrusted_input.read_json(index, _INDEX_LIMIT)["weight_map"])
        if not isinstance(found, dict) or not all(isinstance(f, str) and Path(f).name == f for f in found.values()):
            raise HvdlmError(f"{index} names files outside of its folder: get it anew.")
        return found

    def _guarded(self, action: Callable[[], Value]) -> Value:
        """Return what ``action`` returns; whatever it stumbles over in the folder becomes a sentence."""

        def told() -> Value:
            try:
                return action()
            except OSError as error:
                what = f"{error.filename or self.path}: {error.strerror or error}"
                raise HvdlmError(f"model.pretrained {what}: name a Hugging Face folder of a GPT-2 or Llama.") from error
            except KeyError as error:
                text = f"model.pretrained {self.path}: {error} is missing in what should be there."
                raise HvdlmError(text) from error

        try:
            return untrusted_input.guarded(told)
        except ValueError as error:
            raise HvdlmError(f"model.pretrained {self.path} is no folder that hvdlm can read: {error}.") from error


def require_base(pretrained: str) -> None:
    """Check that the folder is there whose weights adapters are added to.

    Raises:
        HvdlmError: it is not.
    """
    if not (Path(pretrained) / "config.json").exists():
        raise HvdlmError(
            f"{pretrained}, whose weights adapters are added to, is gone or no folder of a model: put it back, or say "
            "where it lies now (--model.pretrained FOLDER, and its --data.tokenizer; of convert, --base FOLDER)."
        )


def resolve(config: Config) -> Config:
    """Return ``config`` with the sizes and the tokenizer of ``model.pretrained``; without it, ``config`` itself.

    Raises:
        HvdlmError: the folder doesn't do, or ``config`` asks for other sizes than its.
    """
    given = config.model.pretrained
    if given is not None and config.lora.rank is not None:
        require_base(given)
    if given is None or (config.model.vocab is not None and not (Path(given) / "config.json").exists()):
        return config  # of a run, whose config.yaml has all that was in the folder
    folder = Folder(Path(given))
    defaults = ModelConfig()
    for key, value in folder.settings.items():
        asked = getattr(config.model, key)
        if asked not in (getattr(defaults, key), value) and not (key == "name" and asked == "gpt"):
            raise HvdlmError(f"model.{key} is {asked}, but {given} has {value}: leave --model.{key} out.")
    if config.data.context > folder.context:
        raise HvdlmError(
            f"data.context {config.data.context} is more than the {folder.context} positions of {given}: "
            f"--data.context {folder.context} or less."
        )
    config = replace(config, model=replace(config.model, **folder.settings))
    own = folder.path / "tokenizer.json"
    if config.data.tokenizer != type(config.data)().tokenizer:
        return config
    if not own.exists():
        raise HvdlmError(f"{given} has no tokenizer.json: name the model's tokenizer with --data.tokenizer.")
    return replace(config, data=replace(config.data, tokenizer=str(own)))
