"""The supervisor restarts failed runs from their checkpoints, passes signals on, and leaves no process behind."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from builders import write_executable
from hvdlm import cli
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.training.signals import LAUNCHER_ENDS
from hvdlm_launchers import hosts
from hvdlm_launchers.process_tree import MARK
from hvdlm_launchers.run_status import RunStatus, outcome
from hvdlm_launchers.supervise import _REPEAT_SECONDS
from hvdlm_launchers.train_command import option_value, train_arguments
from launching import ONE_LAYER, ROOT, SMALL, environment, losses, run_python, wait_until, with_step_hook
from launching import STEPS as ALL_STEPS

STEPS = (*ALL_STEPS, *ONE_LAYER)
# A stand-in for a run: attempt n executes the nth statement of a plan.
FAKE = """
import json, os, shutil, signal, subprocess, sys, time
from pathlib import Path

run = Path(sys.argv[sys.argv.index("--log.run") + 1])
run.mkdir(exist_ok=True)
with (run / "attempts").open("a") as file:
    file.write(json.dumps(sys.argv[2:]) + "\\n")
number = len((run / "attempts").read_text().splitlines())

def save(step, sequence=None):
    folder = run / "checkpoints" / f"step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    manifest = {"format": "hvdlm-checkpoint-3", "sequence": step if sequence is None else sequence}
    (folder / "manifest.json").write_text(json.dumps(manifest))

def status(state, step=0, reason=None):
    (run / "status.new").write_text(json.dumps({"state": state, "step": step, "reason": reason, "time": time.time()}))
    os.replace(run / "status.new", run / "status.json")

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def on(number, action):
    signal.signal(number, lambda *_: action())

exec(json.loads(sys.argv[1])[number - 1])
"""
SAVES = "on(signal.SIGUSR1, lambda: (save(7), status('stopped', 7), sys.exit(75))); status('running'); time.sleep(60)"


@pytest.fixture
def fake(tmp_path: Path) -> Path:
    (tmp_path / "fake.py").write_text(FAKE)
    return tmp_path / "fake.py"


class SupervisedRun:
    """A supervised stand-in for a run, and the files in its folder."""

    def __init__(self, fake: Path, plan: list[str], options: str = "", *arguments: str) -> None:
        self.folder = fake.parent / "run"
        supervise = ["supervise", "--backoff", "0.05", *shlex.split(options), "--"]
        self.command = [sys.executable, str(fake), json.dumps(plan), "--log.run", str(self.folder), *arguments]
        self.arguments = [*supervise, *self.command]

    def supervise(self) -> int:
        return cli.main(self.arguments)

    @property
    def attempts(self) -> list[list[str]]:
        """The arguments of every attempt, without those that the command had."""
        lines = (self.folder / "attempts").read_text().splitlines()
        return [json.loads(line)[len(self.command) - 3 :] for line in lines]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "supervise.jsonl").read_text().splitlines()]


AGAIN = ["--checkpoint.resume", "auto", "--log.overwrite", "false"]


def test_a_killed_run_resumes_from_its_newest_checkpoint(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    plan = ["save(20); print('a word', file=sys.stderr); die()", "save(30); status('done', 30)"]
    supervised = SupervisedRun(fake, plan)
    assert supervised.supervise() == 0
    assert supervised.attempts == [[], AGAIN]
    first, second = supervised.records
    assert (first["attempt"], first["code"], first["state"], first["reason"]) == (1, 137, "failed", "SIGKILL")
    assert (first["step_before"], first["step_after"]) == (0, 20) and first["command"] == supervised.command
    assert (second["state"], second["step_before"], second["step_after"]) == ("done", 20, 30)
    printed = capfd.readouterr().err.splitlines()
    assert printed[0] == "a word"
    assert (
        printed[1].startswith("hvdlm supervise: attempt 1 failed after ") and "the checkpoint of step 20" in printed[1]
    )
    assert printed[2].startswith("hvdlm supervise: attempt 2 done after ") and len(printed) == 3


def test_a_run_with_a_checkpoint_is_never_overwritten(fake: Path) -> None:
    supervised = SupervisedRun(fake, ["save(10); die()", "pass"], "--max_failures 1", "--log.overwrite", "true")
    (supervised.folder / "checkpoints" / "step-00000010").mkdir(parents=True)
    (supervised.folder / "checkpoints" / "step-00000010" / "manifest.json").write_text("{}")
    assert supervised.supervise() == 1
    assert supervised.attempts == [AGAIN]


def test_an_occupied_folder_is_refused_by_the_run(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    supervised = SupervisedRun(fake, ["print('hvdlm: it holds a run already', file=sys.stderr); sys.exit(2)", "pass"])
    supervised.folder.mkdir()
    (supervised.folder / "config.yaml").touch()
    assert supervised.supervise() == 2
    assert supervised.attempts == [[]] and "refused" in capfd.readouterr().err
    assert (supervised.records[0]["state"], supervised.records[0]["reason"]) == ("refused", "it holds a run already")


def test_progress_resets_the_count_of_failures(fake: Path) -> None:
    plan = ["die()", "die()", "save(5); die()", "die()", "status('failed', 9, 'a lamp is out'); sys.exit(1)"]
    supervised = SupervisedRun(fake, [*plan, "die()", "sys.exit(3)", "die()"])
    assert supervised.supervise() == 1
    delays = [float(record["next"].split()[2]) for record in supervised.records[:-1]]
    assert delays == [0.05, 0.1, 0.05, 0.05, 0.05, 0.05, 0.1]
    assert "given up" in supervised.records[-1]["next"] and len(supervised.attempts) == 8
    assert supervised.records[4]["reason"] == "a lamp is out"


def test_a_run_that_stopped_itself_is_not_restarted(fake: Path) -> None:
    supervised = SupervisedRun(fake, ["save(3); status('stopped', 3, 'train.max_seconds'); sys.exit(75)", "pass"])
    assert supervised.supervise() == 75
    assert len(supervised.attempts) == 1 and supervised.records[0]["reason"] == "train.max_seconds"


@pytest.mark.parametrize(
    "code, status, errors, state",
    [
        (0, {}, [], "done"),
        (75, {}, [], "stopped"),
        (2, {"state": "running"}, [], "refused"),
        (0, {"state": "running"}, [], "failed"),
        (137, {"state": "running"}, [], "failed"),
        (1, {"state": "stopped"}, [], "stopped"),
        (1, {"state": "done"}, [], "done"),
        (1, {"state": "refused"}, [], "refused"),
        (1, {}, ["Process name: 0", "Exit code: 75"], "stopped"),
        (1, {}, ["Process name: 0", "Exit code: 2"], "refused"),
        (1, {}, ["Process name: 0", "Exit code: 1"], "failed"),
    ],
)
def test_outcomes_are_recognised_behind_launchers(
    code: int, status: dict[str, Any], errors: list[str], state: str
) -> None:
    assert outcome(code, status, errors)[0] == state


@pytest.mark.parametrize("content", ['{"state": ["done"]}', '{"step": true}', '{"step": -1}', "[1]", "{", "[" * 9999])
def test_a_damaged_status_counts_as_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "status.json").write_text(content)
    assert RunStatus.of(tmp_path).status == {} and RunStatus.of(tmp_path).step == 0


def test_the_best_known_reason_of_a_failure_is_given() -> None:
    raised = ["Traceback (most recent call last):", "[1,0]<stderr>:ValueError: the lamp is out", "mpirun has ended it"]
    own = ["hvdlm: rank 1 failed: RankError: no light", *raised]
    assert [outcome(1, {}, lines)[1] for lines in ([], raised, own)] == ["", raised[1], own[0][7:]]
    assert outcome(1, {"state": "failed", "reason": "it is dark"}, own) == ("failed", "it is dark")
    assert outcome(1, {"state": "interrupted", "reason": "signal"}, own) == ("failed", own[0][7:])
    noticed = "mpirun noticed that process rank 1 with PID 0 on node b exited on signal 9 (Killed)."
    asked = "hvdlm: rank 0: SIGTERM: the run saves after this step and stops; once more stops at once"
    assert outcome(137, {}, [*own, asked, noticed])[1] == "rank 1 on b: SIGKILL"
    for line in (asked, f"hvdlm: {LAUNCHER_ENDS}: ranks are killed in 2 s"):
        assert outcome(137, {}, [line])[1] == "SIGKILL" and outcome(137, {}, [*own, line])[1] == own[0][7:]
    assert outcome(139, {}, [])[1] == "SIGSEGV" and outcome(255, {}, [])[1] == ""


def test_run_folders_are_read_defensively(tmp_path: Path) -> None:
    for name in ("step-00000009", "step-00000010", "step-100000000", "step-00000020", "step-xx"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    for name in ("step-00000009", "step-00000010"):
        (tmp_path / "checkpoints" / name / "manifest.json").touch()
    for text in ("[1]", '{"step": "a"}', "{", "[" * 10000, '{"step": true}', " " * 2**21):
        (tmp_path / "status.json").write_text(text)
        assert RunStatus.of(tmp_path).step == 10
    (tmp_path / "checkpoints" / "step-100000000" / "manifest.json").touch()
    assert RunStatus.of(tmp_path).checkpoint == 10**8
    assert RunStatus.of(tmp_path / "none") == RunStatus(None, -1, {})


def test_a_given_checkpoint_counts_until_a_newer_exists(fake: Path) -> None:
    supervised = SupervisedRun(fake, ["die()", "save(8); die()", "pass"], "", "--checkpoint.resume", "other/run")
    assert supervised.supervise() == 0
    assert supervised.attempts == [[], AGAIN[2:], AGAIN]


def test_a_run_that_goes_back_resumes_from_what_it_saved(fake: Path) -> None:
    """Later steps of before don't count: not as what to resume from, nor as progress."""
    back = "shutil.rmtree(run / 'checkpoints' / 'step-00000040', True); "
    plan = ["save(20, 4); save(40, 8); status('done', 40)", "die()", back + "die()", "save(25, 9); die()", "die()"]
    plan += ["die()", "save(30, 10); die()", "save(35, 11); status('stopped', 35); sys.exit(75)"]
    SupervisedRun(fake, plan).supervise()
    path = str(fake.parent / "run" / "checkpoints" / "step-00000020")
    supervised = SupervisedRun(fake, plan, "", "--checkpoint.resume", path)
    assert supervised.supervise() == 75
    attempts = [json.loads(line) for line in (supervised.folder / "attempts").read_text().splitlines()]
    named = [*supervised.command[3:], *AGAIN[2:]]
    newest = [*supervised.command[3:], *AGAIN]
    assert attempts[1:] == [named, named, named, newest, newest, newest, newest]
    assert [record["next"].split()[-1] for record in supervised.records[1:5]] == ["40", "20", "25", "25"]
    assert supervised.records[-1]["next"] == "the command with --checkpoint.resume auto resumes it"


def test_options_are_found_in_commands_and_their_files(tmp_path: Path) -> None:
    file = tmp_path / "a.yaml"
    file.write_text("log:\n  run: there\n")
    assert option_value(["mpirun", "--log.run", "a", "--log.run=b"], "log.run") == "b"
    assert option_value(["x", "--config", str(file)], "log.run") == "there"
    assert option_value(["x", f"--config={file}", "--log.run", "here"], "log.run") == "here"
    assert option_value(["x", "--log.run", "here", "--config", str(file)], "log.run") == "there"
    assert option_value(["x", "--log.run"], "log.run") == "" and option_value(["x"], "log.run") is None
    with pytest.raises(HvdlmError, match="No such file"):
        option_value(["x", "--config", str(tmp_path / "none.yaml")], "log.run")
    assert train_arguments(["mpirun", "python", "-m", "hvdlm", "train", "--a"]) == ["--a"]
    assert train_arguments(["python", "-m", "hvdlm", "--a"]) == ["--a"]
    assert train_arguments(["python", "-m", "hvdlm", "evaluate"]) is None and train_arguments(["true"]) is None


REFUSED = [
    ("", "no command"),
    ("--elastic true -- true", "not offered"),
    ("--max_failures 0 -- true", "--max_failures: got 0"),
    ("--backoff -1 -- true", "--backoff: got -1.0"),
    ("--backof 1 -- true", "did you mean --backoff"),
    ("-- bash -c 'python -m hvdlm'", '"$@"'),
    ("-- mpirun -np {np} python -m hvdlm", "need --host_discovery_script"),
    ("--host_discovery_script true -- mpirun python", "neither {np} nor {hosts}"),
    ("--host_discovery_script /no/script -- mpirun -np {np} python", "there is no such program"),
    ("--host_discovery_script true -- mpirun -np {np} python -m hvdlm --trian.steps 3", "--train.steps"),
    ("-- /no/such/program", "can't be started"),
]


@pytest.mark.parametrize("arguments, words", REFUSED)
def test_bad_input_is_refused_in_one_sentence(
    arguments: str, words: str, capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main(["supervise", *shlex.split(arguments)]) == 2
    error = capfd.readouterr().err
    assert error.startswith("hvdlm: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_supervise_under_a_launcher_is_refused(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert cli.main(["supervise", "--", "true"]) == 2
    assert "not the other way round" in capfd.readouterr().err


OURS = "HVDLM_TEST_PROCESS"


@pytest.fixture(autouse=True)
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mark all that these tests start: another process of the suite may supervise something at the same time."""
    monkeypatch.setenv(OURS, str(os.getpid()))


def supervised_processes() -> list[psutil.Process]:
    """Return all processes that a supervised command of these tests has started."""
    processes = []
    for process in psutil.process_iter():
        try:
            environ = process.environ()
            processes += [process] if MARK in environ and environ.get(OURS) == str(os.getpid()) else []
        except (psutil.Error, OSError):
            continue
    return processes


ORPHAN = "orphan = subprocess.Popen(['sleep', '98765'], start_new_session=True); "


def test_an_attempt_leaves_no_processes_behind(fake: Path) -> None:
    supervised = SupervisedRun(
        fake, [ORPHAN + "(run / 'pid').write_text(str(orphan.pid)); die()", "pass"], "--max_failures 1"
    )
    assert supervised.supervise() == 1
    pid = int((supervised.folder / "pid").read_text())
    assert not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    assert not supervised_processes()


@pytest.fixture
def start_supervised(fake: Path) -> Iterator[Any]:
    """Return a function that supervises a fake run in a process of its own, as soon as it has begun."""
    started: list[subprocess.Popen[str]] = []

    def start(*plan: str, begun: str = "status.json", options: str = "") -> tuple[subprocess.Popen[str], SupervisedRun]:
        supervised = SupervisedRun(fake, list(plan), options)
        command = [sys.executable, "-m", "hvdlm", *supervised.arguments]
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup, a child would ignore it as pytest does
        fresh = environment(HVDLM_TEST_WARM="")  # it ends the tree of its processes, to which no fork belongs
        started.append(subprocess.Popen(command, cwd=ROOT, env=fresh, stderr=subprocess.PIPE, text=True))
        signal.signal(signal.SIGHUP, before)
        wait_until((supervised.folder / begun).exists, 30, started[-1])
        return started[-1], supervised

    yield start
    for process in started:
        process.kill()
        process.communicate(timeout=30)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP])
def test_a_signal_makes_the_run_save_and_stop(start_supervised: Any, number: signal.Signals) -> None:
    process, supervised = start_supervised(SAVES, "pass")
    process.send_signal(number)
    process.send_signal(number)  # what comes at once is one signal
    assert process.wait(20) == 75
    assert len(supervised.attempts) == 1 and supervised.records[0]["step_after"] == 7
    assert not supervised_processes()


def test_a_second_signal_ends_the_whole_tree_at_once(start_supervised: Any) -> None:
    process, supervised = start_supervised(
        "on(signal.SIGTERM, int); on(signal.SIGUSR1, int); "
        + ORPHAN
        + "status('running'); time.sleep(60); time.sleep(60)"
    )
    process.send_signal(signal.SIGTERM)
    time.sleep(_REPEAT_SECONDS + 0.3)  # what comes sooner counts as the same signal
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 143
    assert time.monotonic() - began < 10
    assert not supervised_processes() and supervised.records[-1]["next"] == "ended at once"


def test_a_signal_before_the_run_has_begun_loses_nothing(start_supervised: Any) -> None:
    process, supervised = start_supervised("time.sleep(60)", "pass", begun="attempts")
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert len(supervised.attempts) == 1 and "nothing is lost" in supervised.records[0]["next"]
    assert not supervised_processes()


def test_a_signal_between_attempts_ends_at_once(start_supervised: Any) -> None:
    process, supervised = start_supervised(
        "status('running'); die()", "pass", begun="supervise.jsonl", options="--backoff 60"
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(5) == 75 and len(supervised.attempts) == 1


def test_a_run_that_fails_to_stop_is_reported(start_supervised: Any) -> None:
    process, supervised = start_supervised(
        "on(signal.SIGUSR1, lambda: sys.exit(1)); status('running'); time.sleep(60)", "pass"
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 1 and "did not save" in supervised.records[0]["next"]


def test_a_run_starts_on_reachable_hosts(fake: Path) -> None:
    """The second attempt finds other hosts than the first; c never answers, localhost is not asked."""
    write_executable(
        fake.parent / "hosts", f"echo a:2; echo c:8; test -e {fake.parent}/run && echo localhost:1 || echo b:2"
    )
    options = f"--host_discovery_script {fake.parent}/hosts --probe 'test {{host}} != c'"
    supervised = SupervisedRun(fake, ["die()", "pass"], options, "-H", "{hosts}", "-np", "{np}")
    supervised.command = supervised.command[:-4]
    assert supervised.supervise() == 0
    assert [arguments[:4] for arguments in supervised.attempts] == [
        ["-H", "a:2,b:2", "-np", "4"],
        ["-H", "a:2,localhost:1", "-np", "3"],
    ]
    assert supervised.records[1]["hosts"] == {"a": 2, "localhost": 1} and supervised.records[1]["np"] == 3


def test_waiting_for_hosts_is_limited(fake: Path, capfd: pytest.CaptureFixture[str]) -> None:
    write_executable(fake.parent / "hosts", "echo c:8")
    options = f"--host_discovery_script {fake.parent}/hosts --probe false --max_wait 0.5 --backoff 0.1"
    supervised = SupervisedRun(fake, [], options, "{np}")
    assert supervised.supervise() == 1
    printed = capfd.readouterr().err
    assert printed.count("asking again in") == 2 and "giving up: no hosts to start on for 0.5 s" in printed
    assert supervised.records[-1]["next"] == "given up"


def test_discovered_hosts_have_horovodruns_format(tmp_path: Path) -> None:
    def printed(text: str, slots: int | None = None) -> dict[str, int]:
        return hosts.discover([(write_executable(tmp_path / "s", text))], slots)

    assert printed("echo a:2; echo; echo ' b.c-d:13 '") == {"a": 2, "b.c-d": 13}
    assert printed("echo a; echo b:3", 4) == {"a": 4, "b": 3}
    for text in ("echo a", "echo a:b", "echo -oProxyCommand=x:1", "echo 'a b:1'", "exit 3"):
        with pytest.raises(hosts.NoHosts, match=r"host-discovery script (printed|ended with code 3)"):
            printed(text)
    with pytest.raises(hosts.NoHosts, match="longer than"):
        hosts.discover([(write_executable(tmp_path / "s", "sleep 1234 & sleep 1234"))], 1, timeout=0.3)
    wait_until(lambda: not [p for p in psutil.process_iter(["cmdline"]) if p.info["cmdline"] == ["sleep", "1234"]], 10)


@pytest.mark.parametrize(
    "slots, expected, options",
    [
        (5, 4, {"train.batch_size": 32}),
        (5, 5, {"train.batch_size": 30}),
        (7, 6, {"train.batch_size": 12, "parallel.tensor": 2}),
        (7, 4, {"train.batch_size": 8, "train.micro_batch_size": 2}),
        (7, 2, {"train.batch_size": 8, "train.micro_batch_size": 4}),
        (7, 4, {"train.batch_size": 24, "parallel.data": 4}),
        (7, 4, {"train.batch_size": 60, "communication.reduction": "adasum"}),
        (1, 0, {"parallel.pipeline": 2}),
        (3, 0, {"parallel.data": 4}),
    ],
)
def test_as_many_ranks_start_as_the_layout_allows(slots: int, expected: int, options: dict[str, Any]) -> None:
    config = Config()
    for key, value in options.items():
        section, name = key.split(".")
        setattr(getattr(config, section), name, value)
    if expected:
        assert hosts.usable_ranks(slots, config, 1) == expected
    else:
        with pytest.raises(hosts.NoHosts):
            hosts.usable_ranks(slots, config, 1)
    with pytest.raises(hosts.NoHosts):
        hosts.usable_ranks(slots, config, slots + 1)
    assert hosts.usable_ranks(slots, None, 1) == slots


# Once the checkpoint of step 20 has been published, which takes some steps and its time.
KILLED_ONCE = """published = os.path.isdir("{run}/checkpoints/step-00000020")
        if step > 20 and not published:
            time.sleep(0.2)
        if step >= 25 and published and self.world.rank == 1 and not os.path.exists("{marker}"):
            open("{marker}", "w").close()
            os.kill(os.getpid(), signal.SIGKILL)"""


def test_a_killed_rank_is_restarted_bit_for_bit(curve: Any, tmp_path: Path) -> None:
    write_executable(tmp_path / "hosts", "echo localhost:2")
    command = ["-m", "hvdlm", "supervise", "--backoff", "0.1", "--host_discovery_script", str(tmp_path / "hosts"), "--"]
    command += ["mpirun", "--bind-to", "none", "-H", "{hosts}", "-np", "{np}", sys.executable]
    command += with_step_hook(KILLED_ONCE.format(marker=tmp_path / "killed", run=tmp_path / "run"))
    options = ["--framework", "torch", *SMALL, *STEPS, "--checkpoint.every", "10", "--log.run", str(tmp_path / "run")]
    done = run_python([*command, *options])
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line for line in done.stderr.splitlines() if line.startswith("hvdlm supervise: ")]
    assert len(lines) == 2 and "SIGKILL; restart in 0.1 s with the checkpoint of step 20" in lines[0], lines
    assert losses(tmp_path / "run") == losses(curve("torch", 2, *STEPS))
    assert not supervised_processes()


SRUN = """trap 'touch signalled; exit {code}' USR1
echo "$@" > started
{rest}"""


@pytest.mark.parametrize("code, requeued", [(75, True), (0, False), (1, False)])
@pytest.mark.parametrize("signalled", [True, False])
def test_the_slurm_script_requeues_only_saved_runs(code: int, requeued: bool, signalled: bool, tmp_path: Path) -> None:
    rest = "while :; do sleep 0.05; done" if signalled else f"exit {code}"
    write_executable(tmp_path / "srun", SRUN.format(code=code, rest=rest))
    write_executable(tmp_path / "scontrol", 'echo "$@" > requeued')
    env = environment(SLURM_JOB_ID="17")
    env["PATH"] = f"{tmp_path}:{env['PATH']}"
    command = ["bash", str(ROOT / "examples" / "cluster" / "slurm.sbatch"), "--log.run", "runs/a b"]
    job = subprocess.Popen(command, cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True)
    try:
        if signalled:
            wait_until((tmp_path / "started").exists, process=job)
            job.send_signal(signal.SIGUSR1)
        assert job.wait(20) == code
    finally:
        job.kill()
        job.communicate(timeout=30)
    assert (
        (tmp_path / "started")
        .read_text()
        .endswith("-m hvdlm --train.threads 8 --log.run runs/a b --checkpoint.resume auto\n")
    )
    assert (tmp_path / "signalled").exists() == signalled
    assert (tmp_path / "requeued").exists() == requeued
    assert not requeued or (tmp_path / "requeued").read_text() == "requeue 17\n"
