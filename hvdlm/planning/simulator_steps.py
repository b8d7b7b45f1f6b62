"""When each rank ends each step, computed for all ranks and for blocks of steps at once.

What a rank does in a step, and when:

- It waits ``data`` seconds for its batch, then does the passes of its pipeline schedule. A pass takes its stage's
  seconds times the rank's slowness in this step. Tensor ranks begin a pass together, when the last of them has arrived,
  compute at the pace of the slowest, and spend the seconds of the pass' tensor collectives.
- With virtual stages, a pass is that of one of a rank's chunks, and takes its share of the stage's seconds.
- A pass of another stage's result waits for its message. A message begins when its sender has ended the pass, its
  receiver has begun the pass before the one that needs it (or the step), and the link has delivered the messages before
  it in this direction. A stage has done its passes when its last message has been delivered, too.
- During the last backward pass (of every chunk), bucket after bucket becomes ready, at given fractions of it
  (``every_micro_batch``, as in ZeRO-2: of every backward pass; the next one begins when they have been summed). A
  bucket's collective begins when the last rank of its data group has it ready and the group's bucket before it is done.
  The metrics follow the buckets.
- Then the ranks of a copy of the model sum ``norm``, and each updates its parameters. With ZeRO, the data group gathers
  them (``gather``). With local SGD and DiLoCo, only the steps of the warm-up send buckets, and the data group sums the
  differences (``round``) at the end of every ``every``-th step and of the last one.
- At the end of a step, a rank waits for the votes of the step before. They begin when the last rank has ended that
  step, and take ``vote`` seconds.

All collectives of a group begin when its last rank has arrived. Collectives don't slow each other or the computation.
Tensor ranks of the same stage and data index begin every pass together, so one time stands for all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from hvdlm.parallel.pipeline_schedules import Action, make_pipeline_schedule, source_of
from hvdlm.planning.simulator_costs import StepCosts

_MOST_REPETITIONS = 20  # of a block of steps; two or three are the rule
_EQUAL = 1e-13  # relative difference of times that is rounding

Times = np.ndarray
"""Seconds, float64 ``[steps, data, pipeline]``, or ``[steps, data]`` of one stage."""


def step_ends(costs: StepCosts, slowness: Iterable[np.ndarray], steps: int) -> Iterator[Times]:
    """Yield the seconds since the start at which ranks have ended their steps, ``[steps, data, pipeline]`` a block.

    Args:
        costs: of a step.
        slowness: factor of the seconds of everything that is computed, ``[steps, data, pipeline]``, block after block:
            that of the slowest tensor rank.
        steps: of the whole run.
    """
    return _Run(costs, steps).blocks(slowness)


class _Run:
    """The state between two steps: when each rank ended the last one, and when its votes were summed."""

    def __init__(self, costs: StepCosts, steps: int) -> None:
        self._costs = costs
        self._steps = steps
        self._passes = _Passes(costs)
        mesh = costs.mesh
        self._ended = np.zeros((1, mesh.data, mesh.pipeline))
        self._votes = 0.0
        self._step = 0

    def blocks(self, slowness: Iterable[np.ndarray]) -> Iterator[Times]:
        """Yield the ends of each block of steps."""
        for block in slowness:
            ends = self._connected(block) if self._costs.every == 1 else None
            yield self._one_by_one(block) if ends is None else ends

    def _connected(self, slowness: np.ndarray) -> Times | None:
        """Return the ends of steps in which all ranks wait for each other; None where that doesn't lead to them.

        The sum of gradients and metrics ends at one instant for all ranks. A step depends on the one before only by
        what ranks do after that instant, so the steps of a block are computed at once, relative to it. A sum of tied
        gradients after it may delay some copies of the model, and so the step that follows: then the block is
        computed again, until nothing changes.
        """
        before = self._ended.max()
        lag = np.zeros(slowness.shape[:2])
        for _ in range(_MOST_REPETITIONS):
            updated = self._updated(lag[:, :, None], slowness, ends_round=False)
            began = np.concatenate([self._ended - before, updated[:-1]])
            synchronised = self._passes.synchronised(began, slowness, True)
            seconds = synchronised.max(axis=1, keepdims=True)
            previous, lag = lag, synchronised - seconds
            if np.abs(lag - previous).max() <= _EQUAL * seconds.max():
                break
        else:
            return None
        votes = np.append(self._votes - before, updated[:-1].max(axis=(1, 2)) + self._costs.vote)
        if (votes > updated.min(axis=(1, 2)) + seconds[:, 0]).any():  # a rank waits for them
            return None
        ends = before + np.cumsum(seconds, axis=0)[:, :, None] + updated
        self._keep(ends, len(slowness))
        return ends

    def _one_by_one(self, slowness: np.ndarray) -> Times:
        ends = np.empty_like(slowness)
        for index in range(len(slowness)):
            block = slowness[index : index + 1]
            sums = self._costs.sums_gradients(self._step)
            synchronised = self._passes.synchronised(self._ended, block, sums)
            ends_round = self._costs.ends_round(self._step, self._steps)
            updated = self._updated(synchronised[:, :, None], block, ends_round)
            ends[index] = np.maximum(updated[0], self._votes)
            self._keep(ends[index : index + 1], 1)
        return ends

    def _keep(self, ends: Times, count: int) -> None:
        self._ended = ends[-1:]
        self._votes = ends[-1].max() + self._costs.vote
        self._step += count

    def _updated(self, synchronised: np.ndarray, slowness: np.ndarray, ends_round: bool) -> Times:
        """Return when the parameters of the next step are complete."""
        stages = self._costs.stages
        times = synchronised + np.array([stage.update for stage in stages]) * slowness
        if any(stage.gather for stage in stages):
            times = self._over_data(times, [stage.gather for stage in stages])
        return self._over_data(times, [stage.round for stage in stages]) if ends_round else times

    def _over_data(self, times: Times, seconds: list[float]) -> Times:
        """Return when collectives of the data groups end that their ranks call at ``times``."""
        return np.broadcast_to(times.max(axis=1, keepdims=True) + np.array(seconds), times.shape)


class _Passes:
    """The passes of a step and the sums that follow them."""

    def __init__(self, costs: StepCosts) -> None:
        self._costs = costs
        self._order = _execution_order(costs)

    def synchronised(self, began: Times, slowness: np.ndarray, sums: bool) -> np.ndarray:
        """Return when each copy of the model has its gradient norm, ``[steps, data]``.

        Args:
            began: when each rank ended the step before.
            slowness: of each rank.
            sums: whether the data groups sum the gradients.
        """
        costs = self._costs
        step = _Step(costs, began + costs.data, slowness, sums and costs.mesh.data > 1)
        if costs.mesh.pipeline == 1 and not (costs.every_micro_batch and step.sums):
            step.accumulate()
        else:
            for stage, action in self._order:
                step.run(stage, action)
        return step.synchronised()


class _Step:
    """A block of steps while its passes are done; times by stage are ``[steps, data]``."""

    def __init__(self, costs: StepCosts, began: Times, slowness: np.ndarray, sums: bool) -> None:
        self._costs = costs
        self.sums = sums
        stages = range(costs.mesh.pipeline)
        self._slowness = [slowness[:, :, stage] for stage in stages]
        self._clock = [began[:, :, stage] for stage in stages]
        self._posted = [began[:, :, stage] for stage in stages]  # when the receive for the next pass was started
        self._delivered = [began[:, :, stage] for stage in stages]  # when the last message sent had arrived
        self._summed: list[np.ndarray | float] = [-np.inf] * len(stages)  # when the last bucket was, [steps, 1]
        self._sent: dict[tuple[int, Action], np.ndarray] = {}
        self._link_free: dict[tuple[int, str], np.ndarray] = {}

    def accumulate(self) -> None:
        """Do all passes of a model without pipeline stages: nobody is waited for between them."""
        costs, stage = self._costs, self._costs.stages[0]
        slow = self._slowness[0]
        forward = stage.forward * slow + stage.tensor_forward
        backward = stage.backward * slow + stage.tensor_backward
        last = self._clock[0] + costs.micro_batches * forward + (costs.micro_batches - 1) * backward
        if self.sums:
            backward = stage.backward_with_buckets * slow + stage.tensor_backward
            self._sum_buckets(0, last, backward, 0)
        self._clock[0] = last + backward

    def run(self, stage: int, action: Action) -> None:
        """Do one pass of one stage."""
        costs, is_forward = self._costs, action.kind == "forward"
        s, stages = costs.stages[stage], costs.mesh.pipeline
        source = source_of(action, stage, stages, len(s.shares))
        began = self._clock[stage]
        if source is not None:
            began = np.maximum(began, self._receive(source, stage))
        is_last = costs.every_micro_batch or action.micro_batch == costs.micro_batches - 1
        sends_buckets = self.sums and not is_forward and is_last
        if sends_buckets and costs.every_micro_batch:  # those of the pass before
            began = np.maximum(began, self._summed[stage])
        self._posted[stage] = began
        compute, collectives = (s.forward, s.tensor_forward) if is_forward else (s.backward, s.tensor_backward)
        if sends_buckets:
            compute = s.backward_with_buckets
        seconds = (compute * self._slowness[stage] + collectives) * s.shares[action.chunk]
        if sends_buckets:
            self._sum_buckets(stage, began, seconds, action.chunk)
        self._clock[stage] = began + seconds
        number = action.chunk * stages + stage
        if number != (len(s.shares) * stages - 1 if is_forward else 0):
            self._sent[stage, action] = self._clock[stage]

    def _receive(self, source: tuple[int, Action], stage: int) -> np.ndarray:
        """Return when the result of an action of another stage, ``source``, has arrived."""
        begins = np.maximum(self._sent.pop(source), self._posted[stage])
        link = (source[0], source[1].kind)
        if link in self._link_free:
            begins = np.maximum(begins, self._link_free[link])
        self._link_free[link] = arrives = begins + self._costs.message
        self._delivered[source[0]] = np.maximum(self._delivered[source[0]], arrives)
        return arrives

    def _sum_buckets(self, stage: int, began: np.ndarray, seconds: np.ndarray, chunk: int) -> None:
        """Sum the buckets of a backward pass of ``chunk`` that began at ``began`` and takes ``seconds``."""
        done = self._summed[stage]
        for bucket in self._costs.stages[stage].buckets_of(chunk):
            ready = (began + bucket.ready * seconds).max(axis=1, keepdims=True)
            done = np.maximum(done, ready) + bucket.seconds
        self._summed[stage] = done

    def synchronised(self) -> np.ndarray:
        """Return when the gradient's norm is known, after the sums of gradients and metrics over the data groups."""
        costs = self._costs
        times = np.stack([np.maximum(*pair) for pair in zip(self._clock, self._delivered, strict=True)], axis=2)
        if self.sums:
            summed = np.concatenate([np.broadcast_to(s, (len(times), 1)) for s in self._summed], axis=1)[:, None]
            metrics = np.maximum(times.max(axis=1, keepdims=True), summed) + costs.metrics
            times = np.maximum(times, summed)
        if costs.tied and costs.mesh.pipeline > 1:
            times[:, :, [0, -1]] = times[:, :, [0, -1]].max(axis=2, keepdims=True) + costs.tied
        if self.sums:
            times = np.maximum(times, metrics)
        return np.asarray(times.max(axis=2) + costs.norm)


def _execution_order(costs: StepCosts) -> list[tuple[int, Action]]:
    """Return all passes of all stages, each after those that it waits for."""
    stages, virtual = costs.mesh.pipeline, len(costs.stages[0].shares)
    schedule = costs.schedule if stages > 1 else "1f1b"  # a model of one stage accumulates: forward, backward in turn
    left = [make_pipeline_schedule(schedule, s, stages, costs.micro_batches, virtual)[::-1] for s in range(stages)]
    done: set[tuple[int, Action]] = set()
    order: list[tuple[int, Action]] = []
    while any(left):
        for stage, actions in enumerate(left):
            source = source_of(actions[-1], stage, stages, virtual) if actions else None
            if actions and (source is None or source in done):
                order.append((stage, actions.pop()))
                done.add(order[-1])
    return order
