"""Decoding of several texts in one batch, in which each gets the tokens that it would get alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np

from hvdlm.errors import HvdlmError
from hvdlm.protocols.inference import Inference, SamplesTokens, SamplingRule
from hvdlm_inference.sampling import HostSampler


class Text:
    """A text that is being generated.

    Attributes:
        generated: the tokens so far, the stop token included.
        left: how many are still to be generated; 0: it has ended.
        cached: how many tokens the cache holds; 0: it has to be filled.
    """

    def __init__(self, prompt: np.ndarray, count: int, seed: int) -> None:
        self.generated: list[int] = []
        self.left = count
        self.cached = 0
        self._tokens: list[int] = prompt.tolist()
        self._random = np.random.default_rng(seed)

    def unread(self, context: int) -> list[int]:
        """Return the tokens that the model reads next; where ``cached`` is 0, they are the first of a new cache."""
        if self.cached == context:
            self.cached = 0
            return self._tokens[-max(1, context // 2) :]
        return self._tokens[-1:] if self.cached else self._tokens[-context:]

    def draw(self) -> float:
        """Return a uniform number. Every token takes one, so that a text doesn't depend on those beside it."""
        return self._random.random()

    def add(self, token: int, read: int, stop_tokens: Collection[int]) -> None:
        """Add the token that follows the ``read`` tokens which the model has read last."""
        self._tokens.append(token)
        self.cached += read
        if self.left:
            self.generated.append(token)
            self.left = 0 if token in stop_tokens else self.left - 1


def decode(
    inference: Inference,
    texts: Iterable[Text],
    context: int,
    rule: SamplingRule,
    batch_size: int = 1,
    stop_tokens: Collection[int] = (),
) -> Iterator[None]:
    """Generate ``texts``, up to ``batch_size`` at a time; yield after every step, in which each of these gets a token.

    When a text's cache has reached ``context`` tokens, it is filled anew with the last half of them.

    Raises:
        HvdlmError: scores are not finite.
    """
    sampler: SamplesTokens = inference if isinstance(inference, SamplesTokens) else HostSampler(inference)
    batch = _Batch(sampler, context, rule, stop_tokens)
    waiting = list(texts)
    while waiting or batch.texts:
        waiting = batch.admit(waiting, batch_size)
        batch.step()
        yield


class _Group(NamedTuple):
    """Texts that are computed by one call: ``texts[i]`` are numbers of texts in the batch, which have read the same."""

    texts: list[list[int]]
    tokens: np.ndarray
    cache: Any


class _Batch:
    """The texts that are computed together, and their cache, whose rows are the first texts."""

    def __init__(self, sampler: SamplesTokens, context: int, rule: SamplingRule, stop_tokens: Collection[int]) -> None:
        self.texts: list[Text] = []
        self._sampler = sampler
        self._context = context
        self._rule = rule
        self._stop_tokens = stop_tokens
        self._cache: Any = None

    def admit(self, waiting: list[Text], size: int) -> list[Text]:
        """Take texts up to ``size``, as long as they can be computed with those of the batch; return the others."""
        room = size - len(self.texts)
        if self._sampler.joins_caches:
            self.texts += waiting[:room]
            return waiting[room:] if room else waiting
        if self.texts:
            return waiting
        lengths = [len(text.unread(self._context)) for text in waiting]
        alike = [text for text, length in zip(waiting, lengths, strict=True) if length == lengths[0]]
        others = [text for text, length in zip(waiting, lengths, strict=True) if length != lengths[0]]
        self.texts = alike[:size]
        return alike[size:] + others

    def step(self) -> None:
        """Generate a token of every text."""
        cached = sum(text.cached > 0 for text in self.texts)
        unread = [text.unread(self._context) for text in self.texts]
        groups = [*self._continue(unread, cached), *self._fill(unread)]
        for group in groups:
            if group.tokens.min() < 0:
                raise HvdlmError(
                    "the model's scores of the next token are not finite numbers: its training has diverged. Generate "
                    "from an earlier checkpoint (--checkpoint)."
                )
            for row, texts in enumerate(group.texts):
                for draw, number in enumerate(texts):
                    self.texts[number].add(int(group.tokens[row, draw]), len(unread[number]), self._stop_tokens)
        self._keep(groups)

    def _continue(self, unread: list[list[int]], cached: int) -> Iterator[_Group]:
        """Compute the texts that continue from the cache, which has ``cached`` rows."""
        continued = [number for number, text in enumerate(self.texts) if text.cached]
        if not continued:
            return
        if len(continued) < cached:
            self._cache = self._sampler.join([self._cache], np.array(continued))
        yield self._compute([[number] for number in continued], unread, self._cache)

    def _fill(self, unread: list[list[int]]) -> Iterator[_Group]:
        """Compute the texts whose cache has to be filled: those of the same length together, the same prompt once."""
        by_length: dict[int, dict[Any, list[int]]] = {}
        for number, (text, tokens) in enumerate(zip(self.texts, unread, strict=True)):
            if not text.cached:
                key = tuple(tokens) if self._sampler.joins_caches else number
                by_length.setdefault(len(tokens), {}).setdefault(key, []).append(number)
        for alike in by_length.values():
            yield self._compute(list(alike.values()), unread, None)

    def _compute(self, texts: list[list[int]], unread: list[list[int]], cache: Any) -> _Group:
        uniform = np.zeros((len(texts), max(map(len, texts))))
        if self._rule.temperature:
            for row, numbers in enumerate(texts):
                uniform[row, : len(numbers)] = [self.texts[number].draw() for number in numbers]
        read = np.array([unread[numbers[0]] for numbers in texts], np.int32)
        return _Group(texts, *self._sampler.sample(read, cache, uniform, self._rule))

    def _keep(self, groups: list[_Group]) -> None:
        """Leave the texts that have ended, and join the caches of the others."""
        if not self._sampler.joins_caches:  # texts that have ended stay until all have
            self._cache = groups[0].cache
            if not any(text.left for text in self.texts):
                self.texts, self._cache = [], None
            return
        kept, rows, first = [], [], 0
        for group in groups:
            for row, numbers in enumerate(group.texts):
                going = [self.texts[number] for number in numbers if self.texts[number].left]
                kept += going
                rows += [first + row] * len(going)
            first += len(group.texts)
        self.texts = kept
        self._cache = groups[0].cache
        if rows and (len(groups) > 1 or rows != list(range(first))):
            self._cache = self._sampler.join([group.cache for group in groups], np.array(rows))
