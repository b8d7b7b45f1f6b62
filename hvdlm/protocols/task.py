"""Tasks: they define the batches, the loss and the metrics of a run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Protocol

from hvdlm.protocols.tokenizer import Tokenizer
from hvdlm.protocols.trainable import Trainable
from hvdlm.protocols.types import Batch


class Task(Protocol):
    """Provides batches and metrics.

    ``vocab``: ids are below it. ``fingerprint``: identifies the data, the same on all ranks that have the same data.
    ``reads``: the names of its batches' features, those of ``ModelSpec.reads``. A task may have two more attributes:
    ``epoch_rows``, the rows of a pass over its training data, by which ``train.epochs`` counts, and ``row_tokens``, the
    targets of every row, by which ``train.tokens`` does; None where a run of it has none.
    """

    vocab: int
    fingerprint: str
    reads: tuple[str, ...]

    @property
    def tokenizer(self) -> Tokenizer:
        """Turns text into ids below ``vocab``."""

    def rows(self, first: int, last: int) -> Batch:
        """Return rows ``first:last`` of the endless global order of training rows, which depends on the seed alone.

        A step reads the next ``train.batch_size`` rows, each data rank a contiguous range of them. A run that was
        resumed with another batch size may read rows of two of its batches.

        Called in a thread of its own (``data.prefetch``) while other methods may run, and never twice at a time; the
        arrays aren't changed by later calls. Not in a thread where the task has ``rows_in_thread = False``.
        """

    def validation(self, rank: int, size: int) -> Iterator[Batch]:
        """Yield the shard of the validation split of ``rank`` of ``size`` data ranks, in a fixed order.

        Ranks may get different numbers of batches: nothing in evaluation communicates per batch. A task for which
        ``train.eval_tokens`` may be set has a third parameter, ``limit``: the number of targets that all ranks together
        evaluate, about, spread over the split; None: all.
        """

    def count(self, trainable: Trainable, batch: Batch) -> dict[str, float]:
        """Return figures of a validation batch in addition to its loss; their sums are passed to ``metrics``."""

    def metrics(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Return named figures (``val_loss``, ``perplexity``, ...) from sums over all batches and ranks.

        ``sums``: ``loss`` (nats), ``tokens``, of a Trainable that is ``CountsCorrect`` ``predicted`` (how many of the
        tokens the model predicts), and what ``count`` returned.
        """

    def respond(self, trainable: Trainable, prompt: str) -> str | None:
        """Return the task's output for ``prompt``, such as a translation; None: the prompt is continued token by token.

        All ranks that hold a copy of the model call.
        """
