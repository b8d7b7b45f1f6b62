"""Language modelling: predict every next token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.data import mixture, sampler
from hvdlm.data.mixture import Corpus
from hvdlm.data.token_files import require_length
from hvdlm.errors import HvdlmError, RankError
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch


def loss_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Return val_loss (nats per token) and perplexity."""
    loss = sums["loss"] / sums["tokens"]
    return {"val_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


class LanguageModel:
    """The task ``language_model``: its corpus open, its tokenizer ready."""

    reads = ()

    def __init__(self, config: Config) -> None:
        self._config = config
        self._corpora = mixture.open_corpora(config.data)
        self.data = self._corpora[0].data
        self.tokenizer = self.data.tokenizer
        self.vocab = self.tokenizer.vocab
        self.fingerprint = mixture.fingerprint(self._corpora)
        for corpus in self._corpora:
            self._check(corpus)
        self._sampler = self._make_sampler()

    def _check(self, corpus: Corpus) -> None:
        """Check that a corpus holds one window at least to learn from, and a token to predict in validation."""
        called = f"data.mixture {corpus.name}: " if corpus.name else ""
        require_length(corpus.data.train, self._config.data.context, f"{called}the training")
        if len(corpus.data.validation) < 2:
            raise HvdlmError(
                f"{called}the validation split has {len(corpus.data.validation)} tokens, 2 are needed: give more "
                "text, a larger --data.validation_share or a --data.validation_path."
            )

    def _make_sampler(self) -> sampler.ShuffledSampler | sampler.MixtureSampler | sampler.SequentialSampler:
        data, train = self._config.data, self._config.train
        if data.mixture is not None:
            parts = [(corpus.data.train, corpus.share) for corpus in self._corpora]
            return sampler.MixtureSampler(parts, data.context, train.batch_size, train.seed)
        if data.sampling == "shuffled":
            return sampler.ShuffledSampler(self.data.train, data.context, train.batch_size, train.seed)
        require_length(self.data.train, data.context * train.batch_size, "the training")
        return sampler.SequentialSampler(self.data.train, data.context, train.batch_size)

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``."""
        inputs, targets, reset = self._sampler.rows(number, first, last)
        highest = max(int(inputs.max()), int(targets.max()))
        if highest >= self.vocab:  # when it was opened, a large folder was looked at here and there
            folders = ", ".join(str(corpus.data.folder) for corpus in self._corpora)
            raise RankError(
                f"{folders} holds the id {highest}, its vocabulary has {self.vocab} entries: prepare it anew."
            )
        return Batch(inputs, targets, None, reset)

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield ``rank``'s share of the validation split, of each corpus of a mixture after the other."""
        data, train = self._config.data, self._config.train
        for corpus in self._corpora:
            tokens = corpus.data.validation
            if data.sampling == "shuffled":
                pieces = sampler.independent_windows(tokens, data.context, train.eval_batch_size, rank, size)
            else:
                pieces = sampler.parallel_streams(tokens, data.context, train.batch_size, rank, size)
            for inputs, targets, weights, reset in pieces:
                yield Batch(inputs, targets, weights, reset, corpus=corpus.name)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return nothing: the loss says all."""
        return {}

    def respond(self, trainable: Trainable, prompt: str) -> None:
        """Return None: the prompt is gone on with."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss (nats per token), perplexity, and bits_per_byte (of the UTF-8 text).

        Of a mixture, val_loss is what is to be expected of a token of the mixture: the mean of the corpora's losses by
        their shares. ``val_loss/CORPUS`` is each corpus' own.
        """
        said = [(corpus, f"{corpus.name}/" if corpus.name else "") for corpus in self._corpora]
        losses = {corpus.name: sums[f"{of}loss"] / sums[f"{of}tokens"] for corpus, of in said}
        loss = math.fsum(corpus.share * losses[corpus.name] for corpus in self._corpora)
        figures = loss_figures({"loss": loss, "tokens": 1.0})
        if all(corpus.data.validation_bytes for corpus in self._corpora):
            held = [
                (corpus.share, corpus.data.validation_bytes, len(corpus.data.validation)) for corpus in self._corpora
            ]
            figures["bits_per_byte"] = loss / math.log(2) / math.fsum(share * size / n for share, size, n in held)
        return figures | {f"val_loss/{name}": found for name, found in losses.items() if name}


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> LanguageModel | None:
    """Answer to ``language_model``."""
    return LanguageModel(config) if name == "language_model" else None
