"""Speed of texts that are generated in one batch, beside that of the same texts one after the other; no GPU needed.

    python benchmarks/generation.py [torch tensorflow] [--samples 16] [--tokens 200] [--short]

The model is that of examples/shakespeare_char.yaml, trained for some steps on the embedded corpus. The figure is the
tokens/s of one call of ``TrainedRun.generate`` for all samples, divided by those of a call for each of them; both take
turns in one process. The other figure is the share of texts that differ between the two: products of several rows may
have other last bits than those of one, and 5 in a million random numbers lie between the two sums of probabilities.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

from harness import Bar, emit, flags, make_parser, parse, report, report_ratio, run_worker
from loop_overhead import SHORT_SIZES, SIZES

FASTER, SAME = Bar(at_least=8), Bar(at_most=0.02)
FULL = SIZES | {"samples": 16, "tokens": 200, "rounds": 7, "steps": 100}  # SIZES: the example's, too
SHORT = SHORT_SIZES | {"samples": 3, "tokens": 20, "rounds": 1, "steps": 2}


def work(framework: str, o: argparse.Namespace) -> None:
    """Train a run and let both ways take turns; emit the rounds (alone, batch), and the texts that differ."""
    import hvdlm

    model = {"name": "gpt", "layers": o.layers, "width": o.width, "heads": 4, "bias": False}
    options = {"framework": framework, "model": model, "data.context": 64, "train.steps": o.steps}
    options |= {"train.batch_size": 12, "train.warmup": 0, "train.eval_every": 0, "log.progress": False}
    with tempfile.TemporaryDirectory() as folder:
        result = hvdlm.train(hvdlm.Config.load(options, {"log.run": Path(folder) / "run"}))
        with hvdlm.load(result.run) as run:
            rounds, differing = [], 0
            for number in range(o.rounds + 1):
                first = 1 + number * o.samples
                began = time.perf_counter()
                alone = [run.generate("\n", o.tokens, seed=first + i) for i in range(o.samples)]
                between = time.perf_counter()
                together = run.generate("\n", o.tokens, num_samples=o.samples, batch_size=o.samples, seed=first)
                rounds.append((between - began, time.perf_counter() - between))
                differing += sum(a != b for a, b in zip(alone, together, strict=True))
    emit("rounds", rounds[1:])  # in the first, graphs are built
    emit("differing", differing)


def main() -> int:
    """Measure each framework."""
    parser = make_parser(__doc__)
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o.frameworks[0], o)
        return 0
    for framework in o.frameworks:
        values = run_worker(
            "generation.py", 1, ["--work", framework, *flags({name: getattr(o, name) for name in FULL})]
        )
        rounds, count = values["rounds"][0], o.samples * o.tokens
        alone, together = (count / statistics.median(seconds) for seconds in zip(*rounds, strict=True))
        title = f"tokens/s of {o.samples} texts of {o.tokens} tokens in one batch / one after the other, {framework}"
        details = f"{together:,.0f} and {alone:,.0f} tokens/s"
        report_ratio(title, rounds, FASTER if framework == "torch" else None, details)
        differing, texts = values["differing"][0], o.samples * (o.rounds + 1)
        report(f"texts that differ from those alone, {framework}", differing / texts, SAME, f"of {texts} texts")
    return 0


if __name__ == "__main__":
    sys.exit(main())
