"""What only observes a run never ends it: figures, trackers, printed lines; exit code and status.json are true."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pluggy
import pytest

from builders import both_frameworks, file_names, read_json
from hvdlm import hookimpl, hookspecs
from hvdlm.config import Config
from hvdlm.errors import BAD_INPUT, FAILED, HvdlmError, RankError
from hvdlm.io.atomic_files import overwrite
from hvdlm.io.folder_identity import FolderIdentity
from hvdlm.io.terminal import SurvivingStream, surviving_streams
from hvdlm.telemetry.observers import EVENTS, Observers
from hvdlm_telemetry.append_file import AppendFile
from hvdlm_telemetry.metrics import Metrics
from hvdlm_telemetry.tensorboard import TensorBoard
from launching import ONE_LAYER, ROOT, SMALL, environment, launch, losses, run_python, with_step_hook

TRAIN = [*SMALL, *ONE_LAYER, "--train.warmup", "2", "--train.eval_every", "0"]


class Failing:
    """An event plugin that raises at every step."""

    def __init__(self, error: Exception, observer: bool | None = None) -> None:
        self.error = error
        self.calls: list[str] = []
        if observer is not None:
            self.observer = observer

    @hookimpl
    def hvdlm_step_ended(self, step: int) -> None:
        self.calls.append("step")
        raise self.error

    @hookimpl
    def hvdlm_run_ended(self) -> None:
        self.calls.append("end")


def protected(*plugins: object) -> tuple[Any, Observers]:
    """Return the hooks of ``plugins``, protected, and what reports their errors."""
    manager = pluggy.PluginManager("hvdlm")
    manager.add_hookspecs(hookspecs)
    for plugin in plugins:
        manager.register(plugin)
    observers = Observers(1)
    observers.protect_run(manager)
    return manager.hook, observers


def end_steps(hook: Any, count: int = 3) -> None:
    for step in range(1, count + 1):
        hook.hvdlm_step_ended(step=step, result=None, learning_rate=0.0, seconds=0.0, rates=None)
    hook.hvdlm_run_ended(summary={})


def test_every_event_hook_is_protected() -> None:
    hooks = [name for name in vars(hookspecs) if name.startswith("hvdlm_")]
    first = hooks.index("hvdlm_run_started")
    assert [f"hvdlm_{event}" for event in EVENTS] == hooks[first:]


def test_a_full_disk_or_lost_server_is_reported_once(capsys: pytest.CaptureFixture[str]) -> None:
    plugins = [Failing(OSError(28, "No space left on device")), Failing(ConnectionError("no route"))]
    hook, observers = protected(*plugins)
    end_steps(hook)
    printed = capsys.readouterr().err
    assert printed.count("hvdlm: rank 1: Failing: ") == 2 == len(observers.warnings)
    assert "No space left on device" in printed and "ConnectionError: no route. Training continues" in printed
    assert all(plugin.calls == ["step"] * 3 + ["end"] for plugin in plugins)  # it may recover


def test_an_observers_own_error_detaches_it_until_the_end(capsys: pytest.CaptureFixture[str]) -> None:
    plugin = Failing(ValueError("a wrong figure"), observer=True)
    hook, observers = protected(plugin)
    end_steps(hook)
    assert plugin.calls == ["step", "end"] and "test_observers.py:" in observers.warnings[0]
    assert capsys.readouterr().err.count("ValueError: a wrong figure") == 1


@pytest.mark.parametrize(
    "error, observer",
    [
        (ValueError("wrong"), None),
        (OSError("full"), False),
        (RankError("rank 0"), True),
        (HvdlmError("refused"), True),
        (type("HorovodInternalError", (RuntimeError,), {})("a rank has ended"), True),
    ],
)
def test_errors_that_concern_the_run_end_it(error: Exception, observer: bool | None) -> None:
    hook, _ = protected(Failing(error, observer))
    with pytest.raises(type(error)):
        end_steps(hook)


@pytest.fixture
def limit() -> Iterator[Callable[[int | None], None]]:
    """Return a function that limits the size of this process's files, as a full disk would; None: no limit."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)

    def set_limit(size: int | None) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (before[0] if size is None else size, before[1]))

    yield set_limit
    set_limit(None)


def test_records_wait_until_the_disk_has_space(tmp_path: Path, limit: Callable[[int | None], None]) -> None:
    file = AppendFile(tmp_path / "records")
    limit(10)
    file.write(b"first\n")
    for record in (b"second\n", b"third\n"):
        with pytest.raises(OSError, match="File too large"):
            file.write(record)
    assert (tmp_path / "records").read_bytes() == b"first\nseco"  # a prefix of what was written
    limit(None)
    file.write(b"fourth\n")
    file.close()
    assert (tmp_path / "records").read_bytes() == b"first\nsecond\nthird\nfourth\n"


def test_records_that_stay_lost_are_reported_at_the_end(tmp_path: Path, limit: Callable[[int | None], None]) -> None:
    file = AppendFile(tmp_path / "records")
    limit(3)
    with pytest.raises(OSError, match="File too large"):
        file.write(b"first\n")
    with pytest.raises(OSError, match="File too large"):
        file.close()
    config = Config()
    config.log.run = str(tmp_path)
    metrics = Metrics(config)
    metrics.hvdlm_run_started(config, SimpleNamespace(rank=0), {"start_step": 0})  # type: ignore[arg-type]
    with pytest.raises(OSError, match="File too large"):
        metrics.hvdlm_evaluated(1, {"val_loss": 1.0})
    with pytest.raises(RankError, match=r"summary\.json could not be written: File too large"):
        metrics.hvdlm_run_ended({"val_loss": 1.0})
    assert file_names(tmp_path) == ["metrics.jsonl", "records"]  # nothing temporary


def test_no_file_is_appended_to_through_a_link(tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("mine")
    (tmp_path / "link").symlink_to(tmp_path / "mine")
    for action in (lambda path: AppendFile(path), lambda path: overwrite(path, "x")):
        with pytest.raises(OSError, match="symbolic link"):
            action(tmp_path / "link")
    assert (tmp_path / "mine").read_text() == "mine"


def test_a_status_replaces_a_longer_one_in_place(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    path.write_text('{"state": "running", "warnings": ["long"]}\n')
    inode = path.stat().st_ino
    overwrite(path, '{"state": "failed"}\n')
    assert read_json(path) == {"state": "failed"} and path.stat().st_ino == inode


def test_tensorboard_events_outlive_a_full_disk(tmp_path: Path, limit: Callable[[int | None], None]) -> None:
    from tensorboard.backend.event_processing.event_file_loader import RawEventFileLoader

    config = Config()
    config.log.run = str(tmp_path)
    board = TensorBoard(config)
    board.hvdlm_run_started(config, SimpleNamespace(rank=0), {"start_step": 0, "parameters": 1})  # type: ignore[arg-type]
    (path,) = (tmp_path / "tensorboard").iterdir()
    limit(path.stat().st_size + 5)
    with pytest.raises(OSError, match="File too large"):
        board.hvdlm_evaluated(1, {"val_loss": 1.0})
    limit(None)
    board.hvdlm_evaluated(2, {"val_loss": 0.5})
    board.hvdlm_run_ended({})
    assert len(list(RawEventFileLoader(str(path)).Load())) == 4  # the file's version, its start, two evaluations


# Standard output


def test_a_stream_outlives_its_reader_and_any_text() -> None:
    errors: list[OSError] = []
    read_end, write_end = os.pipe()
    stream = os.fdopen(write_end, "w", encoding="ascii")
    output = SurvivingStream(stream, errors.append)
    print("π", file=output, flush=True)
    assert os.read(read_end, 100) == b"\\u03c0\n" and output.error is None
    os.close(read_end)
    for _ in range(3):
        print("nobody reads this", file=output, flush=True)
    assert len(errors) == 1 and output.reader_is_gone
    stream.close()
    print("closed", file=output, flush=True)


def test_closed_descriptors_lead_nowhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    code = (
        "import os, sys; from hvdlm.io.terminal import surviving_streams\n"
        "with surviving_streams():\n"
        f"    file = open({str(tmp_path / 'file')!r}, 'w'); os.write(1, b'a library')\n"
        "    print('text'); print('an error', file=sys.stderr)\n"
    )
    done = subprocess.run(["sh", "-c", f'exec {sys.executable} -c "$0" >&- 2>&-', code], cwd=ROOT, timeout=60)
    assert done.returncode == 0 and (tmp_path / "file").read_text() == ""
    monkeypatch.setattr(sys, "stdout", None)
    with surviving_streams():
        print("text", flush=True)
    assert sys.stdout is None


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a small run, trained without standard output, with ASCII as its encoding."""
    run = tmp_path_factory.mktemp("run") / "run"
    command = [sys.executable, "-m", "hvdlm", *TRAIN, "--log.run", str(run), "--train.steps", "4"]
    command += ["--data.tokenizer", "byte"]
    command += ["--log.sample_prompt", "π: ", "--log.sample_tokens", "20"]
    ascii_only = environment(PYTHONIOENCODING="ascii")
    done = subprocess.run(
        ["sh", "-c", 'exec "$@" >&-', "sh", *command], cwd=ROOT, env=ascii_only, capture_output=True, timeout=300
    )
    assert done.returncode == 0, done.stderr.decode()[-3000:]
    return run


def test_a_run_without_standard_output_is_complete(small_run: Path) -> None:
    assert read_json(small_run / "status.json")["state"] == "done" and len(losses(small_run)) == 4
    assert (small_run / "sample.txt").read_text(encoding="utf-8").startswith("π: ")


def test_text_beyond_ascii_is_escaped_where_it_must_be(small_run: Path) -> None:
    command = ["-m", "hvdlm", "generate", "--run", str(small_run), "--prompt", "π", "--tokens", "5"]
    done = run_python(command, PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stdout.startswith("\\u03c0"), done.stderr


def test_a_reader_that_has_enough_ends_a_command_quietly(small_run: Path) -> None:
    command = [sys.executable, "-m", "hvdlm", "generate", "--run", str(small_run), "--tokens", "1000000"]
    code = 'set -o pipefail; "$@" | head -c 20 >/dev/null'
    done = subprocess.run(
        ["bash", "-c", code, "bash", *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stderr) == (0, "")


def test_a_result_that_cannot_be_printed_is_a_failure(small_run: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "hvdlm", "generate", "--run", str(small_run), "--tokens", "5"],
            cwd=ROOT,
            env=environment(),
            stdout=full,
            stderr=subprocess.PIPE,
            text=True,
            timeout=120,
        )
    assert done.returncode == FAILED
    assert done.stderr == "hvdlm: standard output can't be written: No space left on device.\n"


# Whole runs


@pytest.mark.parametrize("target", ["| true", ">/dev/full"])
def test_training_outlives_the_reader_of_its_output(tmp_path: Path, target: str) -> None:
    run = tmp_path / "run"
    command = [sys.executable, "-m", "hvdlm", *TRAIN, "--train.steps", "20", "--log.run", str(run)]
    code = f'set -o pipefail; "$@" {target}'
    done = subprocess.run(
        ["bash", "-c", code, "bash", *command], cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0 and done.stderr.count("can't be written") == 1, done.stderr
    status = read_json(run / "status.json")
    assert status["state"] == "done" and "Training continues without it." in status["warnings"][0]
    assert len(losses(run)) == 20 and (run / "summary.json").is_file()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """Return a folder on a file system of 4 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(folder)]
    if subprocess.run(command, capture_output=True, timeout=60).returncode:
        pytest.skip("only root can mount a small file system: other tests limit the size of files instead")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


FILL = """
        filler = os.path.join({folder!r}, "filler")
        if step == 5:
            with open(filler, "wb", buffering=0) as file:
                try:
                    while True:
                        file.write(bytes(4096))
                except OSError:
                    pass
        if step == {free_at}:
            os.unlink(filler)"""


def train_on_full_disk(framework: str, disk: Path, free_at: int) -> subprocess.CompletedProcess[str]:
    """Train 60 steps on a disk that is full after the fifth and has space again after step ``free_at``."""
    action = FILL.format(folder=str(disk), free_at=free_at).strip()
    options = ["--framework", framework, "--log.run", str(disk / "run"), "--log.tensorboard", "true", *TRAIN]
    return run_python([*with_step_hook(action), *options, "--train.steps", "60", "--checkpoint.every", "0"])


@both_frameworks
def test_figures_are_complete_once_a_full_disk_has_space(framework: str, disk: Path) -> None:
    done = train_on_full_disk(framework, disk, 50)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stderr.count("Metrics: OSError") == 1 == done.stderr.count("TensorBoard: OSError")
    status = read_json(disk / "run" / "status.json")
    assert status["state"] == "done" and len(status["warnings"]) == 2 and len(losses(disk / "run")) == 60


def test_a_disk_that_stays_full_fails_with_a_sentence(disk: Path) -> None:
    done = train_on_full_disk("torch", disk, 0)
    assert done.returncode == FAILED and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert "hvdlm: rank 0 failed: RankError: the checkpoint" in done.stderr, done.stderr
    status = read_json(disk / "run" / "status.json")
    assert (status["state"], status["step"], status["code"]) == ("failed", 60, FAILED)
    lines = (disk / "run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines[:-1]] == list(range(1, len(lines)))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_disk_that_is_full_at_the_start_refuses_the_run(ranks: int, disk: Path) -> None:
    try:
        (disk / "filler").write_bytes(bytes(2**23))
    except OSError:
        pass
    done = launch("mpirun", ranks, ["-m", "hvdlm", *TRAIN, "--train.steps", "2", "--log.run", str(disk / "run")])
    assert done.returncode == BAD_INPUT and "Traceback" not in done.stderr, done.stderr
    assert done.stderr.count("can't be written: No space left on device: free space or choose another") == 1


# A folder that disappears


def test_a_folder_is_recognised(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert FolderIdentity(folder).is_same()  # not here: on another node
    folder.mkdir()
    identity = FolderIdentity(folder)
    (folder / "file").touch()
    assert identity.is_same()
    folder.rename(tmp_path / "moved")
    assert not identity.is_same()
    folder.mkdir()
    with pytest.raises(RankError, match="was removed, renamed or replaced while the run wrote to it"):
        identity.check()


@both_frameworks
@pytest.mark.parametrize("action", ["shutil.rmtree(RUN)", "os.rename(RUN, RUN + '-moved')"])
def test_a_run_whose_folder_disappears_fails(framework: str, action: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    hook = with_step_hook(f"if step == 3: import shutil; {action.replace('RUN', repr(str(run)))}")
    options = ["--framework", framework, *TRAIN, "--train.steps", "8", "--log.run", str(run)]
    done = run_python([*hook, *options])
    assert done.returncode == FAILED and "Traceback" not in done.stderr, done.stderr[-3000:]
    assert f"the run's folder {run} was removed, renamed or replaced" in done.stderr, done.stderr[-3000:]
    assert not (run / "status.json").exists() and not (run / "checkpoints").exists()
    moved = tmp_path / "run-moved" / "status.json"
    assert not moved.exists() or read_json(moved)["state"] == "running"
