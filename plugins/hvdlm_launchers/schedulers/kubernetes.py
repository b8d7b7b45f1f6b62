"""Job files for Kubernetes: an MPIJob of kubeflow's mpi-operator (v2beta1), with the run's configuration beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import yaml

from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_launchers.schedulers.job import Job
from hvdlm_launchers.schedulers.script import mpirun, train, wait

CLIENT = ("kubectl", "apply", "-f", "-")

_FILES = "/etc/hvdlm"
_USER, _HOME = 1000, "/home/mpiuser"  # as in the mpi-operator's own images
_RETRIES = 6  # Kubernetes' own default: how often the launcher may end with a code other than 0, even 75

# Kubernetes may remove workers as soon as it stops the launcher, while their ranks still save.
_WAIT_FOR_RANKS = "while pgrep -f -- '-m hvdl[m]' >/dev/null; do sleep 1; done"

# Kubernetes replaces $(NAME) and $$ in a container's command before bash reads it; $$ stands for a dollar sign.
_EXPANDED = re.compile(r"\$(?=\$|\([\w.-]+\))", re.ASCII)

_TITLE = """\
# Kubernetes, with kubeflow's mpi-operator: kubectl apply -f FILE. Before a pod is removed, the run saves; the launcher
# is then started again, and the run resumes.
"""


def write(job: Job, arguments: Sequence[str], config: Config) -> str:
    """Return the YAML for kubectl: a ConfigMap with the files that ``--config`` names, and the MPIJob.

    Raises:
        HvdlmError: the job lacks an option that Kubernetes needs, or has one that it doesn't support.
    """
    _check(job, config)
    arguments, files = _bundle(arguments)
    objects: list[dict[str, Any]] = []
    if files:
        metadata = {"name": f"{job.name}-files"}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": metadata, "data": files})
    objects.append(_mpijob(job, train(job, arguments, config, mpirun(job, "")), bool(files)))
    return _TITLE + yaml.dump_all(objects, Dumper=_Dumper, sort_keys=False, width=120)


def _check(job: Job, config: Config) -> None:
    if not re.fullmatch(r"[a-z]([a-z0-9-]{0,48}[a-z0-9])?", job.name):
        raise HvdlmError(f"--name: got {job.name!r}; Kubernetes takes at most 50 lower-case letters, digits and '-'.")
    for claim, _ in job.mounts:
        if not re.fullmatch(r"[a-z0-9]([a-z0-9.-]{0,251}[a-z0-9])?", claim):
            raise HvdlmError(
                f"--volumes: got {claim!r}; Kubernetes names claims by lower-case letters, digits and '-'."
            )
    if job.queue and not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9_.-]{0,61}[A-Za-z0-9])?", job.queue):
        raise HvdlmError(f"--queue: got {job.queue!r}; a queue of Kueue has at most 63 letters, digits, '-', '_', '.'.")
    if job.image is None:
        raise HvdlmError("--image: the value is missing, expected the image that pods run, with hvdlm in it.")
    for name in ("account", "log", "directives"):
        if getattr(job, name):
            raise HvdlmError(f"--{name}: Kubernetes doesn't support it: leave it out.")
    run = PurePosixPath(config.log.run)
    if not job.mounts or (run.is_absolute() and not any(run.is_relative_to(target) for _, target in job.mounts)):
        raise HvdlmError(
            f"--volumes: the run's folder {run} would be lost with its pod: mount a claim that all pods can write, for "
            "example --volumes [claim:/data]."
        )


def _bundle(arguments: Sequence[str]) -> tuple[list[str], dict[str, str]]:
    """Return the arguments with ``--config`` pointing into the ConfigMap, and the content of its files by name."""
    words = [word for argument in arguments for word in _split(argument)]
    files: dict[str, str] = {}
    for index, word in enumerate(words[:-1]):
        if word == "--config":
            path = Path(words[index + 1])
            name = re.sub(r"^\.+|[^\w.-]", "-", path.name, flags=re.ASCII)
            name = name if name not in files else f"{index}-{name}"
            files[name] = path.read_text(encoding="utf-8")
            words[index + 1] = f"{_FILES}/{name}"
    return words, files


def _split(argument: str) -> list[str]:
    return argument.split("=", 1) if argument.startswith("--config=") else [argument]


def _mpijob(job: Job, command: str, files: bool) -> dict[str, Any]:
    policy: dict[str, Any] = {"cleanPodPolicy": "Running", "backoffLimit": _RETRIES if job.requeue else 0}
    if job.seconds is not None:
        policy["activeDeadlineSeconds"] = job.seconds
    code = f'{wait(job, command, "TERM USR1")}exit "$code"\n'
    code = _EXPANDED.sub("$$", code)
    launcher = {"name": "launcher", "command": ["bash", "-c", code], "resources": {"requests": {"cpu": 1}}}
    worker = {
        "name": "worker",
        "command": ["/usr/sbin/sshd", "-De", "-f", f"{_HOME}/.sshd_config"],
        "resources": _resources(job),
        "lifecycle": {"preStop": {"exec": {"command": ["bash", "-c", _WAIT_FOR_RANKS]}}},
    }
    metadata: dict[str, Any] = {"name": job.name}
    if job.queue:
        metadata["labels"] = {"kueue.x-k8s.io/queue-name": job.queue}
    spec = {
        "slotsPerWorker": job.ranks_per_node,
        "runPolicy": policy,
        "sshAuthMountPath": f"{_HOME}/.ssh",
        "launcherCreationPolicy": "WaitForWorkersReady",
        "mpiReplicaSpecs": {
            "Launcher": _replica(job, 1, launcher, files),
            "Worker": _replica(job, job.nodes, worker, files),
        },
    }
    return {"apiVersion": "kubeflow.org/v2beta1", "kind": "MPIJob", "metadata": metadata, "spec": spec}


def _resources(job: Job) -> dict[str, Any]:
    requests: dict[str, Any] = {"cpu": job.cpus_per_node}
    limits: dict[str, Any] = {"nvidia.com/gpu": job.gpus_per_node} if job.gpus_per_node else {}
    if job.memory_per_node:
        requests["memory"] = limits["memory"] = f"{job.memory_per_node}Gi"
    return {"requests": requests, **({"limits": limits} if limits else {})}


def _replica(job: Job, count: int, container: Mapping[str, Any], files: bool) -> dict[str, Any]:
    # Ranks of a node communicate through /dev/shm, of which a container has 64 MB by default.
    volumes: list[dict[str, Any]] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, target) in enumerate(job.mounts):
        volumes.append({"name": f"volume-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"volume-{number}", "mountPath": target})
    if files:
        volumes.append({"name": "files", "configMap": {"name": f"{job.name}-files"}})
        mounts.append({"name": "files", "mountPath": _FILES})
    environment = {"image": job.image, "workingDir": job.mounts[0][1], "volumeMounts": mounts}
    pod = {
        "terminationGracePeriodSeconds": job.save_seconds,
        "securityContext": {"runAsUser": _USER, "fsGroup": _USER},
        "containers": [{**container, **environment}],
        "volumes": volumes,
    }
    policy = "OnFailure" if job.requeue else "Never"
    return {"replicas": count, "restartPolicy": policy, "template": {"spec": pod}}


class _Dumper(yaml.SafeDumper):
    """YAML dumper that writes text of several lines as a block, and no anchors or aliases."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.add_representer(
    str,
    lambda dumper, text: dumper.represent_scalar("tag:yaml.org,2002:str", text, style="|" if "\n" in text else None),
)
