"""Hugging Face folders, in and out: precedence, metadata, special tokens, and every tensor and field accounted for."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_huggingface import TEXT, logits, resolved, transformers_logits, transformers_model

from builders import both_frameworks, edit_json, file_names, read_json
from hvdlm import cli
from hvdlm.config import Config
from hvdlm.errors import HvdlmError
from hvdlm_huggingface.folder import Folder
from launching import run_python

PHRASE = "To be, or not"
STOP = "<|endoftext|>"


def loaded_logits(path: Path) -> np.ndarray:
    """Return the logits after ``TOKENS`` of the model that transformers loads from a folder."""
    from transformers import AutoModelForCausalLM

    return transformers_logits(AutoModelForCausalLM.from_pretrained(path).eval())


def same_as_transformers(path: Path, framework: str = "torch") -> None:
    """Check that a folder's model has the logits that it has in transformers."""
    np.testing.assert_allclose(logits(path, framework), loaded_logits(path), atol=1e-4, rtol=0)


def changed_tensors(path: Path, change: Callable[[dict[str, np.ndarray]], object]) -> None:
    """Apply ``change``, which works in place, to the tensors of a folder."""
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors", {"format": "pt"})


def renamed(path: Path, **names: str) -> None:
    """Rename fields of a folder's config.json: {name: new name}."""
    edit_json(path / "config.json", lambda c: c.update({new: c.pop(old) for old, new in names.items()}))


def saved_model(path: Path, kind: str, **config: Any) -> Path:
    """Write a folder of a small model, with some fields of its config.json changed."""
    transformers_model(kind).save_pretrained(path)
    edit_json(path / "config.json", lambda c: c.update(config))
    return path


# Import: what transformers computes from the same folder


def test_one_file_wins_over_an_index_as_in_transformers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = transformers_model("gpt2")
    model.save_pretrained(tmp_path, max_shard_size="30KB")
    saved_model(tmp_path / "one", "gpt2")
    changed_tensors(tmp_path / "one", lambda t: t.update({"transformer.wte.weight": t["transformer.wte.weight"] * 2}))
    shutil.copy(tmp_path / "one" / "model.safetensors", tmp_path)
    same_as_transformers(tmp_path)
    assert "files that are not used: model-00001-of-" in capsys.readouterr().err


@pytest.mark.parametrize("outer", [None, 10000.0])
def test_the_nested_base_of_rotary_positions_counts(tmp_path: Path, outer: float | None) -> None:
    saved_model(tmp_path, "llama", rope_theta=outer, rope_parameters={"rope_type": "default", "rope_theta": 500.0})
    assert Folder(tmp_path).settings["rotary_base"] == 500
    same_as_transformers(tmp_path)
    edit_json(tmp_path / "config.json", lambda c: (c.pop("rope_parameters"), c.update(rope_theta=700.0)))
    assert Folder(tmp_path).settings["rotary_base"] == 700
    same_as_transformers(tmp_path)


@both_frameworks
def test_a_head_that_differs_from_a_tied_embedding_is_used(
    tmp_path: Path, framework: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved_model(tmp_path, "llama", tie_word_embeddings=True)
    config, _ = resolved(tmp_path, framework)
    assert config.model.tie_embeddings is False
    assert "lm_head.weight differs from model.embed_tokens.weight, although" in capsys.readouterr().err
    same_as_transformers(tmp_path, framework)
    config = Config()
    config.model.pretrained, config.model.tie_embeddings, config.data.context = str(tmp_path), True, 16
    config.data.tokenizer = "byte"
    assert Folder(tmp_path).resolve(config).model.tie_embeddings is True
    assert "and is not used, since model.tie_embeddings is true" in capsys.readouterr().err
    changed_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].copy()}))
    assert resolved(tmp_path, framework)[0].model.tie_embeddings is True
    assert "differs" not in capsys.readouterr().err


def test_a_tied_embedding_may_be_stored_as_the_head_alone(tmp_path: Path) -> None:
    saved_model(tmp_path, "gpt2")
    changed_tensors(tmp_path, lambda t: t.update({"lm_head.weight": t.pop("transformer.wte.weight")}))
    assert resolved(tmp_path, "torch")[0].model.tie_embeddings is True
    same_as_transformers(tmp_path)


def test_names_of_activations_and_fields_follow_transformers(tmp_path: Path) -> None:
    """Names that transformers takes for the same: its aliases, and activations that compute the same function."""
    gpt2 = saved_model(tmp_path / "gpt2", "gpt2")
    for name in ("gelu_fast", "gelu_accurate", "gelu_python_tanh"):
        edit_json(gpt2 / "config.json", lambda c, name=name: c.update(activation_function=name))
        same_as_transformers(gpt2)
    renamed(gpt2, n_embd="hidden_size", n_layer="num_hidden_layers", n_head="num_attention_heads")
    same_as_transformers(gpt2)
    renamed(gpt2, n_positions="n_ctx")  # of OpenAI's first folders; the position table has as many rows
    np.testing.assert_allclose(logits(gpt2, "torch"), transformers_logits(transformers_model("gpt2")), atol=1e-4)
    llama = saved_model(tmp_path / "llama", "llama", hidden_act="swish")
    same_as_transformers(llama)


def test_unused_fields_tensors_and_files_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    saved_model(tmp_path, "gpt2", n_unheard_of=3, n_ctx=16, task_specific_params={"a": 1})
    resolved(tmp_path, "torch")
    assert capsys.readouterr().err.count("not used") == 1
    extra = {"transformer.h.9.ln_1.weight": np.ones(3, np.float32), "transformer.h.0.attn.bias": np.ones(3, np.float32)}
    changed_tensors(tmp_path, lambda t: t.update(extra))
    (tmp_path / "pytorch_model.bin").touch()
    (tmp_path / "adapter_model.safetensors").touch()
    resolved(tmp_path, "torch")
    printed = capsys.readouterr().err
    assert "fields of config.json that are not used: n_unheard_of\n" in printed
    assert "tensors that are not used: transformer.h.9.ln_1.weight\n" in printed
    assert "files that are not used: adapter_model.safetensors, pytorch_model.bin\n" in printed


def test_models_stored_in_another_form_are_refused(tmp_path: Path) -> None:
    saved_model(tmp_path, "gpt2", quantization_config={"quant_method": "gptq"})
    with pytest.raises(HvdlmError, match="has quantization_config, which hvdlm doesn't read"):
        resolved(tmp_path, "torch")
    saved_model(tmp_path, "gpt2")
    changed_tensors(tmp_path, lambda t: t.update({"transformer.ln_f.weight": np.ones(32, np.int8)}))
    with pytest.raises(HvdlmError, match=r"transformer.ln_f.weight holds I8, hvdlm reads F64.*quantised weights"):
        resolved(tmp_path, "torch")


CLAIMS = [{"n_layer": 2 * 10**9}, {"n_layer": 5 * 10**6}, {"vocab_size": 2 * 10**9}, {"n_embd": 2**31 - 32}]


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: next(iter(claim)))
def test_claimed_sizes_are_checked_before_they_are_built(tmp_path: Path, claim: dict[str, int]) -> None:
    saved_model(tmp_path, "gpt2", **claim)
    with pytest.raises(HvdlmError, match=r"its config.json asks for .*: download the folder again"):
        resolved(tmp_path, "torch")


def test_links_within_a_repository_of_the_hub_are_read(tmp_path: Path) -> None:
    hub = tmp_path / "hub"
    repository = hub / "models--some--name"
    snapshot = repository / "snapshots" / "0123abc"
    snapshot.mkdir(parents=True)
    saved_model(repository / "blobs", "gpt2")
    for name in file_names(repository / "blobs"):
        (snapshot / name).symlink_to(f"../../blobs/{name}")
    same_as_transformers(snapshot)
    (tmp_path / "short").symlink_to(snapshot)
    same_as_transformers(tmp_path / "short")
    shutil.copy(repository / "blobs" / "model.safetensors", hub)
    for target, name in (("../../../model.safetensors", "model.safetensors"), ("/etc/passwd", "config.json")):
        (snapshot / name).unlink()
        (snapshot / name).symlink_to(target)
        with pytest.raises(HvdlmError, match=f"{name} is a symbolic link that leads out of its folder"):
            resolved(snapshot, "torch")


# Export


def pretrained_folder(path: Path, kind: str) -> Path:
    """Write a folder with all that accompanies weights; its tokenizer knows ``TEXT`` and a control token."""
    from transformers import AutoTokenizer, GenerationConfig

    from hvdlm_corpora.bpe_tokenizer import BPETokenizer

    transformers_model(kind).save_pretrained(path)
    description = BPETokenizer.train([TEXT], 260).to_json()["description"]
    size = len(description["model"]["vocab"])
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    description["added_tokens"] = [{"id": size, "content": STOP, **flags}]
    (path / "tokenizer.json").write_text(json.dumps(description))
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": STOP, "bos_token": STOP}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = AutoTokenizer.from_pretrained(path)
    tokenizer.chat_template = "{{ messages[0]['content'] }}!"
    tokenizer.save_pretrained(path)
    GenerationConfig(eos_token_id=[size], bos_token_id=size, max_new_tokens=7).save_pretrained(path)
    resized(path, kind, size + 1)
    return path


def resized(path: Path, kind: str, vocab: int) -> None:
    """Give a folder's model the vocabulary of its tokenizer, and its special tokens."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path)
    model.resize_token_embeddings(vocab)
    model.config.bos_token_id = model.config.eos_token_id = vocab - 1
    model.config.attn_pdrop = 0.25
    generation = (path / "generation_config.json").read_bytes()
    model.save_pretrained(path)
    (path / "generation_config.json").write_bytes(generation)


def tuned(start: Path, run: Path, framework: str, *options: str) -> Path:
    """Train a folder's model on ``TEXT`` for 2 steps, with a context of 8 of its 16 positions."""
    text = run.parent / "text.txt"
    text.write_text(TEXT)
    data = ["--data.path", str(text), "--data.context", "8", "--data.cache", str(run.parent / "cache")]
    train = ["--train.steps", "2", "--train.batch_size", "4", "--train.warmup", "0", "--checkpoint.every", "2"]
    model = ["--model.pretrained", str(start), "--log.run", str(run), "--framework", framework]
    done = run_python(["-m", "hvdlm", *model, *data, *train, *options], timeout=200)
    assert done.returncode == 0, done.stderr[-3000:]
    return run


def exported(run: Path, out: Path, *options: str) -> int:
    """Export a run; return the exit code."""
    return cli.main(["convert", "--run", str(run), "--format", "huggingface", "--output", str(out), *options])


@pytest.mark.parametrize("framework, kind", [("torch", "gpt2"), ("tensorflow", "llama")])
def test_an_export_keeps_what_the_folder_held_beside_weights(
    tmp_path: Path, framework: str, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    start, out = pretrained_folder(tmp_path / "start", kind), tmp_path / "out"
    run = tuned(start, tmp_path / "run", framework)
    stored = read_json(start / "config.json")
    assert exported(run, out) == 0
    assert f"bpe tokenizer, special tokens and settings of {start}" in capsys.readouterr().out
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (out / name).read_bytes() == (start / name).read_bytes(), name
    replaced = {"dtype", "torch_dtype", "transformers_version", "architectures", "_name_or_path", "n_inner"}
    written = read_json(out / "config.json")
    assert {k: v for k, v in stored.items() if k not in replaced and written[k] != v} == {}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.config.max_position_embeddings == 16 and model.generation_config.max_new_tokens == 7
    assert tokenizer.eos_token == STOP and tokenizer.apply_chat_template([{"content": "x"}], tokenize=False) == "x!"
    if kind == "gpt2":
        before, after = (load_file(f / "model.safetensors")["transformer.wpe.weight"] for f in (start, out))
        np.testing.assert_array_equal(after[8:], before[8:])
        assert (after[:8] != before[:8]).any()
    # Again, into the same folder: its files are replaced. Training from it gives the same model.
    shutil.copytree(out, tmp_path / "first")
    assert exported(run, out) == 0
    for name in file_names(out):
        assert (out / name).read_bytes() == (tmp_path / "first" / name).read_bytes(), name
    same_as_transformers(out, framework)


def test_large_weights_are_written_in_several_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each but those of one tensor below the limit; a later export into the folder leaves none of them."""
    run, out = tuned(pretrained_folder(tmp_path / "start", "llama"), tmp_path / "run", "torch"), tmp_path / "out"
    assert exported(run, out) == 0
    whole = load_file(out / "model.safetensors")
    assert exported(run, out, "--max_shard_bytes", "20000") == 0
    index = read_json(out / "model.safetensors.index.json")
    shards = {path.name: load_file(path) for path in out.glob("model-*.safetensors")}
    assert len(shards) > 2 and not (out / "model.safetensors").exists()
    assert all(len(tensors) == 1 or sum(t.nbytes for t in tensors.values()) <= 20_000 for tensors in shards.values())
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in whole.values())
    assert index["weight_map"].keys() == whole.keys()
    for name, file in index["weight_map"].items():
        np.testing.assert_array_equal(shards[file][name], whole[name])
    same_as_transformers(out)
    assert exported(run, out, "--max_shard_bytes", "30000") == 0
    assert len(list(out.glob("model-*"))) < len(shards)
    same_as_transformers(out)
    assert exported(run, out) == 0
    assert not list(out.glob("model-*")) and not (out / "model.safetensors.index.json").exists()
    for options in (["--max_shard_bytes", "0"], ["--max_shard_bytes", "9", "--format", "safetensors"]):
        assert exported(run, tmp_path / "no", *options) == 2
        assert "--max_shard_bytes" in capsys.readouterr().err


def test_an_export_without_the_folder_says_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    start = pretrained_folder(tmp_path / "start", "gpt2")
    run = tuned(start, tmp_path / "run", "torch")
    start.rename(tmp_path / "moved")
    assert exported(run, tmp_path / "out") == 0
    printed = capsys.readouterr().out
    assert f"without the special tokens, the chat template and the further positions of {start}" in printed
    config = read_json(tmp_path / "out" / "config.json")
    assert (config["n_positions"], config["eos_token_id"]) == (8, config["vocab_size"] - 1)
    assert exported(run, tmp_path / "whole", "--base", str(tmp_path / "moved")) == 0
    assert read_json(tmp_path / "whole" / "config.json")["n_positions"] == 16
    edit_json(tmp_path / "moved" / "config.json", lambda c: c.update(n_head=2))
    assert exported(run, tmp_path / "other", "--base", str(tmp_path / "moved")) == 2
    assert "holds another model: its heads is 2, not 4" in capsys.readouterr().err


def test_special_tokens_of_another_tokenizer_are_not_kept(tmp_path: Path) -> None:
    start, out = pretrained_folder(tmp_path / "start", "llama"), tmp_path / "out"
    run = tuned(start, tmp_path / "run", "torch", "--data.tokenizer", "byte", "--model.stop_tokens", "[10]")
    assert exported(run, out) == 0
    config = read_json(out / "config.json")
    assert (config["bos_token_id"], config["eos_token_id"]) == (None, 10)
    assert file_names(out) == ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]


def test_an_export_replaces_only_earlier_exports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Old shards and their index would be read in place of the new file by some tools, and other files are not ours."""
    start = pretrained_folder(tmp_path / "start", "gpt2")
    run = tuned(start, tmp_path / "run", "torch")
    old = tmp_path / "old"
    transformers_model("gpt2").save_pretrained(old, max_shard_size="30KB")
    names, config = file_names(old), (old / "config.json").read_bytes()
    assert exported(run, old) == 2
    assert "--output" in (printed := capsys.readouterr().err) and "which no export wrote: name a folder that" in printed
    assert file_names(old) == names and (old / "config.json").read_bytes() == config
    assert exported(run, start) == 2
    assert "training started from this folder" in capsys.readouterr().err
    out = tmp_path / "out"
    assert exported(run, out) == 0
    (out / "README.md").write_text("mine")
    assert exported(run, out) == 2
    assert "it holds README.md, which no export wrote" in capsys.readouterr().err
    (out / "README.md").unlink()
    os.rename(out / "model.safetensors", out / ".model.safetensors.partial")  # as an interrupted export leaves it
    for name in ("config.json", *(n for n in file_names(out) if not n.startswith("."))):
        (out / name).unlink(missing_ok=True)
    assert exported(run, out) == 0
