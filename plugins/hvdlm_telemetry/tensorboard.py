"""Writes TensorBoard events, without TensorFlow or torch, on rank 0 into ``RUN/tensorboard``."""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.protocols.types import StepResult
from hvdlm.protocols.world import World
from hvdlm.telemetry.rates import Rates
from hvdlm_telemetry.append_file import AppendFile


class TensorBoard:
    """Event plugin that writes the scalars train/*, comm/* and val/*."""

    observer = True

    def __init__(self, config: Config) -> None:
        self._folder = Path(config.log.run) / "tensorboard"
        self._every = config.log.every
        self._writer: Any = None
        self._logged: Rates | None = None  # at the last point

    @hookimpl
    def hvdlm_run_started(self, config: Config, world: World, info: Mapping[str, Any]) -> None:
        """Open the event file."""
        if world.rank == 0:
            from tensorboard.compat.proto.event_pb2 import Event
            from tensorboard.summary.writer.record_writer import RecordWriter

            # tensorboard's own EventFileWriter would import TensorFlow.
            self._folder.mkdir(parents=True, exist_ok=True)
            # The process id keeps a run that is resumed within the same second from overwriting its events.
            name = f"events.out.tfevents.{time.time():.0f}.{socket.gethostname()}.{os.getpid()}.hvdlm"
            self._writer = RecordWriter(AppendFile(self._folder / name))
            self._writer.write(Event(wall_time=time.time(), file_version="brain.Event:2").SerializeToString())
            self._start_at(info["start_step"] + 1)

    @hookimpl
    def hvdlm_step_ended(self, step: int, result: StepResult, learning_rate: float, rates: Rates) -> None:
        """Write the step where it is due; rates and bytes are means over the steps since the last one written."""
        if self._writer is not None and (step == 1 or step % self._every == 0):
            recent = rates.since(self._logged)
            figures = {
                "train/loss": result.loss,
                "train/learning_rate": learning_rate,
                "train/grad_norm": result.grad_norm,
                "train/tokens_per_second": recent.tokens_per_second,
                "train/data_share": recent.data_share,
                "train/mfu": recent.mfu,
                "train/device_memory_peak": result.device_memory_peak,
                "comm/share": recent.comm_share,
                "comm/bytes": recent.comm_bytes,
                "comm/compression": recent.compression,
                "comm/overlap": recent.overlap,
            }
            self._logged = rates
            self._write(step, {tag: value for tag, value in figures.items() if value is not None})

    @hookimpl
    def hvdlm_rolled_back(self, to_step: int) -> None:
        """Make TensorBoard drop the points after the checkpoint's step."""
        if self._writer is not None:
            self._start_at(to_step + 1)

    @hookimpl
    def hvdlm_evaluated(self, step: int, metrics: Mapping[str, float]) -> None:
        """Write the evaluation."""
        if self._writer is not None:
            self._write(step, {f"val/{name.removeprefix('val_')}": value for name, value in metrics.items()})

    @hookimpl
    def hvdlm_run_ended(self, summary: Mapping[str, Any]) -> None:
        """Close the event file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _start_at(self, step: int) -> None:
        """Write a start event, which makes TensorBoard drop the points of this step and later ones."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog

        start = Event(wall_time=time.time(), step=step)
        start.session_log.status = SessionLog.START
        self._writer.write(start.SerializeToString())

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in figures.items()]
        event = Event(wall_time=time.time(), step=step, summary=Summary(value=values))
        self._writer.write(event.SerializeToString())
