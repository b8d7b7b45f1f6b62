"""What every combination of model, framework, exchange and compressor has to do when it trains."""

from __future__ import annotations

import copy
import math

import numpy as np
from hvdlm_testing.checks.harness import Checked, Stage

from hvdlm.config import Config
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch

_HALF, _WHOLE = 4, 7  # steps before a state is taken (two rounds of rarer synchronisation), and all of them
_RATE = 3e-3
_APART = "ranks have different parameters after a step after which exchange.agreed is true."


def check_training(stage: Stage, spec: ModelSpec, config: Config, what: str, checked: Checked) -> list[float]:
    """Train, take the state in the middle, go on from it in another Trainable; return the losses."""
    batch = stage.batch(spec, config)
    trainable, exchange = stage.build(spec, config)
    losses = _steps(trainable, batch, 0, _HALF)
    state = {name: array.copy() for name, array in trainable.state().items()}
    checked.require(_agree(stage, trainable, exchange), f"{what}: {_APART}")
    losses += _steps(trainable, batch, _HALF, _WHOLE)
    again, _ = stage.build(spec, copy.deepcopy(config))
    again.load_state(state)
    resumed = _steps(again, batch, _HALF, _WHOLE)
    _keep(losses, what, checked)
    checked.require(
        losses[-1] < losses[0] - 0.01,
        f"{what}: the loss does not fall in {_WHOLE} steps on one batch: {_text(losses)}.",
    )
    checked.require(
        np.allclose(losses[_HALF:], resumed, atol=1e-5),
        f"{what}: after load_state(state()), losses are {_text(resumed)}, without it {_text(losses[_HALF:])}: state() "
        "leaves out what training goes on from.",
    )
    _check_state(spec, state, set(trainable.shards()), what, checked)
    return losses


def check_steps(stage: Stage, spec: ModelSpec, config: Config, what: str, checked: Checked) -> None:
    """Train a few steps: losses stay finite, and ranks agree."""
    trainable, exchange = stage.build(spec, config)
    _keep(_steps(trainable, stage.batch(spec, config), 0, _HALF), what, checked)
    checked.require(_agree(stage, trainable, exchange), f"{what}: {_APART}")


def _keep(losses: list[float], what: str, checked: Checked) -> None:
    checked.figures += losses
    checked.require(all(map(math.isfinite, losses)), f"{what}: a loss is not finite: {_text(losses)}.")


def _steps(trainable: Trainable, batch: Batch, first: int, last: int) -> list[float]:
    return [float(trainable.train_step([batch], _RATE, step).loss) for step in range(first, last)]


def _agree(stage: Stage, trainable: Trainable, exchange: Exchange) -> bool:
    prints = stage.world.gather_objects(trainable.fingerprints() if exchange.agreed else {})
    return all(one == prints[0] for one in prints)


def _check_state(spec: ModelSpec, state: dict[str, np.ndarray], shards: set[str], what: str, checked: Checked) -> None:
    wanted = {f"parameters/{param.name}" for param in spec.params}
    missing = sorted(wanted - set(state))
    checked.require(not missing, f"{what}: state() lacks {', '.join(missing)}.")
    for param in spec.params:
        array = state.get(f"parameters/{param.name}")
        if array is not None:
            checked.require(
                array.shape == tuple(param.shape),
                f"{what}: parameters/{param.name} of state() is {list(array.shape)}, described as {list(param.shape)}.",
            )
    other = {name for name in state if not name.startswith("exchange/")}
    checked.require(other == shards, f"{what}: pieces() and state() differ in {', '.join(sorted(other ^ shards))}.")


def _text(losses: list[float]) -> str:
    return ", ".join(f"{loss:.6f}" for loss in losses)
