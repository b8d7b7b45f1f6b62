"""Machine translation of sentences."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_corpora import tokenizers
from hvdlm_language.language_model import loss_figures
from hvdlm_language.padding import pad_rows, round_up
from hvdlm_tasks.beam import beam_search
from hvdlm_tasks.items import ShuffledItems, split_evenly, spread
from hvdlm_tasks.models.seq2seq import READS
from hvdlm_tasks.pairs import Sentences, Texts, read_texts

_LENGTH_MULTIPLE = 8  # tokens to a multiple of which batches are padded
_MAX_EXTRA = 50  # tokens by which a translation may be longer than its source (Vaswani et al. 2017, section 6.1)


@dataclass
class TranslationOptions:
    """Translation.

    Args:
        beams: beam width of the search for a translation; 1: greedy search
        length_penalty: exponent of the length penalty (Wu et al. 2016, eq. 14); 0: none
        bleu: translate the validation text in every evaluation and score it (BLEU, computed by sacrebleu)
    """

    beams: int = 5
    length_penalty: float = 0.6
    bleu: bool = True


class Translation:
    """The task ``translation``: ``data.path`` names a source and a target file, which share a vocabulary.

    Sentences are truncated to ``data.context`` tokens. The ids of the begin and the end token follow the tokenizer's.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._options = config.own("translation", TranslationOptions)
        train = read_texts(config.data.paths, "data.path")
        validation = read_texts(config.data.validation_paths, "data.validation_path")
        tokenizers.check(config.data.tokenizer)
        text = (f"{line}\n" for line in chain(train.source, train.target))
        self.tokenizer = tokenizers.train(config.data.tokenizer, config.data.vocab_size, text)
        self._begin = self.tokenizer.vocab
        self._end = self.tokenizer.vocab + 1
        self.vocab = self.tokenizer.vocab + 2
        self.reads = READS
        self.fingerprint = hashlib.sha256((train.digest + validation.digest).encode()).hexdigest()
        self._train = self._encode(train)
        self._validation = self._encode(validation)
        self._references = validation.target
        lengths = np.maximum(self._train[0].lengths, self._train[1].lengths)
        self._items = ShuffledItems(len(lengths), config.train.batch_size, config.train.seed, lengths)
        self.epoch_rows = self._items.count
        self._bleu = _sacrebleu() if self._options.bleu else None

    def _encode(self, texts: Texts) -> tuple[Sentences, Sentences]:
        source, target = (Sentences(self.tokenizer, lines, self._config.data.context - 1) for lines in texts)
        return source, target

    def rows(self, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of the global order."""
        items, whole = self._items.rows(first, last)
        return self._make_batch(self._train, items, whole)

    def _make_batch(self, pairs: tuple[Sentences, Sentences], items: np.ndarray, whole: np.ndarray) -> Batch:
        """Return the pairs ``items``, padded for the longest of ``whole``."""
        source, target = pairs
        longest = max(int(sentences.lengths[whole].max()) for sentences in pairs)
        time = round_up(longest + 1, _LENGTH_MULTIPLE)
        source_ids, source_weights = pad_rows([np.append(source[i], self._end) for i in items], time)
        targets, weights = pad_rows([np.append(target[i], self._end) for i in items], time)
        inputs, _ = pad_rows([np.insert(target[i], 0, self._begin) for i in items], time)
        features = {"source": source_ids, "source_length": source_weights.sum(1).astype(np.int32)}
        return Batch(inputs, targets, weights, True, features, items)

    def validation(self, rank: int, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield ``rank``'s part of the validation pairs, sorted by length."""
        order = np.argsort(self._validation[0].lengths, kind="stable")
        order = order[spread(self._validation[1].lengths[order] + 1, limit)]
        for items in split_evenly(order, rank, size, self._config.train.eval_batch_size):
            yield self._make_batch(self._validation, items, items)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return what BLEU (Papineni et al. 2002) sums: n-grams that match, n-grams in all, and lengths."""
        if self._bleu is None or batch.items is None:
            return {}
        references = [self._references[i] for i in batch.items]
        score = self._bleu.corpus_score(self._translate(trainable, batch), [references])
        sums = {f"matching.{n}": float(count) for n, count in enumerate(score.counts)}
        sums |= {f"total.{n}": float(count) for n, count in enumerate(score.totals)}
        return {**sums, "length": float(score.sys_len), "reference_length": float(score.ref_len)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss, perplexity, and bleu (0 to 100; with sacrebleu's tokenization, case-sensitive)."""
        figures = loss_figures(sums)
        if self._bleu is not None:
            matching, total = ([int(sums[f"{kind}.{n}"]) for n in range(4)] for kind in ("matching", "total"))
            lengths = {"sys_len": int(sums["length"]), "ref_len": int(sums["reference_length"])}
            figures["bleu"] = self._bleu.compute_bleu(matching, total, **lengths, smooth_method="exp").score
        return figures

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return the translation of every line of ``prompt``."""
        lines = prompt.splitlines() or [""]
        sentences = Sentences(self.tokenizer, lines, self._config.data.context - 1)
        translations: list[str] = []
        for items in split_evenly(np.arange(len(lines)), 0, 1, self._config.train.eval_batch_size):
            batch = self._make_batch((sentences, sentences), items, items)
            translations += self._translate(trainable, batch)
        return "\n".join(translations)

    def _translate(self, trainable: Trainable, batch: Batch) -> list[str]:
        max_lengths = [int(length) + _MAX_EXTRA for length in batch.features["source_length"]]
        o = self._options
        rows = beam_search(trainable, batch, o.beams, max_lengths, (self._begin, self._end), o.length_penalty)
        return [self.tokenizer.decode([token for token in ids if token < self._begin]) for ids in rows]


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise HvdlmError(
            "the task translation scores with sacrebleu: pip install sacrebleu, or --translation.bleu false."
        ) from error
    return BLEU()


@hookimpl
def hvdlm_options() -> Mapping[str, type]:
    """Return the options ``--translation.*``."""
    return {"translation": TranslationOptions}


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Check the ranges of the options."""
    if config.task != "translation":
        return
    options = config.own("translation", TranslationOptions)
    if options.beams < 1 or options.length_penalty < 0:
        raise HvdlmError("translation.beams has to be 1 or more, translation.length_penalty 0 or more.")


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> Translation | None:
    """Return the task ``translation``."""
    return Translation(config) if name == "translation" else None
