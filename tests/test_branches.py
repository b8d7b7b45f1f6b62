"""The newest checkpoint is the one written last; those that a run leaves behind are set aside, never deleted."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from builders import (
    SHARDED_STATE,
    STATE,
    ThreadRanks,
    edit_json,
    file_names,
    flip_last_bit,
    four_rank_shards,
    node_folders,
    read_json,
    take_shard,
)
from hvdlm.checkpoints import agreement, discovery, load, retention
from hvdlm.checkpoints.order import PENDING, sequence_number, set_aside_folders, step_name
from hvdlm.checkpoints.save import Saver
from hvdlm.config import CheckpointConfig, TrainConfig
from hvdlm.errors import HvdlmError
from hvdlm_backends.local import LocalWorld
from hvdlm_telemetry.changed_rate import changed_rate
from launching import ONE_LAYER, SMALL, launch, losses, metrics, run_with_faults
from launching import STEPS as STEPS_OF_RUNS

STEPS = (10, 20, 30, 40)


def resume(run: Path, which: str = "auto", world: Any = None, **options: Any) -> tuple[Saver, int]:
    """Do what a run does that resumes from ``which``; return its saver, and the step from which it continues."""
    world = world or LocalWorld()
    chosen = agreement.choose(run, which, world)
    saver = Saver(run / "checkpoints", world, CheckpointConfig(**{"asynchronous": False, "keep": 99} | options))
    saver.continue_from(chosen)
    return saver, chosen.step if chosen else 0


def save(saver: Saver, *steps: int, loss: float = 1.0) -> None:
    for step in steps:
        saver.start(step, STATE, {"metrics": {"val_loss": loss}})


def write_run(run: Path, *steps: int) -> Path:
    """Write checkpoints as one run does; return their folder."""
    save(resume(run)[0], *(steps or STEPS))
    return run / "checkpoints"


def named(folder: Path, step: int) -> str:
    return str(folder / step_name(step))


def steps_in(folder: Path) -> list[int]:
    return [step for step, _ in discovery.step_folders(folder)]


def set_aside(folder: Path) -> list[int]:
    return sorted(step for path in set_aside_folders(folder) for step in steps_in(path))


def entry(folder: Path, step: int) -> tuple[str, int]:
    manifest = read_json(folder / step_name(step) / "manifest.json")
    return manifest["branch"], manifest["sequence"]


def test_a_run_that_goes_back_continues_from_what_it_saved(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    before = {step: (folder / step_name(step) / "manifest.json").read_bytes() for step in STEPS}
    saver, step = resume(tmp_path, named(folder, 20))
    (aside,) = set_aside_folders(folder)
    assert capsys.readouterr().out == (
        f"hvdlm: the run resumes from {named(folder, 20)}: 2 other checkpoint(s), of step 30, 40, are set aside in "
        f"{aside}; delete that folder when you don't need them.\n"
    )
    assert step == 20 and steps_in(folder) == [20, 10] and (folder / "latest").read_text() == step_name(20)
    assert discovery.find(tmp_path, "auto").step == 20  # type: ignore[union-attr]
    save(saver, 25)
    assert discovery.find(tmp_path, "auto").step == 25  # type: ignore[union-attr]
    assert discovery.newest_step(tmp_path) == (25, 5) and (folder / "latest").read_text() == step_name(25)
    saver, step = resume(tmp_path)
    save(saver, 30)
    assert step == 25 and steps_in(folder) == [30, 25, 20, 10] and capsys.readouterr().out == ""
    assert set_aside(folder) == [30, 40]
    for path in aside.iterdir():
        assert (path / "manifest.json").read_bytes() == before[load.open_checkpoint(path).step]


def test_a_branch_begins_where_a_run_leaves_checkpoints_behind(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    save(resume(tmp_path)[0], 50)
    save(resume(tmp_path, named(folder, 20))[0], 25)
    save(resume(tmp_path)[0], 30)
    branches, numbers = zip(*(entry(folder, step) for step in (10, 20, 25, 30)), strict=True)
    assert branches[0] == branches[1] != branches[2] == branches[3] and numbers == (1, 2, 6, 7)
    (aside,) = set_aside_folders(folder)
    assert [entry(aside, step) for step in (30, 40, 50)] == [(branches[0], number) for number in (3, 4, 5)]


def test_a_step_that_is_saved_again_takes_its_new_position(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    saver, _ = resume(tmp_path)
    save(saver, 20)
    assert steps_in(folder) == [20, 40, 30, 10] and discovery.newest_step(tmp_path) == (20, 5)
    _, step = resume(tmp_path)
    assert step == 20 and steps_in(folder) == [20, 10] and set_aside(folder) == [30, 40]


def test_a_checkpoint_put_back_by_hand_is_not_the_newest(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    save(resume(tmp_path, named(folder, 20))[0], 25)
    (aside,) = set_aside_folders(folder)
    shutil.copytree(aside / step_name(40), folder / step_name(40))
    saver, step = resume(tmp_path, keep=1)
    assert step == 25 and steps_in(folder) == [25, 20, 10]
    save(saver, 30)
    assert steps_in(folder) == [30] and set_aside(folder) == [30, 40, 40]
    assert resume(tmp_path, named(aside, 40))[1] == 40  # on the other hand, its name is obeyed
    assert steps_in(folder) == [] and set_aside(folder) == [30, 30, 40, 40]


def test_retention_counts_the_branch_alone_and_deletes_no_other(tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    saver, _ = resume(tmp_path)
    for step, loss in ((10, 3.0), (20, 2.0), (30, 0.1), (40, 0.2)):
        save(saver, step, loss=loss)
    saver, _ = resume(tmp_path, named(folder, 20), keep=1, keep_best=1)
    for step, loss in ((25, 4.0), (30, 5.0), (35, 6.0)):
        save(saver, step, loss=loss)
    assert steps_in(folder) == [35, 20] and set_aside(folder) == [30, 40]
    retention.clean_up(folder)
    assert set_aside(folder) == [30, 40]


def test_a_damaged_newest_checkpoint_is_set_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path)
    flip_last_bit(folder / step_name(40) / "model.safetensors")
    (folder / step_name(30) / "manifest.json").unlink()
    assert resume(tmp_path)[1] == 20 and capsys.readouterr().err.count("is skipped") == 2
    assert steps_in(folder) == [20, 10] and sorted(file_names(set_aside_folders(folder)[0])) == [
        step_name(30),
        step_name(40),
    ]


def test_a_run_that_starts_from_elsewhere_leaves_all_behind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, other = write_run(tmp_path / "run"), write_run(tmp_path / "other", 10, 20)
    assert resume(tmp_path / "run", "none")[1] == 0
    assert "the run starts from scratch: 4 other checkpoint(s), of step 10, 20, 30, 40," in capsys.readouterr().out
    assert file_names(folder) == [set_aside_folders(folder)[0].name]
    with pytest.raises(HvdlmError, match=r"all checkpoints in .* were set aside, .*--checkpoint.resume PATH"):
        resume(tmp_path / "run")
    with pytest.raises(HvdlmError, match="were set aside"):
        discovery.find(tmp_path / "run", "auto")
    saver, step = resume(tmp_path / "run", str(tmp_path / "other"))
    save(saver, 30)
    assert step == 20 and steps_in(folder) == [30] and entry(folder, 30)[1] == 5
    assert entry(folder, 30)[0] != entry(other, 20)[0] and steps_in(other) == [20, 10]


def test_a_copy_of_a_checkpoint_is_known_as_its_own(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    shutil.copytree(folder / step_name(20), tmp_path / "backup")
    assert resume(tmp_path / "run", str(tmp_path / "backup"))[1] == 20
    assert steps_in(folder) == [20, 10] and set_aside(folder) == [30, 40]


def to_format_2(folder: Path, *steps: int) -> None:
    """Change checkpoints into those of version 0.1."""
    for step in steps:
        path = folder / step_name(step) / "manifest.json"
        edit_json(path, lambda m: [m.update(format="hvdlm-checkpoint-2"), m.pop("branch"), m.pop("sequence")])


def test_latest_orders_checkpoints_without_sequence_numbers(tmp_path: Path) -> None:
    folder = write_run(tmp_path, 10, 20, 30, 40, 15)  # version 0.1 wrote step 15 after it went back to 10
    to_format_2(folder, 10, 15, 20, 30, 40)
    assert (folder / "latest").read_text() == step_name(15)
    assert discovery.newest_step(tmp_path) == (15, 0) and steps_in(folder)[:2] == [15, 10]
    saver, step = resume(tmp_path)
    save(saver, 20)
    assert step == 15 and steps_in(folder) == [20, 15, 10] and set_aside(folder) == [20, 30, 40]
    assert entry(folder, 20)[1] == 1


def test_a_kill_of_version_0_1_before_latest_loses_nothing(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    to_format_2(folder, *STEPS)
    (folder / "latest").write_text(step_name(30))
    (folder / ".latest.partial").write_text(step_name(40))
    assert discovery.newest_step(tmp_path) == (40, 0)
    assert resume(tmp_path)[1] == 40 and steps_in(folder) == [40, 30, 20, 10]
    assert (folder / "latest").read_text() == step_name(40) and not (folder / ".latest.partial").exists()


def test_a_kill_of_version_0_1_before_publishing_is_no_save(tmp_path: Path) -> None:
    """It went back to 30 and was about to replace an earlier checkpoint of step 40."""
    folder = write_run(tmp_path)
    to_format_2(folder, *STEPS)
    (folder / "latest").write_text(step_name(30))
    (folder / ".latest.partial").write_text(step_name(40))
    shutil.copytree(folder / step_name(40), folder / f".{step_name(40)}.partial")
    assert resume(tmp_path)[1] == 30 and steps_in(folder) == [30, 20, 10] and set_aside(folder) == [40]


def test_the_order_does_not_depend_on_the_times_of_files(tmp_path: Path) -> None:
    """Copies of run folders may have other times, in any order."""
    folder = write_run(tmp_path, 10, 20, 30, 40, 15)
    to_format_2(folder, 10, 15, 20, 30, 40)
    for seconds, path in enumerate(sorted(folder.rglob("*"))):
        os.utime(path, (seconds, seconds))
    assert discovery.newest_step(tmp_path) == (15, 0) and steps_in(folder)[:2] == [15, 10]


@pytest.mark.parametrize("content", ["", "step-00000099", "../../x", "x" * 100, "\x00\xff"])
def test_a_damaged_latest_is_ignored_and_corrected(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path)
    (folder / "latest").write_text(content)
    to_format_2(folder, *STEPS)
    assert resume(tmp_path)[1] == 40 and (folder / "latest").read_text() == step_name(40)


def test_a_withdrawn_checkpoint_is_not_named_as_latest(tmp_path: Path) -> None:
    folder = write_run(tmp_path)
    retention.withdraw(folder, step_name(40), published=True)
    assert (folder / "latest").read_text() == step_name(30) and steps_in(folder) == [30, 20, 10]


@pytest.mark.parametrize(
    "change, expected",
    [
        ({"sequence": -1}, "its sequence is -1"),
        ({"sequence": True}, "its sequence is True"),
        ({"sequence": 2**53}, "its sequence is"),
        ({"sequence": 2**99}, "its sequence is"),
        ({"branch": "../x"}, "its branch is '../x'"),
        ({"branch": 5}, "its branch is 5"),
    ],
)
def test_a_damaged_position_is_refused(tmp_path: Path, change: dict[str, Any], expected: str) -> None:
    folder = write_run(tmp_path)
    edit_json(folder / step_name(40) / "manifest.json", lambda manifest: manifest.update(change))
    with pytest.raises(HvdlmError, match=re.escape(expected)):
        load.open_checkpoint(folder / step_name(40))
    saver, step = resume(tmp_path)
    save(saver, 35)
    assert step == 30 and entry(folder, 35)[1] in (4, 5) and resume(tmp_path)[1] == 35


HOSTILE = [
    "[]",
    '{"numbers": [1]}',
    '{"target": "../..", "newest": 3, "numbers": {"../x": 1, "step-00000040": 4}}',
    '{"target": "set-aside-0123456789abcdef", "newest": "../x", "numbers": {"../../other": 1, "step-00000040": []}}',
]


@pytest.mark.parametrize("content", HOSTILE)
def test_a_damaged_list_moves_nothing_out_of_the_folder(tmp_path: Path, content: str) -> None:
    folder = write_run(tmp_path / "run")
    (tmp_path / "other").mkdir()
    (folder / PENDING).write_text(content)
    resume(tmp_path / "run")
    assert file_names(tmp_path) == ["other", "run"] and not (folder / PENDING).exists()
    assert sorted([*steps_in(folder), *set_aside(folder)]) == [*STEPS]


def test_nothing_is_set_aside_through_a_link(tmp_path: Path) -> None:
    folder, target = write_run(tmp_path / "run"), "set-aside-0123456789abcdef"
    (tmp_path / "other").mkdir()
    (folder / target).symlink_to(tmp_path / "other")
    listed = {"target": target, "newest": step_name(30), "numbers": {step_name(40): 4}}
    (folder / PENDING).write_text(json.dumps(listed))
    assert resume(tmp_path / "run")[1] == 30 and not (folder / PENDING).exists()
    assert file_names(tmp_path / "other") == [] and set_aside(folder) == [40]


class Killed(BaseException):
    """Ends an action as a kill does: nothing that handles errors sees it."""


def kill_at(patch: pytest.MonkeyPatch, number: int, where: str = "") -> Callable[[], int]:
    """Kill before the ``number``-th change of the folder tree ``where``; return the count of changes so far."""
    changes: list[str] = []

    def counted(real: Callable[..., Any]) -> Callable[..., Any]:
        def change(path: Any, *rest: Any, **options: Any) -> Any:
            if where in str(path):
                changes.append(str(path))
                if len(changes) == number:
                    raise Killed
            return real(path, *rest, **options)

        return change

    for name in ("rename", "replace", "mkdir", "unlink"):
        patch.setattr(os, name, counted(getattr(os, name)))
    return lambda: len(changes)


def test_a_kill_while_setting_aside_leaves_one_order(tmp_path: Path) -> None:
    """Until they are listed, nothing has changed; from then on, they are all left behind."""
    template, outcomes = write_run(tmp_path / "template"), []
    for number in range(1, 40):
        run = tmp_path / str(number)
        folder = Path(shutil.copytree(template.parent, run)) / "checkpoints"
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(patch, number)
            try:
                resume(run, named(folder, 20))
            except Killed:
                pass
        newest = discovery.newest_step(run)
        assert newest is not None and discovery.find(run, "auto").step == newest[0]  # type: ignore[union-attr]
        assert sorted([*steps_in(folder), *set_aside(folder)]) == [*STEPS] or (folder / PENDING).exists()
        saver, step = resume(run)
        save(saver, 45)
        assert step == newest[0] and discovery.newest_step(run)[0] == 45  # type: ignore[index]
        assert sorted([*steps_in(folder), *set_aside(folder)]) == [*STEPS, 45]
        assert set_aside(folder) == ([30, 40] if step == 20 else [])
        assert not list(folder.glob(".*")) and not (folder / PENDING).exists()
        outcomes.append(step)
        if count() < number:
            break
    assert outcomes == sorted(outcomes, reverse=True) and {*outcomes} == {40, 20} and len(outcomes) > 6


def test_naming_a_checkpoint_that_was_being_set_aside_keeps_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path)

    def killed(*_: Any) -> None:
        raise Killed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(Killed):
            resume(tmp_path, named(folder, 20))
    assert read_json(folder / PENDING)["numbers"] == {step_name(30): 3, step_name(40): 4}
    saver, step = resume(tmp_path, named(folder, 40))
    save(saver, 50)
    assert step == 40 and steps_in(folder) == [50, 40, 30, 20, 10] and not set_aside(folder)


# Nodes with folders of their own


def write_nodes(folder: Path) -> list[Path]:
    """Write a run of 4 ranks on 2 nodes; return the nodes' folders of checkpoints."""
    save_on_nodes(folder, "auto", *STEPS)
    return [folder / f"node{number}" / "checkpoints" for number in (0, 1)]


def save_on_nodes(folder: Path, which: str, *steps: int) -> list[int]:
    """Resume on 2 nodes of 2 ranks and save; return the step from which every rank continued."""

    def action(world: Any) -> int:
        run = node_folders(folder, 2)(world).parent
        saver, step = resume(run, which.format(run=run), world)
        shards = four_rank_shards()[world.rank]
        for new in steps:
            saver.start(new, {n: take_shard(SHARDED_STATE[n], shard) for n, shard in shards.items()}, {}, shards)
        return step

    return ThreadRanks(4).run(action)


def test_all_nodes_set_the_same_checkpoints_aside(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one, two = write_nodes(tmp_path)
    assert save_on_nodes(tmp_path, "{run}/checkpoints/step-00000020", 25) == [20] * 4
    assert capsys.readouterr().out.count("are set aside in") == 1
    assert file_names(one) == file_names(two) and steps_in(one) == steps_in(two) == [25, 20, 10]
    assert set_aside(one) == set_aside(two) == [30, 40] and entry(one, 25) == entry(two, 25)
    assert save_on_nodes(tmp_path, "auto") == [25] * 4


@pytest.mark.parametrize("node", [0, 1])
def test_a_kill_on_one_node_leaves_one_order_on_all(tmp_path: Path, node: int) -> None:
    write_nodes(tmp_path / "template")
    outcomes = []
    for number in range(1, 40):
        run = Path(shutil.copytree(tmp_path / "template", tmp_path / str(number)))
        folders = [run / f"node{n}" / "checkpoints" for n in (0, 1)]
        with pytest.MonkeyPatch.context() as patch:
            count = kill_at(patch, number, f"node{node}")
            try:
                save_on_nodes(run, "{run}/checkpoints/step-00000020")
            except (Killed, threading.BrokenBarrierError):
                pass
        steps = {*save_on_nodes(run, "auto", 45)}
        assert len(steps) == 1
        outcomes += steps
        for folder in folders:
            assert sorted({*steps_in(folder), *set_aside(folder)}) == [*STEPS, 45]
            assert steps_in(folder) == ([45, 20, 10] if outcomes[-1] == 20 else [45, 40, 30, 20, 10])
            assert not list(folder.glob(".*")) and not (folder / PENDING).exists()
        if count() < number:
            break
    assert {*outcomes} == {40, 20} and len(outcomes) > 6


def test_a_node_with_an_earlier_save_receives_the_last(tmp_path: Path) -> None:
    one, two = write_nodes(tmp_path)
    earlier = shutil.copytree(two / step_name(40), tmp_path / "earlier")
    save_on_nodes(tmp_path, "auto", 40)
    assert save_on_nodes(tmp_path, "{run}/checkpoints/step-00000040") == [40] * 4  # both have all files by now
    shutil.rmtree(two / step_name(40))
    shutil.move(earlier, two / step_name(40))
    assert sequence_number(one / step_name(40)) == 5 and sequence_number(two / step_name(40)) == 4
    assert save_on_nodes(tmp_path, "auto") == [40] * 4
    assert sequence_number(two / step_name(40)) == 5


def test_a_node_that_cannot_set_aside_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = write_nodes(tmp_path)
    real = os.replace

    def full(old: Any, new: Any) -> None:
        if "node1" in str(new) and Path(new).name == PENDING:
            raise OSError(28, "No space left on device", str(new))
        real(old, new)

    monkeypatch.setattr(os, "replace", full)
    errors = save_on_nodes(tmp_path, "{run}/checkpoints/step-00000020")
    assert {type(error) for error in errors} == {HvdlmError} and len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith("rank 2 could not set aside the later checkpoints: No space left on device")
    assert str(two) in str(errors[0])
    monkeypatch.undo()
    assert save_on_nodes(tmp_path, "auto") == [40] * 4 and steps_in(one) == steps_in(two) == [40, 30, 20, 10]


# Whole runs

EVERY = [*ONE_LAYER, "--checkpoint.every", "5", "--checkpoint.keep", "9"]


ORDER = pytest.mark.full(covered_by="the case of torch: branches are the core's; test_published_state.py rolls back")


@pytest.mark.parametrize("framework", ["torch", pytest.param("tensorflow", marks=ORDER)])
def test_a_killed_run_that_went_back_repeats_the_curve(
    curve: Callable[..., Path], tmp_path: Path, framework: str
) -> None:
    """Trained to step 30, resumed from 10, killed at 18, resumed: nothing of the first attempt is used again."""
    run = tmp_path / "run"
    expected = curve(framework, 2, *STEPS_OF_RUNS, *EVERY)
    shutil.copytree(expected, run)
    folder = run / "checkpoints"
    back = [*EVERY, "--checkpoint.resume", named(folder, 10)]
    launcher = {"torch": "mpirun"}.get(framework, "threads")
    killed = run_with_faults(run, framework, 2, *back, launcher=launcher, signals=[[1, 18, "SIGKILL"]])
    assert killed.returncode not in (0, 2) and "4 other checkpoint(s), of step 15, 20, 25, 30, are" in killed.stdout
    newest = discovery.newest_step(run)
    assert newest is not None and newest[0] in (10, 15) and set_aside(folder) == [15, 20, 25, 30]
    arguments = ["-m", "hvdlm", "--framework", framework, "--log.run", str(run), *SMALL, *STEPS_OF_RUNS, *EVERY]
    done = launch(launcher, 2, [*arguments, "--checkpoint.resume", "auto"])
    assert done.returncode == 0 and f"steps {newest[0]} to 30" in done.stdout, done.stderr[-3000:]
    assert "the learning rate of step" not in killed.stdout + done.stdout
    assert [line["step"] for line in metrics(run) if "loss" in line] == list(range(1, 31))
    assert losses(run) == pytest.approx(losses(expected), abs=1e-5)
    assert set_aside(folder) == [15, 20, 25, 30] and (folder / "latest").read_text() == step_name(30)


def test_a_rollback_returns_to_the_newest_of_the_branch(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_with_faults(run, "torch", 2, *EVERY).returncode == 0
    back = ["--checkpoint.resume", named(run / "checkpoints", 10), *EVERY, "--train.learning_rate", "2e-3"]
    done = run_with_faults(run, "torch", 2, *back, nan=[16, 17, 18])
    assert done.returncode == 0 and "rolled back to the checkpoint of step 15" in done.stdout, done.stderr[-3000:]
    assert (
        done.stdout.count("the learning rate of step 11 is")
        == done.stdout.count("train.learning_rate was 0.001, is 0.002)")
        == 1
    )
    assert steps_in(run / "checkpoints") == [30, 25, 20, 15, 10, 5]


def test_a_changed_schedule_is_named_at_resumption() -> None:
    before = json.loads(
        json.dumps(TrainConfig(steps=40, learning_rate=2e-3, min_learning_rate=5e-4, warmup=5).__dict__)
    )
    assert changed_rate(before, TrainConfig(**before), 40) is None
    longer = TrainConfig(**before | {"steps": 4000})
    assert changed_rate(before, longer, 40) == (
        "hvdlm: the learning rate of step 41 is 0.002, not 0.0005 as with the settings of the checkpoint (train.steps "
        "was 40, is 4000): --train.learning_rate and --train.schedule set another one"
    )
    assert changed_rate(before, TrainConfig(**before | {"steps": 41}), 10) is None  # a change of 0.3%
    assert "train.schedule was cosine, is constant" in str(
        changed_rate(before, TrainConfig(**before | {"schedule": "constant"}), 39)
    )
    doubled = TrainConfig(steps=40, learning_rate=4e-3, warmup=5)  # its minimum: a tenth
    assert "train.min_learning_rate was 0.0005, is 0.0004)" in str(changed_rate(before, doubled, 20))
    higher = TrainConfig(steps=40, learning_rate=5e-3, warmup=5)  # a tenth of it is the minimum as it was
    assert "(train.learning_rate was 0.002, is 0.005): " in str(changed_rate(before, higher, 20))
    for damaged in ({}, {"steps": "x"}, {"steps": None}, {"warmup": float("nan")}, {"learning_rate": float("nan")}, 3):
        result = changed_rate(damaged, TrainConfig(), 500)  # type: ignore[arg-type]
        assert result is None or "\n" not in result
