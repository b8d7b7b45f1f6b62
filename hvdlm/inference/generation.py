"""Text from a trained model: sampling by temperature, top-k and top-p, one token at a time from a cache."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.io import untrusted_input
from hvdlm.io.terminal import on_terminal
from hvdlm.protocols.trainable import Trainable

if TYPE_CHECKING:
    from hvdlm.training.run import Run

_PROMPT = 2**24  # bytes


@dataclass
class Sampling:
    """How the next token is drawn.

    Args:
        temperature: divides the scores; 0: always the likeliest
        top_k: draw among the k likeliest; 0: among all
        top_p: draw among the likeliest whose probabilities sum to this (Holtzman et al. 2020); 1: among all
        seed: everything random follows from it
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 1

    def __post_init__(self) -> None:
        """Refuse what can't be drawn from."""
        if self.temperature < 0:
            raise HvdlmError(f"temperature is {self.temperature}, expected 0 or more.")
        if self.top_k < 0:
            raise HvdlmError(f"top_k is {self.top_k}, expected 0 (all) or more.")
        if not 0 < self.top_p <= 1:
            raise HvdlmError(f"top_p is {self.top_p}, expected above 0 and at most 1.")


def choose(scores: np.ndarray, sampling: Sampling, random: np.random.Generator) -> int:
    """Return a token drawn by float ``scores`` ``[vocab]``."""
    if sampling.temperature == 0:
        return int(scores.argmax())
    order = np.argsort(-scores, kind="stable")
    if sampling.top_k:
        order = order[: sampling.top_k]
    scaled = scores[order].astype(np.float64) / sampling.temperature
    shares = np.exp(scaled - scaled.max())
    shares /= shares.sum()
    if sampling.top_p < 1:
        kept = int(np.searchsorted(np.cumsum(shares), sampling.top_p)) + 1
        order, shares = order[:kept], shares[:kept] / shares[:kept].sum()
    return int(order[random.choice(len(order), p=shares)])


def generate(
    trainable: Trainable, prompt: np.ndarray, count: int, context: int, sampling: Sampling, vocab: int | None = None
) -> Iterator[int]:
    """Yield ``count`` tokens below ``vocab`` (None: any) that follow ``prompt`` (int32 ``[time]``, at least one).

    When a Transformer's context is full, it is read anew from the last half of it.
    """
    random = np.random.default_rng(sampling.seed)
    tokens = [int(t) for t in prompt]
    scores, cache, held = _read(trainable, tokens[-context:])
    for _ in range(count):
        token = choose(scores[0, :vocab], sampling, random)
        tokens.append(token)
        yield token
        if held == context:
            scores, cache, held = _read(trainable, tokens[-max(1, context // 2) :])
        else:
            scores, cache = trainable.logits(np.array([[token]], np.int32), cache)
            held += 1


def _read(trainable: Trainable, tokens: list[int]) -> tuple[np.ndarray, Any, int]:
    scores, cache = trainable.logits(np.array([tokens], np.int32), None)
    return scores, cache, len(tokens)


def encode(tokenizer: Any, prompt: str) -> np.ndarray:
    """Return the prompt's ids, int32 ``[time]``.

    Raises:
        HvdlmError: it is empty, or can't be written with this vocabulary.
    """
    ids = tokenizer.encode(prompt)
    if not len(ids):
        raise HvdlmError("the prompt is empty: give at least one character (--prompt, or --log.sample_prompt).")
    return ids


def generate_text(
    trainable: Trainable, tokenizer: Any, prompt: np.ndarray, count: int, context: int, sampling: Sampling
) -> Iterator[str]:
    """Yield the prompt and what ``generate`` adds, as pieces of text.

    A piece is decoded together with the one before it, since blanks and characters of several bytes depend on their
    neighbours, and is held back until its last character is whole.
    """
    written = [int(i) for i in prompt]
    first, read = 0, len(written)
    yield tokenizer.decode(written)
    for token in generate(trainable, prompt, count, context, sampling, tokenizer.vocab):
        written.append(token)
        before, after = tokenizer.decode(written[first:read]), tokenizer.decode(written[first:])
        if not after.endswith("\ufffd"):
            yield after[len(before) :]
            first, read = read, len(written)


def read_prompt(path: Path) -> str:
    """Return the text in a file.

    Raises:
        HvdlmError: it can't be read, or is no text.
    """
    try:
        return str(untrusted_input.read(path, _PROMPT), "utf-8")
    except (OSError, ValueError) as error:
        raise HvdlmError(f"--prompt_file {path}: {error}: give a readable UTF-8 text.") from error


def write(run: Run, prompt: str, count: int, sampling: Sampling) -> str:
    """Print ``prompt`` and what follows it, on rank 0: as it comes on a terminal, by whole lines elsewhere.

    Of a task that answers, print the answer.

    The ranks that hold a copy of the model together with rank 0 compute with it. Returns the text.
    """
    if run.mesh.coordinates(run.world.rank)["data"] != 0:
        return ""
    answer = run.task.respond(run.trainable, prompt)
    if answer is not None:
        if run.world.rank == 0:
            print(answer, flush=True)
        return answer
    ids = encode(run.task.tokenizer, prompt)
    context = getattr(run.spec.settings, "context", sys.maxsize)
    waiting, whole, shown = "", [], run.world.rank == 0
    for shard in generate_text(run.trainable, run.task.tokenizer, ids, count, context, sampling):
        whole.append(shard)
        waiting += shard if shown else ""
        # Launchers put a rank's number before every write, so that parts of a line would be torn apart.
        ready = len(waiting) if on_terminal() else waiting.rfind("\n") + 1
        if ready:
            print(waiting[:ready], end="", flush=True)
            waiting = waiting[ready:]
    if shown:
        print(waiting, flush=True)
    return "".join(whole)
