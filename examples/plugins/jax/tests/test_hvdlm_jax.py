"""Tests what the conformance suite leaves to a framework: compilation, settings that it refuses, dropout."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.metadata
import re

import numpy as np
import pytest

from hvdlm import plugins
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config, ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import Mesh
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import AloneGroup, LocalWorld
from hvdlm_inference.generation import generate
from hvdlm_inference.sampling import Sampling

VOCAB, CONTEXT, ROWS = 20, 8, 4


def small_config(model: str = "gpt", **sizes) -> Config:
    config = Config(framework="jax", model=ModelConfig(name=model, layers=1, width=16, heads=2, **sizes))
    config.train.batch_size, config.data.context = ROWS, CONTEXT
    return config


def build(config: Config, optimizer=None, exchange=None, spec=None):
    manager = plugins.load(["jax", config.model.name])
    manager.hook.hvdlm_prepare(config=config)
    framework = plugins.make(manager, "framework", "jax")
    spec = spec or plugins.find_model(manager, config.model.name)(config.model, VOCAB, CONTEXT)
    exchange = exchange or AllReduceExchange(AloneGroup())
    return framework.build(spec, Mesh(1, 1, 1), LocalWorld(), exchange, config, optimizer)


def batch(seed: int = 1) -> Batch:
    tokens = np.random.default_rng(seed).integers(0, VOCAB, (ROWS, CONTEXT + 1)).astype(np.int32)
    return Batch(tokens[:, :-1], tokens[:, 1:])


@pytest.fixture
def compiled():
    """Return a list to which the name of every function is added that is compiled."""
    import jax

    def listen(event, seconds, fun_name="", **details):
        if event.endswith("backend_compile_duration"):
            names.append(fun_name)

    names: list[str] = []
    jax.monitoring.register_event_duration_secs_listener(listen)
    yield names
    jax.monitoring.unregister_event_duration_listener(listen)


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_a_step_is_compiled_once(model, compiled):
    config = small_config(model)
    config.communication.bucket_bytes = 4000
    trainable = build(config)
    for step in range(4):
        rows = batch(step)
        trainable.train_step([rows.rows(0, 2), rows.rows(2, 4)], 1e-3 / (step + 1), step)
        trainable.state()
        if step == 0:
            assert compiled.count("jit(_trace_backward)") == 1 and len(trainable.layout.buckets) > 2
            compiled.clear()
    assert not compiled


@pytest.mark.parametrize("model", ["gpt", "lstm"])
def test_generation_compiles_nothing_per_token(model, compiled):
    trainable, context = build(small_config(model)), CONTEXT if model == "gpt" else 10**9
    for seed in (1, 2):  # the prompt, a token, and beyond the context of a GPT all of it
        assert len(list(generate(trainable, np.int32([1, 2, 3]), 20, context, Sampling(seed=seed)))) == 20
        assert len([name for name in compiled if "extend" in name]) == (3 if model == "gpt" else 2)


def test_gradients_are_complete_before_they_are_exchanged():
    """Otherwise the seconds of communication would include those of the computation."""
    ready = []

    class Observed(AllReduceExchange):
        def start(self, bucket, index):
            ready.append(bucket.is_ready())
            return super().start(bucket, index)

    config = small_config()
    config.model.width, config.model.layers = 256, 4
    build(config, exchange=Observed(AloneGroup())).train_step([batch()], 1e-3, 0)
    assert ready and all(ready)


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


def test_an_architecture_of_a_plugin_names_its_class_for_jax():
    spec = plugins.find_model(plugins.load(["gpt"]), "gpt")(small_config().model, VOCAB, CONTEXT)
    own = dataclasses.replace(spec, kind="own", implementations={"jax": "hvdlm_jax.gpt:GPT"})
    losses = [build(small_config(), spec=model).train_step([batch()], 1e-3, 0).loss for model in (spec, own)]
    assert losses[0] == losses[1]


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


def test_the_precision_of_another_framework_s_checkpoint_is_refused():
    config = small_config()
    config.train.precision = "bf16"  # auto keeps that of the checkpoint
    with pytest.raises(HvdlmError, match=r"framework jax computes in fp32, not in bf16: --train\.precision fp32"):
        build(config)


@pytest.mark.parametrize(
    ("section", "option", "value", "sentence"),
    [
        ("train", "precision", "bf16", "framework jax computes in fp32, not in bf16"),
        ("train", "precision", "fp16", "framework jax computes in fp32, not in fp16"),
        ("train", "compile", False, "framework jax compiles every step"),
        ("train", "ema", 0.999, "framework jax keeps no average of its weights"),
        ("parallel", "tensor", 2, "framework jax has data-parallel ranks only"),
        ("parallel", "pipeline", 2, "framework jax has data-parallel ranks only"),
        ("model", "name", "seq2seq", "framework jax computes GPTs and recurrent models"),
    ],
)
def test_settings_that_jax_lacks_are_refused(section, option, value, sentence):
    config = small_config()
    setattr(getattr(config, section), option, value)
    with pytest.raises(HvdlmError, match=sentence):
        check(config)


def check(config: Config) -> None:
    manager = plugins.load(["jax", config.model.name])
    spec = plugins.find_model(manager, config.model.name)(config.model, VOCAB, CONTEXT)
    manager.hook.hvdlm_check(config=config, spec=spec)


@pytest.mark.parametrize(
    ("versions", "sentence"),
    [
        ({}, "jax is not installed here: pip install 'jax==0.10.*', or --framework torch"),
        ({"jax": "0.10.2"}, "jaxlib is not installed here"),
        ({"jax": "0.4.38", "jaxlib": "0.4.38"}, "needs jax 0.10 and a jaxlib that is not newer, installed are 0.4.38"),
        ({"jax": "0.10.2", "jaxlib": "0.10.11"}, "installed are 0.10.2 and 0.10.11: pip install"),
        ({"jax": "0.10.2", "jaxlib": "0.10.1"}, None),
    ],
)
def test_a_jax_that_does_not_fit_is_refused(monkeypatch, versions, sentence):
    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    with pytest.raises(HvdlmError, match=re.escape(sentence)) if sentence else contextlib.nullcontext():
        check(small_config())


def test_other_platforms_than_cpus_are_refused(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(HvdlmError, match="JAX_PLATFORMS=cuda: framework jax trains on CPUs"):
        check(small_config())
