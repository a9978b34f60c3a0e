"""docs/moving.md: the keys of other tools beside ours, looked up in config/foreign_names.py, which errors use."""

from custom_components.config.foreign_names import FOREIGN_COMPONENT_KEYS, FOREIGN_COMPONENTS, FOREIGN_KEYS
from docs_pages.blocks import plain, table

# The keys that their own examples set, in the order of their documentation. Each is in FOREIGN_KEYS; where a name has
# several answers there, the training recipe's comes first.
TOOLS = {
    "peft-trl": """
        model_name_or_path r lora_alpha lora_dropout target_modules use_rslora use_dora modules_to_save bias
        load_in_4bit bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_compute_dtype
        dataset_name dataset_text_field max_length packing assistant_only_loss chat_template_path eval_dataset
        num_train_epochs max_steps per_device_train_batch_size gradient_accumulation_steps auto_find_batch_size
        learning_rate lr_scheduler_type warmup_ratio warmup_steps optim max_grad_norm neftune_noise_alpha
        bf16 fp16 gradient_checkpointing torch_compile seed output_dir save_steps save_total_limit eval_steps
        load_best_model_at_end resume_from_checkpoint logging_steps report_to push_to_hub
    """,
    "axolotl": """
        base_model adapter lora_model_dir load_in_4bit lora_r lora_alpha lora_dropout lora_target_modules
        lora_target_linear peft_use_dora peft_use_rslora loraplus_lr_ratio datasets chat_template field_messages
        train_on_inputs roles_to_train dataset_prepared_path val_set_size sequence_len sample_packing
        pad_to_sequence_len num_epochs micro_batch_size gradient_accumulation_steps optimizer lr_scheduler
        learning_rate warmup_steps gradient_checkpointing flash_attention saves_per_epoch evals_per_epoch
        early_stopping_patience wandb_project special_tokens deepspeed fsdp
    """,
    "torchtune": """
        checkpointer tokenizer.vocab_path dataset.packed dataset.column_map dataset.train_on_input
        optimizer_in_bwd profiler log_peak_memory_stats save_adapter_weights_only
    """,
    "unsloth": """
        model_name max_seq_length load_in_4bit r target_modules lora_alpha lora_dropout use_gradient_checkpointing
        random_state use_rslora train_on_responses_only per_device_train_batch_size gradient_accumulation_steps
        warmup_steps max_steps num_train_epochs learning_rate optim lr_scheduler_type packing save_steps report_to
    """,
}
# Names that are the same here, some with a difference to know.
SAME = {
    **dict.fromkeys(["lora_alpha", "lora_dropout", "use_dora", "use_rslora", "max_steps", "learning_rate"], ""),
    **dict.fromkeys(["warmup_ratio", "warmup_steps", "neftune_noise_alpha", "seed", "output_dir"], ""),
    "gradient_accumulation_steps": "",
    "early_stopping_patience": "validations, not epochs",
    "resume_from_checkpoint": "true, a path, or auto",
    "optimizer": "a node with a _component_ such as torch.optim.AdamW",
    "lr_scheduler": "a node with a _component_ such as custom_components.training.schedules.cosine",
    "dataset.column_map": "our names first",
}


def blocks() -> dict[str, str]:
    """Write the tables of docs/moving.md, by name."""
    tables = {
        tool: table(["theirs", "ours", ""], [_row(name) for name in names.split()]) for tool, names in TOOLS.items()
    }
    components = [[f"`{theirs}`", f"`{ours}`", ""] for theirs, ours in FOREIGN_COMPONENTS.items()]
    components += [[f"`{theirs}`", "", f"`{keys}`"] for theirs, keys in FOREIGN_COMPONENT_KEYS.items()]
    return {**tables, "components": table(["theirs", "ours", "with"], components)}


def _row(name: str) -> list[str]:
    if name in SAME:
        return [f"`{name}`", "the same", plain(SAME[name])]
    answer = FOREIGN_KEYS.get(name) or FOREIGN_KEYS[name.rpartition(".")[2]]
    return [f"`{name}`", f"`{answer[0].key}`" if answer[0].key else "–", plain(answer[0].note)]
