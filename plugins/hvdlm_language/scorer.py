"""Scores texts with a trained language model, beside the model that a run trains.

Every rank holds the whole language model and scores without communication, in the run's framework, whichever framework
trained it.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from hvdlm import plugins
from hvdlm.checkpoints import discovery
from hvdlm.checkpoints.load import Checkpoint, read_state
from hvdlm.config import Config
from hvdlm.data import tokenizers
from hvdlm.data.tokenizer_base import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.trainable import Trainable
from hvdlm_language.likelihood import sequence_logs
from hvdlm_language.rebuild_spec import spec_of

_SEPARATOR = "\n"  # stands before and after a text in the language model's corpus


class Scorer(Protocol):
    """A trained language model that scores texts for the task in training, on every rank without communication.

    ``fingerprint``: identifies the model, for the task's own fingerprint.
    """

    fingerprint: str

    def logs(self, texts: Sequence[str]) -> np.ndarray:
        """Return the log-probability of each text as a whole line, its end included: float64 ``[texts]``, in nats.

        The first call builds the model: ranks have to be connected.
        """


class RunScorer:
    """The language model of a run, as a ``Scorer``; built at the first call.

    A text is scored as a line of a corpus: given the line end before it, and including the line end after it.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, checkpoint: Checkpoint, config: Config) -> None:
        self._tokenizer = tokenizer
        self._spec = spec
        self._checkpoint = checkpoint
        self._config = config
        hashes = sorted(file["sha256"] for file in checkpoint.manifest["files"].values())
        self.fingerprint = f"{tokenizer.hash} {hashes}"

    def logs(self, texts: Sequence[str]) -> np.ndarray:
        """Return the log-probability of every text and its line end in nats, float64 ``[texts]``."""
        begin = self._tokenizer.encode(_SEPARATOR)
        ids = self._tokenizer.within_budget(
            sum(map(len, texts)),
            lambda: [self._tokenizer.encode(text + _SEPARATOR) for text in texts],
        )
        rows = [np.concatenate([begin, row]) for row in ids]
        settings = self._spec.settings
        context = getattr(settings, "context", sys.maxsize)  # unlimited in recurrent models
        return sequence_logs(self._trainable, rows, len(begin), context, settings.vocab)

    @functools.cached_property
    def _trainable(self) -> Trainable:
        """The model on this rank, without other ranks."""
        run = self._config
        config = Config(framework=run.framework, backend="local")
        config.train.threads = run.train.threads
        # It isn't trained: SGD has no optimizer state, and compiling would not pay off.
        config.train.optimizer = "sgd"
        config.train.precision, config.train.compile = "fp32", False
        manager = plugins.load([run.framework, "local", config.communication.exchange, *run.plugins])
        framework = plugins.make(manager, "framework", run.framework)
        world = plugins.make(manager, "backend", "local").start(framework, [(0,)], config)
        exchange = plugins.make_exchange(manager, config, world, world.group((0,)))
        trainable = framework.build(self._spec, make_mesh(1, config.parallel), world, exchange, config)
        parameters = {name: shard for name, shard in trainable.shards().items() if name.startswith("parameters/")}
        state = read_state(self._checkpoint, parameters, 0, 1)
        trainable.load_state({name: state[name] for name in parameters})
        return trainable


def open_scorer(key: str, folder: str, characters: str, config: Config) -> RunScorer:
    """Return the scorer of a run of a language model; nothing is computed yet.

    Args:
        key: the option that names the folder.
        folder: the run.
        characters: those of all texts that will be scored.
        config: of the run that uses the scorer.

    Raises:
        HvdlmError: there is no language model, or its vocabulary lacks some of these characters.
    """
    try:
        return _open(Path(folder), characters, config)
    except HvdlmError as error:
        raise HvdlmError(f"{key} {folder}: {error}") from error


def _open(run: Path, characters: str, config: Config) -> RunScorer:
    tokenizer = _read_tokenizer(run / "tokenizer.json")
    latest = discovery.find(run, "auto", warn=False)
    if latest is None:
        raise HvdlmError("it holds no checkpoint yet: train it first, or name another run.")
    if latest.manifest.get("tokenizer") != tokenizer.hash:
        raise HvdlmError("its checkpoint was trained with another tokenizer than its tokenizer.json: train it again.")
    spec = spec_of(latest, plugin_names=config.plugins)
    if spec.reads:
        raise HvdlmError(f"its model {spec.kind} reads more than text: name the run of a gpt or a recurrent model.")
    tokenizer.encode(characters)
    if not len(tokenizer.encode(_SEPARATOR)):
        raise HvdlmError("its tokenizer drops line ends, which separate texts: train with another tokenizer.")
    return RunScorer(tokenizer, spec, latest, config)


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise HvdlmError("it holds no run (no tokenizer.json): name the folder that was given as --log.run.")
    try:
        return tokenizers.read(path)
    except (OSError, ValueError) as error:
        raise HvdlmError(f"its tokenizer.json can't be read ({error}): train it again.") from error
