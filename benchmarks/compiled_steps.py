"""Speed of compiled steps (``train.compile true``) beside those that are not, by size of model; no GPU needed.

    python benchmarks/compiled_steps.py [torch tensorflow] [--models 4x128 6x384] [--precision fp32] [--short]
        [--layouts 1x1x2 1x2x1]

The figure is the processor seconds of a step that is not compiled divided by those of a compiled one. With one thread,
the default, they are the seconds of a step on a machine without other work, which slows them little. Both models live
in one process, and train a block of steps each in turns. The details say how many seconds compiling took, and after how
many steps it has paid off. ``train.compile auto`` follows these figures (``hvdlm_torch/compiler.py``,
``hvdlm_tensorflow/devices.py``).

The other figures are those of two ranks that share a model, in layouts written as data x pipeline x tensor: the seconds
of a block of steps, as both ranks wait for each other.

The short form traces and differentiates PyTorch's steps, but generates no code: that takes a C++ compiler a minute.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

from harness import emit, flags, make_parser, parse, report_ratio, run_worker
from layout_worker import choose_compiler

FULL = {
    "models": ["4x128", "6x384", "12x512"],
    "layouts": ["1x1x2", "1x2x1"],
    "layers": 4,
    "width": 256,
    "context": 128,
    "rows": 6,
    "threads": 1,
    "rounds": 15,
    "block": 2,
    "compiler": "inductor",
}
SHORT = {"models": ["1x32"], "layouts": ["1x2x1"], "layers": 2, "width": 32}
SHORT |= {"context": 16, "rows": 2, "rounds": 2, "block": 1, "compiler": "eager"}
VOCAB = 96


def training(framework: str, shape: str, o: argparse.Namespace, compiled: bool) -> Any:
    """Return a GPT of LAYERSxWIDTH in training on this process alone."""
    from hvdlm import plugins
    from hvdlm.communication.all_reduce import AllReduceExchange
    from hvdlm.config import Config, ModelConfig
    from hvdlm.parallel.mesh import Mesh
    from hvdlm_backends.local import AloneGroup, LocalWorld
    from hvdlm_language.presets import PRESETS

    layers, width = map(int, shape.split("x"))
    config = Config(framework=framework, model=ModelConfig(layers=layers, width=width, heads=max(1, width // 64)))
    config.data.context = o.context
    config.train.batch_size, config.train.threads = o.rows, o.threads
    config.train.precision, config.train.compile = o.precision, compiled
    manager = plugins.load([framework, "local"])
    plugins.make(manager, "backend", "local").prepare(config)
    manager.hook.hvdlm_prepare(config=config)
    spec = PRESETS["gpt"](config.model, VOCAB, o.context)
    made = plugins.make(manager, "framework", framework)
    return made.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)


def work(framework: str, shape: str, o: argparse.Namespace) -> None:
    """Let both train in turns; emit the rounds (compiled, plain), the seconds of their first steps, their losses."""
    import numpy as np

    from hvdlm.protocols.types import Batch

    choose_compiler(framework, o.compiler)
    both = {compiled: training(framework, shape, o, compiled) for compiled in (True, False)}
    tokens = np.random.default_rng(1).integers(0, VOCAB, (o.rows, o.context + 1)).astype(np.int32)
    batch = Batch(tokens[:, :-1].copy(), tokens[:, 1:].copy(), None, True)
    losses: dict[bool, list[float]] = {True: [], False: []}

    def turn(compiled: bool, steps: int) -> float:
        began = time.process_time()
        for _ in range(steps):
            result = both[compiled].train_step([batch], 1e-4, len(losses[compiled]))
            losses[compiled].append(result.loss)
        return time.process_time() - began

    began = time.perf_counter()
    turn(True, 1)
    compiling = time.perf_counter() - began
    for compiled in both:
        turn(compiled, 2)  # the first step allocates
    rounds = []
    for number in range(o.rounds):
        order = (True, False) if number % 2 else (False, True)
        seconds = {compiled: turn(compiled, o.block) for compiled in order}
        rounds.append((seconds[True], seconds[False]))
    emit("rounds", rounds)
    emit("compiling", compiling)
    emit("difference", max(abs(a - b) for a, b in zip(losses[True], losses[False], strict=False)))


def report_layout(framework: str, layout: str, o: argparse.Namespace) -> None:
    """Report the ratio of two ranks that share a model; XLA can't compile the collectives of tensor ranks."""
    if framework == "tensorflow" and not layout.endswith("x1"):
        return
    sizes = {name: getattr(o, name) for name in ("width", "layers", "context", "rounds", "compiler")}
    sizes |= {"rows": 8, "micro_batches": 4}
    worker = ["--framework", framework, "--layouts", f"{layout},{layout}c", *flags(sizes)]
    rounds = run_worker("layout_worker.py", 2, worker)["rounds"][0]
    title = f"step as it is / compiled, {framework}, {layout} (data x pipeline x tensor), width {o.width}"
    report_ratio(title, [(plain, compiled) for plain, compiled in rounds], None)


def main() -> int:
    """Measure each framework and size."""
    parser = make_parser(__doc__)
    parser.add_argument("--precision", default="fp32", choices=["fp32", "bf16"])
    parser.add_argument("--work", action="store_true", help=argparse.SUPPRESS)
    o = parse(parser, FULL, SHORT)
    if o.work:
        work(o.frameworks[0], o.models[0], o)
        return 0
    sizes = {
        name: getattr(o, name) for name in (*FULL, "precision") if name not in ("models", "layouts", "layers", "width")
    }
    for framework in o.frameworks:
        for shape in o.models:
            values = run_worker("compiled_steps.py", 1, ["--work", framework, "--models", shape, *flags(sizes)])
            rounds, compiling = values["rounds"][0], values["compiling"][0]
            saved = statistics.median(plain - compiled for compiled, plain in rounds) / o.block
            paid = f"paid off after {compiling / saved:,.0f} steps" if saved > 0 else "never pays off"
            details = f"compiling took {compiling:.0f} s and {paid}; losses differ by {values['difference'][0]:.1e}"
            title = f"step as it is / compiled, {framework}, {shape}, {o.precision}, {o.threads} thread(s)"
            report_ratio(title, [(plain, compiled) for compiled, plain in rounds], None, details)
        for layout in o.layouts:
            report_layout(framework, layout, o)
    return 0


if __name__ == "__main__":
    sys.exit(main())
