"""Machines without an ssh client, ps, a home folder, a passwd entry or an address for their own name."""

from __future__ import annotations

import os
import pwd
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from hvdlm.io import user_folders
from hvdlm_horovod import local_launch
from launching import ONE_LAYER, ROOT, SMALL, environment

RUN = ["-m", "hvdlm", *SMALL, *ONE_LAYER, "--train.steps", "2"]
# A user id without a passwd entry or groups, but with permission to read: the interpreter may lie in root's home.
UNKNOWN_USER = ["setpriv", "--reuid=54321", "--regid=54321", "--clear-groups"]
UNKNOWN_USER += ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]
UNRESOLVABLE = ["unshare", "--uts", "sh", "-c", 'echo no-such-host > /proc/sys/kernel/hostname; exec "$@"', "sh"]


def works(command: list[str]) -> bool:
    try:
        return subprocess.run([*command, "true"], capture_output=True, timeout=10).returncode == 0
    except FileNotFoundError:
        return False


unknown_user = pytest.mark.skipif(not works(UNKNOWN_USER), reason="needs root and setpriv")
unresolvable = pytest.mark.skipif(not works(UNRESOLVABLE), reason="needs root and unshare")


@pytest.fixture(scope="module")
def bare_path(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return a PATH without ssh, rsh, ps and hostname, which slim containers lack."""
    folder = tmp_path_factory.mktemp("programs")
    for source in (Path(sys.executable).parent, *map(Path, os.environ["PATH"].split(os.pathsep))):
        for program in source.iterdir() if source.is_dir() else ():
            link = folder / program.name
            if program.name not in ("ssh", "rsh", "ps", "hostname") and not os.path.lexists(link):
                link.symlink_to(program)
    return f"{Path(sys.executable).parent}{os.pathsep}{folder}"


@pytest.fixture()
def folder(tmp_path: Path) -> Iterator[Path]:
    """Yield a folder that any user can reach and write."""
    open_folder = Path("/tmp") / f"hvdlm-test-{os.getpid()}-{tmp_path.name}"
    open_folder.mkdir()
    open_folder.chmod(0o777)
    yield open_folder
    shutil.rmtree(open_folder)


def start(command: list[str], folder: Path, **variables: str | None) -> subprocess.CompletedProcess[str]:
    """Run ``command`` in ``folder``; a variable that is None is unset, and the cache follows from the home folder."""
    variables = {"XDG_CACHE_HOME": None, **variables}
    env = {name: value for name, value in {**environment(), **variables}.items() if value is not None}
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=120)


def open_mpi_4() -> bool:
    mpirun = shutil.which("mpirun", path=environment()["PATH"])
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60).stdout if mpirun else ""
    return "(Open MPI) 4" in version


@pytest.fixture()
def prefix(tmp_path: Path) -> Path:
    """Return a folder with the files of PyPI's Open MPI 4 that are read."""
    for name in ("etc", "bin"):
        (tmp_path / name).mkdir()
    (tmp_path / "bin" / "orted").touch()
    (tmp_path / "etc" / "openmpi-mca-params.conf").write_text("# Comments\n# plm_rsh_agent = other\n")
    return tmp_path


def test_settings_for_local_ranks_are_written_once(prefix: Path) -> None:
    settings = prefix / "etc" / "openmpi-mca-params.conf"
    assert local_launch.allow_without_ssh(prefix)
    written = settings.read_text()
    assert written.count("\nplm_rsh_agent = ssh : rsh : ") == 1 and written.startswith("# Comments\n")
    assert local_launch.allow_without_ssh(prefix) and settings.read_text() == written


def test_site_remote_agents_are_kept_and_open_mpi_5_needs_none(prefix: Path) -> None:
    settings = prefix / "etc" / "openmpi-mca-params.conf"
    settings.write_text("plm_rsh_agent=blaunch\n")
    assert local_launch.allow_without_ssh(prefix) and settings.read_text() == "plm_rsh_agent=blaunch\n"
    (prefix / "bin" / "orted").unlink()
    settings.write_text("")
    assert not local_launch.allow_without_ssh(prefix) and settings.read_text() == ""


@pytest.mark.skipif(not open_mpi_4(), reason="other MPIs start local ranks without an ssh client")
def test_without_ssh_only_local_ranks_start(prefix: Path, bare_path: str) -> None:
    local_launch.allow_without_ssh(prefix)
    variables = {
        "OMPI_MCA_mca_base_param_files": str(prefix / "etc" / "openmpi-mca-params.conf"),
        "PATH": bare_path,
    }
    mpirun = ["mpirun", "--oversubscribe", "-np", "2"]
    done = start([*mpirun, "echo", "started"], prefix, **variables)
    assert done.returncode == 0 and done.stdout == "started\n" * 2, done.stderr
    done = start([*mpirun, "-H", "no-such-host:2", "echo", "started"], prefix, **variables)
    assert done.returncode != 0 and "there is no ssh client on this machine" in done.stderr, done.stderr


@pytest.mark.parametrize("launcher", ["mpirun", "horovodrun", "horovodrun --gloo"])
def test_ranks_of_this_machine_train_without_ssh_and_ps(launcher: str, prefix: Path, bare_path: str) -> None:
    local_launch.allow_without_ssh(prefix)
    variables = {
        "OMPI_MCA_mca_base_param_files": str(prefix / "etc" / "openmpi-mca-params.conf"),
        "PATH": bare_path,
    }
    done = start([*launcher.split(), "-np", "2", "python", *RUN], prefix, HOME=None, **variables)
    assert done.returncode == 0 and "done: validation perplexity" in done.stdout, done.stdout + done.stderr


IN_COMMON = "the other launcher: horovodrun asks for the home folder before it chooses one"


@unknown_user
@pytest.mark.parametrize(
    "launcher",
    ["", "horovodrun -np 1", pytest.param("horovodrun --gloo -np 2", marks=pytest.mark.full(covered_by=IN_COMMON))],
)
def test_a_user_id_without_name_and_home_can_train(launcher: str, folder: Path) -> None:
    command = [*UNKNOWN_USER, *launcher.split(), "python", *RUN]
    done = start(command, folder, HOME=None, USER=None, LOGNAME=None)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs" / "default" / "summary.json").exists()
    assert not (folder / "~").exists()


@unknown_user
def test_a_read_only_folder_is_refused_in_one_sentence(folder: Path) -> None:
    folder.chmod(0o755)
    done = start([*UNKNOWN_USER, sys.executable, *RUN], folder, HOME=None)
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "can't be written" in done.stderr, done.stderr
    check = "import sys; from pathlib import Path; from hvdlm_horovod import target as f; "
    done = start([*UNKNOWN_USER, sys.executable, "-c", f"{check}print(f.read_only(Path('.')))"], folder)
    assert "can't be written" in done.stdout and "cp -r" in done.stdout
    folder.chmod(0o777)
    assert (
        start([*UNKNOWN_USER, sys.executable, "-c", f"{check}print(f.read_only(Path('.')))"], folder).stdout == "None\n"
    )


@unknown_user
def test_another_users_home_is_not_used_as_cache(folder: Path) -> None:
    """As after ``sudo -u`` without ``-H``: HOME is a folder that this user can't read."""
    (folder / "home").mkdir(mode=0o700)
    code = ["-c", "from hvdlm_backends import probes; print(probes.user_cache())"]
    done = start([*UNKNOWN_USER, sys.executable, *code], folder, HOME=str(folder / "home"), TMPDIR=str(folder))
    assert done.stdout == f"{folder}/hvdlm-54321\n", done.stderr


@unknown_user
@pytest.mark.parametrize(
    "launcher",
    ["horovodrun --gloo", pytest.param("horovodrun", marks=pytest.mark.full(covered_by=IN_COMMON))],
)
def test_horovodrun_works_with_a_read_only_home_folder(launcher: str, folder: Path) -> None:
    done = start([*UNKNOWN_USER, *launcher.split(), "-np", "1", "python", *RUN], folder, HOME="/")
    assert done.returncode == 0 and "done: validation perplexity" in done.stdout, done.stdout + done.stderr


@unresolvable
@pytest.mark.parametrize("launcher", ["", "mpirun -np 2", "horovodrun -np 2", "horovodrun --gloo -np 2"])
def test_training_works_with_an_unresolvable_host_name(launcher: str, folder: Path) -> None:
    done = start([*UNRESOLVABLE, *launcher.split(), sys.executable, *RUN], folder)
    assert done.returncode == 0 and "done: validation perplexity" in done.stdout, done.stdout + done.stderr


@unknown_user
def test_make_sets_home_and_local_ranks_for_unknown_users(bare_path: str, folder: Path) -> None:
    (folder / "Makefile").write_text(f'include {ROOT}/Makefile\nshow:\n\t@echo "$$HOME $$OMPI_MCA_plm_rsh_agent"\n')
    done = start([*UNKNOWN_USER, "make", "--no-print-directory", "show"], folder, HOME=None, PATH=bare_path)
    assert done.stdout == "/ false\n", done.stdout + done.stderr
    variables = {"HOME": "/somewhere", "OMPI_MCA_plm_rsh_agent": "blaunch", "PATH": bare_path}
    assert start(["make", "--no-print-directory", "show"], folder, **variables).stdout == "/somewhere blaunch\n"


def test_the_cache_is_in_the_users_cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert user_folders.user_cache() == tmp_path / ".cache" / "hvdlm"
    monkeypatch.setenv("XDG_CACHE_HOME", "/elsewhere")
    assert user_folders.user_cache() == Path("/elsewhere/hvdlm")


@pytest.mark.parametrize("case", ["no home", "home that can't be written"])
def test_without_a_home_the_cache_is_private_and_temporary(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unknown(*_: object) -> None:
        raise KeyError("uid not found")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    if case != "no home":
        (tmp_path / "file").touch()
        monkeypatch.setenv("HOME", str(tmp_path / "file"))
    monkeypatch.setattr(user_folders.tempfile, "tempdir", str(tmp_path))
    user_folders._temporary.cache_clear()
    cache = user_folders.user_cache()
    assert cache == tmp_path / f"hvdlm-{os.getuid()}" and cache.stat().st_mode & 0o777 == 0o700
    user_folders._temporary.cache_clear()
    cache.chmod(0o777)  # as another user could have prepared it
    other = user_folders.user_cache()
    assert other != cache and other.stat().st_mode & 0o777 == 0o700
    user_folders._temporary.cache_clear()
