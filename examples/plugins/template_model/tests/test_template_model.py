"""Tests both implementations against the equations in numpy."""

import importlib

import numpy as np
import pytest
from template_model import ORDER, make

from hvdlm.config import ModelConfig

VOCAB, TIME = 11, 7
SPEC = make(ModelConfig(width=5), VOCAB, TIME)
TOKENS = np.random.default_rng(1).integers(0, VOCAB, (2, TIME)).astype(np.int32)


def logits(framework, tokens):
    """Return the logits of a framework's implementation as an array."""
    library = importlib.import_module(framework)
    tensor, extra = (library.as_tensor, []) if framework == "torch" else (library.constant, [None])  # None: the seed
    model = SPEC.implementation(framework)(SPEC.settings, None, None)
    model.bind({name: tensor(array) for name, array in SPEC.initial(1).items()})
    hidden, _ = model.hidden(tensor(tokens), None, None, False, False, *extra)
    return np.asarray(model.scores(hidden))


def expected(tokens):
    p = SPEC.initial(1)
    embedded = p["embed.tokens"][tokens]
    before = np.zeros((len(tokens), ORDER - 1, SPEC.settings.width))
    padded = np.concatenate([before, embedded], 1)
    window = np.concatenate([padded[:, i : i + TIME] for i in range(ORDER)], -1)
    return np.tanh(window @ p["hidden.weight"] + p["hidden.bias"]) @ p["head.weight"] + p["head.bias"]


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_the_logits_follow_the_equations(framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    np.testing.assert_allclose(logits(framework, TOKENS), expected(TOKENS), atol=1e-6)


@pytest.mark.parametrize("framework", ["torch", "tensorflow"])
def test_no_position_depends_on_later_tokens(framework):
    pytest.importorskip(framework, reason=f"{framework} is not installed")
    changed = TOKENS.copy()
    changed[:, 4] = (changed[:, 4] + 1) % VOCAB
    before, after = logits(framework, TOKENS), logits(framework, changed)
    np.testing.assert_array_equal(before[:, :4], after[:, :4])
    assert (before[:, 4:8] != after[:, 4:8]).any()
