"""What a plan is about: a configuration with its mesh and its model."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pluggy

from hvdlm import plugins
from hvdlm.checkpoints.base_weights import resolve
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.errors import HvdlmError
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.planning.closed_forms import state_vectors
from hvdlm.planning.hardware import Hardware
from hvdlm.planning.step_time import resolved
from hvdlm.training.run import load_plugins

_VOCAB = {"word": 10_000, "bpe": 4096}  # defaults of data.vocab_size


@dataclass(frozen=True)
class PlannedRun:
    """A run that is not started.

    Attributes:
        config: with what a checkpoint or the machine decide.
        vocab: tokens of the vocabulary, a stand-in where only the data tells.
        moments: state vectors of the optimizer.
    """

    config: Config
    manager: pluggy.PluginManager
    mesh: Mesh
    spec: ModelSpec
    vocab: int
    moments: int


def plan_run(config: Config, hardware: Hardware | None = None) -> PlannedRun:
    """Return the run of ``config``, whose number of ranks is the product of the parallel options.

    Raises:
        HvdlmError: the first problem.
    """
    config = resolve(config)
    if hardware is not None:
        config = resolved(config, hardware)
    validation.values(config)
    manager = load_plugins(config)
    manager.hook.hvdlm_prepare(config=config)
    p = config.parallel
    mesh = make_mesh((p.data or 1) * p.pipeline * p.context * p.tensor, p)
    validation.layout(config, mesh)
    validation.model(config, manager)
    spec, vocab = model_of(config, manager)
    return PlannedRun(config, manager, mesh, spec, vocab, state_vectors(manager, config))


def model_of(config: Config, manager: pluggy.PluginManager) -> tuple[ModelSpec, int]:
    """Return the description of the model, and the size of its vocabulary, without looking at the data."""
    vocab = config.model.vocab or config.data.vocab_size or _VOCAB.get(config.data.tokenizer, 256)
    maker = plugins.find_model(manager, config.model.name)
    return adapt(maker(config.model, vocab, config.data.context), config.lora), vocab


def with_ranks(config: Config, ranks: int | None) -> Config:
    """Return ``config`` with the data axis that makes ``ranks`` of it; None: as it is.

    Raises:
        HvdlmError: no data axis does.
    """
    if ranks is None:
        return config
    p = config.parallel
    unit = p.pipeline * p.context * p.tensor
    if ranks < 1 or ranks % unit:
        axes = "parallel.pipeline x parallel.tensor" if p.context == 1 else "pipeline x context x tensor ranks"
        raise HvdlmError(f"--ranks: got {ranks}, expected a multiple of {axes}, {unit}.")
    return replace(config, parallel=replace(p, data=ranks // unit))
