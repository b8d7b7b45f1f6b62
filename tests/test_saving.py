"""Checkpoints are written while training continues, one at a time; failed saves are reported and harm no older one."""

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

from builders import (
    SHARDED_STATE,
    STATE,
    STATE_SHARDS,
    ThreadRanks,
    file_names,
    node_folders,
    start_save,
)
from hvdlm.checkpoints import discovery, load, retention, safetensors_io, shared_folders
from hvdlm.checkpoints import save as save_module
from hvdlm.checkpoints.order import step_name
from hvdlm.checkpoints.save import Saver
from hvdlm.checkpoints.shared_folders import Sharing, insufficient_space, meet
from hvdlm.config import CheckpointConfig
from hvdlm.errors import RankError
from hvdlm.parallel.flat_layout import whole
from hvdlm_backends.local import LocalWorld
from launching import wait_until


def make_saver(folder: Path, **options: Any) -> Saver:
    return Saver(folder, LocalWorld(), CheckpointConfig(**options))


def save(folder: Path, step: int, loss: float | None = None, **options: Any) -> Path:
    meta = {} if loss is None else {"metrics": {"val_loss": loss}}
    (saved,) = make_saver(folder, asynchronous=False, **options).start(step, STATE, meta)
    return saved.path


def assert_whole(path: Path) -> None:
    loaded = load.read_state(load.open_checkpoint(path), STATE_SHARDS, 0, 1)
    for name, array in STATE.items():
        np.testing.assert_array_equal(loaded[name], array)


class Gate:
    """A disk whose writes wait until ``opened`` is set; writing the file ``failing`` then raises ``error``."""

    def __init__(self, patch: pytest.MonkeyPatch, failing: str = "", error: Exception | None = None) -> None:
        self.opened, self._real, self._failing, self._error = (
            threading.Event(),
            save_module.write_tensors,
            failing,
            error,
        )
        patch.setattr(save_module, "write_tensors", self._write)

    def _write(self, path: Path, *arguments: Any) -> Any:
        assert self.opened.wait(20)
        if self._error and path.name == self._failing:
            raise self._error
        return self._real(path, *arguments)


def full(path: str) -> OSError:
    return OSError(28, "No space left on device", path)


def test_training_continues_while_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), make_saver(tmp_path)
    assert saver.start(5, STATE, {}) == [] and saver.active and not saver.ready()
    assert file_names(tmp_path) == [".step-00000005.partial"]
    gate.opened.set()
    (saved,) = saver.finish()
    assert not saver.active and saver.ready() and saver.finish() == []
    assert (saved.step, saved.path) == (5, tmp_path / "step-00000005") and saved.seconds >= saved.blocked_seconds > 0
    assert file_names(tmp_path) == ["latest", "step-00000005"]
    assert_whole(saved.path)


def test_a_save_proceeds_in_phases_and_is_reported_once(tmp_path: Path) -> None:
    saver = make_saver(tmp_path)
    saver.start(5, STATE, {})
    saved_steps = []
    while saver.active:
        wait_until(saver.ready, 20)
        saved_steps.append([saved.step for saved in saver.advance()])
    assert saved_steps == [[], [5], []]  # written, published, tidied up
    assert saver.advance() == []


def test_a_write_that_never_returns_is_an_error_of_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "_TURN_SECONDS", 0.1)
    opened, real = threading.Event(), save_module.write_tensors

    def write(path: Path, *arguments: Any) -> Any:
        if path.name.endswith("-0002.safetensors"):
            opened.wait(20)
        return real(path, *arguments)

    monkeypatch.setattr(save_module, "write_tensors", write)
    errors = ThreadRanks(4).run(lambda world: start_save(world, tmp_path, limit=0.5).finish())
    opened.set()
    assert len({str(error) for error in errors}) == 1 and isinstance(errors[0], RankError), errors
    assert re.search(r"rank 2 has been writing the checkpoint of step 5 .* without progress", str(errors[0]))


def test_a_slow_write_that_makes_progress_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(save_module, "_TURN_SECONDS", 0.1)
    monkeypatch.setattr(safetensors_io, "_CHUNK", 8)
    synced = []
    monkeypatch.setattr(safetensors_io, "_SYNC_BYTES", 64)
    monkeypatch.setattr(safetensors_io, "sync", lambda file: (time.sleep(0.2), synced.append(file.tell())))
    saver = Saver(tmp_path, LocalWorld(), CheckpointConfig(), limit=0.5)
    saver.start(5, {"parameters/w": np.arange(100.0)}, {})
    began = time.monotonic()
    assert [saved.step for saved in saver.finish()] == [5]
    assert time.monotonic() - began > 1 and len(synced) > 5


def test_a_save_waits_for_the_previous_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), make_saver(tmp_path)
    saver.start(5, STATE, {})
    threading.Timer(0.1, gate.opened.set).start()
    assert [saved.step for saved in saver.start(6, STATE, {})] == [5]
    assert saver.active
    assert [saved.step for saved in saver.finish()] == [6]
    assert file_names(tmp_path) == ["latest", "step-00000005", "step-00000006"]
    assert (tmp_path / "latest").read_text() == "step-00000006"


def test_blocked_time_is_charged_to_the_save_that_causes_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), make_saver(tmp_path)
    began = time.perf_counter() - 10
    saver.start(5, STATE, {}, began=began)
    threading.Timer(0.3, gate.opened.set).start()
    (first,) = saver.start(6, STATE, {}, began=time.perf_counter())
    (second,) = saver.finish()
    assert first.blocked_seconds > 10.2 and first.seconds > 10.2
    assert second.blocked_seconds < 0.25


def payload(path: Path) -> int:
    """Return the bytes of the tensors in a safetensors file."""
    with path.open("rb") as file:
        return path.stat().st_size - 8 - int.from_bytes(file.read(8), "little")


def test_four_ranks_write_each_byte_once(tmp_path: Path) -> None:
    ThreadRanks(4).run(lambda world: start_save(world, tmp_path).finish())
    files = list((tmp_path / "step-00000005").glob("*.safetensors"))
    assert len(files) == 6 and not list(tmp_path.glob(".*"))
    assert sum(payload(path) for path in files) == sum(array.nbytes for array in SHARDED_STATE.values())
    opened = load.open_checkpoint(tmp_path / "step-00000005")
    for name, array in SHARDED_STATE.items():
        np.testing.assert_array_equal(opened.reader().read(name, whole(array.shape)), array)


@pytest.mark.parametrize(
    "failing, expected",
    [
        ("model-0002.safetensors", "rank 2 could not write .*No space left on device"),
        ("optimizer-0003.safetensors", "rank 3 could not write .*No space left on device"),
        ("manifest.json", "rank 0 could not publish .*No space left on device"),
        ("rename", "rank 0 could not publish .*No space left on device"),
    ],
)
def test_a_failed_save_is_reported_on_all_ranks(
    tmp_path: Path, failing: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ThreadRanks(4).run(lambda world: start_save(world, tmp_path).finish())
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
        errors = ThreadRanks(4).run(lambda world, step=step: start_save(world, tmp_path, step).finish())
        assert all(isinstance(error, RankError) for error in errors) and len({str(error) for error in errors}) == 1
        assert re.search(expected + ".*Earlier checkpoints are unchanged", str(errors[0]))
        assert file_names(tmp_path) == ["latest", "step-00000005"]
        assert before == {path: path.read_bytes() for path in (tmp_path / "step-00000005").iterdir()}


def test_an_unexpected_error_is_reported_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Gate(monkeypatch, "model.safetensors", MemoryError("no more")).opened.set()
    with pytest.raises(RankError, match=r"rank 0 could not write .*MemoryError: no more"):
        make_saver(tmp_path, asynchronous=False).start(5, STATE, {})
    assert file_names(tmp_path) == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)], capture_output=True, timeout=60
    )
    if done.returncode:
        pytest.skip("only root can mount a small file system: another test limits the file size instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


LARGE = {"parameters/w": np.ones(150_000, np.float32)}


def test_missing_disk_space_is_reported_before_writing(small_disk: Path) -> None:
    before = save(small_disk, 4)
    saver = make_saver(small_disk)
    saver.start(5, LARGE, {})
    saver.finish()
    with pytest.raises(RankError, match=r"needs 0\.6 MB, and .* has 0\.\d MB free on the node of rank 0: nothing "):
        saver.start(6, LARGE, {})
    assert not saver.active and file_names(small_disk) == ["latest", "step-00000004", "step-00000005"]
    assert_whole(before)
    shutil.rmtree(small_disk / "step-00000005")
    saver.start(6, LARGE, {})
    assert [saved.step for saved in saver.finish()] == [6]


def test_a_disk_full_during_a_save_keeps_older_checkpoints(small_disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = save(small_disk, 4)
    (small_disk / "others").write_bytes(bytes(500_000))
    monkeypatch.setattr(shared_folders, "disk_space", lambda folder: {"host": "", "device": 1, "free": 10**9})
    saver = make_saver(small_disk)
    saver.start(5, LARGE, {})
    with pytest.raises(RankError, match=r"rank 0 could not write .*No space left on device.*are unchanged"):
        saver.finish()
    assert file_names(small_disk) == ["latest", "others", "step-00000004"]
    assert_whole(before)


def test_a_file_size_limit_keeps_older_checkpoints(tmp_path: Path) -> None:
    before = save(tmp_path, 4)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(RankError, match=r"rank 0 could not write .*File too large"):
            make_saver(tmp_path, asynchronous=False).start(5, LARGE, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert file_names(tmp_path) == ["latest", "step-00000004"]
    assert_whole(before)


def test_a_read_only_folder_is_reported_on_all_ranks(small_disk: Path) -> None:
    before = save(small_disk, 4)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True, timeout=60)
    errors = ThreadRanks(2).run(lambda world: start_save(world, small_disk, asynchronous=False))
    assert len({str(error) for error in errors}) == 1
    assert "rank 0 could not make the checkpoint" in str(errors[1]) and "Read-only file system" in str(errors[1])
    assert ThreadRanks(3).run(lambda world: meet(small_disk, world))[2] == Sharing(
        2, (0, 0, 0)
    )  # no marker file can be written there
    assert_whole(before)


def test_a_folder_removed_during_a_save_is_recreated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, saver = Gate(monkeypatch), make_saver(tmp_path / "run" / "checkpoints")
    saver.start(5, STATE, {})
    shutil.rmtree(tmp_path / "run")
    gate.opened.set()
    with pytest.raises(RankError, match=r"rank 0 could not write .*No such file or directory"):
        saver.finish()
    saver.start(6, STATE, {})
    assert_whole(saver.finish()[0].path)


def test_the_last_and_the_best_checkpoints_are_kept(tmp_path: Path) -> None:
    for step, loss in enumerate([3.0, 1.0, float("nan"), None, 2.0, 1.0, 4.0, 5.0], 1):
        save(tmp_path, step, loss, keep=2, keep_best=2)
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [8, 7, 6, 2]
    save(tmp_path, 9, keep=1)
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [9]


def test_damaged_checkpoints_do_not_count_as_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4, 9):
        save(tmp_path, step, keep=9)
    for step in (2, 3):
        (tmp_path / f"step-{step:08d}" / "model.safetensors").write_bytes(b"")
    (tmp_path / "step-00000004" / "manifest.json").write_text('{"metrics": {"val_loss": 0}}')
    retention.delete_old(tmp_path, 4, 2, 2)
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [9, 1]
    save(tmp_path, 2, keep=1)  # the run was rolled back and continues
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [9, 2]


def test_without_a_complete_checkpoint_none_is_deleted(tmp_path: Path) -> None:
    for path in [save(tmp_path, step) for step in (1, 2)]:
        (path / "model.safetensors").unlink()
    retention.delete_old(tmp_path, 2, 1, 0)
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [2, 1]


def test_a_complete_copy_exists_while_a_checkpoint_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path, 5)
    moments: list[list[str]] = []

    def rename(old: Path, new: Path, real: Callable[..., Any] = os.rename) -> None:
        real(old, new)
        moments.append([path.name for path in tmp_path.glob("*step-*") if (path / "manifest.json").is_file()])

    monkeypatch.setattr(os, "rename", rename)
    save(tmp_path, 5)
    assert len(moments) == 2 and ".step-00000005.replaced" in moments[0] and "step-00000005" in moments[1]
    assert file_names(tmp_path) == ["latest", "step-00000005"]


def test_leftovers_of_a_killed_run_are_cleaned_up(tmp_path: Path) -> None:
    paths = [save(tmp_path, step, keep=9) for step in (5, 6, 7)]
    shutil.copytree(paths[1], tmp_path / ".step-00000006.replaced")
    os.rename(paths[0], tmp_path / ".step-00000005.replaced")
    os.rename(paths[2], tmp_path / ".step-00000007.partial")
    for name in (".rank-0000-12ab", ".latest.partial", ".mine"):
        (tmp_path / name).touch()
    outside = tmp_path.parent / f"{tmp_path.name}-outside"
    shutil.copytree(tmp_path / "step-00000006", outside)
    (tmp_path / ".step-00000008.replaced").symlink_to(outside)
    retention.clean_up(tmp_path)
    assert file_names(tmp_path) == [".mine", "latest", "step-00000005", "step-00000006"]
    assert_whole(tmp_path / "step-00000005")
    assert_whole(outside)


def test_ranks_detect_which_of_them_share_a_folder(tmp_path: Path) -> None:
    folder_of = node_folders(tmp_path, 2)
    sharing = ThreadRanks(4).run(lambda world: meet(folder_of(world), world))
    assert sharing == [Sharing(rank, (0, 0, 2, 2)) for rank in range(4)]
    assert [ranks.leads for ranks in sharing] == [True, False, True, False] and sharing[3].mates == (2, 3)
    assert {ranks.everywhere for ranks in sharing} == {False}
    assert ThreadRanks(3).run(lambda world: meet(tmp_path, world))[2] == Sharing(2, (0, 0, 0))
    assert not list(tmp_path.rglob(".rank*"))


def test_every_node_has_its_ranks_files_and_the_manifest(tmp_path: Path) -> None:
    folder_of = node_folders(tmp_path, 2)
    for step in (5, 6, 7):
        ThreadRanks(4).run(lambda world, step=step: start_save(world, folder_of(world), step, keep=2).finish())
    shared_folders = [tmp_path / f"node{number}" / "checkpoints" for number in (0, 1)]
    assert (
        file_names(shared_folders[0]) == file_names(shared_folders[1]) == ["latest", "step-00000006", "step-00000007"]
    )
    first, second = (folder / "step-00000007" for folder in shared_folders)
    assert (first / "manifest.json").read_bytes() == (second / "manifest.json").read_bytes()
    shared = {"manifest.json"}
    assert {*file_names(first)} - shared == {
        "model-0000.safetensors",
        *(f"optimizer-000{r}.safetensors" for r in (0, 1)),
    }
    assert {*file_names(second)} - shared == {
        "model-0002.safetensors",
        *(f"optimizer-000{r}.safetensors" for r in (2, 3)),
    }
    manifest = json.loads((first / "manifest.json").read_text())
    assert {*manifest["files"]} == {*file_names(first), *file_names(second)} - shared


def test_a_checkpoint_unpublished_on_one_node_is_kept_on_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder_of = node_folders(tmp_path, 2)
    ThreadRanks(4).run(lambda world: start_save(world, folder_of(world)).finish())

    def publish(folder: Path, *arguments: Any, real: Callable[..., Any] = retention.publish) -> None:
        if "node1" in str(folder):
            raise full("manifest.json")
        real(folder, *arguments)

    monkeypatch.setattr(retention, "publish", publish)
    for step in (5, 6):
        errors = ThreadRanks(4).run(lambda world, step=step: start_save(world, folder_of(world), step).finish())
        assert all("rank 2 could not publish" in str(error) for error in errors)
        for number in (0, 1):
            folder = tmp_path / f"node{number}" / "checkpoints"
            assert file_names(folder) == ["latest", "step-00000005"]
            assert (folder / "step-00000005" / "manifest.json").is_file()


def test_required_space_is_summed_per_shared_disk() -> None:
    one_folder, two_folders = Sharing(0, (0, 0, 0, 0)), Sharing(0, (0, 0, 2, 2))
    first, second = {"host": "a", "device": 1, "free": 100}, {"host": "b", "device": 1, "free": 100}
    assert insufficient_space(one_folder, [25, 25, 25, 25], [first, None, None, None]) is None
    assert insufficient_space(one_folder, [25, 25, 25, 26], [first, None, None, None]) == (0, 101, 100)
    assert insufficient_space(two_folders, [60, 40, 60, 40], [first, None, second, None]) is None
    assert insufficient_space(two_folders, [60, 40, 60, 41], [first, None, second, None]) == (2, 101, 100)
    assert insufficient_space(two_folders, [60, 0, 41, 0], [first, None, first | {"free": 120}, None]) == (0, 101, 100)
    assert insufficient_space(one_folder, [500, 0, 0, 0], [first | {"free": None}, None, None, None]) is None


def test_a_checkpoint_is_renamed_before_it_is_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill in the middle of a deletion leaves no damaged checkpoint, and the next run deletes the rest."""
    for step in (1, 2):
        (tmp_path / step_name(step)).mkdir()
    monkeypatch.setattr(retention, "delete_folder", lambda path: None)
    retention._delete_checkpoint(tmp_path / step_name(1))
    monkeypatch.undo()
    assert [step for step, _ in discovery.step_folders(tmp_path)] == [2]
    assert (tmp_path / ".step-00000001.deleted").is_dir()
    retention.clean_up(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000002"]
