"""Models and frameworks: descriptions, training, evaluation, and text token by token."""

from __future__ import annotations

import numpy as np
from hvdlm_testing.checks.harness import CONTEXT, VOCAB, Checked, Skip, Stage
from hvdlm_testing.checks.training import check_training
from hvdlm_testing.plugin_under_test import Subject

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec

_BUILT_IN = ("gpt", "rnn")  # what a framework has to compute at least


def check_model(stage: Stage, subject: Subject, member: str, checked: Checked) -> None:
    """Check a plugin's model in this framework."""
    config = stage.config(subject)
    config.model.name = member
    spec = subject.members("models")[member](config.model, VOCAB, config.data.context)
    check_description(spec, member, checked)
    if spec.reads:
        raise Skip(f"{member} reads {', '.join(spec.reads)}: it is tested by training its task")
    runs_in = list(spec.implementations) or [getattr(spec.settings, "framework", stage.framework_name)]
    if stage.framework_name not in runs_in:
        raise Skip(f"{member} is there for {', '.join(runs_in)}, not for {stage.framework_name}")
    _check(stage, spec, config, member, checked)


def check_framework(stage: Stage, subject: Subject, member: str, checked: Checked) -> None:
    """Check that a framework computes the built-in models; where another one is asked, for comparison."""
    made = stage.framework
    if stage.framework_name == subject.name:
        checked.require(made.name == subject.name, f"framework {subject.name}: its name is {made.name!r}.")
        checked.require(isinstance(made.in_place, bool), f"framework {subject.name}: in_place is no bool.")
        array = np.arange(6, dtype=np.float32).reshape(2, 3)
        back = np.asarray(made.tensor(array.copy()))
        checked.require(
            np.array_equal(back, array), f"framework {subject.name}: tensor() does not keep an array as it is."
        )
    for name in _BUILT_IN:
        config = stage.config()
        config.model.name = name
        spec = plugins.models(plugins.load([]))[name](config.model, VOCAB, CONTEXT)
        _check(stage, spec, config, name, checked)


def check_description(spec: ModelSpec, name: str, checked: Checked) -> None:
    """Check names, shapes and initial values."""
    names = [param.name for param in spec.params]
    twice = sorted({n for n in names if names.count(n) > 1})
    checked.require(not twice, f"{name}: the parameter {', '.join(twice)} is described twice.")
    checked.require(spec.flops_per_token > 0, f"{name}: flops_per_token is {spec.flops_per_token}, expected above 0.")
    for key in ("vocab", "layers", "width"):
        checked.require(
            isinstance(getattr(spec.settings, key, None), int), f"{name}: its settings lack {key}, which hvdlm reads."
        )
    for param in spec.params:
        what = f"{name}: parameter {param.name}"
        if not checked.require(len(param.axes) == len(param.shape), f"{what} has not as many axes as dimensions."):
            continue
        first, second = param.initial(1), param.initial(1)
        checked.require(first.dtype == np.float32, f"{what} starts as {first.dtype}, expected float32.")
        checked.require(np.isfinite(first).all(), f"{what} starts with what is not finite.")
        checked.require(np.array_equal(first, second), f"{what} starts with other values every time: seed them.")
        box = tuple(slice(n // 3, n) for n in param.shape)
        checked.require(
            np.array_equal(param.initial_box(1, box), first[box]),
            f"{what}: a part starts with other values than the whole.",
        )


def _check(stage: Stage, spec: ModelSpec, config: Config, name: str, checked: Checked) -> None:
    what = f"{name} in {stage.framework_name}"
    first = check_training(stage, spec, config, what, checked)[0]
    trainable, _ = stage.build(spec, config)
    batch = stage.batch(spec, config)
    loss, tokens = trainable.eval_step(batch)
    checked.require(tokens == batch.tokens, f"{what}: eval_step counts {tokens} tokens, {batch.tokens} have weight.")
    mean = sum(stage.world.gather_objects(float(loss))) / sum(stage.world.gather_objects(float(tokens)))
    checked.require(
        abs(mean - first) < 1e-4 or config.model.dropout, f"{what}: eval_step finds {mean:.6f}, train_step {first:.6f}."
    )
    text = batch.inputs[:2]
    whole, _ = trainable.logits(text)
    wanted = (2, spec.settings.vocab)
    shape = f"{whole.dtype} {list(whole.shape)}"
    checked.require(
        whole.dtype == np.float32 and whole.shape == wanted,
        f"{what}: logits are {shape}, expected float32 {list(wanted)}.",
    )
    _, cache = trainable.logits(text[:, :-1])
    stepped, _ = trainable.logits(text[:, -1:], cache)
    checked.require(
        np.allclose(whole, stepped, atol=1e-4),
        f"{what}: logits differ where the text is read in two parts, with the cache.",
    )
