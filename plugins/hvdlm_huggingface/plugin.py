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
    """Return the Hugging Face folder ``path``, or that of the model of this name; None: there is no config.json.

    Raises:
        HvdlmError: it is damaged, holds a model that hvdlm doesn't compute, or is a name and can't be had.
    """
    from hvdlm_huggingface.folder import Folder
    from hvdlm_huggingface.hub_models import located

    folder = located(path)
    return Folder(folder) if (folder / "config.json").exists() else None


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
