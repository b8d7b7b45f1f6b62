"""Models of the Hugging Face Hub by name (``--model.pretrained gpt2``)."""

from __future__ import annotations

from pathlib import Path

from hvdlm.protocols.pretrained import UnavailableModel
from hvdlm_corpora import hub

_FILES = (
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "chat_template.jinja",
)  # repositories hold the same weights in other formats beside these


def located(path: Path) -> Path:
    """Return ``path``, or, if nothing is there, the folder of the model of this name in the hub's cache.

    Raises:
        UnavailableModel: the model can't be had.
    """
    repository = None if path.exists() else hub.named(str(path))
    if repository is None:
        return path
    try:
        return hub.snapshot("model", repository, _FILES)
    except hub.Unavailable as error:
        raise UnavailableModel(f"model.pretrained {path}: there is no such folder, and {error}") from error.__cause__
