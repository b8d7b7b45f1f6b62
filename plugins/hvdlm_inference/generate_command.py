"""Generate text with a run's model."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError


def main(arguments: list[str]) -> int:
    """Generate, and print the texts on rank 0."""
    from hvdlm.configuration.parsing import split_overrides
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.training.run import build, connect
    from hvdlm_inference.generation import read_prompt, write
    from hvdlm_inference.sampling import Sampling
    from hvdlm_inference.trained_run import plan_trained

    own, overrides = split_overrides(arguments)
    values = _parse(own)
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
    text = None if values.prompt_file is None else read_prompt(Path(values.prompt_file))
    with watching() as watchdog:
        connected = connect(plan_trained(values.run, values.checkpoint, overrides))
        with ending_all_ranks(connected.world):
            run = build(connected)
            prompt = values.prompt if text is None else text
            if prompt == "-":  # a launcher passes standard input to rank 0 only
                prompt = run.world.broadcast_object(sys.stdin.read() if run.world.rank == 0 else None)
            for number in range(values.num_samples):
                if number and run.world.rank == 0:
                    print("-" * 16, flush=True)
                write(run, prompt, values.tokens, replace(sampling, seed=values.seed + number))
        watchdog.code = 0
    return 0


def _parse(arguments: list[str]) -> Any:
    from hvdlm_inference.trained_run import run_parser

    parser = run_parser("generate", "Generate text with a run's model.")
    parser.add_argument("--prompt", type=str, default="\n", help="prompt; -: read standard input")
    parser.add_argument("--prompt_file", type=str, default=None, help="file with the prompt")
    parser.add_argument("--tokens", type=int, default=200, help="number of tokens to generate")
    parser.add_argument("--num_samples", type=int, default=1, help="number of samples, with seeds SEED, SEED + 1, ...")
    parser.add_argument("--temperature", type=float, default=0.8, help="sampling temperature; 0: greedy")
    parser.add_argument("--top_k", type=int, default=0, help="sample from the k most probable tokens; 0: all")
    parser.add_argument(
        "--top_p",
        type=float,
        default=1.0,
        help="nucleus sampling: sample from the most probable tokens whose probabilities sum to this",
    )
    parser.add_argument("--seed", type=int, default=1, help="random seed")
    values = parser.parse_args(arguments)
    for name in ("tokens", "num_samples"):
        if getattr(values, name) < 1:
            raise HvdlmError(f"--{name}: got {getattr(values, name)}, expected 1 or more.")
    return values
