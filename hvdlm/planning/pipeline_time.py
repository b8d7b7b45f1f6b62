"""When pipeline stages end their passes, by the dependencies of their schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdlm.parallel.pipeline_schedules import make_pipeline_schedule

if TYPE_CHECKING:
    from hvdlm.planning.step_time import StageTime


def simulate_pipeline(stages: Sequence[StageTime], schedule: str, micro_batches: int) -> list[float]:
    """Return when each stage has ended its last backward pass, by the dependencies of its schedule."""
    count = len(stages)
    actions = [make_pipeline_schedule(schedule, index, count, micro_batches) for index in range(count)]
    done: list[dict[tuple[str, int], float]] = [{} for _ in stages]
    now, position = [0.0] * count, [0] * count
    while any(position[index] < len(actions[index]) for index in range(count)):
        for index, stage in enumerate(stages):
            while position[index] < len(actions[index]):
                kind, number = actions[index][position[index]]
                start = _input_ready(done, index, kind, number, stages)
                if start is None:
                    break
                last = kind == "backward" and number == micro_batches - 1
                seconds = stage.forward if kind == "forward" else stage.last_backward if last else stage.backward
                now[index] = max(now[index], start) + seconds
                done[index][kind, number] = now[index]
                position[index] += 1
    return now


def _input_ready(
    done: list[dict[tuple[str, int], float]], index: int, kind: str, number: int, stages: Sequence[StageTime]
) -> float | None:
    """Return when the input of an action has arrived; None: its sender has not been simulated yet."""
    neighbour = index - 1 if kind == "forward" else index + 1
    if not 0 <= neighbour < len(stages):
        return 0.0
    sent = done[neighbour].get((kind, number))
    return None if sent is None else sent + stages[min(index, neighbour)].send
