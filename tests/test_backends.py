"""Backends: launcher detection, threads and environment variables, and refusal of unsuitable launches."""

from __future__ import annotations

import os
import pkgutil
import sys
import threading
from contextlib import nullcontext
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from hvdlm.config import CommunicationConfig, Config, ParallelConfig
from hvdlm.configuration.availability import choose_backend
from hvdlm.errors import HvdlmError
from hvdlm.io import launcher_env
from hvdlm.io.machine import cores
from hvdlm_backends import environment, horovod, nccl
from hvdlm_backends.gloo import GlooBackend
from hvdlm_backends.groups import HorovodGroup
from hvdlm_backends.local import LocalBackend
from hvdlm_backends.mpi import MPIBackend
from hvdlm_backends.probes import THREADS, WAITING
from launching import launch, run_command, run_python

LAUNCHERS = {
    "Open MPI": dict(zip(("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"), "5814", strict=True)),
    "MPICH": {"PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4"},
    "srun": {
        "SLURM_PROCID": "5",
        "SLURM_STEP_NUM_TASKS": "8",
        "SLURM_LOCALID": "1",
        "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    },
    "horovodrun --gloo": {
        "HOROVOD_RANK": "5",
        "HOROVOD_SIZE": "8",
        "HOROVOD_LOCAL_RANK": "1",
        "HOROVOD_LOCAL_SIZE": "4",
        "HOROVOD_GLOO_RENDEZVOUS_ADDR": "127.0.0.1",
    },
}
LAUNCHERS["Open MPI"] = {f"OMPI_COMM_WORLD_{name}": value for name, value in LAUNCHERS["Open MPI"].items()}


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith(("OMPI_", "PMI_", "SLURM_", "HOROVOD_", "MPI_")) or name in (*THREADS, *WAITING):
            monkeypatch.delenv(name)


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_every_launcher_is_recognised(launcher: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    detected = launcher_env.detect()
    assert detected is not None and tuple(detected[1:]) == (5, 8, 1, 4)
    assert choose_backend("torch") == ("gloo" if "gloo" in launcher else "mpi")


def test_without_a_launcher_the_backend_is_local() -> None:
    assert launcher_env.detect() is None and choose_backend("torch") == "local"
    assert LocalBackend().launch_shape() == (0, 1, 0, 1)


def test_an_mpirun_inside_a_slurm_allocation_is_an_mpirun(monkeypatch: pytest.MonkeyPatch) -> None:
    for launcher in ("srun", "Open MPI"):
        for name, value in LAUNCHERS[launcher].items():
            monkeypatch.setenv(name, value)
    assert launcher_env.detect().launcher == "Open MPI"  # type: ignore[union-attr]


def test_a_pipeline_gives_tensorflow_a_thread_for_messages(monkeypatch: pytest.MonkeyPatch) -> None:
    started = launcher_env.Launch("Open MPI", 0, 8, 0, 8)
    for name in ("cores", "launcher_cores"):
        monkeypatch.setattr(environment, name, lambda: 8)
    for stages, expected in ((1, "1"), (2, "2")):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {k: v for k, v in os.environ.items() if k not in THREADS})
            environment.prepare(started, Config(parallel=ParallelConfig(pipeline=stages)))
            assert os.environ["TF_NUM_INTEROP_THREADS"] == expected
            assert os.environ["TF_NUM_INTRAOP_THREADS"] == "1"


@pytest.mark.parametrize("local_size, expected", [(1, 8), (4, 2), (3, 2), (16, 1)])
def test_threads_are_cores_divided_by_local_ranks(
    local_size: int, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("cores", "launcher_cores"):
        monkeypatch.setattr(environment, name, lambda: 8)
    started = launcher_env.Launch("Open MPI", 0, local_size, 0, local_size)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        assert environment.prepare(started, Config()) == expected
        assert [os.environ[name] for name in THREADS] == [str(expected)] * len(THREADS)
        # Ranks that occupy all cores yield them while they wait.
        assert ("OMPI_MCA_mpi_yield_when_idle" in os.environ) == (local_size in (4, 16))


@pytest.mark.parametrize(
    "size, own, expected",
    [(2, "", "^ofi,openib"), (2, "^openib", "^ofi,openib"), (4, "", ""), (2, "tcp,self", "tcp,self")],
)
def test_ranks_of_one_host_end_without_a_pause(
    size: int, own: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless the user has named modules; horovodrun names ^openib."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {name: value for name, value in os.environ.items() if name != "OMPI_MCA_btl"})
        os.environ.update({"OMPI_MCA_btl": own} if own else {})
        environment.prepare(launcher_env.Launch("Open MPI", 0, size, 0, 2), Config())
        assert os.environ.get("OMPI_MCA_btl", "") == expected


@pytest.mark.parametrize("bound, expected", [(8, 8), (32, 16), (64, 16), (1, 1)])
def test_a_bound_rank_uses_its_bound_cores(bound: int, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4 ranks on a node of 64 cores: cores that only one rank may use are not divided among ranks."""
    monkeypatch.setattr(environment, "cores", lambda: bound)
    monkeypatch.setattr(environment, "launcher_cores", lambda: 64)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        assert environment.prepare(launcher_env.Launch("srun", 0, 4, 0, 4), Config()) == expected


@pytest.mark.skipif(cores() < 2, reason="a launcher with one core can't bind a rank to fewer")
def test_the_launchers_cores_are_found_behind_a_bound_rank() -> None:
    code = "from hvdlm_backends.environment import cores, launcher_cores; print(cores(), launcher_cores())"
    bound = ["mpirun", "-np", "1", "--use-hwthread-cpus", "--bind-to", "hwthread"]
    for shell in ([], ["/bin/sh", "-c", '"$@"; exit $?', "sh"]):
        command = [*bound, *shell, sys.executable, "-c", code]
        done = run_command(command, timeout=60)
        assert done.stdout.split() == ["1", str(cores())], done.stdout + done.stderr
    # Ranks of horovodrun over Gloo share its own cores; the outer launcher does not count.
    command = [*bound, "horovodrun", "--gloo", "-np", "1", sys.executable, "-c", code]
    done = run_command(command, timeout=60)
    assert done.stdout.strip().endswith(":1 1"), done.stdout + done.stderr


def test_user_set_environment_variables_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "OMP_NUM_THREADS": "3", "HOROVOD_STALL_CHECK_TIME_SECONDS": "7"})
        environment.prepare(launcher_env.Launch("srun", 0, 2, 0, 2), Config())
        assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["HOROVOD_STALL_CHECK_TIME_SECONDS"] == "7"


def test_gomp_spin_count_defaults_to_1000_unless_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for given, expected in (
        ({}, "1000"),
        ({"GOMP_SPINCOUNT": "7"}, "7"),
        ({"OMP_WAIT_POLICY": "active"}, None),  # GOMP_SPINCOUNT would override it
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "environ", {"PATH": os.environ["PATH"], **given})
            environment.prepare(None, Config())
            assert os.environ.get("GOMP_SPINCOUNT") == expected


def test_the_openmp_library_of_torch_reads_the_spin_count() -> None:
    """The environment is prepared before torch is imported, so that its OpenMP library reads the variables."""
    code = (
        "from hvdlm_backends import environment; from hvdlm.config import Config\n"
        "environment.prepare(None, Config()); import torch"
    )
    done = run_python(["-c", code], OMP_DISPLAY_ENV="verbose")
    if "GOMP_" not in done.stderr:
        pytest.skip("this torch does not use GCC's OpenMP library")
    assert "GOMP_SPINCOUNT = '1000'" in done.stderr, done.stderr


UNRESOLVED = "no-such-host.invalid"


@pytest.mark.parametrize(
    "name, variables, by_name, words",
    [
        ("localhost", {}, True, None),
        ("localhost", {"IFACE": "lo", "RENDEZVOUS_ADDR": "127.0.0.1"}, True, None),
        (UNRESOLVED, {"IFACE": "lo"}, False, None),
        (UNRESOLVED, {"IFACE": "lo"}, True, r"no-such-host.invalid has no address.*/etc/hosts"),
        (UNRESOLVED, {}, False, r"no-such-host.invalid has no address.*/etc/hosts"),
        ("localhost", {"RENDEZVOUS_ADDR": UNRESOLVED}, False, r"address no-such-host.invalid can't be resolved"),
        (
            "localhost",
            {"RENDEZVOUS_ADDR": "127.0.0.1", "RENDEZVOUS_PORT": "x"},
            False,
            "RENDEZVOUS_PORT is 'x', expected",
        ),
        ("localhost", {"RENDEZVOUS_ADDR": "127.0.0.1", "RENDEZVOUS_PORT": "65536"}, False, "PORT is '65536'"),
        ("localhost", {"IFACE": "nowhere0"}, False, r"HOROVOD_GLOO_IFACE is 'nowhere0', .* interfaces are .*lo"),
    ],
)
def test_gloo_needs_names_and_interfaces_that_exist(
    name: str, variables: dict[str, str], by_name: bool, words: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment.socket, "gethostname", lambda: name)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "12345")
    for variable in ("IFACE", "RENDEZVOUS_ADDR"):
        monkeypatch.delenv(f"HOROVOD_GLOO_{variable}", raising=False)
    for variable, value in variables.items():
        monkeypatch.setenv(f"HOROVOD_GLOO_{variable}", value)
    with pytest.raises(HvdlmError, match=words) if words else nullcontext():
        environment.check_gloo_address(by_name)


def test_a_name_server_that_does_not_answer_is_a_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = threading.Event()
    monkeypatch.setattr(environment.socket, "getaddrinfo", lambda *asked: answers.wait(60))
    monkeypatch.setattr(environment, "process", SimpleNamespace(timeout=0.2))
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", UNRESOLVED)
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_PORT", "12345")
    monkeypatch.delenv("HOROVOD_GLOO_IFACE", raising=False)
    with pytest.raises(HvdlmError, match=f"{UNRESOLVED} can't be resolved .*no name server answered within 0.1 s"):
        environment.check_gloo_address(False)
    answers.set()


def settings_of(monkeypatch: pytest.MonkeyPatch, **variables: str) -> bytes:
    """Return what is compared of a rank with these variables of Horovod."""
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {f"HOROVOD_{name}": value for name, value in variables.items()})
        return environment.shared_settings()


def test_what_belongs_to_a_rank_or_host_may_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    alike = {"CYCLE_TIME": "1", "CPU_OPERATIONS": "mpi"}
    own = {
        "RANK": "1",
        "LOCAL_RANK": "1",
        "CROSS_SIZE": "2",
        "HOSTNAME": "b",
        "GLOO_IFACE": "eth1",
        "LOG_LEVEL": "info",
    }
    own |= {"THREAD_AFFINITY": "2,3", "TIMELINE": "b.json", "NCCL_HOME": "/opt/nccl", "WITH_TORCH": "1"}
    assert settings_of(monkeypatch, **alike) == settings_of(monkeypatch, **alike, **own)


@pytest.mark.parametrize(
    "first, second, words",
    [
        (
            {"CPU_OPERATIONS": "mpi"},
            {"CPU_OPERATIONS": "gloo"},
            "CPU_OPERATIONS is 'gloo' on rank 1 and 'mpi' on rank 0",
        ),
        ({}, {"NEW_IN_SOME_RELEASE": "1"}, "NEW_IN_SOME_RELEASE is '1' on rank 1 and not set on rank 0"),
        ({"CACHE_CAPACITY": "0"}, {}, "CACHE_CAPACITY is not set on rank 1 and '0' on rank 0"),
        ({"GLOO_TIMEOUT_SECONDS": "1"}, {"GLOO_TIMEOUT_SECONDS": "2"}, "GLOO_TIMEOUT_SECONDS is '2' on rank 1"),
    ],
)
def test_settings_of_all_ranks_must_agree(
    first: dict[str, str], second: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(HvdlmError, match=words):
        environment.compare([settings_of(monkeypatch, **values) for values in (first, second, first)])


SETTINGS = {
    "fusion_bytes": (1_000_000, "HOROVOD_FUSION_THRESHOLD", "1000000"),
    "ring_bytes": (1000, "HOROVOD_RING_THRESHOLD", "1000"),
    "cycle_ms": (2.5, "HOROVOD_CYCLE_TIME", "2.5"),
    "cache_capacity": (0, "HOROVOD_CACHE_CAPACITY", "0"),
    "hierarchical_all_reduce": (True, "HOROVOD_HIERARCHICAL_ALLREDUCE", "1"),
    "hierarchical_all_gather": (False, "HOROVOD_HIERARCHICAL_ALLGATHER", "0"),
    "autotune": (True, "HOROVOD_AUTOTUNE", "1"),
    "autotune_log": ("tried.csv", "HOROVOD_AUTOTUNE_LOG", "tried.csv"),
    "thread_affinity": ("0,1", "HOROVOD_THREAD_AFFINITY", "0,1"),
    "timeline": ("timeline.json", "HOROVOD_TIMELINE", "timeline.json"),
    "stall_check": (12.0, "HOROVOD_STALL_CHECK_TIME_SECONDS", "12"),
    "timeout": (40.0, "HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "320"),
}


@pytest.mark.parametrize("backend", [LocalBackend, MPIBackend, GlooBackend])
@pytest.mark.parametrize("field", SETTINGS)
def test_communication_settings_reach_horovod(field: str, backend: type, monkeypatch: pytest.MonkeyPatch) -> None:
    value, variable, expected = SETTINGS[field]
    for launched in LAUNCHERS["horovodrun --gloo"] if backend is GlooBackend else ():
        monkeypatch.setenv(launched, LAUNCHERS["horovodrun --gloo"][launched])
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        backend().prepare(Config())
        assert os.environ.get(variable) != expected
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        backend().prepare(Config(communication=CommunicationConfig(**{field: value})))
        assert os.environ[variable] == expected


def test_unset_options_keep_the_users_horovod_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", {**os.environ, "HOROVOD_CYCLE_TIME": "9"})
        environment.prepare(None, Config())
        assert os.environ["HOROVOD_CYCLE_TIME"] == "9"


def test_backend_local_is_refused_under_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in LAUNCHERS["srun"].items():
        monkeypatch.setenv(name, value)
    with pytest.raises(HvdlmError, match="srun started 8"):
        LocalBackend().launch_shape()


def test_ranks_started_without_pmi_support_are_refused() -> None:
    """``srun`` without a PMI plugin starts N processes with world size 1 each."""
    done = run_python(["-m", "hvdlm"], SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2")
    assert done.returncode == 2, done.stderr
    assert "srun started 2 ranks but MPI found 1: each would train on its own; use srun --mpi=pmix" in done.stderr


class ConstantSumWorld:
    """Three ranks whose all-reduce returns a given total."""

    rank, size = 0, 3

    def __init__(self, total: float) -> None:
        self._total = total

    def group(self, ranks: object) -> ConstantSumWorld:
        return self

    def all_reduce(self, tensors: list[np.ndarray], name: str) -> list[np.ndarray]:
        return [np.full_like(tensors[0], self._total)]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_nccl_refuses_a_horovod_without_it(framework: str) -> None:
    done = launch("mpirun", 2, ["-m", "hvdlm", "--framework", framework, "--backend", "nccl"])
    assert done.returncode == 2 and f"Horovod was built without NCCL for {framework}" in done.stderr, done.stderr


def test_nccl_needs_one_gpu_per_local_rank() -> None:
    nccl.check_devices(4, 4)
    with pytest.raises(HvdlmError, match=r"4 ranks would share 2 GPU\(s\) on this node.*start 2 per node"):
        nccl.check_devices(2, 4)
    with pytest.raises(HvdlmError, match="finds no GPU"):
        nccl.check_devices(0, 1)


@pytest.mark.parametrize("visible, built", [(True, False), (True, True), (False, False)])
def test_torch_on_a_gpu_needs_a_horovod_built_with_cuda(
    visible: bool, built: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PyPI's torch detects a GPU, while Horovod is built without CUDA by default."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: visible)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2 * visible)
    monkeypatch.setattr("tensorflow.config.list_physical_devices", lambda kind: ["GPU"] * visible)
    of_torch = pkgutil.resolve_name("hvdlm_torch.horovod:GPUs")()
    of_tensorflow = pkgutil.resolve_name("hvdlm_tensorflow.horovod:GPUs")()
    hvd = SimpleNamespace(cuda_built=lambda: built, rocm_built=lambda: 0)
    refused = pytest.raises(HvdlmError, match=r"built without CUDA.*CUDA_VISIBLE_DEVICES=''")
    with refused if visible and not built else nullcontext():
        horovod.check_gpus(hvd, "torch", of_torch, 2, 2)  # type: ignore[arg-type]
    horovod.check_gpus(hvd, "torch", of_torch, 1, 1)  # type: ignore[arg-type]
    horovod.check_gpus(hvd, "torch", of_torch, 3, 3)  # type: ignore[arg-type]  # which share, through host memory
    horovod.check_gpus(hvd, "tensorflow", of_tensorflow, 2, 2)  # type: ignore[arg-type]


def test_a_horovod_without_bfloat16_says_what_to_build() -> None:
    group = HorovodGroup(None, (0, 1), None, bf16=False)  # type: ignore[arg-type]
    with pytest.raises(
        HvdlmError, match=r"can't send tensor\.0 in bfloat16.*horovod build, --train\.precision fp32, or"
    ):
        group.all_reduce_async(np.ones(4, ml_dtypes.bfloat16), "tensor.0")
    assert group.traffic == {}


def test_nccl_checks_its_first_all_reduce() -> None:
    nccl.self_check(ConstantSumWorld(6.0), np.ones(4, np.float32))  # type: ignore[arg-type]
    with pytest.raises(HvdlmError, match=r"gave 5\.0, expected 6"):
        nccl.self_check(ConstantSumWorld(5.0), np.ones(4, np.float32))  # type: ignore[arg-type]


@pytest.mark.parametrize("launcher, controller", [("Open MPI", "mpi"), ("horovodrun --gloo", "gloo")])
def test_nccl_uses_the_controller_of_the_launcher(
    launcher: str, controller: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in LAUNCHERS[launcher].items():
        monkeypatch.setenv(name, value)
    with monkeypatch.context() as patch:
        patch.setattr(os, "environ", dict(os.environ))
        backend = nccl.NCCLBackend()
        assert backend.launch_shape() == (5, 8, 1, 4)
        backend.prepare(Config())
        assert os.environ["HOROVOD_CONTROLLER"] == controller
