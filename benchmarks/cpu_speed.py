"""Speed on CPUs: hvdlm beside loops without it, and PyTorch beside TensorFlow.

    python benchmarks/cpu_speed.py [--data FOLDER] [--short]

The first figure is sequences per second of 1 rank with two threads, divided by those of a loop without hvdlm
(nanogpt_worker.py); the second the same of 2 ranks with one thread each, beside DistributedDataParallel over Gloo. The
third is the speed of PyTorch on examples/shakespeare_char.yaml with 2 ranks, divided by TensorFlow's. Both jobs of a
figure live side by side and take turns, halted by SIGSTOP while it is not theirs.
"""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

from communication_cost import Job, take_turns
from harness import FOLDER, Bar, Rounds, flags, make_parser, parse, report_ratio
from loop_overhead import SHORT_SIZES, SIZES

PLAIN, DISTRIBUTED, FRAMEWORKS = Bar(at_least=1.05), Bar(at_least=1.3), Bar(at_least=0.9)
FULL = SIZES | {"turns": 12, "seconds": 2.0, "settle": 0.5, "warm": 20, "rows": 16}  # SIZES: the example's, too
SHORT = SHORT_SIZES | {"turns": 2, "seconds": 0.05, "settle": 0.02, "warm": 2, "rows": 4}
VOCAB = 103  # characters of the text that is part of hvdlm

Worker = tuple[str, Sequence[str]]  # a script, and its options


def beside(first: Worker, second: Worker, ranks: int, rows: int, o: Namespace) -> Rounds:
    """Return sequences per second of every pair of turns of two jobs; ``rows``: of a rank and step."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        jobs = []
        for name, (script, options) in (("first", first), ("second", second)):
            sizes = flags({name: getattr(o, name) for name in SIZES})
            jobs.append(Job(script, ranks, rows, Path(folder) / name, *options, *sizes))
            stack.callback(jobs[-1].end)
            jobs[-1].wait_until_warm(o.warm)
            jobs[-1].halt()
        return take_turns(jobs[:1], jobs[1:], o.turns, o.settle, o.seconds)


def main() -> int:
    """Measure all figures."""
    parser = make_parser(__doc__, frameworks=False)
    default = os.environ.get("HVDLM_DATA", FOLDER.parent.parent / "shared" / "data")
    parser.add_argument("--data", type=Path, default=default, help="folder with tinyshakespeare.txt")
    o = parse(parser, FULL, SHORT)
    for ranks, threads, name, bar in ((1, 2, "a plain loop", PLAIN), (2, 1, "DDP over Gloo", DISTRIBUTED)):
        ours = ("steady_worker.py", ["--framework", "torch", *flags({"threads": threads})])
        plain = ("nanogpt_worker.py", flags({"threads": threads, "vocab": VOCAB}))
        title = f"sequences/s of hvdlm / of {name}, {ranks} rank(s) with {threads} thread(s)"
        report_ratio(title, beside(ours, plain, ranks, o.rows, o), bar)
    text = Path(o.data).resolve() / "tinyshakespeare.txt"
    if not text.is_file():
        print(f"no figure of shakespeare_char: there is no {text} (--data or HVDLM_DATA names its folder)", flush=True)
        return 0
    example = flags({"config": FOLDER.parent / "examples" / "shakespeare_char.yaml", "text": text, "threads": 1})
    jobs = [("steady_worker.py", ["--framework", name, *example]) for name in ("torch", "tensorflow")]
    report_ratio("tokens/s of torch / of tensorflow, shakespeare_char, 2 ranks", beside(*jobs, 2, 6, o), FRAMEWORKS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
