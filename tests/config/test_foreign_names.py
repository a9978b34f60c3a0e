"""Names that people bring from other tools get their answer; nearest names are given only where they are near."""

import importlib.util

import pytest
import yaml

from custom_components.config.component_checks import component_nodes, component_problems, known_annotations
from custom_components.config.components import component
from custom_components.config.foreign_names import FOREIGN_COMPONENTS, FOREIGN_KEYS
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.preference_settings import PreferenceSettings
from custom_components.config.reading import load_settings
from custom_components.config.task_settings import (
    ComparisonSettings,
    EvaluationSettings,
    GenerationSettings,
    MergeSettings,
)
from custom_components.runtime.errors import UserError
from tests.support.paths import PROJECT

CONFIGS = {
    LoRASettings: "configs/tiny_qlora.yaml",
    PreferenceSettings: "configs/tiny_dpo.yaml",
    EvaluationSettings: "configs/evaluate.yaml",
    GenerationSettings: "configs/generate.yaml",
    MergeSettings: "configs/merge.yaml",
    ComparisonSettings: "configs/compare_runs.yaml",
}


@pytest.fixture(autouse=True)
def in_project(monkeypatch):
    monkeypatch.chdir(PROJECT)


def known_keys(settings_type):
    return set(known_annotations(settings_type, yaml.safe_load((PROJECT / CONFIGS[settings_type]).read_text())))


def problems(*overrides, settings_type=LoRASettings, config=None):
    with pytest.raises(UserError) as error:
        load_settings(settings_type, ["--config", str(config or CONFIGS[settings_type]), *overrides])
    return error.value.messages


@pytest.mark.parametrize(
    ("override", "answer"),
    [
        # torchtune's
        ("dataset.packed=true", "'packed'"),
        ("dataset.train_on_input=true", "'train_on'"),
        ("dataset.conversation_column=chat", "'dataset.column_map'"),
        ("dataset.new_system_prompt=Hi", "'dataset.system_prompt'"),
        ("dataset.data_files=rows.json", "'dataset.source'"),
        ("dataset_val={_component_: custom_components.datasets.chat_dataset, data_files: a}", "'dataset_val.source'"),
        ("dataset.name=en", "'dataset.subset'"),
        ("checkpointer.checkpoint_dir=x", "'checkpoint_dir'"),
        ("profiler.enabled=false", "delete it"),
        ("log_peak_memory_stats=true", "delete it"),
        ("lr_scheduler.num_training_steps=100", "delete it"),
        # PEFT's and TRL's
        ("r=8", "'lora_rank'"),
        ("model.r=8", "'lora_rank'"),
        ("target_modules=all-linear", "'lora_attn_modules'"),
        ("load_in_4bit=true", "'quantize_base'"),
        ("report_to=wandb", "'metric_logger'"),
        ("lr=1e-4", "'learning_rate'"),
        ("per_device_train_batch_size=1", "'batch_size'"),
        ("num_train_epochs=1", "'epochs'"),
        ("max_length=512", "'max_seq_len'"),
        ("assistant_only_loss=true", "'train_on'"),
        # Axolotl's and LLaMA-Factory's
        ("lora_r=8", "'lora_rank'"),
        ("micro_batch_size=1", "'batch_size'"),
        ("sequence_len=512", "'max_seq_len'"),
        ("val_set_size=0.1", "'val_fraction'"),
        ("base_model=x", "'checkpoint_dir'"),
        ("adapter=qlora", "'quantize_base'"),
        ("datasets=[{path: a}]", "'dataset.source'"),
        ("sample_packing=true", "'packed'"),
        ("cutoff_len=512", "'max_seq_len'"),
    ],
)
def test_L26_another_tools_name_is_answered_with_ours(override, answer):
    message = problems(override)[0]
    key = override.partition("=")[0]
    assert message.startswith(
        (f"{key}: unknown key", f"{key.partition('.')[0]}: unknown key", "dataset_val.data_files:")
    )
    assert f"here it is {answer}" in message if "'" in answer else f"; {answer}" in message


def test_the_answer_of_a_name_depends_on_the_recipe():
    assert "here it is 'max_seq_len'" in problems("max_length=9")[0]
    assert "here it is 'max_new_tokens'" in problems("max_length=9", settings_type=GenerationSettings)[0]
    assert "here it is 'init_adapter_from'" in problems("adapter_name_or_path=a")[0]
    assert "here it is 'adapter_dir'" in problems("adapter_name_or_path=a", settings_type=MergeSettings)[0]
    assert "here it is" not in problems("lora_r=9", settings_type=GenerationSettings)[0]


def test_every_answer_of_the_table_is_a_key_that_some_recipe_reads():
    keys_of_recipes = [known_keys(settings_type) for settings_type in CONFIGS]
    for name, answers in FOREIGN_KEYS.items():
        assert len({answer.key for answer in answers}) == len(answers), name
        for answer in answers:
            assert answer.key or answer.note, name
            reading = [keys for keys in keys_of_recipes if answer.key in keys]
            assert answer.key is None or reading, f"{name} -> {answer.key}"
            assert not any(name in keys for keys in reading), name


@pytest.mark.parametrize(
    "name",
    [
        *("hf_token", "hf_home", "dataset.cols", "optimizer.gamma", "x", "q", "dataset.foo", "rnn"),
        *("dataset.frobnicate", "model.depth", "tokenizer.vocab", "loss.gamma", "temperature"),
    ],
)
def test_no_hint_rather_than_a_far_one(name):
    [message] = problems(f"{name}=1")
    assert "did you mean" not in message


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("lora_rnak", "lora_rank"),
        ("dataset.sauce", "dataset.source"),
        ("dataset.max_row", "dataset.max_rows"),
        ("dataset.seed", "seed"),
        ("dataset.batch_size", "batch_size"),
        ("optimizer.weigth_decay", "optimizer.weight_decay"),
        ("column_map", "dataset.column_map"),
        ("grad_accumulation_steps", "gradient_accumulation_steps"),
        ("enable_activation_checkpoint", "enable_activation_checkpointing"),
        ("max_seqlen", "max_seq_len"),
        ("checkpoint_path", "checkpoint_dir"),
        ("Lora_Rank", "lora_rank"),
        ("lora-rank", "lora_rank"),
    ],
)
def test_near_names_are_still_given(name, nearest):
    [message] = problems(f"{name}=1")
    assert f"did you mean {nearest!r}?" in message


@pytest.mark.parametrize(
    ("node", "path", "ours"),
    [
        (
            "loss",
            "torchtune.modules.loss.CEWithChunkedOutputLoss",
            "custom_components.training.loss.LinearCrossEntropy",
        ),
        ("loss", "torch.nn.CrossEntropyLoss", "custom_components.training.loss.LinearCrossEntropy"),
        ("tokenizer", "torchtune.models.llama2.llama2_tokenizer", "custom_components.transforms.Llama2ChatTransform"),
        ("tokenizer", "transformers.AutoTokenizer.from_pretrained", "custom_components.transforms.Llama2ChatTransform"),
        ("dataset", "torchtune.datasets.chat_dataset", "custom_components.datasets.chat_dataset"),
        ("dataset", "torchtune.datasets.alpaca_dataset", "custom_components.datasets.chat_dataset"),
        ("dataset_val", "torchtune.datasets.instruct_dataset", "custom_components.datasets.chat_dataset"),
        ("dataset", "datasets.load_dataset", "custom_components.datasets.chat_dataset"),
        ("model", "torchtune.models.llama2.lora_llama2_7b", "custom_components.models.lora_llama2_7b"),
        ("model", "torchtune.models.llama2.qlora_llama2_13b", "custom_components.models.lora_llama2_13b"),
        ("model", "torchtune.models.llama2.llama2_70b", "custom_components.models.lora_llama2_70b"),
        ("model", "torchtune.models.llama3.lora_llama3_8b", "custom_components.models.lora_llama3_8b"),
        ("model", "torchtune.models.llama3_2.qlora_llama3_2_1b", "custom_components.models.lora_llama3_2_1b"),
        ("model", "torchtune.models.gemma.lora_gemma_2b", "custom_components.models.lora_llama_from_config"),
        ("tokenizer", "torchtune.models.llama3.llama3_tokenizer", "transforms.ChatTransform with path"),
        ("model", "transformers.AutoModelForCausalLM", "custom_components.models.lora_llama_from_config"),
        (
            "lr_scheduler",
            "torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup",
            "custom_components.training.schedules.cosine",
        ),
        ("lr_scheduler", "torch.optim.lr_scheduler.LinearLR", "custom_components.training.schedules.linear"),
        ("optimizer", "torchtune.training.get_lr", "torch.optim.AdamW"),
        ("optimizer", "torch.nn.Linear", "torch.optim.AdamW"),
        ("optimizer", "torch.optim.LBFGS", "torch.optim.AdamW"),
        ("optimizer", "torch.optim.lr_scheduler.CosineAnnealingLR", "torch.optim.AdamW"),
        ("metric_logger", "torch.optim.AdamW", "torchtune.training.metric_logging.TensorBoardLogger"),
        ("metric_logger", "os.system", "torchtune.training.metric_logging.TensorBoardLogger"),
        ("dataset", "builtins.list", "custom_components.datasets.chat_dataset"),
        # ours, in another's place
        ("loss", "custom_components.datasets.chat_dataset", "custom_components.training.loss.LinearCrossEntropy"),
        ("dataset", "custom_components.models.lora_llama2_7b", "custom_components.datasets.chat_dataset"),
        ("tokenizer", "custom_components.models.LoRALinear", "custom_components.transforms.Llama2ChatTransform"),
        ("model", "custom_components.datasets.chat_dataset", "custom_components.models.lora_llama_from_config"),
        ("lr_scheduler", "custom_components.training.loss.LinearCrossEntropy", "training.schedules.cosine"),
        ("optimizer", "custom_components.training.schedules.cosine", "torch.optim.AdamW"),
        # no component at all
        ("optimizer", "torch.optim", "torch.optim.AdamW"),
        ("lr_scheduler", "custom_components.training.schedules.math", "custom_components.training.schedules.cosine"),
    ],
)
def test_L26_a_component_that_is_not_of_the_node_is_one_error_with_ours(node, path, ours):
    message, *others = problems(f"{node}._component_={path}")
    assert all(other.startswith(f"{node}.") for other in others)  # what ours needs beside
    assert message.startswith(f"{node}._component_: ")
    assert repr(path) in message and ours in message


def test_L26_a_config_of_torchtune_is_answered_key_by_key(tmp_path):
    """Every key of its own recipe's config that is not ours is named once, with ours where there is one."""
    (tmp_path / "config.yaml").write_text(TORCHTUNE_CONFIG)
    messages = problems(config=tmp_path / "config.yaml")
    by_key = {message.partition(": ")[0]: message for message in messages}
    assert len(by_key) == len(messages)
    for key, answer in {
        "model._component_": "custom_components.models.lora_llama2_7b",
        "tokenizer._component_": "custom_components.transforms.Llama2ChatTransform",
        "dataset._component_": "custom_components.datasets.chat_dataset",
        "dataset.packed": "'packed'",
        "loss._component_": "custom_components.training.loss.LinearCrossEntropy",
        "lr_scheduler._component_": "custom_components.training.schedules.cosine",
        "checkpointer": "'checkpoint_dir'",
        "profiler": "delete it",
        "save_adapter_weights_only": "delete it",
    }.items():
        assert answer in by_key[key], key


TORCHTUNE_CONFIG = """\
output_dir: /tmp/out
model:
  _component_: torchtune.models.llama2.lora_llama2_7b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: True
  apply_lora_to_output: False
  lora_rank: 8
  lora_alpha: 16
  lora_dropout: 0.0
tokenizer:
  _component_: torchtune.models.llama2.llama2_tokenizer
  path: /tmp/Llama-2-7b-hf/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: /tmp/Llama-2-7b-hf
  checkpoint_files: [pytorch_model-00001-of-00002.bin]
  adapter_checkpoint: null
  output_dir: ${output_dir}
  model_type: LLAMA2
resume_from_checkpoint: False
save_adapter_weights_only: False
dataset:
  _component_: torchtune.datasets.alpaca_cleaned_dataset
  packed: False
seed: null
shuffle: True
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  fused: True
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 1
max_steps_per_epoch: null
gradient_accumulation_steps: 8
clip_grad_norm: null
compile: False
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
log_every_n_steps: 1
log_peak_memory_stats: True
device: cuda
dtype: bf16
enable_activation_checkpointing: True
enable_activation_offloading: False
profiler:
  _component_: torchtune.training.setup_torch_profiler
  enabled: False
"""


def test_a_component_of_the_users_own_is_held_against_its_signature(tmp_path, monkeypatch):
    (tmp_path / "my_parts.py").write_text(
        "import torch\n"
        "def rate(step, num_steps, num_warmup_steps): return 1.0\n"
        "def other_rate(step): return 1.0\n"
        "def any_rate(**keys): return 1.0\n"
        "def dataset(tokenizer, source): return []\n"
        "def anything(): return object()\n"
        "def adam(params, lr): return torch.optim.AdamW(params, lr)\n"
        "def listed(tokenizer, source) -> list: return []\n"
        "class Rows:\n"
        "    def __init__(self, tokenizer, source):\n"
        "        self.lengths, self.digest, self.summaries = [], '', []\n"
        "    def __len__(self): return 0\n"
        "    def __getitem__(self, index): return {}\n"
        "    def rows(self, indices): return self\n"
        "    def content_digest(self, index): return b''\n"
        "    def prompt_digest(self, index): return b''\n"
        "class Wrapped:\n"
        "    def __init__(self, tokenizer, source): self.rows_of = Rows(tokenizer, source)\n"
        "    def __getattr__(self, name): return getattr(self.rows_of, name)\n"
        "class Loss:\n"
        "    def __call__(self, hidden_PD, output_head, labels_P): return 0\n"
        "class TwoLoss(torch.nn.Module):\n"
        "    def forward(self, logits, labels): return 0\n"
        "class Adam(torch.optim.AdamW): pass\n"
    )
    monkeypatch.syspath_prepend(tmp_path)

    def load(*overrides):
        trusted = ["--trust-components", "my_parts"]
        return load_settings(LoRASettings, ["--config", CONFIGS[LoRASettings], *trusted, *overrides])

    for good in (
        *("lr_scheduler._component_=my_parts.rate", "lr_scheduler._component_=my_parts.any_rate"),
        *("dataset={_component_: my_parts.dataset, source: a}", "dataset={_component_: my_parts.Rows, source: a}"),
        *("dataset={_component_: my_parts.Wrapped, source: a}", "tokenizer={_component_: my_parts.anything}"),
        *("model={_component_: my_parts.anything}", "optimizer={_component_: my_parts.adam, lr: 1e-3}"),
        *("loss={_component_: my_parts.anything}", "metric_logger={_component_: my_parts.anything}"),
        *("loss={_component_: my_parts.Loss}", "optimizer._component_=my_parts.Adam"),
    ):
        load(good)
    for bad in (
        *("lr_scheduler={_component_: my_parts.other_rate}", "loss={_component_: my_parts.TwoLoss}"),
        "dataset={_component_: my_parts.listed, source: a}",
    ):
        [message] = problems("--trust-components=my_parts", bad)
        assert message.startswith(f"{bad.partition('.')[0].partition('=')[0]}._component_: 'my_parts.")


def test_the_components_of_the_table_are_there_and_fit_their_nodes():
    for path in FOREIGN_COMPONENTS.values():
        component(path)
    for settings_type, config in CONFIGS.items():
        values = load_settings(settings_type, ["--config", config]).model_dump(mode="json")
        for name, marker in component_nodes(settings_type).items():
            keys = {key: value for key, value in (values[name] or {}).items() if key in ("source", "path", "lr")}
            node = {"_component_": marker.ours, "checkpoint_dir": "a", "lora_attn_modules": [], **keys}
            fits = [problem for problem in component_problems(name, node, marker, []) if "_component_" in problem.key]
            assert fits == [], name


def test_a_node_given_as_text_is_told_what_a_node_is():
    assert "optimizer.lr" not in problems("lr_scheduler=cosine")[0]
    for name in ("lr_scheduler", "optimizer", "loss", "model", "tokenizer", "dataset"):
        messages = problems(f"{name}=cosine")
        assert any(
            "_component_" in message and message.startswith(f"{name}: 'cosine' should be") for message in messages
        )


def test_a_key_in_a_node_of_no_name_is_placed_at_the_override_that_made_it():
    assert problems("profiler.enabled=false")[0].endswith("(override 'profiler.enabled=false')")


def test_the_place_of_a_problem_in_a_list_is_its_line(tmp_path):
    text = (PROJECT / CONFIGS[LoRASettings]).read_text()
    begin = text.index("  source: examples/")
    entries = "  source:\n    - source: a.jsonl\n    - source: b.jsonl\n      wieght: 2\n"
    (tmp_path / "config.yaml").write_text(text[:begin] + entries + text[text.index("  split: train") :])
    line = text[:begin].count("\n") + 4
    [message] = problems(config=tmp_path / "config.yaml")
    assert message.startswith("dataset.source[1].wieght: unknown key; did you mean 'dataset.source[1].weight'?")
    assert message.endswith(f"({tmp_path / 'config.yaml'}:{line})")


@pytest.mark.parametrize(
    ("override", "problem"),
    [
        (
            "optimizer.betas=[2, 3]",
            "optimizer: torch.optim.AdamW refuses its keys: Invalid beta parameter",
        ),
        ("optimizer.eps=-1", "optimizer: torch.optim.AdamW refuses its keys: Invalid epsilon value: -1"),
        ("optimizer.lr=-1", "optimizer: torch.optim.AdamW refuses its keys: Invalid learning rate: -1"),
        ("lr_scheduler.final_ratio=-1", "lr_scheduler: custom_components.training.schedules.cosine refuses its keys: "),
        ("lr_scheduler.final_ratio=.nan", "lr_scheduler: "),
        (
            "metric_logger={_component_: torchtune.training.metric_logging.WandBLogger}",
            "metric_logger: torchtune.training.metric_logging.WandBLogger refuses its keys: it needs the package "
            "wandb: pip install -e '.[wandb]'",
        ),
    ],
)
def test_L26_what_a_component_refuses_is_found_before_anything_is_loaded(override, problem, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    [message] = problems(override)
    assert message.startswith(problem)
