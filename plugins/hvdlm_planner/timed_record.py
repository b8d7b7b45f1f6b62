"""What ``plan --measure`` has timed, as a file: the model of a machine can be fitted to it again without measuring."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hvdlm import plugins
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.io import atomic_files, untrusted_input
from hvdlm.parallel.mesh import Mesh
from hvdlm.planning import yaml_fields
from hvdlm.planning.hardware import MeasuredCollective
from hvdlm.training.run import load_plugins
from hvdlm_planner.timed_steps import TimedModel

_MOST_BYTES = 2**22  # of a file; those of a minute have 20 kB
# Kinds of models: that each rank trains by itself, and layouts. Others are compressors, and the outer update.
ALONE, DATA, ZERO, TENSOR, PIPELINE = "alone", "data", "zero", "tensor", "pipeline"


@dataclass(frozen=True)
class Timed:
    """A timed model of one kind: alone, data, zero, tensor, pipeline, outer_update, or a compressor."""

    kind: str
    model: TimedModel


@dataclass(frozen=True)
class Record:
    """What one launch has timed.

    Attributes:
        ranks: of the launch.
        ranks_per_node: ranks on a node.
        collectives: by themselves.
        models: their turns are as they were measured.
        save_bytes_per_second: at which a save copies a rank's state.
    """

    framework: str
    ranks: int
    ranks_per_node: int
    collectives: Sequence[MeasuredCollective]
    models: Sequence[Timed]
    save_bytes_per_second: float

    @property
    def link(self) -> str:
        """Return node, or network where the ranks are on several nodes."""
        return "node" if self.ranks_per_node == self.ranks else "network"

    def of(self, *kinds: str) -> list[TimedModel]:
        """Return the models of these kinds."""
        return [timed.model for timed in self.models if timed.kind in kinds]


def write(record: Record, path: Path) -> None:
    """Write a record as JSON."""
    content = {
        "framework": record.framework,
        "ranks": record.ranks,
        "ranks_per_node": record.ranks_per_node,
        "save_bytes_per_second": record.save_bytes_per_second,
        "collectives": yaml_fields.plain(tuple(record.collectives)),
        "models": [_plain(timed) for timed in record.models],
    }
    atomic_files.replace(path, json.dumps(content, indent=1) + "\n")


def _plain(timed: Timed) -> dict[str, Any]:
    model = timed.model
    return {
        "kind": timed.kind,
        "vocab": model.spec.settings.vocab,
        "mesh": list(model.mesh.shape),
        "options": yaml_fields.plain(model.config),
        "seconds": model.seconds,
    }


def read(path: Path) -> Record:
    """Return the record that ``write`` has written.

    Raises:
        HvdlmError: the file can't be read, or is none.
    """
    try:
        content = untrusted_input.read_json(path, _MOST_BYTES)
        collectives: tuple[MeasuredCollective, ...] = yaml_fields.build(
            tuple[MeasuredCollective, ...], content["collectives"], "collectives"
        )
        return Record(
            str(content["framework"]),
            int(content["ranks"]),
            int(content["ranks_per_node"]),
            collectives,
            list(_models(content["models"])),
            float(content["save_bytes_per_second"]),
        )
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise HvdlmError(
            f"{path} is no record of timed steps ({error!r}): plan --measure --steps writes one."
        ) from error


def _models(entries: Iterable[Mapping[str, Any]]) -> Iterable[Timed]:
    for entry in entries:
        config = Config.load(entry["options"])
        manager = load_plugins(config)
        maker = plugins.find_model(manager, config.model.name)
        spec = maker(config.model, int(entry["vocab"]), config.data.context)
        seconds = [float(value) for value in entry["seconds"]]
        yield Timed(entry["kind"], TimedModel(config, spec, Mesh(*entry["mesh"]), None, [], 1, seconds=seconds))
