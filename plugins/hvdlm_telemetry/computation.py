"""Tells in the first line of a run what it computes with: precision, compilation, device."""

from __future__ import annotations

from hvdlm import hookimpl
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.config import Config
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.framework import Resolved
from hvdlm.protocols.world import World
from hvdlm.training.run_control import RunControl


class Computation:
    """Event plugin that prints on rank 0 what options that are left to the machine stand for."""

    observer = True

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, run: RunControl) -> None:
        """Print the line, and for a resumed run the sentence on a precision that another device chose."""
        if world.rank:
            return
        resolved, precision = run.opened.resolved, config.train.precision
        print(first_line(precision, resolved), flush=True)
        if sentence := kept_precision(precision, resolved, run.opened.checkpoint):
            print(sentence, flush=True)


def first_line(precision: str, resolved: Resolved) -> str:
    """Return the first line of a run."""
    compiled = "on" if resolved.compile else "off"
    facts = f"hvdlm: precision {precision}, compile {compiled}, device {resolved.device}"
    return "; ".join([facts, *resolved.notes])


def kept_precision(precision: str, resolved: Resolved, checkpoint: Checkpoint | None) -> str | None:
    """Return a sentence if a run keeps the precision of its checkpoint, and this other device would choose another."""
    if checkpoint is None or precision == resolved.precision or checkpoint.manifest.get("device") == resolved.device:
        return None
    train = (checkpoint.manifest.get("config") or {}).get("train")
    if not isinstance(train, dict) or train.get("precision") != precision:
        return None
    device = checkpoint.manifest.get("device")
    trained = f"as the checkpoint was trained on {shown(device, 80)}" if device else "as the checkpoint was trained"
    return (
        f"hvdlm: the precision stays {precision}, {trained}; --train.precision {resolved.precision} is what auto would "
        f"choose on this {resolved.device}"
    )
