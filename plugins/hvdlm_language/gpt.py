"""GPT: a decoder-only Transformer (Radford et al. 2019), with the variants of later models as settings.

Every framework computes, for tokens ``[batch, time]``, with ``norm`` layer or root-mean-square normalisation in fp32,
weights ``[inputs, outputs]``, and biases if ``bias`` is set, those of query, key and value if ``qkv_bias`` is::

    x = embed.tokens[tokens] (* sqrt(width)) (+ embed.positions[0..time])  # [batch, time, embed]; scale_embeddings
    x = dropout(x)
    for each layer i:
        h = norm(x, layers.i.attention_norm)
        q, k, v = h @ query, h @ key, h @ value                   # [batch, time, heads or kv_heads, head]
        q, k = rms_norm(q, query_norm), rms_norm(k, key_norm)     # of every head, with qk_norm
        q, k = rotate(q), rotate(k)                               # with rotary positions (Su et al. 2021)
        a = softmax(q k^T / sqrt(head) + mask) v                  # kv head j serves queries j*group .. (j+1)*group - 1
        a = dropout(a @ attention.output)
        h = norm(x + a or, with parallel_residual, x, layers.i.mlp_norm)
        m = gelu(h @ up) | silu(h @ gate) * (h @ up) | gelu(h @ gate) * (h @ up)  # [batch, time, mlp]
        x = x + a + dropout(m @ mlp.down)
    logits = norm(x, final_norm) @ (embed.tokens or head.weight)^T  # [batch, time, vocab]

Query t sees the keys 0 .. t, with a ``window`` of w positions the keys t - w + 1 .. t (Beltagy et al. 2020, Jiang et
al. 2023). ``gelu`` and ``geglu`` approximate GELU by tanh, ``gelu_exact`` computes ``x * (1 + erf(x / sqrt(2))) / 2``.

Rotary positions rotate the first ``rotary_share`` of a head's dimensions, n of them, and pair dimension j with j + n/2
(the layout of Llama in Hugging Face format): ``rotate(x) = x * cos + concat(-x[half:], x[:half]) * sin`` with angle
``position * frequency(j)``, where ``frequency(j) = base^(-2j/n)``. ``rotary_scaling`` divides low frequencies by a
factor, as Llama 3.1 does (``rotary_frequencies``).

Sources: rotary positions of a part of a head and parallel residual: Black et al. 2022 (GPT-NeoX); qk_norm: Dehghani et
al. 2023, Yang et al. 2025 (Qwen 3); SwiGLU and GeGLU: Shazeer 2020; scaled embeddings: Vaswani et al. 2017, section
3.4, Gemma Team 2024.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from hvdlm.config import ModelConfig
from hvdlm.errors import HvdlmError
from hvdlm.models.spec import Init, ModelMaker, ModelSpec, ParamSpec


@dataclass(frozen=True)
class GPTSettings:
    """A GPT's resolved settings; sizes as in ``ModelConfig``."""

    vocab: int
    context: int
    layers: int
    width: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    positions: str
    norm: str
    activation: str
    bias: bool
    tie_embeddings: bool
    dropout: float
    rotary_base: float
    norm_epsilon: float
    window: int = 0
    qkv_bias: bool = False
    qk_norm: bool = False
    parallel_residual: bool = False
    scale_embeddings: bool = False
    rotary_share: float = 1.0
    rotary_scaling: float | None = None
    rotary_scaling_context: int = 8192
    rotary_scaling_low: float = 1.0
    rotary_scaling_high: float = 4.0

    @property
    def heads_width(self) -> int:
        """Width of all heads together, which the product of queries has as outputs."""
        return self.heads * self.head_width

    @property
    def gated(self) -> bool:
        """Whether the feed-forward layer has a gate."""
        return self.activation in ("swiglu", "geglu")

    @property
    def rotary_width(self) -> int:
        """Dimensions of a head that are rotated; 0 without rotary positions."""
        return int(self.head_width * self.rotary_share) if self.positions == "rotary" else 0

    @property
    def local_window(self) -> int:
        """Positions that a query sees where these are fewer than the context; 0: all."""
        return self.window if self.window < self.context else 0

    @property
    def attention_flops(self) -> float:
        """FLOPs per token of a layer's attention in training, weights aside (Chowdhery et al. 2022, appendix B).

        That counts every pair of positions, of which causality leaves half. Of a window, twice the pairs that it leaves
        are counted.
        """
        window, context = self.local_window, self.context
        return 12.0 * self.heads_width * (window * (2.0 - window / context) if window else context)


def make_gpt(
    config: ModelConfig,
    vocab: int,
    context: int,
    *,
    positions: str = "learned",
    norm: str = "layernorm",
    activation: str = "gelu",
    bias: bool = True,
    tie_embeddings: bool = True,
    initial_scale: float | None = None,
    window: int = 0,
    qkv_bias: bool | None = None,
    qk_norm: bool = False,
    parallel_residual: bool = False,
    scale_embeddings: bool = False,
    rotary_share: float = 1.0,
) -> ModelSpec:
    """Return the description of a GPT; the keyword arguments are a preset's defaults, which ``config`` overrides.

    Raises:
        HvdlmError: the sizes don't fit together.
    """
    activation = config.activation or activation
    kv_heads = config.kv_heads or config.heads
    plain = activation in ("gelu", "gelu_exact")
    mlp_width = config.mlp_width or (4 * config.width if plain else -(-8 * config.width // 24) * 8)
    _check(config, kv_heads)
    biased = _first(config.bias, bias)
    s = GPTSettings(
        vocab=vocab,
        context=context,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=kv_heads,
        head_width=config.head_width or config.width // config.heads,
        mlp_width=mlp_width,
        positions=config.positions or positions,
        norm=config.norm or norm,
        activation=activation,
        bias=biased,
        tie_embeddings=_first(config.tie_embeddings, tie_embeddings),
        dropout=config.dropout,
        rotary_base=config.rotary_base,
        norm_epsilon=config.norm_epsilon,
        window=_first(config.window, window),
        qkv_bias=_first(config.qkv_bias, qkv_bias, biased),
        qk_norm=_first(config.qk_norm, qk_norm),
        parallel_residual=_first(config.parallel_residual, parallel_residual),
        scale_embeddings=_first(config.scale_embeddings, scale_embeddings),
        rotary_share=_first(config.rotary_share, rotary_share),
        rotary_scaling=config.rotary_scaling,
        rotary_scaling_context=config.rotary_scaling_context,
        rotary_scaling_low=config.rotary_scaling_low,
        rotary_scaling_high=config.rotary_scaling_high,
    )
    for name, value in (("rotary_share", config.rotary_share), ("rotary_scaling", config.rotary_scaling)):
        if value is not None and s.positions != "rotary":
            raise HvdlmError(
                f"model.{name} is of rotary positions, not of {s.positions} ones: set --model.positions rotary, "
                "or leave it out."
            )
    _check_rotary(s)
    # GPT-2's 0.02 is too small for narrow models; sqrt(2 / (5 width)): Nguyen and Salazar 2019, section 3.1.
    scale = config.initial_scale or initial_scale or (2 / (5 * s.width)) ** 0.5
    params = _params(s, scale)
    return ModelSpec("gpt", s, params, _flops_per_token(s, params))


def _first(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _check(config: ModelConfig, kv_heads: int) -> None:
    if config.width % config.heads and config.head_width is None:
        raise HvdlmError(
            f"model.width {config.width} is not a multiple of model.heads {config.heads}: choose, for example, "
            f"--model.width {-(-config.width // config.heads) * config.heads}, or set --model.head_width."
        )
    if config.heads % kv_heads:
        raise HvdlmError(
            f"model.heads {config.heads} is not a multiple of model.kv_heads {kv_heads}: choose a divisor."
        )


def _check_rotary(s: GPTSettings) -> None:
    if s.positions != "rotary":
        return
    if s.rotary_width % 2 or not s.rotary_width:
        raise HvdlmError(
            f"rotary positions need an even width per head, model.rotary_share {s.rotary_share:g} of {s.head_width} "
            f"(model.head_width, or model.width / model.heads) is {s.rotary_width}: choose other sizes."
        )
    if s.rotary_scaling and s.rotary_scaling_low >= s.rotary_scaling_high:
        raise HvdlmError(
            f"model.rotary_scaling_low {s.rotary_scaling_low:g} is not below model.rotary_scaling_high "
            f"{s.rotary_scaling_high:g}: frequencies between the two are divided by a part of the factor."
        )


def rotary_frequencies(s: GPTSettings) -> np.ndarray:
    """Return the angle per position of every pair of dimensions, float64 ``[rotary_width / 2]``.

    With ``rotary_scaling``, a frequency that turns fewer than ``rotary_scaling_low`` times in the context of
    pretraining is divided by it, one with more than ``rotary_scaling_high`` turns stays, and those between are
    interpolated (Llama 3.1; ``rope_type`` llama3 of transformers).
    """
    frequency: np.ndarray = s.rotary_base ** -(np.arange(0, s.rotary_width, 2, dtype=np.float64) / s.rotary_width)
    if s.rotary_scaling is None:
        return frequency
    turns = s.rotary_scaling_context * frequency / (2 * math.pi)
    kept = np.clip((turns - s.rotary_scaling_low) / (s.rotary_scaling_high - s.rotary_scaling_low), 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / s.rotary_scaling)


def rotary_tables(s: GPTSettings) -> tuple[np.ndarray, np.ndarray]:
    """Return cosines and sines of all positions, float32 ``[context, rotary_width]``, computed in float64."""
    angle = np.outer(np.arange(s.context, dtype=np.float64), rotary_frequencies(s))
    angle = np.concatenate([angle, angle], -1)
    return np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)


def extensions(s: GPTSettings) -> tuple[str, ...]:
    """Return the options in use, beyond those of GPT-2 and Llama, that a framework may not compute."""
    used = {
        "activation": s.activation not in ("gelu", "swiglu"),
        "head_width": s.heads_width != s.width,
        "window": s.local_window > 0,
        "qkv_bias": s.qkv_bias != s.bias,
        "qk_norm": s.qk_norm,
        "parallel_residual": s.parallel_residual,
        "scale_embeddings": s.scale_embeddings,
        "rotary_share": s.positions == "rotary" and s.rotary_width < s.head_width,
        "rotary_scaling": s.positions == "rotary" and s.rotary_scaling is not None,
    }
    return tuple(f"model.{name}" for name, value in used.items() if value)


def _params(s: GPTSettings, scale: float) -> tuple[ParamSpec, ...]:
    # GPT-2 scales the layers whose output is added to the residual stream by 1 / sqrt(number of these layers).
    residual = scale / (2 * s.layers) ** 0.5
    params: list[ParamSpec] = []

    def linear(
        name: str, axes: tuple[str, str], shape: tuple[int, int], std: float = scale, bias: bool = s.bias
    ) -> None:
        params.append(ParamSpec(f"{name}.weight", shape, axes, Init("normal", std), decay=True))
        if bias:
            params.append(ParamSpec(f"{name}.bias", shape[1:], axes[1:], Init("zeros")))

    def norm(name: str) -> None:
        params.append(ParamSpec(f"{name}.scale", (s.width,), ("embed",), Init("ones")))
        if s.bias and s.norm == "layernorm":
            params.append(ParamSpec(f"{name}.bias", (s.width,), ("embed",), Init("zeros")))

    def embedding(name: str, rows: int, axis: str) -> None:
        params.append(ParamSpec(name, (rows, s.width), (axis, "embed"), Init("normal", scale), decay=True))

    embedding("embed.tokens", s.vocab, "vocab")
    if s.positions == "learned":
        embedding("embed.positions", s.context, "position")
    heads, kv = s.heads_width, s.kv_heads * s.head_width
    for i in range(s.layers):
        norm(f"layers.{i}.attention_norm")
        linear(f"layers.{i}.attention.query", ("embed", "heads"), (s.width, heads), bias=s.qkv_bias)
        linear(f"layers.{i}.attention.key", ("embed", "kv_heads"), (s.width, kv), bias=s.qkv_bias)
        linear(f"layers.{i}.attention.value", ("embed", "kv_heads"), (s.width, kv), bias=s.qkv_bias)
        for name in ("query_norm", "key_norm") if s.qk_norm else ():
            params.append(ParamSpec(f"layers.{i}.attention.{name}.scale", (s.head_width,), ("head",), Init("ones")))
        linear(f"layers.{i}.attention.output", ("heads", "embed"), (heads, s.width), residual)
        norm(f"layers.{i}.mlp_norm")
        if s.gated:
            linear(f"layers.{i}.mlp.gate", ("embed", "mlp"), (s.width, s.mlp_width))
        linear(f"layers.{i}.mlp.up", ("embed", "mlp"), (s.width, s.mlp_width))
        linear(f"layers.{i}.mlp.down", ("mlp", "embed"), (s.mlp_width, s.width), residual)
    norm("final_norm")
    if not s.tie_embeddings:
        embedding("head.weight", s.vocab, "vocab")
    return tuple(params)


def _flops_per_token(s: GPTSettings, params: tuple[ParamSpec, ...]) -> float:
    """Return 6 per weight of a product, plus attention."""
    looked_up = {"embed.positions"} | (set() if s.tie_embeddings else {"embed.tokens"})
    weights = sum(p.size for p in params if len(p.shape) == 2 and p.name not in looked_up)
    return 6.0 * weights + s.layers * s.attention_flops


_llama = partial(make_gpt, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False)
PRESETS: dict[str, ModelMaker] = {
    "gpt": make_gpt,
    "gpt2": partial(make_gpt, initial_scale=0.02),
    "llama": _llama,
    "mistral": partial(_llama, window=4096),
    "qwen2": partial(_llama, qkv_bias=True),
    "qwen3": partial(_llama, qk_norm=True),
    "neox": partial(
        make_gpt,
        positions="rotary",
        activation="gelu_exact",
        tie_embeddings=False,
        rotary_share=0.25,
        parallel_residual=True,
    ),
    "gemma": partial(_llama, activation="geglu", tie_embeddings=True, scale_embeddings=True),
}
