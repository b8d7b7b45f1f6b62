"""All ranks go on from the same checkpoint: the newest whole one, wherever its files are."""

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
from test_checkpoint import Ranks, cut, edit, flip
from test_saving import ARRAYS, four_ways, names, nodes, save_as

from hvdlm.checkpoints import discovery, load, shards
from hvdlm.errors import HvdlmError
from hvdlm.parallel.flat_layout import whole
from hvdlm_backends.local import LocalWorld

Damage = Callable[[Path], Any]


def write_run(run: Path, steps: tuple[int, ...] = (5, 6, 7)) -> Path:
    """Write a run of four ranks that share a folder; return its checkpoints' folder."""
    for step in steps:
        Ranks(4).run(lambda world, step=step: save_as(world, run / "checkpoints", step, keep=9).finish())
    return run / "checkpoints"


def chosen(run: Path, which: str = "auto", ranks: int = 3) -> Any:
    """Return what all of some ranks choose: the step, or the error's sentence."""

    def action(world: Any) -> int | None:
        found = discovery.choose(run, which, world)
        return found and found.step

    answers = {str(a) if isinstance(a, HvdlmError) else a for a in Ranks(ranks).run(action)}
    assert len(answers) == 1
    return answers.pop()


def swap(path: Path) -> None:
    """Two ranks' files, of the same size, take each other's place."""
    one, other = path / "model-0000.safetensors", path / "model-0002.safetensors"
    os.rename(one, path / "aside")
    os.rename(other, one)
    os.rename(path / "aside", other)


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
    "flipped": (lambda path: flip(path / "model-0000.safetensors"), "model-0000.safetensors has another SHA-256"),
    "swapped": (swap, "model-0000.safetensors has another SHA-256"),
    "truncated": (lambda path: os.truncate(path / "optimizer-0001.safetensors", 100), "has not the"),
    "missing": (lambda path: (path / "optimizer-0001.safetensors").unlink(), "optimizer-0001.safetensors is missing"),
    "manifest gone": (lambda path: (path / "manifest.json").unlink(), "it has no manifest.json"),
    "manifest cut": (lambda path: os.truncate(path / "manifest.json", 1000), "checkpoint .* is damaged"),
    "empty": (lambda path: (shutil.rmtree(path), path.mkdir()), "it has no manifest.json"),
    "path": (lambda path: edit(path, lambda m: m["files"].update({"../x": {}})), "names a file"),
    "folder linked": (linked(""), "is a symbolic link that leads out"),
    "manifest linked": (linked("manifest.json"), "is a symbolic link that leads out"),
    "shard linked": (linked("model-0000.safetensors"), "is a symbolic link that leads out"),
    "no file": (no_file, "no regular file"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_one_is_named_and_the_newest_whole_one_is_taken(
    tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, (action, said) = write_run(tmp_path), DAMAGES[damage]
    action(folder / "step-00000007")
    assert chosen(tmp_path) == 6
    told = capsys.readouterr().err
    assert told.startswith(f"hvdlm: checkpoint {folder / 'step-00000007'} is damaged (") and told.count("\n") == 1
    assert told.endswith("): it is skipped\n") and re.search(said, told), told
    refused = chosen(tmp_path, str(folder / "step-00000007"))
    assert (
        "Resume from another one." in refused or "is no hvdlm checkpoint" in refused
    ) and capsys.readouterr().err == ""
    for step in (5, 6):
        flip(folder / f"step-{step:08d}" / "model-0002.safetensors")
    assert f"{folder} holds damaged checkpoints only" in chosen(tmp_path)


def test_a_half_written_one_is_never_taken(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    os.rename(folder / "step-00000007", folder / ".step-00000007.partial")
    assert chosen(tmp_path) == 6
    assert names(folder) == ["latest", "step-00000005", "step-00000006"]


def test_one_that_was_set_aside_when_the_run_was_killed_comes_back(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    os.rename(folder / "step-00000007", folder / ".step-00000007.replaced")
    assert chosen(tmp_path) == 7 and "step-00000007" in names(folder)


def test_where_there_is_nothing_auto_starts_afresh_and_a_name_is_refused(tmp_path: Path) -> None:
    assert chosen(tmp_path, "none") is chosen(tmp_path) is None
    assert f"{tmp_path}/x is no hvdlm checkpoint" in chosen(tmp_path, f"{tmp_path}/x")
    (tmp_path / "checkpoints").mkdir()
    assert chosen(tmp_path) is None
    assert f"{tmp_path} holds no checkpoint yet" in chosen(tmp_path, str(tmp_path))


def test_another_run_is_left_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "other")
    shutil.copytree(folder / "step-00000005", folder / ".step-00000008.partial")
    before = names(folder)
    assert chosen(tmp_path / "run", str(tmp_path / "other")) == 7
    assert chosen(tmp_path / "run", str(folder / "step-00000005")) == 5
    assert names(folder) == before and not (tmp_path / "run").exists()


def test_every_file_is_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_run(tmp_path) / "step-00000007"
    hashed: list[str] = []
    real = discovery.sha256
    monkeypatch.setattr(discovery, "sha256", lambda path: hashed.append(path.name) or real(path))
    monkeypatch.setattr(shards, "sha256", lambda path: hashed.append(path.name) or real(path))
    wanted = {name: whole(array.shape) for name, array in ARRAYS.items()}

    def action(world: Any) -> None:
        loaded = load.load(discovery.choose(tmp_path, str(path), world), wanted, world.rank, world.size)
        for name, array in ARRAYS.items():
            np.testing.assert_array_equal(loaded[name], array)

    Ranks(4).run(action)
    assert sorted(hashed) == names(path)


def write_nodes(folder: Path, ranks: int = 2) -> list[Path]:
    """Write a run of four ranks, ``ranks`` to a node, each node with a folder of its own; return these."""
    place = nodes(folder, ranks)
    for step in (5, 6):
        Ranks(4).run(lambda world, step=step: save_as(world, place(world), step).finish())
    return [folder / f"node{number}" / "checkpoints" for number in range(4 // ranks)]


def go_on(folder: Path, ranks: int, size: int = 4, which: str = "auto") -> list[Any]:
    """Choose and load on ``size`` ranks, ``ranks`` to a node; return every rank's step, or error."""

    def action(world: Any) -> int:
        run = nodes(folder, ranks)(world).parent
        found = discovery.choose(run, which.format(run=run), world)
        assert found is not None
        wanted = four_ways(ARRAYS)[world.rank % 4]
        loaded = load.load(found, wanted, world.rank, world.size)
        for name, shard in wanted.items():
            np.testing.assert_array_equal(loaded[name], cut(ARRAYS[name], shard))
        return found.step

    return Ranks(size).run(action)


@pytest.mark.parametrize("ranks, size", [(2, 4), (1, 4), (2, 8), (4, 4), (1, 1)])
def test_nodes_get_what_they_lack_from_those_that_have_it(
    tmp_path: Path, ranks: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also on more nodes than before, new ones among them; not on fewer, where what went with a node is lost."""
    monkeypatch.setattr(discovery, "_CHUNK", 100)
    folders = write_nodes(tmp_path, ranks if size > 1 else 4)
    assert go_on(tmp_path, ranks, size) == [6] * size
    paths = [tmp_path / f"node{number}" / "checkpoints" / "step-00000006" for number in range(size // ranks)]
    contents = [{file.name: file.read_bytes() for file in path.iterdir()} for path in paths]
    assert all(content == contents[0] for content in contents) and len(contents[0]) == 7
    assert len(folders) == 4 // (ranks if size > 1 else 4)
    assert go_on(tmp_path, ranks, size, "{run}/checkpoints/step-00000006") == [6] * size
    assert not list(tmp_path.rglob("**/.*"))


def test_a_node_s_damaged_copy_is_replaced_by_another_s(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    go_on(tmp_path, 2)
    for path in (one / "step-00000006" / "model-0000.safetensors", two / "step-00000006" / "model-0002.safetensors"):
        flip(path)
    (two / "step-00000006" / "manifest.json").write_text("{")
    assert go_on(tmp_path, 2) == [6] * 4
    assert load.find(one.parent, "auto").step == load.find(two.parent, "auto").step == 6


def test_what_no_node_has_whole_is_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_nodes(tmp_path)
    flip(two / "step-00000006" / "model-0002.safetensors")
    assert go_on(tmp_path, 2) == [5] * 4
    assert "is damaged (model-0002.safetensors has another SHA-256): it is skipped" in capsys.readouterr().err
    for folder in (one, two):  # both have all of it by now
        (folder / "step-00000005" / "optimizer-0001.safetensors").unlink()
    assert all("holds damaged checkpoints only" in str(error) for error in go_on(tmp_path, 2))


def test_a_node_that_cannot_take_a_copy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_nodes(tmp_path)
    real = discovery._Copy.add

    def add(copy: Any, data: bytes) -> None:
        if "node1" in str(copy._path):
            copy._error = "No space left on device"
        real(copy, data)

    monkeypatch.setattr(discovery._Copy, "add", add)
    errors = {str(error) for error in go_on(tmp_path, 2)}
    assert all("rank 2 could not copy what its node lacks of checkpoint" in error for error in errors)
    assert not list(tmp_path.rglob("**/.*"))


def test_a_checkpoint_that_one_node_had_published_when_the_run_was_killed_is_taken(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    os.rename(two / "step-00000006", two / ".step-00000006.partial")
    (two / ".step-00000006.partial" / "manifest.json").unlink()
    os.rename(one / "step-00000005", one / ".step-00000005.partial")
    os.rename(two / "step-00000005", two / ".step-00000005.partial")
    assert go_on(tmp_path, 2) == [6] * 4
    assert names(one) == names(two) == ["latest", "step-00000006"]


def test_a_link_out_of_the_folder_is_not_written_through(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    shutil.move(two / "step-00000006", tmp_path / "outside")
    (two / "step-00000006").symlink_to(tmp_path / "outside")
    before = names(tmp_path / "outside")
    assert go_on(tmp_path, 2) == [5] * 4 and names(tmp_path / "outside") == before
    shutil.rmtree(two / "step-00000005")
    shutil.copytree(one / "step-00000005", tmp_path / "outside2")
    (two / "step-00000005").symlink_to(tmp_path / "outside2")
    (tmp_path / "outside2" / "manifest.json").unlink()
    assert all("is a symbolic link" in str(error) for error in go_on(tmp_path, 2))
    assert not (tmp_path / "outside2" / "manifest.json").exists()


def test_what_is_no_file_on_a_node_hangs_nobody(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    go_on(tmp_path, 2)
    no_file(two / "step-00000006")
    assert go_on(tmp_path, 2) == [6] * 4 and (two / "step-00000006" / "model-0002.safetensors").is_file()
    assert one.is_dir()


def test_one_process_chooses_by_itself(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    assert json.loads((folder / "step-00000007" / "manifest.json").read_text())["step"] == 7
    found = discovery.choose(tmp_path, "auto", LocalWorld())
    assert found is not None and found.step == 7 and found.verified
