"""Hugging Face folders as a fuzz target: one JSON document describes all files of a folder."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
from pathlib import Path
from typing import Any

import ml_dtypes  # noqa: F401  imported here, so that no input is charged with its memory

from hvdlm.config import Config
from hvdlm_huggingface import metadata
from hvdlm_huggingface.folder import Folder
from hvdlm_language.presets import PRESETS

WORDS = (
    *("model_type", "gpt2", "llama", "vocab_size", "n_layer", "tie_word_embeddings", "quantization_config"),
    *("rope_scaling", "rope_parameters", "weight_map", "data_offsets", "BF16", "I8", "lm_head.weight", "wte.weight"),
    *(
        "gpt_neox",
        "qwen3",
        "layer_types",
        "head_dim",
        "factor",
        "rotary_pct",
        "eos_token_id",
        "n_ctx",
        "hidden_size",
        *metadata.COPIED,
    ),
)
_WEIGHTS, _SHARD = "model.safetensors", "model-00001-of-00001.safetensors"
_INDEX = "model.safetensors.index.json"
_BYTES = 1536  # of the tensors of a GPT-2 with a layer of width 4 and 8 ids, with a little to spare
_NORMS = {"ln_1.weight": [4], "ln_1.bias": [4], "ln_2.weight": [4], "ln_2.bias": [4]}
_ATTENTION = {"attn.c_attn.weight": [4, 12], "attn.c_attn.bias": [12], "attn.c_proj.weight": [4, 4]}
_MLP = {"mlp.c_fc.weight": [4, 16], "mlp.c_fc.bias": [16], "mlp.c_proj.weight": [16, 4], "mlp.c_proj.bias": [4]}
_PROJECTIONS = {"q_proj.weight": [4, 4], "k_proj.weight": [2, 4], "v_proj.weight": [2, 4], "o_proj.weight": [4, 4]}
_NEOX_LAYERS = {"input_layernorm": [4], "post_attention_layernorm": [4], "attention.dense": [4, 4]}
_NEOX_LAYERS |= {"attention.query_key_value": [12, 4], "mlp.dense_h_to_4h": [8, 4], "mlp.dense_4h_to_h": [4, 8]}
_SHAPES: dict[str, dict[str, list[int]]] = {
    "gpt2": {
        **{"transformer.wte.weight": [8, 4], "transformer.wpe.weight": [4, 4]},
        **{f"transformer.h.0.{name}": shape for name, shape in (_NORMS | _ATTENTION | _MLP).items()},
        **{"transformer.h.0.attn.c_proj.bias": [4], "transformer.ln_f.weight": [4], "transformer.ln_f.bias": [4]},
    },
    "llama": {
        **{"model.embed_tokens.weight": [8, 4], "model.norm.weight": [4], "lm_head.weight": [8, 4]},
        **{f"model.layers.0.self_attn.{name}": shape for name, shape in _PROJECTIONS.items()},
        **{f"model.layers.0.mlp.{name}_proj.weight": [8, 4] for name in ("gate", "up")},
        "model.layers.0.mlp.down_proj.weight": [4, 8],
        **{f"model.layers.0.{name}_layernorm.weight": [4] for name in ("input", "post_attention")},
    },
    "gpt_neox": {
        **{"gpt_neox.embed_in.weight": [8, 4], "embed_out.weight": [8, 4]},
        **{f"gpt_neox.final_layer_norm.{kind}": [4] for kind in ("weight", "bias")},
        **{
            f"gpt_neox.layers.0.{name}.{kind}": shape if kind == "weight" else shape[:1]
            for name, shape in _NEOX_LAYERS.items()
            for kind in ("weight", "bias")
        },
    },
}
_SHAPES["qwen3"] = {**_SHAPES["llama"], **{f"model.layers.0.self_attn.{name}_norm.weight": [2] for name in "qk"}}


def read_a_folder(data: bytes, folder: Path) -> int:
    """Read ``data``, {file: its JSON}, as a Hugging Face folder: its model, all its weights, what lies beside them.

    Of safetensors files, ``data`` holds the headers. Anything else is read as config.json.
    """
    path = folder / "huggingface"
    shutil.rmtree(path, ignore_errors=True)
    path.mkdir()
    for name, content in _files_of(data).items():
        (path / name).write_bytes(content)
    config = Config()
    config.data.tokenizer, config.data.context = "byte", 4
    printed = io.StringIO()
    with contextlib.redirect_stderr(printed):
        opened = Folder(path)
        config = opened.resolve(config)
    assert all(line.isprintable() for line in printed.getvalue().split("\n")), printed.getvalue()
    assert config.model.vocab is not None
    spec = opened.attach(PRESETS[config.model.name](config.model, config.model.vocab, 4))
    for param in spec.params:
        assert param.source is not None
        assert param.source(param.name, tuple(slice(0, size) for size in param.shape)).shape == param.shape
    stop = metadata.stop_tokens(path, opened.content, config.model.vocab) or []
    assert all(0 <= number < config.model.vocab for number in stop)
    return len(spec.params) + len(stop) + len(metadata.copied_files(path)) + len(opened.fingerprint()) // 64


def _files_of(data: bytes) -> dict[str, bytes]:
    """Return the files that ``data`` describes; those with weights hold zeros."""
    try:
        files = json.loads(data)
    except (ValueError, RecursionError):
        return {"config.json": data}
    if not isinstance(files, dict) or not files.keys() <= {*metadata.COPIED, "config.json", _INDEX, _WEIGHTS, _SHARD}:
        return {"config.json": data}
    texts = {name: json.dumps(value).encode() for name, value in files.items()}
    for name in {_WEIGHTS, _SHARD} & texts.keys():
        texts[name] = len(texts[name]).to_bytes(8, "little") + texts[name] + bytes(_BYTES)
    return texts


def seeds() -> list[bytes]:
    """Return folders of a GPT-2, a Llama, a Qwen 3 and a GPT-NeoX, in one file and with an index."""
    gpt2 = {"model_type": "gpt2", "vocab_size": 8, "n_positions": 4, "n_embd": 4, "n_layer": 1, "n_head": 2}
    llama = {"model_type": "llama", "vocab_size": 8, "max_position_embeddings": 4, "hidden_size": 4, "head_dim": 2}
    llama |= {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 8}
    llama |= {"rope_parameters": {"rope_type": "default", "rope_theta": 500.0}, "hidden_act": "swish"}
    qwen3 = llama | {"model_type": "qwen3", "use_sliding_window": True, "layer_types": ["sliding_attention"]}
    scaled = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    qwen3 |= {"rope_parameters": scaled, "sliding_window": 3}
    neox = {
        "model_type": "gpt_neox",
        "vocab_size": 8,
        "max_position_embeddings": 4,
        "hidden_size": 4,
        "rotary_pct": 1.0,
    }
    neox |= {"num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    rest = {"generation_config.json": {"eos_token_id": [7, 9]}, "tokenizer_config.json": {"eos_token": "</s>"}}
    described = []
    for config in (gpt2 | {"n_ctx": 4}, llama | {"eos_token_id": 3}, qwen3, neox):
        header = _header(config)
        described.append({"config.json": config, _WEIGHTS: header, **rest})
        index = {"metadata": {}, "weight_map": dict.fromkeys(header, _SHARD)}
        described.append({"config.json": config, _SHARD: header, _INDEX: index})
    return [json.dumps(seed).encode() for seed in described]


def _header(config: dict[str, Any]) -> dict[str, Any]:
    """Return the header of a safetensors file with the tensors that transformers stores of a model."""
    header: dict[str, Any] = {}
    shapes = _SHAPES[config["model_type"]]
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + 4 * math.prod(shape)
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}
    left = _BYTES - end
    header["unused"] = {"dtype": "U8", "shape": [left], "data_offsets": [end, _BYTES]}
    return header
