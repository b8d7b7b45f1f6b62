"""The sum of an input's gradient over tensor ranks travels while the gradients of weights are computed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import both_frameworks, model_spec
from hvdlm.config import ParallelConfig
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.sharding_rules import ModelShard, make_model_shard
from hvdlm.protocols.group import BlockingForms, Converted, Done, Handle

ROWS, TIME = 2, 8
FEW, MANY = ROWS, 40  # rows of a batch whose products of the same input are computed one by one, and as one


class TwoAlike(BlockingForms):
    """The group of a tensor rank beside another one that computes the same.

    Attributes:
        events: the collectives that are started and waited for, and products of matrices.
        inputs: of the collectives, by operation and name.
    """

    ranks = (0, 1)

    def __init__(self, concatenate: Any) -> None:
        self.concatenate = concatenate
        self.events: list[str] = []
        self.inputs: dict[str, Any] = {}

    def _started(self, call: str, tensor: Any, result: Any) -> Handle:
        self.events.append(f"start {call}")
        self.inputs[call] = tensor
        return Converted(Done(result), lambda result: self.events.append(f"wait {call}") or result)

    def all_reduce_async(self, tensor: Any, name: str, op: str = "sum") -> Handle:
        return self._started(f"all_reduce {name}", tensor, 2 * tensor)

    def all_gather_async(self, tensor: Any, name: str) -> Handle:
        return self._started(f"all_gather {name}", tensor, self.concatenate([tensor, tensor], 0))

    def reduce_scatter_async(self, tensor: Any, name: str) -> Handle:
        return self._started(f"reduce_scatter {name}", tensor, 2 * tensor[: tensor.shape[0] // 2])


Arrays = dict[str, np.ndarray]


def hidden_in_pytorch(spec: ModelSpec, shard: ModelShard, arrays: Arrays, checkpointing: bool, sums: list[str]) -> Any:
    """Return how many products a backward pass computes while each of ``sums`` travels; and the sums, as started."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from hvdlm_torch.collectives import Collectives
    from hvdlm_torch.dropout import DropoutMasks
    from hvdlm_torch.models import make_model

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.name() in ("aten::mm", "aten::addmm", "mkldnn::_linear_pointwise"):
                group.events.append("product")
            return function(*args, **(kwargs or {}))

    group = TwoAlike(torch.cat)
    model: Any = make_model(spec, shard, Collectives(group, shard))
    model.masks = DropoutMasks(torch.device("cpu"), False)
    tokens = torch.from_numpy(arrays.pop("tokens"))
    model.bind({name: torch.from_numpy(array).requires_grad_() for name, array in arrays.items()})
    hidden, _ = model.hidden(tokens, None, None, True, checkpointing)
    loss = model.scores(hidden).sum()
    group.events.clear()
    with Products():
        loss.backward()
    events = group.events
    between = [events[events.index(f"start {one}") : events.index(f"wait {one}")] for one in sums]
    return [during.count("product") for during in between], [e for e in events if e.removeprefix("start ") in sums]


def hidden_in_tensorflow(
    spec: ModelSpec, shard: ModelShard, arrays: Arrays, checkpointing: bool, sums: list[str]
) -> Any:
    """Return how many products of a graph have to wait for the input of each of ``sums``, and not for the sum."""
    import tensorflow as tf

    from hvdlm_tensorflow.collectives import Collectives
    from hvdlm_tensorflow.models import make_model

    group = TwoAlike(tf.concat)
    model: Any = make_model(spec, shard, Collectives(group, shard), tf.float32)

    def graph(tokens: tf.Tensor, parameters: dict[str, tf.Tensor]) -> Any:
        with tf.GradientTape() as tape:
            tape.watch(parameters)
            model.bind(parameters)
            hidden, _ = model.hidden(tokens, None, None, True, checkpointing, tf.zeros(2, tf.int32))
            loss = tf.reduce_sum(model.scores(hidden))
        group.events.clear()
        return tape.gradient(loss, parameters)

    tokens = tf.constant(arrays.pop("tokens"))
    traced = tf.function(graph, autograph=False).get_concrete_function(
        tokens, {name: tf.constant(array) for name, array in arrays.items()}
    )
    products = [op for op in traced.graph.get_operations() if op.type == "MatMul"]
    counts = []
    for one in sums:
        source = group.inputs[one].op
        source = source.inputs[0].op if source.type == "Transpose" else source  # scattered positions come first
        counts.append(sum(source in product.control_inputs for product in products))
    return counts, [e for e in group.events if e.removeprefix("start ") in sums]


@both_frameworks
@pytest.mark.parametrize("checkpointing, rows", [(False, FEW), (False, MANY), (True, MANY)])
@pytest.mark.parametrize("sequence", [False, True])
@pytest.mark.parametrize("name, products", [("gpt", (1, 3, 1)), ("llama", (1, 3, 2))])
def test_gradients_travel_beside_those_of_weights(
    framework: str, name: str, products: tuple[int, ...], sequence: bool, checkpointing: bool, rows: int
) -> None:
    """``products``: of the head, of an attention, of an MLP, of which PyTorch computes the gradients as one."""
    spec = model_spec(name, context=TIME, layers=2, width=16, heads=4)
    shard = make_model_shard(spec, Mesh(1, 1, 2), 0, ParallelConfig(tensor=2, sequence=sequence))
    random = np.random.default_rng(0)
    arrays = {p.spec.name: random.normal(size=p.shard.extent).astype(np.float32) for p in shard.params}
    arrays["tokens"] = np.zeros((rows, TIME), np.int32)
    operation = "reduce_scatter" if sequence else "all_reduce"
    layers = ("head", "1.mlp", "1.attention", "0.mlp", "0.attention")
    sums = [f"{operation} tensor.{layer}.backward" for layer in layers]
    compute = hidden_in_pytorch if framework == "torch" else hidden_in_tensorflow
    hidden, started = compute(spec, shard, arrays, checkpointing, sums)
    head, attention, mlp = (1, 1, 1) if framework == "torch" else products
    assert hidden == [head, mlp, attention, mlp, attention]
    assert started == [f"start {one}" for one in sums]  # on all ranks alike


def test_sums_of_padded_products_are_contiguous(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU's product is padded to 64 outputs and cut: with another width, what is left isn't contiguous."""
    import torch

    from hvdlm_torch import kernels
    from hvdlm_torch.collectives import Collectives

    monkeypatch.setattr(kernels, "_by_onednn", lambda x, weight: False)
    monkeypatch.setattr(kernels, "missing_outputs", lambda x, weight: -len(weight) % 64)
    spec = model_spec("gpt", context=TIME, layers=2, width=16, heads=4)
    shard = make_model_shard(spec, Mesh(1, 1, 2), 0, ParallelConfig(tensor=2))
    group = TwoAlike(torch.cat)
    x = torch.ones(MANY, TIME, 16, requires_grad=True)
    (y,) = Collectives(group, shard).columns(x, [torch.ones(16, 8, requires_grad=True)], [], "mlp")
    y.sum().backward()
    assert group.inputs["all_reduce tensor.mlp.backward"].is_contiguous()
    assert x.grad is not None and x.grad.shape == x.shape
