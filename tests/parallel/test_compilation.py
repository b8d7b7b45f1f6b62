"""Compiled steps of several ranks: the losses of steps as they are, and the same collectives in the same order."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
from test_layouts import GPT, VOCAB, build, configured, train

from builders import case
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.world import World
from hvdlm_backends.groups import CountedGroup
from launching import BACKEND, FRAMEWORK, RANKS

pytestmark = pytest.mark.skipif(
    RANKS != 2 or FRAMEWORK not in ("torch", "tensorflow"), reason="two ranks show what four would"
)
STEPS = 5
SHALLOW = {**GPT, "layers": 1}  # tracing takes seconds a layer
EVEN = VOCAB + 1  # of which tensor ranks have shards of one size: of the same generated code, a compiler is called once
Way = tuple[tuple[int, int, int], dict[str, Any], dict[str, Any]]
TENSOR: Way = ((1, 1, 2), SHALLOW, {})
SEQUENCE: Way = ((1, 1, 2), {**SHALLOW, "bias": True}, {"parallel": {"sequence": True}})
WAYS: dict[str, Way] = {
    "stages": ((1, 2, 1), GPT, {}),
    "zero2": ((2, 1, 1), SHALLOW, {"parallel": {"zero": 2}}),
}
COVERED: dict[str, str] = {}
# Settings of several newer models in one.
NEWER = {"name": "qwen3", "layers": 1, "width": 32, "heads": 4, "kv_heads": 2, "head_width": 12, "window": 5}
NEWER |= {"activation": "geglu", "rotary_share": 0.5, "parallel_residual": True, "scale_embeddings": True}
if FRAMEWORK == "torch":  # XLA compiles no collectives, so that tensor ranks are refused
    WAYS["zero1"] = ((2, 1, 1), SHALLOW, {"parallel": {"zero": 1}})
    WAYS["tensor"] = (*TENSOR[:1], {**SHALLOW, "dropout": 0.3}, {})
    WAYS["bf16"] = (*TENSOR[:2], {"train": {"precision": "bf16"}})
    WAYS["newer"] = ((1, 1, 2), NEWER, {})
    WAYS["recomputed"] = ((1, 2, 1), GPT, {"train": {"activation_checkpointing": True}})
    COVERED["stages"] = "case recomputed, of the same stages"
    COVERED["zero1"] = "case zero2"
    COVERED["bf16"] = "case tensor, and bf16-sequence over mpi4py"
if BACKEND == "mpi4py":  # where only collectives inside of graphs differ from Horovod's: sums, gathers, in 16 bits
    WAYS = {name: way for name, way in WAYS.items() if name in ("zero2", "bf16")}
    if FRAMEWORK == "torch":
        WAYS["sequence"] = SEQUENCE
        WAYS["bf16-sequence"] = (*SEQUENCE[:2], SEQUENCE[2] | {"train": {"precision": "bf16"}})
    COVERED = dict.fromkeys(("zero2", "bf16", "sequence"), "the same over Horovod, and case bf16-sequence of PyTorch")


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have PyTorch trace and differentiate steps as it always does, but generate no code, which takes longer."""
    if FRAMEWORK == "torch":
        import torch

        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))


@pytest.fixture(autouse=True)
def _as_a_new_process() -> None:
    """Have PyTorch forget the shapes of other tests' models, beside which it would trace symbolic ones, for longer."""
    if FRAMEWORK == "torch":
        import torch

        torch.compiler.reset()


def traced_graphs() -> int:
    """Return how many graphs this process has traced to compile them, of a step one if nothing interrupts it."""
    if FRAMEWORK != "torch":
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


class Recorded:
    """The results of some steps on this rank, and its collectives: operation, name, ranks, (shape, dtype)."""

    def __init__(
        self, world: World, way: Way, compiled: bool, monkeypatch: pytest.MonkeyPatch, vocab: int = VOCAB
    ) -> None:
        shape, model, options = way
        mesh = Mesh(*shape)
        config = configured(mesh, model, **options | {"train": options.get("train", {}) | {"compile": compiled}})
        trainable = build(world, mesh, config, vocab)
        self.collectives: list[Any] = []
        with monkeypatch.context() as patch:
            begin = CountedGroup._begin
            patch.setattr(CountedGroup, "_begin", lambda group, *call: self._record(begin, group, *call))
            results = train(trainable, mesh, world.rank, range(STEPS), config)
        self.losses = [result.loss for result in results]
        self.norms = [result.grad_norm for result in results]
        self.bytes = [result.axis_bytes for result in results]
        self.fingerprints = trainable.fingerprints()

    def _record(self, begin: Any, group: CountedGroup, operation: str, name: str, *tensors: Any) -> Any:
        moved = [(tuple(tensor.shape), str(tensor.dtype)) for tensor in tensors]
        self.collectives.append((operation, name, group.ranks, moved))
        return begin(group, operation, name, *tensors)


def assert_compiles_the_same(world: World, way: Way, monkeypatch: pytest.MonkeyPatch, vocab: int = VOCAB) -> None:
    before = traced_graphs()
    plain, compiled = (Recorded(world, way, flag, monkeypatch, vocab) for flag in (False, True))
    assert FRAMEWORK != "torch" or traced_graphs() == before + 1
    np.testing.assert_allclose(compiled.losses, plain.losses, rtol=0, atol=1e-5)
    np.testing.assert_allclose(compiled.norms, plain.norms, rtol=1e-4)
    assert compiled.collectives == plain.collectives and compiled.bytes == plain.bytes
    assert len(set(plain.losses)) == STEPS


# A compiler is called for three times as many pieces of code.
ALIKE = pytest.mark.full(covered_by="case tensor, and the traced case bf16-sequence over mpi4py")


@pytest.mark.parametrize("way", [case(way, covered_by=COVERED.get(way, "")) for way in WAYS])
def test_compiled_ranks_keep_losses_and_collectives(
    world: World, way: str, monkeypatch: pytest.MonkeyPatch, traced: None
) -> None:
    assert_compiles_the_same(world, WAYS[way], monkeypatch)


@pytest.mark.skipif(FRAMEWORK != "torch", reason="XLA has generated its code in the test above")
@pytest.mark.skipif(BACKEND == "mpi4py", reason="code of the same graph is generated over Horovod")
@pytest.mark.parametrize("way", [pytest.param(TENSOR, id="tensor"), pytest.param(SEQUENCE, marks=ALIKE, id="sequence")])
def test_generated_code_keeps_losses_and_collectives(world: World, way: Way, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_compiles_the_same(world, way, monkeypatch, EVEN)


@pytest.mark.skipif(FRAMEWORK != "torch", reason="XLA compiles no tensor ranks")
@pytest.mark.skipif(BACKEND == "mpi4py", reason="masks of the same graph are drawn over Horovod")
@pytest.mark.full(covered_by="case tensor above, whose masks are those of a step that isn't compiled")
def test_compiled_tensor_ranks_draw_the_same_dropout(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = Recorded(world, ((1, 1, 2), {**SHALLOW, "dropout": 0.3}, {}), True, monkeypatch, EVEN)
    norms = {name: value for name, value in compiled.fingerprints.items() if "norm" in name}  # replicated parameters
    assert norms and world.gather_objects(norms) == [norms] * world.size
