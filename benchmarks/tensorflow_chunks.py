"""TensorFlow's attention and loss in chunks beside the plain formulas, whose tensors are kept; 1 rank, on a CPU.

    python benchmarks/tensorflow_chunks.py [--contexts 256 1024] [--vocabularies 50304] [--short]

The first figure is the processor seconds of a training step of a GPT, in chunks divided by those without, which are the
seconds of a step on a machine without other work if there is one thread. Both models live in one process and take
turns. The second figure is the memory by which a process grows at most from before the model is built, of two
processes. With each context the vocabulary is small, so that attention makes the difference; with each vocabulary the
context is short, so that the loss does. The numbers of chunks (``hvdlm_tensorflow/attention.py``, ``losses.py``) follow
from such measurements.
"""

from __future__ import annotations

import argparse
import resource
import sys
import time
from typing import Any

from harness import Bar, emit, flags, make_parser, parse, report, report_ratio, run_worker

FULL: dict[str, Any] = {
    "contexts": [256, 1024],
    "vocabularies": [50304],
    "tokens": 3072,
    "layers": 6,
    "width": 384,
    "threads": 1,
    "rounds": 9,
}
SHORT = {"contexts": [192], "vocabularies": [], "tokens": 384, "layers": 1, "width": 64, "rounds": 2}
VOCABULARY, CONTEXT = 65, 64  # one chunk each


def keep_weights(q: Any, k: Any, v: Any, longest: int, window: int, starts: None) -> Any:
    """Return causal attention by the plain formula, of a model without a ``window`` and rows without documents."""
    import numpy as np

    from hvdlm_tensorflow import attention

    mask = np.triu(np.full((longest, longest), -np.inf, np.float32), 1)
    return attention.attend(q, k, v, mask)


def training(o: argparse.Namespace, chunks: bool) -> Any:
    """Return a function that does a step of a GPT in this process; the first one has been done."""
    import numpy as np

    from hvdlm import plugins
    from hvdlm.communication.all_reduce import AllReduceExchange
    from hvdlm.config import Config, ModelConfig
    from hvdlm.parallel.mesh import Mesh
    from hvdlm.protocols.types import Batch
    from hvdlm_backends.local import AloneGroup, LocalWorld
    from hvdlm_language.presets import PRESETS

    context, vocab = o.case
    rows = max(1, o.tokens // context)
    model = ModelConfig(layers=o.layers, width=o.width, heads=max(1, o.width // 64))
    config = Config(framework="tensorflow", model=model)
    config.data.context = context
    config.train.batch_size, config.train.threads = rows, o.threads
    manager = plugins.load(["tensorflow", "local"])
    plugins.make(manager, "backend", "local").prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    made = plugins.make(manager, "framework", "tensorflow")
    spec = PRESETS["gpt"](model, vocab, context)
    trainable = made.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)
    tokens = np.random.default_rng(1).integers(0, vocab, (rows, context + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)

    from hvdlm_tensorflow import attention, losses
    from hvdlm_tensorflow.models import gpt

    usual = gpt.attend_causally, attention._ONE_CHUNK, losses._CHUNK
    if not chunks:
        gpt.attend_causally, attention._ONE_CHUNK, losses._CHUNK = keep_weights, context, 2**62
    emit("loss", trainable.train_step([batch], 1e-4, 0).loss)  # traces the graph
    gpt.attend_causally, attention._ONE_CHUNK, losses._CHUNK = usual
    return lambda step: trainable.train_step([batch], 1e-4, step)


def measure_time(o: argparse.Namespace) -> None:
    """Let both models train in turns; emit the rounds (chunks, plain)."""
    both = {chunks: training(o, chunks) for chunks in (True, False)}
    rounds = []
    for number in range(1, o.rounds + 1):
        seconds = {}
        for chunks in (True, False) if number % 2 else (False, True):
            began = time.process_time()
            both[chunks](number)
            seconds[chunks] = time.process_time() - began
        rounds.append((seconds[True], seconds[False]))
    emit("rounds", rounds)


def measure_memory(o: argparse.Namespace, chunks: bool) -> None:
    """Emit the growth of this process's peak memory in two steps, in MiB."""
    import tensorflow  # noqa: F401  (what importing takes isn't counted)

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    training(o, chunks)(1)
    emit("peak", (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)


def main() -> int:
    """Measure each context and vocabulary."""
    parser = make_parser(__doc__, frameworks=False)
    parser.add_argument("--work", choices=["time", "chunks", "plain"], help=argparse.SUPPRESS)
    parser.add_argument("--case", type=int, nargs=2, help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        measure_time(o) if o.work == "time" else measure_memory(o, o.work == "chunks")
        return 0
    sizes = flags({name: value for name in FULL if not isinstance(value := getattr(o, name), list)})
    cases = [(context, VOCABULARY) for context in o.contexts] + [(CONTEXT, vocab) for vocab in o.vocabularies]
    for context, vocab in cases:
        options = [*sizes, "--case", str(context), str(vocab)]
        timed, chunks, plain = (
            run_worker("tensorflow_chunks.py", 1, ["--work", work, *options]) for work in ("time", "chunks", "plain")
        )
        bar = Bar(at_most=1.0 if vocab == VOCABULARY else 1.1)
        of = f"{max(1, o.tokens // context)} sequences of {context} tokens, vocabulary {vocab:,}"
        details = f"losses differ by {abs(timed['loss'][0] - timed['loss'][1]):.1e}"
        report_ratio(f"step in chunks / without, {of}", timed["rounds"][0], bar, details)
        peaks = chunks["peak"][0], plain["peak"][0]
        details = f"{peaks[0]:.0f} and {peaks[1]:.0f} MiB"
        report(f"peak memory in chunks / without, {of}", peaks[0] / peaks[1], Bar(at_most=0.95), details)
    return 0


if __name__ == "__main__":
    sys.exit(main())
