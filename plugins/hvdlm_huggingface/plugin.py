"""Hooks: ``--model.pretrained FOLDER`` and ``convert --format huggingface``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from hvdlm import hookimpl

if TYPE_CHECKING:
    from hvdlm.checkpoints.load import Checkpoint
    from hvdlm.protocols.pretrained import PretrainedFolder


@hookimpl
def hvdlm_open_pretrained(path: Path) -> PretrainedFolder | None:
    """Return the Hugging Face folder ``path``, or None if it has no config.json.

    Raises:
        HvdlmError: it is damaged, or holds a model that hvdlm doesn't compute.
    """
    if not (path / "config.json").exists():
        return None
    from hvdlm_huggingface.folder import Folder

    return Folder(path)


@hookimpl
def hvdlm_export(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Path | None,
    output: Path,
    base: str | None,
    max_shard_bytes: int | None,
) -> tuple[int, str] | None:
    """Write ``checkpoint`` as a Hugging Face folder; return the number of parameters and a note for the user.

    Raises:
        HvdlmError: no model of transformers computes it, or the folder can't be written.
    """
    if name != "huggingface":
        return None
    from hvdlm_huggingface.export import export

    count, note = export(checkpoint, tokenizer, output, base, max_shard_bytes)
    return count, f"for transformers; {note}"
