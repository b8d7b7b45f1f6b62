"""Parameter groups: learning rate and weight decay by patterns of names, in every optimizer and framework."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from builders import both_frameworks, model_spec, parameters, small_trainable, token_batch, train_steps
from hvdlm.config import Config, TrainConfig
from hvdlm.configuration.parsing import parse_config
from hvdlm.errors import HvdlmError
from hvdlm.parallel.parameter_groups import ParameterGroups, check

RATE, SCALE, DECAY = 0.01, 0.25, 0.3
GROUPS = {
    "embed.*": {"learning_rate_scale": SCALE, "weight_decay": 0.0},
    "*_norm.scale": {"weight_decay": DECAY},
    "layers.1.*": {"learning_rate_scale": 0},
    "*.query": {"learning_rate_scale": 3.0},
}
OPTIMIZERS = [
    {"optimizer": "adamw", "weight_decay": 0.2, "clip": 0.0},
    {"optimizer": "sgd", "weight_decay": 0.1, "momentum": 0.9, "clip": 0.0},
    {"optimizer": "adagrad", "weight_decay": 0.1, "clip": 0.0},
]


def group_of(name: str) -> tuple[float, float | None]:
    """Return (factor of the learning rate, weight decay) of ``GROUPS``, by hand."""
    if name.startswith("embed."):
        return SCALE, 0.0
    if name.endswith("_norm.scale"):
        return 1.0, DECAY
    if name.startswith("layers.1."):
        return 0.0, None
    return (3.0 if name.endswith("query.weight") else 1.0), None


@both_frameworks
@pytest.mark.parametrize("rule", OPTIMIZERS, ids=lambda rule: rule["optimizer"])
def test_a_parameter_follows_its_group_alone(framework: str, rule: dict[str, Any]) -> None:
    """Its first update is that of a run in which all parameters have the rate and decay of its group."""
    grouped = small_trainable(framework, groups=GROUPS, **rule)
    before = parameters(grouped)
    grouped.train_step([token_batch()], RATE, 0)
    after, expected, names = parameters(grouped), {}, sorted(before)
    decays = {p.name: p.decay for p in model_spec("gpt").params}
    for scale, decay in {group_of(name) for name in names}:
        everywhere = {"*": {"weight_decay": rule["weight_decay"] if decay is None else decay}}
        for decayed in (False, True):
            groups = everywhere if decayed or decay is not None else {"*": {"weight_decay": 0.0}}
            alone = small_trainable(framework, **rule, groups=groups)
            alone.train_step([token_batch()], RATE * scale, 0)
            chosen = [n for n in names if group_of(n) == (scale, decay) and (decay is not None or decays[n] == decayed)]
            expected |= {name: parameters(alone)[name] for name in chosen}
    for name in names:
        np.testing.assert_allclose(after[name], expected[name], rtol=1e-5, atol=1e-7, err_msg=name)
        assert np.array_equal(before[name], after[name]) == (group_of(name)[0] == 0.0), name


@both_frameworks
def test_one_group_of_defaults_changes_no_bit(framework: str) -> None:
    plain, grouped = (small_trainable(framework, groups=groups) for groups in (None, {"*": {"learning_rate_scale": 1}}))
    assert [r.loss for r in train_steps(plain, 3)] == [r.loss for r in train_steps(grouped, 3)]
    for name, array in parameters(plain).items():
        assert np.array_equal(array, parameters(grouped)[name]), name


def test_the_first_pattern_that_matches_counts() -> None:
    groups = ParameterGroups(TrainConfig(groups=GROUPS, weight_decay=0.1))
    assert groups.weight_decay("layers.1.mlp_norm.scale", False) == DECAY
    assert groups.learning_rate_scale("layers.1.mlp_norm.scale") == 1.0
    assert groups.learning_rate_scale("layers.1.attention.query.weight") == 0.0
    assert groups.weight_decay("layers.1.attention.query.weight", True) == 0.1
    assert groups.weight_decay("layers.0.attention.query.bias", False) == 0.0


def test_groups_are_given_on_the_command_line_and_in_files(tmp_path: Any) -> None:
    text = "{'embed.*': {learning_rate_scale: 0.5, weight_decay: 0}, '*.bias': {weight_decay: 1e-2}}"
    expected = {"embed.*": {"learning_rate_scale": 0.5, "weight_decay": 0}, "*.bias": {"weight_decay": 0.01}}
    (tmp_path / "groups.yaml").write_text(f"train:\n  groups: {text}\n")
    for arguments in (["--train.groups", text], ["--config", str(tmp_path / "groups.yaml")]):
        config = parse_config(arguments)
        assert config.train.groups == expected
        assert list(config.train.groups) == list(expected)
    assert Config.load({"train": {"groups": expected}}).train.groups == expected


BAD = [
    ({"embedding": {"weight_decay": 0}}, "no parameter's name matches 'embedding'; there are embed.tokens"),
    ({"*": {"weight_decay": 0}, "embed.*": {"weight_decay": 1}}, "'embed.\\*' matches belong to groups before it"),
    ({"embed.*": {"learning_rate": 0.1}}, "write learning_rate_scale, a factor of train.learning_rate"),
    ({"embed.*": {"rate": 0.1}}, "there is no option 'rate' of groups"),
    ({"embed.*": {"weight_decay": -1}}, "weight_decay is -1, expected a number, 0 or more"),
    ({"embed.*": {"learning_rate_scale": float("nan")}}, "learning_rate_scale is nan"),
    ({"embed.*": {"learning_rate_scale": True}}, "learning_rate_scale is True"),
    ({"embed.*": 0.5}, "expected options of the group, got 0.5"),
    ({"embed.*": {}}, "expected options of the group"),
    ({3: {"weight_decay": 0}}, "expected a pattern of parameters' names"),
    ({"embed.*": {"muon": True}}, "with --train.optimizer muon"),
]


@pytest.mark.parametrize("groups, message", BAD, ids=[str(number) for number in range(len(BAD))])
def test_bad_groups_are_refused_in_one_sentence(groups: Any, message: str) -> None:
    with pytest.raises(HvdlmError, match=message) as error:
        check(TrainConfig(groups=groups), model_spec("gpt"))
    assert len(str(error.value)) < 400


@pytest.mark.parametrize("name", ["gpt", "llama", "lstm", "seq2seq", "ctc", "convnet"])
def test_a_pattern_without_a_match_lists_the_names_of_a_model(name: str) -> None:
    with pytest.raises(HvdlmError, match="there are ") as error:
        check(TrainConfig(groups={"x" * 200: {"weight_decay": 0}}), model_spec(name))
    assert len(str(error.value)) < 400
