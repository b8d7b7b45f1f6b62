"""Tests what the conformance suite leaves to a framework: compilation, settings that it refuses, dropout."""

from __future__ import annotations

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import AloneGroup, LocalWorld

VOCAB, CONTEXT, ROWS = 20, 8, 4


def small_config(model: str = "gpt", **sizes) -> Config:
    config = Config(framework="jax", model=ModelConfig(name=model, layers=2, width=16, heads=2, **sizes))
    config.train.batch_size, config.data.context = ROWS, CONTEXT
    return config


def build(config: Config, optimizer=None):
    manager = plugins.load(["jax", config.model.name])
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", "jax")
    spec = plugins.find_model(manager, config.model.name)(config.model, VOCAB, CONTEXT)
    return framework.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config, optimizer)


def batch(seed: int = 1) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, CONTEXT + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_a_step_is_compiled_once(model):
    trainable = build(small_config(model))
    functions, sizes = (trainable._backward, trainable._squared_norm, trainable._update), []
    for step in range(4):
        trainable.train_step([batch(step)], 1e-3 / (step + 1), step)
        trainable.state()
        sizes.append([function._cache_size() for function in functions])
    assert sizes[0] == sizes[-1] and sizes[0][0] == 1


class Momentum:
    """SGD with momentum, as a plugin would bring it."""

    state = ("momentum",)
    decoupled = False

    def update(self, parameters, gradient, state, learning_rate, step):
        from keras import ops

        momentum = 0.9 * state["momentum"] + gradient
        return parameters - learning_rate * momentum, {"momentum": ops.convert_to_tensor(momentum)}


def test_an_optimizer_of_a_plugin_trains_as_the_built_in_one():
    losses = []
    for name, optimizer in (("sgd", None), ("own", Momentum())):
        config = small_config()
        config.train.optimizer, config.train.momentum = name, 0.9
        trainable = build(config, optimizer)
        losses.append([trainable.train_step([batch()], 0.1, step).loss for step in range(4)])
        assert "optimizer/momentum/embed.tokens" in trainable.state()
    assert losses[0] == pytest.approx(losses[1], abs=1e-6) and losses[0][-1] < losses[0][0]


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_dropout_draws_masks_from_seed_and_step(model):
    losses = []
    for dropout in (0.5, 0.5, 0.0):
        trainable = build(small_config(model, dropout=dropout))
        losses.append([trainable.train_step([batch()], 1e-3, step).loss for step in range(2)])
        losses[-1].append(trainable.eval_step(batch())[0])
    assert losses[0] == losses[1] != losses[2]
    other = build(small_config(model, dropout=0.5)).train_step([batch()], 1e-3, 7).loss
    assert other != losses[0][0]


def test_a_recomputed_layer_has_the_same_losses():
    losses = []
    for recompute in (False, True):
        config = small_config(dropout=0.1)
        config.train.activation_checkpointing = recompute
        trainable = build(config)
        losses.append([trainable.train_step([batch()], 1e-3, step).loss for step in range(3)])
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)


def test_a_step_with_a_norm_that_is_not_finite_is_skipped():
    trainable = build(small_config())
    before = trainable.fingerprints()
    assert trainable.train_step([batch()], 1e-3, 0, limit=1e-9).skipped
    assert trainable.fingerprints() == before
    state = trainable.state()
    state["parameters/embed.tokens"][0] = np.nan
    trainable.load_state(state)
    result = trainable.train_step([batch()], 1e-3, 0)
    assert result.skipped and result.failed


@pytest.mark.parametrize(
    ("section", "option", "value", "sentence"),
    [
        ("train", "precision", "bf16", "framework jax computes in fp32, not in bf16"),
        ("train", "compile", False, "framework jax compiles every step"),
        ("parallel", "tensor", 2, "framework jax has data-parallel ranks only"),
    ],
)
def test_settings_that_jax_lacks_are_refused(section, option, value, sentence):
    config = small_config()
    setattr(getattr(config, section), option, value)
    manager = plugins.load(["jax", config.model.name])
    spec = plugins.find_model(manager, "gpt")(config.model, VOCAB, CONTEXT)
    with pytest.raises(HvdlmError, match=sentence):
        manager.hook.hvdlm_check(config=config, spec=spec)
