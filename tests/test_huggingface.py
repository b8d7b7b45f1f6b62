"""Hugging Face folders: transformers' own GPT-2 and Llama say what ours say, in both directions."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hvdlm_huggingface import folder
from hvdlm_huggingface.export import _characters
from safetensors.numpy import save_file

from hvdlm import cli, plugins
from hvdlm.checkpoints.load import find
from hvdlm.communication.all_reduce import AllReduceExchange
from hvdlm.config import Config
from hvdlm.data.tokenizers import from_json
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec, builtin_models
from hvdlm.parallel.flat_layout import whole
from hvdlm.parallel.mesh import Mesh
from hvdlm_backends.local import AloneGroup, LocalWorld
from launching import ROOT, environment, launch, losses

FRAMEWORKS = ["torch", "tensorflow"]
KINDS = ["gpt2", "llama", "llama-tied-biased"]
TOKENS = np.array([[5, 3, 60, 0, 7, 11, 2, 2, 49]], np.int32)
TEXT = "To be, or not to be, that is the question.\n" * 30


def foreign(kind: str) -> Any:
    """Return a randomly initialised model of transformers, of 64 tokens and 16 positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    more = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True} if kind != "llama" else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 56, "max_position_embeddings": 16}
    config = LlamaConfig(vocab_size=64, initializer_range=0.3, rms_norm_eps=1e-5, **sizes, **more)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # which start at what norms and biases leave unseen
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def said_by(model: Any) -> np.ndarray:
    """Return a transformers model's scores of what follows ``TOKENS``, float32 ``[vocab]``."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits[0, -1].numpy()


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Return (a folder that transformers wrote, its model's scores)."""
    model, path = foreign(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path, said_by(model)


def resolved(path: Path, framework: str, **data: Any) -> tuple[Config, ModelSpec]:
    config = Config(framework=framework)
    config.model.pretrained, config.data.context, config.data.tokenizer = str(path), data.get("context", 16), "byte"
    config = folder.resolve(config)
    spec = builtin_models()[config.model.name](config.model, config.model.vocab or 0, config.data.context)
    return config, folder.Folder(path).attach(spec)


def scores(path: Path, framework: str, **data: Any) -> np.ndarray:
    """Return our model's scores of what follows ``TOKENS``."""
    config, spec = resolved(path, framework, **data)
    maker = plugins.make(plugins.load([framework]), "framework", framework)
    model = maker.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)
    return np.asarray(model.logits(TOKENS)[0])[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_a_model_of_transformers_says_the_same_here(saved: tuple[Path, np.ndarray], framework: str) -> None:
    path, expected = saved
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(scores(path, framework), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(scores(path, framework, context=9), expected, atol=1e-4, rtol=0)


def test_shards_half_precision_and_base_models_are_read(tmp_path: Path) -> None:
    """A sharded folder with an index, one in bfloat16, one of a model without its head."""
    import torch
    from transformers import AutoModelForCausalLM

    model = foreign("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    np.testing.assert_allclose(scores(tmp_path / "shards", "torch"), said_by(model), atol=1e-4)
    model.transformer.save_pretrained(tmp_path / "base")
    np.testing.assert_allclose(scores(tmp_path / "base", "torch"), said_by(model), atol=1e-4)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    np.testing.assert_allclose(scores(tmp_path / "half", "torch"), said_by(wide), atol=1e-4)


SIZES = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--data.context", "16"]
TRAIN = ["--train.batch_size", "8", "--train.steps", "4", "--log.every", "1", "--checkpoint.every", "4"]


@pytest.mark.parametrize(
    "framework, model, tokenizer",
    [("torch", "gpt", "char"), ("tensorflow", "llama", "bpe"), ("torch", "gpt2-no-bias", "byte")],
)
def test_what_is_trained_here_says_the_same_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], framework: str, model: str, tokenizer: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, run, out = tmp_path / "text.txt", tmp_path / "run", tmp_path / "out"
    text.write_text(TEXT)
    more = {"gpt2-no-bias": ["--model.bias", "false"], "llama": ["--model.kv_heads", "1"]}.get(model, [])
    data = ["--data.path", str(text), "--data.tokenizer", tokenizer, "--data.cache", str(tmp_path / "cache")]
    size = ["--data.vocab_size", "300"] if tokenizer == "bpe" else []
    options = [*SIZES, *TRAIN, *data, *size, *more, "--model.name", model.split("-")[0], "--log.run", str(run)]
    done = launch("", 1, ["-m", "hvdlm", "--framework", framework, *options])
    assert done.returncode == 0, done.stderr
    assert cli.main(["convert", "--run", str(run), "--format", "huggingface", "--output", str(out)]) == 0
    assert f"for transformers; {tokenizer} tokenizer" in capsys.readouterr().out
    theirs, found = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = found("To be, or not", add_special_tokens=False)["input_ids"]
    ours = json.loads((run / "tokenizer.json").read_text())
    assert ids == from_json(ours).encode("To be, or not").tolist()
    assert found.decode(ids) == "To be, or not"
    # The checkpoint's numbers, as our model computes with them: read back from what was written.
    tokens, trained = np.array([ids], np.int32), find(run, "auto")
    assert trained is not None
    import torch

    with torch.no_grad():
        expected = theirs(torch.from_numpy(tokens).long()).logits[0, -1].numpy()
    config, spec = resolved(out, framework)
    maker = plugins.make(plugins.load([framework]), "framework", framework)
    again = maker.build(spec, Mesh(1, 1, 1), LocalWorld(), AllReduceExchange(AloneGroup()), config)
    np.testing.assert_allclose(np.asarray(again.logits(tokens)[0])[0], expected, atol=1e-4, rtol=0)
    reader = trained.reader()
    for param in spec.params:
        if f"parameters/{param.name}" in trained.tensors:
            stored = reader.shard(f"parameters/{param.name}", whole(param.shape))
            np.testing.assert_array_equal(param.initial(0), stored, err_msg=param.name)


def start_of(kind: str, path: Path) -> None:
    """Write a folder of a model and of a tokenizer of fewer entries than it has."""
    from transformers import PreTrainedTokenizerFast

    foreign(kind).save_pretrained(path)
    (path / "own.json").write_text(json.dumps(_characters({"characters": "".join(sorted(set(TEXT)))})))
    PreTrainedTokenizerFast(tokenizer_file=str(path / "own.json")).save_pretrained(path)
    (path / "own.json").unlink()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fine_tuning_starts_from_a_folder_and_goes_on_without_it(tmp_path: Path, framework: str) -> None:
    """On 2 tensor ranks, each reading its slices; the vocabulary is larger than the tokenizer's."""
    start, text, run = tmp_path / "start", tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    start_of("llama", start)
    options = ["--model.pretrained", str(start), "--data.path", str(text), "--data.context", "16"]
    options += ["--data.cache", str(tmp_path / "cache"), "--log.run", str(run), "--parallel.tensor", "2"]
    done = launch("mpirun", 2, ["-m", "hvdlm", "--framework", framework, *options, *TRAIN])
    assert done.returncode == 0, done.stderr
    # What is random at a scale of 0.3 is worse than guessing: the weights of the folder, not ours, are in use.
    assert losses(run)[0] > np.log(64) + 0.5
    if framework == "tensorflow":
        return
    for path in [start / "config.json", *start.glob("*.safetensors")]:
        path.unlink()
    more = ["--config", str(run / "config.yaml"), "--train.steps", "6", "--checkpoint.resume", "auto"]
    again = launch("", 1, ["-m", "hvdlm", *more, "--parallel.tensor", "1", "--log.sample_tokens", "20"])
    assert again.returncode == 0, again.stderr
    assert len(losses(run)) == 6


def test_the_page_s_commands_work_as_printed(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "huggingface.md").read_text()
    commands = page.split("```sh\n")[1].split("```")[0]
    (tmp_path / "my.txt").write_text(TEXT)
    start_of("gpt2", tmp_path / "gpt2-folder")
    smaller = commands.replace("--data.context 256", "--data.context 12").replace("500", "3").replace("=20", "=5")
    for quick in ("context 12", "steps 3", "tokens=5"):
        assert quick in smaller
    command, env = ["bash", "-euc", smaller.replace("Once", "To be")], environment()
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.splitlines()[-1].startswith("To be")


def changed(path: Path, **values: Any) -> None:
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, **values}))


Harm = Callable[[Path], object]
HARMS: dict[str, tuple[Harm, str]] = {
    "another model": (lambda p: changed(p, model_type="bert"), "holds a 'bert' model, hvdlm reads gpt2 and llama"),
    "no name": (lambda p: changed(p, model_type=[1]), "holds a [1] model"),
    "activation": (lambda p: changed(p, activation_function="relu"), "its activation_function is 'relu'"),
    "sizes": (lambda p: changed(p, n_layer=-3), "its n_layer is '-3', expected a whole number above 0"),
    "lacking": (lambda p: changed(p, n_head=None), "'n_head' is missing"),
    "no json": (lambda p: (p / "config.json").write_text("{"), "is no folder that hvdlm can read"),
    "no folder": (lambda p: shutil.rmtree(p), "config.json: No such file or directory: name a Hugging Face folder"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors: pickled weights"),
    "cut": (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 20), "its header is said to have 0 bytes"),
    "other shapes": (lambda p: changed(p, n_embd=64), "transformer.wte.weight has the shape [64, 32]"),
    "a figure": (
        lambda p: save_file({"transformer.wte.weight": np.array(1.0, np.float32)}, p / "model.safetensors"),
        "transformer.wte.weight has the shape []",
    ),
    "more layers": (lambda p: changed(p, n_layer=4), "there is no tensor transformer.h.3.ln_1.weight"),
    "stray": (
        lambda p: (p / "model.safetensors.index.json").write_text('{"weight_map": {"wte.weight": "../x"}}'),
        "names files outside of its folder",
    ),
}


@pytest.mark.parametrize("harm, expected", HARMS.values(), ids=list(HARMS))
def test_a_folder_that_does_not_do_is_refused_in_a_sentence(tmp_path: Path, harm: Harm, expected: str) -> None:
    foreign("gpt2").save_pretrained(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(HvdlmError) as caught:
        resolved(tmp_path / "model", "torch")
    assert expected in str(caught.value)


def test_sizes_that_contradict_the_folder_are_refused(tmp_path: Path) -> None:
    foreign("gpt2").save_pretrained(tmp_path)
    config = Config()
    config.model.pretrained, config.model.layers = str(tmp_path), 7
    with pytest.raises(HvdlmError, match=r"model.layers is 7, but .* has 3: leave --model.layers out"):
        folder.resolve(config)
    config.model.layers = 4
    with pytest.raises(HvdlmError, match=r"data\.context 64 is more than the 16 positions"):
        folder.resolve(config)
    config.data.context = 16
    with pytest.raises(HvdlmError, match=r"has no tokenizer\.json: name the model's tokenizer"):
        folder.resolve(config)


def test_what_no_model_of_transformers_computes_is_refused(
    curve: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for options, expected in (
        (("--model.name", "llama", "--model.norm", "layernorm"), "which no Hugging Face model has together"),
        (("--model.name", "gru"), "Hugging Face has no model like a rnn"),
    ):
        run = curve("torch", 1, *options, "--train.steps", "1")
        arguments = ["convert", "--run", str(run), "--format", "huggingface", "--output", str(tmp_path / "out")]
        assert cli.main(arguments) == 2
        assert expected in capsys.readouterr().err
        assert not (tmp_path / "out").exists()
