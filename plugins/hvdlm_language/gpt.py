"""GPT: a decoder-only Transformer (Radford et al. 2019), with Llama's variants (Touvron et al. 2023) as settings.

Every framework computes, for tokens ``[batch, time]``, with ``norm`` layer or root-mean-square normalisation in fp32,
weights ``[inputs, outputs]``, and biases if ``bias`` is set::

    x = embed.tokens[tokens] (+ embed.positions[0..time])         # [batch, time, embed]
    x = dropout(x)
    for each layer i:
        h = norm(x, layers.i.attention_norm)
        q, k, v = h @ query, h @ key, h @ value                   # [batch, time, heads or kv_heads, head]
        q, k = rotate(q), rotate(k)                               # with rotary positions (Su et al. 2021)
        a = softmax(q k^T / sqrt(head) + causal mask) v           # kv head j serves queries j*group .. (j+1)*group - 1
        x = x + dropout(a @ attention.output)
        h = norm(x, layers.i.mlp_norm)
        m = gelu(h @ up) | silu(h @ gate) * (h @ up)              # [batch, time, mlp]; gelu with tanh
        x = x + dropout(m @ mlp.down)
    logits = norm(x, final_norm) @ (embed.tokens or head.weight)^T  # [batch, time, vocab]

Rotary positions pair dimension j with j + head/2 (the layout of Llama in Hugging Face format):
``rotate(x) = x * cos + concat(-x[half:], x[:half]) * sin`` with angle ``position / base^(2j/head)``.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

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
) -> ModelSpec:
    """Return the description of a GPT; the keyword arguments are a preset's defaults, which ``config`` overrides.

    Raises:
        HvdlmError: the sizes don't fit together.
    """
    activation = config.activation or activation
    kv_heads = config.kv_heads or config.heads
    mlp_width = config.mlp_width or (4 * config.width if activation == "gelu" else -(-8 * config.width // 24) * 8)
    _check(config, kv_heads)
    s = GPTSettings(
        vocab=vocab,
        context=context,
        layers=config.layers,
        width=config.width,
        heads=config.heads,
        kv_heads=kv_heads,
        head_width=config.width // config.heads,
        mlp_width=mlp_width,
        positions=config.positions or positions,
        norm=config.norm or norm,
        activation=activation,
        bias=bias if config.bias is None else config.bias,
        tie_embeddings=tie_embeddings if config.tie_embeddings is None else config.tie_embeddings,
        dropout=config.dropout,
        rotary_base=config.rotary_base,
        norm_epsilon=config.norm_epsilon,
    )
    if s.positions == "rotary" and s.head_width % 2:
        raise HvdlmError(f"model.width / model.heads is {s.head_width}: rotary positions need an even width per head.")
    # GPT-2's 0.02 is too small for narrow models; sqrt(2 / (5 width)): Nguyen and Salazar 2019, section 3.1.
    scale = config.initial_scale or initial_scale or (2 / (5 * s.width)) ** 0.5
    params = _params(s, scale)
    return ModelSpec("gpt", s, params, _flops_per_token(s, params))


def _check(config: ModelConfig, kv_heads: int) -> None:
    if config.width % config.heads:
        raise HvdlmError(
            f"model.width {config.width} is not a multiple of model.heads {config.heads}: choose, for example, "
            f"--model.width {-(-config.width // config.heads) * config.heads}."
        )
    if config.heads % kv_heads:
        raise HvdlmError(
            f"model.heads {config.heads} is not a multiple of model.kv_heads {kv_heads}: choose a divisor."
        )


def _params(s: GPTSettings, scale: float) -> tuple[ParamSpec, ...]:
    # GPT-2 scales the layers whose output is added to the residual stream by 1 / sqrt(number of these layers).
    residual = scale / (2 * s.layers) ** 0.5
    params: list[ParamSpec] = []

    def linear(name: str, axes: tuple[str, str], shape: tuple[int, int], std: float = scale) -> None:
        params.append(ParamSpec(f"{name}.weight", shape, axes, Init("normal", std), decay=True))
        if s.bias:
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
    kv = s.kv_heads * s.head_width
    for i in range(s.layers):
        norm(f"layers.{i}.attention_norm")
        linear(f"layers.{i}.attention.query", ("embed", "heads"), (s.width, s.width))
        linear(f"layers.{i}.attention.key", ("embed", "kv_heads"), (s.width, kv))
        linear(f"layers.{i}.attention.value", ("embed", "kv_heads"), (s.width, kv))
        linear(f"layers.{i}.attention.output", ("heads", "embed"), (s.width, s.width), residual)
        norm(f"layers.{i}.mlp_norm")
        if s.activation == "swiglu":
            linear(f"layers.{i}.mlp.gate", ("embed", "mlp"), (s.width, s.mlp_width))
        linear(f"layers.{i}.mlp.up", ("embed", "mlp"), (s.width, s.mlp_width))
        linear(f"layers.{i}.mlp.down", ("mlp", "embed"), (s.mlp_width, s.width), residual)
    norm("final_norm")
    if not s.tie_embeddings:
        embedding("head.weight", s.vocab, "vocab")
    return tuple(params)


def _flops_per_token(s: GPTSettings, params: tuple[ParamSpec, ...]) -> float:
    """Return 6 per weight of a product, plus 12 layers width context for attention (Chowdhery et al. 2022, B)."""
    looked_up = {"embed.positions"} | (set() if s.tie_embeddings else {"embed.tokens"})
    weights = sum(p.size for p in params if len(p.shape) == 2 and p.name not in looked_up)
    return 6.0 * weights + 12.0 * s.layers * s.width * s.context


PRESETS: dict[str, ModelMaker] = {
    "gpt": make_gpt,
    "gpt2": partial(make_gpt, initial_scale=0.02),
    "llama": partial(
        make_gpt, positions="rotary", norm="rmsnorm", activation="swiglu", bias=False, tie_embeddings=False
    ),
}
