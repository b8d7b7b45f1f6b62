"""Traces of steps, and the ranges in them."""

from __future__ import annotations

import json
import re
import tempfile
from bisect import bisect
from collections.abc import Iterator
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any

import tensorflow as tf

# The first name scope of an operation in a graph. Gradients have scopes of their own.
_SCOPE = re.compile(r"(forward|exchange|update|gradient_tape|gradients)(_\d+)?/")
_GRADIENTS = ("gradient_tape", "gradients")


def named_range(name: str) -> AbstractContextManager[Any]:
    """Name the operations that are traced inside: a range consists of them."""
    return tf.name_scope(name)


class Trace:
    """A trace that is being recorded."""

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory()
        tf.profiler.experimental.start(self._folder.name)

    def stop(self) -> str:
        """End the recording; return it as JSON for Chrome's trace viewer."""
        from tensorflow.tsl.profiler.protobuf.xplane_pb2 import XSpace

        with self._folder as folder:
            tf.profiler.experimental.stop()
            planes = [
                plane
                for path in Path(folder).rglob("*.xplane.pb")
                for plane in XSpace.FromString(path.read_bytes()).planes
            ]
        events = [event for number, plane in enumerate(planes) for event in _plane_events(number, plane)]
        return json.dumps({"traceEvents": events})


def _plane_events(number: int, plane: Any) -> Iterator[dict[str, Any]]:
    """Yield the events of a plane (the host, a GPU, ...), whose lines (threads, streams) have their ranges beside."""
    yield {"ph": "M", "pid": number, "name": "process_name", "args": {"name": plane.name}}
    lines = []
    for index, line in enumerate(plane.lines):
        thread = {"pid": number, "tid": index}
        yield {"ph": "M", **thread, "name": "thread_name", "args": {"name": line.name or str(line.id)}}
        lines.append([_event(plane, line, event) | thread for event in line.events])
    graphs = sorted(event["ts"] for events in lines for event in events if event["name"] == "FunctionRun")
    for events in lines:
        yield from events
        yield from _ranges(events, graphs)


def _event(plane: Any, line: Any, event: Any) -> dict[str, Any]:
    """Return an event, in microseconds."""
    start, seconds = line.timestamp_ns / 1e3 + event.offset_ps / 1e6, event.duration_ps / 1e6
    name = plane.event_metadata[event.metadata_id].name  # with its scope, unlike the name to be displayed
    return {"ph": "X", "name": name, "cat": "op", "ts": start, "dur": seconds}


def _ranges(events: list[dict[str, Any]], graphs: list[float]) -> Iterator[dict[str, Any]]:
    """Yield the ranges of a line: consecutive operations of a graph, which have the same scope.

    ``graphs``: when each began to run.
    """
    scopes = [(match, event) for event in events if (match := _SCOPE.match(event["name"]))]
    named = [("backward" if match[1] in _GRADIENTS else match[1], event) for match, event in scopes]
    in_order = sorted(named, key=lambda item: item[1]["ts"])
    for (name, _), group in groupby(in_order, key=lambda item: (item[0], bisect(graphs, item[1]["ts"]))):
        operations = [event for _, event in group]
        end = max(event["ts"] + event["dur"] for event in operations)
        yield operations[0] | {"name": name, "cat": "user_annotation", "dur": end - operations[0]["ts"]}
