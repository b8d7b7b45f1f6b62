"""Formats of GPT-2 and Llama in Hugging Face transformers: fields of config.json, and names of tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from hvdlm_huggingface.fields import Fields
from hvdlm_language.gpt import GPTSettings

# transformers/activations.py: classes that compute the same function.
_TANH_GELU = ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_pytorch_tanh", "gelu_python_tanh")
_SILU = ("silu", "swish")
_DROPOUT, _SPECIAL = ("resid_pdrop", "embd_pdrop", "attn_pdrop"), ("bos_token_id", "eos_token_id", "pad_token_id")

INERT = {*_DROPOUT, *_SPECIAL}
"""Fields of ``Format.config`` without effect on logits: those of a folder that training started from count."""


@dataclass(frozen=True)
class TensorLocation:
    """The tensor that holds a parameter.

    Attributes:
        tensor: its name in the file.
        transposed: whether the file holds it as ``[outputs, inputs]``.
        chunk: (index, count) of the parameter among those that lie side by side along the last dimension.
    """

    tensor: str
    transposed: bool = False
    chunk: tuple[int, int] = (0, 1)


class Format(ABC):
    """The format of one architecture.

    Attributes:
        name: ``model_type`` in config.json, and the name of hvdlm's preset.
        prefix: how the names of the base model's tensors begin.
        architecture: class in transformers.
        biased: whether all layers have biases.
        aliases: {field of config.json: other names under which transformers, or its earlier versions, have it}.
        buffers: regular expression of tensors that are no parameters: hvdlm computes their values.
    """

    name: ClassVar[str]
    prefix: ClassVar[str]
    architecture: ClassVar[str]
    biased: ClassVar[bool] = False
    aliases: ClassVar[Mapping[str, tuple[str, ...]]] = {}
    buffers: ClassVar[str]
    _outer: ClassVar[Mapping[str, str]]  # outside of layers: {hvdlm's name: name in the base model}
    _layers: ClassVar[str]
    _inner: ClassVar[Mapping[str, str]]  # the same within a layer
    _chunks: ClassVar[Mapping[str, tuple[int, int]]] = {}
    _transposed: ClassVar[bool] = False

    @abstractmethod
    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` that a config.json stands for, and ``context``, its number of positions.

        Raises:
            ValueError: hvdlm's models don't compute such a model; KeyError: a field is missing.
        """

    @abstractmethod
    def unmet(self, s: GPTSettings) -> str | None:
        """Return the properties of this architecture that a model doesn't have, None if it has all of them."""

    @abstractmethod
    def config(self, s: GPTSettings) -> dict[str, Any]:
        """Return the content of config.json for a model with these settings."""

    def location(self, name: str) -> TensorLocation:
        """Return which tensor holds the parameter ``name``."""
        if name == "head.weight":
            return TensorLocation("lm_head.weight")
        if name.startswith("embed."):
            return TensorLocation(f"{self.prefix}{self._outer[name]}.weight")
        path, _, kind = name.rpartition(".")
        suffix = "bias" if kind == "bias" else "weight"
        if path in self._outer:
            return TensorLocation(f"{self.prefix}{self._outer[path]}.{suffix}")
        _, layer, inner = path.split(".", 2)
        tensor = f"{self.prefix}{self._layers}.{layer}.{self._inner[inner]}.{suffix}"
        return TensorLocation(tensor, self._transposed and kind == "weight", self._chunks.get(inner, (0, 1)))


class GPT2(Format):
    """GPT-2 (Radford et al. 2019); its linear layers hold ``[inputs, outputs]``."""

    name, prefix, architecture, biased = "gpt2", "transformer.", "GPT2LMHeadModel", True
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
    _chunks: ClassVar = {"attention.query": (0, 3), "attention.key": (1, 3), "attention.value": (2, 3)}

    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` and ``context`` that ``config`` stands for."""
        _expect(config, "activation_function", _TANH_GELU, "gelu_new")
        _expect(config, "scale_attn_weights", (True,), True)
        _expect(config, "scale_attn_by_inverse_layer_idx", (False,), False)
        _expect(config, "add_cross_attention", (False,), False)
        width = _count(config, "n_embd")
        return {
            "name": self.name,
            "vocab": _count(config, "vocab_size"),
            "layers": _count(config, "n_layer"),
            "width": width,
            "heads": _count(config, "n_head"),
            "kv_heads": None,
            "mlp_width": _count(config, "n_inner", 4 * width),
            "positions": "learned",
            "norm": "layernorm",
            "activation": "gelu",
            "bias": True,
            "tie_embeddings": _switch(config, "tie_word_embeddings", True),
            "norm_epsilon": _number(config, "layer_norm_epsilon", 1e-5),
            "context": _count(config, "n_positions"),
        }

    def unmet(self, s: GPTSettings) -> str | None:
        """Return the properties of GPT-2 that a model doesn't have, None if it has all of them."""
        if (s.positions, s.norm, s.activation) != ("learned", "layernorm", "gelu"):
            return "learned positions, layernorm and gelu"
        return None if s.kv_heads == s.heads else "as many key-value heads as heads"

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
            **dict.fromkeys(_DROPOUT, 0.0),
            **dict.fromkeys(_SPECIAL[:2], None),
        }


class Llama(Format):
    """Llama (Touvron et al. 2023); its linear layers hold ``[outputs, inputs]``."""

    name, prefix, architecture = "llama", "model.", "LlamaForCausalLM"
    buffers = r"\.rotary_emb\.inv_freq"
    _outer: ClassVar = {"embed.tokens": "embed_tokens", "final_norm": "norm"}
    _layers, _transposed = "layers", True
    _inner: ClassVar = {
        "attention_norm": "input_layernorm",
        "attention.query": "self_attn.q_proj",
        "attention.key": "self_attn.k_proj",
        "attention.value": "self_attn.v_proj",
        "attention.output": "self_attn.o_proj",
        "mlp_norm": "post_attention_layernorm",
        "mlp.gate": "mlp.gate_proj",
        "mlp.up": "mlp.up_proj",
        "mlp.down": "mlp.down_proj",
    }

    def settings(self, config: Fields) -> dict[str, Any]:
        """Return the fields of ``ModelConfig`` and ``context`` that ``config`` stands for."""
        _expect(config, "hidden_act", _SILU, "silu")
        width, heads = _count(config, "hidden_size"), _count(config, "num_attention_heads")
        if _count(config, "head_dim", width // heads) * heads != width:
            raise ValueError("its head_dim is not hidden_size / num_attention_heads")
        bias = _switch(config, "attention_bias", False)
        if _switch(config, "mlp_bias", False) != bias:
            raise ValueError("its attention_bias and mlp_bias differ")
        kv_heads = _count(config, "num_key_value_heads", heads)
        return {
            "name": self.name,
            "vocab": _count(config, "vocab_size"),
            "layers": _count(config, "num_hidden_layers"),
            "width": width,
            "heads": heads,
            "kv_heads": kv_heads,
            "mlp_width": _count(config, "intermediate_size"),
            "positions": "rotary",
            "norm": "rmsnorm",
            "activation": "swiglu",
            "bias": bias,
            "tie_embeddings": _switch(config, "tie_word_embeddings", False),
            "rotary_base": _rotary_base(config),
            "norm_epsilon": _number(config, "rms_norm_eps", 1e-6),
            "context": _count(config, "max_position_embeddings"),
        }

    def unmet(self, s: GPTSettings) -> str | None:
        """Return the properties of Llama that a model doesn't have, None if it has all of them."""
        if (s.positions, s.norm, s.activation) != ("rotary", "rmsnorm", "swiglu"):
            return "rotary positions, rmsnorm and swiglu"
        return None

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
            "hidden_act": "silu",
            "rms_norm_eps": s.norm_epsilon,
            "rope_theta": s.rotary_base,
            "rope_parameters": {"rope_type": "default", "rope_theta": s.rotary_base},
            "attention_bias": s.bias,
            "mlp_bias": s.bias,
            "tie_word_embeddings": s.tie_embeddings,
            **dict.fromkeys(_SPECIAL, None),
        }


FORMATS: dict[str, Format] = {architecture.name: architecture for architecture in (GPT2(), Llama())}


def _rotary_base(config: Fields) -> float:
    """Return the base of rotary positions: the nested value counts, as in transformers (modeling_rope_utils.py).

    Raises:
        ValueError: the positions are scaled or partial.
    """
    outer = _number(config, "rope_theta", 10000.0)
    partial = _number(config, "partial_rotary_factor", 1.0)
    scaling, parameters = config.get("rope_scaling"), config.get("rope_parameters")
    values = scaling or parameters or {}
    if not isinstance(values, dict):
        raise ValueError(f"its rope_parameters are {str(values)[:40]!r}, expected a mapping")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind != "default":
        raise ValueError(f"its rope_type is {str(kind)[:40]!r}, hvdlm's positions are 'default'")
    rope = Fields(values)
    if _number(rope, "partial_rotary_factor", partial) != 1:
        raise ValueError("its partial_rotary_factor is not 1, hvdlm rotates all dimensions")
    return _number(rope, "rope_theta", outer)


def _value(config: Fields, key: str, valid: Callable[[Any], bool], expected: str, default: Any) -> Any:
    """Return a field of config.json, or ``default`` where it is missing or null; without a default it must be there."""
    value = config.get(key)
    if value is None:
        if default is None:
            raise KeyError(key)
        return default
    if not valid(value):
        raise ValueError(f"its {key} is {str(value)[:40]!r}, expected {expected}")
    return value


def _count(config: Fields, key: str, default: int | None = None) -> int:
    return int(_value(config, key, lambda v: type(v) is int and 0 < v < 2**31, "a whole number above 0", default))


def _number(config: Fields, key: str, default: float) -> float:
    return float(_value(config, key, lambda v: type(v) in (int, float) and 0 < v < 1e12, "a number above 0", default))


def _switch(config: Fields, key: str, default: bool) -> bool:
    return bool(_value(config, key, lambda v: type(v) is bool, "true or false", default))


def _expect(config: Fields, key: str, allowed: tuple[Any, ...], default: Any) -> None:
    value = config.get(key, default)
    if value not in allowed:
        expected = " or ".join("none" if one is None else repr(one) for one in allowed)
        raise ValueError(f"its {key} is {str(value)[:40]!r}, hvdlm's models have {expected}")
