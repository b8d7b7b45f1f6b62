"""What a Hugging Face folder holds beside weights: stop tokens, settings of generation, tokenizer, chat template."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm.data import tokenizers
from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.untrusted_input import shown
from hvdlm_huggingface.weights import guarded, root_of

GENERATION, TOKENIZER = "generation_config.json", "tokenizer.json"
COPIED = (
    GENERATION,
    TOKENIZER,
    *("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"),
    *("chat_template.jinja", "chat_template.json", "vocab.json", "merges.txt", "tokenizer.model"),
)
"""The small files that an exported model takes over from the folder that it was trained from."""

SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id")
_SETTINGS_BYTES = 2**20  # largest generation_config.json that is read


def stop_tokens(folder: Path, config: Mapping[str, Any], vocab: int) -> list[int] | None:
    """Return the ids below ``vocab`` at which transformers ends a generated text, None where it has none.

    They are those of generation_config.json, or, where there is none, of ``config``, the content of config.json.

    Raises:
        HvdlmError: they are no ids.
    """
    path = folder / GENERATION
    if path.exists():
        config = guarded(folder, lambda: untrusted_input.read_json(path, _SETTINGS_BYTES, root_of(folder)))
    value = config.get("eos_token_id") if isinstance(config, Mapping) else None
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(type(number) is int for number in ids):
        raise HvdlmError(
            f"{folder}: its eos_token_id is {shown(repr(value))}, expected ids: download the folder again."
        )
    return [number for number in ids if 0 <= number < vocab] or None


def copied_files(folder: Path) -> dict[str, bytes]:
    """Return the content of the files of ``COPIED`` that a folder has.

    Raises:
        HvdlmError: one is no regular file of the folder, or is too large.
    """
    names = [name for name in COPIED if (folder / name).exists()]
    root = root_of(folder)
    return {name: guarded(folder, lambda n=name: _read(folder / n, root)) for name in names}  # type: ignore[misc]


def _read(path: Path, root: Path) -> bytes:
    return untrusted_input.read(path, tokenizers.LIMIT, root)


def with_stop_tokens(generation: bytes, ids: list[int] | None) -> bytes:
    """Return a generation_config.json with other stop tokens."""
    settings = untrusted_input.parse_json(str(generation, "utf-8"))
    return json.dumps({**settings, "eos_token_id": eos_field(ids)}, indent=2).encode()


def eos_field(ids: list[int] | None) -> int | list[int] | None:
    """Return stop tokens in the form of ``eos_token_id``."""
    return ids[0] if ids and len(ids) == 1 else ids or None
