"""Writes a checkpoint as a Hugging Face folder: config.json, model.safetensors, and the tokenizer where it can."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from hvdlm_huggingface.formats import FORMATS, Format

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.merge import Weights
from hvdlm.checkpoints.rebuild_spec import spec_of
from hvdlm.checkpoints.safetensors_io import Described, replace_tensors
from hvdlm.data.tokenizers import LIMIT, SLACK, from_json
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.atomic_files import replace, sync_folder
from hvdlm.models.gpt import GPTSettings
from hvdlm.models.spec import ModelSpec, builtin_models


def export(checkpoint: Checkpoint, tokenizer: Path | None, output: Path, base: str | None = None) -> tuple[int, str]:
    """Write the folder ``output``, no more than one tensor in memory; return (numbers written, what is to be known).

    ``tokenizer``: the run's tokenizer.json; ``base``: see ``spec_of``. config.json is written last: without it, it is
    no model's folder.

    Raises:
        HvdlmError: it is no model that Hugging Face's GPT-2 or Llama computes, or the folder can't be written.
    """
    spec = spec_of(checkpoint, builtin_models(), base)
    chosen = _format(spec)
    shapes = _shapes(spec, chosen)
    parts = _parts(shapes, chosen)
    tensors = {name: _described(shapes, chosen, params) for name, params in parts.items()}
    weights = Weights(checkpoint, spec)

    def array(name: str) -> np.ndarray:
        found = []
        for param in parts[name]:
            one = weights.array(param) if param in weights.tensors else np.zeros(shapes[param], np.float32)
            found.append(one.T if chosen.place(param).turned else one)
        return np.concatenate(found, -1) if len(found) > 1 else found[0]

    try:
        output.mkdir(parents=True, exist_ok=True)
        (output / "config.json").unlink(missing_ok=True)
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
    s = spec.settings
    if not isinstance(s, GPTSettings):
        raise HvdlmError(f"Hugging Face has no model like a {spec.kind}: only gpt, gpt2 and llama can be written so.")
    lacking = {name: one.lacks(s) for name, one in FORMATS.items()}
    for name, lack in lacking.items():
        if lack is None:
            return FORMATS[name]
    wanted = "; ".join(f"{name} has {lack}" for name, lack in lacking.items())
    raise HvdlmError(
        f"this model has {s.positions} positions, {s.norm}, {s.activation} and {s.kv_heads} key-value heads, which no "
        f"Hugging Face model has together ({wanted}): write it with --format safetensors."
    )


def _shapes(spec: ModelSpec, chosen: Format) -> dict[str, tuple[int, ...]]:
    """Return {parameter: shape}, with the biases that the format has and the model may lack."""
    params = spec.frozen or spec.params
    found = {param.name: param.shape for param in params}
    if chosen.biased:
        for param in params:
            layer, _, kind = param.name.rpartition(".")
            if kind in ("weight", "scale") and layer != "head":
                found.setdefault(f"{layer}.bias", param.shape[-1:])
    return found


def _parts(names: Iterable[str], chosen: Format) -> dict[str, list[str]]:
    """Return {tensor: the parameters that lie in it, in order}."""
    found: dict[str, dict[int, str]] = {}
    for name in names:
        place = chosen.place(name)
        found.setdefault(place.tensor, {})[place.part[0]] = name
    return {tensor: [params[i] for i in sorted(params)] for tensor, params in found.items()}


def _described(shapes: Mapping[str, tuple[int, ...]], chosen: Format, params: list[str]) -> Described:
    """Return the tensor in which ``params`` lie side by side; what is turned lies alone."""
    shape = shapes[params[0]]
    if chosen.place(params[0]).turned:
        return "F32", shape[::-1]
    return "F32", (*shape[:-1], sum(shapes[param][-1] for param in params))


def _write_tokenizer(path: Path | None, output: Path) -> str:
    """Write tokenizer.json and tokenizer_config.json; return what is to be known of it."""
    if path is None or not path.is_file():
        return "no tokenizer: only a run's folder (--run) has it"
    try:
        said = untrusted_input.read_json(path, LIMIT, slack=SLACK)
        from_json(said)
    except ValueError as error:
        raise HvdlmError(f"{path} is no tokenizer of a run: {error}.") from error
    make = _TOKENIZERS.get(said.get("kind"))
    if make is None:
        return f"no tokenizer: Hugging Face has no {said.get('kind')} tokenizer like hvdlm's"
    replace(output / "tokenizer.json", json.dumps(make(said), ensure_ascii=False))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    replace(output / "tokenizer_config.json", json.dumps(settings, indent=2))
    return f"{said['kind']} tokenizer"


def _bytes(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return bytes as a byte-level BPE that merges nothing, ids being the bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    # GPT-2's table of printable characters (openai/gpt-2, encoder.py, bytes_to_unicode).
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [b for b in range(256) if b not in printable]
    table = {b: chr(b) for b in printable} | {b: chr(256 + i) for i, b in enumerate(others)}
    tokenizer = Tokenizer(models.BPE({table[b]: b for b in range(256)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return dict(json.loads(tokenizer.to_str()))


def _characters(said: Mapping[str, Any]) -> dict[str, Any]:
    """Return characters as words of one character."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = {character: number for number, character in enumerate(said["characters"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=said["characters"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return dict(json.loads(tokenizer.to_str()))


_TOKENIZERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "byte": _bytes,
    "char": _characters,
    "bpe": lambda said: dict(said["description"]),
}
