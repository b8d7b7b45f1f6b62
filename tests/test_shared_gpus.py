"""Ranks of a node with fewer GPUs than ranks, faked: which GPU each gets, what is refused, and what is said."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any

import pytest

from hvdlm.errors import HvdlmError
from hvdlm.io.launcher_env import Launch
from hvdlm_backends import nccl, shared_gpus
from launching import launch

WARNING = "hvdlm: 2 ranks share 1 GPU(s) on this node and exchange tensors through host memory, which is for tests"


class FakeGPUs:
    """GPUs as a framework shows them."""

    def __init__(self, count: int) -> None:
        self._count = count
        self.bound: list[int] = []

    def count(self) -> int:
        return self._count

    def bind(self, local_rank: int) -> None:
        self.bound.append(local_rank)

    def copy_to(self, array: Any, local_rank: int) -> Any:
        return array


def framework(gpus: FakeGPUs) -> Any:
    return SimpleNamespace(name="torch", horovod=SimpleNamespace(gpus=gpus))


@pytest.mark.parametrize("count, shared", [(0, False), (1, True), (2, False), (4, False)])
def test_rank_0_alone_warns_that_ranks_share_gpus(count: int, shared: bool, capsys: pytest.CaptureFixture[str]) -> None:
    for rank in (0, 1):
        gpus = FakeGPUs(count)
        assert shared_gpus.select(framework(gpus), Launch("mpirun", rank, 2, rank, 2)) is shared
        assert gpus.bound == ([rank] if count else [])
    printed = capsys.readouterr().err
    assert printed.count("\n") == shared and (WARNING in printed) is shared


def test_nccl_sends_from_gpus_even_if_ranks_share_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert shared_gpus.select(framework(FakeGPUs(1)), Launch("mpirun", 0, 2, 0, 2), nccl=True) is False
    assert "through NCCL's sockets" in capsys.readouterr().err


def test_frameworks_without_gpus_of_their_own_are_left_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert not shared_gpus.select(SimpleNamespace(name="numpy"), Launch("mpirun", 0, 2, 0, 2))  # type: ignore[arg-type]
    assert capsys.readouterr().err == ""


@pytest.fixture
def shared_nccl(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return backend nccl of rank 1 of two, on a node with one GPU, whose ranks don't really connect."""
    pytest.importorskip("horovod")
    gpus = FakeGPUs(1)
    world = SimpleNamespace(rank=1, transport="mpi")
    monkeypatch.setattr(nccl, "check_build", lambda *_: None)
    monkeypatch.setattr(nccl, "self_check", lambda *_: None)
    backend = nccl.NCCLBackend()
    backend._controller = SimpleNamespace(launch_shape=lambda: (1, 2, 1, 2), start=lambda *_: world)  # type: ignore
    return lambda: backend.start(framework(gpus), [], SimpleNamespace())  # type: ignore[arg-type]


def test_nccl_refuses_shared_gpus_and_names_both_ways_out(shared_nccl: Any) -> None:
    with pytest.raises(HvdlmError, match=r"2 ranks would share 1 GPU\(s\)") as error:
        shared_nccl()
    text = str(error.value)
    assert "--backend mpi;" in text and "HVDLM_NCCL_SHARED_GPUS=1" in text and "\n" not in text
    assert "NCCL_HOSTID" not in os.environ


def test_nccl_takes_ranks_for_nodes_where_allowed(shared_nccl: Any) -> None:
    os.environ["HVDLM_NCCL_SHARED_GPUS"] = "1"
    assert shared_nccl().transport == "nccl"
    assert os.environ["NCCL_HOSTID"] == "hvdlm-rank-1"


# Shows one GPU to every rank, without giving its tensors to anyone.
ONE_GPU = """
import importlib, sys
from hvdlm import cli
gpus = importlib.import_module(f"hvdlm_{sys.argv.pop(1)}.horovod").GPUs
gpus.count, gpus.bind = lambda self: 1, lambda self, local_rank: print(f"bound {local_rank}", flush=True)
sys.exit(cli.main())
"""
BENCH = ["--smallest", "1024", "--largest", "1024", "--collectives", "[all_reduce]"]


COVERED = pytest.mark.full(covered_by="this framework on another backend, and this backend with the other framework")


@pytest.mark.parametrize(
    "launcher, backend, framework",
    [
        ("mpirun", "mpi", "tensorflow"),
        ("mpirun", "mpi4py", "torch"),
        ("horovodrun --gloo", "gloo", "torch"),
        pytest.param("mpirun", "mpi", "torch", marks=COVERED),
        pytest.param("mpirun", "mpi4py", "tensorflow", marks=COVERED),
        pytest.param("horovodrun --gloo", "gloo", "tensorflow", marks=COVERED),
    ],
)
def test_bench_gives_every_rank_its_gpu(launcher: str, backend: str, framework: str, tmp_path: Any) -> None:
    options = ["bench", *BENCH, "--framework", framework, "--backend", backend, "--output", str(tmp_path / "b.json")]
    done = launch(launcher, 2, ["-c", ONE_GPU, framework, *options])
    assert done.returncode == 0, done.stdout + done.stderr
    assert "bound 0" in done.stdout and "bound 1" in done.stdout
    assert (done.stdout + done.stderr).count(WARNING) == 1
