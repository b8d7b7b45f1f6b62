"""A run's folder belongs to one run at a time; a restart after a death is never refused."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml

from builders import file_names, read_json
from hvdlm.cli import main
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import file_lock
from hvdlm.training import run_lock
from launching import ONE_LAYER, SMALL, environment, launch, losses, run_python, wait_until, with_step_hook

RUNNING = [*SMALL, *ONE_LAYER, "--train.warmup", "5", "--train.steps", "100000", "--checkpoint.every", "5"]
RUNNING += ["--checkpoint.keep", "1000"]


@contextmanager
def running(run: Path, framework: str, launcher: str = "") -> Iterator[subprocess.Popen[str]]:
    """Train in ``run`` until the context ends; it has saved a checkpoint when the context begins.

    On two ranks of a ``launcher``, or on one.
    """
    program = [sys.executable, *with_step_hook("step > 5 and time.sleep(0.05)"), *RUNNING, "--framework", framework]
    program += ["--log.run", str(run)]
    if launcher == "threads":
        program += ["--ranks", "2"]
    elif launcher:
        program = [launcher, "--oversubscribe", "--bind-to", "none", "-np", "2", *program]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(program, env=environment(), start_new_session=True, **streams)
    try:
        wait_until(lambda: (run / "checkpoints" / "latest").exists(), 120, process)
        yield process
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate(timeout=30)


def files(run: Path) -> dict[str, int]:
    """Return the inode of every file that the run doesn't write anew: outside of checkpoints, and no phase file."""
    inodes = {}
    for folder, folders, names in os.walk(run):  # which passes over folders that are renamed meanwhile
        folders[:] = set(folders) - {"checkpoints"}
        for path in (Path(folder, name) for name in names):
            if path.suffix != ".partial" and not path.name.startswith("phase-"):
                with contextlib.suppress(FileNotFoundError):  # renamed meanwhile
                    inodes[str(path.relative_to(run))] = path.stat().st_ino
    return inodes


# It waits half a second, not three, for an owner of the folder that may be ending.
IMPATIENT = "import sys; from hvdlm import cli; from hvdlm.io import file_lock; file_lock._PATIENCE = 0.5; "
IMPATIENT += "sys.exit(cli.main())"
SECOND = {"resume": ["--checkpoint.resume", "auto"], "overwrite": ["--log.overwrite", "true"]}


@pytest.mark.parametrize(
    "framework, launcher",
    [
        ("torch", "mpirun"),
        ("torch", "threads"),
        pytest.param("tensorflow", "threads", marks=pytest.mark.full(covered_by="torch: the lock is no framework's")),
    ],
)
def test_a_second_run_in_a_folder_is_refused(tmp_path: Path, framework: str, launcher: str) -> None:
    run = tmp_path / "run"
    with running(run, framework, launcher) as first:
        before, owner = files(run), read_json(run / run_lock.NAME)
        del before["status.json"]  # written at every checkpoint
        assert owner["host"] == socket.gethostname() and "flight_recorder/rank-0001.recorder" in before
        seconds = [(2, SECOND["overwrite"]), (1, SECOND["resume"])]
        for ranks, options in seconds if launcher == "mpirun" else seconds[:1]:
            second = ["-c", IMPATIENT, *RUNNING, "--framework", framework, "--log.run", str(run), *options]
            done = launch(launcher, ranks, second, timeout=60)
            assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
            sentence = f"is being written by another run, process {owner['pid']} on {owner['host']} (since "
            assert done.stderr.count(sentence) == 1 and "--log.run NAME" in done.stderr, done.stderr
        assert first.poll() is None and files(run).items() >= before.items()
        assert {name for name in files(run) if name.startswith("flight_recorder")} <= set(before)
        os.kill(owner["pid"], signal.SIGKILL)
        first.wait(30)
        step = len(losses(run))
        resume = ["-m", "hvdlm", *RUNNING, "--framework", framework, "--log.run", str(run), *SECOND["resume"]]
        done = launch(launcher, 2, [*resume, "--train.steps", str(step + 3)], timeout=120)
        assert done.returncode == 0 and "it is taken over" in done.stderr, done.stderr
        assert len(losses(run)) == step + 3 and not list(run.rglob(".*"))


def test_a_run_that_ended_while_another_waited_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    hold, configuration = run_lock.hold, yaml.safe_dump(Config().to_dict())

    def hold_after_another(folder: Path, *arguments: int) -> object:
        (tmp_path / "config.yaml").write_text(configuration)
        return hold(folder, *arguments)

    monkeypatch.setattr(run_lock, "hold", hold_after_another)
    assert main([*SMALL, "--train.steps", "2", "--log.run", str(tmp_path)]) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert file_names(tmp_path) == ["config.yaml"] and (tmp_path / "config.yaml").read_text() == configuration


def test_readers_do_not_need_the_lock(tmp_path: Path) -> None:
    run = tmp_path / "run"
    with running(run, "torch"):
        commands = {
            "evaluate": ["--run", str(run)],
            "generate": ["--run", str(run), "--tokens", "2"],
            "convert": ["--run", str(run), "--output", str(tmp_path / "model.safetensors")],
            "report": [str(run), "--output", str(tmp_path / "report.html")],
        }
        for command, options in commands.items():
            done = run_python(["-m", "hvdlm", command, *options], timeout=60)
            assert done.returncode == 0, done.stderr


def lock_of(run: Path) -> dict[str, object]:
    return json.loads((run / run_lock.NAME).read_text())


def test_first_ranks_of_all_nodes_share_one_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(file_lock, "_PATIENCE", 0.1)
    monkeypatch.setattr(file_lock, "STALE", 0.1)  # of a lock that no other rank takes
    monkeypatch.setattr(run_lock.atexit, "register", lambda *_: None)
    monkeypatch.setattr(run_lock.launcher_env, "launch_identity", lambda: "launch 1")
    assert run_lock.hold(tmp_path / "run", 1, 1) is None and file_names(tmp_path) == []
    lock = run_lock.hold(tmp_path / "run", 2, 0)
    assert lock is not None and lock_of(tmp_path / "run")["launch"] == "launch 1"
    file_lock._held.clear()  # as in another process
    shared = run_lock.hold(tmp_path / "run", 0, 0)
    assert shared is not None
    monkeypatch.setattr(run_lock.launcher_env, "launch_identity", lambda: "")
    assert run_lock.hold(tmp_path / "run", 2, 0) is None  # the launcher tells nothing: rank 0 alone takes it
    with pytest.raises(HvdlmError, match="is being written by another run"):
        run_lock.hold(tmp_path / "run", 0, 0)
    shared.release()
    lock.release()
    assert file_names(tmp_path) == []


@pytest.mark.parametrize("name", [".lock", "flight_recorder"])
def test_a_run_refuses_links_in_its_folder(tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "mine").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(tmp_path / "mine")
    assert main([*SMALL, "--train.steps", "2", "--log.run", str(tmp_path / "run")]) == 2
    assert "it is a symbolic link" in capsys.readouterr().err
    assert file_names(tmp_path / "run") == [name] and file_names(tmp_path / "mine") == []


def test_a_refused_run_leaves_no_folder_behind(tmp_path: Path) -> None:
    options = [*SMALL, "--data.path", str(tmp_path / "missing.txt"), "--log.run", str(tmp_path / "a" / "run")]
    assert run_python(["-m", "hvdlm", *options], timeout=60).returncode == 2
    assert file_names(tmp_path) == []


def test_the_old_model_never_answers_after_an_overwrite(tmp_path: Path) -> None:
    run, far = tmp_path / "run", tmp_path / "far"
    far.mkdir()
    run.mkdir()
    (run / "checkpoints").symlink_to(far)
    train = ["-m", "hvdlm", *SMALL, "--train.warmup", "0", "--log.run", str(run), "--checkpoint.every", "5"]
    assert run_python([*train, "--train.steps", "10"], timeout=60).returncode == 0
    assert "step-00000010" in file_names(far) and (run / "checkpoints").is_symlink()
    done = run_python([*train, "--train.steps", "5", "--log.overwrite", "true"], timeout=60)
    assert done.returncode == 0 and "the link is removed" in done.stdout, done.stderr
    evaluated = run_python(["-m", "hvdlm", "evaluate", "--run", str(run)], timeout=60)
    assert json.loads(evaluated.stdout)["step"] == 5 and "step-00000010" in file_names(far)


def test_a_link_for_the_metrics_is_replaced(tmp_path: Path) -> None:
    for number, target in enumerate(("thesis.txt", "missing.txt")):
        run = tmp_path / f"run-{number}"
        run.mkdir()
        (tmp_path / "thesis.txt").write_text("mine")
        (run / "metrics.jsonl").symlink_to(tmp_path / target)
        train = ["-m", "hvdlm", *SMALL, "--train.steps", "2", "--train.warmup", "0", "--log.run", str(run)]
        assert run_python(train, timeout=60).returncode == 0 and len(losses(run)) == 2
        assert (tmp_path / "thesis.txt").read_text() == "mine" and not (tmp_path / "missing.txt").exists()


def test_supervise_appends_to_no_link(tmp_path: Path) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "mine").write_text("mine")
    (run / "supervise.jsonl").symlink_to(tmp_path / "mine")
    train = [sys.executable, "-m", "hvdlm", *SMALL, "--train.steps", "2", "--train.warmup", "0", "--log.run", str(run)]
    done = run_python(["-m", "hvdlm", "supervise", "--max_failures", "1", "--", *train], timeout=60)
    assert done.returncode == 0 and "supervise.jsonl could not be written: it is a symbolic link" in done.stderr
    assert (tmp_path / "mine").read_text() == "mine"


def test_launch_identities_tell_launches_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    from hvdlm.io import launcher_env

    for names in (*launcher_env.VARIABLES.values(), *launcher_env._IDENTITIES.values()):
        for name in names:
            monkeypatch.delenv(name, raising=False)
    assert launcher_env.launch_identity() == ""
    launches = [
        {"HOROVOD_RANK": "0", "HOROVOD_SIZE": "2", "HOROVOD_GLOO_RENDEZVOUS_PORT": "10"},
        {"OMPI_COMM_WORLD_RANK": "1", "OMPI_COMM_WORLD_SIZE": "2", "PMIX_NAMESPACE": "7", "SLURM_JOB_ID": "5"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "0"},
        {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "5", "SLURM_STEP_ID": "1"},
    ]
    identities = []
    for variables in launches:
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            identities.append(launcher_env.launch_identity())
    assert all(identities) and all(a != b for a, b in itertools.combinations(identities, 2))
