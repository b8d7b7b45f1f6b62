"""Texts that continue prompts."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from hvdlm.config import Config
from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io import text_decoding, untrusted_input
from hvdlm.io.terminal import on_terminal
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.inference import Inference
from hvdlm.protocols.tokenizer import Tokenizer
from hvdlm_inference.decoding import Text, decode
from hvdlm_inference.sampling import Sampling, number

if TYPE_CHECKING:
    from hvdlm.training.run import Run

BATCH_SIZE = 16  # texts that are generated together by default
_MAX_BYTES = 2**24  # of a prompt file
_RULE = "-" * 16  # between texts
_NEW_LINE = "\n"
_CANDIDATES = 256  # tokens that are tried as a prompt


def generate(
    inference: Inference, prompt: np.ndarray, count: int, context: int, sampling: Sampling, vocab: int | None = None
) -> Iterator[int]:
    """Yield ``count`` tokens below ``vocab`` (None: any) that continue ``prompt`` (int32 ``[time]``, at least one)."""
    text = Text(prompt, count, sampling.seed)
    for _ in decode(inference, [text], context, sampling.rule(vocab)):
        yield text.generated[-1]


def check_request(prompts: Sequence[object], tokens: object, samples: object = 1, batch_size: object = 1) -> None:
    """Check the types of prompts and of the numbers of tokens and samples, and of the texts computed together.

    Raises:
        HvdlmError: a prompt is no text, there is none, or a number is none of at least 1.
    """
    if not prompts:
        raise HvdlmError("prompt: the list is empty: give at least one text.")
    for prompt in prompts:
        if not isinstance(prompt, str):
            raise HvdlmError(f"prompt: expected text, got {shown(repr(prompt))}.")
    for name, value in {"tokens": tokens, "num_samples": samples, "batch_size": batch_size}.items():
        number(name, value, int, least=1)


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


def default_prompt(run: Run) -> str:
    """Return what a text begins with where no prompt is given: a new line, or the first token that texts can spell."""
    tokenizer = run.task.tokenizer
    if run.task.reads:  # a task that responds
        return _NEW_LINE
    spelled = (tokenizer.decode([token]) for token in range(min(tokenizer.vocab, _CANDIDATES)))
    for text in (_NEW_LINE, *spelled):
        try:
            encode(tokenizer, text, run.config)
            return text
        except HvdlmError:  # no character, or one that the vocabulary lacks
            continue
    return _NEW_LINE


class Detokenizer:
    """Turns the tokens that follow a prompt into chunks of text, one token after the other.

    A chunk is decoded together with the one before it, since spaces and characters of several bytes depend on their
    neighbours, and is held back until its last character is complete, or no token follows.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: Iterable[int]) -> None:
        self._tokenizer = tokenizer
        self._tokens = [int(i) for i in prompt]
        self._start, self._shown = 0, len(self._tokens)

    def add(self, token: int) -> str:
        """Return the text that ``token`` completes; "" where it completes none."""
        self._tokens.append(token)
        chunk = self._new()
        if chunk.endswith("\ufffd"):
            return ""
        self._start, self._shown = self._shown, len(self._tokens)
        return chunk

    def end(self) -> str:
        """Return the text that was held back."""
        return self._new() if self._shown < len(self._tokens) else ""

    def _new(self) -> str:
        before = self._tokenizer.decode(self._tokens[self._start : self._shown])
        return self._tokenizer.decode(self._tokens[self._start :])[len(before) :]


def prompts_of(text: str, per_line: bool, source: str) -> list[str]:
    """Return the prompts of a text from ``source``: the text itself, or each of its lines that isn't blank.

    Raises:
        HvdlmError: all lines are blank.
    """
    if not per_line:
        return [text]
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines:
        raise HvdlmError(f"{source}: no line has a prompt (--prompt_per_line): write one prompt a line.")
    return lines


def read_prompt(path: Path) -> str:
    """Read a prompt file.

    Raises:
        HvdlmError: it can't be read, or is no UTF-8 text.
    """
    try:
        return text_decoding.decode(untrusted_input.read(path, _MAX_BYTES))
    except (OSError, ValueError) as error:
        raise HvdlmError(f"--prompt_file {path}: {error}: give a readable UTF-8 text.") from error


def as_chat(run: Run) -> Run:
    """Return a run whose prompts get no tokens that documents begin with: a chat template writes them."""
    return replace(run, config=replace(run.config, data=replace(run.config.data, add_special_tokens=False)))


class Request(NamedTuple):
    """A text to be generated: its prompt, and how it is sampled."""

    prompt: str
    sampling: Sampling


def requests_of(prompts: Iterable[str], samples: int, sampling: Sampling) -> list[Request]:
    """Return ``samples`` requests for each of ``prompts``, with the seeds ``sampling.seed`` and those that follow."""
    seeds = range(sampling.seed, sampling.seed + samples)
    return [Request(prompt, replace(sampling, seed=seed)) for prompt in prompts for seed in seeds]


def chunks_of_texts(run: Run, requests: Sequence[Request], count: int, batch_size: int) -> Iterator[tuple[int, str]]:
    """Yield (number of the request, chunk of its text), one text after the other: prompts and their continuations.

    Of a task that responds, a text is the response, in one chunk. Up to ``batch_size`` texts are computed together;
    requests differ in prompts and seeds only. All ranks of rank 0's copy of the model call; others get nothing. With
    ZeRO-3, all ranks share one copy.
    """
    if run.mesh.coordinates(run.world.rank)["data"] and not run.exchange.traits.shards_parameters:
        return
    prompts = [text_decoding.without_surrogates(request.prompt) for request in requests]
    for index, prompt in enumerate(prompts):
        response = run.task.respond(run.trainable, prompt)
        if response is None:
            break
        yield index, response
    else:
        return
    tokenizer, stop_tokens = run.task.tokenizer, run.config.model.stop_tokens or ()
    context = getattr(run.spec.settings, "context", sys.maxsize)
    ids = [encode(tokenizer, prompt, run.config) for prompt in prompts]
    texts = [Text(i, count, request.sampling.seed) for i, request in zip(ids, requests, strict=True)]
    steps = decode(run.trainable, texts, context, requests[0].sampling.rule(tokenizer.vocab), batch_size, stop_tokens)
    for index, (prompt, text) in enumerate(zip(prompts, texts, strict=True)):
        yield index, prompt
        detokenizer = Detokenizer(tokenizer, ids[index])
        for token in _tokens(text, steps):
            if token not in stop_tokens:
                yield index, detokenizer.add(token)
        yield index, detokenizer.end()


def _tokens(text: Text, steps: Iterator[None]) -> Iterator[int]:
    """Yield the tokens of ``text``, which gets them in ``steps`` that serve others, too."""
    yielded = 0
    while text.left or yielded < len(text.generated):
        if yielded == len(text.generated):
            next(steps)
            process.alive()
        else:
            yield text.generated[yielded]
            yielded += 1


def write(run: Run, requests: Sequence[Request], count: int, batch_size: int) -> list[str]:
    """Print the texts of ``requests`` on rank 0, with a line between them, and return them.

    On a terminal, text is printed as it is generated, elsewhere line by line. All ranks call; those of rank 0's copy of
    the model take part.
    """
    chunks: list[list[str]] = [[] for _ in requests]
    unprinted = ""
    for index, chunk in chunks_of_texts(run, requests, count, batch_size):
        new = index > 0 and not chunks[index]
        chunks[index].append(chunk)
        if run.world.rank != 0:
            continue
        if run.world.size == 1 and getattr(sys.stdout, "reader_is_gone", False):
            break  # nobody would read the rest; with several ranks, all would have to agree
        unprinted += f"\n{_RULE}\n{chunk}" if new else chunk
        # Launchers prefix every write with the rank, which would break a line that is printed in several writes.
        end = len(unprinted) if on_terminal() else unprinted.rfind("\n") + 1
        if end:
            print(unprinted[:end], end="", flush=True)
            unprinted = unprinted[end:]
    if run.world.rank == 0:
        print(unprinted, flush=True)
    return ["".join(of_text) for of_text in chunks]


def texts_of(
    run: Run, prompts: Sequence[str], count: int, samples: int = 1, batch_size: int = 1, **sampling: Any
) -> list[str]:
    """Return ``samples`` texts for each of ``prompts``; "" on ranks without rank 0's copy of the model.

    All ranks call. ``sampling``: the fields of ``Sampling``, the seed of each prompt's first text among them.

    Raises:
        HvdlmError: a value is out of its range, or the vocabulary lacks a character of a prompt.
    """
    check_request(prompts, count, samples, batch_size)
    requests = requests_of(prompts, samples, Sampling(**sampling))
    chunks: list[list[str]] = [[] for _ in requests]
    for index, chunk in chunks_of_texts(run, requests, count, batch_size):
        chunks[index].append(chunk)
    return ["".join(of_text) for of_text in chunks]


def text_of(run: Run, prompt: str, count: int, shown: bool = False, **sampling: Any) -> str:
    """Return ``prompt`` and its continuation, or the task's response; "" on ranks without rank 0's copy of the model.

    All ranks call. ``shown``: rank 0 also prints it, as ``write`` does; ``sampling``: the fields of ``Sampling``.

    Raises:
        HvdlmError: a value is out of its range, or the vocabulary lacks a character of the prompt.
    """
    if not shown:
        return texts_of(run, [prompt], count, **sampling)[0]
    check_request([prompt], count)
    return write(run, [Request(prompt, Sampling(**sampling))], count, 1)[0]
