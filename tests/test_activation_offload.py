"""Activations that wait on the host: the same results, two layers on the device, and clear refusals."""

from __future__ import annotations

import gc
from typing import Any

import numpy as np
import pytest

from builders import FRAMEWORKS, parameters, small_trainable, token_batch, train_steps
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning.closed_forms import closed_form
from launching import run_python

pytestmark = pytest.mark.skipif("torch" not in FRAMEWORKS, reason="needs torch")

LAYERS = 6
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dropout": {"dropout": 0.1},
    "recomputed": {"activation_checkpointing": True},
    "bf16": {"precision": "bf16"},
    "lora": {"lora": {"rank": 2}},
}


def offloaded(model: str = "gpt", **options: Any) -> Any:
    """Return a trainable whose offload takes small tensors, too."""
    trainable = small_trainable("torch", model, **{"layers": LAYERS, "activation_offload": True} | options)
    trainable._activations.offload.smallest = 1
    return trainable


@pytest.mark.parametrize("model, name", [("gpt", name) for name in OPTIONS] + [("llama", "plain"), ("llama", "bf16")])
def test_an_offload_changes_no_bit(model: str, name: str) -> None:
    options = OPTIONS[name]
    plain, offloading = small_trainable("torch", model, layers=LAYERS, **options), offloaded(model, **options)
    for a, b in zip(train_steps(plain, 3, 2), train_steps(offloading, 3, 2), strict=True):
        assert (a.loss, a.grad_norm) == (b.loss, b.grad_norm)
    before, after = parameters(plain), parameters(offloading)
    assert all(np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("model", ["gpt", "llama"])
def test_two_layers_are_on_the_device_at_once(model: str, recomputed: bool, precision: str) -> None:
    options = {"activation_checkpointing": recomputed, "precision": precision}
    kept = {}
    for layers in (2, 4, 8):
        trainable = offloaded(model, layers=layers, **options)
        train_steps(trainable, 2)
        predicted = closed_form(trainable._config, trainable._spec, Mesh(1, 1, 1), 0)
        kept[layers] = trainable.memory()["activations"]
        assert predicted is not None and predicted.memory["activations"] == pytest.approx(kept[layers], rel=0.1)
    assert kept[8] == kept[4] <= 1.02 * kept[2]


def test_copies_are_made_once_and_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    """All layers but the last two are copied, every byte once; between steps nothing is left."""
    from hvdlm_torch import activation_offload as module

    copied: list[list[Any]] = [[], []]
    for copies, name in zip(copied, ("copy_to_host", "copy_to_device"), strict=True):
        copy = getattr(module._Block, name)

        def counted(block: Any, *a: Any, copies: list[Any] = copies, copy: Any = copy, **k: Any) -> None:
            copies.append((block.layer, block.address, block._bytes))
            copy(block, *a, **k)

        monkeypatch.setattr(module._Block, name, counted)
    plain, trainable = small_trainable("torch", "gpt", layers=LAYERS), offloaded()
    (first, *_), _ = train_steps(plain, 2), train_steps(trainable, 1)
    to_host, to_device = copied
    layers = {id(layer) for layer, *_ in to_host}
    assert len(layers) == LAYERS - 1 and len({id(layer) for layer, *_ in to_device}) == LAYERS - 2
    assert len({(id(layer), address) for layer, address, _ in to_host}) == len(to_host)
    whole, shown = plain.memory()["activations"], trainable.memory()["activations"]
    layer_bytes = sum(size for *_, size in to_host) / (LAYERS - 1)
    assert whole - shown == pytest.approx((LAYERS - 2) * layer_bytes, rel=0.01)
    del layers, to_host, to_device
    copied.clear()
    gc.collect()
    assert not [block for block in gc.get_objects() if isinstance(block, module._Block)]
    assert trainable._activations.count._bytes == 0 and np.isfinite(first.loss)


def test_an_evaluation_moves_nothing() -> None:
    trainable = offloaded()
    trainable.eval_step(token_batch())
    assert trainable._activations.offload._before is None and trainable.memory()["activations"] == 0


ONE_STEP = ["-m", "hvdlm", "--train.steps", "1", "--train.activation_offload", "true", "--model.layers", "2"]
REFUSED = [
    (["--framework", "torch"], "no GPU is visible here: leave it out, or --train.activation_checkpointing true."),
    (["--framework", "tensorflow"], "framework tensorflow can't keep activations on the host"),
    (["--model.name", "lstm"], "moves the activations of GPTs' layers, and model.name lstm is none: leave it out."),
    (["--train.compile", "true"], "which train.activation_offload moves layer by layer: leave it out."),
]


@pytest.mark.parametrize("options, sentence", REFUSED, ids=["cpu", "tensorflow", "lstm", "compile"])
def test_what_cannot_offload_is_refused(options: list[str], sentence: str, tmp_path: Any) -> None:
    if options[-1] not in ("torch", "tensorflow"):
        options = ["--framework", "torch", *options]
    if options[1] not in FRAMEWORKS:
        pytest.skip(f"needs {options[1]}")
    done = run_python([*ONE_STEP, *options, "--log.run", str(tmp_path / "run")])
    assert done.returncode == 2 and sentence in done.stderr, done.stderr
    assert len(done.stderr) < 400 and not (tmp_path / "run").exists()
