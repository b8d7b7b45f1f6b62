"""Every hook of hvdlm, on one page. A plugin implements those it wants with ``@hvdlm.hookimpl``.

Makers answer with what they make when the name is theirs and with None otherwise; the first answer counts.
Events are told to every plugin on every rank; what only one rank should do (write a file), rank 0 does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from hvdlm.config import Config
    from hvdlm.models.spec import ModelMaker, ModelSpec
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.protocols.backend import Backend
    from hvdlm.protocols.compressor import CompressorMaker
    from hvdlm.protocols.exchange import Exchange
    from hvdlm.protocols.framework import Framework
    from hvdlm.protocols.group import Group
    from hvdlm.protocols.scheduler import Scheduler
    from hvdlm.protocols.task import OpenScorer, Task
    from hvdlm.protocols.types import Prediction, StepResult
    from hvdlm.protocols.world import World

hookspec = pluggy.HookspecMarker("hvdlm")
hookimpl = pluggy.HookimplMarker("hvdlm")


@hookspec(firstresult=True)
def hvdlm_make_framework(name: str) -> Framework | None:
    """Return the framework of this name; may import it."""


@hookspec(firstresult=True)
def hvdlm_make_backend(name: str) -> Backend | None:
    """Return the backend of this name; must not import a framework or a transport yet."""


@hookspec(firstresult=True)
def hvdlm_make_exchange(
    name: str, group: Group, config: Config, compressors: Mapping[str, CompressorMaker], place: int
) -> Exchange | None:
    """Return the exchange of this name over ``group``, the ranks of the data axis, of which this is number ``place``.

    ``compressors``: all that the registered plugins bring.
    """


@hookspec(firstresult=True)
def hvdlm_make_task(name: str, config: Config, open_scorer: OpenScorer) -> Task | None:
    """Return the task of this name, its data opened; runs on every rank, before ranks meet.

    ``open_scorer``: opens the run of a language model for a task that one helps.
    """


@hookspec
def hvdlm_models() -> Mapping[str, ModelMaker]:
    """Return models by the names that ``model.name`` takes."""
    raise NotImplementedError  # a specification: pluggy never calls it


@hookspec
def hvdlm_compressors() -> Mapping[str, CompressorMaker]:
    """Return compressors by the names that ``communication.compression.algorithm`` takes; called before keras is."""
    raise NotImplementedError


@hookspec
def hvdlm_prepare(config: Config) -> None:
    """Set what has to stand in the environment before models are described and frameworks imported; import nothing."""


@hookspec
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Raise HvdlmError with one sentence where settings don't fit together, before ranks meet.

    ``spec``: the model with a stand-in vocabulary of 256.
    """


@hookspec(firstresult=True)
def hvdlm_predict(config: Config, spec: ModelSpec, mesh: Mesh, rank: int) -> Prediction | None:
    """Return what a step of ``rank`` needs by closed forms, or None where there are none for this model."""


@hookspec
def hvdlm_options() -> Mapping[str, type]:
    """Return {section: dataclass}: options of the plugin's own, ``--section.field``, typed and in ``--help``."""
    raise NotImplementedError


@hookspec
def hvdlm_schedulers() -> Mapping[str, Scheduler]:
    """Return writers of job files by the names that ``launch --scheduler`` takes."""
    raise NotImplementedError


@hookspec
def hvdlm_run_started(config: Config, world: World, info: Mapping[str, Any]) -> None:
    """Hear that all ranks are ready: ``info`` has parameters, flops_per_token, start_step, versions."""


@hookspec
def hvdlm_step_ended(step: int, result: StepResult, learning_rate: float, seconds: float) -> None:
    """Hear of optimizer step number ``step`` (the first is 1), which took ``seconds`` with its batch."""


@hookspec
def hvdlm_evaluated(step: int, metrics: Mapping[str, float]) -> None:
    """Hear the task's figures on the whole validation split after ``step`` steps."""


@hookspec
def hvdlm_checkpoint_saved(step: int, path: str, seconds: float, total_seconds: float) -> None:
    """Hear that the checkpoint in ``path`` is whole; of its ``total_seconds``, training stood still for ``seconds``."""


@hookspec
def hvdlm_rolled_back(step: int, to_step: int, batches: Sequence[int]) -> None:
    """Hear that after ``step`` the run went back to the checkpoint of ``to_step``, and leaves out these batches."""


@hookspec
def hvdlm_run_ended(summary: Mapping[str, Any]) -> None:
    """Hear that training is over: ``summary`` is what ``summary.json`` holds."""
