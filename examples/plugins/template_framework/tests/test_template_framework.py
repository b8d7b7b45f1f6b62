"""Tests the settings that the framework refuses; the conformance suite compares its losses with other frameworks."""

import pytest

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError


@pytest.mark.parametrize(
    ("section", "option", "value"),
    [
        ("train", "optimizer", "sgd"),
        ("train", "precision", "bf16"),
        ("parallel", "tensor", 2),
        ("model", "dropout", 0.1),
    ],
)
def test_settings_that_it_lacks_are_refused(section, option, value):
    config = Config(framework="template_framework")
    setattr(getattr(config, section), option, value)
    manager = plugins.load(["template_framework", "gpt"])
    spec = plugins.find_model(manager, "gpt")(config.model, 20, 8)
    with pytest.raises(HvdlmError, match=rf"has no {section}\.{option} {value}"):
        manager.hook.hvdlm_check(config=config, spec=spec)


def test_other_frameworks_are_not_its_concern():
    manager = plugins.load(["template_framework"])
    manager.hook.hvdlm_check(config=Config(framework="torch"), spec=None)
