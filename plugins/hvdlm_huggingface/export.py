"""Writes a checkpoint as a Hugging Face folder: config.json, weights, tokenizer and special tokens."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.safetensors_io import TensorInfo, bytes_of, open_tensors
from hvdlm.errors import HvdlmError
from hvdlm.io.atomic_files import replace as write_text
from hvdlm.io.atomic_files import sync_folder, write_synced
from hvdlm.io.safe_files import delete_file
from hvdlm.io.untrusted_input import shown
from hvdlm.models.spec import ModelSpec
from hvdlm_huggingface.formats import format_of
from hvdlm_huggingface.metadata import COPIED
from hvdlm_huggingface.origin import Origin, eos_of, find, model_of
from hvdlm_huggingface.tensor_format import INERT, Format
from hvdlm_huggingface.tokenizer_files import tokenizer_files
from hvdlm_huggingface.weights import FILE, INDEX
from hvdlm_language.rebuild_spec import spec_of
from hvdlm_tools.merge import MergedWeights, replace_tensors

_WRITTEN = {"config.json", FILE, INDEX, *COPIED}  # the names of all files that an export may write, but for shards
_SHARD = "model-{:05d}-of-{:05d}.safetensors"
_ANY_SHARD = re.compile(r"model-\d{5,}-of-\d{5,}\.safetensors")
_MARK = {"format": "pt", "writer": "hvdlm"}  # metadata of the weights, by which an earlier export is recognised
_POSITIONS = "embed.positions"


def export(
    checkpoint: Checkpoint,
    tokenizer: Path | None,
    output: Path,
    base: str | None = None,
    max_shard_bytes: int | None = None,
) -> tuple[int, str]:
    """Write the folder ``output``, with one tensor at a time in memory; return (parameters written, a note).

    What the folder that training started from holds beside the model's weights is taken over: positions beyond those
    that were trained, special tokens, settings of generation, tokenizer, chat template. The note says which tokenizer
    is written, or why none is, and what is missing. config.json is written last: an interrupted export is not taken for
    a model.

    Args:
        checkpoint: an open checkpoint.
        tokenizer: the run's tokenizer.json.
        output: the folder.
        base: the folder that training started from; None: as the checkpoint names it.
        max_shard_bytes: weights that take more are written in several files and an index; None: in one file.

    Raises:
        HvdlmError: no model of transformers computes this one, or the folder can't be written.
    """
    spec = spec_of(checkpoint, base)
    chosen = format_of(spec, model_of(checkpoint).get("name"))
    origin, missing = find(checkpoint, spec.settings, base)
    files, note = _files(checkpoint, tokenizer, origin)
    fields = _fields(checkpoint, chosen, spec, origin)
    weights = _Export(checkpoint, spec, chosen, origin)
    try:
        _check_output(output, origin)
        output.mkdir(parents=True, exist_ok=True)
        shards = _shards(weights.tensors, max_shard_bytes)
        kept = shards.keys() if len(shards) == 1 else {}  # which is replaced at once
        for name in sorted(filter(_is_ours, os.listdir(output))):
            if name not in kept:
                delete_file(output / name)
        for name, tensors in shards.items():
            replace_tensors(output / name, tensors, weights.array, _MARK)
        if len(shards) > 1:
            write_text(output / INDEX, json.dumps(_index(shards), indent=2))
        for name, content in files.items():
            write_synced(output / name, content)
        write_text(output / "config.json", json.dumps(fields, indent=2))
        sync_folder(output)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a folder that can be written and has space."
        ) from error
    return sum(math.prod(shape) for _, shape in weights.tensors.values()), note + missing


def _check_output(output: Path, origin: Origin | None) -> None:
    """Check that a folder is missing, empty, or an earlier export, whose files are replaced: others' are not touched.

    Raises:
        HvdlmError: it holds something else, or training started from it.
    """
    names = [] if not output.is_dir() else sorted(os.listdir(output))
    if origin is not None and names and output.samefile(origin.path):
        raise HvdlmError(f"--output {output}: training started from this folder: name one that doesn't exist yet.")
    foreign = [name for name in names if not _is_ours(name)]
    if not foreign and any(not name.startswith(".") for name in names) and not _is_export(output):
        foreign = [name for name in names if not name.startswith(".")]
    if foreign:
        raise HvdlmError(
            f"--output {output}: it holds {shown(foreign[0])}, which no export wrote: name a folder that doesn't exist "
            "yet, or an empty one."
        )


def _is_export(output: Path) -> bool:
    shards = sorted(name for name in os.listdir(output) if _ANY_SHARD.fullmatch(name))
    try:
        weights = open_tensors(output / (FILE if (output / FILE).exists() or not shards else shards[0]), output)
        return (weights.metadata() or {}).get("writer") == _MARK["writer"]
    except (OSError, ValueError):
        return False


def _is_ours(name: str) -> bool:
    """Return whether an export may write a file of this name, or a partial one."""
    if name.startswith(".") and name.endswith(".partial"):
        name = name[1:].removesuffix(".partial")
    return name in _WRITTEN or _ANY_SHARD.fullmatch(name) is not None


def _shards(tensors: Mapping[str, TensorInfo], largest: int | None) -> dict[str, dict[str, TensorInfo]]:
    """Return {file: its tensors}: one, or as many as have no more than ``largest`` bytes, or a single tensor."""
    shards: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if largest is not None and shards[-1] and size + bytes_of(tensor) > largest:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += bytes_of(tensor)
    if len(shards) == 1:
        return {FILE: shards[0]}
    return {_SHARD.format(number, len(shards)): shard for number, shard in enumerate(shards, 1)}


def _index(shards: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, Any]:
    """Return the index by which transformers finds every tensor's file."""
    size = sum(bytes_of(tensor) for shard in shards.values() for tensor in shard.values())
    return {"metadata": {"total_size": size}, "weight_map": {name: file for file in shards for name in shards[file]}}


def _files(checkpoint: Checkpoint, tokenizer: Path | None, origin: Origin | None) -> tuple[dict[str, bytes], str]:
    """Return {name: content} of the files beside the weights and config.json, and a note on them."""
    if origin is not None and origin.keeps_tokenizer:
        return origin.files(), f"bpe tokenizer, special tokens and settings of {origin.path}"
    return tokenizer_files(tokenizer, eos_of(checkpoint))


def _fields(checkpoint: Checkpoint, chosen: Format, spec: ModelSpec, origin: Origin | None) -> dict[str, Any]:
    """Return the content of config.json: the model's sizes, and what the folder that it started from says beside."""
    context = origin.context if origin else spec.settings.context
    fields = chosen.config(dataclasses.replace(spec.settings, context=context))
    sizes = {name: value for name, value in fields.items() if name not in INERT}
    carried = origin.fields() if origin else {"eos_token_id": eos_of(checkpoint)}
    return {**fields, **carried, **sizes, "dtype": "float32"}


class _Export:
    """The tensors of an exported model.

    Attributes:
        tensors: {tensor: (dtype, shape)}.
    """

    def __init__(self, checkpoint: Checkpoint, spec: ModelSpec, chosen: Format, origin: Origin | None) -> None:
        self._weights = MergedWeights(checkpoint, spec)
        self._format = chosen
        self._heads = spec.settings.heads
        self._shapes = _shapes(spec, chosen)
        self._members = _members(self._shapes, chosen)
        self._origin = origin if origin and origin.context > spec.settings.context else None
        self.tensors = {name: _tensor_info(self._shapes, chosen, params) for name, params in self._members.items()}
        if self._origin and _POSITIONS in self._shapes:
            name = chosen.location(_POSITIONS).tensor
            self.tensors[name] = ("F32", (self._origin.context, spec.settings.width))

    def array(self, name: str) -> np.ndarray:
        """Return a tensor, float32."""
        members = self._members[name]
        arrays = [self._member(param) for param in members]
        return self._format.location(members[0]).joined(arrays, self._heads)

    def _member(self, param: str) -> np.ndarray:
        if param not in self._weights.tensors:  # a bias that the model lacks
            return np.zeros(self._shapes[param], np.float32)
        array = self._weights.array(param)
        if param == _POSITIONS and self._origin:
            return np.concatenate([array, self._origin.positions(len(array))])
        return array


def _shapes(spec: ModelSpec, chosen: Format) -> dict[str, tuple[int, ...]]:
    """Return {parameter: shape}, with all biases of the format, even those that the model lacks."""
    params = spec.frozen or spec.params
    shapes = {param.name: param.shape for param in params}
    if chosen.biased:
        for param in params:
            layer, _, kind = param.name.rpartition(".")
            if kind in ("weight", "scale") and layer != "head":
                shapes.setdefault(f"{layer}.bias", param.shape[-1:])
    return shapes


def _members(names: Iterable[str], chosen: Format) -> dict[str, list[str]]:
    """Return {tensor: the parameters that it holds, in order}."""
    members: dict[str, dict[int, str]] = {}
    for name in names:
        location = chosen.location(name)
        members.setdefault(location.tensor, {})[location.chunk[0]] = name
    return {tensor: [params[i] for i in sorted(params)] for tensor, params in members.items()}


def _tensor_info(shapes: Mapping[str, tuple[int, ...]], chosen: Format, params: list[str]) -> TensorInfo:
    """Return dtype and shape of the tensor that holds ``params`` side by side."""
    shape = (*shapes[params[0]][:-1], sum(shapes[param][-1] for param in params))
    return "F32", shape[::-1] if chosen.location(params[0]).transposed else shape
