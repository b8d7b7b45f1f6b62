"""Every hook of hvdlm, on one page. A plugin implements those it wants with ``@hvdlm.hookimpl``.

Factory hooks (``hvdlm_make_...``) return an object for a name of their own and None for others; the first result other
than None is used. Event hooks are called in every plugin on every rank; plugins that write files do so on rank 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pluggy

if TYPE_CHECKING:
    from pathlib import Path

    from hvdlm.checkpoints.load import Checkpoint
    from hvdlm.config import Config, DataConfig
    from hvdlm.models.spec import ModelMaker, ModelSpec
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.protocols.backend import Backend
    from hvdlm.protocols.compressor import CompressorMaker
    from hvdlm.protocols.data_preparer import DataPreparer
    from hvdlm.protocols.exchange import Exchange
    from hvdlm.protocols.framework import Framework, Probe
    from hvdlm.protocols.group import Group
    from hvdlm.protocols.optimizer import OptimizerMaker, ScheduleMaker
    from hvdlm.protocols.pretrained import PretrainedFolder
    from hvdlm.protocols.scheduler import Scheduler
    from hvdlm.protocols.task import Task
    from hvdlm.protocols.tokenizer_kind import TokenizerKind
    from hvdlm.protocols.types import Prediction, StepResult
    from hvdlm.protocols.world import World
    from hvdlm.telemetry.rates import Rates
    from hvdlm.training.run_control import RunControl

hookspec = pluggy.HookspecMarker("hvdlm")
hookimpl = pluggy.HookimplMarker("hvdlm")


@hookspec(firstresult=True)
def hvdlm_make_framework(name: str) -> Framework | None:
    """Return the framework of this name; may import it."""


@hookspec
def hvdlm_probes() -> Mapping[str, Probe]:
    """Return how ``python -m hvdlm doctor`` examines frameworks, by their names; imports none of them."""
    raise NotImplementedError


@hookspec(firstresult=True)
def hvdlm_make_backend(name: str) -> Backend | None:
    """Return the backend of this name; must not import a framework or a transport yet."""


@hookspec(firstresult=True)
def hvdlm_make_exchange(
    name: str,
    group: Group,
    config: Config,
    compressors: Mapping[str, CompressorMaker],
    index: int,
    subgroup: Callable[[Sequence[int]], Group],
) -> Exchange | None:
    """Return the exchange of this name over ``group``, the ranks of the data axis, in which this rank has ``index``.

    ``compressors``: those of all registered plugins. ``subgroup``: returns the group of a level's ranks
    (``parallel.data_per_node``).
    """


@hookspec(firstresult=True)
def hvdlm_make_task(name: str, config: Config) -> Task | None:
    """Return the task of this name with its data opened; called on every rank, before ranks are connected."""


@hookspec
def hvdlm_models() -> Mapping[str, ModelMaker]:
    """Return models by the names that ``model.name`` takes."""
    raise NotImplementedError  # a specification: pluggy never calls it


@hookspec
def hvdlm_compressors() -> Mapping[str, CompressorMaker]:
    """Return compressors by the names that ``communication.compression.algorithm`` takes; keras isn't imported yet."""
    raise NotImplementedError


@hookspec
def hvdlm_optimizers() -> Mapping[str, OptimizerMaker]:
    """Return optimizers by the names that ``train.optimizer`` takes; keras isn't imported yet."""
    raise NotImplementedError


@hookspec
def hvdlm_lr_schedules() -> Mapping[str, ScheduleMaker]:
    """Return learning-rate schedules by the names that ``train.schedule`` takes.

    A maker takes ``config.train`` and returns the rate after warm-up as a function of the updates done, 0, 1, ...
    """
    raise NotImplementedError


@hookspec
def hvdlm_tokenizers() -> Mapping[str, TokenizerKind]:
    """Return kinds of tokenizers by the names that ``data.tokenizer`` and descriptions of tokenizers take."""
    raise NotImplementedError


@hookspec(firstresult=True)
def hvdlm_data_preparer(data: DataConfig) -> DataPreparer | None:
    """Return what turns this data, which is no token folder, into token folders, or None for data of another plugin."""


@hookspec
def hvdlm_prepare(config: Config) -> None:
    """Set environment variables before models are described and frameworks imported; must not import a framework."""


@hookspec
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Raise HvdlmError with one sentence where settings contradict each other, before ranks are connected.

    ``spec``: the model with a stand-in vocabulary of 256.
    """


@hookspec
def hvdlm_check_data(config: Config, task: Task) -> None:
    """Raise HvdlmError with one sentence where settings contradict the data, before ranks are connected."""


@hookspec(firstresult=True)
def hvdlm_predict(config: Config, spec: ModelSpec, mesh: Mesh, rank: int, moments: int) -> Prediction | None:
    """Return the closed-form costs of a step of ``rank``, or None for an unknown architecture."""


@hookspec(firstresult=True)
def hvdlm_peak_flops(name: str, precision: str) -> float | None:
    """Return the peak rate of a device's dense products (flop/s), or None for an unknown device.

    ``name``: ``Resolved.device``. ``precision``: fp32, tf32, bf16 or fp16.
    """


@hookspec
def hvdlm_options() -> Mapping[str, type]:
    """Return {section: dataclass}, the plugin's options: typed, and explained by ``--help SECTION``."""
    raise NotImplementedError


@hookspec(firstresult=True)
def hvdlm_open_pretrained(path: Path) -> PretrainedFolder | None:
    """Return the opened folder that ``model.pretrained`` names, or None for another kind of folder."""


@hookspec(firstresult=True)
def hvdlm_export(
    name: str,
    checkpoint: Checkpoint,
    tokenizer: Path | None,
    output: Path,
    base: str | None,
    max_shard_bytes: int | None,
) -> tuple[int, str] | None:
    """Write a checkpoint to ``output`` in the format ``name``; return the number of parameters and a note to print.

    ``checkpoint``: open for reading; ``tokenizer``: the run's tokenizer.json;
    ``base``: the folder of the base weights of adapters, None: the one that the checkpoint names;
    ``max_shard_bytes``: the largest file of weights, None: one file.
    """


@hookspec
def hvdlm_schedulers() -> Mapping[str, Scheduler]:
    """Return writers of job files by the names that ``launch --scheduler`` takes."""
    raise NotImplementedError


@hookspec
def hvdlm_run_started(config: Config, world: World, info: Mapping[str, Any], run: RunControl) -> None:
    """Called when all ranks are ready. ``info``: parameters, flops_per_token, start_step, versions, ...

    ``run``: asks the run to stop, to save or to evaluate, at this or any later event, and generates text.
    """


@hookspec
def hvdlm_step_ended(step: int, result: StepResult, learning_rate: float, seconds: float, rates: Rates) -> None:
    """Called after optimizer step ``step`` (the first is 1), which took ``seconds``, fetching its batch included.

    ``rates``: sums over all steps of this process, from which the rates of any interval follow.
    """


@hookspec
def hvdlm_evaluated(step: int, metrics: Mapping[str, float]) -> None:
    """Called with the task's metrics on the whole validation split after ``step`` steps."""


@hookspec
def hvdlm_checkpoint_saved(step: int, path: str, seconds: float, total_seconds: float) -> None:
    """Called when the checkpoint in ``path`` is complete; of its ``total_seconds``, ``seconds`` blocked training."""


@hookspec
def hvdlm_rolled_back(step: int, to_step: int, batches: Sequence[int]) -> None:
    """Called after a rollback from ``step`` to the checkpoint of ``to_step``; ``batches`` will be left out."""


@hookspec
def hvdlm_run_ended(summary: dict[str, Any]) -> None:
    """Called at the end of training with the content of ``summary.json``, to which it may add (``tryfirst=True``)."""
