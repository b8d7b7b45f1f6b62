"""The model of a run, as lm_eval asks for one (``lm_eval.api.model.LM``)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from hvdlm.diagnostics.phases import process
from hvdlm.errors import HvdlmError
from hvdlm.io.text_decoding import without_surrogates
from hvdlm.io.untrusted_input import shown
from hvdlm.protocols.inference import SamplingRule
from hvdlm.training.run import Run
from hvdlm_inference.decoding import Text, decode
from hvdlm_inference.generation import BATCH_SIZE, Detokenizer
from hvdlm_inference.sampling import Sampling
from hvdlm_language.likelihood import end_logs

Item = TypeVar("Item")

UNLIMITED = 2048
"""Tokens of a window of a model without a longest context (recurrent models): what lm_eval takes by default."""

_GENERATED = 256  # tokens of an answer where the task doesn't say, as in lm_eval's own models
_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # what tasks call the most tokens


class RunLM(TemplateLM):
    """Answers lm_eval's requests as its ``HFLM`` does with the exported model; every rank holds the whole model.

    All ranks make the same requests, divide them, and get all answers: to lm_eval, each is the only one.
    """

    def __init__(self, run: Run) -> None:
        super().__init__()
        self._run = run
        self._vocab = run.spec.settings.vocab
        tokenizer: Any = run.task.tokenizer  # a plugin's may add no tokens
        self._prefix = tuple(getattr(tokenizer, "prefix", ()))
        self._stop_tokens = {*(run.config.model.stop_tokens or ()), *getattr(tokenizer, "suffix", ())}

    @property
    def max_length(self) -> int:
        """The tokens that the model reads at most."""
        context: int = getattr(self._run.spec.settings, "context", UNLIMITED)
        return context

    @property
    def eot_token_id(self) -> int:
        """The token that ends texts."""
        return min(self._stop_tokens, default=self.prefix_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token before a text: BOS or EOS where the tokenizer adds or the model has one, else data.separator's.

        Raises:
            HvdlmError: there is none.
        """
        tokenizer, separator = self._run.task.tokenizer, self._run.config.data.separator
        for ids in (self._prefix, sorted(self._stop_tokens), tokenizer.encode(without_surrogates(separator))):
            if len(ids):
                return int(ids[-1])
        raise HvdlmError("the tokenizer has no token that begins or separates texts: train with a data.separator.")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the ids of a text; ``add_special_tokens``: whether it begins with BOS; None: as the run's texts do.

        Raises:
            HvdlmError: the vocabulary lacks a character, or the model a token.
        """
        tokenizer, text = self._run.task.tokenizer, without_surrogates(string)
        begin = self._run.config.data.add_special_tokens if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and self._prefix and text.startswith(tokenizer.decode(self._prefix)):
            begin = False
        ids = tokenizer.within_budget(len(text), lambda: tokenizer.encode_prompt(text, begin))
        if len(ids) and ids.max() >= self._vocab:
            token = shown(tokenizer.decode([int(ids.max())]))
            raise HvdlmError(f"a text of the task has the token {token}, for which the model has no embedding.")
        return [int(number) for number in ids]

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of every text, each token given up to ``max_length`` tokens before it."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners = []
        for owner, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                windows.append((None, *make_disjoint_window(window)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (log, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += log
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Return the log-probability of every (key, context, continuation)'s continuation, and whether it is greedy.

        As in ``HFLM``, what is longer than the model's context loses tokens at its beginning.
        """
        for _key, _context, continuation in requests:
            if len(continuation) > self.max_length:
                raise HvdlmError(
                    f"a continuation of the task has {len(continuation)} tokens, more than the model's context of "
                    f"{self.max_length}: leave the task out."
                )
        answers = [(float(log), bool(greedy)) for log, greedy in self._divided(self._scored, requests)]
        for (key, _context, _continuation), answer in zip(requests, answers, strict=True):
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, answer)
        return answers

    def _scored(self, requests: Sequence[tuple[Any, list[int], list[int]]]) -> list[Any]:
        length = self.max_length + 1
        rows = [np.array((context + continuation)[-length:], np.int32) for _, context, continuation in requests]
        counts = [len(continuation) for _, _, continuation in requests]
        logs, greedy = end_logs(self._run.trainable, rows, counts, self.max_length, self._vocab)
        return [[log, is_greedy] for log, is_greedy in zip(logs.tolist(), greedy.tolist(), strict=True)]

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return a continuation of every text, up to one of the task's stop sequences or the end of the text."""
        items = [(number, *request.args) for number, request in enumerate(requests)]
        answers = self._divided(self._generated, items)
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, answer)
        return answers

    def _generated(self, items: Sequence[tuple[int, str, Mapping[str, Any]]]) -> list[Any]:
        """Return the answers to (number, text, options); those with the same options are computed together."""
        answers = [self._answer(*item) for item in items]
        by_rule: dict[SamplingRule, list[_Answer]] = {}
        for answer in answers:
            by_rule.setdefault(answer.rule, []).append(answer)
        for rule, alike in by_rule.items():
            alike.sort(key=lambda answer: answer.length)
            for start in range(0, len(alike), BATCH_SIZE):
                batch = alike[start : start + BATCH_SIZE]
                texts = [answer.text for answer in batch]
                for _ in decode(self._run.trainable, texts, self.max_length, rule, BATCH_SIZE, self._stop_tokens):
                    process.alive()
                    for answer in batch:
                        answer.read()
        return [answer.whole() for answer in answers]

    def _answer(self, number: int, text: str, options: Mapping[str, Any]) -> _Answer:
        count = next((int(options[name]) for name in _LIMITS if options.get(name)), _GENERATED)
        prompt = self.tok_encode(text) or [self.prefix_token_id]
        room = self.max_length - count  # as in HFLM, the text loses its beginning, so that the answer fits
        prompt = prompt[-room:] if room > 0 else prompt
        return _Answer(self._run.task.tokenizer, prompt, count, options, number, self._stop_tokens)

    def _divided(self, compute: Callable[[Sequence[Item]], list[Any]], items: Sequence[Item]) -> list[Any]:
        """Return the results of all items, of which every rank computes some. All ranks call."""
        world, results = self._run.world, [None] * len(items)
        for rank, own in enumerate(world.gather_objects(compute(items[world.rank :: world.size]))):
            results[rank :: world.size] = own
        return results


class _Answer:
    """A text that is generated up to a stop sequence.

    Attributes:
        text: its tokens.
        length: tokens of the prompt.
        rule: how tokens are chosen.
    """

    def __init__(
        self,
        tokenizer: Any,
        prompt: list[int],
        count: int,
        options: Mapping[str, Any],
        seed: int,
        stop_tokens: set[int],
    ) -> None:
        until = options.get("until") or []
        self._until = [term for term in ([until] if isinstance(until, str) else until) if term]
        temperature = float(options.get("temperature") or 0.0)
        if options.get("do_sample", temperature > 0):
            top_k, top_p = int(options.get("top_k") or 0), float(options.get("top_p") or 1.0)
            self.rule = Sampling(temperature or 1.0, top_k, top_p).rule(tokenizer.vocab)
        else:
            self.rule = Sampling(0.0).rule(tokenizer.vocab)
        self.text = Text(np.array(prompt, np.int32), count, seed)
        self.length = len(prompt)
        self._detokenizer = Detokenizer(tokenizer, prompt)
        self._stop_tokens = stop_tokens
        self._answer = ""
        self._read = 0

    def read(self) -> None:
        """Read the tokens that were generated since the last call, and end the text at a stop sequence."""
        new = self.text.generated[self._read :]
        self._read += len(new)
        self._answer += "".join(self._detokenizer.add(token) for token in new if token not in self._stop_tokens)
        if new and any(term in self._answer for term in self._until):
            self.text.left = 0

    def whole(self) -> str:
        """Return the text before the first stop sequence."""
        answer = self._answer + self._detokenizer.end()
        return min((answer.split(term)[0] for term in self._until), key=len, default=answer)
