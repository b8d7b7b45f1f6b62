"""Generate text with a run's model."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from hvdlm.errors import HvdlmError


def main(arguments: list[str]) -> int:
    """Generate, and print the texts on rank 0."""
    from hvdlm.configuration.parsing import split_overrides
    from hvdlm.data import corpora
    from hvdlm.diagnostics.rank_errors import ending_all_ranks
    from hvdlm.diagnostics.watchdog import watching
    from hvdlm.training.run import build, connect
    from hvdlm_inference.generation import as_chat, default_prompt, prompts_of, read_prompt, requests_of, write
    from hvdlm_inference.sampling import Sampling
    from hvdlm_inference.trained_run import plan_trained

    own, overrides = split_overrides(arguments)
    values = _parse(own)
    sampling = Sampling(values.temperature, values.top_k, values.top_p, values.seed)
    per_line, prompts = values.prompt_per_line, values.prompt
    if values.prompt_file is not None:
        source = f"--prompt_file {values.prompt_file}"
        prompts = prompts_of(read_prompt(Path(values.prompt_file)), per_line, source)
    with watching() as watchdog:
        connected = connect(plan_trained(values.run, values.checkpoint, overrides, values.weights))
        with ending_all_ranks(connected.world):
            run = build(connected)
            prompts = prompts or [default_prompt(run)]
            if values.prompt_file is None and "-" in prompts:  # a launcher passes standard input to rank 0 only
                text = run.world.broadcast_object(sys.stdin.read() if run.world.rank == 0 else None)
                read = prompts_of(text, per_line, "--prompt -")
                prompts = [prompt for given in prompts for prompt in (read if given == "-" else [given])]
            if values.chat:
                run = as_chat(run)
                texts = [corpora.chat_prompt(run.config, prompt) for prompt in prompts] if run.world.rank == 0 else []
                prompts = run.world.broadcast_object(texts)
            write(run, requests_of(prompts, values.num_samples, sampling), values.tokens, values.batch_size)
        watchdog.code = 0
    return 0


def _parse(arguments: list[str]) -> Any:
    from hvdlm_inference.generation import BATCH_SIZE
    from hvdlm_inference.trained_run import run_parser

    parser = run_parser("generate", "Generate text with a run's model.")
    parser.add_argument(
        "--prompt",
        type=str,
        action="append",
        help="prompt, by default a new line, or a token where the vocabulary has none; -: standard input; can be "
        "repeated",
    )
    parser.add_argument("--prompt_file", type=str, default=None, help="file with the prompt, in place of --prompt")
    parser.add_argument(
        "--prompt_per_line",
        type=bool,
        default=False,
        help="every line of --prompt_file or standard input that is not blank is a prompt",
    )
    parser.add_argument(
        "--chat", type=bool, default=False, help="prompts are a user's turns, written by the chat template of the data"
    )
    parser.add_argument("--tokens", type=int, default=200, help="number of tokens to generate")
    parser.add_argument(
        "--num_samples", type=int, default=1, help="number of samples of every prompt, with seeds SEED, SEED + 1, ..."
    )
    parser.add_argument("--batch_size", type=int, default=BATCH_SIZE, help="number of texts that are computed together")
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
    for name in ("tokens", "num_samples", "batch_size"):
        if getattr(values, name) < 1:
            raise HvdlmError(f"--{name}: got {getattr(values, name)}, expected 1 or more.")
    if values.prompt and values.prompt_file is not None:
        raise HvdlmError("--prompt and --prompt_file are both given: leave one out.")
    values.prompt = values.prompt or []
    if values.prompt_per_line and values.prompt_file is None and "-" not in values.prompt:
        raise HvdlmError("--prompt_per_line splits the text of --prompt_file or of --prompt -: give one of them.")
    return values
