"""The folder that an exported model was trained from: its further positions, special tokens, settings and files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints.load import Checkpoint
from hvdlm.errors import HvdlmError
from hvdlm_corpora import tokenizers
from hvdlm_huggingface import metadata
from hvdlm_huggingface.folder import Folder
from hvdlm_huggingface.hub_models import located
from hvdlm_huggingface.metadata import GENERATION, SPECIAL, TOKENIZER
from hvdlm_language.gpt import GPTSettings

_OF_THE_EXPORT = {"dtype", "torch_dtype", "rope_scaling", "transformers_version", "_name_or_path", "architectures"}


class Origin:
    """The folder that a checkpoint's model started from.

    Args:
        folder: the open folder; its model has the sizes of the checkpoint's.
        checkpoint: the checkpoint.

    Attributes:
        path: the folder's path.
        context: its number of positions.
        keeps_tokenizer: whether the model was trained with the folder's tokenizer, so that its special tokens hold.
    """

    def __init__(self, folder: Folder, checkpoint: Checkpoint) -> None:
        self._folder = folder
        self.path = folder.path
        self.context = folder.context
        tokenizer = folder.path / TOKENIZER
        trained = checkpoint.manifest.get("tokenizer")
        self.keeps_tokenizer = tokenizer.is_file() and tokenizers.train(str(tokenizer), None, ()).hash == trained
        self._stop = _stop_tokens(checkpoint)
        vocab = folder.settings["vocab"]
        self._changed = self._stop is not None and self._stop != metadata.stop_tokens(self.path, folder.content, vocab)

    def fields(self) -> dict[str, Any]:
        """Return the fields of config.json that hold for the trained model, too; they don't include its sizes."""
        left_out = _OF_THE_EXPORT | (set() if self.keeps_tokenizer else {*SPECIAL, "tokenizer_class"})
        fields = {key: value for key, value in self._folder.content.items() if key not in left_out}
        return fields | ({"eos_token_id": metadata.eos_field(self._stop)} if self._changed else {})

    def files(self) -> dict[str, bytes]:
        """Return {name: content} of the small files to copy; none where the model has another tokenizer."""
        files = metadata.copied_files(self.path) if self.keeps_tokenizer else {}
        if self._changed and GENERATION in files:
            files[GENERATION] = metadata.with_stop_tokens(files[GENERATION], self._stop)
        return files

    def positions(self, first: int) -> np.ndarray:
        """Return the position embeddings from ``first`` on, float32 ``[positions, embed]``."""
        return self._folder.positions(first)


def find(checkpoint: Checkpoint, settings: GPTSettings, base: str | None) -> tuple[Origin | None, str]:
    """Return the folder that a checkpoint's model started from, and a note where it can't be used.

    Args:
        checkpoint: an open checkpoint.
        settings: of its model.
        base: the folder; None: the one that the checkpoint names.

    Raises:
        HvdlmError: ``base`` is given and is no such folder, or a file of the folder is damaged.
    """
    path = base or model_of(checkpoint).get("pretrained")
    if not isinstance(path, str):
        return None, ""
    try:
        folder = Folder(located(Path(path)))
        _check(folder, settings)
    except HvdlmError as error:
        if base is not None:
            raise
        reason = str(error).rstrip(".")
        return None, (
            f"; without the special tokens, the chat template and the further positions of {path}, which training "
            f"started from: {reason} (--base FOLDER, if it has moved)"
        )
    return Origin(folder, checkpoint), ""


def model_of(checkpoint: Checkpoint) -> Mapping[str, Any]:
    """Return the options of section ``model`` of a checkpoint's run."""
    config: Any = checkpoint.manifest.get("config") or {}
    return dict(config.get("model") or {})


def eos_of(checkpoint: Checkpoint) -> int | list[int] | None:
    """Return the stop tokens of a checkpoint's run in the form of ``eos_token_id``."""
    return metadata.eos_field(_stop_tokens(checkpoint))


def _stop_tokens(checkpoint: Checkpoint) -> list[int] | None:
    ids = model_of(checkpoint).get("stop_tokens")
    valid = isinstance(ids, list) and all(type(number) is int and number >= 0 for number in ids)
    return ids if valid else None


def _check(folder: Folder, settings: GPTSettings) -> None:
    """Check that a folder's model has the sizes of the trained one."""
    for name, value in folder.settings.items():
        trained = getattr(settings, name, None)
        if name not in ("name", "tie_embeddings") and value is not None and value != trained:
            raise HvdlmError(f"{folder.path} holds another model: its {name} is {value}, not {trained}.")
    if folder.context < settings.context:
        raise HvdlmError(f"{folder.path} holds another model: it has {folder.context} positions.")
