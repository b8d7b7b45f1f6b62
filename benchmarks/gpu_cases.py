"""The cases of the GPU kit: what is measured and compared, in order of priority, and the bars that judge it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from harness import Bar

COMPARED = 50  # steps whose losses are compared
TOLERANCES = {"fp32": 1e-4, "bf16": 2e-2}
METHOD_TOLERANCE = 1e-3  # int8, PowerSGD and DiLoCo on GPUs beside CPUs
RESUMED_TOLERANCE = 1e-3
STEPS, SHORT_STEPS = 60, 12  # of a correctness case; checkpoints at a third and two thirds, where DiLoCo synchronises
BACKENDS = ["nccl", "mpi4py", "mpi"]

LAYOUTS: dict[str, dict[str, Any]] = {
    "data 2": {"parallel.data": 2},
    "tensor 2": {"parallel.tensor": 2},
    "pipeline 2": {"parallel.pipeline": 2, "train.micro_batch_size": 4},
    "ZeRO 1": {"parallel.zero": 1},
    "ZeRO 2": {"parallel.zero": 2},
}
METHODS: dict[str, dict[str, Any]] = {
    "DiLoCo": {"communication.exchange": "diloco", "communication.local.steps": 4},
    "int8": {"communication.compression.algorithm": "int8"},
    "PowerSGD": {"communication.compression.algorithm": "power_sgd"},
}
# Neither warm-up nor decay: the rate is full from the first compared step on.
COMMON = {"train.batch_size": 8, "train.learning_rate": 1e-3, "train.schedule": "constant", "train.warmup": 0}
COMMON |= {"train.eval_every": 0, "train.compile": False, "train.tf32": False, "train.spike": 0.0}
COMMON |= {"log.every": 1, "log.progress": False, "log.tensorboard": False, "checkpoint.asynchronous": False}
COMMON |= {"framework": "torch", "data.context": 64, "model.bias": False}
SIZES = {"model.layers": 4, "model.width": 128, "model.heads": 4}
SHORT_SIZES = {
    "model.layers": 2,
    "model.width": 32,
    "model.heads": 2,
    "data.context": 16,
    "data.validation_share": 0.01,
}


@dataclass(frozen=True)
class Case:
    """One run of the correctness matrix.

    Attributes:
        name: ``BACKEND: LAYOUT, PRECISION``, ``BACKEND: METHOD`` or ``REFERENCE: ...``, unique
        options: those that distinguish it
        reference: the case whose losses it should have; "": it is one itself
        tolerance: largest difference of the losses
    """

    name: str
    options: Mapping[str, Any]
    reference: str = ""
    tolerance: float = 0.0


@dataclass(frozen=True)
class Launch:
    """Runs that are started together.

    Attributes:
        name: of the launch
        kind: ranks (gpu_worker.py), killed (a rank is killed, then one rank resumes) or speed (gpu_speed_worker.py)
        ranks: number of ranks
        backend: local, nccl, mpi or mpi4py
        cases: in order of priority
        cpu: hides the GPU
        deadline: seconds that a case may take, the start of the launch included
    """

    name: str
    kind: str
    ranks: int
    backend: str
    cases: tuple[Case, ...]
    cpu: bool = False
    deadline: float = 90.0


def references() -> list[Launch]:
    """Return the launches whose losses others are compared with: one rank, and two ranks on CPUs."""
    precisions = [Case(f"one rank: {p}", {"train.precision": p}) for p in TOLERANCES]
    methods = [Case(f"2 CPU ranks: {name}", {"train.precision": "fp32"} | o) for name, o in METHODS.items()]
    return [
        Launch("one rank", "ranks", 1, "local", tuple(precisions)),
        Launch("2 CPU ranks", "ranks", 2, "mpi", tuple(methods), cpu=True),
    ]


def matrix(backend: str, short: bool = False) -> Launch:
    """Return the launch of a backend's cases: fp32 first, since its bar is the strict one; ``short``: bf16 once."""
    cases = [
        Case(f"{backend}: {name}, {p}", {"train.precision": p} | options, f"one rank: {p}", tolerance)
        for p, tolerance in TOLERANCES.items()
        for name, options in LAYOUTS.items()
        if p == "fp32" or name == "tensor 2" or not short
    ]
    cases += [
        Case(f"{backend}: {name}", {"train.precision": "fp32"} | options, f"2 CPU ranks: {name}", METHOD_TOLERANCE)
        for name, options in METHODS.items()
    ]
    return Launch(backend, "ranks", 2, backend, tuple(cases))


def offloaded() -> Launch:
    """Return the launch of activations that wait on the host, whose results are the same."""
    cases = [
        Case(
            f"one rank: offload, {p}", {"train.precision": p, "train.activation_offload": True}, f"one rank: {p}", most
        )
        for p, most in TOLERANCES.items()
    ]
    return Launch("offload", "ranks", 1, "local", tuple(cases))


def compiled(backend: str) -> Launch:
    """Return the launch of compiled tensor and pipeline ranks."""
    cases = [
        Case(
            f"{backend}: {name}, bf16, compiled",
            {"train.precision": "bf16"} | LAYOUTS[name] | {"train.compile": True},
            "one rank: bf16",
            TOLERANCES["bf16"],
        )
        for name in ("tensor 2", "pipeline 2")
    ]
    return Launch(f"{backend}, compiled", "ranks", 2, backend, tuple(cases), deadline=180.0)


def killed(backend: str) -> Launch:
    """Return the launch in which a rank is killed, and the run resumed on one."""
    name = f"{backend}: one of two killed, resumed on one"
    case = Case(name, {"train.precision": "fp32"}, "one rank: fp32", RESUMED_TOLERANCE)
    return Launch(f"{backend}, killed", "killed", 2, backend, (case,), deadline=150.0)


def options(case: Case, short: bool) -> dict[str, Any]:
    """Return all options of a case but those of its launch."""
    steps = SHORT_STEPS if short else STEPS
    sizes = SHORT_SIZES if short else SIZES
    return {**COMMON, **sizes, "train.steps": steps, "checkpoint.every": steps // 3, **case.options}


def resumed_step(short: bool) -> int:
    """Return the step of the checkpoint from which the killed run resumes."""
    return 2 * (SHORT_STEPS if short else STEPS) // 3


@dataclass(frozen=True)
class SpeedCase:
    """hvdlm and a plain loop in turns. ``variant``: compiled, eager, or default, which is hvdlm's default options."""

    rows: int
    variant: str

    @property
    def name(self) -> str:
        """The name, unique."""
        return f"speed: batch {self.rows}, {self.variant}"

    @property
    def bar(self) -> Bar | None:
        """The bar of the ratio hvdlm / plain loop."""
        return {"compiled": Bar(at_least=1.10), "eager": Bar(at_least=1.02)}.get(self.variant)


SPEED = [SpeedCase(12, "compiled"), SpeedCase(48, "compiled"), SpeedCase(12, "eager"), SpeedCase(12, "default")]
SPEED += [SpeedCase(48, "default"), SpeedCase(48, "eager")]
DEFAULT_BAR = Bar(at_least=0.95)  # default options / the best variant, each as a ratio to the plain loop beside it
MEMORY_BAR = Bar(at_most=1.0)  # hvdlm / plain loop, batch 48


def speed(case: SpeedCase) -> Launch:
    """Return the launch of a speed case: a process of its own, so that its memory is its own."""
    return Launch(case.name, "speed", 1, "local", (Case(case.name, {}),), deadline=240.0)


def _of_few(case: Case) -> bool:
    """Return whether a case is of those few that the short form runs over every backend."""
    return "tensor 2" in case.name or "DiLoCo" in case.name


def plan(action: str, backends: list[str], short: bool = False) -> list[Launch]:
    """Return the launches of ``speed``, ``check`` or ``all`` in order of priority.

    ``short``: one of every kind, and few cases of all backends but the first, so that the whole kit can be tried on a
    CPU.
    """
    launches = [speed(case) for case in SPEED]
    first, rest = launches[:4], launches[4:]
    checks = references()
    if "nccl" in backends:  # a GPU
        checks.append(offloaded())
    for backend in backends:
        checks += [matrix(backend), killed(backend)]
    checks.append(compiled(backends[0]))
    if short:
        checked = [matrix(backend, True) for backend in backends]
        launches = first = [speed(SpeedCase(12, "eager"))]
        rest = []
        few = [replace(one, cases=tuple(case for case in one.cases if _of_few(case))) for one in checked[1:]]
        checks = [*references(), *checked[:1], *few, *map(killed, backends[:1])]
    return {"speed": launches, "check": checks, "all": [*first, *checks, *rest]}[action]
