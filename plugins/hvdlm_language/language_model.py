"""Language modelling: predict the next token."""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping

import numpy as np

from hvdlm import hookimpl
from hvdlm.config import Config, DataConfig
from hvdlm.data import corpora
from hvdlm.data.corpora import Corpus
from hvdlm.data.documents import Documents
from hvdlm.data.token_files import Tokens, highest
from hvdlm.data.tokenizer_base import Tokenizer, spells_special
from hvdlm.errors import HvdlmError, RankError
from hvdlm.io import launcher_env
from hvdlm.io.terminal import printable
from hvdlm.io.text_decoding import without_surrogates
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch
from hvdlm_language import sampler
from hvdlm_language.document_rows import DocumentRows
from hvdlm_language.sampler import TokenBatch


def loss_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Return val_loss (nats per token) and perplexity of summed losses."""
    loss = _mean(sums, "")
    return {"val_loss": loss, "perplexity": math.inf if loss >= 700 else math.exp(loss)}


def _mean(sums: Mapping[str, float], prefix: str, name: str = "loss") -> float:
    """Return the mean over a corpus's targets of what is summed; NaN where none of the evaluated tokens is a target."""
    tokens = sums[f"{prefix}tokens"]
    return sums[f"{prefix}{name}"] / tokens if tokens else math.nan


class LanguageModel:
    """The task ``language_model``, over one corpus or a mixture."""

    reads = ()

    def __init__(self, config: Config) -> None:
        self._config = config
        self._corpora = corpora.open_corpora(config)
        self.fingerprint = corpora.fingerprint(self._corpora)
        self.data = self._corpora[0].data
        self.tokenizer = self.data.tokenizer
        self.vocab = self._vocab()
        for corpus in self._corpora:
            self._check(corpus)
        self._rows = [self._split_rows(corpus) for corpus in self._corpora]
        self._masks = [self._masked(corpus) for corpus in self._corpora]
        self._sampler = self._make_sampler()
        marked = any(corpus.data.train_targets is not None for corpus in self._corpora)
        self.row_tokens = config.data.context if config.data.rows != "documents" and not marked else None
        self.epoch_rows = None if isinstance(self._sampler, sampler.MixtureSampler) else self._sampler.epoch_rows

    def _vocab(self) -> int:
        """Return the tokenizer's number of ids, or that of the model's embedding if it lacks only unused tokens."""
        rows = self._config.model.vocab
        if rows is None:
            return self.tokenizer.vocab
        return min(self.tokenizer.vocab, max(rows, _required_ids(self.tokenizer, self._config.data)))

    def _check(self, corpus: Corpus) -> None:
        """Check that a corpus holds at least one training window and one validation target, and only known ids."""
        if self.vocab < self.tokenizer.vocab:
            for tokens in (corpus.data.train, corpus.data.validation):
                self._check_ids(highest(tokens), HvdlmError)
        prefix = f"data.mixture {corpus.name}: " if corpus.name else ""
        shortest = 1 if self._by_documents else self._config.data.context
        _require_length(corpus.data.train, shortest, f"{prefix}the training")
        if len(corpus.data.validation) < 2:
            raise HvdlmError(
                f"{prefix}the validation split has {len(corpus.data.validation)} tokens, 2 are needed: give more "
                "text, a larger --data.validation_share or a --data.validation_path."
            )

        for split, targets in (("training", corpus.data.train_targets), ("validation", corpus.data.validation_targets)):
            if targets is not None and highest(targets) < 1:
                raise HvdlmError(
                    f"{prefix}the {split} split of {corpus.data.folder} has no targets: check data.chat or "
                    "data.prompt, or give more conversations."
                )

    @property
    def _by_documents(self) -> bool:
        return self._config.data.rows == "documents"

    def _split_rows(self, corpus: Corpus) -> tuple[DocumentRows, DocumentRows] | None:
        """Return the rows of a corpus's training and validation split that begin with documents; None: windows."""
        if not self._by_documents:
            return None
        data, context = corpus.data, self._config.data.context
        if data.train_documents is None or data.validation_documents is None:
            raise HvdlmError(
                f"data.rows documents: {data.folder} has no index of documents: prepare the texts with --data.rows "
                "documents, or use --data.rows windows."
            )
        try:
            rows = DocumentRows(data.train_documents, len(data.train), context)
            held_out = DocumentRows(data.validation_documents, len(data.validation), context)
        except (RankError, HvdlmError) as error:
            raise HvdlmError(f"data.rows documents: {data.folder}: {error}") from error
        if data.train_targets is not None and rows.longer and launcher_env.rank_for_messages() == 0:
            what = (
                f"{rows.longer:,} of {len(data.train_documents):,} documents to train on are longer than data.context"
            )
            text = f"hvdlm: {data.folder}: {what} {context}: they continue in further rows, without what is before"
            print(printable(text), file=sys.stderr, flush=True)
        return rows, held_out

    def _masked(self, corpus: Corpus) -> tuple[Documents | None, Documents | None]:
        """Return the documents that rows of a corpus's training and validation split are divided into."""
        data = corpus.data
        if not self._config.data.document_masks:
            return None, None
        if data.train_documents is None or data.validation_documents is None:
            raise HvdlmError(
                f"data.document_masks: {data.folder} has no index of documents: prepare the texts with "
                "--data.document_masks true, give token files with an index (Megatron's .idx), or leave it false."
            )
        return data.train_documents, data.validation_documents

    def _make_sampler(self) -> sampler.ShuffledSampler | sampler.MixtureSampler | sampler.SequentialSampler:
        data, train = self._config.data, self._config.train
        rows = [rows[0] for rows in self._rows if rows is not None]
        masked = [documents for documents, _ in self._masks if documents is not None]
        sizes = data.context, train.batch_size, train.seed
        if data.mixture is not None:
            shares = [(corpus.data.train, corpus.share) for corpus in self._corpora]
            targets = [corpus.data.train_targets for corpus in self._corpora]
            return sampler.MixtureSampler(shares, *sizes, rows or None, masked or None, targets)
        if data.sampling == "shuffled":
            marks = self._masks[0][0], self.data.train_targets
            return sampler.ShuffledSampler(self.data.train, *sizes, (), rows[0] if rows else None, *marks)
        if self.data.train_targets is not None:
            raise HvdlmError(
                f"data.sampling sequential: some tokens of {self.data.folder} are no targets, and streams are "
                "trained on all: use --data.sampling shuffled."
            )
        _require_length(self.data.train, data.context * train.batch_size, "the training")
        return sampler.SequentialSampler(self.data.train, data.context, train.batch_size)

    def rows(self, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of the global order."""
        rows = self._sampler.rows(first, last)
        # A large folder is only spot-checked when it is opened. An id of 2^31 or more has become negative.
        self._check_ids(max(int(ids.view(np.uint32).max()) for ids in rows[:2]), RankError)
        return _batch(rows)

    def _check_ids(self, number: int, error: type[Exception]) -> None:
        if number >= self.vocab:
            folders = ", ".join(str(corpus.data.folder) for corpus in self._corpora)
            raise error(
                f"{folders} holds the id {number}, the model has {self.vocab} ids: prepare it again, or give the "
                "tokenizer that encoded it."
            )

    def validation(self, rank: int, size: int, limit: int | None = None) -> Iterator[Batch]:
        """Yield ``rank``'s part of the validation split, of the corpora of a mixture one after the other.

        They divide the ``limit`` by their shares.
        """
        data, train = self._config.data, self._config.train
        for corpus, rows, (_, masked) in zip(self._corpora, self._rows, self._masks, strict=True):
            tokens = corpus.data.validation
            own = None if limit is None else math.ceil(limit * corpus.share)
            sizes = data.context, train.eval_batch_size, rank, size, own
            marks = masked, corpus.data.validation_targets
            if rows is not None:
                windows = sampler.document_rows(tokens, rows[1], *sizes, *marks)
            elif data.sampling == "shuffled":
                windows = sampler.independent_windows(tokens, *sizes, *marks)
            else:
                windows = sampler.parallel_streams(tokens, data.context, train.batch_size, rank, size, own)
            yield from (_batch(window, corpus.name) for window in windows)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return no further sums beside the loss."""
        return {}

    def respond(self, trainable: Trainable, prompt: str) -> None:
        """Return None: the prompt is continued by ``inference.generation``."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss (nats per token), perplexity, bits_per_byte (of the UTF-8 text), and token_accuracy.

        The latter is the share of targets of which no other token has a higher score; it is left out where the
        framework doesn't count them. Of a mixture, val_loss and token_accuracy are means of the corpora's weighted by
        their shares, and ``val_loss/CORPUS`` and ``token_accuracy/CORPUS`` those of one corpus.
        """
        prefixes = [(corpus, f"{corpus.name}/" if corpus.name else "") for corpus in self._corpora]
        losses = {corpus.name: _mean(sums, prefix) for corpus, prefix in prefixes}
        loss = math.fsum(corpus.share * losses[corpus.name] for corpus in self._corpora)
        figures = loss_figures({"loss": loss, "tokens": 1.0})
        if all(corpus.data.validation_bytes for corpus in self._corpora):
            bytes_per_token = math.fsum(
                corpus.share * corpus.data.validation_bytes / len(corpus.data.validation) for corpus in self._corpora
            )
            figures["bits_per_byte"] = loss / math.log(2) / bytes_per_token
        accuracies: dict[str, float] = {}
        if all(f"{prefix}predicted" in sums for _, prefix in prefixes):
            accuracies = {corpus.name: _mean(sums, prefix, "predicted") for corpus, prefix in prefixes}
            figures["token_accuracy"] = math.fsum(corpus.share * accuracies[corpus.name] for corpus in self._corpora)
        figures |= {f"val_loss/{name}": value for name, value in losses.items() if name}
        return figures | {f"token_accuracy/{name}": value for name, value in accuracies.items() if name}


def _batch(rows: TokenBatch, corpus: str = "") -> Batch:
    return Batch(*rows[:4], corpus=corpus, document_starts=rows.document_starts)


def _require_length(tokens: Tokens, context: int, split: str) -> None:
    """Check that a split holds at least one window."""
    if len(tokens) < context + 1:
        raise HvdlmError(
            f"{split} split has {len(tokens)} tokens, fewer than data.context + 1 = {context + 1}: "
            "give more text or a smaller --data.context."
        )


def _required_ids(tokenizer: Tokenizer, data: DataConfig) -> int:
    """Return how many ids a model needs for all texts: special tokens that don't occur in them need no embedding."""
    if not data.split_special_tokens:
        return tokenizer.vocab
    added = [*tokenizer.prefix, *tokenizer.suffix] if data.add_special_tokens else []
    separator = without_surrogates(data.separator)
    if spells_special(tokenizer, separator):
        added += tokenizer.encode(separator, special=True).tolist()
    return max(tokenizer.text_vocab, 1 + max(added, default=-1))


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> LanguageModel | None:
    """Return the task ``language_model``."""
    return LanguageModel(config) if name == "language_model" else None
