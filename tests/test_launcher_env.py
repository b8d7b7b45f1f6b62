"""Which launcher started a process, told from environment variables; every caller's list of launchers."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

from hvdlm.configuration.availability import choose_backend
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.io.launcher_env import HOROVODRUN, MPICH, OPEN_MPI, SRUN, VARIABLES
from hvdlm.io.terminal import on_terminal
from hvdlm_backends import probes
from hvdlm_launchers import settings

ROOT = Path(__file__).resolve().parent.parent
SOURCES = [path for room in ("hvdlm", "backends", "plugins", "scripts") for path in (ROOT / room).rglob("*.py")]
RANK_VARIABLES = {name for names in VARIABLES.values() for name in names} | {"HOROVOD_GLOO_RENDEZVOUS_ADDR"}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in RANK_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def start(monkeypatch: pytest.MonkeyPatch, launcher: str, rank: str = "3", size: str = "4") -> None:
    monkeypatch.setenv(VARIABLES[launcher].rank, rank)
    monkeypatch.setenv(VARIABLES[launcher].size, size)


def test_one_file_names_the_launchers_variables() -> None:
    names = re.compile(r"\b(OMPI_COMM_\w*|PMI_(RANK|SIZE)|MPI_LOCAL\w+|HOROVOD_(LOCAL_)?(RANK|SIZE))\b")
    slurm = re.compile(r"\b(SLURM_(PROCID|LOCALID|STEP_NUM_TASKS|STEP_TASKS_PER_NODE)|HOROVOD_GLOO_RENDEZVOUS_ADDR)\b")
    named = [path for path in SOURCES if any(pattern.search(path.read_text()) for pattern in (names, slurm))]
    assert named == [ROOT / "hvdlm" / "io" / "launcher_env.py"]


@pytest.mark.parametrize("launcher", VARIABLES)
def test_local_rank_and_size_default_to_the_global_ones(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert launcher_env.detect() is None and launcher_env.launch_shape() == (0, 1, 0, 1)
    start(monkeypatch, launcher)
    assert launcher_env.detect() == (launcher, 3, 4, 3, 4) and launcher_env.launch_shape() == (3, 4, 3, 4)


def test_a_rank_that_is_no_number_is_refused_but_not_in_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, OPEN_MPI, rank="x")
    with pytest.raises(HvdlmError, match="OMPI_COMM_WORLD_RANK is 'x', expected a whole number"):
        launcher_env.detect()
    assert launcher_env.rank_for_messages() == 0
    start(monkeypatch, SRUN, rank="2")
    assert launcher_env.rank_for_messages() == 2


@pytest.mark.parametrize("launcher", VARIABLES)
def test_a_rank_never_draws_a_progress_bar(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert on_terminal()
    start(monkeypatch, launcher, rank="0", size="1")
    assert not on_terminal()


@pytest.mark.parametrize("launcher", VARIABLES)
def test_supervise_refuses_to_run_on_ranks_but_those_of_srun(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    checked = settings.Settings()
    start(monkeypatch, launcher, rank="0", size="1")
    settings.check(checked, ["true"])
    start(monkeypatch, launcher)
    if launcher == SRUN:
        settings.check(checked, ["true"])
        return
    with pytest.raises(HvdlmError, match="not the other way round"):
        settings.check(checked, ["true"])


@pytest.mark.parametrize("launcher", [OPEN_MPI, MPICH, SRUN])
def test_several_ranks_of_mpi_choose_an_mpi_backend(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, launcher, rank="0", size="1")
    assert choose_backend("torch") == "local"
    start(monkeypatch, launcher)
    assert choose_backend("torch") in ("mpi", "mpi4py")


def test_a_gloo_rendezvous_chooses_gloo_for_several_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    start(monkeypatch, HOROVODRUN)
    assert choose_backend("torch") == "local"
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    assert choose_backend("torch") == "gloo"
    start(monkeypatch, HOROVODRUN, rank="0", size="1")
    assert choose_backend("torch") == "local"


def test_settings_survive_where_only_the_rank_is_taken_away(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"OMPI_MCA_plm_rsh_agent": "false", "HOROVOD_CYCLE_TIME": "2"}
    ranks = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_UNIVERSE_SIZE": "2", "PMIX_RANK": "0", "HOROVOD_RANK": "0"}
    others = {"PMI_RANK": "0", "SLURM_PROCID": "0"}
    assert launcher_env.without_rank(settings | ranks | others) == settings
    assert launcher_env.without_transport(settings | ranks | others) == others
    for name, value in (settings | ranks | {"OMP_NUM_THREADS": "1", "HOME": "/root"}).items():
        monkeypatch.setenv(name, value)
    environ = probes.unpinned()
    assert environ["HOME"] == "/root" and not {*settings, *ranks, "OMP_NUM_THREADS"} & set(environ)
