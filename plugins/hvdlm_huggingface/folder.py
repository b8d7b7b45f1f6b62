"""Reads a Hugging Face folder: the model's sizes, and any box of any parameter without reading the others."""

from __future__ import annotations

import hashlib
import re
from dataclasses import replace
from pathlib import Path

import numpy as np

from hvdlm.config import Config, DataConfig, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import sha256
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec, ParamSpec
from hvdlm_huggingface import metadata
from hvdlm_huggingface.fields import Fields
from hvdlm_huggingface.formats import FORMATS
from hvdlm_huggingface.tensor_format import TensorLocation
from hvdlm_huggingface.weights import Box, Weights, guarded, print_note, root_of
from hvdlm_language.presets import PRESETS

_CONFIG_BYTES = 2**20  # largest config.json that is read
_NAMED = 5  # unused names that a sentence has room for
_EMBEDDING, _HEAD = "embed.tokens", "head.weight"


class Folder:
    """An open folder (an ``PretrainedFolder``).

    Attributes:
        path: its path.
        content: what its config.json holds.
        settings: the model's values of ``ModelConfig``.
        context: its number of positions.

    Raises:
        HvdlmError: it holds no model that hvdlm computes, or is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.content = guarded(
            path, lambda: untrusted_input.read_json(path / "config.json", _CONFIG_BYTES, root_of(path))
        )
        kind = self.content.get("model_type") if isinstance(self.content, dict) else None
        if not isinstance(kind, str) or kind not in FORMATS:
            raise HvdlmError(f"{path} holds a {shown(repr(kind))} model, hvdlm reads {', '.join(FORMATS)}.")
        self.format = FORMATS[kind]
        fields = Fields(self.content, self.format.aliases)
        self.settings = guarded(path, lambda: self.format.settings(fields))
        for key in ("quantization_config", "transformers_weights"):  # weights in another form, or in other files
            if fields.get(key) is not None:
                raise HvdlmError(f"{path}: its config.json has {key}, which hvdlm doesn't read: save the model again.")
        self.context = self.settings.pop("context")
        self._unused_fields = fields.unused()
        self._opened: Weights | None = None

    @property
    def _weights(self) -> Weights:
        if self._opened is None:
            self._opened = Weights(self.path, self.format.prefix)
        return self._opened

    def resolve(self, config: Config) -> Config:
        """Return ``config`` with this folder's sizes, and its tokenizer and stop tokens unless others are chosen.

        When a model is imported for the first time, says which fields, tensors and files of the folder are not used.

        Raises:
            HvdlmError: ``config`` asks for other sizes than the folder's, or there is no tokenizer.
        """
        imported = config.model.vocab is None
        if Weights.exist(self.path):  # a run that is resumed needs no more than the tokenizer
            self._check_claims()
            self._untie(config, imported)
        self._check_choices(config)
        config = replace(config, model=replace(config.model, **self.settings))
        if imported and Weights.exist(self.path):
            self._report_unused(config.model)
        tokenizer = self.path / "tokenizer.json"
        if config.data.tokenizer not in (DataConfig().tokenizer, str(tokenizer)):
            return config
        if not tokenizer.exists():
            raise HvdlmError(f"{self.path} has no tokenizer.json: name the model's tokenizer with --data.tokenizer.")
        config = replace(config, data=replace(config.data, tokenizer=str(tokenizer)))
        if config.model.stop_tokens is not None:
            return config
        stop = metadata.stop_tokens(self.path, self.content, self.settings["vocab"])
        return replace(config, model=replace(config.model, stop_tokens=stop))

    def _check_choices(self, config: Config) -> None:
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

    def _check_claims(self) -> None:
        """Check what config.json claims against what is stored, before a description of that size is built."""
        tensor = self._location(_EMBEDDING).tensor
        expected = (self.settings["vocab"], self.settings["width"])
        self._check_shape(tensor, self._weights.shape(tensor), expected)
        layers, stored = self.settings["layers"], len(self._weights.files)
        if layers > stored:
            raise HvdlmError(
                f"{self.path}: its config.json asks for {layers:,} layers, its files hold {stored:,} tensors: download "
                "the folder again."
            )

    def _check_shape(self, tensor: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
        if shape != expected:
            raise HvdlmError(
                f"{self.path}: {tensor} has the shape {list(shape)}, its config.json asks for {list(expected)}: "
                "download the folder again."
            )

    def _untie(self, config: Config, imported: bool) -> None:
        """Untie a head that differs from the embedding although config.json ties them, as transformers does."""
        head, embedding = self._head().tensor, self.format.location(_EMBEDDING).tensor
        if not self.settings["tie_embeddings"] or head not in self._weights or embedding not in self._weights:
            return
        if self._weights.equal(head, embedding):
            return
        if config.model.tie_embeddings:
            print_note(
                f"{self.path}: {head} differs from {embedding} and is not used, since model.tie_embeddings is true"
            )
            return
        self.settings["tie_embeddings"] = False
        if imported:
            print_note(
                f"{self.path}: {head} differs from {embedding}, although its config.json ties them: both are used "
                "(--model.tie_embeddings true uses the latter alone)"
            )

    def _report_unused(self, model: ModelConfig) -> None:
        """Print which fields of config.json, tensors and files have no effect on the model."""
        spec = PRESETS[model.name](model, self.settings["vocab"], self.context)
        used = {
            self._weights.name(t) for t in (self._location(p.name).tensor for p in spec.params) if t in self._weights
        }
        head = {self._head().tensor}  # was compared, where it is not used
        buffers = re.compile(self.format.buffers)
        tensors = [n for n in self._weights.files if n not in used | head and not buffers.search(n)]
        unused = {
            "fields of config.json": self._unused_fields,
            "tensors": sorted(tensors),
            "files": self._weights.unused_files(),
        }
        for kind, names in unused.items():
            if names:
                more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
                print_note(f"{self.path}: {kind} that are not used: {shown(', '.join(names[:_NAMED]), 200)}{more}")

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
        names = self._weights.digest_names()
        digests = sorted(guarded(self.path, lambda: [sha256(self.path / name) for name in names]))
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()

    def positions(self, first: int) -> np.ndarray:
        """Return the position embeddings from ``first`` on, float32 ``[positions, embed]``."""
        rows = (slice(first, self.context), slice(0, self.settings["width"]))
        return self._read(self._location("embed.positions"), rows)

    def _location(self, name: str) -> TensorLocation:
        """Return which tensor holds a parameter: a tied embedding may be stored as the head alone."""
        location, head = self.format.location(name), self._head()
        if name == _HEAD:
            return head
        tied = name == _EMBEDDING and self.settings["tie_embeddings"]
        return head if tied and location.tensor not in self._weights and head.tensor in self._weights else location

    def _head(self) -> TensorLocation:
        """Return which tensor holds the head: of the names that it may have, the one in the folder."""
        names = [f"{name}.weight" for name in self.format.heads]
        return TensorLocation(next((name for name in names if name in self._weights), names[0]))

    def _with_source(self, param: ParamSpec) -> ParamSpec:
        """Return ``param`` with initial values that are read from the folder."""
        location = self._location(param.name)
        shape = self._shape(location)
        # A shorter context uses the first positions: there may be more rows.
        rows = slice(0, 1) if param.name == "embed.positions" else slice(0, 0)
        if shape[rows] < param.shape[rows] or shape[rows.stop :] != param.shape[rows.stop :]:
            self._check_shape(location.tensor, shape, param.shape)
        return replace(param, source=lambda _, box: self._read(location, box))

    def _shape(self, location: TensorLocation) -> tuple[int, ...]:
        """Return the shape of the parameter at ``location``."""
        shape = self._weights.shape(location.tensor)
        shape = shape[::-1] if location.transposed else shape
        if not shape:
            return shape
        return (*shape[:-1], shape[-1] // location.chunk[1])

    def _read(self, location: TensorLocation, box: Box) -> np.ndarray:
        """Return ``box`` of the parameter at ``location``, as float32."""
        boxes = [box]
        if location.chunk[1] > 1:
            spans = location.spans(box[-1], self._shape(location)[-1], self.settings["heads"])
            boxes = [(*box[:-1], span) for span in spans]
        reversed_boxes = [one[::-1] if location.transposed else one for one in boxes]
        arrays = [self._weights.read(location.tensor, one) for one in reversed_boxes]
        arrays = [np.ascontiguousarray(one.T if location.transposed else one, np.float32) for one in arrays]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, -1)
        return array + np.float32(location.offset) if location.offset else array
