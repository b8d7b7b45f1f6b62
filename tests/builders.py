"""Common builders of tests: small models and trainables, batches, ranks as threads, checkpoints and files."""

from __future__ import annotations

import gzip
import json
import math
import os
import stat
import sys
import threading
import wave
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.checkpoints.save import Saver
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CheckpointConfig, Config, LoRAConfig, ModelConfig, TrainConfig
from hvdlm.errors import HvdlmError, RankError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelMaker, ModelSpec
from hvdlm.parallel.flat_layout import Shard, whole
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch, StepResult
from hvdlm_backends.local import AloneGroup, LocalWorld
from hvdlm_tasks.models.ctc import BANDS

# The two frameworks of the tests; tests/test_jax_example.py names others.
FRAMEWORKS = os.environ.get("HVDLM_TEST_FRAMEWORKS", "torch tensorflow").split()
both_frameworks = pytest.mark.parametrize("framework", FRAMEWORKS)


def case(*values: Any, covered_by: str = "", id: str | None = None) -> Any:
    """Return a case of a test; ``covered_by``: tests that run the same code, to which ``make test`` leaves it."""
    return pytest.param(*values, marks=[pytest.mark.full(covered_by=covered_by)] if covered_by else [], id=id)


# Models and trainables

VOCAB, CONTEXT, ROWS = 50, 12, 8
ENCODER_VOCAB, ENCODER_ROWS = 11, 4
ENCODER_MODELS = ["seq2seq", "ctc", "convnet"]
# Settings of small models of newer architectures, by their presets.
NEWER: dict[str, dict[str, Any]] = {
    "mistral": {"window": 5, "kv_heads": 2},
    "qwen2": {"qkv_bias": True, "rotary_scaling": 8.0, "rotary_scaling_context": 10},
    "qwen3": {"head_width": 6, "kv_heads": 2},
    "neox": {"rotary_share": 0.5},
    "gemma": {"head_width": 6, "kv_heads": 1},
}


def find_maker(name: str) -> ModelMaker:
    """Return the maker of a model of the core, or of the plugin of the same name."""
    return plugins.find_model(plugins.load([name]), name)


def model_spec(name: str, vocab: int = VOCAB, context: int = CONTEXT, **sizes: Any) -> ModelSpec:
    """Return the description of a built-in model."""
    return find_maker(name)(ModelConfig(name=name, **sizes), vocab, context)


def configured_spec(config: Config, vocab: int = VOCAB) -> ModelSpec:
    """Return the description of a configuration's model, with its adapters."""
    return adapt(find_maker(config.model.name)(config.model, vocab, config.data.context), config.lora)


def small_config(framework: str, model: str = "gpt", **sizes: Any) -> Config:
    """Return the configuration of a model that trains in milliseconds."""
    config = Config(framework=framework)
    config.model = ModelConfig(name=model, **{"layers": 2, "width": 16, "heads": 4, "initial_scale": 0.2} | sizes)
    config.train = TrainConfig(batch_size=ROWS, warmup=0)
    config.data.context = CONTEXT
    return config


def single_rank_trainable(spec: ModelSpec, config: Config) -> Any:
    """Return a trainable of one process that communicates with no other."""
    framework = plugins.make(plugins.load([config.framework]), "framework", config.framework)
    return framework.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)


def small_trainable(framework: str, model: str = "gpt", lora: dict[str, Any] | None = None, **options: Any) -> Any:
    """Return a small trainable of one process; ``options`` of sections model and train, by their names."""
    sizes = {name: options.pop(name) for name in list(options) if hasattr(ModelConfig, name)}
    config = small_config(framework, model, **sizes)
    config.train = TrainConfig(**{"batch_size": ROWS, "warmup": 0} | options)
    config.lora = LoRAConfig(**lora or {})
    return single_rank_trainable(configured_spec(config), config)


def parameters(trainable: Any) -> dict[str, np.ndarray]:
    """Return the parameters of a trainable by their names."""
    prefix = "parameters/"
    return {name.removeprefix(prefix): a for name, a in trainable.state().items() if name.startswith(prefix)}


def meshes(size: int) -> list[Mesh]:
    """Return every mesh of ``size`` ranks."""
    return [Mesh(*shape) for shape in product(range(1, size + 1), repeat=3) if math.prod(shape) == size]


def context_meshes(size: int) -> list[Mesh]:
    """Return a mesh of ``size`` context ranks, and those of two of them beside two ranks of another axis."""
    pairs = [(2, 1, 1), (1, 2, 1), (1, 1, 2)] if size == 4 else []
    return [Mesh(1, 1, 1, context=size), *(Mesh(*shape, context=2) for shape in pairs)]


# Batches


def next_token_batch(tokens: np.ndarray, weights: np.ndarray | None = None, reset: bool = True) -> Batch:
    """Return the batch in which every token of ``[rows, time + 1]`` but the first is predicted from those before."""
    return Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), weights, reset)


def token_batch(
    step: int = 0, weights: bool = False, shape: tuple[int, int] = (ROWS, CONTEXT), vocab: int = VOCAB
) -> Batch:
    """Return random rows; with ``weights``, some targets don't count."""
    random = np.random.default_rng(step)
    tokens = random.integers(0, vocab, (shape[0], shape[1] + 1)).astype(np.int32)
    mask = (random.random(shape) < 0.7).astype(np.float32) if weights else None
    return next_token_batch(tokens, mask, step == 0)


def encoder_batch(model: str, seed: int = 0, padding: int = 0) -> Batch:
    """Return random rows of unequal length for one of ``ENCODER_MODELS``, padded beyond the longest."""
    random = np.random.default_rng(seed)
    if model == "convnet":
        images = random.standard_normal((ENCODER_ROWS, 28, 28)).astype(np.float32)
        labels = random.integers(0, ENCODER_VOCAB, (ENCODER_ROWS, 1)).astype(np.int32)
        return Batch(np.zeros_like(labels), labels, None, True, {"images": images})
    counts = np.array([7, 3, 5, 1], np.int32)
    targets = random.integers(1, ENCODER_VOCAB, (ENCODER_ROWS, 8)).astype(np.int32)
    if model == "ctc":
        # The last row's target does not fit into its frames.
        frames = random.standard_normal((ENCODER_ROWS, 40, BANDS)).astype(np.float32)
        lengths = np.array([40, 21, 8, 3], np.int32)
        frames *= (np.arange(40) < lengths[:, None])[..., None]
        features = {"frames": np.pad(frames, ((0, 0), (0, 8 * padding), (0, 0))), "frame_count": lengths}
    else:
        source = random.integers(0, ENCODER_VOCAB, (ENCODER_ROWS, 8)).astype(np.int32)
        lengths = np.array([2, 8, 5, 1], np.int32)
        features = {"source": np.pad(source, ((0, 0), (0, padding))), "source_length": lengths}
    weights = (np.arange(8 + padding) < counts[:, None]).astype(np.float32)
    targets = np.pad(targets, ((0, 0), (0, padding)))
    inputs = np.pad(targets[:, :-1], ((0, 0), (1, 0)))
    return Batch(inputs, targets, weights, True, features)


def train_steps(
    trainable: Any, steps: int, micro: int = ROWS, weights: bool = False, rate: float = 0.01
) -> list[StepResult]:
    """Train on the token batches of ``steps`` steps, ``micro`` rows at a time; return the results."""
    results = []
    for step in range(steps):
        batch = token_batch(step, weights)
        micro_batches = [batch.rows(start, start + micro) for start in range(0, ROWS, micro)]
        results.append(trainable.train_step(micro_batches, rate, step))
    return results


def step_tensor_sizes(trainable: Any) -> Iterator[int]:
    """Yield the number of elements of every tensor in TensorFlow's graph of a step, and in functions it calls."""
    for function in trainable._step_graph._graph._list_all_concrete_functions():
        graphs = [function.graph, *(f.graph for f in function.graph._functions.values() if hasattr(f, "graph"))]
        for operation in (operation for graph in graphs for operation in graph.get_operations()):
            yield from (t.shape.num_elements() for t in operation.outputs if t.shape.is_fully_defined())


# Ranks as threads


class ThreadRanks:
    """Ranks that are threads of this process, with worlds that exchange objects and bytes."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._values: list[Any] = [None] * size
        self._barrier = threading.Barrier(size, timeout=20)

    def world(self, rank: int) -> Any:
        """Return the world of ``rank``."""
        world: Any = LocalWorld()
        world.rank = rank
        world.size = self.size
        world.gather_objects = lambda value: self._gather(rank, value)
        world.broadcast_object = lambda value, root=0: self._gather(rank, value)[root]
        world.broadcast_bytes = lambda data, root: self._gather(rank, data or b"")[root]
        world.any = lambda flag: any(self._gather(rank, flag))
        return world

    def _gather(self, rank: int, value: Any) -> list[Any]:
        self._values[rank] = value if isinstance(value, bytes) else json.loads(json.dumps(value))
        self._barrier.wait()
        values = list(self._values)
        self._barrier.wait()  # no rank overwrites a value that another has yet to read
        return values

    def run(self, action: Callable[[Any], Any]) -> list[Any]:
        """Return what ``action(world)`` returned or raised on every rank."""

        def guarded(rank: int) -> Any:
            try:
                return action(self.world(rank))
            except (RankError, HvdlmError) as error:
                return error
            except BaseException:
                self._barrier.abort()
                raise

        with ThreadPoolExecutor(self.size) as pool:
            return list(pool.map(guarded, range(self.size)))


# Checkpoints

STATE = {
    "parameters/w": np.arange(6, dtype=np.float32).reshape(2, 3),
    "optimizer/momentum/w": np.ones((2, 3), np.float32),
    "carry/0.0": np.arange(8, dtype=np.float32).reshape(4, 2),
}
STATE_SHARDS = {name: whole(array.shape) for name, array in STATE.items()}
SHARDED_STATE = {"parameters/w": np.arange(48.0).reshape(8, 6), "optimizer/m/w": np.ones((8, 6), np.float32)}


def take_shard(array: np.ndarray, shard: Shard) -> np.ndarray:
    """Return the values of a shard of ``array``."""
    box = array[(..., *shard.slices)]
    return box if shard.flat is None else box.reshape(-1)[slice(*shard.flat)]


def row_shard(shape: tuple[int, ...], first: int, last: int) -> Shard:
    """Return the shard that holds the rows from ``first`` up to ``last`` of a matrix."""
    return Shard(shape, (first, 0), (last - first, shape[1]))


def four_rank_shards() -> list[dict[str, Shard]]:
    """Return the shards of ``SHARDED_STATE`` on 4 ranks: halves of the parameters twice, quarters of the optimizer."""
    halves = [row_shard((8, 6), 4 * (rank // 2), 4 * (rank // 2) + 4) for rank in range(4)]
    quarters = [Shard((8, 6), (0, 0), (8, 6), (12 * rank, 12 * rank + 12)) for rank in range(4)]
    return [{"parameters/w": half, "optimizer/m/w": flat} for half, flat in zip(halves, quarters, strict=True)]


def start_save(world: Any, folder: Path, step: int = 5, limit: float = math.inf, **options: Any) -> Saver:
    """Start to save the shards that this one of 4 ranks has of ``SHARDED_STATE``; ``limit``: see ``Saver``."""
    shards = four_rank_shards()[world.rank]
    arrays = {name: take_shard(SHARDED_STATE[name], shard) for name, shard in shards.items()}
    saver = Saver(folder, world, CheckpointConfig(**options), limit)
    saver.start(step, arrays, {"rank": world.rank}, shards)
    return saver


def save_checkpoint(
    folder: Path,
    step: int,
    state: Mapping[str, np.ndarray],
    meta: Mapping[str, Any],
    world: Any,
    shards: Mapping[str, Shard] | None = None,
) -> Path:
    """Write one checkpoint into ``folder``, wait until it is complete and return its path; see ``Saver.start``."""
    options = CheckpointConfig(keep=sys.maxsize, asynchronous=False)
    return Saver(folder, world, options).start(step, state, meta, shards)[-1].path


def save_state(folder: Path, step: int = 5) -> Path:
    """Save ``STATE`` from one rank; return the checkpoint."""
    return save_checkpoint(folder, step, STATE, {"tokenizer": "t"}, LocalWorld())


def node_folders(folder: Path, ranks: int) -> Callable[[Any], Path]:
    """Return a function from a world to the folder of checkpoints that ``ranks`` ranks of its node share."""
    return lambda world: folder / f"node{world.rank // ranks}" / "checkpoints"


def flip_last_bit(path: Path) -> None:
    """Damage a file by one bit."""
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


# Files


def file_names(folder: Path) -> list[str]:
    """Return the sorted names of a folder's entries."""
    return sorted(path.name for path in folder.iterdir())


def read_json(path: Path) -> Any:
    """Return the value of a JSON file."""
    return json.loads(path.read_text())


def edit_json(path: Path, change: Callable[[Any], Any]) -> None:
    """Apply ``change``, which works in place, to the value of a JSON file."""
    value = read_json(path)
    change(value)
    path.write_text(json.dumps(value))


def write_executable(path: Path, script: str, interpreter: str = "/bin/sh") -> str:
    """Write a program that ``interpreter`` runs; return its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{interpreter}\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR | stat.S_IXGRP | stat.S_IXOTH)
    return str(path)


def write_wav(path: Path, samples: np.ndarray, rate: int = 8000, width: int = 2) -> None:
    """Write a mono recording of integer ``samples``, ``width`` bytes each."""
    with wave.open(str(path), "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(width)
        file.setframerate(rate)
        file.writeframes(samples.astype(f"<i{width}").tobytes())


def write_idx(path: Path, array: np.ndarray) -> None:
    """Write bytes in MNIST's idx format, compressed with gzip."""
    header = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">u4").tobytes()
    path.write_bytes(gzip.compress(header + array.astype(np.uint8).tobytes()))
