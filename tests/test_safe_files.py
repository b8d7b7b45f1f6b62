"""What hvdlm deletes and writes over: its own files only, and never through links."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import yaml

from builders import file_names, save_state
from hvdlm.checkpoints import retention
from hvdlm.cli import main
from hvdlm.config import Config
from hvdlm.diagnostics import flight_recorder
from hvdlm.errors import HvdlmError
from hvdlm.io import safe_files
from hvdlm.io.atomic_files import replace, write_synced
from hvdlm.training import run_folder
from hvdlm_tools.merge import replace_tensors
from launching import ROOT

DELETIONS = {"unlink", "rmdir", "removedirs", "rmtree", "remove"}


def deletions(path: Path) -> list[int]:
    """Return the lines that call a function which deletes files."""
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if isinstance(call.func, ast.Attribute)
        and call.func.attr in DELETIONS
        and not (call.func.attr == "remove" and ast.unparse(call.func.value) != "os")
    ]


def test_one_module_alone_deletes() -> None:
    files = [path for name in ("hvdlm", "plugins", "backends", "scripts") for path in (ROOT / name).rglob("*.py")]
    deleting = [str(path.relative_to(ROOT)) for path in files if deletions(path)]
    assert len(files) > 200 and deleting == ["hvdlm/io/safe_files.py"]


@pytest.mark.parametrize("write", [write_synced, lambda path, data: replace(path, data.decode())])
def test_files_are_never_written_through_links(tmp_path: Path, write: Callable[[Path, bytes], None]) -> None:
    (tmp_path / "mine").write_text("mine")
    for target in ("mine", "nothing", "."):
        (tmp_path / "link").symlink_to(tmp_path / target)
        write(tmp_path / "link", b"ours")
        assert not (tmp_path / "link").is_symlink() and (tmp_path / "link").read_bytes() == b"ours"
        (tmp_path / "link").unlink()
    assert (tmp_path / "mine").read_text() == "mine" and file_names(tmp_path) == ["mine"]


@pytest.mark.parametrize("write", [replace, lambda path, text: replace_tensors(path, {}, np.zeros, {})])
def test_files_take_the_place_of_no_special_file(tmp_path: Path, write: Callable[[Path, str], object]) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        write(tmp_path / "pipe", "ours")
    assert file_names(tmp_path) == ["pipe"] and (tmp_path / "pipe").is_fifo()


def test_lines_are_never_appended_through_links(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    os.mkfifo(tmp_path / "pipe")
    for name in ("link", "pipe"):
        with pytest.raises(OSError):
            safe_files.append(tmp_path / name)
    with safe_files.append(tmp_path / "mine") as file:
        file.write(" too")
    assert (tmp_path / "mine").read_text() == "mine too"


def test_deleting_a_link_keeps_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "mine").touch()
    for delete in (safe_files.delete_file, safe_files.delete_folder):
        (tmp_path / "link").symlink_to(tmp_path / "folder")
        delete(tmp_path / "link")
        assert file_names(tmp_path) == ["folder"]
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    safe_files.delete_owned(tmp_path / "link", ".*")
    safe_files.delete_folder(tmp_path / "nothing")
    assert (tmp_path / "folder" / "mine").exists()
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="named pipe"):
        safe_files.delete_file(tmp_path / "pipe")


USERS = ("2025.json", "taxes.txt", "notes.part", "main.recorder", "rank-1.json", "rank-0001.recorder.bak")


def test_a_users_files_beside_flight_recorders_stay(tmp_path: Path) -> None:
    folder = tmp_path / "flight_recorder"
    folder.mkdir()
    own = ("rank-0001.recorder", "rank-0001.stack", "failed-0001.json", "hang.json", "told.json", "diagnosis.txt")
    for name in (*USERS, *own):
        (folder / name).write_text("x")
    flight_recorder.clean(folder)
    assert file_names(folder) == sorted(USERS)
    folder.rename(tmp_path / "elsewhere")
    folder.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HvdlmError, match="symbolic link"):
        flight_recorder.clean(folder)


def test_overwriting_deletes_the_run_and_nothing_else(tmp_path: Path) -> None:
    checkpoints = tmp_path / "checkpoints"
    save_state(checkpoints, 5)
    (checkpoints / "step-00000007").mkdir()
    (checkpoints / "step-00000007" / "parameters.safetensors").touch()  # damaged
    for name, file in (("step-00000008", "thesis.txt"), ("step-00000009", "manifest.json")):  # another program's
        (checkpoints / name).mkdir()
        (checkpoints / name / file).write_text('{"format": "other"}')
    (checkpoints / ".step-00000006.partial").mkdir()
    (checkpoints / "notes").touch()
    events = tmp_path / "tensorboard"
    events.mkdir()
    for name in ("events.out.tfevents.1.host.2.hvdlm", "events.out.tfevents.1.host.2.0"):
        (events / name).touch()
    for name in ("config.yaml", "metrics.jsonl", "mine.txt"):
        (tmp_path / name).touch()
    run_folder.clear(tmp_path)
    assert file_names(tmp_path) == ["checkpoints", "mine.txt", "tensorboard"]
    assert file_names(checkpoints) == ["notes", "step-00000008", "step-00000009"]
    assert file_names(events) == ["events.out.tfevents.1.host.2.0"]


def test_nodes_that_share_a_folder_delete_it_together(tmp_path: Path) -> None:
    for step in range(1, 30):
        save_state(tmp_path / "checkpoints", step)
    with ThreadPoolExecutor(8) as nodes:
        assert list(nodes.map(run_folder.clear, [tmp_path] * 8, timeout=60)) == [None] * 8
    assert file_names(tmp_path) == []


def test_leftovers_of_the_run_alone_are_deleted(tmp_path: Path) -> None:
    mine = [".notes.partial", ".config.yaml.mine.partial"]
    for name in (*mine, ".config.yaml.partial", ".status.json.0123abcd.partial", ".lock.0123abcd.partial"):
        (tmp_path / name).touch()
    run_folder._delete_leftovers(tmp_path)
    assert file_names(tmp_path) == sorted(mine)


def test_overwriting_removes_a_link_to_checkpoints(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_state(tmp_path / "far", 5)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "far")
    run_folder.clear(tmp_path / "run")
    assert file_names(tmp_path / "run") == [] and (tmp_path / "far" / "step-00000005").is_dir()
    assert "the link is removed, its checkpoints stay there" in capsys.readouterr().out


def test_a_run_that_cannot_be_deleted_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(HvdlmError, match=r"can't be deleted: .*metrics.jsonl"):
        run_folder.clear(tmp_path)


def test_an_old_checkpoint_that_cannot_be_deleted_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_state(tmp_path, 5)
    save_state(tmp_path, 6)

    def refuse(path: Path) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(retention, "delete_folder", refuse)
    retention.delete_old(tmp_path, 6, 1, 0)
    assert "can't be deleted, its space stays taken: Permission denied" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["config.yaml", "tokenizer.json", "summary.json"])
def test_files_that_no_run_wrote_are_not_replaced(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("model: {layers: 2}")
    with pytest.raises(HvdlmError, match=rf"{name} there isn't that of a run"):
        run_folder.check_foreign(tmp_path, False)
    run_folder.check_foreign(tmp_path, True)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(Config().to_dict()))
    run_folder.check_foreign(tmp_path, False)


def commands(output: Path) -> dict[str, list[str]]:
    return {
        "convert": ["convert", "--checkpoint", "missing", "--output", str(output)],
        "export": ["convert", "--format", "huggingface", "--checkpoint", "missing", "--output", str(output)],
        "prepare": ["prepare", "--data.path", "embedded", "--output", str(output)],
        "report": ["report", "missing", "--output", str(output)],
        "launch": ["launch", "--scheduler", "slurm", "--output", str(output), "--", "train"],
        "bench": ["bench", "--output", str(output)],
    }


@pytest.mark.parametrize("command", commands(Path()))
def test_outputs_take_the_place_of_nothing_but_outputs(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    os.mkfifo(tmp_path / "named pipe")
    (tmp_path / "symbolic link").symlink_to(tmp_path)
    if command in ("export", "prepare"):
        (tmp_path / "file").touch()
    else:
        (tmp_path / "folder").mkdir()
    for name in file_names(tmp_path):
        assert main(commands(tmp_path / name)[command]) == 2
        assert f"it is a {name}, expected the name of" in capsys.readouterr().err
    assert len(file_names(tmp_path)) == 3 and (tmp_path / "named pipe").is_fifo()
