"""User errors: each is reported in one sentence (what, where, what to do), with exit code 2.

The cases of the table run the command in this process: these errors are detected before a framework is imported
and before any rank computes. The last tests run the real command, and real ranks.
"""

from __future__ import annotations

import gzip
import importlib.metadata
import importlib.util
import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from builders import save_checkpoint
from hvdlm import cli, plugins
from hvdlm_backends.local import LocalWorld
from launching import ROOT, environment, launch, run_python

TEXT = "The quick brown fox jumps over the lazy dog.\n" * 200
STREAMING = ["--communication.exchange", "streaming_diloco"]
COMPRESSION = "--communication.compression"
ONE_BIT_ADAM = [
    "--communication.exchange",
    "one_bit_adam",
    "--train.optimizer",
    "sgd",
    "--train.momentum",
    "0",
    "--train.clip",
    "0",
]
ZERO_3 = ["--parallel.zero", "3"]
ZERO_ONE_ADAM = ["--communication.exchange", "zero_one_adam", *ONE_BIT_ADAM[2:]]
Setup = Callable[[pytest.MonkeyPatch], Any]


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run each test in a folder of its own, with a corpus."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    Path("corpus.txt").write_text(TEXT)


def write(name: str, content: str | bytes) -> Setup:
    """Return a set-up that writes a file."""

    def action(_: pytest.MonkeyPatch) -> None:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return action


def env(**values: str) -> Setup:
    """Return a set-up of environment variables."""
    return lambda patch: [patch.setenv(name, value) for name, value in values.items()]


def unreadable(name: str, mode: int) -> Setup:
    """Return a set-up that denies access to ``name``; root is denied nothing, so that it is told so here."""

    def action(patch: pytest.MonkeyPatch) -> None:
        real = os.access
        patch.setattr(os, "access", lambda path, m: False if Path(path).name == name and m & mode else real(path, m))

    return action


def saved(change: Callable[[Path], None] | None = None) -> Setup:
    """Return a set-up of a run folder with a checkpoint, perhaps damaged afterwards."""

    def action(_: pytest.MonkeyPatch) -> None:
        Path("old").mkdir()
        Path("old/config.yaml").write_text("train: {steps: 5}\n")
        state = {"parameters/w": np.ones(3, np.float32)}
        path = save_checkpoint(Path("old/checkpoints"), 5, state, {"tokenizer": "x"}, LocalWorld())
        if change:
            change(path)

    return action


def edit(key: str, value: Any) -> Callable[[Path], None]:
    """Return a damage: one entry of the manifest is changed."""

    def action(path: Path) -> None:
        manifest = json.loads((path / "manifest.json").read_text())
        (path / "manifest.json").write_text(json.dumps(manifest | {key: value}))

    return action


def cut(name: str) -> Callable[[Path], None]:
    """Return a damage: a file of the checkpoint loses its last byte."""
    return lambda path: (path / name).write_bytes((path / name).read_bytes()[:-1])


def tokens(change: Callable[[Path], None]) -> Setup:
    """Return a set-up of a token folder ``tokens``, damaged."""

    def action(_: pytest.MonkeyPatch) -> None:
        assert cli.main(["prepare", "--data.path", "corpus.txt", "--output", "tokens"]) == 0
        change(Path("tokens"))

    return action


def header(**values: Any) -> Callable[[Path], None]:
    """Return a damage: entries of the header are changed."""

    def action(path: Path) -> None:
        content = json.loads((path / "header.json").read_text())
        (path / "header.json").write_text(json.dumps(content | values))

    return action


def framework_missing(patch: pytest.MonkeyPatch) -> None:
    """Set up a machine without torch."""
    real = importlib.util.find_spec
    patch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "torch" else real(name, *more))


def horovod_without_torch(patch: pytest.MonkeyPatch) -> None:
    """Set up a Horovod whose folder holds no library for torch, under a launcher of two ranks."""
    Path("horovod/torch").mkdir(parents=True)
    Path("horovod/__init__.py").write_text("")
    real = importlib.util.find_spec
    fake = importlib.util.spec_from_file_location("horovod", "horovod/__init__.py")
    patch.setattr(importlib.util, "find_spec", lambda name, *more: fake if name == "horovod" else real(name, *more))
    two_ranks(patch)


def two_ranks(patch: pytest.MonkeyPatch) -> None:
    """Set up the environment of rank 0 of 2 under Open MPI."""
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        patch.setenv(f"OMPI_COMM_WORLD_{name}", value)


def six_ranks(patch: pytest.MonkeyPatch) -> None:
    """Set up the environment of rank 0 of 6 under Open MPI."""
    two_ranks(patch)
    patch.setenv("OMPI_COMM_WORLD_SIZE", "6")


def gloo(patch: pytest.MonkeyPatch) -> None:
    """Set up the environment of rank 0 of 2 under horovodrun --gloo."""
    for name, value in {"RANK": "0", "SIZE": "2", "LOCAL_RANK": "0", "LOCAL_SIZE": "2"}.items():
        patch.setenv(f"HOROVOD_{name}", value)
    patch.setenv("HOROVOD_GLOO_RENDEZVOUS_ADDR", "127.0.0.1")


def install_plugin(patch: pytest.MonkeyPatch, name: str, source: str) -> None:
    """Set up an installed plugin whose module has this source."""
    Path(f"{name}_plugin.py").write_text(source)
    patch.syspath_prepend(str(Path.cwd()))
    entry = importlib.metadata.EntryPoint(name, f"{name}_plugin", "hvdlm")
    real = plugins.installed
    patch.setattr(plugins, "installed", lambda: {**real(), name: entry})


def broken_plugin(patch: pytest.MonkeyPatch) -> None:
    """Set up an installed plugin whose module fails."""
    install_plugin(patch, "broken", "import nothing_of_this_name\n")


LATE = """
from hvdlm import hookimpl
@hookimpl
def hvdlm_lr_schedules():
    return {"late": lambda config: lambda step: config.learning_rate}
"""


def late_schedule(patch: pytest.MonkeyPatch) -> None:
    """Set up an installed plugin with the schedule ``late``."""
    install_plugin(patch, "late", LATE)


CASES: list[tuple[str, list[str], Setup | None, str]] = [
    # The command line
    ("a command misspelt", ["trian"], None, "did you mean train?"),
    ("an option misspelt", ["--model.layer", "6"], None, "--model.layer: there is no such option; did you mean"),
    ("a section forgotten", ["--layers", "6"], None, "did you mean --model.layers?"),
    ("an option that is nothing like any", ["--xyz", "1"], None, "--help all lists all options"),
    ("a stray word", ["--train.steps", "5", "fast"], None, "'fast' belongs to no option"),
    ("no value", ["--model.layers"], None, "--model.layers: the value is missing, expected a whole number"),
    ("text for a whole number", ["--model.layers", "six"], None, "--model.layers: got 'six', expected a whole number"),
    ("a fraction for a whole number", ["--model.layers", "2.5"], None, "expected a whole number"),
    ("text for a number", ["--train.learning_rate", "fast"], None, "--train.learning_rate: got 'fast', expected a num"),
    ("text for a switch", ["--train.nesterov", "maybe"], None, "got 'maybe', expected true or false"),
    ("null where it can't be", ["--train.steps", "null"], None, "--train.steps: got null, expected a whole number"),
    ("an unknown choice", ["--train.optimizer", "adam"], None, "did you mean adamw? Known: adagrad, adamw, muon, sgd."),
    ("a value for a section", ["--model", "5"], None, "--model is a section"),
    # YAML files
    ("no such file", ["--config", "no.yaml"], None, "--config no.yaml: No such file or directory"),
    ("no YAML", ["--config", "a.yaml"], write("a.yaml", "model: [1"), "a.yaml: is no valid YAML"),
    ("binary", ["--config", "a.yaml"], write("a.yaml", b"\xff\xfe\x00"), "a.yaml: is no valid YAML"),
    ("a key twice", ["--config", "a.yaml"], write("a.yaml", "train: {steps: 5}\ntrain: {steps: 9}\n"),
     "train is given twice: remove one"),
    ("a key of a section twice", ["--config", "a.yaml"], write("a.yaml", "train:\n  clip: 1\n  clip: 2\n"),
     "clip is given twice"),
    ("a time for a number", ["--config", "a.yaml"], write("a.yaml", "train: {steps: 1:30:00}\n"),
     "1:30:00 would be read as minutes and seconds"),
    ("a NUL character", ["--config", "a.yaml"], write("a.yaml", 'log: {run: "a\\u0000b"}\n'), "holds a NUL character"),
    ("a folder's name of 5,000 letters", ["--log.run", "x" * 5000], None, "File name too long: give a shorter one"),
    ("a file's name of 300 letters", ["generate", "--run", "x" * 300], None, "File name too long"),
    ("no mapping", ["--config", "a.yaml"], write("a.yaml", "- 1\n"), "a.yaml: holds no options"),
    ("a key misspelt", ["--config", "a.yaml"], write("a.yaml", "model: {layer: 6}"), "did you mean --model.layers?"),
    ("a section misspelt", ["--config", "a.yaml"], write("a.yaml", "modle: {layers: 6}"), "did you mean --model?"),
    ("a section without options", ["--config", "a.yaml"], write("a.yaml", "model: 5"), "model is a section, got 5"),
    ("a type in YAML", ["--config", "a.yaml"], write("a.yaml", "train: {steps: many}"), "--train.steps: got 'many'"),
    ("null in YAML", ["--config", "a.yaml"], write("a.yaml", "train: {steps: null}"), "--train.steps: got null"),
    ("a Python object", ["--config", "a.yaml"], write("a.yaml", "a: !!python/name:os.system"), "is no valid YAML"),
    # Figures out of range, and figures that don't fit together
    ("no layers", ["--model.layers", "0"], None, "model.layers is 0, expected 1 to 10,000"),
    ("layers that fill memory", ["--model.layers", "2000000000"], None, "expected 1 to 10,000: set --model.layers"),
    ("dropout of all", ["--model.dropout", "1.0"], None, "model.dropout is 1.0, expected at least 0 and below 1"),
    ("not a number", ["--train.learning_rate", ".inf"], None, "train.learning_rate is inf, expected above 0"),
    ("a negative seed", ["--train.seed", "-1"], None, "train.seed is -1, expected 0 or more"),
    ("warm-up of 1.5 steps", ["--train.warmup", "1.5"], None, "whole steps, or a share"),
    ("rising decay", ["--train.min_learning_rate", "1"], None, "train.min_learning_rate 1.0 is above"),
    ("Nesterov without momentum", ["--train.nesterov", "true"], None, "train.nesterov needs train.momentum"),
    ("groups of nothing", ["--train.groups", "{'x.*': {weight_decay: 0}}"], None, "no parameter's name matches 'x.*'"),
    ("groups in a list", ["--train.groups", "[1]"], None, "--train.groups: got '[1]', expected a mapping"),
    ("Muon of an LSTM", ["--train.optimizer", "muon", "--model.name", "lstm"], None, "this rnn has none: choose adamw"),
    ("width not divisible", ["--model.width", "130"], None, "--model.width 132"),
    ("heads not divisible", ["--model.kv_heads", "3"], None, "not a multiple of model.kv_heads 3"),
    ("odd rotary width", ["--model.name", "llama", "--model.width", "12"], None, "rotary positions need an even width"),
    ("rotary share of learned positions", ["--model.rotary_share", "0.5"], None, "model.rotary_share is of rotary"),
    ("rotary scaling of learned positions", ["--model.rotary_scaling", "2"], None, "model.rotary_scaling is of rotary"),
    ("an unknown model", ["--model.name", "gtp"], None, "model.name: no model 'gtp'; did you mean gpt?"),
    ("tensor parallel", ["--parallel.tensor", "2"], None, "1 x 1 x 2 (data x pipeline x tensor) is not the 1 rank(s)"),
    ("more data ranks than ranks", ["--parallel.data", "3"], None, "3 x 1 x 1 (data x pipeline x tensor)"),
    ("micro-batch", ["--train.micro_batch_size", "5"], None, "choose one of 1, 2, 4, 8, 16, 32"),
    ("a batch beyond memory", ["--train.batch_size", str(2 * 10**18)], None, "more than this machine's memory holds"),
    ("batch over ranks", ["--train.batch_size", "7"], two_ranks, "can't be split over 2 data ranks: choose 6 or 8"),
    ("a negative prefetch", ["--data.prefetch", "-1"], None, "data.prefetch is -1, expected 0 (none) to 1000"),
    ("a trace of no range", ["--log.profile", "10"], None, "log.profile '10': expected FIRST:LAST"),
    ("a trace that ends first", ["--log.profile", "13:10"], None, "log.profile '13:10': expected FIRST:LAST"),
    ("a trace of step 0", ["--log.profile", "0:3"], None, "log.profile '0:3': expected FIRST:LAST"),
    ("a trace after the run", ["--log.profile", "9:11", "--train.steps", "10"], None,
     "at most 100 steps from 1 to train.steps 10, for example --log.profile 10:10"),
    ("a trace of all steps", ["--log.profile", "1:1000"], None, "expected FIRST:LAST, at most 100 steps"),
    ("a trace in sixtieths", ["--config", "a.yaml"], write("a.yaml", "log: {profile: 10:13}"), "quote it"),
    # Communication
    ("a ratio of 0", [f"{COMPRESSION}.ratio", "0"], None, "ratio is 0.0, expected above 0 and at most 1"),
    ("a ratio of 2", [f"{COMPRESSION}.ratio", "2"], None, "ratio is 2.0, expected above 0 and at most 1"),
    ("an unknown algorithm", [f"{COMPRESSION}.algorithm", "topk"], None, "provides 'topk'; did you mean top_k"),
    ("a rank above the matrices'", [f"{COMPRESSION}.algorithm", "power_sgd", f"{COMPRESSION}.rank", "5000"], None,
     "rank 5000 is larger than the rank of every matrix"),
    ("3 bits", [f"{COMPRESSION}.bits", "3"], None, "expected one of 2, 4, 8"),
    ("an odd block", [f"{COMPRESSION}.block", "100"], None, "block is 100, expected a multiple of 8"),
    ("compression and Adasum", [f"{COMPRESSION}.algorithm", "top_k", "--communication.reduction", "adasum"], two_ranks,
     "adasum combines whole gradients"),
    ("DiLoCo and Adasum", ["--communication.exchange", "diloco", "--communication.reduction", "adasum"], two_ranks,
     "adasum combines whole gradients"),
    ("Adasum over Gloo", ["--communication.reduction", "adasum"], gloo, "adasum needs MPI"),
    ("Adasum on 6 ranks", ["--communication.reduction", "adasum", "--train.batch_size", "6"], six_ranks,
     "6 is no power of two: start 4 or 8 ranks"),
    ("momentum counted twice", [f"{COMPRESSION}.algorithm", "dgc", f"{COMPRESSION}.momentum", "0.9",
     "--train.optimizer", "sgd", "--train.momentum", "0.9"], None, "both would count it twice"),
    ("evaluation between rounds", ["--communication.exchange", "diloco", "--communication.local.steps", "50",
     "--train.eval_every", "120"], None, "train.eval_every 120 falls between two synchronisations of diloco"),
    ("a checkpoint between rounds", ["--communication.exchange", "local_sgd", "--communication.local.steps", "30",
     "--train.eval_every", "0"], None, "checkpoint.every 500 falls between two synchronisations"),
    ("more fragments than steps", [*STREAMING, "--communication.local.fragments", "51"], None,
     "local.fragments is 51, and with communication.local.steps 50 streaming_diloco can have 50 at most"),
    ("a sum that arrives too late", [*STREAMING, "--communication.local.overlap", "50"], None,
     "local.overlap is 50, and with communication.local.steps 50 streaming_diloco can have 49 at most"),
    ("nothing of the global parameters", [*STREAMING, "--communication.local.mixing", "1"], None,
     "local.mixing is 1.0, expected at least 0 and below 1"),
    ("fragments without an exchange of them", ["--communication.exchange", "diloco", "--communication.local.overlap",
     "2"], None, "communication.local.overlap is an option of streaming_diloco"),
    ("streaming and Adasum", [*STREAMING, "--communication.reduction", "adasum"], two_ranks,
     "adasum combines whole gradients"),
    ("indices of 13 bits", [f"{COMPRESSION}.algorithm", "chunked_top_k", f"{COMPRESSION}.block", "8192"], None,
     "block is 8192, and chunked_top_k's indices of 12 bits allow 4096 at most"),
    ("1-bit Adam and AdamW", ["--communication.exchange", "one_bit_adam"], None, "set --train.optimizer sgd"),
    ("1-bit Adam and momentum", [*ONE_BIT_ADAM, "--train.momentum", "0.9"], None, "set --train.momentum 0"),
    ("1-bit Adam and groups", [*ONE_BIT_ADAM, "--train.groups", "{'embed.*': {weight_decay: 0}}"], None,
     "one_bit_adam has one rule for all parameters; set --train.groups null"),
    ("1-bit Adam and clipping", [*ONE_BIT_ADAM, "--train.clip", "1"], None, "set --train.clip 0"),
    ("1-bit Adam and int8", [*ONE_BIT_ADAM, f"{COMPRESSION}.algorithm", "int8"], None,
     "one_bit_adam compresses by itself"),
    ("1-bit Adam and sums", [*ONE_BIT_ADAM, "--communication.reduction", "sum"], None, "one_bit_adam averages"),
    ("1-bit Adam and ZeRO", [*ONE_BIT_ADAM, "--parallel.data", "2", "--parallel.zero", "1"], two_ranks,
     "and one_bit_adam has none"),
    ("ZeRO-3 and an LSTM", [*ZERO_3, "--model.name", "lstm"], two_ranks, "the layers of an rnn model are not known"),
    ("ZeRO-3 and stages", [*ZERO_3, "--parallel.pipeline", "2"], two_ranks, "stages of parallel.pipeline 2 have"),
    ("ZeRO-3 and a compiler", [*ZERO_3, "--train.compile", "true"], two_ranks, "compiled steps (train.compile) keep"),
    ("ZeRO-3 and Muon", [*ZERO_3, "--train.optimizer", "muon"], two_ranks, "muon updates whole matrices: set"),
    ("ZeRO-3 and int8", [*ZERO_3, f"{COMPRESSION}.algorithm", "int8"], two_ranks, "sends no compressed gradients"),
    ("ZeRO-3 and bf16", [*ZERO_3, "--parallel.zero_gather", "bf16"], two_ranks, "sends them in float32, not in bf16"),
    ("ZeRO-3 and adapters", [*ZERO_3, "--lora.rank", "2"], two_ranks, "adapters (lora.rank) leave little to shard"),
    ("ZeRO-3 and Adasum", [*ZERO_3, "--communication.reduction", "adasum"], two_ranks, "zero 3 scatters sums"),
    ("TensorFlow's ZeRO-3 and tensor ranks", [*ZERO_3, "--framework", "tensorflow", "--parallel.tensor", "2"],
     two_ranks, "TensorFlow's tensor ranks can't gather weights layer by layer"),
    ("1-bit Adam and an embedding of two stages", [*ONE_BIT_ADAM, "--parallel.pipeline", "2"], two_ranks,
     "one_bit_adam makes updates of the gradients that a stage has, and those of a tied embedding are two"),
    ("1-bit Adam and translation", [*ONE_BIT_ADAM, "--task", "translation"], None, "padding would falsify"),
    ("0/1 Adam and AdamW", ["--communication.exchange", "zero_one_adam"], None, "set --train.optimizer sgd"),
    ("0/1 Adam and an evaluation within a round", [*ZERO_ONE_ADAM, "--train.eval_every", "75"], None,
     "train.eval_every 75 falls between two synchronisations of zero_one_adam"),
    ("0/1 Adam and a dense first stage", [*ZERO_ONE_ADAM, f"{COMPRESSION}.start_after_steps", "10"], None,
     "zero_one_adam: it has no dense first stage"),
    ("0/1 Adam and the skipping of spikes", [*ZERO_ONE_ADAM, "--train.spike", "4"], None, "train.spike 4 doesn't go"),
    ("0/1 Adam and an outer optimizer", [*ZERO_ONE_ADAM, "--communication.local.outer_momentum", "0.8"], None,
     "outer_momentum 0.8 doesn't go with communication.exchange zero_one_adam: it has no outer optimizer"),
    ("0/1 Adam and a plugin's schedule", [*ZERO_ONE_ADAM, "--train.schedule", "late", "--plugins", "[late]"],
     late_schedule, "train.schedule late doesn't go with communication.exchange zero_one_adam"),
    ("no steps of a round", ["--communication.local.steps", "0"], None, "local.steps is 0, expected 1 or more"),
    ("an autotune log without autotune", ["--communication.autotune_log", "a.csv"], None, "--communication.autotune"),
    ("a bench of no size", ["bench", "--smallest", "10"], None, "expected 1024 <= smallest <= largest"),
    ("a bench of no collective", ["bench", "--collectives", "[allreduce]"], None, "did you mean all_reduce?"),
    # Plugins, frameworks, backends
    ("an unknown plugin", ["--plugins", "[spikes]"], None, "no plugin 'spikes' is installed"),
    ("plugins without brackets", ["--plugins", "torch"], None, "--plugins: got 'torch', expected a list such as"),
    ("a broken plugin", ["--plugins", "[broken]"], broken_plugin, "plugin broken (broken_plugin) does not import"),
    ("an unknown framework", ["--framework", "pytorch"], None, "no plugin provides 'pytorch'; did you mean torch?"),
    ("an unknown backend", ["--backend", "mpl"], None, "backend: no plugin provides 'mpl'; did you mean mpi?"),
    ("an unknown exchange", ["--communication.exchange", "ring"], None, "exchange: no plugin provides 'ring'"),
    ("an unknown task", ["--task", "translate"], None, "task: no plugin provides 'translate'"),
    ("a missing framework", [], framework_missing, 'torch is not installed here: make setup FRAMEWORKS="torch"'),
    ("Horovod without torch", ["--backend", "mpi"], horovod_without_torch,
     "Horovod was built without torch (python -m hvdlm horovod build), and backend mpi needs it: use --backend mpi4py"),
    ("local under a launcher", ["--backend", "local"], two_ranks, "but Open MPI started 2"),
    ("a launch of no rank", [], env(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="0"), "rank 0 of 0, 0 of them"),
    ("a launch of no local rank", [],
     env(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="1", OMPI_COMM_WORLD_LOCAL_SIZE="0"), "which can't be: unset"),
    ("a launch of too many", [], env(OMPI_COMM_WORLD_RANK="0", OMPI_COMM_WORLD_SIZE="9" * 30), "a whole number as"),
    ("a rank that is no ASCII digit", [], env(HOROVOD_RANK="\u00b2", HOROVOD_SIZE="1"), "HOROVOD_RANK is '\u00b2'"),
    ("a launcher's nonsense", [], env(OMPI_COMM_WORLD_RANK="x", OMPI_COMM_WORLD_SIZE="2"),
     "OMPI_COMM_WORLD_RANK is 'x'"),
    # The corpus
    ("no such corpus", ["--data.path", "no.txt"], None, "data.path no.txt: there is no such file, folder or match"),
    ("a glob without match", ["--data.path", "*.text"], None, "there is no such file, folder or match"),
    ("an empty corpus", ["--data.path", "e.txt"], write("e.txt", ""), "data.path e.txt: the file is empty"),
    ("an empty folder", ["--data.path", "f"], lambda _: Path("f").mkdir(), "data.path f: the folder holds no .txt"),
    ("an unreadable file", ["--data.path", "corpus.txt"], unreadable("corpus.txt", os.R_OK), "this user can't read it"),
    ("an unreadable folder", ["--data.path", "f"], unreadable("f", os.R_OK), "data.path f: this user can't read it"),
    ("no UTF-8", ["--data.path", "l.txt"], write("l.txt", b"abc\n\xe9t\xe9\n"), "byte 4 is not UTF-8"),
    ("no gzip", ["--data.path", "a.gz"], write("a.gz", b"not packed"), "data.path a.gz: can't be read"),
    ("half a gzip", ["--data.path", "a.gz"], write("a.gz", gzip.compress(TEXT.encode())[:-9]), "a.gz: can't be read"),
    ("shorter than the context", ["--data.path", "s.txt"], write("s.txt", "short text"), "fewer than data.context + 1"),
    ("no validation", ["--data.path", "corpus.txt", "--data.validation_share", "0.0001"], None, "2 are needed"),
    ("no such validation text", ["--data.validation_path", "no.txt"], None, "no.txt: there is no such file"),
    ("a validation share of all", ["--data.validation_share", "1"], None,
     "data.validation_share is 1.0, expected above"),
    ("standard input on ranks", ["--data.path", "-"], two_ranks, "a launcher gives standard input to one rank only"),
    ("an unknown tokenizer", ["--data.tokenizer", "chars"], None, "data.tokenizer: 'chars' is no kind and no file"),
    ("a foreign tokenizer", ["--data.tokenizer", "t.json"], write("t.json", "{}"), "not a Hugging Face tokenizer.json"),
    # Token folders
    ("tokens cut off", ["--data.path", "tokens"], tokens(cut("tokens.bin")), "tokens.bin has"),
    ("tokens of another tokenizer", ["--data.path", "tokens"], tokens(header(tokenizer="x")), "isn't the one"),
    ("tokens of another format", ["--data.path", "tokens"], tokens(header(format="y")), "its format is 'y'"),
    ("tokens of a strange type", ["--data.path", "tokens"], tokens(header(dtype="int9")), "damaged or foreign: 'int9'"),
    ("tokens beyond the vocabulary", ["--data.path", "tokens"],
     tokens(lambda p: (p / "tokens.bin").write_bytes(b"\xff" * (p / "tokens.bin").stat().st_size)), "vocabulary"),
    ("a header that is no JSON", ["--data.path", "tokens"], tokens(lambda p: (p / "header.json").write_text("{")),
     "damaged or foreign"),
    ("prepare over a folder", ["prepare", "--output", "."], None, "it exists and is not an empty folder"),
    # Runs and checkpoints
    ("a run folder that is a file", ["--log.run", "corpus.txt"], None, "corpus.txt is a file, not a folder"),
    ("a run folder not writable", ["--log.run", "r/x"], unreadable("r", os.W_OK), "can't be written by this user"),
    ("an occupied run folder", ["--log.run", "old"], saved(), "already holds a run: resume it"),
    ("no such checkpoint", ["--checkpoint.resume", "no"], None, "no is no hvdlm checkpoint"),
    ("a run without checkpoints", ["--checkpoint.resume", "f"], lambda _: Path("f/checkpoints").mkdir(parents=True),
     "yet"),
    ("a foreign checkpoint", ["--log.run", "old", "--checkpoint.resume", "auto"], saved(edit("format", "pt")),
     "'pt'"),
    ("a checkpoint cut off", ["--log.run", "old", "--checkpoint.resume", "auto"], saved(cut("model.safetensors")),
     "bytes"),
    ("a path in a manifest", ["--log.run", "old", "--checkpoint.resume", "auto"],
     saved(edit("files", {"../x.safetensors": {"bytes": 1, "sha256": 64 * "0"}})),
     "it names a file '../x.safetensors'"),
    ("another tokenizer", ["--log.run", "old", "--checkpoint.resume", "auto", "--data.path", "corpus.txt"], saved(),
     "another tokenizer or vocabulary"),
    ("no such run", ["generate", "--run", "no"], None, "--run no: there is no run"),
    ("a run that has saved nothing", ["evaluate", "--run", "r"], write("r/config.yaml", "{train: {steps: 5}}"), "yet"),
    ("a negative temperature", ["generate", "--temperature", "-1"], None, "temperature is -1.0, expected 0 or more"),
    ("a top_p of 2", ["generate", "--top_p", "2"], None, "top_p is 2.0, expected above 0 and at most 1"),
    ("no tokens", ["generate", "--tokens", "0"], None, "--tokens: got 0, expected 1 or more"),
    ("no samples", ["generate", "--num_samples", "0"], None, "--num_samples: got 0, expected 1 or more"),
    ("no batch", ["generate", "--batch_size", "0"], None, "--batch_size: got 0, expected 1 or more"),
    ("two kinds of prompts", ["generate", "--prompt", "a", "--prompt_file", "no.txt"], None, "are both given"),
    ("lines of no file", ["generate", "--prompt_per_line", "true"], None, "splits the text of --prompt_file or of"),
    ("blank lines", ["generate", "--prompt_per_line", "true", "--prompt_file", "b.txt"], write("b.txt", " \n\n"),
     "--prompt_file b.txt: no line has a prompt"),
    ("no prompt", ["generate", "--prompt_file", "no.txt"], None, "--prompt_file no.txt: [Errno 2] No such file"),
    ("an unknown character", ["--data.path", "corpus.txt", "--log.sample_tokens", "5", "--log.sample_prompt", "é"],
     None,
     "character 'é' is not among the"),
    ("an empty prompt", ["--data.path", "corpus.txt", "--log.sample_tokens", "5", "--log.sample_prompt", ""], None,
     "the prompt is empty"),
]  # fmt: skip


def _stop(real: Any, manager: Any, kind: str, *arguments: Any, **named: Any) -> Any:
    assert kind != "framework" or arguments[0] == "pytorch", "nothing was found wrong"
    return real(manager, kind, *arguments, **named)


def _files() -> set[Path]:
    return {path for path in Path().rglob("*") if not {"cache", "__pycache__"} & set(path.parts)}


@pytest.mark.parametrize("arguments, setup, words", [case[1:] for case in CASES], ids=[case[0] for case in CASES])
def test_bad_input_ends_with_one_sentence_and_exit_code_2(
    arguments: list[str],
    setup: Setup | None,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    if "f" in arguments and setup and "unreadable" in setup.__qualname__:
        write("f/a.txt", TEXT)(monkeypatch)
    if "r/x" in arguments:
        Path("r").mkdir()
    if setup:
        setup(monkeypatch)
    real = plugins.make
    monkeypatch.setattr(plugins, "make", lambda manager, kind, *a, **k: _stop(real, manager, kind, *a, **k))
    capsys.readouterr()
    before = _files()
    assert cli.main(arguments) == 2
    printed = capsys.readouterr()
    sentence = printed.err.strip()
    assert words in sentence and sentence.startswith("hvdlm: ") and "\n" not in sentence, sentence
    assert len(sentence) < 400 and "Traceback" not in sentence and printed.out == ""
    assert _files() == before


def test_the_table_has_at_least_40_distinct_cases() -> None:
    assert len({case[0] for case in CASES}) == len(CASES) >= 40


def test_the_real_command_exits_with_2_and_no_traceback() -> None:
    done = run_python(["-m", "hvdlm", "--model.layer", "6"])
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert done.stderr == "hvdlm: --model.layer: there is no such option; did you mean --model.layers?\n"
    with_trace = run_python(["-m", "hvdlm", "--model.layer", "6", "--debug"])
    assert with_trace.returncode == 2 and "Traceback" in with_trace.stderr


def test_ranks_report_bad_input_once() -> None:
    done = launch("mpirun", 2, ["-m", "hvdlm", "--train.batch_size", "7"])
    assert done.returncode == 2
    assert done.stderr.count("can't be split over 2 data ranks") == 1, done.stderr


def test_a_full_disk_is_named_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """The limit on file sizes stands for the disk: the kernel refuses to write more in the same way."""

    def limit() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))

    (tmp_path / "corpus.txt").write_text(TEXT * 10)
    command = [sys.executable, "-m", "hvdlm", "--data.path", str(tmp_path / "corpus.txt")]
    variables = environment(XDG_CACHE_HOME=str(tmp_path / "cache"), PYTHONDONTWRITEBYTECODE="1")
    done = subprocess.run(
        command, cwd=ROOT, env=variables, capture_output=True, text=True, preexec_fn=limit, timeout=60
    )
    assert done.returncode == 2, done.stderr
    assert "token files can't be written to" in done.stderr and "free space or choose another folder" in done.stderr
    assert not list((tmp_path / "cache").rglob("tokens.bin")) and not list((tmp_path / "cache").rglob(".partial*"))
