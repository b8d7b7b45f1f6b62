"""Hugging Face folders: imported and exported models have the same logits here and in transformers."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from safetensors.numpy import save_file

from builders import save_checkpoint, single_rank_trainable
from hvdlm import cli
from hvdlm.checkpoints import base_weights
from hvdlm.checkpoints.discovery import find
from hvdlm.checkpoints.load import open_checkpoint
from hvdlm.config import Config
from hvdlm.data.tokenizers import from_json
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import ModelSpec
from hvdlm.parallel.flat_layout import whole
from hvdlm.protocols.types import Batch
from hvdlm_backends.local import LocalWorld
from hvdlm_huggingface.export import export
from hvdlm_huggingface.folder import Folder
from hvdlm_huggingface.tokenizer_files import from_characters
from hvdlm_inference.generation import generate
from hvdlm_inference.sampling import Sampling
from hvdlm_language.presets import PRESETS
from launching import ROOT, environment, launch, losses, run_python

FRAMEWORKS = ["torch", "tensorflow"]
# Of Llama and models like it; of GPT-2, whose fields have other names, in place of these.
_SIZES = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 56}
_SIZES |= {"max_position_embeddings": 16}
_LIKE_LLAMA = {**_SIZES, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
_LIKE_LLAMA |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}}
# In 12 positions, a head's frequencies turn 1.9, 0.9, 0.4 and 0.2 times: one stays, one is between, two are divided.
_SCALED = {"rope_type": "llama3", "rope_theta": 20.0, "factor": 8.0, "original_max_position_embeddings": 12}
_SCALED |= {"low_freq_factor": 0.5, "high_freq_factor": 1.5}
_BIASED = {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}
_NEOX = {"rope_theta": 500.0, "partial_rotary_factor": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {"n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 16}),
    "llama": ("llama", _LIKE_LLAMA),
    "llama-tied-biased": ("llama", {**_LIKE_LLAMA, **_BIASED}),
    "llama3": ("llama", {**_LIKE_LLAMA, "rope_parameters": _SCALED, "head_dim": 8}),
    "qwen2": ("qwen2", {**_LIKE_LLAMA, "tie_word_embeddings": True}),
    "qwen2-window": ("qwen2", {**_LIKE_LLAMA, "use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}),
    "qwen3": ("qwen3", {**_LIKE_LLAMA, "head_dim": 12}),
    "mistral": ("mistral", {**_LIKE_LLAMA, "sliding_window": 5}),
    "mistral-no-window": ("mistral", {**_LIKE_LLAMA, "sliding_window": None, "head_dim": 12}),
    "neox": ("gpt_neox", {**_SIZES, "rope_parameters": _NEOX}),
    "neox-sequential": (
        "gpt_neox",
        {**_SIZES, "use_parallel_residual": False, "hidden_act": "gelu_fast", "tie_word_embeddings": True},
    ),
    "gemma": ("gemma", {**_LIKE_LLAMA, "num_key_value_heads": 1, "head_dim": 12}),
}
KINDS = list(MODELS)
TOKENS = np.array([[5, 3, 60, 0, 7, 11, 2, 2, 49]], np.int32)
TEXT = "To be, or not to be, that is the question.\n" * 30


def transformers_model(kind: str) -> Any:
    """Return a randomly initialised model of transformers, of 64 tokens and 16 positions."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    model_type, fields = MODELS[kind]
    config = AutoConfig.for_model(model_type, vocab_size=64, initializer_range=0.3, **copy.deepcopy(fields))
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():  # initial norms and biases have no effect
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def transformers_logits(model: Any) -> np.ndarray:
    """Return the logits of a transformers model after ``TOKENS``, float32 ``[vocab]``."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(TOKENS).long()).logits[0, -1].numpy()


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


class Imported(NamedTuple):
    """A model of transformers, the folder that transformers wrote of it, and the trainable that is made from it."""

    model: Any
    path: Path
    config: Config
    trainable: Any


@pytest.fixture(scope="module", params=[(kind, framework) for kind in KINDS for framework in FRAMEWORKS], ids="-".join)
def imported(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Imported:
    kind, framework = request.param
    model, path = transformers_model(kind), tmp_path_factory.mktemp(kind)
    model.save_pretrained(path)
    config, spec = resolved(path, framework)
    return Imported(model, path, config, single_rank_trainable(spec, config))


def test_transformers_models_have_the_same_logits_here(imported: Imported) -> None:
    expected = transformers_logits(imported.model)
    assert np.abs(expected).max() > 1
    np.testing.assert_allclose(imported.trainable.logits(TOKENS)[0][0], expected, atol=1e-4, rtol=0)
    shorter = logits(imported.path, imported.config.framework, context=9)
    np.testing.assert_allclose(shorter, expected, atol=1e-4, rtol=0)


def test_batches_are_scored_as_by_transformers(imported: Imported) -> None:
    """Training computes attention in another way than generation, which has a cache."""
    import torch

    tokens = np.random.default_rng(2).integers(0, 64, (3, 16)).astype(np.int32)
    scores = imported.trainable.predict(Batch(tokens, tokens))
    with torch.no_grad():
        expected = imported.model(torch.from_numpy(tokens).long()).logits.numpy()
    np.testing.assert_allclose(scores, expected, atol=1e-4, rtol=0)


def test_greedy_tokens_are_those_of_transformers(imported: Imported) -> None:
    import torch

    prompt = TOKENS[0, :4]
    given = torch.from_numpy(prompt[None]).long()
    greedy = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    with torch.no_grad():
        output = imported.model.generate(given, attention_mask=torch.ones_like(given), **greedy)
    expected = output[0, 4:].tolist()
    assert list(generate(imported.trainable, prompt, 12, 16, Sampling(temperature=0))) == expected


def test_transformers_loads_what_is_exported(imported: Imported, tmp_path: Path) -> None:
    """Untrained: every tensor is that of the folder, with which the model began."""
    from transformers import AutoModelForCausalLM

    meta = {"config": imported.config.to_dict(), "vocab": 64, "tokenizer": "none"}
    state = imported.trainable.state()
    shards = {name: whole(array.shape) for name, array in state.items()}
    checkpoint = open_checkpoint(save_checkpoint(tmp_path / "run", 1, state, meta, LocalWorld(), shards))
    export(checkpoint, None, tmp_path / "out")
    exported, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(exported) is type(imported.model)
    assert not report["missing_keys"] and not report["unexpected_keys"]
    np.testing.assert_allclose(transformers_logits(exported), transformers_logits(imported.model), atol=1e-6)
    kept, written = imported.model.state_dict(), exported.state_dict()
    assert kept.keys() == written.keys()
    for name, tensor in written.items():
        np.testing.assert_allclose(tensor, kept[name], atol=1e-6, err_msg=name)


@pytest.mark.parametrize("kind", ["gpt2", "neox", "gemma"])
def test_any_box_of_a_parameter_is_read(tmp_path: Path, kind: str) -> None:
    """Of tensors that hold several parameters, too: side by side, and head by head."""
    transformers_model(kind).save_pretrained(tmp_path)
    random = np.random.default_rng(0)
    for param in resolved(tmp_path, "torch")[1].params:
        array = param.initial_box(0, whole(param.shape).slices)
        assert array.shape == param.shape and array.dtype == np.float32
        for _ in range(3):
            box = tuple(slice(*sorted(random.integers(0, size + 1, 2))) for size in param.shape)
            np.testing.assert_array_equal(param.initial_box(0, box), array[box], err_msg=f"{param.name} {box}")


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


@pytest.mark.parametrize("framework, kind", [("torch", "neox"), ("tensorflow", "llama")])
def test_fine_tuning_starts_from_a_folder_and_resumes_without_it(tmp_path: Path, framework: str, kind: str) -> None:
    """On 2 tensor ranks, each of which reads its slices; the vocabulary is larger than the tokenizer."""
    start, text, run = tmp_path / "start", tmp_path / "text.txt", tmp_path / "run"
    text.write_text(TEXT)
    write_pretrained(kind, start)
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
    "another model": (lambda p: changed(p, model_type="bert"), "holds a 'bert' model, hvdlm reads gpt2, llama,"),
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


_YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0}
UNSUPPORTED: list[tuple[str, dict[str, Any], str]] = [
    ("llama", {"rope_parameters": _YARN}, "its rope_type is 'yarn', hvdlm's positions are 'default' or 'llama3'"),
    ("llama", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "its rope_type is 'linear'"),
    ("llama3", {"rope_parameters": {"rope_type": "llama3"}}, "'factor' is missing"),
    ("llama", {"partial_rotary_factor": 0.5}, "its partial_rotary_factor is 0.5"),
    ("llama", {"attention_bias": True}, "its attention_bias and mlp_bias differ"),
    ("qwen2-window", {"max_window_layers": 1, "layer_types": None}, "only some of its layers have a sliding window"),
    ("qwen3", {"attention_bias": True}, "its attention_bias is 'True', hvdlm's models have False"),
    ("qwen3", {"num_key_value_heads": 3}, "model.heads 4 is not a multiple of model.kv_heads 3"),
    ("mistral", {"sliding_window": 0}, "its sliding_window is '0', expected a whole number above 0"),
    ("neox", {"attention_bias": False}, "its attention_bias is 'False', hvdlm's models have True"),
    ("neox", {"rope_parameters": {"partial_rotary_factor": 0.4}}, "rotary positions need an even width per head"),
    ("gemma", {"hidden_act": "silu"}, "its hidden_act is 'silu'"),
    ("gemma", {"use_bidirectional_attention": True}, "its use_bidirectional_attention is 'True'"),
]


@pytest.mark.parametrize(
    "kind, fields, expected", UNSUPPORTED, ids=[f"{kind}-{next(iter(f))}" for kind, f, _ in UNSUPPORTED]
)
def test_unsupported_fields_are_named(tmp_path: Path, kind: str, fields: dict[str, Any], expected: str) -> None:
    transformers_model(kind).save_pretrained(tmp_path / "model")
    changed(tmp_path / "model", **fields)
    with pytest.raises(HvdlmError) as caught:
        resolved(tmp_path / "model", "torch")
    assert expected in str(caught.value) and len(str(caught.value)) < 400 + len(str(tmp_path))


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
