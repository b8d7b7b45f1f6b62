"""No step of PyTorch waits for its device: on one without values, a tensor that the host reads is an error."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from builders import ROWS, configured_spec, small_config, token_batch
from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import CommunicationConfig, LoRAConfig, ModelConfig, TrainConfig
from hvdlm.parallel.mesh import Mesh
from hvdlm.parallel.zero import ZeroExchange
from hvdlm.protocols.group import Done
from hvdlm_backends.local import AloneGroup, LocalWorld
from hvdlm_torch import devices

DEVICE = torch.device("meta")  # has shapes, no values: whatever needs a value raises


class TwoRanks(AloneGroup):
    """A group whose other member sends what this one sends."""

    def __init__(self) -> None:
        super().__init__()
        self.ranks = (0, 1)

    def reduce_scatter_async(self, tensor: Any, name: str) -> Done:
        return Done(tensor[: len(tensor) // 2])

    def all_gather_async(self, tensor: Any, name: str) -> Done:
        return Done(torch.cat([tensor, tensor]))


class NoWaits(TorchDispatchMode):
    """Refuses copies from the host to the device that aren't asynchronous: on a GPU, they wait."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if str(function) == "aten._fused_sgd_.default":  # computes nothing without values
            return None
        if "copy" in str(function):
            target = args[0].device if str(function) == "aten.copy_.default" else kwargs.get("device")
            source = args[1] if str(function) == "aten.copy_.default" else args[0]
            asynchronous = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
            assert asynchronous or source.device == target or target is None or not source.dim(), function
        return function(*args, **kwargs)


class NoHostValues(TorchFunctionMode):
    """Refuses tensors that are made on the device from values of the host."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **kwargs or {})
        named = getattr(function, "__name__", "") in ("tensor", "as_tensor", "new_tensor", "scalar_tensor")
        assert not (named and made.device == DEVICE), f"{function.__name__} waits for the device"
        return made


@pytest.fixture(autouse=True)
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "select", lambda world, config: DEVICE)
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())


def build(model: str = "gpt", zero: int = 0, ranks: int = 1, lora: int | None = None, **options: Any) -> Any:
    config = small_config("torch", model, **{k: options.pop(k) for k in list(options) if hasattr(ModelConfig, k)})
    config.train = TrainConfig(**{"batch_size": ROWS, "warmup": 0, "weight_decay": 0.1} | options)
    config.parallel.zero = zero
    config.lora = LoRAConfig(rank=lora)
    framework = plugins.make(plugins.load(["torch"]), "framework", "torch")
    exchange = AllReduceExchange(AloneGroup())
    if ranks > 1:
        exchange = ZeroExchange(TwoRanks(), CommunicationConfig(), 0, zero) if zero else AllReduceExchange(TwoRanks())
    return framework.build(configured_spec(config), Mesh(ranks, 1, 1), LocalWorld(), exchange, config)


CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "clip-0": {"clip": 0.0},
    "sgd": {"optimizer": "sgd"},
    "momentum": {"optimizer": "sgd", "momentum": 0.9, "nesterov": True},
    "adagrad": {"optimizer": "adagrad"},
    "dropout": {"dropout": 0.1},
    "label-smoothing": {"label_smoothing": 0.1},
    "checkpointing": {"activation_checkpointing": True, "dropout": 0.1},
    "lora": {"lora": 2},
    "data-parallel": {"ranks": 2},
    "zero-1": {"ranks": 2, "zero": 1},
    "zero-2": {"ranks": 2, "zero": 2},
    "lstm": {"model": "lstm"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_no_step_reads_a_value_from_the_device(options: dict[str, Any]) -> None:
    trainable, results = build(**options), []
    for step in range(2):
        batch = token_batch(step, weights=True)
        with NoWaits(), NoHostValues():
            results.append(trainable.train_step([batch.rows(0, 4), batch.rows(4, 8)], 0.01, step, math.inf))
    assert all(result.pending and result.comm_seconds >= 0 for result in results)
    with pytest.raises(NotImplementedError, match="no data"):
        _ = results[0].loss


WAITS = {
    "item": lambda tensor: tensor.sum().item(),
    "condition": lambda tensor: 1 if tensor.sum() > 0 else 0,
    "list": lambda tensor: tensor.tolist(),
    "array": lambda tensor: np.asarray(tensor.cpu()),
    "nonzero": lambda tensor: tensor.nonzero(),
    "mask": lambda tensor: tensor[tensor > 0],
    "plain-copy": lambda tensor: torch.zeros(3).to(DEVICE),
    "copy-into": lambda tensor: tensor.copy_(torch.zeros(3)),
    "new-scalar": lambda tensor: torch.tensor(1.0, device=DEVICE),
    "new-tensor": lambda tensor: tensor.new_tensor(1.0),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_whatever_waits_for_the_device_is_noticed(wait: Any) -> None:
    with pytest.raises((NotImplementedError, RuntimeError, AssertionError)), NoWaits(), NoHostValues():
        wait(torch.zeros(3, device=DEVICE))
