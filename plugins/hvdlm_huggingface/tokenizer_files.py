"""Writes hvdlm's tokenizers as Hugging Face's: tokenizer.json and tokenizer_config.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hvdlm.data.tokenizers import LIMIT, SLACK, from_json
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input


def tokenizer_files(path: Path | None, eos: Any) -> tuple[dict[str, bytes], str]:
    """Return {name: content} of the files, and a note: which tokenizer it is, or why there is none.

    Args:
        path: the run's tokenizer.json.
        eos: the model's ``eos_token_id``.

    Raises:
        HvdlmError: ``path`` is no tokenizer.
    """
    if path is None or not path.is_file():
        return {}, "no tokenizer: only a run's folder (--run) has it"
    try:
        description = untrusted_input.read_json(path, LIMIT, slack=SLACK)
        from_json(description)  # checks it
    except ValueError as error:
        raise HvdlmError(f"{path} is not the tokenizer of a run: {error}.") from error
    kind = description.get("kind")
    make = _TOKENIZERS.get(kind)
    if make is None:
        return {}, f"no tokenizer: Hugging Face has no {kind} tokenizer like hvdlm's"
    content = make(description)
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    names = {token["id"]: token["content"] for token in content.get("added_tokens") or []}
    first = eos[0] if isinstance(eos, list) else eos
    if first in names:
        settings["eos_token"] = names[first]
    files = {"tokenizer.json": json.dumps(content, ensure_ascii=False), "tokenizer_config.json": json.dumps(settings)}
    return {name: text.encode() for name, text in files.items()}, f"{kind} tokenizer"


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


def from_characters(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return a word-level tokenizer whose words are single characters."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = {character: number for number, character in enumerate(description["characters"])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token=description["characters"][0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return dict(json.loads(tokenizer.to_str()))


_TOKENIZERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "byte": _bytes,
    "char": from_characters,
    "bpe": lambda description: dict(description["description"]),
}
