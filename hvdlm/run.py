"""Opens a run: finds its plugins, checks everything that can be wrong, meets the other ranks, builds the model."""

from __future__ import annotations

import copy
import dataclasses
import importlib.metadata
import importlib.util
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pluggy

from hvdlm import checkpoint, plugins, validate
from hvdlm.checkpoint import Checkpoint
from hvdlm.config import Config
from hvdlm.data.tokenfile import without_stdin
from hvdlm.generate import encode
from hvdlm.interfaces import Framework, HvdlmError, Task, Trainable, World, nearest
from hvdlm.models.spec import ModelSpec
from hvdlm.topology import Mesh, make_mesh


@dataclass
class Run:
    """Everything a loop needs, ready on this rank. ``asked``: the configuration before this machine filled it in."""

    config: Config
    asked: Config
    manager: pluggy.PluginManager
    world: World
    mesh: Mesh
    task: Task
    spec: ModelSpec
    trainable: Trainable
    checkpoint: Checkpoint | None

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
    """A run that has been checked, before any rank has met another and before a framework is imported."""

    config: Config
    asked: Config
    manager: pluggy.PluginManager
    backend: Any
    mesh: Mesh
    rank: int
    checkpoint: Checkpoint | None


def plan(config: Config, *, fresh: bool = True) -> Plan:
    """Check ``config`` against this machine and set thread counts; ``fresh``: the run will write its folder.

    Raises:
        HvdlmError: the first thing found wrong.
    """
    asked, config = config, copy.deepcopy(config)
    validate.values(config)
    plugins.require(config.plugins)
    backend_name = choose_backend() if config.backend == "auto" else config.backend
    if config.communication.exchange not in plugins.installed() and not config.plugins:
        raise plugins.unknown("exchange", config.communication.exchange)
    names = [config.framework, backend_name, config.task, config.communication.exchange, "sharding", *config.plugins]
    if config.communication.compression.algorithm != "none":
        names += ["compression", config.communication.compression.algorithm]  # a plugin's own may carry its name
    manager = plugins.load(names)
    backend = plugins.make(manager, "backend", backend_name)
    rank, size, _, _ = backend.launch_shape()
    config.train.threads = backend.prepare(config)
    config.backend = backend_name
    mesh = make_mesh(size, config.parallel)
    validate.layout(config, mesh)
    if size > 1 and "-" in (*config.data.paths, *config.data.validation_paths):
        raise HvdlmError(
            "data.path -: a launcher gives standard input to one rank only: python -m hvdlm prepare --output FOLDER "
            "first, then --data.path FOLDER."
        )
    manager.hook.hvdlm_check(config=config, spec=validate.model(config, plugins.models(manager)))
    validate.communication(config, size, backend_name, plugins.compressors(manager))
    require_framework(config.framework, size)
    found = _find_checkpoint(config) if fresh else None
    # Kept in a file, which the run's config.yaml names, so that it can be resumed, evaluated and continued.
    config.data = without_stdin(config.data)
    asked = dataclasses.replace(asked, data=config.data)
    return Plan(config, asked, manager, backend, mesh, rank, found)


def choose_backend() -> str:
    """Return gloo under ``horovodrun --gloo``, mpi under another launcher of several ranks, else local."""
    if "HOROVOD_GLOO_RENDEZVOUS_ADDR" in os.environ:
        return "gloo" if os.environ.get("HOROVOD_SIZE") != "1" else "local"
    sizes = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "SLURM_STEP_NUM_TASKS")
    return "mpi" if any(os.environ.get(name, "1") != "1" for name in sizes) else "local"


def require_framework(name: str, size: int) -> None:
    """Check, without importing, that a built-in framework is installed and that Horovod is built for it.

    Raises:
        HvdlmError: it isn't.
    """
    if name not in plugins.installed():
        raise HvdlmError(f"framework: no plugin provides {name!r}; {nearest(name, ('torch', 'tensorflow'))}")
    if name not in ("torch", "tensorflow"):
        return
    if importlib.util.find_spec(name) is None:
        other = "tensorflow" if name == "torch" else "torch"
        raise HvdlmError(
            f'framework {name} is not installed here: make setup FRAMEWORKS="{name}", or --framework {other}.'
        )
    if size > 1:
        horovod = importlib.util.find_spec("horovod")
        folder = Path(horovod.origin).parent / name if horovod and horovod.origin else None
        if folder is None or not list(folder.glob("mpi_lib*.so")):
            missing = "is not installed" if folder is None else f"was built without {name}"
            raise HvdlmError(f'Horovod {missing}, and {size} ranks need it: make setup FRAMEWORKS="{name}".')


def _find_checkpoint(config: Config) -> Checkpoint | None:
    folder = Path(config.log.run)
    found = checkpoint.find(folder, config.checkpoint.resume)
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
    task = plugins.make(manager, "task", config.task, config=config)
    spec = plugins.models(manager)[config.model.name](config.model, task.vocab, config.data.context)
    if config.log.sample_tokens:
        encode(task.tokenizer, config.log.sample_prompt)
    if plan.checkpoint:
        _check_tokenizer(plan.checkpoint, task)
    framework = plugins.make(manager, "framework", config.framework)
    world = plan.backend.start(config.framework, plan.mesh.groups(), config)
    try:
        _agree(world, config, task)
        group = world.group(plan.mesh.group("data", world.rank))
        more = {"compressors": plugins.compressors(manager), "place": group.ranks.index(world.rank)}
        exchange = plugins.make(manager, "exchange", config.communication.exchange, group=group, config=config, **more)
        trainable = framework.build(spec, plan.mesh, world, exchange, config)
        if plan.checkpoint:
            trainable.load_state(_load(plan.checkpoint, trainable, world, plan.mesh))
    except HvdlmError as error:
        error.world = world  # type: ignore[attr-defined]
        raise
    return Run(config, plan.asked, manager, world, plan.mesh, task, spec, trainable, plan.checkpoint)


def _load(found: Checkpoint, trainable: Trainable, world: World, mesh: Mesh) -> dict[str, Any]:
    """Return this rank's part of a checkpoint; what a rank alone knew is of use where ranks hold the same parts."""
    state = checkpoint.load(found, trainable.pieces(), world.rank, world.size)
    same = tuple(found.manifest.get("mesh", ())) == mesh.shape
    return {name: array for name, array in state.items() if same or not name.startswith("exchange/")}


@dataclass
class Meeting:
    """Ranks that met to measure, not to train."""

    world: World
    framework: Framework


def meet(config: Config) -> Meeting:
    """Meet the other ranks as a run with ``config`` would, without data or a model."""
    found = plan(config, fresh=False)
    framework = plugins.make(found.manager, "framework", config.framework)
    return Meeting(found.backend.start(config.framework, found.mesh.groups(), found.config), framework)


def _check_tokenizer(found: Checkpoint, task: Any) -> None:
    before = found.manifest.get("tokenizer")
    if before and before != task.tokenizer.hash:
        raise HvdlmError(
            f"checkpoint {found.path} was trained with another tokenizer or vocabulary than this run's: use the same "
            "--data.path and --data.tokenizer, or a new --log.run."
        )


def _agree(world: World, config: Config, task: Any) -> None:
    """Check that all ranks have the same configuration and vocabulary."""
    said = world.gather_objects(
        [repr({**config.to_dict(), "train": {**config.to_dict()["train"], "threads": 0}}), task.tokenizer.hash]
    )
    for rank, other in enumerate(said):
        if other != said[0]:
            what = "configuration" if other[0] != said[0][0] else "data"
            raise HvdlmError(f"rank {rank} has another {what} than rank 0: give all ranks the same options and files.")


def clear(folder: Path) -> None:
    """Delete what an earlier run wrote into ``folder``, and nothing else."""
    for name in ("config.yaml", "metrics.jsonl", "summary.json", "tokenizer.json"):
        (folder / name).unlink(missing_ok=True)
    for name in ("checkpoints", "tensorboard"):
        shutil.rmtree(folder / name, ignore_errors=True)


def versions(framework: str) -> dict[str, str]:
    """Return the versions of what computes, by distribution name."""
    names = ["hvdlm", framework, "tensorflow-cpu", "horovod", "mpi4py", "numpy"]
    found = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
