"""The parts in torchtune's own recipe: its lora_finetune_single_device with our builder and transform in its config."""

import json

import pytest

from tests.support.forked_tune import ForkedTune

CONFIG = """
output_dir: {output_dir}
model:
  _component_: custom_components.models.lora_llama_from_config
  checkpoint_dir: {checkpoint_dir}
  lora_attn_modules: [q_proj, v_proj]
  apply_lora_to_mlp: true
  lora_rank: 4
  lora_alpha: 8
  adapter_dtype: {dtype}
  quantize_base: {quantize_base}
tokenizer:
  _component_: custom_components.transforms.Llama2ChatTransform
  path: {checkpoint_dir}/tokenizer.model
  max_seq_len: 128
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: {checkpoint_dir}
  checkpoint_files: [model.safetensors]
  recipe_checkpoint: null
  output_dir: ${{output_dir}}
  model_type: LLAMA2
resume_from_checkpoint: false
save_adapter_weights_only: true
dataset:
  _component_: torchtune.datasets.chat_dataset
  source: json
  data_files: {rows}
  conversation_column: messages
  conversation_style: openai
  split: train
  packed: false
seed: 0
shuffle: true
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  lr: 1e-3
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 1
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 1
max_steps_per_epoch: 1
gradient_accumulation_steps: 1
clip_grad_norm: null
compile: false
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${{output_dir}}/logs
log_every_n_steps: 1
log_peak_memory_stats: false
device: cpu
dtype: {dtype}
enable_activation_checkpointing: false
enable_activation_offloading: false
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: false
"""


@pytest.mark.parametrize(("dtype", "quantize_base"), [("fp32", "false"), ("bf16", "false"), ("bf16", "true")])
def test_torchtunes_own_recipe_trains_our_parts(make_checkpoint, tmp_path, dtype, quantize_base):
    checkpoint = make_checkpoint(hidden_size=128, intermediate_size=256)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    dialog = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows.write_text("".join(json.dumps({"messages": dialog}) + "\n" for _ in range(4)))
    config = tmp_path / "config.yaml"
    config.write_text(
        CONFIG.format(
            output_dir=tmp_path / "out", checkpoint_dir=checkpoint, rows=rows, dtype=dtype, quantize_base=quantize_base
        )
    )
    result = ForkedTune("run", "lora_finetune_single_device", "--config", str(config)).result()
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss:" in next((tmp_path / "out/logs").glob("*.txt")).read_text()
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))
