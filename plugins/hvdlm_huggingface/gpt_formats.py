"""Formats of GPT-2 and GPT-NeoX: layernorm and biases everywhere."""

from __future__ import annotations

from typing import Any, ClassVar

from hvdlm_huggingface.fields import (
    EXACT_GELU,
    TANH_GELU,
    Fields,
    count,
    expect,
    number,
    rotary,
    rotary_fields,
    rotary_share,
    switch,
)
from hvdlm_huggingface.tensor_format import DROPOUT, SPECIAL, Format
from hvdlm_language.gpt import GPTSettings

_THIRDS = {"attention.query": (0, 3), "attention.key": (1, 3), "attention.value": (2, 3)}


class GPT2(Format):
    """GPT-2 (Radford et al. 2019); its linear layers hold ``[inputs, outputs]``."""

    name, preset, prefix, architecture, biased = "gpt2", "gpt2", "transformer.", "GPT2LMHeadModel", True
    aliases: ClassVar = {
        "n_embd": ("hidden_size",),
        "n_layer": ("num_hidden_layers",),
        "n_head": ("num_attention_heads",),
        "n_positions": ("max_position_embeddings", "n_ctx"),
    }
    buffers = r"\.attn\.(masked_)?bias"
    _outer: ClassVar = {"embed.tokens": "wte", "embed.positions": "wpe", "final_norm": "ln_f"}
    _layers = "h"
    _inner: ClassVar = {
        "attention_norm": "ln_1",
        "attention.query": "attn.c_attn",
        "attention.key": "attn.c_attn",
        "attention.value": "attn.c_attn",
        "attention.output": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp.up": "mlp.c_fc",
        "mlp.down": "mlp.c_proj",
    }
    _chunks: ClassVar = _THIRDS

    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` and ``context`` that ``config`` stands for."""
        expect(config, "activation_function", TANH_GELU, "gelu_new")
        expect(config, "scale_attn_weights", (True,), True)
        expect(config, "scale_attn_by_inverse_layer_idx", (False,), False)
        expect(config, "add_cross_attention", (False,), False)
        width = count(config, "n_embd")
        return {
            "name": self.name,
            "vocab": count(config, "vocab_size"),
            "layers": count(config, "n_layer"),
            "width": width,
            "heads": count(config, "n_head"),
            "kv_heads": None,
            "head_width": None,
            "window": 0,
            "mlp_width": count(config, "n_inner", 4 * width),
            "positions": "learned",
            "norm": "layernorm",
            "activation": "gelu",
            "bias": True,
            "qkv_bias": True,
            "qk_norm": False,
            "parallel_residual": False,
            "scale_embeddings": False,
            "tie_embeddings": switch(config, "tie_word_embeddings", True),
            "norm_epsilon": number(config, "layer_norm_epsilon", 1e-5),
            "context": count(config, "n_positions"),
        }

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        fixed = {"positions": "learned", "norm": "layernorm", "activation": "gelu", **_alike(s), "window": 0}
        return {**fixed, "qk_norm": False, "parallel_residual": False, "scale_embeddings": False}

    def config(self, s: GPTSettings) -> dict[str, Any]:
        """Return the content of config.json; biases that a model lacks are written as zeros."""
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "vocab_size": s.vocab,
            "n_positions": s.context,
            "n_embd": s.width,
            "n_layer": s.layers,
            "n_head": s.heads,
            "n_inner": s.mlp_width,
            "activation_function": "gelu_new",
            "layer_norm_epsilon": s.norm_epsilon,
            "tie_word_embeddings": s.tie_embeddings,
            **dict.fromkeys(DROPOUT, 0.0),
            **dict.fromkeys(SPECIAL[:2], None),
        }


class GPTNeoX(Format):
    """GPT-NeoX and Pythia (Black et al. 2022): queries, keys and values of a head lie together in one tensor."""

    name, preset, prefix, architecture, biased = "gpt_neox", "neox", "gpt_neox.", "GPTNeoXForCausalLM", True
    heads = ("embed_out", "lm_head")  # all versions of transformers read the first
    buffers = r"\.attention\.((masked_)?bias|rotary_emb\.inv_freq)$"
    _outer: ClassVar = {"embed.tokens": "embed_in", "final_norm": "final_layer_norm"}
    _layers, _transposed, _by_head = "layers", True, True
    _inner: ClassVar = {
        "attention_norm": "input_layernorm",
        **dict.fromkeys(_THIRDS, "attention.query_key_value"),
        "attention.output": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp.up": "mlp.dense_h_to_4h",
        "mlp.down": "mlp.dense_4h_to_h",
    }
    _chunks: ClassVar = _THIRDS

    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` and ``context`` that ``config`` stands for."""
        expect(config, "hidden_act", (*EXACT_GELU, *TANH_GELU), "gelu")
        expect(config, "attention_bias", (True,), True)
        context = count(config, "max_position_embeddings", 2048)
        return {
            "name": self.preset,
            "vocab": count(config, "vocab_size"),
            "layers": count(config, "num_hidden_layers"),
            "width": count(config, "hidden_size"),
            "heads": count(config, "num_attention_heads"),
            "kv_heads": None,
            "head_width": None,
            "window": 0,
            "mlp_width": count(config, "intermediate_size"),
            "positions": "rotary",
            "norm": "layernorm",
            "activation": "gelu" if config.get("hidden_act") in TANH_GELU else "gelu_exact",
            "bias": True,
            "qkv_bias": True,
            "qk_norm": False,
            "parallel_residual": switch(config, "use_parallel_residual", True),
            "scale_embeddings": False,
            "tie_embeddings": switch(config, "tie_word_embeddings", False),
            **rotary(config, context, "rotary_emb_base"),
            "rotary_share": rotary_share(config, "rotary_pct", 0.25),
            "norm_epsilon": number(config, "layer_norm_eps", 1e-5),
            "context": context,
        }

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        activation = "gelu" if s.activation == "gelu" else "gelu_exact"
        fixed = {"positions": "rotary", "norm": "layernorm", "activation": activation, **_alike(s), "window": 0}
        return {**fixed, "qk_norm": False, "scale_embeddings": False}

    def config(self, s: GPTSettings) -> dict[str, Any]:
        """Return the content of config.json; biases that a model lacks are written as zeros."""
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "vocab_size": s.vocab,
            "max_position_embeddings": s.context,
            "hidden_size": s.width,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "intermediate_size": s.mlp_width,
            "hidden_act": "gelu_new" if s.activation == "gelu" else "gelu",
            "layer_norm_eps": s.norm_epsilon,
            "use_parallel_residual": s.parallel_residual,
            "attention_bias": True,
            "rotary_emb_base": s.rotary_base,
            "rotary_pct": s.rotary_share,
            **rotary_fields(s, partial_rotary_factor=s.rotary_share),
            "tie_word_embeddings": s.tie_embeddings,
            **dict.fromkeys(SPECIAL, None),
        }


def _alike(s: GPTSettings) -> dict[str, Any]:
    """Return the settings of heads where all have keys of their own and share the model's width."""
    return {"kv_heads": s.heads, "heads_width": s.width}
