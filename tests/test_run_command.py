"""``python -m hvdlm run``: ranks on this machine under the launcher at hand, as one program with one exit code."""

from __future__ import annotations

import json
import os
import pty
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from builders import case
from hvdlm import cli
from hvdlm.errors import STOPPED, HvdlmError
from hvdlm.io import launcher_env
from hvdlm_launchers import local_launch
from hvdlm_launchers.launcher_output import OutputCleaner
from hvdlm_launchers.local_launch import choose
from hvdlm_launchers.process_tree import MARK, ProcessTree
from hvdlm_launchers.run_command import split
from launching import ONE_LAYER, ROOT, SMALL, STEPS, environment, losses, metrics, run_python, wait_until

RUN = ["-m", "hvdlm", "run"]


@pytest.mark.parametrize(
    "words, own, command",
    [
        ("-np 2 -- train --train.steps 5", "-np 2", "train --train.steps 5"),
        ("-np 2 --backend gloo --train.steps 5", "-np 2 --backend gloo", "--train.steps 5"),
        ("--np=2 evaluate --run x", "--np=2", "evaluate --run x"),
        ("--backend mpi -- --backend gloo", "--backend mpi", "--backend gloo"),
        ("-np 2 --help", "-np 2 --help", ""),
        ("", "", ""),
    ],
)
def test_own_options_come_before_the_command(words: str, own: str, command: str) -> None:
    assert split(words.split()) == (own.split(), command.split())


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Return a function that makes programs with these outputs the only ones on PATH."""
    monkeypatch.setattr(launcher_env, "search_path", lambda: str(tmp_path))

    def install(**outputs: str) -> None:
        for name, output in outputs.items():
            (tmp_path / name).write_text(f"#!/bin/sh\necho '{output}'\n")
            (tmp_path / name).chmod(0o755)

    return install


def test_the_launcher_follows_backend_and_machine(programs: Callable[..., None], tmp_path: Path) -> None:
    with pytest.raises(HvdlmError, match="there is no launcher here"):
        choose(2, None)
    assert choose(1, None).words == ()
    programs(horovodrun="")
    gloo = (str(tmp_path / "horovodrun"), "--gloo", "-np", "3", "-H", "localhost:3")
    assert choose(3, None).words == choose(3, "gloo").words == choose(3, "nccl").words == gloo
    with pytest.raises(HvdlmError, match="neither mpirun nor horovodrun"):
        choose(2, "mpi4py")
    programs(mpirun="mpirun (Open MPI) 4.1.8")
    mpi = (str(tmp_path / "mpirun"), "--bind-to", "none", "--host", "localhost:3", "-np", "3")
    assert choose(3, None).words == choose(3, "mpi4py").words == choose(3, "nccl").words == mpi
    assert choose(3, "gloo") == local_launch.Launcher(gloo, prefixed=True)
    programs(mpirun="HYDRA build details: Version: 4.2")
    assert choose(3, "mpi").words == (str(tmp_path / "mpirun"), "-np", "3")
    with pytest.raises(HvdlmError, match="did you mean mpi"):
        choose(2, "mpl")


OPEN_MPI_STDERR = b"""\
WARNING: All log messages before absl::InitializeLog() is called are written to STDERR
I0000 00:00:1 1 port.cc:153] oneDNN custom operations are on.
hvdlm: --train.steps is 0, expected 1 or more.
--------------------------------------------------------------------------
Primary job  terminated normally, but 1 process returned
a non-zero exit code. Per user-direction, the job has been aborted.
--------------------------------------------------------------------------
--------------------------------------------------------------------------
mpirun detected that one or more processes exited with non-zero status, thus causing
the job to be terminated. The first process to do so was:

  Process name: [[2,1],0]
  Exit code:    2
--------------------------------------------------------------------------
"""


def test_notices_of_launchers_are_left_out() -> None:
    for width in (1, 7, 5000):
        cleaner = OutputCleaner(prefixed=False)
        chunks = [OPEN_MPI_STDERR[i : i + width] for i in range(0, len(OPEN_MPI_STDERR), width)]
        shown = b"".join(map(cleaner.feed, chunks)) + cleaner.end()
        assert shown == b"hvdlm: --train.steps is 0, expected 1 or more.\n"
    killed = b"mpirun noticed that process rank 1 with PID 7 on node a exited on signal 9 (Killed).\n"
    assert OutputCleaner(prefixed=False).feed(killed) == killed


def test_prefixes_of_ranks_are_removed() -> None:
    cleaner = OutputCleaner(prefixed=True)
    shown = cleaner.feed(b"[0]<stdout>:step 1\n[0]<stdout>:\r[1]<std") + cleaner.feed(
        b"out>: 10%|#\rProcess 0 exit\n[0]"
    )
    assert shown + cleaner.end() == b"step 1\n\r10%|#\r"
    assert cleaner.launcher_lines == [b"Process 0 exit\n", b"[0]"]


def test_processes_below_two_trees_belong_to_both(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(MARK, "outer")
    tree = ProcessTree([sys.executable, "-c", f"import os; assert os.environ['{MARK}'].startswith('outer ')"])
    wait_until(lambda: tree.poll() is not None, 30)
    assert tree.finish() == 0, tree.errors


def test_refused_options_start_no_rank(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["run", "-np", "2", "--", "--lr", "1"]) == 2
    assert capsys.readouterr().err == "hvdlm: --lr: there is no such option; here it is called --train.learning_rate.\n"
    assert cli.main(["run", "-np", "0", "--train.steps", "1"]) == 2
    assert "-np: got 0, expected 1 or more." in capsys.readouterr().err


def test_a_rank_cannot_start_ranks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "0")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.main(["run", "-np", "2", "--train.steps", "1"]) == 2
    assert "run starts the launcher, not the other way round" in capsys.readouterr().err


@pytest.mark.parametrize("framework, backend", [("torch", "mpi"), ("tensorflow", "gloo"), ("torch", "mpi4py")])
def test_output_is_that_of_one_program(framework: str, backend: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = ["--framework", framework, "--log.run", str(run), *SMALL, *ONE_LAYER, "--train.steps", "3"]
    done = run_python([*RUN, "-np", "2", "--backend", backend, "--", *options])
    assert done.returncode == 0 and done.stderr == "", done.stderr
    lines = done.stdout.splitlines()
    assert lines[0] == "hvdlm: precision fp32, compile off, device CPU"
    assert f"{framework}, 2 rank(s) over {backend}" in lines[1] and lines[-4] == f"The run is in {run}. Next:"
    assert not re.search(r"^\[\d", done.stdout, re.M) and len(losses(run)) == 3
    if framework == "torch":
        again = [line.split()[3:] for line in lines[-3:]]
        assert [words[0] for words in again] == ["generate", "evaluate", "report"]
        assert run_python(["-m", "hvdlm", *again[0], "--tokens", "4"]).returncode == 0


def test_commands_besides_train_run_on_ranks(tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert run_python(["-m", "hvdlm", "--log.run", str(run), *SMALL, "--train.steps", "2"]).returncode == 0
    done = run_python([*RUN, "-np", "2", "evaluate", "--run", str(run)])
    assert done.returncode == 0 and "val_loss" in done.stdout, done.stderr
    done = run_python([*RUN, "-np", "2", "evaluate", "--run", str(tmp_path / "none")])
    assert done.returncode == 2 and done.stderr.count("there is no run") == 1, done.stderr


@pytest.mark.parametrize(
    "framework, backend, name",
    [
        ("torch", "mpi", "SIGHUP"),
        ("torch", "gloo", "SIGINT"),
        case(
            "tensorflow",
            "mpi",
            "SIGINT",
            covered_by="torch; a signalled mpirun of TensorFlow in test_launcher_signals.py",
        ),
    ],
)
def test_a_terminals_signals_save_and_return_the_runs_code(
    framework: str, backend: str, name: str, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    command = [sys.executable, *RUN, "-np", "2", "--backend", backend, "--", "--framework", framework]
    command += ["--log.run", str(run), *SMALL, *ONE_LAYER, "--train.steps", "1000000"]
    streams = {"stderr": subprocess.PIPE, "text": True, "start_new_session": True}
    streams["preexec_fn"] = lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tester may use nohup
    fresh = environment(HVDLM_TEST_WARM="")  # ranks ask who has sent a signal, and to a fork its server would
    process = subprocess.Popen(command, cwd=ROOT, env=fresh, **streams)
    try:
        wait_until(lambda: (run / "metrics.jsonl").exists() and len(metrics(run)) > 2, 120, process)
        os.killpg(process.pid, getattr(signal, name))  # as a terminal does
        errors = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == STOPPED, errors
    assert f"hvdlm run: {name}: the run saves and stops" in errors and "Traceback" not in errors
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and (run / "checkpoints" / f"step-{status['step']:08d}").is_dir()


def test_a_killed_rank_is_named_and_fails_the_run(tmp_path: Path) -> None:
    run, script = tmp_path / "run", tmp_path / "kill.py"
    script.write_text(
        "import os, signal\nfrom hvdlm import hookimpl\nRANK = []\n"
        "@hookimpl\ndef hvdlm_run_started(world):\n    RANK.append(world.rank)\n"
        "@hookimpl\ndef hvdlm_step_ended(step):\n"
        "    if step == 3 and RANK == [1]:\n        os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    (tmp_path / "kill-1.dist-info").mkdir()
    (tmp_path / "kill-1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: kill\nVersion: 1\n")
    (tmp_path / "kill-1.dist-info" / "entry_points.txt").write_text("[hvdlm]\nkill = kill\n")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    options = ["--plugins", "[kill]", "--log.run", str(run), *SMALL, *STEPS]
    done = run_python([*RUN, "-np", "2", *options], PYTHONPATH=path)
    assert done.returncode == 1 and "rank 1" in done.stderr and "signal 9" in done.stderr, done.stderr


def test_a_terminal_shows_the_progress_bar(tmp_path: Path) -> None:
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read() -> None:
        try:
            while data := os.read(ours, 4096):
                shown.extend(data)
        except OSError:  # the other end is closed
            return

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    options = ["--log.run", str(tmp_path / "run"), *SMALL, "--train.steps", "40"]
    command = [sys.executable, *RUN, "-np", "2", "--", *options]
    done = subprocess.run(command, cwd=ROOT, env=environment(), stdin=theirs, stdout=theirs, timeout=120)
    os.close(theirs)
    reader.join(10)
    os.close(ours)
    assert done.returncode == 0 and b"40/40" in shown and b"step/s" in shown, bytes(shown)
