"""Writes checkpoints in the background: all ranks agree which of them writes what, and a thread of each writes it.

Everything is written and synced in a folder under a temporary name, the manifest last; then the folder is renamed: a
checkpoint is whole or absent. Only the calling thread communicates, so that collectives keep their order; the
background thread only touches files. Nothing is published that is not finite, or that differs between replicas.
"""

from __future__ import annotations

import hashlib
import json
import math
import threading
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hvdlm.checkpoints import retention, shared_folders
from hvdlm.checkpoints.branches import Branch, continue_from
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.manifest import FORMAT
from hvdlm.checkpoints.order import step_name
from hvdlm.checkpoints.safetensors_io import TensorInfo, write_tensors
from hvdlm.checkpoints.shards import key, to_json
from hvdlm.checkpoints.shared_folders import Sharing
from hvdlm.checkpoints.state_checks import Copied, Frozen, Replicas, not_finite
from hvdlm.checkpoints.write_plan import ENTRY_BYTES, WritePlan, make_write_plan
from hvdlm.config import CheckpointConfig
from hvdlm.errors import RankError
from hvdlm.io import safe_files
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.protocols.world import World

_TURN_SECONDS = 2.0  # between two exchanges while ranks wait for each other: below every time-out
Phases = Generator[Callable[[], Any], list[dict[str, Any]], None]
"""A save, phase by phase: yields what every rank does in the background, and is sent all ranks' results."""


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has become whole.

    Attributes:
        step: optimizer steps done when its state was copied.
        path: its folder.
        blocked_seconds: how long training was blocked for it, including the copy.
        seconds: from the start of the copy until the checkpoint was known to be whole.
    """

    step: int
    path: Path
    blocked_seconds: float
    seconds: float


class Background:
    """One action in a thread of its own, and its result."""

    def __init__(self, action: Callable[[], Any]) -> None:
        self._result: dict[str, Any] = {"error": None, "value": None}
        self._thread = threading.Thread(target=self._run, args=(action,), name="hvdlm-save", daemon=True)
        self._thread.start()

    def _run(self, action: Callable[[], Any]) -> None:
        try:
            self._result["value"] = action()
        except OSError as error:
            self._result["error"] = shared_folders.describe(error)
        except Exception as error:  # nobody would see an exception of a thread
            self._result["error"] = f"{type(error).__name__}: {error}"

    @property
    def done(self) -> bool:
        """Whether it has ended, successfully or not."""
        return not self._thread.is_alive()

    def result(self, seconds: float) -> dict[str, Any] | None:
        """Wait up to ``seconds``; return {"error": text or None, "value": what it returned}, or None if not done."""
        self._thread.join(seconds)
        return self._result if self.done else None


class Saver:
    """Writes the checkpoints of a run into ``folder``, one after the other. All ranks have one and call alike.

    A save has phases: ``start`` begins the first, ``advance``, called whenever all ranks are ``ready``, the next ones,
    and ``finish`` completes all. A phase without progress for ``limit`` seconds (a dead network mount) ends the run, by
    an error on all ranks. Whether ranks share a folder is detected at the first save; where they don't, each
    folder holds the files that its ranks write.

    Attributes:
        refused: why a save was not published, though no rank failed: its state is not finite. The caller resets it.
    """

    def __init__(self, folder: Path, world: World, options: CheckpointConfig, limit: float = math.inf) -> None:
        self._folder = folder
        self._world = world
        self._options = options
        self._branch = Branch()
        self._limit = limit
        self._progress = 0  # counts what is written in the background
        self._sharing: Sharing | None = None
        self.refused: str | None = None
        self._planned: tuple[list[str], WritePlan, Replicas] | None = None  # with the digests of what ranks held
        self._phases: Phases | None = None
        self._task: Background | None = None
        self._step = 0
        self._began = 0.0
        self._blocked = 0.0
        self._whole: Path | None = None

    @property
    def active(self) -> bool:
        """Whether a save is under way: the same on all ranks."""
        return self._phases is not None

    def ready(self) -> bool:
        """Return whether this rank has completed, or failed in, the present phase."""
        return self._task is None or self._task.done

    def continue_from(self, checkpoint: Checkpoint | None) -> None:
        """Order what is saved from now on after all that is in the folder; see ``branches``. All ranks call.

        Args:
            checkpoint: the one whose state the run has; None: it starts from scratch.

        Raises:
            HvdlmError: checkpoints that it leaves behind can't be set aside.
        """
        sharing = self._meet() if self._world.any(self._folder.is_dir()) else None
        self._branch = continue_from(checkpoint, self._folder, self._world, sharing)

    def start(
        self,
        step: int,
        state: Mapping[str, np.ndarray],
        meta: Mapping[str, Any],
        shards: Mapping[str, Shard] | None = None,
        began: float | None = None,
        replicas: Mapping[str, str] | None = None,
        frozen: Frozen = tuple,
    ) -> list[Saved]:
        """Start to write ``state``, a copy that is never changed, as the checkpoint of ``step``. All ranks call.

        A save that is still under way is finished first; a synchronous save is complete on return.

        Args:
            step: optimizer steps done.
            state: as of ``Trainable.state``.
            meta: other entries of the manifest.
            shards: the shard of its global array that an entry is; those not listed are whole. A shard that several
                ranks hold is written by the lowest of them.
            began: ``time.perf_counter()`` before the copy was made.
            replicas: as of ``StateDict.replicas``: what has to be equal on ranks, and is compared; None: nothing.
            frozen: as ``StateDict.frozen``; it is called in the background. Compared, but not written.

        Returns:
            The checkpoints that have become whole meanwhile.

        Raises:
            RankError: a rank can't write, a disk lacks space, or replicas differ; earlier checkpoints are unchanged.
        """
        entered = time.perf_counter()
        done = self.finish()
        waited = time.perf_counter() - entered
        self._began = entered + waited if began is None else began
        self._step = step
        self._blocked = -waited if began is not None else 0.0
        self._whole = None
        copied = Copied(dict(state), shards or {}, replicas or {}, frozen)
        self._next_phase(self._save(step, copied, {**meta, **self._branch.next_entry()}), None)
        self._blocked += time.perf_counter() - self._began
        return done if self._options.asynchronous else done + self.finish()

    def advance(self) -> list[Saved]:
        """End the present phase, waiting for ranks that aren't ready, and begin the next. All ranks call.

        Returns:
            The checkpoint, if it is whole now.

        Raises:
            RankError: a rank failed; the checkpoint is withdrawn, earlier ones are unchanged.
        """
        if self._phases is None or self._task is None:
            return []
        entered = time.perf_counter()
        self._next_phase(self._phases, self._gather_results(self._task))
        now = time.perf_counter()
        self._blocked += now - entered
        path, self._whole = self._whole, None
        return [Saved(self._step, path, self._blocked, now - self._began)] if path else []

    def _gather_results(self, task: Background) -> list[dict[str, Any]]:
        """Return all ranks' results; ranks that are done exchange messages meanwhile, so that no time-out expires."""
        idle, before = 0.0, self._progress  # counted in turns: a clock continues while a process is suspended
        while True:
            result = task.result(_TURN_SECONDS)
            idle = 0.0 if result or self._progress != before else idle + _TURN_SECONDS
            before = self._progress
            gathered = self._world.gather_objects({"result": result, "idle": idle})
            results = [other["result"] for other in gathered if other["result"]]
            if len(results) == len(gathered):
                return results
            self._world.recorder.alive()
            self._check_progress([other["idle"] for other in gathered])

    def _check_progress(self, idle: Sequence[float]) -> None:
        """Raise RankError where a rank has made no progress for longer than the limit: the same on all ranks."""
        rank = max(range(len(idle)), key=idle.__getitem__)
        if idle[rank] > self._limit:
            self._phases = self._task = None
            raise RankError(
                f"the run hangs: rank {rank} has been writing the checkpoint of step {self._step} into {self._folder} "
                f"without progress for {idle[rank]:.0f} s (limit: twice --communication.timeout): its file system does "
                "not respond. Earlier checkpoints are unchanged: resume with --checkpoint.resume auto."
            )

    def finish(self) -> list[Saved]:
        """Complete the save that is under way; return the checkpoints that have become whole. All ranks call.

        Raises:
            RankError: a rank failed; see ``advance``.
        """
        done = []
        while self.active:
            done += self.advance()
        return done

    def _next_phase(self, phases: Phases, results: list[dict[str, Any]] | None) -> None:
        """Send all ranks' results to the save, and start its next action in the background."""
        self._phases = self._task = None  # if the phase raises, this save is over
        try:
            action = next(phases) if results is None else phases.send(results)
        except StopIteration:
            return
        self._phases = phases
        self._task = Background(action)

    def _save(self, step: int, copied: Copied, meta: Mapping[str, Any]) -> Phases:
        """Yield a save's phases: prepare, check and write, publish, delete old checkpoints."""
        sharing = self._meet()
        name = step_name(step)
        temporary, final = retention.partial(self._folder, name), self._folder / name
        published = False
        try:
            plan, replicas = self._prepare(sharing, temporary, copied)
            if not sharing.everywhere:  # all leaders must write the same manifest, byte for byte
                meta = self._world.broadcast_object(dict(meta))
            results = yield lambda: self._check_and_write(temporary, plan, replicas, copied)
            copied.state.clear()
            _raise_first(results, "write", temporary)
            values = [result["value"] for result in results]
            refused = not_finite([value["not_finite"] for value in values], step)
            if refused:
                self.refused = refused
                if sharing.leads:
                    retention.withdraw(self._folder, name, published)
                return
            difference = replicas.compare([value["digests"] for value in values], copied.checksums, self._world)
            if difference:
                raise RankError(
                    f"after step {step}, {difference} The checkpoint of this step is not published: resume from an "
                    "earlier one (--checkpoint.resume auto), on another machine."
                )
            files = {file: entry for value in values for file, entry in value["files"].items()}
            manifest = {**meta, "format": FORMAT, "step": step, "world_size": self._world.size, "files": files}
            manifest["tensors"] = plan.tensors
            results = yield lambda: retention.publish(self._folder, name, manifest) if sharing.leads else None
            published = results[self._world.rank]["error"] is None
            _raise_first(results, "publish", final)
        except RankError:
            if sharing.leads:
                retention.withdraw(self._folder, name, published)
            raise
        self._whole = final
        kept = (self._options.keep, self._options.keep_best, sharing.everywhere)
        yield lambda: retention.delete_old(self._folder, step, *kept) if sharing.leads else None

    def _meet(self) -> Sharing:
        if self._sharing is None:
            self._sharing = shared_folders.meet(self._folder, self._world)
            if self._sharing.leads:
                retention.clean_up(self._folder)
        return self._sharing

    def _prepare(self, sharing: Sharing, temporary: Path, copied: Copied) -> tuple[WritePlan, Replicas]:
        """Make the temporary folder, agree on the write plan, and check the disk space it needs. All ranks call."""
        held = {}
        rank_bytes = 0  # of this rank's own file
        made: dict[str, Any] = {"error": None, "space": None}
        for name, array in copied.state.items():
            if name.startswith("exchange/"):
                rank_bytes += array.nbytes + ENTRY_BYTES
            else:
                held[name] = to_json(array, copied.shards.get(name) or whole(array.shape))
        if sharing.leads:
            made = _make(temporary)
        described = [held, dict(copied.replicas)]
        digest = hashlib.sha256(json.dumps(described).encode()).hexdigest()
        # A barrier, too: no rank writes before the folder exists.
        answers = self._world.gather_objects({**made, "held": digest, "rank_bytes": rank_bytes})
        _raise_first(answers, "make", temporary)
        plan, replicas = self._agree_on_plan(described, [answer["held"] for answer in answers])
        needs = [size + answer["rank_bytes"] for size, answer in zip(plan.bytes, answers, strict=True)]
        lacking = shared_folders.insufficient_space(sharing, needs, [answer["space"] for answer in answers])
        if lacking:
            raise RankError(_no_space(*lacking, self._folder))
        return plan, replicas

    def _agree_on_plan(self, described: list[Any], digests: list[str]) -> tuple[WritePlan, Replicas]:
        """Return the write plan and the replicas, made again only where what a rank holds has changed."""
        if self._planned is None or self._planned[0] != digests:
            held, replicas = zip(*self._world.gather_objects(described), strict=True)
            self._planned = digests, make_write_plan(held), Replicas(replicas)
        return self._planned[1:]

    def _check_and_write(self, temporary: Path, plan: WritePlan, replicas: Replicas, copied: Copied) -> dict[str, Any]:
        """Check the state and write this rank's files: {"files": their entries in the manifest, "digests": ...}."""
        rank, state = self._world.rank, copied.state
        name = copied.check({name for names in replicas.of(rank) for name in names})
        if name:
            return {"not_finite": name, "files": {}, "digests": []}
        written_here = {name for names in plan.files[rank].values() for name in names}
        for other in [n for n in state if n not in written_here and not n.startswith("exchange/")]:
            del state[other]  # other ranks write it: its memory can be freed
        files = self._write(temporary, plan, state)
        return {"not_finite": None, "files": files, "digests": replicas.digests(rank, copied.checksums)}

    def _write(self, temporary: Path, plan: WritePlan, state: Mapping[str, np.ndarray]) -> dict[str, Any]:
        """Write this rank's files; return their entries in the manifest."""
        rank = self._world.rank
        contents = {file: {key(n): state[n] for n in names} for file, names in plan.files[rank].items()}
        rank_state = {name: array for name, array in state.items() if name.startswith("exchange/")}
        if rank_state:
            contents[f"rank-{rank:04d}.safetensors"] = rank_state
        return {
            file: write_tensors(
                temporary / file,
                {n: _info(a) for n, a in arrays.items()},
                arrays.__getitem__,
                None,
                self._note_progress,
            )
            for file, arrays in contents.items()
        }

    def _note_progress(self) -> None:
        self._progress += 1


def _info(array: np.ndarray) -> TensorInfo:
    return to_json(array, whole(array.shape))["dtype"], array.shape


def _make(temporary: Path) -> dict[str, Any]:
    """Make the temporary folder; return {"error": why it failed, "space": see ``shared_folders.disk_space``}."""
    space: dict[str, Any] = {}

    def make() -> None:
        safe_files.delete_folder(temporary)
        temporary.mkdir(parents=True)
        space.update(shared_folders.disk_space(temporary))

    error = shared_folders.attempt(make)
    return {"error": error, "space": space or None}


def _raise_first(results: Sequence[Mapping[str, Any]], verb: str, path: Path) -> None:
    for rank, result in enumerate(results):
        if result["error"]:
            raise RankError(
                f"rank {rank} could not {verb} the checkpoint {path}: {result['error']}. Earlier checkpoints are "
                "unchanged; free space or repair the folder and resume with --checkpoint.resume auto."
            )


def _no_space(rank: int, need: int, free: int, folder: Path) -> str:
    return (
        f"the checkpoint needs {need / 1e6:,.1f} MB, and {folder} has {free / 1e6:,.1f} MB free on the node of rank "
        f"{rank}: nothing was written, earlier checkpoints are unchanged; free space or keep fewer "
        "(--checkpoint.keep) and resume with --checkpoint.resume auto."
    )
