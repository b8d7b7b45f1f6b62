"""Nothing is published that is not finite, that is copied while steps are skipped, or that differs between replicas."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from builders import (
    SHARDED_STATE,
    STATE,
    STATE_SHARDS,
    ThreadRanks,
    both_frameworks,
    configured_spec,
    file_names,
    four_rank_shards,
    meshes,
    read_json,
    small_config,
    small_trainable,
    take_shard,
    train_steps,
)
from hvdlm.checkpoints.load import open_checkpoint
from hvdlm.checkpoints.save import Saver
from hvdlm.checkpoints.state_checks import Copied, Replicas, inspect
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CheckpointConfig, ParallelConfig
from hvdlm.errors import RankError
from hvdlm.io.atomic_files import sha256
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharded_state import ShardedState
from hvdlm.parallel.sharding_rules import make_model_shard
from hvdlm.training.loss_scale import LossScale
from hvdlm_backends.local import AloneGroup, LocalWorld
from launching import ONE_LAYER, STEPS, losses, metrics, run_with_faults

KINDS = ["float16", "float32", "float64", ml_dtypes.bfloat16]


@pytest.mark.parametrize("dtype", KINDS, ids=str)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("size", [1, 7, 2**18, 2**18 + 1])
def test_one_value_that_is_not_finite_is_noticed(dtype: Any, value: float, size: int) -> None:
    array = np.full((size, 2), 3.0, dtype)
    before = inspect(array, True)
    assert before == (True, inspect(array.copy(), True)[1])
    array[-1, -1] = value
    assert not inspect(array, False)[0] and not inspect(array[:, 1], False)[0] and inspect(array[:, 0], False)[0]
    assert inspect(array, True)[1] != before[1]


@pytest.mark.parametrize("array", [np.zeros(()), np.zeros((0, 3)), np.full(5, -1), np.full(3, 2**64 - 1, np.uint64)])
def test_integers_and_empty_arrays_are_finite(array: np.ndarray) -> None:
    assert inspect(array, True)[0] and inspect(np.ones(4, bool), True)[0]


NAMES = ["parameters/w", "optimizer/momentum/w", "carry/0.0", "exchange/error/w"]


@pytest.mark.parametrize("name", NAMES)
def test_state_that_is_not_finite_is_not_published(name: str, tmp_path: Path) -> None:
    state = STATE | {"exchange/error/w": np.ones(3, np.float32)}
    saver = Saver(tmp_path, LocalWorld(), CheckpointConfig(asynchronous=False))
    saver.start(5, state, {}, STATE_SHARDS)
    damaged = state[name].copy()
    damaged.reshape(-1)[1] = np.inf
    assert saver.start(6, state | {name: damaged}, {}, STATE_SHARDS) == []
    assert saver.refused == (
        f"{name.removeprefix('parameters/')} on rank 0 is not finite after step 6: its checkpoint is not published, "
        "earlier checkpoints are unchanged"
    )
    assert file_names(tmp_path) == ["latest", "step-00000005"] and (tmp_path / "latest").read_text() == "step-00000005"
    saver.refused = None
    assert [saved.step for saved in saver.start(7, state, {}, STATE_SHARDS)] == [7] and saver.refused is None


def rank_state(rank: int) -> tuple[dict[str, np.ndarray], dict[str, Shard], dict[str, str]]:
    """Return what one of 4 ranks holds of ``SHARDED_STATE``, its shards, and their identities."""
    shards = four_rank_shards()[rank]
    arrays = {name: take_shard(SHARDED_STATE[name], shard).copy() for name, shard in shards.items()}
    return arrays, shards, {name: repr(shard) for name, shard in shards.items()} | {"frozen/base": ""}


def save_damaged(folder: Path, rank: int, name: str, step: int = 5) -> Callable[[Any], Saver]:
    """Return a function that saves the state of one of 4 ranks, and damages ``name`` on ``rank``."""

    def save(world: Any) -> Saver:
        arrays, shards, replicas = rank_state(world.rank)
        frozen = {"frozen/base": np.arange(9.0)}
        if world.rank == rank:
            (frozen if name in frozen else arrays)[name].reshape(-1).view(np.int64)[1] ^= 1
        saver = Saver(folder, world, CheckpointConfig(keep=9))
        saver.start(step, arrays, {}, shards, None, replicas, frozen.items)
        saver.finish()
        return saver

    return save


@pytest.mark.parametrize(
    "rank, name, who",
    [
        (1, "parameters/w", "ranks 0, 1 hold different values, no majority shows which are right of w:"),
        (2, "parameters/w", "ranks 2, 3 hold different values, no majority shows which are right of w:"),
        (2, "frozen/base", "rank 2 holds other values than the other 3 replica(s) of frozen/base:"),
    ],
)
def test_replicas_that_differ_are_not_published(rank: int, name: str, who: str, tmp_path: Path) -> None:
    ThreadRanks(4).run(save_damaged(tmp_path, 0, "optimizer/m/w"))
    errors = ThreadRanks(4).run(save_damaged(tmp_path, rank, name, 6))
    assert {type(error) for error in errors} == {RankError} and len({str(error) for error in errors}) == 1
    assert str(errors[0]).startswith(f"after step 6, {who} a fault of the machine or of a plugin has changed them")
    assert "is not published: resume from an earlier one (--checkpoint.resume auto)" in str(errors[0])
    assert file_names(tmp_path) == ["latest", "step-00000005"]


def test_a_shard_that_one_rank_holds_has_no_replica(tmp_path: Path) -> None:
    """The optimizer's shards (ZeRO) are on one rank each: a change of one of them can't be noticed."""
    savers = ThreadRanks(4).run(save_damaged(tmp_path, 3, "optimizer/m/w"))
    assert [saver.refused for saver in savers] == [None] * 4 and (tmp_path / "step-00000005").is_dir()


def test_equal_replicas_take_no_further_messages(tmp_path: Path) -> None:
    def messages(compare: bool) -> Callable[[Any], list[int]]:
        def save(world: Any) -> list[int]:
            calls, gather = [], world.gather_objects
            world.gather_objects = lambda value: calls.append(1) or gather(value)
            arrays, shards, replicas = rank_state(world.rank)
            del replicas["frozen/base"]
            saver, counts = Saver(tmp_path, world, CheckpointConfig(keep=9, asynchronous=False)), []
            for step in (5, 6):
                saver.start(step, arrays, {}, shards, None, replicas if compare else None)
                counts.append(len(calls))
            return counts

        return save

    assert ThreadRanks(4).run(messages(True)) == ThreadRanks(4).run(messages(False))


# Every layout in one process: what ranks hold, and which of it has to be equal.

MODELS: list[dict[str, Any]] = [
    {"model": "gpt", "layers": 4, "kv_heads": 1},
    {"model": "llama", "layers": 4, "kv_heads": 2},
    {"model": "lstm", "layers": 4, "tie_embeddings": False},
]


class ZeroStub(AllReduceExchange):
    def __init__(self, rank: int, size: int) -> None:
        super().__init__(AloneGroup())
        self.traits = replace(self.traits, zero_rank=rank, zero_size=size)


def states_of_ranks(mesh: Mesh, model: dict[str, Any], zero: bool, compression: str = "none") -> list[Any]:
    """Return the state, its identities and its shards on every rank, as if all ranks had been trained alike."""
    config = small_config("torch", **model)
    config.train.batch_size = 8
    config.parallel = ParallelConfig(*mesh.shape)
    config.communication.compression.algorithm = compression
    spec, ranks = configured_spec(config), []
    for rank in range(mesh.size):
        model_shard = make_model_shard(spec, mesh, rank, config.parallel)
        exchange = ZeroStub(mesh.coordinates(rank)["data"], mesh.data) if zero else AllReduceExchange(AloneGroup())
        state = ShardedState(spec, model_shard, exchange, config, mesh, rank)
        flat = state.initial()
        arrays = state.arrays(flat, {"first": 1 + state.update_shard(flat)})
        ranks.append((arrays, state.replicas(arrays, {"first": flat}), state.shards({"first": flat})))
    return ranks


def difference_of(states: list[Any]) -> str | None:
    """Return what a save of all ranks' states would report."""
    replicas = Replicas([identities for _, identities, _ in states])
    digests, checksums = [], []
    for rank, (arrays, identities, shards) in enumerate(states):
        copied = Copied(dict(arrays), shards, identities, tuple)
        assert copied.check({name for names in replicas.of(rank) for name in names}) is None
        checksums.append(copied.checksums)
        digests.append(replicas.digests(rank, copied.checksums))
    sentence = replicas.difference(checksums)
    assert replicas.differ(digests) == (sentence is not None)
    return sentence


@pytest.mark.parametrize("zero", [False, True], ids=["", "zero"])
@pytest.mark.parametrize("model", MODELS, ids=lambda model: model["model"])
def test_every_array_that_two_ranks_hold_is_compared(model: dict[str, Any], zero: bool) -> None:
    random = np.random.default_rng(0)
    for mesh in meshes(8):
        if mesh.pipeline > model["layers"] or mesh.tensor > 4 or (zero and mesh.data == 1):
            continue
        states = states_of_ranks(mesh, model, zero)
        assert difference_of(states) is None
        held = [(rank, name) for rank, (arrays, _, _) in enumerate(states) for name in arrays]
        for rank, name in (held[i] for i in random.choice(len(held), 40)):
            array, shard = states[rank][0][name], states[rank][2].get(name)
            holders = [r for r, (arrays, _, shards) in enumerate(states) if name in arrays and shards[name] == shard]
            array.reshape(-1).view(np.int32)[-1] ^= 1
            sentence = difference_of(states)
            array.reshape(-1).view(np.int32)[-1] ^= 1
            assert (sentence is not None) == (len(holders) > 1), (mesh, rank, name)
            if len(holders) > 2:
                assert f"rank {rank} holds other values than the other {len(holders) - 1} replica(s)" in sentence


def test_norms_and_tied_embeddings_have_replicas() -> None:
    states = states_of_ranks(Mesh(1, 2, 2), MODELS[0], False)
    counts: dict[str, int] = {}
    for ranks, names in Replicas([identities for _, identities, _ in states])._groups.items():
        counts |= dict.fromkeys(names, len(ranks))
    assert counts["parameters/embed.tokens"] == counts["optimizer/first/embed.tokens"] == 2
    norms = [name for name in counts if "norm" in name]
    assert norms and all(counts[name] == 2 for name in norms)


def test_compression_lets_tensor_ranks_drift_apart() -> None:
    """Each compresses its own gradients, so that only data ranks receive the same sums."""
    states = states_of_ranks(mesh := Mesh(2, 1, 2), MODELS[0], False, "int8")
    groups = Replicas([identities for _, identities, _ in states])._groups
    assert set(groups) == {mesh.group("data", 0), mesh.group("data", 1)}
    assert all("parameters/embed.tokens" in names for names in groups.values())


def identities_with(agreed: bool) -> list[dict[str, str]]:
    """Return what 2 data ranks of DiLoCo have to hold alike."""
    config = small_config("torch")
    mesh, spec, identities = Mesh(2, 1, 1), configured_spec(config), []
    for rank in (0, 1):
        exchange = AllReduceExchange(AloneGroup())
        exchange.traits = replace(exchange.traits, replicas_diverge=True, replicated=("outer_momentum/",))
        exchange.agreed = agreed
        state = ShardedState(spec, make_model_shard(spec, mesh, rank, config.parallel), exchange, config, mesh, rank)
        flat = state.initial()
        names = [*state.arrays(flat, {"first": flat}), "exchange/outer_momentum/embed.tokens", "exchange/error/w"]
        identities.append(state.replicas(names, {"first": flat}))
    return identities


@pytest.mark.parametrize("agreed", [True, False])
def test_independent_ranks_share_what_they_synchronise(agreed: bool) -> None:
    """Between synchronisations only the outer momentum is equal, after one the parameters, too."""
    compared = {name for _, names in Replicas(identities_with(agreed))._groups.items() for name in names}
    assert "exchange/outer_momentum/embed.tokens" in compared
    assert {name.split("/")[0] for name in compared} == ({"exchange", "parameters"} if agreed else {"exchange"})
    assert not any(name.startswith(("exchange/own", "exchange/error")) for name in compared)


# Loss scales


def test_endless_overflow_in_fp16_counts_as_skipped_steps() -> None:
    scale = LossScale("fp16")
    usable = [scale.update(math.inf, 3.0) for _ in range(20)]
    assert usable == [False] * 16 + [True] * 4 and scale.value == 1.0


def test_a_loss_that_is_not_finite_is_no_overflow() -> None:
    scale = LossScale("fp16")
    assert scale.update(math.nan, math.nan) and scale.value == 2.0**16
    assert not scale.update(math.nan, 3.0) and scale.value == 2.0**15
    assert LossScale("fp32").update(math.nan, 3.0)


@both_frameworks
def test_an_overflow_is_neither_applied_nor_skipped(framework: str) -> None:
    trainable = small_trainable(framework)
    trainable._sharded.loss_scale = scale = LossScale("fp16")
    scale.value, before = 2.0**130, trainable.state()
    overflowed = train_steps(trainable, 1)[0]
    assert (overflowed.applied, overflowed.skipped, overflowed.failed) == (False, False, False)
    assert scale.value == 2.0**129 and math.isfinite(overflowed.loss)
    for name in (name for name in before if name.startswith(("parameters/", "optimizer/first"))):
        np.testing.assert_array_equal(before[name], trainable.state()[name])
    scale.value = 2.0**10
    assert train_steps(trainable, 1)[0].applied


# Real runs

EVERY_5 = ["--checkpoint.every", "5", "--checkpoint.keep", "9", "--train.eval_every", "10"]


def steps_saved(run: Path) -> list[int]:
    return sorted(open_checkpoint(path).step for path in (run / "checkpoints").glob("step-*"))


def assert_finite(run: Path) -> None:
    """Check every array of all checkpoints."""
    for path in (run / "checkpoints").glob("step-*"):
        opened = open_checkpoint(path)
        reader = opened.reader()
        arrays = [reader.read(name, whole(stored[0].shard.shape)) for name, stored in opened.tensors.items()]
        arrays += [a for rank in range(2) for a in reader.read_rank_file(f"rank-{rank:04d}.safetensors").values()]
        assert arrays and all(np.isfinite(array).all() for array in arrays), path


def rollbacks(run: Path) -> list[tuple[int, int]]:
    return [(line["rolled_back_from"], line["step"]) for line in metrics(run) if "rolled_back_from" in line]


# In step 13, which is skipped like 14 and 15: the save that is due then is deferred.
SKIPPED = (12, "parameters", "nan", 10)
# Gradients stay finite.
FINITE = (13, "optimizer", "inf", 10)
# After step 25 and before its copy: the save is refused.
REFUSED = (25, "parameters", "nan", 20)
# The last step fails.
LAST = (29, "parameters", "nan", 25)


@pytest.mark.parametrize(
    "framework, ranks, damages",
    [
        ("torch", 1, [SKIPPED, LAST]),
        ("torch", 2, [FINITE, REFUSED]),
        ("tensorflow", 1, [FINITE, LAST]),
        ("tensorflow", 2, [SKIPPED]),
    ],
)
def test_a_value_that_is_not_finite_is_never_published(
    framework: str, ranks: int, damages: list[tuple[int, str, str, int]], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    rank = 1 if framework == "torch" and ranks > 1 else 0
    done = run_with_faults(run, framework, ranks, *EVERY_5, *ONE_LAYER, damage=[[rank, *d[:3]] for d in damages])
    assert done.returncode == 0, done.stderr[-3000:]
    for (from_step, to), (*_, to_step) in zip(rollbacks(run), damages, strict=True):
        assert to == to_step and to_step + 5 <= from_step <= to_step + 10  # saves are refused in the background
    assert steps_saved(run) == [5, 10, 15, 20, 25, 30]
    assert_finite(run)
    assert len(losses(run)) == 30 and all(map(math.isfinite, losses(run)))
    assert math.isfinite(read_json(run / "summary.json")["val_loss"])


@both_frameworks
def test_a_run_that_ends_not_finite_fails(framework: str, tmp_path: Path) -> None:
    """The state is damaged before the last step, again after every rollback."""
    run = tmp_path / "run"
    fault: dict[str, Any] = {"damage": [[0, 14, "parameters", "nan"]], "again": True}
    options = ("--train.steps", "15", "--model.layers", "1", "--log.sample_tokens", "5")
    done = run_with_faults(run, framework, 1, *EVERY_5, *ONE_LAYER, *options, **fault)
    assert done.returncode == 1
    assert "rollbacks to the checkpoint(s) of step 5, 10 did not help: lower" in done.stderr
    status = read_json(run / "status.json")
    assert (status["state"], status["code"]) == ("failed", 1) and "are skipped" not in status["reason"]
    assert steps_saved(run) == [5, 10]
    assert_finite(run)
    assert not (run / "summary.json").exists() and not (run / "sample.txt").exists()


@pytest.mark.parametrize("what", ["parameters", "optimizer"])
def test_a_final_state_that_is_not_finite_fails(what: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    options = [*EVERY_5[2:], "--checkpoint.every", "0", "--train.steps", "6"]
    done = run_with_faults(run, "torch", 1, *options, damage=[[0, 6, what, "inf"]])
    assert done.returncode == 1 and steps_saved(run) == []
    assert read_json(run / "status.json")["state"] == "failed" and not (run / "summary.json").exists()


def test_a_rollback_passes_over_checkpoints_that_do_not_help(tmp_path: Path) -> None:
    """An earlier version may have published a state that is not finite: the run returns to it, then to an older one."""
    run = tmp_path / "run"
    assert run_with_faults(run, "torch", 1, *EVERY_5, "--train.steps", "15").returncode == 0
    newest = run / "checkpoints" / "step-00000015"
    manifest = read_json(newest / "manifest.json")
    name, entry = next(iter(manifest["files"].items()))
    contents = bytearray((newest / name).read_bytes())
    contents[-4:] = np.float32(np.nan).tobytes()
    (newest / name).write_bytes(contents)
    entry["sha256"] = sha256(newest / name)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    done = run_with_faults(run, "torch", 1, *EVERY_5, "--checkpoint.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "rolled back to the checkpoint of step 15;" in done.stdout and rollbacks(run)[-1][1] == 10
    assert len(losses(run)) == 30 and math.isfinite(read_json(run / "summary.json")["val_loss"])


BATCH_6 = ["--train.batch_size", "6", "--model.layers", "1"]
MAJORITY = "rank 2 holds other values than the other 2 replica(s) of "
NO_MAJORITY = "ranks 0, 1 hold different values, no majority shows which are right of "
PIPELINE = ["--parallel.pipeline", "2"]
TENSOR, LORA = (["--model.layers", "1", *option] for option in (["--parallel.tensor", "2"], ["--lora.rank", "2"]))
DILOCO = ["--model.layers", "1", "--communication.exchange", "diloco", "--communication.local.steps", "5"]
FLIPS = [
    ("torch", "parameters", BATCH_6, 3, MAJORITY),
    ("tensorflow", "optimizer", BATCH_6, 3, f"{MAJORITY}optimizer/"),
    ("torch", "norm", TENSOR, 2, NO_MAJORITY),
    ("torch", "embed.tokens", PIPELINE, 2, "right of embed.tokens"),
    ("torch", "frozen", LORA, 2, "right of frozen/"),
    ("torch", "anchor", DILOCO, 2, "right of "),
]
IN_FULL = [
    ("tensorflow", "norm", TENSOR, 2, NO_MAJORITY),
    ("tensorflow", "frozen", LORA, 2, "right of frozen/"),
    ("tensorflow", "anchor", DILOCO, 2, "right of "),
    ("torch", "velocity", DILOCO, 2, "right of "),
]
COMPARED = pytest.mark.full(
    covered_by="the same array, or another of its exchange, in torch, and TensorFlow's optimizer: the core compares"
)
FLIPPED = [pytest.param(*row, id=f"{row[1]}-{row[0]}") for row in FLIPS]
FLIPPED += [pytest.param(*row, id=f"{row[1]}-{row[0]}", marks=COMPARED) for row in IN_FULL]


@pytest.mark.parametrize("framework, what, options, ranks, who", FLIPPED)
def test_a_restart_after_a_flipped_bit_follows_the_curve(
    framework: str, what: str, options: list[str], ranks: int, who: str, curve: Callable[..., Path], tmp_path: Path
) -> None:
    """No checkpoint has the bit: a restart, unlike the replicas that it makes equal, trains as if it hadn't flipped."""
    run, options = tmp_path / "run", [*EVERY_5[:4], "--train.eval_every", "0", *options]
    step = 15 if what == "optimizer" else 13  # an update with it changes a parameter, too
    done = run_with_faults(run, framework, ranks, *options, damage=[[ranks - 1, step, what, "flip"]])
    assert done.returncode == 1, done.stderr[-3000:]
    assert "after step 15, " in done.stderr and who in done.stderr, done.stderr[-3000:]
    assert steps_saved(run) == [5, 10]
    if (framework, what) not in (("torch", "parameters"), ("tensorflow", "norm")):
        return
    done = run_with_faults(run, framework, ranks, *options, "--checkpoint.resume", "auto")
    assert done.returncode == 0, done.stderr[-3000:]
    undisturbed = curve(framework, ranks, *STEPS, *options)
    np.testing.assert_allclose(losses(run), losses(undisturbed), rtol=0, atol=1e-5)
    assert steps_saved(run) == [5, 10, 15, 20, 25, 30]
