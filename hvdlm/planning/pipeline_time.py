"""When pipeline stages end their passes, by the dependencies of their schedule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from hvdlm.parallel.pipeline_schedules import Action, make_pipeline_schedule, source_of

if TYPE_CHECKING:
    from hvdlm.planning.step_time import StageTime


def simulate_pipeline(stages: Sequence[StageTime], schedule: str, micro_batches: int) -> list[float]:
    """Return when each stage has ended its last backward pass, by the dependencies of its schedule."""
    count, virtual = len(stages), len(stages[0].shares)
    actions = [make_pipeline_schedule(schedule, index, count, micro_batches, virtual) for index in range(count)]
    done: dict[tuple[int, Action], float] = {}
    now, position = [0.0] * count, [0] * count
    while any(position[index] < len(actions[index]) for index in range(count)):
        for index, stage in enumerate(stages):
            while position[index] < len(actions[index]):
                action = actions[index][position[index]]
                start = _input_ready(done, index, action, stages)
                if start is None:
                    break
                last = action.micro_batch == micro_batches - 1
                backward = stage.last_backward if last else stage.backward
                seconds = stage.forward if action.kind == "forward" else backward
                now[index] = max(now[index], start) + seconds * stage.shares[action.chunk]
                done[index, action] = now[index]
                position[index] += 1
    return now


def _input_ready(
    done: dict[tuple[int, Action], float], index: int, action: Action, stages: Sequence[StageTime]
) -> float | None:
    """Return when the input of an action has arrived; None: its sender has not been simulated yet."""
    source = source_of(action, index, len(stages), len(stages[0].shares))
    if source is None:
        return 0.0
    sent = done.get(source)
    return None if sent is None else sent + stages[min(index, source[0])].send
