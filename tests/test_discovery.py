"""All ranks resume from the same checkpoint: the newest complete one, wherever its files are."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import (
    SHARDED_STATE,
    ThreadRanks,
    edit_json,
    file_names,
    flip_last_bit,
    four_rank_shards,
    node_folders,
    start_save,
    take_shard,
)
from hvdlm.checkpoints import agreement, discovery, load, shards
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import whole
from hvdlm_backends.local import LocalWorld

Damage = Callable[[Path], Any]


def write_run(run: Path, steps: tuple[int, ...] = (5, 6, 7)) -> Path:
    """Write a run of four ranks that share a folder; return its checkpoints' folder."""
    for step in steps:
        ThreadRanks(4).run(lambda world, step=step: start_save(world, run / "checkpoints", step, keep=9).finish())
    return run / "checkpoints"


def chosen(run: Path, which: str = "auto", ranks: int = 3) -> Any:
    """Return what all of some ranks choose: the step, or the error's sentence."""

    def action(world: Any) -> int | None:
        selected = agreement.choose(run, which, world)
        return selected and selected.step

    results = {str(a) if isinstance(a, HvdlmError) else a for a in ThreadRanks(ranks).run(action)}
    assert len(results) == 1
    return results.pop()


def swap(path: Path) -> None:
    """Two ranks' files, of the same size, take each other's place."""
    one, other = path / "model-0000.safetensors", path / "model-0002.safetensors"
    os.rename(one, path / "aside")
    os.rename(other, one)
    os.rename(path / "aside", other)


FILE_ENTRY = {"bytes": 1, "sha256": "0" * 64}


def linked(name: str) -> Damage:
    """Return a damage: ``name`` ("": the folder) is moved out of the run, a symbolic link left in its place."""

    def action(path: Path) -> None:
        outside = path.parent.parent / "outside"
        shutil.move(path / name, outside)
        (path / name).symlink_to(outside)

    return action


def no_file(path: Path) -> None:
    (path / "model-0002.safetensors").unlink()
    os.mkfifo(path / "model-0002.safetensors")


DAMAGES: dict[str, tuple[Damage, str]] = {
    "flipped": (
        lambda path: flip_last_bit(path / "model-0000.safetensors"),
        "model-0000.safetensors has another SHA-256",
    ),
    "swapped": (swap, "model-0000.safetensors has another SHA-256"),
    "truncated": (lambda path: os.truncate(path / "optimizer-0001.safetensors", 100), "doesn't have the"),
    "missing": (lambda path: (path / "optimizer-0001.safetensors").unlink(), "optimizer-0001.safetensors is missing"),
    "manifest gone": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 1000), "checkpoint .* is damaged"),
    "empty": (lambda path: (shutil.rmtree(path), path.mkdir()), "it has no manifest.json"),
    "path": (
        lambda path: edit_json(path / "manifest.json", lambda m: m["files"].update({"../x": FILE_ENTRY})),
        "names a file",
    ),
    "folder linked": (linked(""), "is a symbolic link that leads out"),
    "manifest linked": (linked("manifest.json"), "is a symbolic link that leads out"),
    "shard linked": (linked("model-0000.safetensors"), "is a symbolic link that leads out"),
    "no file": (no_file, "not a regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_named_and_skipped(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (action, expected) = write_run(tmp_path), DAMAGES[damage]
    action(folder / "step-00000007")
    assert chosen(tmp_path) == 6
    warning = capsys.readouterr().err
    assert warning.startswith(f"hvdlm: checkpoint {folder / 'step-00000007'} is damaged (") and warning.count("\n") == 1
    assert warning.endswith("): it is skipped\n") and re.search(expected, warning), warning
    refused = chosen(tmp_path, str(folder / "step-00000007"))
    assert (
        "Resume from another one." in refused or "is no hvdlm checkpoint" in refused
    ) and capsys.readouterr().err == ""
    for step in (5, 6):
        flip_last_bit(folder / f"step-{step:08d}" / "model-0002.safetensors")
    assert f"{folder} holds damaged checkpoints only" in chosen(tmp_path)


def test_a_partial_checkpoint_is_never_used(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    os.rename(folder / "step-00000007", folder / ".step-00000007.partial")
    assert chosen(tmp_path) == 6
    assert file_names(folder) == ["latest", "step-00000005", "step-00000006"]


def test_a_checkpoint_set_aside_by_a_killed_run_is_restored(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    os.rename(folder / "step-00000007", folder / ".step-00000007.replaced")
    assert chosen(tmp_path) == 7 and "step-00000007" in file_names(folder)


def test_auto_without_checkpoints_starts_from_scratch(tmp_path: Path) -> None:
    assert chosen(tmp_path, "none") is chosen(tmp_path) is None
    assert f"{tmp_path}/x is no hvdlm checkpoint" in chosen(tmp_path, f"{tmp_path}/x")
    (tmp_path / "checkpoints").mkdir()
    assert chosen(tmp_path) is None
    assert f"{tmp_path} holds no checkpoint yet" in chosen(tmp_path, str(tmp_path))


def test_another_run_is_not_modified(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "other")
    shutil.copytree(folder / "step-00000005", folder / ".step-00000008.partial")
    before = file_names(folder)
    assert chosen(tmp_path / "run", str(tmp_path / "other")) == 7
    assert chosen(tmp_path / "run", str(folder / "step-00000005")) == 5
    assert file_names(folder) == before and not (tmp_path / "run").exists()


def test_every_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path) / "step-00000007"
    hashed: list[str] = []
    real = agreement.sha256
    monkeypatch.setattr(agreement, "sha256", lambda path: hashed.append(path.name) or real(path))
    monkeypatch.setattr(shards, "sha256", lambda path: hashed.append(path.name) or real(path))
    wanted = {name: whole(array.shape) for name, array in SHARDED_STATE.items()}

    def action(world: Any) -> None:
        loaded = load.read_state(agreement.choose(tmp_path, str(path), world), wanted, world.rank, world.size)
        for name, array in SHARDED_STATE.items():
            np.testing.assert_array_equal(loaded[name], array)

    ThreadRanks(4).run(action)
    assert sorted(hashed) == file_names(path)


def write_nodes(folder: Path, ranks: int = 2) -> list[Path]:
    """Write a run of four ranks, ``ranks`` to a node, each node with a folder of its own; return these."""
    folder_of = node_folders(folder, ranks)
    for step in (5, 6):
        ThreadRanks(4).run(lambda world, step=step: start_save(world, folder_of(world), step).finish())
    return [folder / f"node{number}" / "checkpoints" for number in range(4 // ranks)]


def resume_ranks(folder: Path, ranks: int, size: int = 4, which: str = "auto") -> list[Any]:
    """Choose and load on ``size`` ranks, ``ranks`` to a node; return every rank's step, or error."""

    def action(world: Any) -> int:
        run = node_folders(folder, ranks)(world).parent
        selected = agreement.choose(run, which.format(run=run), world)
        assert selected is not None
        wanted = four_rank_shards()[world.rank % 4]
        loaded = load.read_state(selected, wanted, world.rank, world.size)
        for name, shard in wanted.items():
            np.testing.assert_array_equal(loaded[name], take_shard(SHARDED_STATE[name], shard))
        return selected.step

    return ThreadRanks(size).run(action)


@pytest.mark.parametrize("ranks, size", [(2, 4), (1, 4), (2, 8), (4, 4), (1, 1)])
def test_missing_files_are_copied_from_other_nodes(
    tmp_path: Path, ranks: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on more nodes than before, new ones among them; not on fewer, where what went with a node is lost."""
    monkeypatch.setattr(agreement, "_CHUNK", 100)
    folders = write_nodes(tmp_path, ranks if size > 1 else 4)
    assert resume_ranks(tmp_path, ranks, size) == [6] * size
    paths = [tmp_path / f"node{number}" / "checkpoints" / "step-00000006" for number in range(size // ranks)]
    contents = [{file.name: file.read_bytes() for file in path.iterdir()} for path in paths]
    assert all(content == contents[0] for content in contents) and len(contents[0]) == 7
    assert len(folders) == 4 // (ranks if size > 1 else 4)
    assert resume_ranks(tmp_path, ranks, size, "{run}/checkpoints/step-00000006") == [6] * size
    assert not list(tmp_path.rglob("**/.*"))


def test_a_damaged_copy_is_replaced_from_another_node(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    resume_ranks(tmp_path, 2)
    for path in (one / "step-00000006" / "model-0000.safetensors", two / "step-00000006" / "model-0002.safetensors"):
        flip_last_bit(path)
    (two / "step-00000006" / "manifest.json").write_text("{")
    assert resume_ranks(tmp_path, 2) == [6] * 4
    assert discovery.find(one.parent, "auto").step == discovery.find(two.parent, "auto").step == 6


def test_a_checkpoint_damaged_on_every_node_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_nodes(tmp_path)
    flip_last_bit(two / "step-00000006" / "model-0002.safetensors")
    assert resume_ranks(tmp_path, 2) == [5] * 4
    assert "is damaged (model-0002.safetensors has another SHA-256): it is skipped" in capsys.readouterr().err
    for folder in (one, two):  # both have all of it by now
        (folder / "step-00000005" / "optimizer-0001.safetensors").unlink()
    assert all("holds damaged checkpoints only" in str(error) for error in resume_ranks(tmp_path, 2))


def test_a_node_that_cannot_store_a_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nodes(tmp_path)
    real = agreement._Copy.add

    def add(copy: Any, data: bytes) -> None:
        if "node1" in str(copy._path):
            copy._error = "No space left on device"
        real(copy, data)

    monkeypatch.setattr(agreement._Copy, "add", add)
    errors = {str(error) for error in resume_ranks(tmp_path, 2)}
    assert all("rank 2 could not copy what its node lacks of checkpoint" in error for error in errors)
    assert not list(tmp_path.rglob("**/.*"))


def test_a_checkpoint_published_on_one_node_only_is_used(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    os.rename(two / "step-00000006", two / ".step-00000006.partial")
    (two / ".step-00000006.partial" / "manifest.json").unlink()
    os.rename(one / "step-00000005", one / ".step-00000005.partial")
    os.rename(two / "step-00000005", two / ".step-00000005.partial")
    assert resume_ranks(tmp_path, 2) == [6] * 4
    assert file_names(one) == file_names(two) == ["latest", "step-00000006"]


def test_links_out_of_the_folder_are_not_written_through(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    shutil.move(two / "step-00000006", tmp_path / "outside")
    (two / "step-00000006").symlink_to(tmp_path / "outside")
    before = file_names(tmp_path / "outside")
    assert resume_ranks(tmp_path, 2) == [5] * 4 and file_names(tmp_path / "outside") == before
    shutil.rmtree(two / "step-00000005")
    shutil.copytree(one / "step-00000005", tmp_path / "outside2")
    (two / "step-00000005").symlink_to(tmp_path / "outside2")
    (tmp_path / "outside2" / "manifest.json").unlink()
    assert all("is a symbolic link" in str(error) for error in resume_ranks(tmp_path, 2))
    assert not (tmp_path / "outside2" / "manifest.json").exists()


def test_a_pipe_in_place_of_a_file_blocks_no_node(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    resume_ranks(tmp_path, 2)
    no_file(two / "step-00000006")
    assert resume_ranks(tmp_path, 2) == [6] * 4 and (two / "step-00000006" / "model-0002.safetensors").is_file()
    assert one.is_dir()


def test_a_single_process_finds_the_newest_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    assert json.loads((folder / "step-00000007" / "manifest.json").read_text())["step"] == 7
    selected = agreement.choose(tmp_path, "auto", LocalWorld())
    assert selected is not None and selected.step == 7 and selected.verified
