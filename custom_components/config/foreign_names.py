"""Names of settings and components in other tools, and ours for them.

The names are those of torchtune 0.6.1, TRL and transformers (`SFTConfig`, `TrainingArguments`, 5.x), PEFT 0.21
(`LoraConfig`), Axolotl, LLaMA-Factory and Unsloth. A name with a dot counts in that node only.
"""

import sys
from dataclasses import dataclass


@dataclass(frozen=True)
class OurAnswer:
    """Our setting for a foreign one, None where there is none, and a note on how they differ."""

    key: str | None
    note: str = ""


# Ours, a note, theirs. A name may be in several rows: a recipe has one of these settings.
_ROWS: list[tuple[str | None, str, str]] = [
    # ---- Paths
    ("checkpoint_dir", "a directory", "base_model model_name_or_path model_name model_id"),
    ("checkpoint_dir", "the base model's directory; resume_from_checkpoint resumes a run", "checkpointer ckpt_dir"),
    ("tokenizer.path", "the tokenizer.model of checkpoint_dir", "tokenizer.vocab_path"),
    ("tokenizer", "built from checkpoint_dir", "tokenizer_name tokenizer_name_or_path tokenizer_config tokenizer_type"),
    ("output_dir", "", "out_dir save_dir save_path output_path"),
    ("overwrite_output_dir", "", "overwrite_cache"),
    ("resume_from_checkpoint", "", "resume auto_resume auto_resume_from_checkpoints resume_from"),
    ("init_adapter_from", "an adapter directory", "adapter_name_or_path lora_model_dir lora_weights peft_model_id"),
    ("adapter_dir", "", "adapter_name_or_path lora_model_dir lora_weights peft_model_id adapter_path"),
    ("cache_dir", "", "dataset_prepared_path"),
    # ---- The adapter
    ("lora_rank", "", "r lora_r rank lora_dim"),
    ("lora_alpha", "", "alpha"),
    ("lora_dropout", "", "dropout"),
    (
        "lora_attn_modules",
        "for the attention; apply_lora_to_mlp and apply_lora_to_output are for the rest",
        "target_modules lora_target_modules lora_target lora_modules",
    ),
    ("lora_attn_modules", "with all four, and apply_lora_to_mlp: true", "lora_target_linear"),
    ("use_rslora", "", "peft_use_rslora rslora"),
    ("use_dora", "", "peft_use_dora dora"),
    ("lora_plus_ratio", "", "loraplus_lr_ratio loraplus_ratio"),
    ("quantize_base", "true is 4-bit NF4", "load_in_4bit load_in_8bit quantization_bit use_4bit"),
    ("quantize_base", "true for qlora, false for lora", "adapter finetuning_type peft_type"),
    # ---- The data
    ("max_seq_len", "", "sequence_len max_length max_seq_length cutoff_len model_max_length block_size seq_len"),
    ("prompt_template", "", "chat_template template chat_template_path prompt_style conversation_style"),
    ("train_on", "all: the prompts too, assistant: answers", "train_on_input train_on_inputs train_on_prompt"),
    ("train_on", "assistant is the default", "assistant_only_loss completion_only_loss train_on_responses_only"),
    ("train_on", "last_assistant is only a dialog's last answer", "mask_history"),
    ("train_on", "every answer has its EOS trained", "roles_to_train train_on_eos"),
    ("packed", "for the whole run", "dataset.packed"),
    ("packed", "", "packing sample_packing use_packing eval_sample_packing multipack"),
    ("group_by_length", "", "train_sampling_strategy length_grouped"),
    ("shuffle", "", "shuffle_merged_datasets shuffle_dataset"),
    (
        "dataset.source",
        "a file, a folder, a name on the hub, or a list of {source, weight}",
        "datasets data_files data_file data_dir data_path dataset_name dataset_path dataset_dir data "
        "train_file train_files train_data "
        "dataset.path dataset.name_or_path dataset.dataset dataset.file dataset.files",
    ),
    ("dataset.split", "", "dataset_split dataset_train_split train_split"),
    ("dataset.subset", "", "dataset_config dataset_config_name dataset.name"),
    ("dataset.streaming", "", "dataset_streaming"),
    ("dataset.max_rows", "", "max_samples max_train_samples num_samples dataset.num_rows dataset.limit"),
    ("dataset.format", "", "dataset.type dataset_format dataset.formatting dataset.ds_type"),
    (
        "dataset.column_map",
        "such as {messages: THEIR_COLUMN}",
        "conversation_column field_messages message_property_mappings columns",
    ),
    ("dataset.column_map", "such as {text: THEIR_COLUMN}", "dataset_text_field text_column text_field dataset.column"),
    ("dataset.column_map", "such as {prompt: A, completion: B}", "prompt_column response_column field_instruction"),
    ("dataset.system_prompt", "", "new_system_prompt default_system"),
    ("dataset.source", "each entry's weight is how often its rows are seen", "interleave_probs mix_strategy"),
    ("dataset_val", "a node like `dataset`", "eval_dataset test_datasets validation_file eval_file dataset_test_split"),
    ("val_fraction", "", "val_set_size val_size validation_split validation_fraction test_size"),
    ("max_task_rows", "", "limit"),
    # ---- Training
    ("epochs", "", "num_train_epochs num_epochs n_epochs"),
    ("max_steps", "", "max_train_steps num_steps"),
    (
        "batch_size",
        "rows of one forward; gradient_accumulation_steps is how many forwards a step has",
        "micro_batch_size per_device_train_batch_size per_device_batch_size train_batch_size",
    ),
    ("batch_size", "validation takes the same", "per_device_eval_batch_size eval_batch_size"),
    ("batch_size", "auto takes as many rows as fit", "auto_find_batch_size"),
    ("gradient_accumulation_steps", "", "accumulation_steps grad_accum_steps gradient_accumulation grad_accum"),
    ("learning_rate", "", "lr max_lr peak_lr"),
    ("optimizer.betas", "a list of two", "adam_beta1 adam_beta2"),
    ("optimizer.eps", "", "adam_epsilon"),
    ("optimizer", "with a _component_ such as torch.optim.AdamW or bitsandbytes.optim.AdamW8bit", "optim"),
    ("optimizer", "its keys are the arguments", "optim_args optimizer_kwargs"),
    ("lr_scheduler", "with a _component_ such as custom_components.training.schedules.cosine", "lr_scheduler_type"),
    ("lr_scheduler", "its keys are the arguments", "lr_scheduler_kwargs lr_scheduler.num_cycles cosine_min_lr_ratio"),
    ("warmup_ratio", "or warmup_steps", "warmup warmup_proportion"),
    ("warmup_steps", "", "num_warmup_steps lr_warmup_steps"),
    ("clip_grad_norm", "", "max_grad_norm gradient_clipping grad_clip max_norm gradient_clip_val"),
    ("neftune_noise_alpha", "", "neft_alpha noise_alpha"),
    ("seed", "", "data_seed random_state random_seed"),
    ("early_stopping_patience", "", "early_stopping"),
    ("save_every_n_steps", "", "save_steps saves_per_epoch save_strategy checkpoint_every"),
    ("keep_last_n_checkpoints", "", "save_total_limit"),
    ("run_val_every_n_steps", "", "eval_steps evals_per_epoch eval_strategy evaluation_strategy eval_every"),
    # ---- Preferences
    ("loss.beta", "", "beta pref_beta rl_beta dpo_beta simpo_beta orpo_alpha"),
    ("loss.alpha", "of custom_components.training.preference_losses.rpo", "rpo_alpha pref_ftx"),
    (
        "loss",
        "with a _component_ such as custom_components.training.preference_losses.sigmoid, which is DPO",
        "loss_type pref_loss rl label_smoothing dpo_label_smoothing simpo_gamma simpo_gamma_beta_ratio",
    ),
    ("loss_chunk_size", "", "loss.chunk_size"),
    ("max_seq_len", "of each of a pair's dialogs", "max_prompt_length max_completion_length max_target_length"),
    (
        None,
        "the reference is the model as the run begins, and its log-probabilities are computed once",
        "ref_model ref_model_path reference_model ref_adapter_name model_adapter_name sync_ref_model "
        "precompute_ref_log_probs precompute_ref_batch_size precompute_reference_log_probs disable_dropout",
    ),
    # ---- The device
    ("dtype", "bf16, fp16, fp32 or auto", "bf16 fp16 tf32 torch_dtype bnb_4bit_compute_dtype precision"),
    ("compile", "", "torch_compile"),
    (
        "enable_activation_checkpointing",
        "",
        "gradient_checkpointing use_gradient_checkpointing activation_checkpointing",
    ),
    ("enable_activation_offloading", "", "activation_offloading"),
    ("device", "auto, cpu or cuda", "device_map use_cpu no_cuda"),
    # ---- Output
    ("log_every_n_steps", "", "logging_steps log_interval log_every"),
    (
        "metric_logger",
        "such as {_component_: torchtune.training.metric_logging.WandBLogger, project: NAME}",
        "report_to wandb_project wandb_entity wandb_name wandb_run_id wandb_mode wandb_watch run_name use_wandb "
        "mlflow_tracking_uri comet_project_name tensorboard project",
    ),
    # ---- Answers
    ("max_new_tokens", "", "max_length max_tokens max_generated_tokens max_gen_len num_predict"),
    ("temperature", "0 takes always the likeliest token", "do_sample"),
    ("repetition_penalty", "", "repeat_penalty"),
    ("prompts_file", "", "input_file prompt_file"),
    # ---- Nothing of ours
    (None, "there is no profiler here", "profiler profile"),
    (None, "the peak is in every record of metrics.jsonl", "log_peak_memory_stats skip_memory_metrics"),
    (None, "the adapter alone is saved", "save_adapter_weights_only save_only_model save_last_epoch_only"),
    (None, "the best adapter by validation loss is the result", "load_best_model_at_end metric_for_best_model"),
    (None, "rows are laid end to end, nothing is padded", "collate_fn pad_to_sequence_len padding_free padding_side"),
    (None, "attention is chosen for the rows", "attn_implementation flash_attention sdp_attention xformers_attention"),
    (None, "the step has its own fast path", "use_liger_kernel liger_kernel_config optimizer_in_bwd use_unsloth"),
    (None, "rows are tokenized before training", "dataloader_num_workers dataloader_pin_memory dataset_num_proc"),
    (None, "unused columns are left alone", "remove_unused_columns"),
    (None, "the schedule knows how many steps there are", "lr_scheduler.num_training_steps"),
    (None, "nothing is uploaded", "push_to_hub hub_model_id hub_token hub_strategy"),
    (None, "4 bits are NF4 with double quantization", "bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_config"),
    (None, "no code of a model is run", "trust_remote_code"),
    ("trainable_tokens", "single tokens, added if missing", "special_tokens added_tokens modules_to_save new_tokens"),
    ("trainable_tokens", "single tokens, added if missing", "lora_modules_to_save trainable_token_indices"),
    (None, "the recipe is chosen by its file", "stage use_lora do_train do_eval do_predict task_type use_peft"),
    (None, "it is a key of recipes/lora_distributed.py", "parallelism collective_timeout_seconds"),
    (
        None,
        "recipes/lora_distributed.py trains on several devices",
        "deepspeed fsdp fsdp_config fsdp_cpu_offload local_rank",
    ),
    (None, "lora_b starts with zeros, lora_a as PEFT's default does", "init_lora_weights"),
    (None, "adapters have no bias", "bias lora_bias"),
]  # fmt: skip

FOREIGN_KEYS: dict[str, list[OurAnswer]] = {}
for _key, _note, _names in _ROWS:
    for _name in _names.split():
        FOREIGN_KEYS.setdefault(_name, []).append(OurAnswer(_key, _note))

_MODELS = "custom_components.models"
_SCHEDULES = "custom_components.training.schedules"
# Theirs, and ours where it is not the one that configs/*.yaml name for this node.
_BUILDERS = {
    "llama2": ("llama2_7b", "llama2_13b", "llama2_70b"),
    **{"llama3": ("llama3_8b",), "llama3_1": ("llama3_1_8b",), "llama3_2": ("llama3_2_1b", "llama3_2_3b")},
    "mistral": ("mistral_7b",),
}
FOREIGN_COMPONENTS = {
    **{
        f"torchtune.models.{family}.{kind}{builder}": f"{_MODELS}.lora_{builder}"
        for family, builders in _BUILDERS.items()
        for builder in builders
        for kind in ("", "lora_", "qlora_")
    },
    "torchtune.models.llama3.llama3_tokenizer": "custom_components.transforms.ChatTransform",
    "torchtune.models.mistral.mistral_tokenizer": "custom_components.transforms.ChatTransform",
    "torchtune.datasets.preference_dataset": "custom_components.datasets.preference_dataset",
    "torchtune.datasets.hh_rlhf_helpful_dataset": "custom_components.datasets.preference_dataset",
    "torchtune.datasets.stack_exchange_paired_dataset": "custom_components.datasets.preference_dataset",
    "torchtune.rlhf.loss.DPOLoss": "custom_components.training.preference_losses.sigmoid",
    "torch.optim.lr_scheduler.LinearLR": f"{_SCHEDULES}.linear",
    "torch.optim.lr_scheduler.ConstantLR": f"{_SCHEDULES}.constant",
    "transformers.get_linear_schedule_with_warmup": f"{_SCHEDULES}.linear",
    "transformers.get_constant_schedule": f"{_SCHEDULES}.constant",
    "transformers.get_constant_schedule_with_warmup": f"{_SCHEDULES}.constant",
}

# Keys that our component needs to do the same.
FOREIGN_COMPONENT_KEYS = {
    "torchtune.datasets.alpaca_dataset": "source: tatsu-lab/alpaca",
    "torchtune.datasets.alpaca_cleaned_dataset": "source: yahma/alpaca-cleaned",
    "torchtune.datasets.slimorca_dataset": "source: Open-Orca/SlimOrca-Dedup",
    **{
        f"torchtune.models.{family}.qlora_{builder}": "quantize_base: true"
        for family, builders in _BUILDERS.items()
        for builder in builders
    },
    "torchtune.models.llama3.llama3_tokenizer": "path: ${checkpoint_dir} and prompt_template: llama3",
    "torchtune.models.mistral.mistral_tokenizer": "path: ${checkpoint_dir} and prompt_template: mistral",
}

# Packages whose components do not work in these recipes, unless a node's `libraries` overrides it.
FOREIGN_PACKAGES = {
    *("torchtune", "torch", "torchao", "bitsandbytes", "transformers", "trl", "peft", "accelerate", "datasets"),
    *("axolotl", "llamafactory", "unsloth", "litgpt", "lightning", "pytorch_lightning"),
    *sys.stdlib_module_names,
    "builtins",
}
