"""Saving goes on behind training, one checkpoint at a time, and what goes wrong is told and damages nothing older."""

from __future__ import annotations

import json
import os
import re
import resource
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_checkpoint import STATE, WANTED, Ranks, cut, rows

from hvdlm.checkpoints import load, retention, save, shared_folders
from hvdlm.checkpoints.save import Saver
from hvdlm.checkpoints.shared_folders import Sharing, meet, too_little
from hvdlm.config import CheckpointConfig
from hvdlm.errors import RankError
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm_backends.local import LocalWorld


def saver(folder: Path, **options: Any) -> Saver:
    return Saver(folder, LocalWorld(), CheckpointConfig(**options))


def save(folder: Path, step: int, loss: float | None = None, **options: Any) -> Path:
    meta = {} if loss is None else {"metrics": {"val_loss": loss}}
    (saved,) = saver(folder, asynchronous=False, **options).start(step, STATE, meta)
    return saved.path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def assert_whole(path: Path) -> None:
    loaded = load.load(load.open_checkpoint(path), WANTED, 0, 1)
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array)


class Gate:
    """A disk that takes nothing until it is opened. ``failing``: the file that it then refuses, and how."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: str = "", error: Exception | None = None) -> None:
        self.opened, self._real, self._failing, self._error = threading.Event(), save.write_tensors, failing, error
        patch.setattr(save, "write_tensors", self._write)

    def _write(self, path: Path, *arguments: Any) -> Any:
        assert self.opened.wait(20)
        if self._error and path.name == self._failing:
            raise self._error
        return self._real(path, *arguments)


def full(path: str) -> OSError:
    return OSError(28, "No space left on device", path)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, own = Gate(monkeypatch), saver(tmp_path)
    assert own.start(5, STATE, {}) == [] and own.active and not own.ready()
    assert names(tmp_path) == [".step-00000005.partial"]
    gate.opened.set()
    (saved,) = own.finish()
    assert not own.active and own.ready() and own.finish() == []
    assert (saved.step, saved.path) == (5, tmp_path / "step-00000005") and saved.seconds >= saved.blocked_seconds > 0
    assert names(tmp_path) == ["latest", "step-00000005"]
    assert_whole(saved.path)


def test_a_save_goes_on_in_steps_and_is_told_when_it_is_whole(tmp_path: Path) -> None:
    own = saver(tmp_path)
    own.start(5, STATE, {})
    told = []
    while own.active:
        while not own.ready():
            pass
        told.append([saved.step for saved in own.advance()])
    assert told == [[], [5], []]  # written, published, tidied up
    assert own.advance() == []


def test_a_save_waits_for_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, own = Gate(monkeypatch), saver(tmp_path)
    own.start(5, STATE, {})
    threading.Timer(0.1, gate.opened.set).start()
    assert [saved.step for saved in own.start(6, STATE, {})] == [5]
    assert own.active
    assert [saved.step for saved in own.finish()] == [6]
    assert names(tmp_path) == ["latest", "step-00000005", "step-00000006"]
    assert (tmp_path / "latest").read_text() == "step-00000006"


def test_standing_still_counts_from_before_the_copy_and_the_wait_for_an_earlier_save_belongs_to_that(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, own = Gate(monkeypatch), saver(tmp_path)
    began = time.perf_counter() - 10
    own.start(5, STATE, {}, began=began)
    threading.Timer(0.3, gate.opened.set).start()
    (first,) = own.start(6, STATE, {}, began=time.perf_counter())
    (second,) = own.finish()
    assert first.blocked_seconds > 10.2 and first.seconds > 10.2
    assert second.blocked_seconds < 0.25


def four_ways(arrays: dict[str, np.ndarray]) -> list[dict[str, Shard]]:
    """Return the pieces of four ranks: parameters cut in two (two ranks hold each half), the optimizer in four."""
    halves = [rows((8, 6), 4 * (rank // 2), 4 * (rank // 2) + 4) for rank in range(4)]
    quarters = [Shard((8, 6), (0, 0), (8, 6), (12 * rank, 12 * rank + 12)) for rank in range(4)]
    return [{"parameters/w": a, "optimizer/m/w": b} for a, b in zip(halves, quarters, strict=True)]


ARRAYS = {"parameters/w": np.arange(48.0).reshape(8, 6), "optimizer/m/w": np.ones((8, 6), np.float32)}


def save_as(world: Any, folder: Path, step: int = 5, **options: Any) -> Saver:
    """Begin to save this rank's part of ``ARRAYS``."""
    shards = four_ways(ARRAYS)[world.rank]
    own = Saver(folder, world, CheckpointConfig(**options))
    own.start(step, {name: cut(ARRAYS[name], shard) for name, shard in shards.items()}, {"rank": world.rank}, shards)
    return own


def payload(path: Path) -> int:
    """Return the bytes of the numbers in a safetensors file."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_four_ranks_write_each_byte_once(tmp_path: Path) -> None:
    Ranks(4).run(lambda world: save_as(world, tmp_path).finish())
    files = list((tmp_path / "step-00000005").glob("*.safetensors"))
    assert len(files) == 6 and not list(tmp_path.glob(".*"))
    assert sum(payload(path) for path in files) == sum(array.nbytes for array in ARRAYS.values())
    found = load.open_checkpoint(tmp_path / "step-00000005")
    for name, array in ARRAYS.items():
        np.testing.assert_array_equal(found.reader().shard(name, whole(array.shape)), array)


@pytest.mark.parametrize(
    "failing, said",
    [
        ("model-0002.safetensors", "rank 2 could not write .*No space left on device"),
        ("optimizer-0003.safetensors", "rank 3 could not write .*No space left on device"),
        ("manifest.json", "rank 0 could not publish .*No space left on device"),
        ("rename", "rank 0 could not publish .*No space left on device"),
    ],
)
def test_what_fails_on_one_rank_is_told_on_all_and_damages_nothing(
    tmp_path: Path, failing: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Ranks(4).run(lambda world: save_as(world, tmp_path).finish())
    before = {path: path.read_bytes() for path in (tmp_path / "step-00000005").iterdir()}
    Gate(monkeypatch, failing, full(failing)).opened.set()

    def write(path: Path, data: bytes, real: Callable[..., Any] = retention.write_synced) -> None:
        if path.name == failing:
            raise full(failing)
        real(path, data)

    def rename(old: Path, new: Path, real: Callable[..., Any] = os.rename) -> None:
        if failing == "rename" and Path(old).name.endswith(".partial"):
            raise full(failing)
        real(old, new)

    monkeypatch.setattr(retention, "write_synced", write)
    monkeypatch.setattr(os, "rename", rename)
    for step in (5, 6):  # in place of an older one, and as a new one
        errors = Ranks(4).run(lambda world, step=step: save_as(world, tmp_path, step).finish())
        assert all(isinstance(error, RankError) for error in errors) and len({str(error) for error in errors}) == 1
        assert re.search(said + ".*Earlier checkpoints are untouched", str(errors[0]))
        assert names(tmp_path) == ["latest", "step-00000005"]
        assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000005").iterdir()}


def test_an_error_nobody_thought_of_is_told_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch, "model.safetensors", MemoryError("no more")).opened.set()
    with pytest.raises(RankError, match=r"rank 0 could not write .*MemoryError: no more"):
        saver(tmp_path, asynchronous=False).start(5, STATE, {})
    assert names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True)
    if done.returncode:
        pytest.skip("only root can mount a small file system: RLIMIT_FSIZE stands for it in another test")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


LARGE = {"parameters/w": np.ones(150_000, np.float32)}


def test_a_disk_that_lacks_space_is_told_before_anything_is_written(small_disk: Path) -> None:
    before = save(small_disk, 4)
    own = saver(small_disk)
    own.start(5, LARGE, {})
    own.finish()
    with pytest.raises(RankError, match=r"needs 0\.6 MB, and .* has 0\.\d MB free where rank 0 is: nothing was wri"):
        own.start(6, LARGE, {})
    assert not own.active and names(small_disk) == ["latest", "step-00000004", "step-00000005"]
    assert_whole(before)
    shutil.rmtree(small_disk / "step-00000005")
    own.start(6, LARGE, {})
    assert [saved.step for saved in own.finish()] == [6]


def test_a_disk_that_becomes_full_meanwhile_leaves_what_is_older(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = save(small_disk, 4)
    (small_disk / "others").write_bytes(bytes(500_000))
    monkeypatch.setattr(shared_folders, "room", lambda folder: {"host": "", "device": 1, "free": 10**9})
    own = saver(small_disk)
    own.start(5, LARGE, {})
    with pytest.raises(RankError, match=r"rank 0 could not write .*No space left on device.*are untouched"):
        own.finish()
    assert names(small_disk) == ["latest", "others", "step-00000004"]
    assert_whole(before)


def test_a_file_that_grows_too_large_leaves_what_is_older(tmp_path: Path) -> None:
    before = save(tmp_path, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(RankError, match=r"rank 0 could not write .*File too large"):
            saver(tmp_path, asynchronous=False).start(5, LARGE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == ["latest", "step-00000004"]
    assert_whole(before)


def test_a_read_only_folder_is_told(small_disk: Path) -> None:
    before = save(small_disk, 4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    errors = Ranks(2).run(lambda world: save_as(world, small_disk, asynchronous=False))
    assert len({str(error) for error in errors}) == 1
    assert "rank 0 could not make the checkpoint" in str(errors[1]) and "Read-only file system" in str(errors[1])
    assert Ranks(3).run(lambda world: meet(small_disk, world))[2] == Sharing(
        2, (0, 0, 0)
    )  # where no marker can be left
    assert_whole(before)


def test_a_folder_that_is_removed_meanwhile_is_told_and_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, own = Gate(monkeypatch), saver(tmp_path / "run" / "checkpoints")
    own.start(5, STATE, {})
    shutil.rmtree(tmp_path / "run")
    gate.opened.set()
    with pytest.raises(RankError, match=r"rank 0 could not write .*No such file or directory"):
        own.finish()
    own.start(6, STATE, {})
    assert_whole(own.finish()[0].path)


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, float("nan"), None, 2.0, 1.0, 4.0, 5.0], 1):
        save(tmp_path, step, loss, keep=2, keep_best=2)
    assert [step for step, _ in retention.steps(tmp_path)] == [8, 7, 6, 2]
    save(tmp_path, 9, keep=1)
    assert [step for step, _ in retention.steps(tmp_path)] == [9]


def test_damaged_ones_count_as_none_and_those_of_later_steps_stay(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step, keep=9)
    for step in (2, 3):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000004" / "manifest.json").write_text('{"metrics": {"val_loss": 0}}')
    retention.tidy(tmp_path, 4, 2, 2)
    assert [step for step, _ in retention.steps(tmp_path)] == [9, 1]
    save(tmp_path, 2, keep=1)  # the run went back and goes on
    assert [step for step, _ in retention.steps(tmp_path)] == [9, 2]


def test_where_none_is_whole_none_is_deleted(tmp_path: Path) -> None:
    for path in [save(tmp_path, step) for step in (1, 2)]:
        (path / "model.safetensors").unlink()
    retention.tidy(tmp_path, 2, 1, 0)
    assert [step for step, _ in retention.steps(tmp_path)] == [2, 1]


def test_a_checkpoint_is_there_all_the_time_while_it_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(tmp_path, 5)
    moments: list[list[str]] = []

    def rename(old: Path, new: Path, real: Callable[..., Any] = os.rename) -> None:
        real(old, new)
        moments.append([path.name for path in tmp_path.glob("*step-*") if (path / "manifest.json").is_file()])

    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 5)
    assert len(moments) == 2 and ".step-00000005.replaced" in moments[0] and "step-00000005" in moments[1]
    assert names(tmp_path) == ["latest", "step-00000005"]


def test_what_a_killed_run_left_is_put_in_order(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, keep=9) for step in (5, 6, 7)]
    shutil.copytree(paths[1], tmp_path / ".step-00000006.replaced")
    os.rename(paths[0], tmp_path / ".step-00000005.replaced")
    os.rename(paths[2], tmp_path / ".step-00000007.partial")
    for name in (".rank-0000-12ab", ".latest.partial", ".mine"):
        (tmp_path / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(tmp_path / "step-00000006", outside)
    (tmp_path / ".step-00000008.replaced").symlink_to(outside)
    retention.sweep(tmp_path)
    assert names(tmp_path) == [".mine", "latest", "step-00000005", "step-00000006"]
    assert_whole(tmp_path / "step-00000005")
    assert_whole(outside)


def nodes(folder: Path, ranks: int) -> Callable[[Any], Path]:
    """Return which folder a rank has where ``ranks`` of them share one."""
    return lambda world: folder / f"node{world.rank // ranks}" / "checkpoints"


def test_ranks_find_out_who_shares_a_folder(tmp_path: Path) -> None:
    place = nodes(tmp_path, 2)
    found = Ranks(4).run(lambda world: meet(place(world), world))
    assert found == [Sharing(rank, (0, 0, 2, 2)) for rank in range(4)]
    assert [one.leads for one in found] == [True, False, True, False] and found[3].mates == (2, 3)
    assert {one.everywhere for one in found} == {False}
    assert Ranks(3).run(lambda world: meet(tmp_path, world))[2] == Sharing(2, (0, 0, 0))
    assert not list(tmp_path.rglob(".rank*"))


def test_every_node_gets_what_its_ranks_write_and_the_manifest(tmp_path: Path) -> None:
    place = nodes(tmp_path, 2)
    for step in (5, 6, 7):
        Ranks(4).run(lambda world, step=step: save_as(world, place(world), step, keep=2).finish())
    found = [tmp_path / f"node{number}" / "checkpoints" for number in (0, 1)]
    assert names(found[0]) == names(found[1]) == ["latest", "step-00000006", "step-00000007"]
    first, second = (folder / "step-00000007" for folder in found)
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    shared = {"manifest.json"}
    assert {*names(first)} - shared == {"model-0000.safetensors", *(f"optimizer-000{r}.safetensors" for r in (0, 1))}
    assert {*names(second)} - shared == {"model-0002.safetensors", *(f"optimizer-000{r}.safetensors" for r in (2, 3))}
    manifest = json.loads((first / "manifest.json").read_text())
    assert {*manifest["files"]} == {*names(first), *names(second)} - shared


def test_what_one_node_could_not_publish_no_node_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = nodes(tmp_path, 2)
    Ranks(4).run(lambda world: save_as(world, place(world)).finish())

    def publish(folder: Path, *arguments: Any, real: Callable[..., Any] = retention.publish) -> None:
        if "node1" in str(folder):
            raise full("manifest.json")
        real(folder, *arguments)

    monkeypatch.setattr(retention, "publish", publish)
    for step in (5, 6):
        errors = Ranks(4).run(lambda world, step=step: save_as(world, place(world), step).finish())
        assert all("rank 2 could not publish" in str(error) for error in errors)
        for number in (0, 1):
            folder = tmp_path / f"node{number}" / "checkpoints"
            assert names(folder) == ["latest", "step-00000005"]
            assert (folder / "step-00000005" / "manifest.json").is_file()


def test_space_is_added_up_over_those_who_share_a_disk() -> None:
    alone, apart = Sharing(0, (0, 0, 0, 0)), Sharing(0, (0, 0, 2, 2))
    one, two = {"host": "a", "device": 1, "free": 100}, {"host": "b", "device": 1, "free": 100}
    assert too_little(alone, [25, 25, 25, 25], [one, None, None, None]) is None
    assert too_little(alone, [25, 25, 25, 26], [one, None, None, None]) == (0, 101, 100)
    assert too_little(apart, [60, 40, 60, 40], [one, None, two, None]) is None
    assert too_little(apart, [60, 40, 60, 41], [one, None, two, None]) == (2, 101, 100)
    assert too_little(apart, [60, 0, 41, 0], [one, None, one | {"free": 120}, None]) == (0, 101, 100)
    assert too_little(alone, [500, 0, 0, 0], [one | {"free": None}, None, None, None]) is None


def test_what_is_deleted_is_called_a_checkpoint_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a deletion leaves no damaged checkpoint, and the next run deletes the rest."""
    for step in (1, 2):
        (tmp_path / retention.name_of(step)).mkdir()
    monkeypatch.setattr(retention.shutil, "rmtree", lambda path, ignore_errors: None)
    retention._drop(tmp_path / retention.name_of(1))
    monkeypatch.undo()
    assert [step for step, _ in retention.steps(tmp_path)] == [2]
    assert (tmp_path / ".step-00000001.deleted").is_dir()
    retention.sweep(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
