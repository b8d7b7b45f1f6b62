"""Hugging Face folders: imported and exported models have the same logits here and in transformers."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from builders import single_rank_trainable
from hvdlm import cli
from hvdlm.checkpoints import base_weights
from hvdlm.checkpoints.discovery import find
from hvdlm.config import Config
from hvdlm.data.tokenizers import from_json
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import whole
from hvdlm_huggingface.folder import Folder
from hvdlm_huggingface.tokenizer_files import from_characters
from hvdlm_language.presets import PRESETS
from launching import ROOT, environment, launch, losses, run_python

FRAMEWORKS = ["torch", "tensorflow"]
KINDS = ["gpt2", "llama", "llama-tied-biased"]
TOKENS = np.array([[5, 3, 60, 0, 7, 11, 2, 2, 49]], np.int32)
TEXT = "To be, or not to be, that is the question.\n" * 30


def transformers_model(kind: str) -> Any:
    """Return a randomly initialised model of transformers, of 64 tokens and 16 positions."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(1)
    if kind == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16}
        return GPT2LMHeadModel(GPT2Config(vocab_size=64, initializer_range=0.3, **sizes)).eval()
    biases = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True} if kind != "llama" else {}
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2}
    sizes |= {"intermediate_size": 56, "max_position_embeddings": 16}
    config = LlamaConfig(vocab_size=64, initializer_range=0.3, rms_norm_eps=1e-5, **sizes, **biases)
    config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():  # initial norms and biases have no effect
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformers_logits(model: Any) -> np.ndarray:
    """Return the logits of a transformers model after ``TOKENS``, float32 ``[vocab]``."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits[0, -1].numpy()


@pytest.fixture(scope="module", params=KINDS)
def saved(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """Return (a folder that transformers wrote, the logits of its model)."""
    model, path = transformers_model(request.param), tmp_path_factory.mktemp(request.param)
    model.save_pretrained(path)
    return path, transformers_logits(model)


def resolved(path: Path, framework: str, **data: Any) -> tuple[Config, ModelSpec]:
    config = Config(framework=framework)
    config.model.pretrained, config.data.context, config.data.tokenizer = str(path), data.get("context", 16), "byte"
    config = base_weights.resolve(config)
    spec = PRESETS[config.model.name](config.model, config.model.vocab or 0, config.data.context)
    return config, Folder(path).attach(spec)


def logits(path: Path, framework: str, **data: Any) -> np.ndarray:
    """Return the logits after ``TOKENS`` of the model that is read from a folder."""
    config, spec = resolved(path, framework, **data)
    return np.asarray(single_rank_trainable(spec, config).logits(TOKENS)[0])[0]


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_transformers_models_have_the_same_logits_here(saved: tuple[Path, np.ndarray], framework: str) -> None:
    path, expected = saved
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(logits(path, framework), expected, atol=1e-4, rtol=0)
    np.testing.assert_allclose(logits(path, framework, context=9), expected, atol=1e-4, rtol=0)


def test_sharded_bf16_and_headless_folders_are_read(tmp_path: Path) -> None:
    """A sharded folder with an index, one of a model without its head, and one in bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    model = transformers_model("gpt2")
    model.save_pretrained(tmp_path / "shards", max_shard_size="30KB")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    np.testing.assert_allclose(logits(tmp_path / "shards", "torch"), transformers_logits(model), atol=1e-4)
    model.transformer.save_pretrained(tmp_path / "base")
    np.testing.assert_allclose(logits(tmp_path / "base", "torch"), transformers_logits(model), atol=1e-4)
    model.to(torch.bfloat16).save_pretrained(tmp_path / "half")
    wide = AutoModelForCausalLM.from_pretrained(tmp_path / "half", dtype=torch.float32)
    np.testing.assert_allclose(logits(tmp_path / "half", "torch"), transformers_logits(wide), atol=1e-4)


SIZES = ["--model.layers", "2", "--model.width", "32", "--model.heads", "2", "--data.context", "16"]
TRAIN = ["--train.batch_size", "8", "--train.steps", "4", "--log.every", "1", "--checkpoint.every", "4"]


@pytest.mark.parametrize(
    "framework, model, tokenizer",
    [("torch", "gpt", "char"), ("tensorflow", "llama", "bpe"), ("torch", "gpt2-no-bias", "byte")],
)
def test_exported_models_have_the_same_logits_in_transformers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], framework: str, model: str, tokenizer: str
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text, run, out = tmp_path / "text.txt", tmp_path / "run", tmp_path / "out"
    text.write_text(TEXT)
    model_options = {"gpt2-no-bias": ["--model.bias", "false"], "llama": ["--model.kv_heads", "1"]}.get(model, [])
    data = ["--data.path", str(text), "--data.tokenizer", tokenizer, "--data.cache", str(tmp_path / "cache")]
    size = ["--data.vocab_size", "300"] if tokenizer == "bpe" else []
    options = [*SIZES, *TRAIN, *data, *size, *model_options, "--model.name", model.split("-")[0], "--log.run", str(run)]
    done = run_python(["-m", "hvdlm", "--framework", framework, *options])
    assert done.returncode == 0, done.stderr
    assert cli.main(["convert", "--run", str(run), "--format", "huggingface", "--output", str(out)]) == 0
    assert f"for transformers; {tokenizer} tokenizer" in capsys.readouterr().out
    exported, fast_tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    ids = fast_tokenizer("To be, or not", add_special_tokens=False)["input_ids"]
    ours = json.loads((run / "tokenizer.json").read_text())
    assert ids == from_json(ours).encode("To be, or not").tolist()
    assert fast_tokenizer.decode(ids) == "To be, or not"
    # The exported folder, read back, has the parameters of the checkpoint.
    tokens, trained = np.array([ids], np.int32), find(run, "auto")
    assert trained is not None
    import torch

    with torch.no_grad():
        expected = exported(torch.from_numpy(tokens).long()).logits[0, -1].numpy()
    config, spec = resolved(out, framework)
    imported = single_rank_trainable(spec, config)
    np.testing.assert_allclose(np.asarray(imported.logits(tokens)[0])[0], expected, atol=1e-4, rtol=0)
    reader = trained.reader()
    # A model without biases is exported with zeros in their place.
    in_both = [param for param in spec.params if f"parameters/{param.name}" in trained.tensors]
    assert len(in_both) == sum(name.startswith("parameters/") for name in trained.tensors)
    for param in in_both:
        stored = reader.read(f"parameters/{param.name}", whole(param.shape))
        np.testing.assert_array_equal(param.initial(0), stored, err_msg=param.name)


def write_pretrained(kind: str, path: Path) -> None:
    """Write a folder of a model and of a tokenizer that is smaller than its vocabulary."""
    from transformers import PreTrainedTokenizerFast

    transformers_model(kind).save_pretrained(path)
    (path / "own.json").write_text(json.dumps(from_characters({"characters": "".join(sorted(set(TEXT)))})))
    PreTrainedTokenizerFast(tokenizer_file=str(path / "own.json")).save_pretrained(path)
    (path / "own.json").unlink()


@pytest.mark.parametrize("framework", FRAMEWORKS)
def test_fine_tuning_starts_from_a_folder_and_resumes_without_it(tmp_path: Path, framework: str) -> None:
    """On 2 tensor ranks, each of which reads its slices; the vocabulary is larger than the tokenizer."""
    start, text, run = tmp_path / "start", tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    write_pretrained("llama", start)
    options = ["--model.pretrained", str(start), "--data.path", str(text), "--data.context", "16"]
    options += ["--data.cache", str(tmp_path / "cache"), "--log.run", str(run), "--parallel.tensor", "2"]
    done = launch("threads", 2, ["-m", "hvdlm", "--framework", framework, *options, *TRAIN])
    assert done.returncode == 0, done.stderr
    # Random weights at a scale of 0.3 are worse than guessing, so that the weights are those of the folder.
    assert losses(run)[0] > np.log(64) + 0.5
    if framework == "tensorflow":
        return
    for path in [start / "config.json", *start.glob("*.safetensors")]:
        path.unlink()
    resume = ["--config", str(run / "config.yaml"), "--train.steps", "6", "--checkpoint.resume", "auto"]
    resumed = run_python(["-m", "hvdlm", *resume, "--parallel.tensor", "1", "--log.sample_tokens", "20"])
    assert resumed.returncode == 0, resumed.stderr
    assert len(losses(run)) == 6


def test_the_documented_commands_work(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "huggingface.md").read_text()
    commands = page.split("```sh\n")[1].split("```")[0]
    (tmp_path / "my.txt").write_text(TEXT)
    write_pretrained("gpt2", tmp_path / "gpt2-folder")
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
    "no json": (lambda p: (p / "config.json").write_text("{"), "is not a folder that hvdlm can read"),
    "no folder": (lambda p: shutil.rmtree(p), "no plugin finds a model there: name a Hugging Face folder"),
    "no weights": (lambda p: (p / "model.safetensors").unlink(), "has no model.safetensors: pickled weights"),
    "cut": (lambda p: (p / "model.safetensors").write_bytes(b"\0" * 20), "its header claims to have 0 bytes"),
    "other shapes": (lambda p: changed(p, n_embd=64), "transformer.wte.weight has the shape [64, 32]"),
    "a figure": (
        lambda p: save_file({"transformer.wte.weight": np.array(1.0, np.float32)}, p / "model.safetensors"),
        "transformer.wte.weight has the shape []",
    ),
    "more layers": (lambda p: changed(p, n_layer=4), "there is no tensor transformer.h.3.ln_1.weight"),
    "stray": (
        lambda p: (
            (p / "model.safetensors")
            .rename(p / "model.safetensors.index.json")
            .write_text('{"weight_map": {"wte.weight": "../x"}}')
        ),
        "names files outside of its folder",
    ),
}


@pytest.mark.parametrize("harm, expected", HARMS.values(), ids=list(HARMS))
def test_unsupported_folders_are_refused_in_one_sentence(tmp_path: Path, harm: Harm, expected: str) -> None:
    transformers_model("gpt2").save_pretrained(tmp_path / "model")
    harm(tmp_path / "model")
    with pytest.raises(HvdlmError) as caught:
        resolved(tmp_path / "model", "torch")
    assert expected in str(caught.value)


def test_sizes_that_contradict_the_folder_are_refused(tmp_path: Path) -> None:
    transformers_model("gpt2").save_pretrained(tmp_path)
    config = Config()
    config.model.pretrained, config.model.layers = str(tmp_path), 7
    with pytest.raises(HvdlmError, match=r"model.layers is 7, but .* has 3: leave --model.layers out"):
        base_weights.resolve(config)
    config.model.layers = 4
    with pytest.raises(HvdlmError, match=r"data\.context 64 is more than the 16 positions"):
        base_weights.resolve(config)
    config.data.context = 16
    with pytest.raises(HvdlmError, match=r"has no tokenizer\.json: name the model's tokenizer"):
        base_weights.resolve(config)


def test_models_unknown_to_transformers_are_not_exported(
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
