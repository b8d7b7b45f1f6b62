"""Backend threads: ranks as threads of one process, which do what processes under MPI do."""

from __future__ import annotations

import gc
import json
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch

import hvdlm
from hvdlm import Config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io import file_lock, launcher_env, rank_context
from hvdlm.protocols.world import World
from hvdlm_backends import array_collectives, threads_network
from hvdlm_backends.mpi_collectives import combine
from hvdlm_backends.threads import run_ranks
from hvdlm_backends.threads_network import Call, Network, NoInjection, Rendezvous, Slot
from hvdlm_diagnosis.recorder_reader import read_recording
from launching import SMALL, launch, losses, run_python, with_step_hook

DTYPES = ["float32", "float64", "float16", "bfloat16", "int32", "int64"]
COPIED = [*DTYPES, "int8", "uint8", "int16"]
THREADS = ["-m", "hvdlm", "--backend", "threads", "--ranks"]
STEPS = ["--framework", "torch", "--train.warmup", "2", "--train.eval_every", "0", "--log.tensorboard", "false"]


def numbers(rank: int, shape: tuple[int, ...], dtype: str = "float32") -> np.ndarray:
    """Return this rank's small numbers, of which some sums can't be represented exactly in 16 bits."""
    values = np.random.default_rng(rank).normal(0, 30, shape)
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)


def to_tensor(array: np.ndarray) -> torch.Tensor:
    half = array.dtype.name == "bfloat16"
    return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16) if half else torch.from_numpy(array)


def to_array(tensor: torch.Tensor) -> np.ndarray:
    half = tensor.dtype == torch.bfloat16
    return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16) if half else tensor.numpy()


def everyone(world: World) -> Any:
    return world.group(range(world.size))


def recursive_doubling(arrays: list[np.ndarray]) -> np.ndarray:
    """Return the sum as each rank of MPI's recursive doubling adds it, a power of two of ranks."""
    distance = 1
    while distance < len(arrays):
        arrays = [arrays[min(r, r ^ distance)] + arrays[max(r, r ^ distance)] for r in range(len(arrays))]
        distance *= 2
    return arrays[0]


@pytest.mark.parametrize("size", [2, 3, 4])
def test_collectives_equal_numpy_for_every_dtype(size: int) -> None:
    def check(world: World) -> None:
        group, rank = everyone(world), world.rank
        for dtype in COPIED:
            own = [numbers(r, (2 * size, 3), dtype) for r in range(size)]
            gathered = to_array(group.all_gather(to_tensor(own[rank][: rank + 1].copy()), f"gather.{dtype}"))
            np.testing.assert_array_equal(gathered, np.concatenate([own[r][: r + 1] for r in range(size)]))
            sent = to_array(group.broadcast(to_tensor(own[rank].copy()), size - 1, f"broadcast.{dtype}"))
            np.testing.assert_array_equal(sent, own[-1])
            exchanged = to_array(group.all_to_all(to_tensor(own[rank].copy()), f"exchange.{dtype}"))
            np.testing.assert_array_equal(exchanged, np.concatenate([a[2 * rank : 2 * rank + 2] for a in own]))
        for dtype in DTYPES:
            own = [numbers(r, (2 * size + 1, 3), dtype) for r in range(size)]
            total = array_collectives.all_reduce(own)
            wide = sum(a.astype(np.float64) for a in own)
            tolerance = 2.0 if dtype == "bfloat16" else 0.2 if dtype == "float16" else 1e-4
            np.testing.assert_allclose(total.astype(np.float64), wide, atol=tolerance)
            tensor = to_tensor(own[rank].copy())
            assert group.all_reduce_async(tensor, f"sum.{dtype}").wait() is tensor  # in place
            np.testing.assert_array_equal(to_array(tensor), total)
            shard = to_array(group.reduce_scatter(to_tensor(own[rank].copy()), f"scatter.{dtype}"))
            np.testing.assert_array_equal(shard, np.split(total, [3, *range(5, 2 * size + 1, 2)])[rank])
        group.barrier()

    run_ranks(size, check, "torch")


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_sums_are_added_in_the_order_of_recursive_doubling(size: int) -> None:
    arrays = [numbers(rank, (1000,)) for rank in range(size)]
    copies = [array.copy() for array in arrays]
    np.testing.assert_array_equal(array_collectives.all_reduce(arrays), recursive_doubling(copies))
    np.testing.assert_array_equal(arrays, copies)


def test_adasum_combines_vectors_as_backend_mpi4py_does() -> None:
    vectors = [numbers(rank, (50,)) for rank in range(4)]
    expected = combine(combine(vectors[0], vectors[1]), combine(vectors[2], vectors[3]))

    def combined(world: World) -> np.ndarray:
        tensor = to_tensor(vectors[world.rank].copy())
        return to_array(everyone(world).all_reduce_async(tensor, "gradients", "adasum").wait())

    for result in run_ranks(4, combined, "torch"):
        np.testing.assert_array_equal(result, expected)


def test_results_of_one_rank_share_no_memory_with_others() -> None:
    def change(world: World) -> list[float]:
        group = everyone(world)
        kept = []
        for name in ("all_gather", "all_to_all", "reduce_scatter"):
            result = getattr(group, name)(torch.ones(4), name)
            result += world.rank + 1
            kept.append(result)
        kept.append(group.broadcast(torch.ones(4), 0, "broadcast"))
        kept[-1] += world.rank + 1
        group.barrier()
        return [float(tensor[0]) for tensor in kept]

    assert run_ranks(2, change, "torch") == [[2.0, 2.0, 3.0, 2.0], [3.0, 3.0, 4.0, 3.0]]


def test_broadcasts_are_matched_by_name_in_any_order() -> None:
    def receive(world: World) -> list[float]:
        names = [f"stage.{number}" for number in range(4)]
        order = names if world.rank else names[::-1]
        group, tensors = everyone(world), {name: torch.full((3,), float(ord(name[-1]))) for name in names}
        if world.rank != 1:
            tensors = dict.fromkeys(names, torch.zeros(3))
        handles = {name: group.broadcast_async(tensors[name], 1, name) for name in order}
        again = group.broadcast_async(torch.full((3,), float(world.rank)), 1, names[0])  # the second of its name
        return [float(handles[name].wait()[0]) for name in names] + [float(again.wait()[0])]

    assert run_ranks(3, receive, "torch") == [[48.0, 49.0, 50.0, 51.0, 1.0]] * 3


def test_different_collectives_fail_on_all_ranks_with_both() -> None:
    def differ(world: World) -> list[str]:
        group, rank, messages = everyone(world), world.rank, []
        calls: list[Callable[[], Any]] = [
            lambda: group.all_reduce_async(torch.ones(2), f"name.{rank}").wait(),
            lambda: group.all_reduce_async(torch.ones(2 + rank), "shape").wait(),
            lambda: group.all_gather(torch.ones(2, dtype=torch.float64 if rank else torch.float32), "dtype"),
            lambda: group.barrier() if rank else group.all_gather(torch.ones(2), "operation"),
        ]
        for call in calls:
            with pytest.raises(RankError) as failure:
                call()
            messages.append(str(failure.value))
        assert float(group.all_reduce_async(torch.ones(2), "afterwards").wait()[0]) == 2
        if rank:
            with pytest.raises(RankError, match=r"broadcast late.*: expected 24 bytes, received 16"):
                group.broadcast_async(torch.ones(6), 0, "late").wait()
        else:
            group.broadcast_async(torch.ones(4), 0, "late").wait()
        return messages

    first, second = run_ranks(2, differ, "torch")
    assert first == second
    start = "ranks have come to different collectives: "
    assert first[0] == f"{start}rank 0: all_reduce name.0 float32[2]; rank 1: all_reduce name.1 float32[2]."
    assert first[1] == f"{start}rank 0: all_reduce shape float32[2]; rank 1: all_reduce shape float32[3]."
    assert first[2] == f"{start}rank 0: all_gather dtype float32[]; rank 1: all_gather dtype float64[]."
    assert first[3] == f"{start}rank 0: all_gather operation float32[]; rank 1: barrier."


def test_an_error_of_one_rank_ends_all_and_reaches_the_caller() -> None:
    ended = []

    def fail(world: World) -> None:
        try:
            if world.rank == 2:
                raise ValueError("the one rank that fails")
            everyone(world).all_reduce_async(torch.ones(2), "waits").wait()
        finally:
            ended.append(world.rank)

    began = time.monotonic()
    with pytest.raises(ValueError, match="the one rank that fails"):
        run_ranks(4, fail, "torch")
    assert time.monotonic() - began < 4
    assert sorted(ended) == [0, 1, 2, 3]


def test_ranks_that_wait_for_ever_are_ended_and_named() -> None:
    def wait(world: World) -> None:
        if world.rank != 1:
            everyone(world).barrier()
        else:
            time.sleep(2)

    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"ranks 0-2 did not end within 0\.5 s"):
        run_ranks(3, wait, "torch", timeout=0.5)
    assert time.monotonic() - began < 1.5


def test_no_rank_changes_a_result_that_another_still_copies(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only if all others have their copies, the last rank to come gets the sum itself: TensorFlow computes in place."""
    rendezvous = Rendezvous(Network(2, NoInjection()), (0, 1))
    late: list[np.ndarray] = []

    def copy_slowly(result: np.ndarray) -> np.ndarray:
        monkeypatch.undo()  # the other one comes while this one copies
        late.append(rendezvous.take(slot, 2))
        late[0] += 1
        return result.copy()

    slot = Slot(2)
    slot.finish(np.zeros(4))
    monkeypatch.setattr(threads_network, "copy_of", copy_slowly)
    assert rendezvous.take(slot, 2).tolist() == [0] * 4 and late[0].tolist() == [1] * 4
    total, slot = np.ones(4), Slot(2)
    slot.finish(total)
    assert rendezvous.take(slot, 2) is not total and rendezvous.take(slot, 2) is total


@pytest.mark.parametrize(
    "combined", [array_collectives.all_reduce, array_collectives.adasum, array_collectives.all_gather]
)
def test_no_result_keeps_what_it_was_made_of(combined: Callable[..., Any]) -> None:
    """A vector of every rank and step, until Python's next collection, was 13 GB of 500 steps on 8 ranks."""
    arrays = [np.full(8, float(rank)) for rank in range(4)]
    alive = [weakref.ref(array) for array in arrays]
    gc.disable()
    try:
        total = combined(arrays)
        del arrays
        assert [reference() for reference in alive] == [None] * 4 and total.size >= 8
    finally:
        gc.enable()


def test_every_rank_has_state_and_threads_of_its_own() -> None:
    def describe(world: World) -> dict[str, Any]:
        process.size = 10 + world.rank
        everyone(world).barrier()
        seen: list[Any] = []
        thread = threading.Thread(target=lambda: seen.append(launcher_env.rank_for_messages()))
        thread.start()
        thread.join(10)
        with ThreadPoolExecutor(1) as pool:
            seen.append(pool.submit(lambda: process.size).result(10))
            names = {thread.name for thread in rank_context.current().threads if thread.is_alive()}
        everyone(world).barrier()
        return {"seen": seen, "names": names, "launch": launcher_env.detect(), "size": process.size}

    before = process.size
    results = run_ranks(3, describe, "torch")
    assert [result["seen"] for result in results] == [[0, 10], [1, 11], [2, 12]]
    assert [result["size"] for result in results] == [10, 11, 12]
    assert [result["launch"][1:] for result in results] == [(rank, 3, rank, 3) for rank in range(3)]
    for rank, result in enumerate(results):
        own = {name for name in result["names"] if name.startswith("hvdlm-rank")}
        assert own == {f"hvdlm-rank-{rank}"} and len(result["names"]) == 2
    assert process.size == before and launcher_env.detect() is None


def test_a_file_lock_excludes_other_ranks_of_the_process(tmp_path: Path) -> None:
    inside: list[int] = []

    def write(world: World) -> None:
        with file_lock.acquire(tmp_path / "lock", wait=True, shared=False):
            inside.append(world.rank)
            time.sleep(0.05)
            assert inside[-1] == world.rank
            inside.append(world.rank)

    run_ranks(3, write, "torch")
    assert sorted(inside) == [0, 0, 1, 1, 2, 2]
    assert inside[::2] == inside[1::2]


def test_every_collective_passes_the_injection_with_its_bytes() -> None:
    calls: list[Call] = []

    class Slow(NoInjection):
        def arrive(self, call: Call) -> None:
            calls.append(call)

        def complete_at(self, call: Call, began: float) -> float:
            return began + (0.2 if call.name == "gradients.0" else 0.0)

    def communicate(world: World) -> float:
        world.recorder.step(7)
        began = time.perf_counter()
        handle = everyone(world).all_reduce_async(torch.ones(5), "gradients.0")
        everyone(world).broadcast_async(torch.ones(3), 0, "stage.1").wait()
        started = time.perf_counter() - began
        handle.wait()
        assert time.perf_counter() - began >= 0.2
        world.agree([1, 2]).wait()
        assert world.transfer_seconds() >= 0.2
        return started

    assert max(run_ranks(2, communicate, "torch", injection=Slow())) < 0.2
    assert {call.ranks for call in calls} == {(0, 1)} and {call.rank for call in calls} == {0, 1}
    own = [(call.operation, call.name, call.bytes, call.step) for call in calls if call.rank == 1]
    assert own == [("all_reduce", "gradients.0", 20, 7), ("broadcast", "stage.1", 12, 7), ("agree", "", 16, 7)]


COPY_RECORDING = """\
if step == 4 and self.world.size > 1:
            import pathlib, shutil
            folder = pathlib.Path(sys.argv[sys.argv.index("--log.run") + 1])
            name = f"rank-{{self.world.rank:04d}}.recorder"
            shutil.copy(folder / "flight_recorder" / name, folder / name)
"""


def train(folder: Path, backend: str, ranks: int, *options: str) -> Path:
    """Train for 4 steps on threads or on processes that mpirun starts; keep every rank's flight recorder."""
    command = [*with_step_hook(COPY_RECORDING.replace("{{", "{").replace("}}", "}")), "--log.run", str(folder)]
    command += [*SMALL, *STEPS, "--train.steps", "4", "--backend", backend, *options]
    if backend == "threads":
        done = run_python([*command, "--ranks", str(ranks)])
    else:
        done = launch("mpirun", ranks, command)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return folder


def collectives(folder: Path, rank: int) -> list[tuple[Any, ...]]:
    """Return what a rank's flight recorder holds of its collectives, in their order."""
    entries = read_recording(folder / f"rank-{rank:04d}.recorder").entries
    return [(e.step, e.index, e.operation, e.name, e.ranks, e.shape, e.dtype, e.site) for e in entries]


def traffic(folder: Path) -> dict[str, tuple[int, int]]:
    counted = json.loads((folder / "summary.json").read_text())["traffic"]
    return {name: (values["calls"], values["bytes"]) for name, values in counted.items()}


LAYOUTS = {
    "groups-of-two": (4, ["--parallel.pipeline", "2", "--parallel.tensor", "2", "--train.micro_batch_size", "2"]),
    "group-of-four": (4, ["--parallel.zero", "2"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_threads_train_as_processes_under_mpi_do(layout: str, tmp_path: Path) -> None:
    ranks, options = LAYOUTS[layout]
    threads = train(tmp_path / "threads", "threads", ranks, *options)
    processes = train(tmp_path / "processes", "mpi4py", ranks, *options)
    curve = losses(threads)
    assert len(curve) == 4 and curve[-1] < curve[0]
    if layout == "groups-of-two":
        assert curve == losses(processes)
    else:
        assert curve == pytest.approx(losses(processes), rel=1e-6)
    assert traffic(threads) == traffic(processes)
    for rank in range(ranks):
        own = collectives(threads, rank)
        assert len(own) > 20 and own == collectives(processes, rank)


ZERO = pytest.mark.full(covered_by="case 1, and the restored states of test_compression.py in tests/parallel")


@pytest.mark.parametrize("zero", [pytest.param("0", marks=ZERO), "1"])
def test_checkpoints_of_threads_resume_under_mpi_and_back(zero: str, tmp_path: Path) -> None:
    """Every rank has residuals of its own, which its checkpoint holds; with ZeRO its shard of the parameters, too."""
    run = tmp_path / "run"
    options = [*SMALL, *STEPS, "--communication.compression.algorithm", "int8", "--train.schedule", "constant"]
    options += ["--communication.compression.error_feedback", "true", "--parallel.zero", zero]
    resumed = ["--log.run", str(run), "--checkpoint.resume", "auto"]
    for index, backend in enumerate(("threads", "mpi4py", "threads")):
        command = ["-m", "hvdlm", *options, *resumed, "--backend", backend, "--train.steps", str(2 + 2 * index)]
        done = run_python([*command, "--ranks", "2"]) if backend == "threads" else launch("mpirun", 2, command)
        assert done.returncode == 0, done.stderr[-3000:]
        assert index == 0 or f"steps {2 * index} to {2 + 2 * index}" in done.stdout
    whole = tmp_path / "whole"
    command = ["-m", "hvdlm", *options, "--log.run", str(whole), "--train.steps", "6"]
    done = run_python([*command, "--ranks", "2"])
    assert done.returncode == 0, done.stderr[-3000:]
    assert losses(run) == losses(whole)


def small_run(folder: Path, **options: Any) -> Config:
    """Return the configuration of a small run of 4 steps."""
    sizes = {"model.layers": 2, "model.width": 32, "model.heads": 2, "data.context": 32, "train.batch_size": 8}
    steps = {"train.steps": 4, "train.warmup": 2, "log.tensorboard": False, "log.run": str(folder), "log.every": 1}
    return Config.load(sizes, steps, {name.replace("__", "."): value for name, value in options.items()})


def test_the_python_api_trains_on_threads(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = dict(os.environ)
    result = hvdlm.train(small_run(tmp_path / "run", parallel__tensor=2), ranks=4)
    assert (result.steps, result.status, result.summary["backend"]) == (4, "done", "threads")
    assert len(losses(result.run)) == 4
    assert dict(os.environ) == before and not list((result.run / "flight_recorder").glob("*"))
    assert "4 rank(s) over threads" in capfd.readouterr().out
    with hvdlm.load(result.run, {"parallel.tensor": 1}) as run:
        assert run.evaluate()["val_loss"] == pytest.approx(result.val_loss, rel=1e-5)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"train.batch_size": 7}, "train.batch_size 7 can't be split over 4 data ranks: choose 4 or 8."),
        ({"backend": "mpi4py"}, "which backend mpi4py can't connect: use --backend threads"),
        ({"communication.timeline": "x.json"}, "a setting of Horovod, which backend threads doesn't use"),
    ],
)
def test_what_threads_can_not_do_is_refused_once(options: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    with pytest.raises(HvdlmError) as refusal:
        hvdlm.train(small_run(tmp_path / "run", **options), ranks=4)
    assert sentence in str(refusal.value) and not str(refusal.value).startswith("rank")


def test_ranks_that_can_not_be_started_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(HvdlmError, match=r"needs the number of ranks: --backend threads --ranks 4"):
        hvdlm.train(small_run(tmp_path / "run", backend="threads"))
    for ranks in (0, -1, 10**6):
        with pytest.raises(HvdlmError, match=rf"--ranks: got '{ranks}', expected a number of threads from 1 to 4096"):
            hvdlm.train(small_run(tmp_path / "run"), ranks=ranks)
    for name, value in (("RANK", "0"), ("SIZE", "2")):
        monkeypatch.setenv(f"OMPI_COMM_WORLD_{name}", value)
    with pytest.raises(HvdlmError, match="Open MPI started 2 processes: leave one of the two out"):
        hvdlm.train(small_run(tmp_path / "run"), ranks=2)


def test_a_rank_that_fails_ends_the_command_with_its_message(tmp_path: Path) -> None:
    began = time.monotonic()
    action = "if step == 3 and self.world.rank == 2: raise ValueError('a fault of one rank')"
    command = [*with_step_hook(action), *SMALL, *STEPS, "--ranks", "4", "--log.run", str(tmp_path / "run")]
    done = run_python(command, timeout=60)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "hvdlm: rank 2 failed: ValueError: a fault of one rank" in done.stderr
    assert done.stderr.count("Traceback") == 1
    assert time.monotonic() - began < 45
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"]) == ("failed", 1)
    assert status["reason"] == "RanksEnded: another rank of this process has failed"


def test_a_rank_that_hangs_is_named_with_its_call_site(tmp_path: Path) -> None:
    action = "time.sleep(1000 if step == 3 and self.world.rank == 2 else 0)"
    command = [*with_step_hook(action), *SMALL, *STEPS, "--ranks", "4", "--log.run", str(tmp_path / "run")]
    done = run_python([*command, "--communication.timeout", "3"], timeout=90)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "ranks 0-1,3 wait for" in done.stderr and "Not arrived there: rank 2." in done.stderr
    assert "called at hvdlm_torch/gradients.py" in done.stderr
    stack = done.stderr.partition("Its stack:")[2]
    assert "in hvdlm_step_ended" in stack and "Exception in thread" not in done.stderr
    assert done.stderr.count("the run hangs") == 1


def test_a_signal_makes_all_threads_save_and_stop(tmp_path: Path) -> None:
    action = "self.world.rank == 1 and step == 3 and (os.kill(os.getpid(), signal.SIGTERM), time.sleep(1))"
    command = [*with_step_hook(action), *SMALL, *STEPS, "--ranks", "3", "--log.run", str(tmp_path / "run")]
    done = run_python([*command, "--train.batch_size", "9"], timeout=90)
    assert done.returncode == 75, done.stdout + done.stderr
    assert "rank 0: SIGTERM: the run saves after this step and stops" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


FEWER = pytest.mark.full(covered_by="16 ranks, in four by two by two")


@pytest.mark.parametrize("ranks, model_ranks", [(16, 2), pytest.param(64, 4, marks=FEWER)])
def test_many_ranks_train_in_three_dimensions(ranks: int, model_ranks: int, tmp_path: Path) -> None:
    sizes = ["--model.layers", "4", "--model.width", "32", "--model.heads", "4", "--data.context", "16"]
    layout = ["--parallel.pipeline", str(model_ranks), "--parallel.tensor", str(model_ranks)]
    layout += ["--train.batch_size", "16", "--train.steps", "2"]
    one, many = tmp_path / "one", tmp_path / "many"
    done = run_python([*THREADS, str(ranks), *sizes, *STEPS, *layout, "--log.every", "1", "--log.run", str(many)])
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    single = ["-m", "hvdlm", *sizes, *STEPS, *layout[4:], "--log.every", "1", "--log.run", str(one)]
    assert run_python(single).returncode == 0
    assert losses(many) == pytest.approx(losses(one), rel=1e-5)
    summary = json.loads((many / "summary.json").read_text())
    mesh = {"data": 4, "pipeline": model_ranks, "tensor": model_ranks}
    assert (summary["world_size"], summary["mesh"]) == (ranks, mesh)
