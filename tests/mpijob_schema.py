"""JSON schema of an MPIJob (kubeflow.org/v2beta1) without its pods, after the documentation of mpi-operator."""

from __future__ import annotations

from typing import Any


def _closed(required: list[str], **properties: Any) -> dict[str, Any]:
    return {"type": "object", "required": required, "properties": properties, "additionalProperties": False}


_COUNT = {"type": "integer", "minimum": 0}
_REPLICA = _closed(
    ["template"],
    replicas={"type": "integer", "minimum": 1},
    restartPolicy={"enum": ["Never", "OnFailure"]},
    template=_closed(["spec"], metadata={"type": "object"}, spec={"type": "object"}),
)
_POLICY = _closed(
    [],
    cleanPodPolicy={"enum": ["None", "Running", "All"]},
    ttlSecondsAfterFinished=_COUNT,
    activeDeadlineSeconds={"type": "integer", "minimum": 1},
    backoffLimit=_COUNT,
    schedulingPolicy={"type": "object"},
    suspend={"type": "boolean"},
    managedBy={"type": "string"},
)
_SPEC = _closed(
    ["mpiReplicaSpecs"],
    slotsPerWorker={"type": "integer", "minimum": 1},
    runLauncherAsWorker={"type": "boolean"},
    runPolicy=_POLICY,
    mpiReplicaSpecs=_closed(["Launcher"], Launcher=_REPLICA, Worker=_REPLICA),
    sshAuthMountPath={"type": "string", "pattern": "^/"},
    launcherCreationPolicy={"enum": ["AtStartup", "WaitForWorkersReady"]},
    mpiImplementation={"enum": ["OpenMPI", "Intel", "MPICH"]},
)
MPIJOB = _closed(
    ["apiVersion", "kind", "metadata", "spec"],
    apiVersion={"const": "kubeflow.org/v2beta1"},
    kind={"const": "MPIJob"},
    metadata={"type": "object", "required": ["name"]},
    spec=_SPEC,
)
