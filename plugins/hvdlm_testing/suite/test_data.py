"""Tests of tokenizers, data preparers and learning-rate schedules."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from hvdlm.config import DataConfig, TrainConfig
from hvdlm.data.tokenizers import from_json
from hvdlm.errors import HvdlmError
from hvdlm.protocols.tokenizer_kind import TokenizerKind
from hvdlm_testing.plugin_under_test import PluginUnderTest
from hvdlm_testing.suite import fail

_TEXT = "Once upon a time there was a text of a few words, and a text of a few words more.\n" * 20
_SIZE = 300


@pytest.mark.provides("tokenizers")
def test_tokenizers_are_restored_from_their_descriptions(plugin: PluginUnderTest) -> None:
    fail([fault for name, kind in plugin.members("tokenizers").items() for fault in _faults(name, kind)])


def _faults(name: str, kind: TokenizerKind) -> Iterator[str]:
    label = f"tokenizer {name}"
    try:
        tokenizer = kind.train(iter([_TEXT]), _SIZE)
        ids, description = tokenizer.encode(_TEXT), json.loads(json.dumps(tokenizer.to_json()))
        text = tokenizer.decode(ids.tolist())
    except Exception as error:  # a third party's module may fail in any way
        yield f"{label}: it can't be trained and encode its own text: {type(error).__name__}: {error}"
        return
    if ids.dtype != np.int32 or ids.ndim != 1 or not len(ids):
        yield f"{label}: encode returns {ids.dtype} {list(ids.shape)}, expected int32 [n]."
    elif ids.min() < 0 or ids.max() >= tokenizer.vocab:
        yield f"{label}: its ids range from {ids.min()} to {ids.max()}, vocab is {tokenizer.vocab}."
    if not isinstance(text, str):
        yield f"{label}: decode returns {type(text).__name__}, expected a string."
    if description.get("kind") != name:
        yield f"{label}: its description has the kind {description.get('kind')!r}, expected {name!r}."
    else:
        yield from _restored(label, kind, tokenizer, description)


def _restored(label: str, kind: TokenizerKind, tokenizer: Any, description: dict[str, Any]) -> Iterator[str]:
    try:
        again = kind.load(description)
    except Exception as error:
        yield f"{label}: load fails on what to_json returned: {type(error).__name__}: {error}"
        return
    if again.hash != tokenizer.hash or not np.array_equal(again.encode(_TEXT), tokenizer.encode(_TEXT)):
        yield f"{label}: a tokenizer that is loaded from its description is another one."
    if len(description) == 1:
        return  # it has no content that could be damaged
    try:
        kind.load({"kind": description["kind"]})
        yield f"{label}: load accepts a description without content: raise a ValueError."
    except (KeyError, TypeError, ValueError, HvdlmError):
        pass
    except Exception as error:
        yield f"{label}: a damaged description raises {type(error).__name__}, expected a ValueError: {error}"


@pytest.mark.provides("tokenizers")
def test_tokenizers_are_found_by_their_names(plugin: PluginUnderTest) -> None:
    faults = []
    for name, kind in plugin.members("tokenizers").items():
        try:
            from_json(kind.train(iter([_TEXT]), _SIZE).to_json())
        except Exception as error:
            faults.append(
                f"{plugin.name}: a token folder with the tokenizer {name} can't be opened: give it a name of its own, "
                f"without dots and slashes ({error})"
            )
    fail(faults)


@pytest.mark.provides("hvdlm_data_preparer")
def test_a_data_preparer_has_the_methods_of_the_contract(plugin: PluginUnderTest) -> None:
    preparer = plugin.implementation.hvdlm_data_preparer(data=DataConfig())
    if preparer is None:
        return  # the default data are not its own
    missing = [name for name in ("check", "store_stdin", "open") if not callable(getattr(preparer, name, None))]
    fail([f"{plugin.name}: its data preparer has no method {name}." for name in missing])


@pytest.mark.provides("lr_schedules")
def test_a_schedule_has_a_rate_for_every_update(plugin: PluginUnderTest) -> None:
    faults, config = [], TrainConfig(steps=40, warmup=0)
    for name, maker in plugin.members("lr_schedules").items():
        try:
            rates = [maker(config)(step) for step in range(config.steps)]
            wrong = next((i for i, r in enumerate(rates) if not (math.isfinite(r) and r >= 0)), None)
        except Exception as error:  # a third party's module may fail in any way
            faults.append(f"schedule {name} fails with 40 steps: {type(error).__name__}: {error}")
            continue
        if wrong is not None:
            faults.append(
                f"schedule {name}: the rate after {wrong} of 40 updates is {rates[wrong]}, expected 0 or more."
            )
    fail(faults)
