"""All options of the core, with units and defaults.

The docstring of a class has the help texts of its fields, which ``--help SECTION`` prints. None is written ``null``
in files, on the command line and in help texts, which say what it stands for.
YAML files have the same structure: ``model: {layers: 6}`` is ``--model.layers 6``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module
from os import PathLike
from typing import Any, Literal, TypeVar

Options = TypeVar("Options")


@dataclass
class ModelConfig:
    """Model architecture and sizes.

    Args:
        name: model or preset: gpt, gpt2, llama, mistral, qwen2, qwen3, neox, gemma, rnn, gru, lstm, seq2seq, ctc,
            convnet, or one provided by a plugin
        layers: number of layers; seq2seq: of the encoder and of the decoder each
        width: embedding width; recurrent models: hidden units per layer
        heads: number of attention heads
        kv_heads: number of key-value heads (grouped-query attention); null: as many as heads
        head_width: width of a head; null: width / heads
        window: positions that a query sees, itself and those before it (sliding-window attention); 0: all; null: the
            preset's
        mlp_width: width of the feed-forward layer; null: 4 x width, with SwiGLU or GeGLU 8/3 x width, rounded up to a
            multiple of 8
        positions: position encoding; null: the preset's
        norm: normalisation layer; null: the preset's
        activation: activation of the feed-forward layer: gelu (by tanh), gelu_exact (by erf), or gated: swiglu, geglu
            (by tanh); null: the preset's
        bias: use biases in linear and normalisation layers; null: the preset's
        qkv_bias: use biases in the layers of queries, keys and values; null: the preset's, or as bias
        qk_norm: normalise every head's queries and keys (RMS norm); null: the preset's
        parallel_residual: compute attention and feed-forward layer from the same input; null: the preset's
        scale_embeddings: multiply token embeddings by sqrt(width); null: the preset's
        tie_embeddings: share weights between the input embedding and the output layer; null: the preset's
        dropout: dropout rate
        rotary_base: base of the rotary position frequencies
        rotary_share: share of a head's dimensions that rotary positions rotate; null: the preset's, or all of them
        rotary_scaling: divide low rotary frequencies by this factor, for contexts longer than those of pretraining
            (Llama 3.1); null: none
        rotary_scaling_context: rotary_scaling: context length of pretraining
        rotary_scaling_low: rotary_scaling: frequencies with fewer turns in that context are divided by the whole factor
        rotary_scaling_high: rotary_scaling: frequencies with more turns in that context stay as they are
        norm_epsilon: epsilon added to the variance in normalisation layers
        initial_scale: scale of the initial weights; GPT: standard deviation, null: the preset's, or sqrt(2 / (5
            width)); recurrent models: bound of a uniform distribution, null: 1 / sqrt(width)
        vocab: number of embedding rows, at least the tokenizer's vocabulary size (without special tokens that no text
            holds); null: equal to it
        pretrained: language model from which sizes, weights and tokenizer are taken: a Hugging Face folder, or the
            name of a model of the hub, gpt2 or OWNER/NAME@REVISION
        stop_tokens: ids of tokens that end generated text; null: those of pretrained's folder, [] or without one: none
    """

    name: str = "gpt"
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    head_width: int | None = None
    window: int | None = None
    mlp_width: int | None = None
    positions: Literal["learned", "rotary"] | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    activation: Literal["gelu", "gelu_exact", "swiglu", "geglu"] | None = None
    bias: bool | None = None
    qkv_bias: bool | None = None
    qk_norm: bool | None = None
    parallel_residual: bool | None = None
    scale_embeddings: bool | None = None
    tie_embeddings: bool | None = None
    dropout: float = 0.0
    rotary_base: float = 10000.0
    rotary_share: float | None = None
    rotary_scaling: float | None = None
    rotary_scaling_context: int = 8192
    rotary_scaling_low: float = 1.0
    rotary_scaling_high: float = 4.0
    norm_epsilon: float = 1e-5
    initial_scale: float | None = None
    vocab: int | None = None
    pretrained: str | None = None
    stop_tokens: list[int] | None = None


@dataclass
class LoRAConfig:
    """Low-rank adapters (LoRA, Hu et al. 2021) on frozen weights.

    Args:
        rank: rank of the adapters; null: no adapters, all weights are trained
        alpha: scale of the adapters, which are multiplied by alpha / rank; null: rank
        layers: names or patterns of the weights to adapt, for example "*.query"; null: those of attention layers, or of
            all recurrent layers
    """

    rank: int | None = None
    alpha: float | None = None
    layers: list[str] | str | None = None


@dataclass
class DataConfig:
    """Corpus, tokenizer and sampling.

    Args:
        path: corpus: text files, JSON, CSV, Parquet, folders (also of Hugging Face datasets), globs, each also packed
            (.gz, .bz2, .xz, .zst), - for standard input, a prepared token folder, token files of nanoGPT, llm.c or
            Megatron (.bin), a data set of the Hugging Face Hub (hf:OWNER/NAME@REVISION/CONFIG), or "embedded"
        mixture: weighted corpora instead of path: "{wiki.txt: 3, books: 1}", or "{wiki: {path: [a.txt, b.txt], weight:
            3}}" with optional validation_path, field and separator
        validation_path: validation text, in the forms of path; null: the end of the corpus
        split: split to train on of a data set whose files or folders are named by their splits; its split validation
            (valid, val, dev) is used for validation unless validation_path is given
        validation_share: fraction of the corpus, taken from its end, held out for validation if validation_path is null
        field: name of the text field in JSON, CSV, Parquet and Hugging Face data sets; a.b is field b of the object or
            structure in a and, in JSON, a.0 the first element of the list in a
        prompt: name of the field of a prompt, which data.field completes: losses are those of completions alone; null:
            those of all tokens
        chat: name of the field of conversations, lists of {role, content}: they are written by the chat template, and
            losses are those of the assistant's turns alone; null: texts
        chat_template: file of the chat template (Jinja); null: chat_template.jinja, or the entry chat_template of
            tokenizer_config.json, beside the tokenizer.json
        separator: text appended to every record
        max_expansion: maximum size of a file's text, as a multiple of the file's size; larger ones are refused as
            decompression bombs, unless they have less than 64 MiB
        tokenizer: byte, char, word, bpe, ids (texts are lists of ids), one provided by a plugin, or the path of a
            tokenizer.json (Hugging Face's or a run's)
        add_special_tokens: begin and end every document with the tokens that the tokenizer.json adds (BOS, EOS), and
            begin prompts with them
        split_special_tokens: read documents that spell a special token, such as <|endoftext|>, as plain text; a
            separator stands for the token that it spells
        document_token: token that ends every document, by its name or id, where the tokenizer adds none; or "{begin:
            <s>, end: </s>}"
        vocab_size: maximum vocabulary size of word and bpe; null: 10000 (word), 4096 (bpe); of ids, and of token files
            without a tokenizer, the number of ids
        context: context length in tokens
        sampling: shuffled (each window once per epoch) or sequential (consecutive windows; recurrent state is carried
            over)
        rows: windows (of the tokens of all documents in a row) or documents (rows begin with documents; shorter ones
            are packed, longer ones continue in further rows, rests are padded)
        document_masks: tokens attend to those of their own document only, and positions count from its first token in
            the row (gpt)
        cache: cache folder of token files; null: hvdlm/tokens in the user's cache folder
        prefetch: steps whose batches a thread makes ahead, once they take more than 1% of the time; 0: none
    """

    path: list[str] | str = field(default_factory=lambda: ["embedded"])
    mixture: dict[str, Any] | None = None
    validation_path: list[str] | str | None = None
    split: str = "train"
    validation_share: float = 0.1
    field: str = "text"
    prompt: str | None = None
    chat: str | None = None
    chat_template: str | None = None
    separator: str = "\n"
    max_expansion: float = 1000.0
    tokenizer: str = "char"
    add_special_tokens: bool = True
    split_special_tokens: bool = True
    document_token: int | str | dict[str, Any] | None = None
    vocab_size: int | None = None
    context: int = 64
    sampling: Literal["shuffled", "sequential"] = "shuffled"
    rows: Literal["windows", "documents"] = "windows"
    document_masks: bool = False
    cache: str | None = None
    prefetch: int = 2

    @property
    def by_document(self) -> bool:
        """Whether batches depend on where documents begin, so that each is encoded by itself and indexed."""
        return self.rows == "documents" or self.document_masks or self.marks_targets

    @property
    def marks_targets(self) -> bool:
        """Whether some tokens are no targets: prompts, and turns of a conversation that are not the assistant's."""
        return self.chat is not None or self.prompt is not None

    @property
    def marking_option(self) -> str:
        """The option that ``marks_targets``."""
        return "prompt" if self.chat is None else "chat"

    @property
    def record_field(self) -> str:
        """The field by which records are recognised."""
        return self.field if self.chat is None else self.chat

    @property
    def paths(self) -> list[str]:
        """``path`` as a list."""
        return [self.path] if isinstance(self.path, str) else self.path

    @property
    def validation_paths(self) -> list[str]:
        """``validation_path`` as a list, empty where there is none."""
        return [self.validation_path] if isinstance(self.validation_path, str) else self.validation_path or []


@dataclass
class TrainConfig:
    """Optimization, precision, evaluation and limits of training.

    Args:
        steps: number of optimizer steps
        tokens: number of training tokens, in place of steps (language models); null: steps
        epochs: number of passes over the training data, in place of steps; null: steps
        batch_size: global batch size in sequences, over all ranks
        micro_batch_size: sequences per rank in one forward and backward pass; null: the rank's whole batch (no gradient
            accumulation)
        seed: random seed
        optimizer: adamw, sgd, adagrad, muon (of hidden matrices; AdamW of all else), or one provided by a plugin
        learning_rate: peak learning rate, reached after warm-up
        min_learning_rate: final learning rate of decaying schedules; null: a tenth of learning_rate
        schedule: learning-rate schedule after warm-up: constant, linear, cosine, inverse_sqrt, step, wsd (constant,
            with a cooldown at the end), or one provided by a plugin
        warmup: steps of linear warm-up, or, if below 1, a fraction of all steps
        cooldown: wsd schedule: steps of the cooldown, or, if below 1, a fraction of all steps
        cooldown_shape: wsd schedule: how the rate falls: sqrt (by 1 - sqrt of the cooldown's part that is done) or
            linear
        decay_every: step schedule: steps between decays
        decay_start: step schedule: steps after warm-up before the first decay; null: decay_every
        decay_factor: step schedule: factor of each decay
        weight_decay: weight decay of matrices: decoupled (AdamW, Muon) or added to the gradient (SGD, Adagrad)
        groups: parameter groups, by patterns of names, of which the first that matches counts: "{'embed.*':
            {learning_rate_scale: 0.5, weight_decay: 0}}"; learning_rate_scale is a factor of the schedule's rate,
            weight_decay replaces train.weight_decay in the whole group, biases and norms included; muon: whether the
            optimizer muon orthogonalizes their updates
        beta1: AdamW: decay rate of the first moment
        beta2: AdamW: decay rate of the second moment
        epsilon: AdamW and Adagrad: term added to the denominator
        momentum: SGD and Muon: momentum; null: SGD 0, Muon 0.95
        nesterov: SGD: use Nesterov momentum, as Muon always does
        clip: maximum global norm of the gradient; 0: no clipping
        ema: decay of an exponential moving average of the weights, for example 0.999, which validation evaluates beside
            the weights; null: none
        z_loss: factor of the squared logarithm of the softmax's denominator, which is added to the loss, for example
            1e-4 (Chowdhery et al. 2022, section 5)
        label_smoothing: share of the target probability spread over the vocabulary (Szegedy et al. 2016, section 7)
        precision: fp32, bf16 (weights stay fp32), fp16 with loss scaling (GPU only), or auto: that of the checkpoint in
            a resumed run, else bf16 on GPUs that have it and fp32 elsewhere
        tf32: multiply fp32 matrices in TF32 on GPUs, with 10 bits of fraction instead of 23; false: in strict fp32
        compile: use torch.compile or XLA; auto (or null): where it was measured to be faster
        activation_checkpointing: recompute activations in the backward pass
        activation_offload: keep the activations of all layers but two in the host's memory until their backward pass
            (GPTs on GPUs, PyTorch)
        eval_every: steps between evaluations; 0: only at the end
        eval_tokens: targets of the validation split that evaluations before the last one compute, spread over it; null:
            all
        eval_batch_size: sequences per rank in an evaluation batch
        threads: framework threads per rank; null: the node's cores divided by its ranks, or the cores that the rank is
            bound to
        max_seconds: wall-clock seconds after which the run saves and stops with exit code 75; null: no limit
        spike: skip a step whose gradient norm exceeds this multiple of its running mean; 0: skip only non-finite
            gradients
        max_skips: consecutive skipped steps after which the run rolls back to a checkpoint and leaves out their batches
        replica_check_every: steps between checksums of the parameters that several ranks hold, which detect divergence;
            every save compares all of the state; 0: neither
    """

    steps: int = 1000
    tokens: int | None = None
    epochs: float | None = None
    batch_size: int = 32
    micro_batch_size: int | None = None
    seed: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float | None = None
    schedule: str = "cosine"
    warmup: float = 100.0
    cooldown: float = 0.2
    cooldown_shape: Literal["sqrt", "linear"] = "sqrt"
    decay_every: int = 1000
    decay_start: int | None = None
    decay_factor: float = 0.5
    weight_decay: float = 0.1
    groups: dict[str, Any] | None = None
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    momentum: float | None = None
    nesterov: bool = False
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    clip: float = 1.0
    ema: float | None = None
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    tf32: bool = True
    compile: bool | Literal["auto"] | None = "auto"
    activation_checkpointing: bool = False
    activation_offload: bool = False
    eval_every: int = 500
    eval_tokens: int | None = None
    eval_batch_size: int = 64
    threads: int | None = None
    max_seconds: float | None = None
    spike: float = 0.0
    max_skips: int = 3
    replica_check_every: int = 500

    @property
    def min_learning_rate_value(self) -> float:
        """``min_learning_rate``, or what it stands for where it is null."""
        return self.learning_rate / 10 if self.min_learning_rate is None else self.min_learning_rate

    @property
    def momentum_value(self) -> float:
        """``momentum``, or what it stands for where it is null."""
        return (0.95 if self.optimizer == "muon" else 0.0) if self.momentum is None else self.momentum


@dataclass
class ParallelConfig:
    """Parallel layout: data x pipeline x context x tensor ranks.

    Args:
        data: data-parallel ranks; null: all ranks divided by pipeline x context x tensor
        pipeline: pipeline-parallel ranks (stages)
        tensor: tensor-parallel ranks, which shard every layer
        data_per_node: data-parallel ranks whose gradients are summed whole, in one node; between nodes they are
            compressed; 1: one level
        context: context-parallel ranks, which divide the positions of every sequence (GPTs, ring attention)
        sequence: sequence parallelism: tensor-parallel ranks also shard the positions between layers (Transformers
            only)
        zero: ZeRO stage: data-parallel ranks shard nothing (0), the optimizer state (1), also the gradients (2), or
            also the parameters, which they gather layer by layer (3)
        zero_gather: how ZeRO gathers parameters: fp32, bf16 or int8; null: as gradients, bf16 or int8 if compressed
        schedule: pipeline schedule: 1f1b (one forward, one backward) or gpipe
        virtual_stages: virtual pipeline stages of a rank (interleaved 1F1B): the bubble shrinks, and messages grow, by
            this factor; 1: off
    """

    data: int | None = None
    pipeline: int = 1
    tensor: int = 1
    data_per_node: int = 1
    context: int = 1
    sequence: bool = False
    zero: Literal[0, 1, 2, 3] = 0
    zero_gather: Literal["fp32", "bf16", "int8"] | None = None
    schedule: Literal["1f1b", "gpipe"] = "1f1b"
    virtual_stages: int = 1


@dataclass
class CompressionConfig:
    """Compression of gradients, or of the parameter differences of local SGD and DiLoCo.

    Args:
        algorithm: none, or a compressor (int8, power_sgd, ...) that python -m hvdlm plugins lists
        ratio: fraction of elements that top_k, dgc (null: 0.01), random_k (0.1), chunked_top_k (0.0156) send
        rank: power_sgd: rank of the factors
        bits: qsgd: bits per element, including the sign
        block: elements per scale; null: 256, of int4 128, of qsgd 64, of chunked_top_k (a chunk) 4096
        momentum: dgc: momentum correction, in place of SGD's momentum
        clip: dgc: maximum norm of a rank's gradient, divided by the square root of the number of ranks; 0: no clipping
        warmup: dgc: steps over which the sent fraction falls from 25% to ratio
        error_decay: chunked_top_k: decay of the error that is added to the next round's vector; null: 0.95
        error_feedback: add the compression error to the next gradient; null: if the algorithm is biased
        min_elements: tensors with fewer elements are not compressed; null: 1024, of fp16 and bf16 1
        min_compression: tensors that would not shrink by this factor are not compressed
        start_after_steps: number of initial steps without compression
    """

    algorithm: str = "none"
    ratio: float | None = None
    rank: int = 4
    bits: Literal[2, 4, 8] = 4
    block: int | None = None
    momentum: float = 0.0
    clip: float = 0.0
    warmup: int = 0
    error_decay: float | None = None
    error_feedback: bool | None = None
    min_elements: int | None = None
    min_compression: float = 1.2
    start_after_steps: int = 0


@dataclass
class LocalConfig:
    """Local SGD and DiLoCo.

    Args:
        steps: optimizer steps between synchronisations; zero_one_adam: the most
        outer_learning_rate: outer learning rate of the mean parameter difference; null: DiLoCo 0.7, local_sgd 1
        outer_momentum: outer Nesterov momentum; null: DiLoCo 0.8, local_sgd 0
        warmup: number of initial steps with an all-reduce at every step
        fragments: streaming_diloco: fragments of the model, each with its own steps to synchronise; null: half of steps
        overlap: streaming_diloco: steps during which a fragment's sum travels; null: 2
        mixing: streaming_diloco: weight of a rank's own parameters when a sum has arrived; null: 0
    """

    steps: int = 50
    outer_learning_rate: float | None = None
    outer_momentum: float | None = None
    warmup: int = 0
    fragments: int | None = None
    overlap: int | None = None
    mixing: float | None = None


@dataclass
class CommunicationConfig:
    """Communication of gradients between ranks.

    Args:
        exchange: all_reduce (at every step), local_sgd, diloco or streaming_diloco (infrequently), or a plugin's
        reduction: how the ranks' gradients are combined: average (over tokens), sum (average x ranks), adasum (MPI
            only) or exact (average, with the same bits on any number of data ranks)
        exact_rows: sequences that reduction exact computes at a time; null: train.micro_batch_size
        auto: measure the network before the first step, and choose how gradients are summed, anew when it changes
        max_loss_gap: loss (nats) above that of dense sums up to which auto may choose a lossy method; 0: lossless only
        predivide: divisor applied before the reduction and undone after it, against overflow in fp16
        bucket_bytes: minimum size of a gradient bucket (bytes)
        fusion_bytes: size of Horovod's fusion buffer (bytes); null: Horovod's default, 128 MB
        ring_bytes: size from which on MPI's sums go around a ring of ranks; null: 128 KB between hosts; 0: never
        cycle_ms: cycle time of Horovod's background thread (milliseconds); null: Horovod's default, 1
        cache_capacity: capacity of Horovod's response cache; null: 1024; 0: no cache
        hierarchical_all_reduce: reduce within nodes first, then between them; null: Horovod's choice
        hierarchical_all_gather: gather within nodes first, then between them; null: Horovod's choice
        autotune: let Horovod tune fusion_bytes and cycle_ms during the run
        autotune_log: CSV file for the settings that autotune tried
        thread_affinity: cores of the local ranks' background threads, for example 0,2,4,6
        timeline: JSON file for Horovod's timeline of tensors; view it in chrome://tracing
        stall_check: seconds before Horovod reports missing ranks; null: half of timeout
        timeout: seconds that a collective may take before the watchdog ends the run; other limits are multiples of it
        compression: gradient compression
        local: local SGD and DiLoCo
    """

    exchange: str = "all_reduce"
    reduction: Literal["average", "sum", "adasum", "exact"] = "average"
    exact_rows: int | None = None
    auto: bool = False
    max_loss_gap: float = 0.0
    predivide: float = 1.0
    bucket_bytes: int = 4_000_000
    fusion_bytes: int | None = None
    ring_bytes: int | None = None
    cycle_ms: float | None = None
    cache_capacity: int | None = None
    hierarchical_all_reduce: bool | None = None
    hierarchical_all_gather: bool | None = None
    autotune: bool = False
    autotune_log: str | None = None
    thread_affinity: str | None = None
    timeline: str | None = None
    stall_check: float | None = None
    timeout: float = 300.0
    compression: CompressionConfig = field(default_factory=CompressionConfig)
    local: LocalConfig = field(default_factory=LocalConfig)


@dataclass
class CheckpointConfig:
    """Checkpoints.

    Args:
        every: steps between checkpoints; 0: only at the end
        keep: number of newest checkpoints to keep
        keep_best: number of additional checkpoints to keep, those with the lowest val_loss
        resume: auto (the complete checkpoint of the run that was written last), none, or the path of a checkpoint
        asynchronous: write checkpoints in the background; training is paused only for the copy
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 0
    resume: str = "none"
    asynchronous: bool = True


@dataclass
class LogConfig:
    """Run folder, progress and metrics.

    Args:
        run: run folder
        overwrite: delete an earlier run in the folder, and nothing else, and start from scratch
        every: steps between lines of metrics.jsonl
        progress: show a progress bar on a terminal, plain lines elsewhere
        tensorboard: write TensorBoard events
        sample_tokens: number of tokens of the sample generated at the end; 0: none
        sample_prompt: prompt of the sample
        profile: steps of which a trace is written into the run folder, FIRST:LAST, for example 10:13; null: none
        hardware: hardware file or name by which seconds of a step are predicted; null: that of plan --measure, if any
    """

    run: str = "runs/default"
    overwrite: bool = False
    every: int = 10
    progress: bool = True
    tensorboard: bool = True
    sample_tokens: int = 0
    sample_prompt: str = "\n"
    profile: str | None = None
    hardware: str | None = None


@dataclass
class Config:
    """Framework, backend, task and plugins.

    Args:
        framework: torch, tensorflow, or one provided by a plugin
        backend: communication backend: auto, local, mpi, gloo, nccl (GPUs), mpi4py (MPI without Horovod), or
            threads (--ranks N threads of one process)
        task: language_model, translation, speech, digits, or one provided by a plugin
        plugins: installed plugins to load in addition to those that other options name
        plugin_options: the options of plugins, by section
    """

    framework: str = "torch"
    backend: str = "auto"
    task: str = "language_model"
    plugins: list[str] = field(default_factory=list)
    model: ModelConfig = field(default_factory=ModelConfig)
    lora: LoRAConfig = field(default_factory=LoRAConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    communication: CommunicationConfig = field(default_factory=CommunicationConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    plugin_options: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def load(cls, *sources: Config | Mapping[str, Any] | str | PathLike[str]) -> Config:
        """Return the configuration that ``sources`` give, of which later ones override earlier ones.

        Args:
            sources: paths of YAML files, configurations, and mappings of options: nested by section, as in YAML, or
                with the names of the command line, ``{"train.steps": 100}``

        Raises:
            HvdlmError: an unknown option, a wrong type, or an unreadable file.
        """
        # By name: the parser lies above this module, and importing it takes a tenth of a second.
        config: Config = import_module("hvdlm_api.configurations").load_config(sources)
        return config

    def own(self, section: str, kind: type[Options]) -> Options:
        """Return a plugin's options, by default those of their dataclass ``kind``."""
        return self.plugin_options.get(section) or kind()

    def to_dict(self) -> dict:
        """Return nested dictionaries for YAML and JSON."""
        whole = asdict(self)
        return whole | whole.pop("plugin_options")


SECTION_CLASSES: dict[str, type] = {
    "run": Config,
    "model": ModelConfig,
    "lora": LoRAConfig,
    "data": DataConfig,
    "train": TrainConfig,
    "parallel": ParallelConfig,
    "communication": CommunicationConfig,
    "checkpoint": CheckpointConfig,
    "log": LogConfig,
}
"""The sections of options; ``run`` stands for those without a section."""

SECTIONS = {name: str(kind.__doc__).partition("\n")[0].rstrip(".") for name, kind in SECTION_CLASSES.items()}
"""One line on every section, for ``--help``."""
