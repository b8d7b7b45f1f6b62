"""The tokens of ``data.document_token``, which begin or end every document where the tokenizer adds none."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hvdlm.config import DataConfig
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.io.untrusted_input import shown

_EXAMPLE = "write for example --data.document_token '<|endoftext|>', or '{begin: <s>, end: </s>}'"


def find(config: DataConfig, tokenizer: Tokenizer) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Return the ids that begin, and those that end, every document.

    Raises:
        HvdlmError: a token is not in the vocabulary, or the tokenizer adds another one by itself.
    """
    names = _names(config.document_token)
    own = {"begin": tokenizer.prefix, "end": tokenizer.suffix} if config.add_special_tokens else {}
    begin, end = (_ids(names.get(key), key, own.get(key, ()), tokenizer) for key in ("begin", "end"))
    return begin, end


def _names(value: Any) -> Mapping[str, Any]:
    """Return the option's tokens by where they are added; a token alone ends documents."""
    if value is None:
        return {}
    names = value if isinstance(value, Mapping) else {"end": value}
    if not names or not names.keys() <= {"begin", "end"}:
        raise HvdlmError(f"data.document_token: got {shown(repr(value))}, expected a token, begin or end: {_EXAMPLE}.")
    return names


def _ids(name: Any, key: str, own: tuple[int, ...], tokenizer: Tokenizer) -> tuple[int, ...]:
    if name is None:
        return ()
    if type(name) is int:
        ids = [name] if 0 <= name < tokenizer.vocab else []
    elif isinstance(name, str):
        ids = _encoded(name, tokenizer)
    else:
        raise HvdlmError(f"data.document_token: {key} is {shown(repr(name))}, expected a name or an id: {_EXAMPLE}.")
    if len(ids) != 1:
        raise HvdlmError(
            f"data.document_token: {shown(repr(name))} is not one of the {tokenizer.vocab} tokens of the tokenizer: "
            "name a token of its vocabulary, or its id."
        )
    if own not in ((), tuple(ids)):
        raise HvdlmError(
            f"data.document_token: {key} is {shown(repr(name))}, and the tokenizer itself adds "
            f"{shown(repr(tokenizer.decode(own)))} there: leave one of them out (--data.add_special_tokens false)."
        )
    return tuple(ids)


def _encoded(name: str, tokenizer: Tokenizer) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(name, special=True).tolist()
    except HvdlmError:  # a character that its vocabulary lacks
        return []
    return ids
