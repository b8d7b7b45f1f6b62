"""Conditions that are injected between ranks that are threads: slow links, slow and late ranks, faults."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hvdlm.errors import HvdlmError
from hvdlm.protocols.world import World
from hvdlm_backends.injected import InjectedConditions
from hvdlm_backends.injected_conditions import Conditions, Fault, Late, LinkRule, SlowRanks, read_conditions
from hvdlm_backends.injected_links import Links, volume
from hvdlm_backends.threads import run_ranks
from hvdlm_backends.threads_network import Call
from launching import ROOT, SMALL, run_python

MEGABYTE = 2**20


def call(operation: str = "all_reduce", ranks: tuple[int, ...] = (0, 1), size: int = 1000, step: int = 1) -> Call:
    return Call(ranks[0], ranks, operation, "x", size, step)


def seconds(conditions: Conditions, **arguments: Any) -> float:
    """Return how long a collective takes that begins at 0 on links that nothing else uses."""
    return Links(conditions).complete_at(call(**arguments), 0.0)


@pytest.mark.parametrize(
    ("operation", "sent", "messages"),
    [
        ("all_reduce", 2 * 3 / 4 * 1000, 6),
        ("agree", 2 * 3 / 4 * 1000, 6),
        ("reduce_scatter", 3 / 4 * 1000, 3),
        ("all_to_all", 3 / 4 * 1000, 3),
        ("all_gather", 3 * 1000, 3),
        ("gather", 3 * 1000, 3),
        ("broadcast", 1000, 3),
    ],
)
def test_collectives_take_the_time_of_a_ring(operation: str, sent: float, messages: int) -> None:
    assert volume(operation, 4, 1000) == (sent, messages)
    conditions = Conditions(links=(LinkRule("all", latency=0.5, bandwidth=100.0),))
    expected = messages * 0.5 + sent / 100
    assert seconds(conditions, operation=operation, ranks=(0, 1, 2, 3)) == pytest.approx(expected)


def test_the_slowest_link_counts_and_later_rules_override() -> None:
    rules = (
        LinkRule("within_nodes", latency=0.1, bandwidth=1000.0),
        LinkRule("across_nodes", latency=1.0, bandwidth=100.0),
        LinkRule((1, 2), bandwidth=10.0, from_step=5, to_step=6),
    )
    conditions = Conditions(2, rules)
    assert seconds(conditions, ranks=(0, 1)) == pytest.approx(0.2 + 1.0)
    assert seconds(conditions, ranks=(0, 1, 2, 3)) == pytest.approx(6.0 + 15.0)
    assert [seconds(conditions, ranks=(1, 2), step=step) for step in (4, 5, 6, 7)] == pytest.approx([12, 102, 102, 12])
    assert seconds(Conditions(), ranks=(0, 1)) == 0.0


def test_collectives_share_the_bandwidth_of_a_link() -> None:
    links = Links(Conditions(2, (LinkRule("across_nodes", latency=1.0, bandwidth=100.0),)))
    times = [links.complete_at(call(ranks=ranks), 0.0) for ranks in ((0, 2), (1, 3), (0, 1), (2, 3))]
    assert times == pytest.approx([12, 22, 0, 0])  # of one node's network, and none of it
    own = Links(Conditions(links=(LinkRule("all", bandwidth=100.0),)))
    assert [own.complete_at(call(ranks=ranks), 0.0) for ranks in ((0, 2), (1, 3), (2, 3))] == pytest.approx(
        [10, 10, 20]
    )


def ended_after(size: int, conditions: Conditions, action: Callable[[World], Any]) -> float:
    """Return the seconds from when all ranks are connected until the last has done ``action``."""

    def timed(world: World) -> tuple[float, float]:
        world.gather_objects(None)
        began = time.perf_counter()
        action(world)
        return began, time.perf_counter()

    times = run_ranks(size, timed, "torch", injection=InjectedConditions(conditions, size))
    return max(end for _, end in times) - max(begin for begin, _ in times)


def sum_over_ranks(world: World, names: str = "a", step: int = 1, elements: int = MEGABYTE // 4) -> list[float]:
    world.recorder.step(step)
    group = world.group(range(world.size))
    handles = [group.all_reduce_async(torch.full((elements,), world.rank + 1.0), name) for name in names]
    return [float(handle.wait().sum()) for handle in handles]


def compute(seconds: float) -> None:
    """Occupy a processor for so long."""
    end, deadline = time.thread_time() + seconds, time.monotonic() + 60
    while time.thread_time() < end and time.monotonic() < deadline:
        pass


FIVE = LinkRule("all", bandwidth=5.0 * MEGABYTE)  # seconds of a sum of a megabyte over two ranks: 0.2
CASES: dict[str, tuple[Conditions, Callable[[World], Any], float]] = {
    "latency": (Conditions(links=(LinkRule("all", latency=0.2),)), sum_over_ranks, 0.4),
    "bandwidth": (Conditions(links=(FIVE,)), sum_over_ranks, 0.2),
    "shared": (Conditions(links=(FIVE,)), lambda world: sum_over_ranks(world, "abc"), 0.6),
    "drop": (
        Conditions(links=(FIVE, LinkRule((0, 1), bandwidth=2.0 * MEGABYTE, from_step=5))),
        lambda world: (sum_over_ranks(world, step=4), sum_over_ranks(world, step=5)),
        0.7,
    ),
    "slow-seconds": (Conditions(slow=(SlowRanks((1,), seconds=0.4),)), sum_over_ranks, 0.4),
    "slow-factor": (
        Conditions(slow=(SlowRanks((0,), factor=6.0),)),
        lambda world: (compute(0.1 * (world.rank == 0)), sum_over_ranks(world)),
        0.6,
    ),
    "late": (Conditions(late=(Late(1, 2, 0.5, 2),)), lambda world: sum_over_ranks(world, "abc", step=2), 0.5),
}


@pytest.mark.parametrize("case", CASES)
def test_injected_delays_take_as_long_as_predicted(case: str) -> None:
    conditions, action, expected = CASES[case]
    fastest = ended_after(2, conditions, action)
    for _ in range(4):  # other work on the machine delays threads, too
        fastest = fastest if fastest < expected + 0.3 else ended_after(2, conditions, action)
    assert expected <= fastest + 0.02 and fastest < expected + 0.3


def test_delays_change_no_result() -> None:
    conditions = Conditions(links=(LinkRule("all", latency=0.01),), slow=(SlowRanks((1,), seconds=0.05),))
    plain, delayed = (
        run_ranks(4, lambda world: sum_over_ranks(world, "ab", elements=9), "torch", injection=injection)
        for injection in (None, InjectedConditions(conditions, 4))
    )
    assert plain == delayed == [[90.0, 90.0]] * 4


WRONG = {
    "- 1": "the file is [1], expected a mapping with ranks_per_node, links, slow, late, faults",
    "lnks: []": "the file has no field lnks; did you mean links?",
    "links: 3": "links is 3, expected a list",
    "links: [{between: all}]": "links[0] has neither latency nor bandwidth",
    "links: [{latency: 1 ms}]": "links[0] has no between",
    "links: [{between: some, latency: 1 ms}]": "links[0].between is 'some', expected all, within_nodes, across_nodes",
    "links: [{between: across_nodes, latency: 1 ms}]": "links[0].between is across_nodes, which needs ranks_per_node",
    "links: [{between: [0, 4], latency: 1 ms}]": "links[0].between[1] is 4, expected a whole number from 0 to 3",
    "links: [{between: [1, 1], latency: 1 ms}]": "links[0].between is [1, 1], expected ranks that differ",
    "links: [{between: [1], latency: 1 ms}]": "links[0].between is [1], expected two ranks or more",
    "links: [{between: all, latency: 5}]": "links[0].latency is 5, expected a number with a unit, such as 50 us",
    "links: [{between: all, bandwidth: 10 Mbit}]": "is '10 Mbit', expected a number with a unit, such as 10 Mbit/s",
    "links: [{between: all, bandwidth: 0 MB/s}]": "links[0].bandwidth is '0 MB/s', expected more than 0",
    "links: [{between: all, latency: 1 s, from_step: 3, to_step: 2}]": "links[0].to_step is 2, expected 3 (from_step)",
    "slow: [{ranks: [0], factor: 0.5}]": "slow[0].factor is 0.5, expected a number, 1 or more",
    "slow: [{ranks: [0], seconds: .nan}]": "slow[0].seconds is nan, expected a number, 0 or more",
    "slow: [{ranks: 0}]": "slow[0].ranks is 0, expected a list",
    "late: [{rank: 0, step: 1}]": "late[0] has no seconds",
    "late: [{rank: 0, step: 0, seconds: 1}]": "late[0].step is 0, expected a whole number from 1",
    "faults: [{rank: 0, step: 1, kind: crash}]": "faults[0].kind is 'crash', expected one of error, exit, hang",
    "faults: [{rank: true, step: 1}]": "faults[0].rank is True, expected a whole number from 0 to 3",
    "faults: [{rank: 0, step: 1}, {rank: 0, steps: 1}]": "faults[1] has no field steps; did you mean step?",
    "faults: [{": "did not find expected node content",
}


@pytest.mark.parametrize("content", WRONG)
def test_a_wrong_file_is_refused_in_a_sentence(content: str, tmp_path: Path) -> None:
    (tmp_path / "wrong.yaml").write_text(content)
    with pytest.raises(HvdlmError) as refused:
        read_conditions(tmp_path / "wrong.yaml", 4)
    message = str(refused.value)
    assert message.startswith(f"injected.file {tmp_path / 'wrong.yaml'}: ") and WRONG[content] in message
    assert "\n" not in message and message.endswith(".")


def test_the_example_is_read_as_it_says() -> None:
    conditions = read_conditions(ROOT / "examples" / "conditions" / "injected.yaml", 4)
    assert conditions.ranks_per_node == 2
    assert conditions.links[1:] == (
        LinkRule("across_nodes", 50e-6, 125e6),
        LinkRule((1, 2), None, 1.25e6, 5, 8),
    )
    assert conditions.slow == (SlowRanks((3,), 2.0), SlowRanks((0, 1), 1.0, 0.01, 2))
    assert (conditions.late, conditions.faults) == ((Late(2, 3, 0.5),), (Fault(1, 10, "hang"),))


# Other ranks are waited for, and their signs of life are missed, for fewer seconds.
HASTY = "import sys; from hvdlm import cli; from hvdlm.diagnostics import phases, watchdog; "
HASTY += "watchdog._STACK_SECONDS = 1.0; phases._BEAT_SECONDS = 0.4; sys.exit(cli.main())"


def train(folder: Path, content: str | None, *options: str) -> Any:
    """Train on two threads under the conditions in ``content``; return the finished process."""
    (folder / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    arguments = ["-c", HASTY, "--backend", "threads", "--ranks", "2", "--plugins", "[injected]", *SMALL]
    arguments += ["--data.path", str(folder / "text.txt"), "--log.run", str(folder / "run"), "--train.steps", "4"]
    if content is not None:
        (folder / "conditions.yaml").write_text(content)
        arguments += ["--injected.file", str(folder / "conditions.yaml")]
    return run_python([*arguments, *options], timeout=240, HVDLM_TEST_IMPORTS="torch")


def test_what_can_not_be_injected_ends_with_code_2(tmp_path: Path) -> None:
    wrong = train(tmp_path, "faults: [{rank: 2, step: 1}]")
    assert wrong.returncode == 2 and "faults[0].rank is 2, expected a whole number from 0 to 1." in wrong.stderr
    factor = train(tmp_path, "slow: [{ranks: [0], factor: 2}]", "--framework", "tensorflow")
    assert factor.returncode == 2 and "tensorflow computes in threads that all ranks share" in factor.stderr
    without = train(tmp_path, None)
    assert without.returncode == 2 and "plugin injected needs the file of its conditions" in without.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["error", "hang", "exit"])
def test_an_injected_fault_is_diagnosed_with_rank_and_place(kind: str, tmp_path: Path) -> None:
    failed = train(tmp_path, f"faults: [{{rank: 1, step: 3, kind: {kind}}}]", "--communication.timeout", "2")
    assert failed.returncode == 1, failed.stderr[-3000:]
    if kind == "error":
        assert "hvdlm: rank 1 failed: InjectedError: injected fault: rank 1 fails at step 3" in failed.stderr
        assert "in train" in failed.stderr and "process.step(step + 1)" in failed.stderr
        return
    assert "rank 0 waits for" in failed.stderr and "step 3, called at hvdlm_torch/gradients.py" in failed.stderr
    assert "Not arrived there: rank 1." in failed.stderr
    if kind == "hang":
        assert "in begin_step" in failed.stderr and "training/loop.py" in failed.stderr
