"""Language modelling: predict every next token of a text."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping

from hvdlm import hookimpl
from hvdlm.config import Config
from hvdlm.data import sampler
from hvdlm.data.preparation import prepare
from hvdlm.data.tokenfile import require_length
from hvdlm.interfaces import Batch, HvdlmError, RankError, Trainable


def loss_figures(sums: Mapping[str, float]) -> dict[str, float]:
    """Return val_loss (nats per token) and perplexity."""
    loss = sums["loss"] / sums["tokens"]
    return {"val_loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf}


class LanguageModel:
    """The task ``language_model``: its corpus open, its tokenizer ready."""

    reads = ()

    def __init__(self, config: Config) -> None:
        self._config = config
        self.data = prepare(config.data)
        self.tokenizer = self.data.tokenizer
        self.vocab = self.tokenizer.vocab
        self.fingerprint = self.data.fingerprint
        context, batch = config.data.context, config.train.batch_size
        require_length(self.data.train, context, "training")
        if len(self.data.validation) < 2:
            raise HvdlmError(
                f"the validation split has {len(self.data.validation)} tokens, 2 are needed: give more text, a larger "
                "--data.validation_share or a --data.validation_path."
            )
        self._sampler: sampler.ShuffledSampler | sampler.SequentialSampler
        if config.data.sampling == "shuffled":
            self._sampler = sampler.ShuffledSampler(self.data.train, context, batch, config.train.seed)
        else:
            require_length(self.data.train, context * batch, "training")
            self._sampler = sampler.SequentialSampler(self.data.train, context, batch)

    def batch(self, number: int, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of global batch ``number``."""
        inputs, targets, reset = self._sampler.rows(number, first, last)
        highest = max(int(inputs.max()), int(targets.max()))
        if highest >= self.vocab:  # when it was opened, a large folder was looked at here and there
            raise RankError(
                f"{self.data.folder} holds the id {highest}, its vocabulary has {self.vocab} entries: prepare it anew."
            )
        return Batch(inputs, targets, None, reset)

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield ``rank``'s share of the validation split."""
        tokens, context = self.data.validation, self._config.data.context
        if self._config.data.sampling == "shuffled":
            pieces = sampler.independent_windows(tokens, context, self._config.train.eval_batch_size, rank, size)
        else:
            pieces = sampler.parallel_streams(tokens, context, self._config.train.batch_size, rank, size)
        for piece in pieces:
            yield Batch(*piece)

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return nothing: the loss says all."""
        return {}

    def respond(self, trainable: Trainable, prompt: str) -> None:
        """Return None: the prompt is gone on with."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return val_loss (nats per token), perplexity, and bits_per_byte (of the UTF-8 text)."""
        figures = loss_figures(sums)
        loss = figures["val_loss"]
        if self.data.validation_bytes:
            per_byte = len(self.data.validation) / self.data.validation_bytes
            figures["bits_per_byte"] = loss / math.log(2) * per_byte
        return figures


@hookimpl
def hvdlm_make_task(name: str, config: Config) -> LanguageModel | None:
    """Answer to ``language_model``."""
    return LanguageModel(config) if name == "language_model" else None
