"""Template of a task: a language model learns to add; its metric is the share of sums that are right.

Copy this folder and rename template_task everywhere. A task is numpy alone: frameworks, ranks and checkpoints are
hvdlm's. A row is ``ab+cd=efg;``, of which the characters after ``=`` are targets.
"""

import hashlib
from dataclasses import dataclass

import numpy as np

from hvdlm import hookimpl
from hvdlm.errors import HvdlmError
from hvdlm.parallel.mesh import bounds
from hvdlm.protocols.types import Batch
from hvdlm_corpora.tokenizers import CharTokenizer

HELD_OUT = 7  # every 7th pair of numbers is in the validation split


@dataclass
class AdditionOptions:
    """Options of the addition task.

    Args:
        digits: number of digits of the numbers that are added
        validation_sums: number of sums in the validation split
    """

    digits: int = 2
    validation_sums: int = 256


class Addition:
    """The task ``template_task``."""

    reads = ()  # the model reads tokens only

    def __init__(self, config):
        options = config.own("template_task", AdditionOptions)
        self._seed, self._eval_rows = config.train.seed, config.train.eval_batch_size
        self._digits, self._validation = options.digits, options.validation_sums
        self.tokenizer = CharTokenizer("0123456789+=;")
        self.vocab = self.tokenizer.vocab
        # What the data depends on, but for the seed: a run is resumed only with the same.
        self.fingerprint = hashlib.sha256(f"addition {options.digits} {options.validation_sums}".encode()).hexdigest()

    def rows(self, first, last):
        """Return rows ``first:last`` of an endless order that depends on the seed alone."""
        return self._batch(np.array([self._draw(self._seed, row, False) for row in range(first, last)]))

    def validation(self, rank, size):
        """Yield this rank's sums of the validation split, which are the same for every seed."""
        first, last = bounds(self._validation, size, rank)
        for start in range(first, last, self._eval_rows):
            rows = range(start, min(start + self._eval_rows, last))
            yield self._batch(np.array([self._draw(0, row, True) for row in rows]))

    def count(self, trainable, batch):
        """Return the number of sums that are right, and of all; they are added up over batches and ranks."""
        right = (trainable.predict(batch).argmax(-1) == batch.targets) | (batch.weights == 0)
        return {"right": float(right.all(-1).sum()), "sums": float(len(right))}

    def metrics(self, sums):
        """Return the figures of the whole validation split."""
        return {"val_loss": sums["loss"] / sums["tokens"], "accuracy": sums["right"] / sums["sums"]}

    def respond(self, trainable, prompt):
        """Return None: the prompt, such as ``12+34=``, is continued token by token."""

    def _draw(self, seed, row, held_out):
        """Return two numbers of this row, of the validation split or of the others."""
        random = np.random.default_rng([seed, row])
        while True:
            pair = random.integers(0, 10**self._digits, 2)
            if (pair @ [3, 5] % HELD_OUT == 0) == held_out:
                return pair

    def _batch(self, pairs):
        n = self._digits
        texts = [f"{a:0{n}}+{b:0{n}}={a + b:0{n + 1}};" for a, b in pairs.tolist()]
        tokens = np.stack([self.tokenizer.encode(text) for text in texts]).astype(np.int32)
        weights = np.zeros((len(tokens), tokens.shape[1] - 1), np.float32)
        weights[:, 2 * n + 1 :] = 1.0
        return Batch(tokens[:, :-1], tokens[:, 1:], weights, reset=True)


@hookimpl
def hvdlm_options():
    """Return the options --template_task.digits and --template_task.validation_sums."""
    return {"template_task": AdditionOptions}


@hookimpl
def hvdlm_check(config):
    """Refuse settings that don't fit, before ranks connect."""
    if config.task != "template_task":
        return
    options = config.own("template_task", AdditionOptions)
    time = 3 * options.digits + 3  # a row but for its last token
    if config.data.context < time:
        raise HvdlmError(
            f"data.context {config.data.context} is shorter than a sum: set --data.context {time} or more."
        )
    if not 1 <= options.digits <= 9 or options.validation_sums < 1:
        raise HvdlmError("template_task.digits has to be 1 to 9, and validation_sums 1 or more.")


@hookimpl
def hvdlm_make_task(name, config):
    """Return the task; None for another name."""
    return Addition(config) if name == "template_task" else None
