"""Text generation with a key-value cache, one token at a time."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.terminal import on_terminal
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.tokenizer import Tokenizer
from hvdlm.protocols.trainable import Trainable
from hvdlm_inference.sampling import Sampling, number, sample

if TYPE_CHECKING:
    from hvdlm.training.run import Run

_MAX_BYTES = 2**24  # of a prompt file


def generate(
    trainable: Trainable, prompt: np.ndarray, count: int, context: int, sampling: Sampling, vocab: int | None = None
) -> Iterator[int]:
    """Yield ``count`` tokens below ``vocab`` (None: any) that continue ``prompt`` (int32 ``[time]``, at least one).

    When the cache has reached ``context`` tokens, it is rebuilt from the last half of them.
    """
    random = np.random.default_rng(sampling.seed)
    tokens = [int(t) for t in prompt]
    logits, cache, length = _fill_cache(trainable, tokens[-context:])
    for _ in range(count):
        token = sample(logits[0, :vocab], sampling, random)
        tokens.append(token)
        yield token
        if length == context:
            logits, cache, length = _fill_cache(trainable, tokens[-max(1, context // 2) :])
        else:
            logits, cache = trainable.logits(np.array([[token]], np.int32), cache)
            length += 1


def _fill_cache(trainable: Trainable, tokens: list[int]) -> tuple[np.ndarray, Any, int]:
    """Return the logits after ``tokens``, a new cache with them, and their number."""
    logits, cache = trainable.logits(np.array([tokens], np.int32), None)
    return logits, cache, len(tokens)


def check_request(prompt: object, tokens: object) -> None:
    """Check the types of a prompt and of the number of tokens to generate.

    Raises:
        HvdlmError: the prompt is no text, or the number none of at least 1.
    """
    if not isinstance(prompt, str):
        raise HvdlmError(f"prompt: expected text, got {shown(repr(prompt))}.")
    number("tokens", tokens, int, least=1)


def encode(tokenizer: Tokenizer, prompt: str, config: Config) -> np.ndarray:
    """Return the prompt's ids, int32 ``[time]``, with the tokens with which documents of a run begin.

    Raises:
        HvdlmError: the prompt is empty, takes too long, the vocabulary lacks a character of it, or the model a token.
    """
    text = text_decoding.without_surrogates(prompt)
    begin = config.data.add_special_tokens
    ids = tokenizer.within_budget(len(text), lambda: tokenizer.encode_prompt(text, begin))
    if not len(ids):
        raise HvdlmError("the prompt is empty: give at least one character (--prompt, or --log.sample_prompt).")
    if config.model.vocab and ids.max() >= config.model.vocab:
        token = shown(tokenizer.decode([int(ids.max())]))
        raise HvdlmError(f"the prompt has the token {token}, for which the model has no embedding: leave it out.")
    return ids


def generate_text(
    tokenizer: Tokenizer, prompt: np.ndarray, generated: Iterable[int], stop_tokens: Collection[int] = ()
) -> Iterator[str]:
    """Yield the text of ``generated`` tokens, which continue ``prompt``, in chunks, up to the first stop token.

    A chunk is decoded together with the one before it, since spaces and characters of several bytes depend on their
    neighbours, and is held back until its last character is complete, or no token follows.
    """
    tokens = [int(i) for i in prompt]
    start, yielded = 0, len(tokens)
    for token in itertools.takewhile(lambda token: token not in stop_tokens, generated):
        tokens.append(token)
        before, after = tokenizer.decode(tokens[start:yielded]), tokenizer.decode(tokens[start:])
        if not after.endswith("\ufffd"):
            yield after[len(before) :]
            start, yielded = yielded, len(tokens)
    if yielded < len(tokens):
        yield tokenizer.decode(tokens[start:])[len(tokenizer.decode(tokens[start:yielded])) :]


def read_prompt(path: Path) -> str:
    """Read a prompt file.

    Raises:
        HvdlmError: it can't be read, or is no UTF-8 text.
    """
    try:
        return text_decoding.decode(untrusted_input.read(path, _MAX_BYTES))
    except (OSError, ValueError) as error:
        raise HvdlmError(f"--prompt_file {path}: {error}: give a readable UTF-8 text.") from error


def chunks_of_text(run: Run, prompt: str, count: int, sampling: Sampling) -> Iterator[str]:
    """Yield ``prompt`` and then its continuation in chunks, or the task's response to it as one.

    All ranks of rank 0's copy of the model call; others get nothing.
    """
    if run.mesh.coordinates(run.world.rank)["data"] != 0:
        return
    prompt = text_decoding.without_surrogates(prompt)
    response = run.task.respond(run.trainable, prompt)
    if response is not None:
        yield response
        return
    tokenizer, settings = run.task.tokenizer, run.spec.settings
    ids = encode(tokenizer, prompt, run.config)
    context = getattr(settings, "context", sys.maxsize)
    generated = generate(run.trainable, ids, count, context, sampling, tokenizer.vocab)
    yield prompt
    for chunk in generate_text(tokenizer, ids, generated, run.config.model.stop_tokens or ()):
        process.alive()
        yield chunk


def write(run: Run, prompt: str, count: int, sampling: Sampling) -> str:
    """Print ``prompt`` and its continuation on rank 0, or the task's response to it; return the text.

    On a terminal, text is printed as it is generated, elsewhere line by line. All ranks call; those of rank 0's copy of
    the model take part.
    """
    chunks = []
    unprinted = ""
    for chunk in chunks_of_text(run, prompt, count, sampling):
        chunks.append(chunk)
        if run.world.rank != 0:
            continue
        if run.world.size == 1 and getattr(sys.stdout, "reader_is_gone", False):
            break  # nobody would read the rest; with several ranks, all would have to agree
        unprinted += chunk
        # Launchers prefix every write with the rank, which would break a line that is printed in several writes.
        end = len(unprinted) if on_terminal() else unprinted.rfind("\n") + 1
        if end:
            print(unprinted[:end], end="", flush=True)
            unprinted = unprinted[end:]
    if run.world.rank == 0:
        print(unprinted, flush=True)
    return "".join(chunks)


def text_of(run: Run, prompt: str, count: int, shown: bool = False, **sampling: Any) -> str:
    """Return ``prompt`` and its continuation, or the task's response; "" on ranks without rank 0's copy of the model.

    All ranks call. ``shown``: rank 0 also prints it, as ``write`` does; ``sampling``: the fields of ``Sampling``.

    Raises:
        HvdlmError: a value is out of its range, or the vocabulary lacks a character of the prompt.
    """
    check_request(prompt, count)
    chosen = Sampling(**sampling)
    return write(run, prompt, count, chosen) if shown else "".join(chunks_of_text(run, prompt, count, chosen))
