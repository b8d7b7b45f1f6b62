"""Machine translation: a sentence of one language from that of another."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
from hvdlm_tasks.beam import beam_search
from hvdlm_tasks.items import ShuffledItems, dealt, up_to
from hvdlm_tasks.models.seq2seq import READS
from hvdlm_tasks.pairs import Sentences, Texts, padded, read_texts

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.data import tokenizers
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm.tasks.language_model import loss_figures

_STEP = 8  # tokens by which batches differ in length
_EXTRA = 50  # tokens by which a translation may be longer than its source (Vaswani et al. 2017, section 6.1)


@dataclass
class TranslationOptions:
    """Translating.

    Args:
        beams: translations of a sentence that are followed at once when it is translated; 1: the likeliest token each
        length_penalty: power of the length penalty (Wu et al. 2016, eq. 14); 0: none
        bleu: translate the validation text in every evaluation, and compare (BLEU by sacrebleu)
    """

    beams: int = 5
    length_penalty: float = 0.6
    bleu: bool = True


class Translation:
    """The task ``translation``: ``data.path`` is the source and the target, line by line; one vocabulary serves both.

    Sentences are cut at ``data.context`` tokens. Two ids follow the tokenizer's: the beginning and the end.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._options = config.own("translation", TranslationOptions)
        train = read_texts(config.data.paths, "data.path")
        held = read_texts(config.data.validation_paths, "data.validation_path")
        tokenizers.check(config.data.tokenizer)
        text = (f"{line}\n" for line in chain(train.source, train.target))
        self.tokenizer = tokenizers.train(config.data.tokenizer, config.data.vocab_size, text)
        self._begin, self._end = self.tokenizer.vocab, self.tokenizer.vocab + 1
        self.vocab, self.reads = self.tokenizer.vocab + 2, READS
        self.fingerprint = hashlib.sha256((train.digest + held.digest).encode()).hexdigest()
        self._train, self._held, self._references = self._ids(train), self._ids(held), held.target
        lengths = np.maximum(self._train[0].lengths, self._train[1].lengths)
        self._items = ShuffledItems(len(lengths), config.train.batch_size, config.train.seed, lengths)
        self._bleu = _sacrebleu() if self._options.bleu else None

    def _ids(self, texts: Texts) -> tuple[Sentences, Sentences]:
        source, target = (Sentences(self.tokenizer, lines, self._config.data.context - 1) for lines in texts)
        return source, target

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``."""
        items, whole = self._items.rows(number, first, last)
        return self._of(self._train, items, whole)

    def _of(self, pairs: tuple[Sentences, Sentences], items: np.ndarray, whole: np.ndarray) -> Batch:
        """Return the pairs ``items``, as long as the longest of ``whole``."""
        source, target = pairs
        longest = max(int(side.lengths[whole].max()) for side in pairs)
        time = up_to(longest + 1, _STEP)
        read, counted = padded([np.append(source[i], self._end) for i in items], time)
        targets, weights = padded([np.append(target[i], self._end) for i in items], time)
        inputs, _ = padded([np.insert(target[i], 0, self._begin) for i in items], time)
        lengths = counted.sum(1).astype(np.int32)
        features = {"source": read, "source_length": lengths}
        return Batch(inputs, targets, weights, True, features, items)

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield ``rank``'s share of the validation pairs, those of like length together."""
        order = np.argsort(self._held[0].lengths, kind="stable")
        for items in dealt(order, rank, size, self._config.train.eval_batch_size):
            yield self._of(self._held, items, items)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return what BLEU (Papineni et al. 2002) adds up: n-grams found, n-grams written, and lengths."""
        if self._bleu is None or batch.items is None:
            return {}
        said = [self.tokenizer.decode(ids) for ids in self._translate(trainable, batch)]
        found = self._bleu.corpus_score(said, [[self._references[i] for i in batch.items]])
        sums = {f"right.{n}": float(count) for n, count in enumerate(found.counts)}
        sums |= {f"total.{n}": float(count) for n, count in enumerate(found.totals)}
        return {**sums, "said": float(found.sys_len), "wanted": float(found.ref_len)}

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss, perplexity, and bleu (0 to 100; sacrebleu's own tokenization, case counts)."""
        figures = loss_figures(sums)
        if self._bleu is not None:
            right, total = ([int(sums[f"{kind}.{n}"]) for n in range(4)] for kind in ("right", "total"))
            lengths = {"sys_len": int(sums["said"]), "ref_len": int(sums["wanted"])}
            figures["bleu"] = self._bleu.compute_bleu(right, total, **lengths, smooth_method="exp").score
        return figures

    def respond(self, trainable: Trainable, prompt: str) -> str:
        """Return the translation of every line of ``prompt``."""
        lines = prompt.splitlines() or [""]
        sentences, said = Sentences(self.tokenizer, lines, self._config.data.context - 1), []
        for items in dealt(np.arange(len(lines)), 0, 1, self._config.train.eval_batch_size):
            batch = self._of((sentences, sentences), items, items)
            said += [self.tokenizer.decode(ids) for ids in self._translate(trainable, batch)]
        return "\n".join(said)

    def _translate(self, trainable: Trainable, batch: Batch) -> list[list[int]]:
        most = [int(length) + _EXTRA for length in batch.features["source_length"]]
        o = self._options
        found = beam_search(trainable, batch, o.beams, most, (self._begin, self._end), o.length_penalty)
        return [[token for token in ids if token < self._begin] for ids in found]


def _sacrebleu() -> Any:
    try:
        from sacrebleu.metrics import BLEU
    except ImportError as error:
        raise HvdlmError(
            "the task translation compares by sacrebleu: pip install sacrebleu, or --translation.bleu false."
        ) from error
    return BLEU()


@hookimpl
def hvdlm_options() -> Mapping[str, type]:
    """Bring ``--translation.beams`` and its like."""
    return {"translation": TranslationOptions}


@hookimpl
def hvdlm_check(config: Config, spec: ModelSpec) -> None:
    """Refuse what can't translate, and figures out of their range."""
    if config.task != "translation":
        return
    options = config.own("translation", TranslationOptions)
    if options.beams < 1 or options.length_penalty < 0:
        raise HvdlmError("translation.beams is 1 or more, translation.length_penalty 0 or more.")


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> Translation | None:
    """Answer to ``translation``."""
    return Translation(config) if name == "translation" else None
