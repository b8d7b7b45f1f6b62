"""MLflow: ``--plugins [mlflow]``. Needs mlflow-skinny, for a local database the complete mlflow."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import yaml

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io.value_checks import fields, text
from hvdlm.models.spec import ModelSpec
from hvdlm_trackers.tracker import Metrics, Tracker, installed, numbers

_DATABASES = ("sqlite", "mysql", "postgresql", "mssql")
_LONGEST = 500  # characters of a parameter's value that every MLflow server accepts


@dataclass
class MLflowOptions:
    """Where MLflow stores the run.

    Args:
        tracking_uri: a server (http://...), a folder, or a database; null: MLFLOW_TRACKING_URI, else the folder mlruns
        experiment: the experiment that the run belongs to
        run_name: the run's name in MLflow; null: the name of the run's folder
        wait: seconds to wait for a slow server at the end of the run
    """

    tracking_uri: str | None = None
    experiment: str = "hvdlm"
    run_name: str | None = None
    wait: float = 30.0

    @property
    def uri(self) -> str:
        """The URI or folder where runs are stored."""
        return self.tracking_uri or os.environ.get("MLFLOW_TRACKING_URI") or "mlruns"


class MLflow(Tracker):
    """Parameters, metrics by step, ``config.yaml`` and ``summary.json``; stopped runs end as KILLED."""

    name, package = "mlflow", "mlflow-skinny"
    kept = staticmethod(fields({"run_id": text}, {"tracking_uri": text}))

    @hookimpl
    def hvdlm_options(self) -> Mapping[str, type]:
        """Return the options of the section mlflow."""
        return {"mlflow": MLflowOptions}

    @hookimpl
    def hvdlm_check(self, config: Config, spec: ModelSpec) -> None:
        """Raise HvdlmError if MLflow or its database support isn't installed."""
        super().hvdlm_check(config, spec)
        uri = config.plugin_options["mlflow"].uri
        if uri.startswith(_DATABASES) and not installed("sqlalchemy"):
            raise HvdlmError(
                f"mlflow.tracking_uri {uri}: databases need the complete MLflow: pip install mlflow, or set a server "
                "or a folder."
            )

    def begin(self) -> None:
        """Start or continue a run in MLflow."""
        uri = self.options.uri
        if "://" not in uri or uri.startswith("file:"):
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")  # without it, MLflow refuses folders
        from mlflow.tracking import MlflowClient

        self._client = MlflowClient(tracking_uri=uri)
        earlier = self.earlier()
        if earlier.get("tracking_uri") == uri:
            self._id = earlier["run_id"]
            self._client.update_run(self._id, status="RUNNING")
        else:
            self._create(uri)
        self._client.set_tag(self._id, "hvdlm.state", "running")
        self._client.log_text(self._id, yaml.safe_dump(self.config.to_dict(), sort_keys=False), "config.yaml")

    def _create(self, uri: str) -> None:
        from mlflow.entities import Param, RunTag

        existing = self._client.get_experiment_by_name(self.options.experiment)
        experiment = existing.experiment_id if existing else self._client.create_experiment(self.options.experiment)
        name = self.options.run_name or self.folder.name
        self._id = self._client.create_run(experiment, run_name=name).info.run_id
        self.keep(run_id=self._id, tracking_uri=uri, experiment=self.options.experiment)
        params = [Param(key, str(value)[:_LONGEST]) for key, value in flat(self.config.to_dict())]
        for start in range(0, len(params), 100):  # the most that MLflow accepts at once
            self._client.log_batch(self._id, params=params[start : start + 100])
        tags = [RunTag(f"hvdlm.{key}", str(value)) for key, value in flat(self.info)]
        self._client.log_batch(self._id, tags=tags)

    def log(self, step: int, metrics: Metrics) -> None:
        """Log the metrics of a step."""
        from mlflow.entities import Metric

        now = time.time_ns() // 1_000_000
        self._client.log_batch(self._id, metrics=[Metric(name, value, now, step) for name, value in metrics.items()])

    def end(self, summary: Mapping[str, Any]) -> None:
        """Log the summary and end MLflow's run."""
        self.log(summary["steps"], numbers(summary))
        self._client.log_dict(self._id, dict(summary), "summary.json")
        self._client.set_tag(
            self._id, "hvdlm.state", f"stopped: {summary['stopped']}" if summary["stopped"] else "done"
        )
        self._client.set_terminated(self._id, "KILLED" if summary["stopped"] else "FINISHED")


def flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested mappings."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
