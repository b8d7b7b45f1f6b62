"""Writes checkpoints behind training's back: all ranks agree what each of them writes, and threads write it.

Everything is written into a folder with a temporary name and synced; the manifest comes last; then the folder is
renamed. A checkpoint is there whole or not at all. Only the calling thread talks to other ranks, so that collectives
keep their order; the thread behind it touches nothing but files.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints import retention, shared_folders
from hvdlm.checkpoints.manifest import FORMAT
from hvdlm.checkpoints.safetensors_io import Described, write_tensors
from hvdlm.checkpoints.shards import key, to_json
from hvdlm.checkpoints.shared_folders import Sharing
from hvdlm.checkpoints.write_plan import ENTRY, Deal, deal_out
from hvdlm.config import CheckpointConfig
from hvdlm.errors import RankError
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.protocols.world import World


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become whole.

    Attributes:
        step: optimizer steps done when its state was copied.
        path: its folder.
        blocked_seconds: how long training stood still for it, the copy included.
        seconds: from the copy's beginning until it was known to be whole.
    """

    step: int
    path: Path
    blocked_seconds: float
    seconds: float


class Background:
    """One action in a thread of its own, and what came of it."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._answer: dict[str, Any] = {"error": None, "value": None}
        self._thread = threading.Thread(target=self._do, args=(action,), name="hvdlm-save", daemon=True)
        self._thread.start()

    def _do(self, action: Callable[[], Any]) -> None:
        try:
            self._answer["value"] = action()
        except OSError as error:
            self._answer["error"] = shared_folders.explain(error)
        except Exception as error:  # a thread's exception would be seen by nobody
            self._answer["error"] = f"{type(error).__name__}: {error}"

    @property
    def done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def answer(self, seconds: float) -> dict[str, Any] | None:
        """Wait that long for its end; return {"error": text or None, "value": what it returned}, or None before it."""
        self._thread.join(seconds)
        return self._answer if self.done else None


_TURN_SECONDS = 2.0
Phases = Generator[Callable[[], Any], list[dict[str, Any]], None]


class Saver:
    """Writes the checkpoints of a run into ``folder``, one after the other. All ranks have one and call alike.

    A save goes through phases: ``start``, and ``advance`` whenever all ranks are ``ready``, or ``finish``. Whether
    ranks share a folder is found out at the first save; where they don't, each folder gets what its ranks write.
    """

    def __init__(self, folder: Path, world: World, options: CheckpointConfig) -> None:
        self._folder, self._world, self._options = folder, world, options
        self._sharing: Sharing | None = None
        self._dealt: tuple[list[str], Deal] | None = None
        self._phases: Phases | None = None
        self._task: Background | None = None
        self._step = 0
        self._began = self._blocked = 0.0
        self._whole: Path | None = None

    @property
    def active(self) -> bool:
        """Whether a save is under way: the same on all ranks."""
        return self._phases is not None

    def ready(self) -> bool:
        """Return whether this rank has done, or failed at, its part of the present phase."""
        return self._task is None or self._task.done

    def start(
        self,
        step: int,
        state: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
        shards: Mapping[str, Shard] | None = None,
        began: float | None = None,
    ) -> list[Saved]:
        """Begin to write ``state``, a copy that nobody changes any more, as the checkpoint of ``step``. All ranks call.

        A save that is still under way is finished first; nothing is left to do afterwards where saves are synchronous.

        Args:
            step: optimizer steps done.
            state: as of ``Trainable.state``.
            meta: what the manifest says besides.
            pieces: which piece of its global array an entry is; all of it where nothing is said. What several ranks
                hold the lowest of them writes.
            began: ``time.perf_counter()`` before the copy was made.

        Returns:
            What has become whole meanwhile.

        Raises:
            RankError: a rank can't write, or a disk lacks space; earlier checkpoints are untouched.
        """
        entered = time.perf_counter()
        done = self.finish()
        waited = time.perf_counter() - entered
        self._began = entered + waited if began is None else began
        self._step, self._blocked, self._whole = step, -waited if began is not None else 0.0, None
        self._go_on(self._save(step, dict(state), meta, shards or {}), None)
        self._blocked += time.perf_counter() - self._began
        return done if self._options.asynchronous else done + self.finish()

    def advance(self) -> list[Saved]:
        """End the present phase, waiting for ranks that aren't ready, and begin the next. All ranks call.

        Returns:
            The checkpoint, if it is whole now.

        Raises:
            RankError: a rank failed; nothing is left of the checkpoint, earlier ones are untouched.
        """
        if self._phases is None or self._task is None:
            return []
        entered = time.perf_counter()
        self._go_on(self._phases, self._answers(self._task))
        now = time.perf_counter()
        self._blocked += now - entered
        path, self._whole = self._whole, None
        return [Saved(self._step, path, self._blocked, now - self._began)] if path else []

    def _answers(self, task: Background) -> list[dict[str, Any]]:
        """Return all ranks' answers. Who is done hears now and then that others aren't, so that no time-out strikes."""
        while True:
            answers = self._world.gather_objects(task.answer(_TURN_SECONDS))
            found = [answer for answer in answers if answer is not None]
            if len(found) == len(answers):
                return found
            self._world.recorder.alive()

    def finish(self) -> list[Saved]:
        """Return when no save is under way any more: what has become whole. All ranks call.

        Raises:
            RankError: a rank failed; see ``advance``.
        """
        done = []
        while self.active:
            done += self.advance()
        return done

    def _go_on(self, phases: Phases, answers: list[dict[str, Any]] | None) -> None:
        """Hand what all ranks answered to the save under way, and do in the background what it asks for next."""
        self._phases = self._task = None  # should it raise, this save is over
        try:
            action = next(phases) if answers is None else phases.send(answers)
        except StopIteration:
            return
        self._phases, self._task = phases, Background(action)

    def _save(
        self, step: int, state: dict[str, np.ndarray], meta: Mapping[str, Any], shards: Mapping[str, Shard]
    ) -> Phases:
        """Go through a save: every rank does what is yielded in the background, and all ranks' answers come back."""
        sharing = self._meet()
        name, published = retention.name_of(step), False
        temporary, final = retention.partial(self._folder, name), self._folder / name
        try:
            deal = self._prepare(sharing, temporary, state, shards)
            if not sharing.everywhere:  # all leaders write the same manifest, byte for byte
                meta = self._world.broadcast_object(dict(meta))
            mine = {name for names in deal.parts[self._world.rank].values() for name in names}
            for other in [n for n in state if n not in mine and not n.startswith("exchange/")]:
                del state[other]  # others write it: its memory is free again
            answers = yield lambda: self._write(temporary, deal, state)
            state.clear()
            _raise_first(answers, "write", temporary)
            files = {file: entry for answer in answers for file, entry in answer["value"].items()}
            manifest = {**meta, "format": FORMAT, "step": step, "world_size": self._world.size, "files": files}
            manifest["tensors"] = deal.tensors
            answers = yield lambda: retention.publish(self._folder, name, manifest) if sharing.leads else None
            published = answers[self._world.rank]["error"] is None
            _raise_first(answers, "publish", final)
        except RankError:
            if sharing.leads:
                retention.withdraw(self._folder, name, published)
            raise
        self._whole = final
        keep = (self._options.keep, self._options.keep_best, sharing.everywhere)
        yield lambda: retention.tidy(self._folder, step, *keep) if sharing.leads else None

    def _meet(self) -> Sharing:
        if self._sharing is None:
            self._sharing = shared_folders.meet(self._folder, self._world)
            if self._sharing.leads:
                retention.sweep(self._folder)
        return self._sharing

    def _prepare(
        self, sharing: Sharing, temporary: Path, state: Mapping[str, np.ndarray], shards: Mapping[str, Shard]
    ) -> Deal:
        """Make the temporary folder, agree who writes what, and see that there is space for it. All ranks call."""
        held, own, made = {}, 0, {"error": None, "room": None}
        for name, array in state.items():
            if name.startswith("exchange/"):
                own += array.nbytes + ENTRY
            else:
                held[name] = to_json(array, shards.get(name) or whole(array.shape))
        if sharing.leads:
            made = _make(temporary)
        digest = hashlib.sha256(json.dumps(held).encode()).hexdigest()
        # Nobody writes before all have answered: by then the folder is there.
        answers = self._world.gather_objects({**made, "held": digest, "own": own})
        _raise_first(answers, "make", temporary)
        deal = self._agree_on(held, [answer["held"] for answer in answers])
        needs = [part + answer["own"] for part, answer in zip(deal.bytes, answers, strict=True)]
        lacking = shared_folders.too_little(sharing, needs, [answer["room"] for answer in answers])
        if lacking:
            raise RankError(_no_room(*lacking, self._folder))
        return deal

    def _agree_on(self, held: Mapping[str, Any], digests: list[str]) -> Deal:
        """Return who writes what of what ranks hold, which is told anew only where it has changed on any of them."""
        if self._dealt is None or self._dealt[0] != digests:
            self._dealt = digests, deal_out(self._world.gather_objects(held))
        return self._dealt[1]

    def _write(self, temporary: Path, deal: Deal, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Write this rank's files; return their entries in the manifest."""
        contents = {file: {key(n): state[n] for n in names} for file, names in deal.parts[self._world.rank].items()}
        own = {name: array for name, array in state.items() if name.startswith("exchange/")}
        if own:
            contents[f"rank-{self._world.rank:04d}.safetensors"] = own
        return {
            file: write_tensors(temporary / file, {n: _described(a) for n, a in arrays.items()}, arrays.__getitem__)
            for file, arrays in contents.items()
        }


def _described(array: np.ndarray) -> Described:
    return to_json(array, whole(array.shape))["dtype"], array.shape


def _make(temporary: Path) -> dict[str, Any]:
    """Make the temporary folder; return {"error": why it can't be, "room": see ``folders.room``}."""
    room: dict[str, Any] = {}

    def make() -> None:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
        room.update(shared_folders.room(temporary))

    error = shared_folders.attempt(make)
    return {"error": error, "room": room or None}


def _raise_first(answers: Sequence[Mapping[str, Any]], verb: str, path: Path) -> None:
    for rank, answer in enumerate(answers):
        if answer["error"]:
            raise RankError(
                f"rank {rank} could not {verb} the checkpoint {path}: {answer['error']}. Earlier checkpoints are "
                "untouched; free space or repair the folder and go on with --checkpoint.resume auto."
            )


def _no_room(rank: int, need: int, free: int, folder: Path) -> str:
    return (
        f"the checkpoint needs {need / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB free where rank {rank} is: "
        "nothing was written, earlier checkpoints are untouched; free space or keep fewer (--checkpoint.keep) and go "
        "on with --checkpoint.resume auto."
    )
