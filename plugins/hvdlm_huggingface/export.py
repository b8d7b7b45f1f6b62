"""Writes a checkpoint as a Hugging Face folder: config.json, model.safetensors, and the tokenizer if possible."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.merge import MergedWeights
from hvdlm.checkpoints.rebuild_spec import spec_of
from hvdlm.checkpoints.safetensors_io import TensorInfo, replace_tensors
from hvdlm.data.tokenizers import LIMIT, SLACK, from_json
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import replace, sync_folder
from hvdlm.io.safe_files import delete_file
from hvdlm.models.gpt import GPTSettings
from hvdlm.models.spec import ModelSpec
from hvdlm_huggingface.formats import FORMATS, Format


def export(checkpoint: Checkpoint, tokenizer: Path | None, output: Path, base: str | None = None) -> tuple[int, str]:
    """Write the folder ``output``, with one tensor at a time in memory; return (parameters written, a note).

    ``tokenizer``: the run's tokenizer.json; ``base``: see ``spec_of``. The note names the tokenizer that is written,
    or says why there is none. config.json is written last: an interrupted export is not taken for a model.

    Raises:
        HvdlmError: neither GPT-2 nor Llama of transformers computes this model, or the folder can't be written.
    """
    spec = spec_of(checkpoint, base)
    chosen = _format(spec)
    shapes = _shapes(spec, chosen)
    members = _members(shapes, chosen)
    tensors = {name: _tensor_info(shapes, chosen, params) for name, params in members.items()}
    weights = MergedWeights(checkpoint, spec)

    def array(name: str) -> np.ndarray:
        arrays = []
        for param in members[name]:
            array = weights.array(param) if param in weights.tensors else np.zeros(shapes[param], np.float32)
            arrays.append(array.T if chosen.location(param).transposed else array)
        return np.concatenate(arrays, -1) if len(arrays) > 1 else arrays[0]

    try:
        output.mkdir(parents=True, exist_ok=True)
        delete_file(output / "config.json")
        replace_tensors(output / "model.safetensors", tensors, array, {"format": "pt"})
        note = _write_tokenizer(tokenizer, output)
        replace(output / "config.json", json.dumps({**chosen.config(spec.settings), "dtype": "float32"}, indent=2))
        sync_folder(output)
    except OSError as error:
        raise HvdlmError(
            f"--output {output}: {error.strerror or error}: name a folder that can be written and has space."
        ) from error
    return sum(math.prod(shape) for _, shape in tensors.values()), note


def _format(spec: ModelSpec) -> Format:
    """Return the format of the architecture that computes this model.

    Raises:
        HvdlmError: there is none.
    """
    s = spec.settings
    if not isinstance(s, GPTSettings):
        raise HvdlmError(f"Hugging Face has no model like a {spec.kind}: only gpt, gpt2 and llama have this format.")
    unmet = {name: candidate.unmet(s) for name, candidate in FORMATS.items()}
    for name, properties in unmet.items():
        if properties is None:
            return FORMATS[name]
    required = "; ".join(f"{name} has {properties}" for name, properties in unmet.items())
    raise HvdlmError(
        f"this model has {s.positions} positions, {s.norm}, {s.activation} and {s.kv_heads} key-value heads, which no "
        f"Hugging Face model has together ({required}): write it with --format safetensors."
    )


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
    """Return dtype and shape of the tensor that holds ``params`` side by side; a transposed one holds one parameter."""
    shape = shapes[params[0]]
    if chosen.location(params[0]).transposed:
        return "F32", shape[::-1]
    return "F32", (*shape[:-1], sum(shapes[param][-1] for param in params))


def _write_tokenizer(path: Path | None, output: Path) -> str:
    """Write tokenizer.json and tokenizer_config.json; return a note: which tokenizer it is, or why there is none."""
    if path is None or not path.is_file():
        return "no tokenizer: only a run's folder (--run) has it"
    try:
        description = untrusted_input.read_json(path, LIMIT, slack=SLACK)
        from_json(description)  # checks it
    except ValueError as error:
        raise HvdlmError(f"{path} is not the tokenizer of a run: {error}.") from error
    kind = description.get("kind")
    make = _TOKENIZERS.get(kind)
    if make is None:
        return f"no tokenizer: Hugging Face has no {kind} tokenizer like hvdlm's"
    replace(output / "tokenizer.json", json.dumps(make(description), ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    replace(output / "tokenizer_config.json", json.dumps(settings, indent=2))
    return f"{kind} tokenizer"


def _bytes(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a byte-level BPE tokenizer without merges, whose ids are the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's table of printable characters (openai/gpt-2, encoder.py, bytes_to_unicode).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({table[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return dict(json.loads(tokenizer.to_str()))


def _characters(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a word-level tokenizer whose words are single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = {character: number for number, character in enumerate(description["characters"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=description["characters"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return dict(json.loads(tokenizer.to_str()))


_TOKENIZERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "byte": _bytes,
    "char": _characters,
    "bpe": lambda description: dict(description["description"]),
}
