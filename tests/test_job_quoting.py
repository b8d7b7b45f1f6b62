"""Every word of a job file stays a word: nothing that a user or a file gives is executed, or read as a directive."""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from builders import write_executable
from hvdlm import cli
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_launchers.launch import find
from hvdlm_launchers.schedulers.job import Job, check
from launching import environment

MARK = "touch${IFS}executed"
HOSTILE = [
    f"x;{MARK};",
    f"x|{MARK}",
    f"$({MARK})",
    f"`{MARK}`",
    f"';{MARK};'",
    f'";{MARK};"',
    f"x\n#BSUB -x\n{MARK}\n",
    "tab\tand\x1b[2Jescape \\",
    "not utf-8 \udcff\udc80",
    "* ~ ! # {a,b} $HOME $$ $$(HOME) $(HOME)",
    "-x",
    "",
]
BATCH = ("slurm", "pbs", "lsf")
OPTIONS = ("mpi", "queue", "account", "log", "image", "name")


def written(scheduler: str, arguments: list[str], config: Config | None = None, **options: Any) -> str:
    """Return the script of a job, on Kubernetes that of its launcher."""
    pod = {"image": "a:1", "volumes": ["claim:/data"]} if scheduler == "kubernetes" else {}
    job = Job(scheduler=scheduler, **{"time": "01:00:00", **pod, **options})
    check(job)
    text = find(scheduler).write(job, arguments, config or Config())
    if scheduler != "kubernetes":
        return text
    replicas = list(yaml.safe_load_all(text))[-1]["spec"]["mpiReplicaSpecs"]
    code = str(replicas["Launcher"]["template"]["spec"]["containers"][0]["command"][2])
    # As Kubernetes expands the command: $$ is a dollar sign, $(NAME) a variable of the container.
    return re.sub(r"\$(\$|\((\w+)\))", lambda m: "$" if m[1] == "$" else f"<variable {m[2]}>", code)


def ran(text: str, folder: Path) -> list[bytes]:
    """Run a script with stubs of the programs that it starts; return the words that its launcher got."""
    for name in ("srun", "mpirun"):
        write_executable(folder / "bin" / name, "printf '%s\\0' \"$@\" > words")
    for name in ("apptainer", "scontrol", "qsub", "module"):
        write_executable(folder / "bin" / name, "exit 0")
    (folder / "job").write_text(text, encoding="utf-8")
    nodes = {"PBS_NODEFILE": "/dev/null", "LSB_DJOB_HOSTFILE": "/dev/null", "PBS_O_WORKDIR": str(folder)}
    variables = environment(**nodes, SLURM_JOB_ID="1", HOME=str(folder))
    variables["PATH"] = f"{folder / 'bin'}:{variables['PATH']}"
    done = subprocess.run(["bash", "job"], cwd=folder, env=variables, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return (folder / "words").read_bytes().split(b"\0")


@pytest.mark.parametrize("scheduler", [*BATCH, "kubernetes"])
def test_options_of_train_reach_the_ranks_as_they_are(scheduler: str, tmp_path: Path) -> None:
    given = [word for value in HOSTILE for word in ("--log.sample_prompt", value)]
    config = Config()
    config.checkpoint.resume = HOSTILE[6] + HOSTILE[7]
    text = written(scheduler, given, config)
    words = ran(text, tmp_path)
    first = words.index(b"--log.sample_prompt")
    assert words[first : first + len(given)] == [os.fsencode(word) for word in given]
    assert words[words.index(b"--checkpoint.resume") + 1] == os.fsencode(config.checkpoint.resume)
    assert not (tmp_path / "executed").exists()
    head = text.partition("set -uo pipefail")[2]
    assert not re.search(r"^#(SBATCH|PBS|BSUB)", head, re.M)


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("scheduler", BATCH)
def test_words_of_the_job_are_refused_or_not_executed(scheduler: str, option: str, tmp_path: Path) -> None:
    refused = 0
    for number, value in enumerate(HOSTILE):
        folder = tmp_path / str(number)
        try:
            text = written(scheduler, [], **{option: value})
        except HvdlmError as error:
            assert f"--{option}: got " in str(error) and str(error).isprintable()
            refused += 1
            continue
        ran(text, folder)
        assert not (folder / "executed").exists()
    assert refused == len(HOSTILE)


@pytest.mark.parametrize("value", ["a b:/c", "-x:/c", "a\x1b:/c", "a\n:/c", "a:/c,d", "a"])
def test_volumes_with_other_characters_are_refused(value: str) -> None:
    with pytest.raises(HvdlmError, match=r"--volumes: got .*expected SOURCE:/FOLDER"):
        written("slurm", [], image="a.sif", volumes=[value])


def test_quoted_volumes_are_passed_to_the_container(tmp_path: Path) -> None:
    volume = f"/a;{MARK};$({MARK}):/b`{MARK}`"
    words = ran(written("slurm", [], image="a.sif", volumes=[volume]), tmp_path)
    assert words[words.index(b"--bind") + 1] == volume.encode() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "options, sentence",
    [
        ({"volumes": ["Claim_1:/data"]}, "--volumes: got 'Claim_1'; Kubernetes names claims"),
        ({"queue": "a/b"}, "--queue: got 'a/b'"),
        ({"queue": "a@b"}, "--queue: got 'a@b'; a queue of Kueue"),
        ({"name": "a\n"}, "--name: got 'a\\\\n'"),
    ],
)
def test_kubernetes_names_follow_its_rules(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(HvdlmError, match=sentence):
        written("kubernetes", [], **options)


def test_names_of_bundled_files_follow_kubernetes_rules(tmp_path: Path) -> None:
    arguments = []
    for name in ("..a b.yaml", "\u0434\u0430.yaml"):
        (tmp_path / name).write_text("train: {steps: 5}\n")
        arguments += ["--config", str(tmp_path / name)]
    job = Job(scheduler="kubernetes", image="a:1", volumes=["claim:/data"])
    files = next(yaml.safe_load_all(find("kubernetes").write(job, arguments, Config())))["data"]
    assert list(files) == ["-a-b.yaml", "--.yaml"]


@pytest.mark.parametrize("line", ["a\nb", "a\rb", "a\x1bb", " ", "a\u2028b"])
@pytest.mark.parametrize("option", ["setup", "directives"])
def test_lines_with_control_characters_are_refused(option: str, line: str) -> None:
    with pytest.raises(HvdlmError, match=f"--{option}: got .*expected a list of single lines"):
        written("slurm", [], **{option: [line]})


@pytest.mark.parametrize("scheduler", [*BATCH, "kubernetes"])
def test_set_up_lines_may_use_variables_that_are_unset(scheduler: str, tmp_path: Path) -> None:
    """Environment modules and activation scripts do; what follows them may not."""
    text = written(scheduler, [], setup=['echo "$NOT_SET$$" > set-up', "false | true"])
    assert ran(text, tmp_path) and (tmp_path / "set-up").read_text().strip().isdigit()
    assert text.index("set-up") < text.index("set -uo pipefail") < text.index("OMP_NUM_THREADS")


def test_launch_refuses_a_command_as_mpi_type(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["launch", "--scheduler", "slurm", "--mpi", f"x;{MARK}", "--", "train"]) == 2
    assert "hvdlm: --mpi: got 'x;touch${IFS}executed', expected one word" in capsys.readouterr().err
