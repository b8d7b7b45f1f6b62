"""Checks of models and frameworks: descriptions, training, evaluation, and logits token by token."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Literal

import numpy as np

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelMaker, ModelSpec
from hvdlm.protocols.framework import Framework, ResolvesOptions
from hvdlm.protocols.state_dict import optimizer_state
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.protocols.world import World
from hvdlm_testing.checks.harness import CONTEXT, VOCAB, Findings, Harness, Skip, lacking
from hvdlm_testing.checks.training import check_steps, check_training
from hvdlm_testing.plugin_under_test import PluginUnderTest

_BUILT_IN = ("gpt", "rnn")  # what a framework computes, unless its hvdlm_check refuses them
_RATE, _CLIP = 1e-2, 0.05  # learning rate of single steps, and a limit below the norm of their gradients


def check_model(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check a plugin's model in this framework."""
    config = harness.config(plugin)
    config.model.name = member
    spec = plugin.members("models")[member](config.model, VOCAB, config.data.context)
    check_description(spec, member, findings)
    if spec.reads:
        raise Skip(f"{member} reads {', '.join(spec.reads)}: it is tested with its task")
    runs_in = list(spec.implementations) or [getattr(spec.settings, "framework", harness.framework_name)]
    if harness.framework_name not in runs_in:
        raise Skip(f"{member} is implemented for {', '.join(runs_in)}, not for {harness.framework_name}")
    _check(harness, spec, config, member, findings)


def check_framework(harness: Harness, plugin: PluginUnderTest, member: str, findings: Findings) -> None:
    """Check that a framework computes the built-in models; other frameworks compute them for comparison."""
    own = harness.framework_name == plugin.name
    if own:
        _check_members(harness, plugin, findings)
    trained, refusals = trained_models(harness, plugin), refused_models(harness, plugin)
    if own:
        _check_optimizers(harness, plugin, trained, findings)
        _check_exchanges(harness, plugin, trained, findings)
        findings.figures.clear()  # other frameworks compare the losses of models alone
    for name in (name for name in _BUILT_IN if name not in refusals):
        config = harness.config()
        config.model.name = name
        spec = trained[name](config.model, VOCAB, CONTEXT)
        if own:
            check_resolved(harness.framework, config, spec, harness.world, findings)
        _check(harness, spec, config, name, findings)
    if refusals:
        findings.figures.clear()  # the losses of other models are not comparable
        raise Skip(f"{plugin.name} leaves out {', '.join(refusals)}: {'; '.join(refusals.values())}")


def check_resolved(framework: Framework, config: Config, spec: ModelSpec, world: World, findings: Findings) -> None:
    """Check what a framework resolves ``auto`` to, if it does."""
    if not isinstance(framework, ResolvesOptions):
        return
    resolved, label = framework.resolve(config, spec, world), f"framework {framework.name}: resolve() returns"
    findings.require(
        resolved.precision in ("fp32", "bf16"),
        f"{label} the precision {resolved.precision!r} for auto, expected fp32 or bf16.",
    )
    findings.require(isinstance(resolved.compile, bool), f"{label} compile {resolved.compile!r}, expected a bool.")
    texts = [resolved.device, *resolved.notes]
    findings.require(all(isinstance(text, str) and text for text in texts), f"{label} {texts}, expected texts.")


def _check_members(harness: Harness, plugin: PluginUnderTest, findings: Findings) -> None:
    """Check what the framework has besides ``build``, and that it is made for its own name only."""
    framework = harness.framework
    findings.require(framework.name == plugin.name, f"framework {plugin.name}: its name is {framework.name!r}.")
    findings.require(isinstance(framework.in_place, bool), f"framework {plugin.name}: in_place is not a bool.")
    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    converted = np.asarray(framework.tensor(array.copy()))
    findings.require(np.array_equal(converted, array), f"framework {plugin.name}: tensor() changes an array.")
    findings.require(
        plugin.implementation.hvdlm_make_framework(name="another") is None,
        f"{plugin.name}: hvdlm_make_framework returns a framework for every name: return None unless it is its own.",
    )


def _refusal(harness: Harness, plugin: PluginUnderTest, config: Config, spec: ModelSpec) -> str:
    """Return why the plugin's framework refuses a model or its optimizer; empty if it does not."""
    config = copy.deepcopy(config)
    config.framework = plugin.name
    try:
        harness.manager.hook.hvdlm_check(config=config, spec=spec)
    except HvdlmError as error:
        return str(error)
    return ""


def refused_models(harness: Harness, plugin: PluginUnderTest) -> dict[str, str]:
    """Return the built-in models that the framework refuses in ``hvdlm_check``, with its sentences."""
    refusals = {}
    for name, maker in _built_in().items():
        config = harness.config()
        config.model.name = name
        refusals[name] = _refusal(harness, plugin, config, maker(config.model, VOCAB, CONTEXT))
    return {name: sentence for name, sentence in refusals.items() if sentence}


def _built_in() -> dict[str, ModelMaker]:
    return {name: plugins.find_model(plugins.load([name]), name) for name in _BUILT_IN}


def trained_models(harness: Harness, plugin: PluginUnderTest) -> dict[str, ModelMaker]:
    """Return the built-in models that a framework trains, or, where it refuses them all, those of its plugin.

    Raises:
        HvdlmError: there are none.
    """
    refusals = refused_models(harness, plugin)
    trained = {name: maker for name, maker in _built_in().items() if name not in refusals}
    if not trained and not plugin.members("models"):
        raise HvdlmError(
            f"it refuses {' and '.join(refusals)} ({next(iter(refusals.values()))}), and its plugin has no model of "
            "its own (hvdlm_models): there is nothing to train."
        )
    return trained or plugin.members("models")


def _check_optimizers(
    harness: Harness, plugin: PluginUnderTest, trained: dict[str, ModelMaker], findings: Findings
) -> None:
    """Check every optimizer that the framework doesn't refuse, with the last of the models that it trains."""
    model, maker = list(trained.items())[-1]
    for optimizer, momentum in (("adamw", 0.0), ("sgd", 0.9), ("sgd", 0.0), ("adagrad", 0.0)):
        config = harness.config()
        config.model.name, config.train.optimizer, config.train.momentum = model, optimizer, momentum
        plain = optimizer == "sgd" and not momentum
        if plain:
            config.train.weight_decay, config.train.clip = 0.0, _CLIP
        spec = maker(config.model, VOCAB, CONTEXT)
        if _refusal(harness, plugin, config, spec):
            continue
        try:
            trainable, _ = harness.build(spec, config)
        except HvdlmError:  # a framework may refuse all optimizers but AdamW
            if optimizer == "adamw":
                raise
            continue
        batch = harness.batch(spec, config)
        _check_optimizer(trainable, batch, config, f"framework {plugin.name}: {optimizer}", findings)
        if plain:
            _check_clipping(trainable, spec, batch, f"framework {plugin.name}", findings)


def _check_optimizer(trainable: Trainable, batch: Batch, config: Config, label: str, findings: Findings) -> None:
    """Check the names of an optimizer's state, and that a gradient above the limit is not applied."""
    before = trainable.fingerprints()
    result = trainable.train_step([batch], _RATE, 0, 0.0)
    findings.require(
        result.skipped and trainable.fingerprints() == before,
        f"{label}: train_step applies a gradient whose norm is above its limit, or doesn't say that it skips it.",
    )
    uncounted = replace(batch, weights=np.zeros(batch.targets.shape, np.float32))
    result = trainable.train_step([uncounted], _RATE, 0)
    findings.require(
        result.skipped and trainable.fingerprints() == before,
        f"{label}: train_step on a batch without targets changes parameters, or doesn't say that it skips it.",
    )
    trainable.train_step([batch], _RATE, 0)
    kinds = {key.split("/")[1] for key in trainable.state() if key.startswith("optimizer/")}
    expected = set(optimizer_state(config.train))
    findings.require(
        kinds == expected,
        f"{label} keeps optimizer/{sorted(kinds)} in state(), expected {sorted(expected)}: other frameworks resume "
        "from these names.",
    )


def _check_clipping(trainable: Trainable, spec: ModelSpec, batch: Batch, label: str, findings: Findings) -> None:
    """Check that a step of plain SGD is as long as the learning rate times the clipped norm of the gradient."""
    before = {name: array.copy() for name, array in trainable.state().items()}
    result = trainable.train_step([batch], _RATE, 1)
    after = trainable.state()
    squares = [np.square(after[f"parameters/{p.name}"] - before[f"parameters/{p.name}"]).sum() for p in spec.params]
    moved, expected = float(np.sqrt(sum(squares))), _RATE * min(result.grad_norm, _CLIP)
    findings.require(
        np.isclose(moved, expected, rtol=1e-3),
        f"{label}: a step of sgd changes the parameters by {moved:.3g}, expected {expected:.3g}: train.learning_rate "
        f"{_RATE} times the norm of the gradient, {result.grad_norm:.3g}, or train.clip {_CLIP} where that is less.",
    )


def _check_exchanges(
    harness: Harness, plugin: PluginUnderTest, trained: dict[str, ModelMaker], findings: Findings
) -> None:
    """Check that steps run with exchanges that keep the parameters which they are given, or shard what is updated."""
    model, maker = list(trained.items())[-1]
    cases: tuple[tuple[str, Literal[0, 1, 2]], ...] = (("local_sgd", 0), ("all_reduce", 1), ("all_reduce", 2))
    for exchange, zero in cases:
        config = harness.config()
        config.model.name, config.communication.exchange, config.parallel.zero = model, exchange, zero
        spec = maker(config.model, VOCAB, CONTEXT)
        if _refusal(harness, plugin, config, spec):
            continue
        label = f"framework {plugin.name}: {exchange} with parallel.zero {zero}"
        try:
            check_steps(harness, spec, config, label, findings)
        except HvdlmError:
            continue  # a framework may refuse it
        except Exception as error:  # a third party's code may raise anything
            findings.fault(f"{label}: a step fails: {type(error).__name__}: {error}")


def check_description(spec: ModelSpec, name: str, findings: Findings) -> None:
    """Check the names, shapes and initial values of parameters."""
    names = [param.name for param in spec.params]
    duplicates = sorted({n for n in names if names.count(n) > 1})
    findings.require(not duplicates, f"{name}: the parameter {', '.join(duplicates)} is described twice.")
    findings.require(spec.flops_per_token > 0, f"{name}: flops_per_token is {spec.flops_per_token}, expected above 0.")
    for key in ("vocab", "layers", "width"):
        findings.require(
            isinstance(getattr(spec.settings, key, None), int), f"{name}: its settings lack {key}, which hvdlm reads."
        )
    for param in spec.params:
        label = f"{name}: parameter {param.name}"
        if not findings.require(
            len(param.axes) == len(param.shape), f"{label} has another number of axes than of dimensions."
        ):
            continue
        first, second = param.initial(1), param.initial(1)
        findings.require(first.dtype == np.float32, f"{label} has initial values of {first.dtype}, expected float32.")
        findings.require(np.isfinite(first).all(), f"{label} has initial values that are not finite.")
        findings.require(
            np.array_equal(first, second), f"{label} has other initial values every time: draw them from the seed."
        )
        box = tuple(slice(n // 3, n) for n in param.shape)
        findings.require(
            np.array_equal(param.initial_box(1, box), first[box]),
            f"{label}: initial_box() differs from the same box of initial().",
        )


def _check_causality(trainable: Trainable, batch: Batch, label: str, findings: Findings) -> None:
    """Check that scores do not depend on later tokens."""
    other = replace(batch, inputs=batch.inputs.copy())
    other.inputs[:, -1] += 1 - 2 * (other.inputs[:, -1] > 0)  # another token of the vocabulary
    first, second = trainable.predict(batch), trainable.predict(other)
    findings.require(
        np.allclose(first[:, :-1], second[:, :-1], atol=1e-5),
        f"{label}: scores change with a token that follows them: those of a position may depend on tokens up to it "
        "only.",
    )
    findings.require(
        not np.allclose(first[:, -1], second[:, -1], atol=1e-7),
        f"{label}: scores don't change with the token of their own position.",
    )


def _check(harness: Harness, spec: ModelSpec, config: Config, name: str, findings: Findings) -> None:
    """Check a model; what the launch has found about it before, as a framework and a plugin may have it, is taken."""
    params = [(param.name, param.shape) for param in spec.params]
    key = repr((name, spec.kind, spec.settings, spec.implementations, params, config.to_dict()))
    if key not in harness.checked:
        faults, figures = len(findings.faults), len(findings.figures)
        _check_anew(harness, spec, config, f"{name} in {harness.framework_name}", findings)
        harness.checked[key] = Findings(findings.faults[faults:], findings.figures[figures:])
        return
    findings.faults += harness.checked[key].faults
    findings.figures += harness.checked[key].figures


def _check_anew(harness: Harness, spec: ModelSpec, config: Config, label: str, findings: Findings) -> None:
    trainable, _ = harness.build(spec, config)
    if missing := lacking(trainable, Trainable):
        raise HvdlmError(f"{label}: the trainable lacks {missing} of hvdlm.protocols.trainable.Trainable.")
    batch = harness.batch(spec, config)
    loss, tokens = trainable.eval_step(batch)
    first = check_training(harness, spec, config, label, findings, other=trainable)[0]
    findings.require(
        tokens == batch.tokens, f"{label}: eval_step counts {tokens} tokens, {batch.tokens} have a weight."
    )
    mean = sum(harness.world.gather_objects(float(loss))) / sum(harness.world.gather_objects(float(tokens)))
    findings.require(
        abs(mean - first) < 1e-4 or config.model.dropout,
        f"{label}: the loss of eval_step is {mean:.6f}, of train_step {first:.6f}.",
    )
    _check_causality(trainable, batch, label, findings)
    prompt = batch.inputs[:2]
    whole, _ = trainable.logits(prompt)
    expected = (2, spec.settings.vocab)
    shape = f"{whole.dtype} {list(whole.shape)}"
    findings.require(
        whole.dtype == np.float32 and whole.shape == expected,
        f"{label}: logits are {shape}, expected float32 {list(expected)}.",
    )
    _, cache = trainable.logits(prompt[:, :-1])
    stepped, _ = trainable.logits(prompt[:, -1:], cache)
    findings.require(
        np.allclose(whole, stepped, atol=1e-4),
        f"{label}: logits differ if tokens are given in two calls, with the cache.",
    )
