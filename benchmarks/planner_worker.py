"""A rank that trains several configurations in turns; rank 0 emits the seconds of a step of each, turn by turn."""

from __future__ import annotations

import argparse
import json
from typing import Any

import numpy as np
from harness import emit

from hvdlm.config import Config
from hvdlm.parallel.mesh import make_mesh
from hvdlm_planner.timed_steps import build, connect, take_turns, warm_up


def make_config(options: dict[str, Any], framework: str, threads: int) -> Config:
    """Return the configuration of ``options``, as the command line names them; ``threads``: 0: those of a run."""
    common = {
        "framework": framework,
        "data.context": 64,
        "model.bias": False,
        "train.steps": 10**7,
        "checkpoint.every": 0,
    }
    chosen = {name: value for name, value in options.items() if name != "vocab"}
    return Config.load(common | ({"train.threads": threads} if threads else {}) | chosen)


def vocabulary(options: dict[str, Any]) -> int:
    """Return the size of the vocabulary that ``options`` name."""
    return int(options.get("vocab", 96))


def main() -> None:
    """Train in turns."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--framework")
    parser.add_argument("--configurations", help="JSON: options, and vocab, by name")
    for name in ("ranks", "rounds", "threads"):
        parser.add_argument(f"--{name}", type=int)
    parser.add_argument("--seconds", type=float, help="of a turn")
    o = parser.parse_args()
    options = json.loads(o.configurations)
    configs = {name: make_config(values, o.framework, o.threads) for name, values in options.items()}
    first = next(iter(configs.values()))
    ranks = connect(first, [make_mesh(o.ranks, config.parallel) for config in configs.values()])
    models = {}
    for name, config in configs.items():
        config.train.threads = ranks.threads
        models[name] = build(config, vocabulary(options[name]), ranks.world, ranks.framework)
        warm_up([models[name]], ranks.world, o.seconds)
        if ranks.world.rank == 0:
            emit("steps", [name, models[name].steps * models[name].period])
    for number in range(o.rounds):
        take_turns(list(models.values()), ranks.world, number)
        slowest = np.max(ranks.world.gather_objects([model.seconds[-1] for model in models.values()]), axis=0)
        if ranks.world.rank == 0:
            emit("seconds", dict(zip(models, slowest.tolist(), strict=True)))
    ranks.world.close()


if __name__ == "__main__":
    main()
