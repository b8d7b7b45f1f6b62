"""Checks of training, the same for every combination of model, framework, exchange and compressor."""

from __future__ import annotations

import copy
import math

import numpy as np

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_testing.checks.harness import Findings, Harness

_HALF, _WHOLE = 4, 7  # steps before the state is saved (two rounds of local SGD), and in all
_LEARNING_RATE = 3e-3
_DIVERGED = "ranks have different parameters after a step at which exchange.agreed is true."


def check_training(
    harness: Harness,
    spec: ModelSpec,
    config: Config,
    label: str,
    findings: Findings,
    fall: float = 0.01,
    other: Trainable | None = None,
) -> list[float]:
    """Train, save the state in the middle, resume from it in another Trainable; return the losses.

    ``fall``: the least decrease of the loss. ``other``: a Trainable that gets the state, while the first one resumes
    from it, as after a rollback: frameworks need not trace or compile another step. Runs resume in another one.
    """
    batch = harness.batch(spec, config)
    trainable, exchange = harness.build(spec, config)
    losses = _steps(trainable, batch, 0, _HALF)
    state = {name: array.copy() for name, array in trainable.state().items()}
    findings.require(_agree(harness, trainable, exchange), f"{label}: {_DIVERGED}")
    losses += _steps(trainable, batch, _HALF, _WHOLE)
    restored = harness.build(spec, copy.deepcopy(config))[0] if other is None else other
    restored.load_state(state)
    _check_restored(state, restored.state(), label, findings)
    if other is not None:
        trainable.load_state(state)
    resumed = _steps(restored if other is None else trainable, batch, _HALF, _WHOLE)
    _record(losses, label, findings)
    findings.require(
        losses[-1] < losses[0] - fall,
        f"{label}: the loss does not fall in {_WHOLE} steps on one batch: {_text(losses)}.",
    )
    findings.require(
        np.allclose(losses[_HALF:], resumed, atol=1e-5),
        f"{label}: after load_state(state()), losses are {_text(resumed)}, without it {_text(losses[_HALF:])}: state() "
        "leaves something out that training depends on.",
    )
    _check_state(spec, state, set(trainable.shards()), label, findings)
    return losses


def check_steps(harness: Harness, spec: ModelSpec, config: Config, label: str, findings: Findings) -> None:
    """Train a few steps: losses stay finite, and ranks have the same parameters."""
    trainable, exchange = harness.build(spec, config)
    _record(_steps(trainable, harness.batch(spec, config), 0, _HALF), label, findings)
    findings.require(_agree(harness, trainable, exchange), f"{label}: {_DIVERGED}")


def _record(losses: list[float], label: str, findings: Findings) -> None:
    findings.figures += losses
    findings.require(all(map(math.isfinite, losses)), f"{label}: a loss is not finite: {_text(losses)}.")


def _steps(trainable: Trainable, batch: Batch, first: int, last: int) -> list[float]:
    return [float(trainable.train_step([batch], _LEARNING_RATE, step).loss) for step in range(first, last)]


def _agree(harness: Harness, trainable: Trainable, exchange: Exchange) -> bool:
    fingerprints = harness.world.gather_objects(trainable.fingerprints() if exchange.agreed else {})
    return all(fingerprint == fingerprints[0] for fingerprint in fingerprints)


def _check_restored(
    saved: dict[str, np.ndarray], restored: dict[str, np.ndarray], label: str, findings: Findings
) -> None:
    """Check that what was loaded is what was saved; an exchange may keep its entries in another form."""
    names = [name for name in saved if not name.startswith("exchange/")]
    lost = [name for name in names if name not in restored or not np.array_equal(saved[name], restored[name])]
    more = f" and {len(lost) - 2} more" if len(lost) > 2 else ""
    findings.require(
        not lost, f"{label}: load_state(state()) does not restore {', '.join(lost[:2])}{more}: state() differs then."
    )


def _check_state(
    spec: ModelSpec, state: dict[str, np.ndarray], shards: set[str], label: str, findings: Findings
) -> None:
    expected = {f"parameters/{param.name}" for param in spec.params}
    missing = sorted(expected - set(state))
    findings.require(not missing, f"{label}: state() lacks {', '.join(missing)}.")
    for param in spec.params:
        array = state.get(f"parameters/{param.name}")
        if array is not None:
            findings.require(
                array.shape == tuple(param.shape),
                f"{label}: parameters/{param.name} of state() is {list(array.shape)}, expected {list(param.shape)}.",
            )
    names = {name for name in state if not name.startswith("exchange/")}
    findings.require(names == shards, f"{label}: shards() and state() differ in {', '.join(sorted(names ^ shards))}.")


def _text(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)
