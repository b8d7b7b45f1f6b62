"""Everything a user can set, with units and defaults.

A field's help text is the line under it in the class's docstring; ``--help`` prints it. None means: chosen by what is
described there. YAML files have the same structure: ``model: {layers: 6}`` is ``--model.layers 6``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Literal, TypeVar

Options = TypeVar("Options")


@dataclass
class ModelConfig:
    """The model.

    Args:
        name: a model or preset: gpt, gpt2, llama, rnn, gru, lstm; seq2seq, ctc, convnet; or one that a plugin brings
        layers: how many layers; of a seq2seq, of its encoder and of its decoder
        width: width of the embedding; a recurrent layer's hidden units
        heads: attention heads
        kv_heads: key-value heads (grouped-query attention); None: as many as heads
        mlp_width: width of the feed-forward layer; None: 4 x width, SwiGLU: 8/3 x width rounded up to 8
        positions: how positions enter; None: the preset's
        norm: normalisation; None: the preset's
        activation: feed-forward activation; None: the preset's
        bias: biases in linear and normalisation layers; None: the preset's
        tie_embeddings: input embedding is also the output layer; None: the preset's
        dropout: share of activations dropped while training
        rotary_base: base of the rotary positions' wavelengths
        norm_epsilon: added to the variance in normalisations
        initial_scale: standard deviation of a GPT's initial weights, None: the preset's, or sqrt(2 / (5 width)); bound
            of a recurrent model's, None: 1 / sqrt(width)
        vocab: rows of the embedding, at least the tokenizer's vocabulary; None: as many
        pretrained: a Hugging Face folder of a GPT-2 or Llama: sizes, weights and tokenizer that the run starts from
    """

    name: str = "gpt"
    layers: int = 4
    width: int = 128
    heads: int = 4
    kv_heads: int | None = None
    mlp_width: int | None = None
    positions: Literal["learned", "rotary"] | None = None
    norm: Literal["layernorm", "rmsnorm"] | None = None
    activation: Literal["gelu", "swiglu"] | None = None
    bias: bool | None = None
    tie_embeddings: bool | None = None
    dropout: float = 0.0
    rotary_base: float = 10000.0
    norm_epsilon: float = 1e-5
    initial_scale: float | None = None
    vocab: int | None = None
    pretrained: str | None = None


@dataclass
class LoRAConfig:
    """Low-rank adapters, which are trained in place of the weights that they are added to (Hu et al. 2021).

    Args:
        rank: inner width of an adapter; None: all weights are trained
        alpha: adapters are multiplied by alpha / rank; None: rank
        layers: weights that get one, by name or pattern, for example "*.query"; None: those of attention, of recurrent
            models all layers'
    """

    rank: int | None = None
    alpha: float | None = None
    layers: list[str] | str | None = None


@dataclass
class DataConfig:
    """The corpus and how it becomes batches.

    Args:
        path: text files, JSON lines, Parquet, folders (also of Hugging Face datasets), globs, .gz files, - for standard
            input, a prepared token folder, or "embedded"
        mixture: corpora instead of path, each with a weight: "{wiki.txt: 3, books: 1}", or in full
            "{wiki: {path: [a.txt, b.txt], weight: 3}}", where validation_path, field and separator may stand too
        validation_path: the validation text, in the same forms; None: the end of the corpus
        split: of a Hugging Face data set of several splits, the one to learn from; without a validation_path, its split
            validation (valid, val, dev) is the validation text
        validation_share: share of the corpus, from its end, kept for validation where validation_path is None
        field: of JSON lines, Parquet and data sets: which field is the text
        separator: what stands after the text of a record
        tokenizer: byte, char, word, bpe, or the path of a tokenizer.json, Hugging Face's or a run's
        vocab_size: most entries of a word or bpe vocabulary; None: 10000 (word), 4096 (bpe)
        context: tokens in a sequence
        sampling: shuffled (each window once an epoch) or sequential (consecutive windows, recurrent state carried)
        cache: folder of prepared token files; None: hvdlm/tokens in the user's cache folder
    """

    path: list[str] | str = field(default_factory=lambda: ["embedded"])
    mixture: dict[str, Any] | None = None
    validation_path: list[str] | str | None = None
    split: str = "train"
    validation_share: float = 0.1
    field: str = "text"
    separator: str = "\n"
    tokenizer: str = "char"
    vocab_size: int | None = None
    context: int = 64
    sampling: Literal["shuffled", "sequential"] = "shuffled"
    cache: str | None = None

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
    """Optimization.

    Args:
        steps: optimizer steps
        batch_size: sequences in the global batch, over all ranks
        micro_batch_size: sequences a rank computes at a time; None: its whole share (no accumulation)
        seed: everything random follows from it
        optimizer: the update rule
        learning_rate: its peak, after warm-up
        min_learning_rate: where decaying schedules end
        schedule: how the learning rate goes on after warm-up
        warmup: steps of linear warm-up, or, below 1, a share of all steps
        decay_every: steps between two falls of the step schedule
        decay_start: steps after warm-up before its first fall; None: decay_every
        decay_factor: what each fall of the step schedule multiplies by
        weight_decay: decoupled (AdamW) or added to the gradient (SGD, Adagrad); on matrices only
        beta1: AdamW's decay of the first moment
        beta2: AdamW's decay of the second moment
        epsilon: AdamW's and Adagrad's denominator term
        momentum: SGD's momentum
        nesterov: SGD looks ahead
        clip: largest global norm of the gradient; 0: no clipping
        label_smoothing: share of the target that is spread over the whole vocabulary (Szegedy et al. 2016, section 7)
        precision: fp32, bf16 (weights stay fp32), or fp16 with loss scaling (GPU only)
        compile: torch.compile or XLA; None: where it was measured to be faster
        activation_checkpointing: recompute activations in the backward pass
        eval_every: steps between evaluations; 0: only at the end
        eval_batch_size: sequences a rank evaluates at a time
        threads: framework threads per rank; None: cores divided by local ranks, or those that it is bound to
        max_seconds: wall-clock seconds after which the run saves and stops, exit code 75; None: no limit
        spike: a step whose gradient norm is above this times its running mean is skipped; 0: only where not finite
        max_skips: skipped steps in a row after which the run goes back to its newest checkpoint, without their batches
        replica_check_every: steps between two comparisons of the data ranks' parameters; 0: never
    """

    steps: int = 1000
    batch_size: int = 32
    micro_batch_size: int | None = None
    seed: int = 1
    optimizer: Literal["adamw", "sgd", "adagrad"] = "adamw"
    learning_rate: float = 1e-3
    min_learning_rate: float = 1e-4
    schedule: Literal["constant", "linear", "cosine", "inverse_sqrt", "step"] = "cosine"
    warmup: float = 100.0
    decay_every: int = 1000
    decay_start: int | None = None
    decay_factor: float = 0.5
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.99
    epsilon: float = 1e-8
    momentum: float = 0.0
    nesterov: bool = False
    label_smoothing: float = 0.0
    clip: float = 1.0
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    compile: bool | None = None
    activation_checkpointing: bool = False
    eval_every: int = 500
    eval_batch_size: int = 64
    threads: int | None = None
    max_seconds: float | None = None
    spike: float = 0.0
    max_skips: int = 3
    replica_check_every: int = 500


@dataclass
class ParallelConfig:
    """How ranks share the work: data x pipeline x tensor ranks in all.

    Args:
        data: ranks along the data axis; None: what the other axes leave
        pipeline: pipeline stages
        tensor: ranks that share every layer
        sequence: tensor ranks also share the positions between layers, which saves memory (Transformers only)
        zero: what data ranks share: 0 nothing, 1 the optimizer's state, 2 its state and the gradients
        schedule: the order of a pipeline stage's passes: 1f1b (one forward, one backward) or gpipe
    """

    data: int | None = None
    pipeline: int = 1
    tensor: int = 1
    sequence: bool = False
    zero: Literal[0, 1, 2] = 0
    schedule: Literal["1f1b", "gpipe"] = "1f1b"


@dataclass
class CompressionConfig:
    """What makes gradients, or the parameter differences of rarer synchronisation, small for their journey.

    Args:
        algorithm: none, fp16, bf16, top_k, random_k, power_sgd, scaled_sign, sign_majority, qsgd, int8, dgc, a plugin's
        ratio: share of the elements that top_k, random_k and dgc send; None: 0.01, random_k 0.1
        rank: rank of power_sgd's factors
        bits: bits of an element in qsgd, its sign included
        block: elements that share a scale in qsgd, int8, scaled_sign, sign_majority; None: qsgd 64, else 256
        momentum: dgc's momentum correction, in place of SGD's own momentum
        clip: dgc's largest norm of a rank's gradient, divided by the root of the ranks; 0: no clipping
        warmup: steps in which dgc's share falls from 25% to ratio
        error_feedback: what was left out is added to the next gradient; None: where the algorithm is biased
        min_elements: tensors smaller than this stay dense
        min_compression: tensors that would not shrink by this factor stay dense
        start_after_steps: steps with dense gradients before compression begins
    """

    algorithm: str = "none"
    ratio: float | None = None
    rank: int = 4
    bits: Literal[2, 4, 8] = 4
    block: int | None = None
    momentum: float = 0.0
    clip: float = 0.0
    warmup: int = 0
    error_feedback: bool | None = None
    min_elements: int = 1024
    min_compression: float = 1.2
    start_after_steps: int = 0


@dataclass
class LocalConfig:
    """Rarer synchronisation, for the exchanges local_sgd and diloco.

    Args:
        steps: optimizer steps of each rank by itself between two synchronisations
        outer_learning_rate: what the mean parameter difference is multiplied by; None: diloco 0.7, local_sgd 1
        outer_momentum: Nesterov momentum of the mean parameter difference; None: diloco 0.8, local_sgd 0
        warmup: first steps, in which gradients are summed at every step
    """

    steps: int = 50
    outer_learning_rate: float | None = None
    outer_momentum: float | None = None
    warmup: int = 0


@dataclass
class CommunicationConfig:
    """How gradients travel.

    Args:
        exchange: all_reduce (every step), local_sgd or diloco (rarer), or one that a plugin brings
        reduction: how ranks' gradients become one: average (over tokens), sum (average x ranks), adasum (MPI only)
        predivide: gradients are divided by this before their sum and multiplied after it, against overflow in fp16
        bucket_bytes: gradients are summed in flat buckets of at least this size (bytes)
        fusion_bytes: Horovod's fusion buffer (bytes); None: Horovod's default, 128 MB
        cycle_ms: milliseconds between two looks of Horovod's background thread; None: by the machine
        cache_capacity: responses that Horovod remembers instead of negotiating them anew; None: 1024; 0: none
        hierarchical_all_reduce: sum within nodes first, then between them; None: Horovod's choice
        hierarchical_all_gather: gather within nodes first, then between them; None: Horovod's choice
        autotune: let Horovod search fusion_bytes and cycle_ms while it runs
        autotune_log: file (CSV) of what autotune tried
        thread_affinity: cores for the background threads of the local ranks, for example 0,2,4,6
        timeline: file (JSON) in which Horovod writes when each tensor waited and travelled; chrome://tracing shows it
        stall_check: seconds until Horovod names the ranks that are missing; None: half of timeout
        timeout: seconds until ranks that wait for a missing one give up and end the run
        compression: what makes them small
        local: how rarely they travel
    """

    exchange: str = "all_reduce"
    reduction: Literal["average", "sum", "adasum"] = "average"
    predivide: float = 1.0
    bucket_bytes: int = 4_000_000
    fusion_bytes: int | None = None
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
    """What is kept on disk.

    Args:
        every: steps between checkpoints; 0: only at the end
        keep: how many checkpoints are kept, the newest
        keep_best: how many are kept besides, those with the lowest val_loss
        resume: auto (the run folder's newest whole one), none, or the path of a checkpoint
        asynchronous: training goes on while a checkpoint is written; it stands still only for the copy
    """

    every: int = 500
    keep: int = 2
    keep_best: int = 0
    resume: str = "none"
    asynchronous: bool = True


@dataclass
class LogConfig:
    """What a run tells.

    Args:
        run: the run's folder
        overwrite: start afresh in a folder that holds an earlier run, which is deleted
        every: steps between two lines of metrics.jsonl
        progress: a progress bar on a terminal, plain lines elsewhere
        tensorboard: write TensorBoard events
        sample_tokens: tokens of text generated at the end; 0: none
        sample_prompt: what the sample begins with
    """

    run: str = "runs/default"
    overwrite: bool = False
    every: int = 10
    progress: bool = True
    tensorboard: bool = True
    sample_tokens: int = 0
    sample_prompt: str = "\n"


@dataclass
class Config:
    """One run.

    Args:
        framework: torch or tensorflow, or one that a plugin brings
        backend: how ranks meet: auto, local, mpi, gloo, nccl (GPUs) or mpi4py (without Horovod)
        task: what is learnt
        plugins: installed plugins to use besides those that the other options name
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

    def own(self, section: str, kind: type[Options]) -> Options:
        """Return a plugin's options, the defaults of their dataclass ``kind`` where none were read."""
        return self.plugin_options.get(section) or kind()

    def to_dict(self) -> dict:
        """Return plain dictionaries, as YAML and JSON take them."""
        whole = asdict(self)
        return whole | whole.pop("plugin_options")
