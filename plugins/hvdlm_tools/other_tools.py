"""What users of other training tools type, and what it is called here.

The names are those of Hugging Face's Trainer, Lightning, nanoGPT, torchtitan, DeepSpeed and Megatron. A name that means
the same as an option is listed under it; one that has no counterpart gets a sentence.
"""

from __future__ import annotations

_SAME = {
    "train.learning_rate": "lr peak_lr max_lr base_lr",
    "train.min_learning_rate": "min_lr lr_min",
    "train.steps": "max_steps max_iters iters iterations train_iters num_steps total_steps training_steps n_steps",
    "train.epochs": "epochs epoch max_epochs num_epochs num_train_epochs n_epochs",
    "train.tokens": "train_tokens num_tokens total_tokens max_train_tokens n_tokens",
    "train.batch_size": "bs global_batch_size train_batch_size",
    "train.optimizer": "optim opt optimizer_name",
    "train.schedule": "lr_scheduler lr_scheduler_type lr_schedule scheduler lr_decay_style",
    "train.warmup": "warmup_steps warmup_iters warmup_ratio warmup_fraction lr_warmup_steps num_warmup_steps",
    "train.cooldown": "cooldown_steps cooldown_iters decay_ratio decay_frac lr_wsd_decay_iters num_decay_steps",
    "train.weight_decay": "wd",
    "train.beta1": "adam_beta1",
    "train.beta2": "adam_beta2",
    "train.epsilon": "eps adam_epsilon adam_eps",
    "train.clip": "grad_clip clip_grad max_grad_norm max_norm gradient_clip_val gradient_clipping clip_grad_norm",
    "train.ema": "ema_decay model_ema_decay ema_beta",
    "train.precision": "dtype torch_dtype amp mixed_precision bf16 fp16 half autocast",
    "train.tf32": "allow_tf32 enable_tf32",
    "train.compile": "torch_compile use_compile",
    "train.activation_checkpointing": "gradient_checkpointing recompute_activations activation_checkpoint",
    "train.eval_every": "eval_interval eval_steps eval_freq val_check_interval evaluation_strategy eval_strategy",
    "train.eval_tokens": "eval_iters limit_val_batches max_eval_samples eval_samples",
    "train.max_seconds": "max_time time_limit",
    "train.threads": "num_threads omp_num_threads",
    "model.layers": "n_layer n_layers num_layers num_hidden_layers depth",
    "model.width": "n_embd d_model hidden_size embed_dim embedding_dim emb_dim hidden_dim dim",
    "model.heads": "n_head n_heads num_heads num_attention_heads",
    "model.kv_heads": "num_key_value_heads num_query_groups n_kv_heads",
    "model.head_width": "head_dim kv_channels",
    "model.window": "sliding_window window_size",
    "model.rotary_base": "rope_theta rotary_emb_base",
    "model.rotary_share": "rotary_pct partial_rotary_factor rotary_percent",
    "model.rotary_scaling": "rope_scaling rope_parameters",
    "model.parallel_residual": "use_parallel_residual",
    "model.mlp_width": "intermediate_size ffn_hidden_size ffn_dim d_ff",
    "model.name": "model_name model_type architecture arch",
    "model.pretrained": "model_name_or_path pretrained_model from_pretrained finetune",
    "data.context": "block_size seq_len seq_length sequence_length max_seq_len max_seq_length max_length "
    "context_length ctx context_window",
    "data.path": "dataset dataset_name dataset_path data_dir data_path train_file train_data corpus input_file",
    "data.validation_path": "validation_file val_file eval_file valid_data eval_dataset",
    "data.tokenizer": "tokenizer_name tokenizer_path tokenizer_type",
    "parallel.tensor": "tp tensor_parallel tensor_parallel_size tensor_model_parallel_size tp_size",
    "parallel.pipeline": "pp pipeline_parallel pipeline_parallel_size pipeline_model_parallel_size pp_size",
    "parallel.data": "dp data_parallel data_parallel_size dp_size",
    "parallel.sequence": "sp sequence_parallel",
    "parallel.zero": "zero_stage zero_optimization deepspeed fsdp use_distributed_optimizer",
    "checkpoint.every": "save_steps save_interval save_every checkpoint_interval checkpoint_every",
    "checkpoint.keep": "save_total_limit save_top_k keep_last",
    "checkpoint.resume": "resume_from resume_from_checkpoint ckpt_path init_from load_checkpoint load",
    "log.run": "out_dir output_dir save_dir log_dir logging_dir run_name exp_name default_root_dir checkpoint_dir",
    "log.overwrite": "overwrite_output_dir",
    "log.every": "log_interval logging_steps log_every log_every_n_steps log_freq",
    "communication.timeout": "ddp_timeout dist_timeout",
}
_OPTION = {name: option for option, names in _SAME.items() for name in names.split()}

_DEVICES = (
    "ranks come from the launcher (horovodrun -np 2 python -m hvdlm ...), each uses one GPU where it has one; "
    "CUDA_VISIBLE_DEVICES= keeps a run on the CPU."
)
_BATCH = (
    "--train.batch_size is the number of sequences of a step over all ranks, --train.micro_batch_size that of one "
    "forward and backward pass on a rank; gradients are accumulated where it is less than the rank's share."
)
_WORKERS = "batches are read from token files in the training process, there are no loader processes to set."
_SENTENCES = {
    **dict.fromkeys(
        "device devices gpu gpus num_gpus n_gpus ngpu accelerator strategy cuda cpu use_cpu no_cuda np nproc_per_node "
        "num_nodes nnodes num_processes world_size n_devices".split(),
        _DEVICES,
    ),
    **dict.fromkeys(
        "per_device_train_batch_size per_device_batch_size gradient_accumulation_steps accumulate_grad_batches "
        "grad_accum micro_batch".split(),
        _BATCH,
    ),
    **dict.fromkeys("num_workers workers dataloader_num_workers".split(), _WORKERS),
    **dict.fromkeys(
        "wandb wandb_log use_wandb wandb_project report_to logger".split(),
        "trackers are plugins: --plugins '[wandb]' or '[mlflow]'.",
    ),
    **dict.fromkeys("v verbose quiet".split(), "every run prints its progress, --log.progress false turns it off."),
    **dict.fromkeys("backend_name dist_backend ddp_backend".split(), "the transport is --backend mpi, gloo or nccl."),
}


def translate(key: str) -> str | None:
    """Return what to write in place of an option of another tool; None where ``key`` is none.

    Dashes and capitals count as in other tools: ``--per-device-train-batch-size`` is known, too.
    """
    name = key.rpartition(".")[2].replace("-", "_").lower()
    if name in _SENTENCES:
        return _SENTENCES[name]
    return f"here it is called --{_OPTION[name]}." if name in _OPTION else None
