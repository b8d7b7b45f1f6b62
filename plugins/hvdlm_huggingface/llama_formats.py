"""Formats of Llama and of models like it: rotary positions, RMS norms, gated feed-forward layers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

from hvdlm_huggingface.fields import (
    SILU,
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
from hvdlm_huggingface.tensor_format import SPECIAL, Format
from hvdlm_language.gpt import GPTSettings


class Llama(Format):
    """Llama (Touvron et al. 2023), and 3.1 with its scaled positions; linear layers hold ``[outputs, inputs]``."""

    name, preset, prefix, architecture = "llama", "llama", "model.", "LlamaForCausalLM"
    buffers = r"\.rotary_emb\.inv_freq"
    _outer: ClassVar = {"embed.tokens": "embed_tokens", "final_norm": "norm"}
    _layers, _transposed = "layers", True
    _inner: ClassVar = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.query_norm": "self_attn.q_norm",
        "attention.key_norm": "self_attn.k_norm",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }
    # What transformers computes with where config.json has no such field.
    _head_dim: ClassVar[int | None] = None  # None: hidden_size / num_attention_heads
    _kv_heads: ClassVar[int | None] = None  # None: as many as heads
    _tied: ClassVar[bool] = False
    # The settings of the architecture that differ from Llama's.
    _own: ClassVar[Mapping[str, Any]] = {}

    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` and ``context`` that ``config`` stands for."""
        self._check_activation(config)
        if (share := rotary_share(config, "partial_rotary_factor", 1.0)) != 1:
            raise ValueError(f"its partial_rotary_factor is {share:g}, hvdlm's models of this kind rotate whole heads")
        width, heads = count(config, "hidden_size"), count(config, "num_attention_heads")
        context, layers = count(config, "max_position_embeddings"), count(config, "num_hidden_layers")
        kv_heads = heads if "num_key_value_heads" in config else self._kv_heads or heads
        return {
            "name": self.preset,
            "vocab": count(config, "vocab_size"),
            "layers": layers,
            "width": width,
            "heads": heads,
            "kv_heads": count(config, "num_key_value_heads", kv_heads),
            "head_width": count(config, "head_dim", self._head_dim or max(1, width // heads)),
            "window": self._window(config, layers),
            "mlp_width": count(config, "intermediate_size"),
            "positions": "rotary",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "qk_norm": False,
            "parallel_residual": False,
            "scale_embeddings": False,
            **self._own,
            **self._biases(config),
            "tie_embeddings": switch(config, "tie_word_embeddings", self._tied),
            **rotary(config, context),
            "rotary_share": 1.0,
            "norm_epsilon": number(config, "rms_norm_eps", 1e-6),
            "context": context,
        }

    def _check_activation(self, config: Fields) -> None:
        expect(config, "hidden_act", SILU, "silu")

    def _biases(self, config: Fields) -> dict[str, bool]:
        bias = switch(config, "attention_bias", False)
        if switch(config, "mlp_bias", False) != bias:
            raise ValueError("its attention_bias and mlp_bias differ")
        return {"bias": bias, "qkv_bias": bias}

    def _window(self, config: Fields, layers: int) -> int:
        return 0

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        return {
            "positions": "rotary",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "rotary_share": 1.0,
            "qk_norm": False,
            "parallel_residual": False,
            "scale_embeddings": False,
            "window": 0,
            "width": s.width // s.heads * s.heads,
            "qkv_bias": s.bias,
        }

    def config(self, s: GPTSettings) -> dict[str, Any]:
        """Return the content of config.json."""
        return {
            "model_type": self.name,
            "architectures": [self.architecture],
            "vocab_size": s.vocab,
            "max_position_embeddings": s.context,
            "hidden_size": s.width,
            "num_hidden_layers": s.layers,
            "num_attention_heads": s.heads,
            "num_key_value_heads": s.kv_heads,
            "head_dim": s.head_width,
            "intermediate_size": s.mlp_width,
            "rms_norm_eps": s.norm_epsilon,
            "rope_theta": s.rotary_base,
            **rotary_fields(s),
            "tie_word_embeddings": s.tie_embeddings,
            **dict.fromkeys(SPECIAL, None),
            **self._own_fields(s),
        }

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        """Return the fields that other architectures don't have, or with another meaning."""
        return {"hidden_act": "silu", "attention_bias": s.bias, "mlp_bias": s.bias}


class _Unbiased(Llama):
    """A model without biases, but perhaps those of queries, keys and values."""

    _qkv_bias: ClassVar[bool] = False

    def _biases(self, config: Fields) -> dict[str, bool]:
        if not self._qkv_bias:  # else, transformers reads no such field
            expect(config, "attention_bias", (False,), False)
        return {"bias": False, "qkv_bias": self._qkv_bias}

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        return {**super().fixed(s), "width": s.width, "bias": False, "qkv_bias": self._qkv_bias, **self._own}

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        return {"hidden_act": "silu"}


class Mistral(_Unbiased):
    """Mistral (Jiang et al. 2023): every layer has a sliding window."""

    name, preset, architecture = "mistral", "mistral", "MistralForCausalLM"
    _kv_heads = 8

    def _window(self, config: Fields, layers: int) -> int:
        if config.get("sliding_window") is None:
            return 0 if "sliding_window" in config else 4096
        return count(config, "sliding_window")

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        return {**super().fixed(s), "window": s.window}

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        return {**super()._own_fields(s), "sliding_window": s.window or None}


class Qwen2(_Unbiased):
    """Qwen 2 and 2.5 (Yang et al. 2024): biases of queries, keys and values only, optionally a sliding window."""

    name, preset, architecture = "qwen2", "qwen2", "Qwen2ForCausalLM"
    _kv_heads, _qkv_bias = 32, True

    def _window(self, config: Fields, layers: int) -> int:
        """Return the window of all layers.

        Raises:
            ValueError: only some of them have one.
        """
        window, first = count(config, "sliding_window", 4096), config.get("max_window_layers", 28)
        types = config.get("layer_types")
        if not switch(config, "use_sliding_window", False):
            return 0
        if type(first) is not int:
            raise ValueError(f"its max_window_layers is {str(first)[:40]!r}, expected a whole number")
        sliding = max(0, layers - max(0, first))  # the last ones
        if isinstance(types, list):
            layers, sliding = len(types), types.count("sliding_attention")
        if 0 < sliding < layers:
            raise ValueError("only some of its layers have a sliding window (layer_types, max_window_layers)")
        return window if sliding else 0

    def fixed(self, s: GPTSettings) -> dict[str, Any]:
        """Return the settings that models of this architecture have, of those that ``s`` may have otherwise."""
        return {**super().fixed(s), "window": s.window}

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        kind = "sliding_attention" if s.window else "full_attention"
        return {
            **super()._own_fields(s),
            "use_sliding_window": s.window > 0,
            "sliding_window": s.window or None,
            "max_window_layers": 0 if s.window else s.layers,
            "layer_types": [kind] * s.layers,
        }


class Qwen3(Qwen2):
    """Qwen 3 (Yang et al. 2025): normalised queries and keys, no biases."""

    name, preset, architecture = "qwen3", "qwen3", "Qwen3ForCausalLM"
    _head_dim, _qkv_bias = 128, False
    _own: ClassVar = {"qk_norm": True}

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        return {**super()._own_fields(s), "attention_bias": False}


class Gemma(_Unbiased):
    """Gemma (Gemma Team 2024): scaled embeddings, GeGLU; norms hold the difference of their scale from 1."""

    name, preset, architecture = "gemma", "gemma", "GemmaForCausalLM"
    _head_dim, _kv_heads, _tied, _norm_offset = 256, 16, True, 1.0
    _own: ClassVar = {"activation": "geglu", "scale_embeddings": True}

    def _check_activation(self, config: Fields) -> None:
        # Its first folders have "gelu" and mean the approximation; transformers reads no hidden_activation.
        expect(config, "hidden_act", ("gelu", *TANH_GELU), "gelu_pytorch_tanh")
        expect(config, "hidden_activation", (None, "gelu_pytorch_tanh"), None)
        expect(config, "use_bidirectional_attention", (None, False), None)

    def _own_fields(self, s: GPTSettings) -> dict[str, Any]:
        return {"hidden_act": "gelu_pytorch_tanh", "attention_bias": False}
