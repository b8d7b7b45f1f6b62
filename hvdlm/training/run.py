"""Opens a run: loads its plugins, checks the configuration, connects the ranks, builds the model."""

from __future__ import annotations

import math
from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import pluggy

from hvdlm import plugins
from hvdlm.checkpoints import agreement, discovery
from hvdlm.checkpoints.base_weights import Base, attach, open_pretrained, resolve
from hvdlm.checkpoints.load import Checkpoint, averaged, read_state
from hvdlm.checkpoints.save import Saver
from hvdlm.checkpoints.state_checks import Comparison
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.configuration.availability import choose_backend, require_framework, without_horovod
from hvdlm.data import corpora
from hvdlm.diagnostics import failure_files
from hvdlm.diagnostics.phases import READING, process
from hvdlm.errors import HvdlmError
from hvdlm.io.file_lock import FileLock
from hvdlm.io.folder_identity import FolderIdentity
from hvdlm.io.user_folders import similar_run, user_cache
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, fitted, make_mesh
from hvdlm.parallel.moving_average import KIND as AVERAGE
from hvdlm.protocols.backend import Backend
from hvdlm.protocols.exchange import Exchange
from hvdlm.protocols.framework import Framework, Resolved, ResolvesOptions
from hvdlm.protocols.state_dict import FIRST_STEP
from hvdlm.protocols.task import Task
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.world import World
from hvdlm.training import preflight, run_folder, run_lock
from hvdlm.training.abilities import check_abilities, check_average
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.run_length import with_steps
from hvdlm.training.step_guard import StepGuard

_DAY = 86400.0  # seconds


@dataclass
class Run:
    """Everything the loop needs, ready on this rank.

    ``requested``: the configuration before this machine filled it in, as config.yaml keeps it, but for what a run that
    is resumed keeps of its checkpoint (the precision, and the minimum of an earlier version's learning rate);
    ``resolved``: what this rank computes with; ``base``: the frozen weights that adapters are added to; ``identity``:
    that of the run's folder, on the rank that writes it; ``closing``: what the end of training ends, also by an error.
    """

    config: Config
    requested: Config
    manager: pluggy.PluginManager
    world: World
    mesh: Mesh
    task: Task
    spec: ModelSpec
    exchange: Exchange
    trainable: Trainable
    checkpoint: Checkpoint | None
    cursor: DataCursor
    guard: StepGuard
    saver: Saver
    comparison: Comparison
    resolved: Resolved
    base: Base | None = None
    identity: FolderIdentity | None = None
    closing: ExitStack = field(default_factory=ExitStack)

    def check_folder(self) -> None:
        """Raise RankError where the run's folder was removed, renamed or replaced."""
        if self.identity is not None:
            self.identity.check()

    @property
    def start_step(self) -> int:
        """Optimizer steps done when the run was opened."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.log.run)

    @property
    def rows(self) -> tuple[int, int]:
        """This rank's rows (first, last exclusive) of the global batch."""
        count = self.config.train.batch_size // self.mesh.data
        first = self.mesh.coordinates(self.world.rank)["data"] * count
        return first, first + count


@dataclass(frozen=True)
class Plan:
    """A checked run, before ranks are connected and before a framework is imported.

    ``resume``: the checkpoint to resume from, as ``checkpoint.resume`` names it; ``writes``: whether the run writes its
    folder; ``average``: whether the moving average of the checkpoint's weights is loaded in their place.
    """

    config: Config
    requested: Config
    manager: pluggy.PluginManager
    backend: Backend
    mesh: Mesh
    resume: str
    writes: bool
    average: bool = False


@dataclass(frozen=True)
class Opened:
    """A run whose data is open: its plan, with the number of steps, its model's description, and adapters' weights."""

    plan: Plan
    task: Task
    spec: ModelSpec
    base: Base | None


@dataclass(frozen=True)
class Connected(Opened):
    """A run whose ranks are connected, its model not yet built. ``lock``: of its folder, where this rank holds it."""

    framework: Framework
    world: World
    lock: FileLock | None


def load_plugins(config: Config, *names: str) -> pluggy.PluginManager:
    """Return the plugins that ``config`` uses, loaded, and those called ``names``.

    Raises:
        HvdlmError: one is not installed, or does not import.
    """
    plugins.require(config.plugins)
    compression = config.communication.compression.algorithm
    sums = config.parallel.zero_gather or config.parallel.data_per_node > 1
    used: Iterable[str] = (
        config.framework,
        *names,
        config.task,
        config.model.name,  # a model and an exchange may come from a plugin of the same name
        config.communication.exchange,
        config.train.optimizer,
        config.train.schedule,
        *(("samples",) if config.log.sample_tokens else ()),
        *(("profile",) if config.log.profile is not None else ()),
        *config.plugins,
        *(("compression", compression) if compression != "none" or sums else ()),
        *(("exact",) if config.communication.reduction == "exact" else ()),
        *(("auto", "compression") if config.communication.auto or config.communication.max_loss_gap else ()),
    )
    return plugins.load(used)


def plan(config: Config, *, writes: bool = True, resume: str | None = None, fits: bool = False) -> Plan:
    """Check ``config`` against this machine and set thread counts.

    Args:
        config: what the user asks for; it is not changed.
        writes: whether the run will write its folder.
        resume: the checkpoint to resume from; None: that of ``checkpoint.resume`` where the run writes, else none.
        fits: whether ranks take another layout where they are not as many as that of ``config`` needs.

    Raises:
        HvdlmError: the first problem.
    """
    config = resolve(config)
    validation.values(config)
    plugins.require(config.plugins)
    backend_name = choose_backend(config.framework) if config.backend == "auto" else config.backend
    if config.communication.exchange not in plugins.installed() and not config.plugins:
        raise plugins.unknown("exchange", config.communication.exchange)
    manager = load_plugins(config, backend_name)
    backend = plugins.make(manager, "backend", backend_name)
    rank, size, _, _ = backend.launch_shape()
    if fits:
        config = _fitted(config, size)
    if config.backend == "auto" and backend_name == "mpi4py" and rank == 0:
        missing = without_horovod(config.framework)
        print(f"hvdlm: backend mpi4py carries this run, since {missing}", flush=True)
    # Standard input is stored in a file, which config.yaml names, so that the run can be resumed and evaluated.
    requested = config
    config = replace(config, train=replace(config.train, threads=backend.prepare(config)))
    manager.hook.hvdlm_prepare(config=config)
    config = replace(config, backend=backend_name)
    mesh = make_mesh(size, config.parallel)
    validation.layout(config, mesh)
    if size > 1 and "-" in (*config.data.paths, *config.data.validation_paths):
        raise HvdlmError(
            "data.path -: a launcher gives standard input to one rank only: python -m hvdlm prepare --output FOLDER "
            "first, then --data.path FOLDER."
        )
    validation.model(config, manager)
    algorithm = config.communication.compression.algorithm
    validation.communication(config, size, backend_name, plugins.provided(manager, "compressors", algorithm))
    if config.communication.reduction == "exact" and config.communication.exact_rows:
        config = replace(config, train=replace(config.train, micro_batch_size=config.communication.exact_rows))
    require_framework(config.framework, size, backend_name)
    plugins.check_keras(config)
    data = corpora.store_stdin(config)
    if resume is None:
        resume = config.checkpoint.resume if writes else "none"
    return Plan(replace(config, data=data), replace(requested, data=data), manager, backend, mesh, resume, writes)


def _fitted(config: Config, size: int) -> Config:
    """Return ``config`` in a layout of ``size`` ranks that train nothing.

    Data ranks that can't share the training batch have one of its size each, which all micro-batches divide.
    """
    parallel, train = fitted(config.parallel, size), config.train
    data = make_mesh(size, parallel).data
    rows = math.lcm(train.micro_batch_size or 1, config.communication.exact_rows or 1)
    if train.batch_size % (data * rows * (parallel.pipeline if parallel.virtual_stages > 1 else 1)):
        train = replace(train, batch_size=train.batch_size * data)
    return replace(config, parallel=parallel, train=train)


def _check_folder(config: Config, size: int) -> Checkpoint | None:
    """Return the checkpoint to resume from, where one process alone can tell; check that the folder may be written."""
    folder = Path(config.log.run)
    # Several ranks search together once they are connected: a node may lack files that others have.
    checkpoint = discovery.find(folder, config.checkpoint.resume, warn=False) if size == 1 else None
    run_folder.check_foreign(folder, discovery.newest_step(folder) is not None)
    occupied = config.checkpoint.resume == "none" and (folder / "config.yaml").exists()
    if occupied and not config.log.overwrite:
        raise HvdlmError(
            f"{folder} already holds a run: resume it (--checkpoint.resume auto), choose another folder "
            "(--log.run NAME) or delete it by starting afresh (--log.overwrite true)."
        )
    return checkpoint


def connect(plan: Plan) -> Connected:
    """Open the data, import the framework and connect the ranks. All ranks call.

    Raises:
        HvdlmError: another run is writing the folder or has written it, the data don't fit the model, or the transport
            doesn't work.
    """
    rank, _, local_rank, _ = plan.backend.launch_shape()
    lock = run_lock.hold(Path(plan.config.log.run), rank, local_rank) if plan.writes else None
    try:
        return _connect(plan, lock)
    except BaseException:
        if lock:
            lock.release()
        raise


def _connect(plan: Plan, lock: FileLock | None) -> Connected:
    share_phases(plan)
    _, size, _, _ = plan.backend.launch_shape()
    checkpoint = _check_folder(plan.config, size) if plan.writes else None  # now that no other run writes it
    opened = open_task(plan)
    if checkpoint:
        preflight.check_continuation(checkpoint, opened.task, opened.spec, opened.plan.config, opened.base)
    framework, world = connect_ranks(plan)
    return Connected(**vars(opened), framework=framework, world=world, lock=lock)


def open_task(plan: Plan) -> Opened:
    """Open the data, which decides how many steps ``train.epochs`` and ``train.tokens`` are.

    Raises:
        HvdlmError: the data don't fit the model.
    """
    config, manager = plan.config, plan.manager
    with process.during("preparing the data", patience=READING):
        task = plugins.make(manager, "task", config.task, config=config)
    config = with_steps(config, task)
    if config.train.eval_tokens is not None and "limit" not in signature(task.validation).parameters:
        raise HvdlmError(f"train.eval_tokens: the task {config.task} evaluates its whole split only: leave it out.")
    vocab = config.model.vocab or task.vocab
    if vocab < task.vocab:
        raise HvdlmError(
            f"model.vocab {vocab} is less than the {task.vocab} ids of the texts: {_larger(config, task.vocab)}, or "
            "another --data.tokenizer."
        )
    spec = plugins.find_model(manager, config.model.name)(config.model, vocab, config.data.context)
    if set(spec.reads) != set(task.reads):
        reads, gives = (", ".join(names) or "tokens alone" for names in (spec.reads, task.reads))
        raise HvdlmError(
            f"model.name {config.model.name} reads {reads}, task {config.task} gives {gives}: choose another of the "
            "two (a seq2seq translates, a ctc transcribes speech, a convnet classifies digits)."
        )
    manager.hook.hvdlm_check_data(config=config, task=task)
    spec, base = attach(adapt(spec, config.lora), config.model.pretrained, config.train.seed, config.plugins)
    return Opened(replace(plan, config=config), task, spec, base)


def share_phases(plan: Plan) -> None:
    """Show this rank's phases and failures to the launch's other ranks until they are connected."""
    process.timeout = plan.config.communication.timeout
    _, size, _, _ = plan.backend.launch_shape()
    if plan.writes:
        process.share(failure_files.files_folder(plan.config.log.run), size)
    elif size > 1:
        process.share(user_cache() / "ranks", size, keep_seconds=_DAY)


def connect_ranks(plan: Plan) -> tuple[Framework, World]:
    """Import the framework and connect the ranks. All ranks call.

    Raises:
        HvdlmError: the transport doesn't work.
    """
    with process.during(f"importing {plan.config.framework}"):
        framework = plugins.make(plan.manager, "framework", plan.config.framework)
    with process.during("waiting for the other ranks to connect", patience=1.0, waits=True):
        world = plan.backend.start(framework, plan.mesh.groups(), plan.config)
    process.connect(world.recorder, world.abort)
    process.begin("building the model")
    return framework, world


def _larger(config: Config, vocab: int) -> str:
    """Return how a model gets more embedding rows: a folder's sizes are fixed."""
    if config.model.pretrained:
        return f"enlarge the folder's model (transformers: model.resize_token_embeddings({vocab}), and save it)"
    return f"--model.vocab {vocab} or more"


def build(connected: Connected) -> Run:
    """Check that all ranks agree, build the model and restore the checkpoint. All ranks call.

    Raises:
        HvdlmError: ranks have different settings or files, or the checkpoint doesn't fit.
        RankError: a group's collectives don't work.
    """
    plan, task, spec, base = connected.plan, connected.task, connected.spec, connected.base
    world, framework = connected.world, connected.framework
    config, manager, mesh = plan.config, plan.manager, plan.mesh
    folder = Path(config.log.run)
    keep_recorder(plan, world)
    resolver = framework if isinstance(framework, ResolvesOptions) else None
    resolved = resolver.resolve(config, spec, world) if resolver else Resolved()
    preflight.agree(world, config, task, base, resolved)
    preflight.check_groups(world, framework, mesh)
    checkpoint = agreement.choose(folder, plan.resume, world)
    if checkpoint and plan.average:
        checkpoint = averaged(checkpoint)
    if checkpoint:
        preflight.check_continuation(checkpoint, task, spec, config, base)
    elif plan.resume == "auto" and world.rank == 0:
        print(f"hvdlm: {folder} holds no checkpoint yet: the run starts afresh.{similar_run(folder)}", flush=True)
    manifest = checkpoint.manifest if checkpoint else {}
    batch_size = config.train.batch_size
    cursor = DataCursor.of(manifest, batch_size) if checkpoint else DataCursor(batch_size)
    if checkpoint:  # whose batches may have had another size
        config = with_steps(config, task, checkpoint.step, cursor.trained)
    precision = preflight.precision(config.train.precision, resolved, checkpoint if resolver else None)
    kept: dict[str, Any] = {
        "precision": precision,
        "min_learning_rate": preflight.min_learning_rate(config.train, checkpoint),
    }
    config = replace(config, train=replace(config.train, **kept, compile=resolved.compile))
    group = world.group(mesh.replica_group(world.rank))
    exchange = plugins.make_exchange(manager, config, world, group)
    if config.model.pretrained and not checkpoint and base is None:
        spec = open_pretrained(config.model.pretrained, config.plugins).attach(spec)
    optimizer = plugins.find_optimizer(manager, config.train)
    own = {"optimizer": optimizer} if optimizer else {}  # frameworks without such optimizers need no parameter
    if own and "optimizer" not in signature(framework.build).parameters:
        rule = config.train.optimizer
        raise HvdlmError(f"train.optimizer {rule}: {framework.name} takes none of plugins: choose adamw.")
    check_abilities(framework, config)
    check_average(config, exchange, optimizer)
    trainable = framework.build(spec, mesh, world, exchange, config, **own)
    if checkpoint:
        load_state(checkpoint, trainable, world, mesh)
    return Run(
        config=config,
        requested=replace(plan.requested, train=replace(plan.requested.train, **kept)),
        manager=manager,
        world=world,
        mesh=mesh,
        task=task,
        spec=spec,
        exchange=exchange,
        trainable=trainable,
        checkpoint=checkpoint,
        cursor=cursor,
        guard=StepGuard(config.train, exchange.traits.replicas_diverge, manifest.get("guard")),
        saver=Saver(folder / "checkpoints", world, config.checkpoint, 2 * config.communication.timeout),
        comparison=Comparison(world),
        resolved=resolved,
        base=base,
    )


def keep_recorder(plan: Plan, world: World) -> None:
    """Keep the flight recorder in the run's folder, for a command that doesn't write it with the ranks' phases."""
    if world.size > 1:
        folder = failure_files.files_folder(plan.config.log.run) if plan.writes else process.attempt
        if folder:
            world.recorder.keep_in(folder, world.rank)


def start(plan: Plan) -> Run:
    """Connect the ranks and build the model. All ranks call."""
    return build(connect(plan))


def load_state(checkpoint: Checkpoint, trainable: Trainable, world: World, mesh: Mesh) -> None:
    """Restore ``trainable`` from this rank's shards of a checkpoint. All ranks call.

    State of single ranks (``exchange/``) is restored only on the mesh on which it was saved. Where the checkpoint lacks
    some of the optimizer's state, because another one wrote it, bias is corrected as if this was the first update: with
    zeros in place of AdamW's second moments, the next updates would be several times too large.
    """
    wanted = trainable.shards()
    state = read_state(checkpoint, wanted, world.rank, world.size)
    moments = [
        name for name in wanted if name.startswith("optimizer/") and not name.startswith(f"optimizer/{AVERAGE}/")
    ]
    if world.any(any(name not in state for name in moments)):
        state[FIRST_STEP] = np.array(checkpoint.step, np.float64)
    same_mesh = tuple(checkpoint.manifest.get("mesh", ())) == mesh.shape
    trainable.load_state({name: a for name, a in state.items() if same_mesh or not name.startswith("exchange/")})
