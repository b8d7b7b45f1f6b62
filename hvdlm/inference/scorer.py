"""A trained language model beside the one that a run trains: how likely it finds texts.

It is whole on every rank, computes in the run's framework whatever framework trained it, and communicates with nobody.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hvdlm import plugins
from hvdlm.checkpoints import load
from hvdlm.checkpoints.load import Checkpoint
from hvdlm.checkpoints.rebuild_spec import spec_of
from hvdlm.config import Config
from hvdlm.data import tokenizers
from hvdlm.data.tokenizers import Tokenizer
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.mesh import make_mesh
from hvdlm.protocols.task import OpenScorer
from hvdlm.protocols.trainable import Trainable
from hvdlm.tasks.likelihood import sequence_logs

_END = "\n"  # what stands before and after a text in the corpus of the language model


class RunScorer:
    """The language model of a run, as an ``interfaces.Scorer``. It is built when it is first asked.

    A text stands between two line ends, as a line of a corpus does; the second is scored, the first is not.
    """

    def __init__(self, tokenizer: Tokenizer, spec: ModelSpec, found: Checkpoint, config: Config) -> None:
        self._tokenizer, self._spec, self._found, self._config = tokenizer, spec, found, config
        self.fingerprint = f"{tokenizer.hash} {sorted(file['sha256'] for file in found.manifest['files'].values())}"

    def logs(self, texts: Sequence[str]) -> np.ndarray:
        """Return the log-probabilities of texts; see ``interfaces.Scorer``."""
        begin = self._tokenizer.encode(_END)
        rows = [np.concatenate([begin, self._tokenizer.encode(text + _END)]) for text in texts]
        settings = self._spec.settings
        context = getattr(settings, "context", sys.maxsize)  # a recurrent model has no longest
        return sequence_logs(self._trainable, rows, len(begin), context, settings.vocab)

    @functools.cached_property
    def _trainable(self) -> Trainable:
        """The model on this rank alone, on this rank's device."""
        given = self._config
        config = Config(framework=given.framework, backend="local")
        config.train.threads = given.train.threads
        config.train.optimizer, config.train.compile = "sgd", False  # it is never trained: no moments, no graph for it
        exchange, names = config.communication.exchange, (given.framework, given.backend, "local")
        manager = plugins.load([*names, exchange, *given.plugins])
        framework = plugins.make(manager, "framework", given.framework)
        world = plugins.make(manager, "backend", "local").start(framework, [(0,)], config)
        world.local_rank = plugins.make(manager, "backend", given.backend).launch_shape()[2]
        more = {"group": world.group((0,)), "config": config, "compressors": {}, "index": 0}
        alone = plugins.make(manager, "exchange", exchange, **more)
        trainable = framework.build(self._spec, make_mesh(1, config.parallel), world, alone, config)
        wanted = {name: shard for name, shard in trainable.shards().items() if name.startswith("parameters/")}
        state = load.load(self._found, wanted, 0, 1)
        trainable.load_state({name: state[name] for name in wanted})
        return trainable


def opener(config: Config) -> OpenScorer:
    """Return what opens scorers for a run with ``config``, checked, before ranks meet."""

    def open_scorer(key: str, folder: str, characters: str) -> RunScorer:
        try:
            return _open(Path(folder), characters, config)
        except HvdlmError as error:
            raise HvdlmError(f"{key} {folder}: {error}") from error

    return open_scorer


def _open(run: Path, characters: str, config: Config) -> RunScorer:
    tokenizer = _read_tokenizer(run / "tokenizer.json")
    found = load.find(run, "auto", warn=False)
    if found is None:
        raise HvdlmError("it holds no checkpoint yet: train it first, or name another run.")
    if found.manifest.get("tokenizer") != tokenizer.hash:
        raise HvdlmError("its checkpoint was trained with another tokenizer than its tokenizer.json: train it anew.")
    spec = spec_of(found, plugins.models(plugins.load(config.plugins)))
    if spec.reads:
        raise HvdlmError(f"its model {spec.kind} reads more than text: name the run of a gpt or a recurrent model.")
    more = sorted(found.tensors.keys() - {f"parameters/{param.name}" for param in spec.params})
    if added := next((name for name in more if name.startswith("parameters/")), None):
        raise HvdlmError(f"its checkpoint holds {added}, which its model {spec.kind} lacks: name another run.")
    tokenizer.encode(characters)
    if not len(tokenizer.encode(_END)):
        raise HvdlmError("its tokenizer leaves out line ends, between which texts are scored: train with another.")
    return RunScorer(tokenizer, spec, found, config)


def _read_tokenizer(path: Path) -> Tokenizer:
    if not path.is_file():
        raise HvdlmError("there is no run (no tokenizer.json): name the folder that was given as --log.run.")
    try:
        return tokenizers.read(path)
    except (OSError, ValueError) as error:
        raise HvdlmError(f"its tokenizer.json can't be read ({error}): train it anew.") from error
