"""Model cards: what they say is known, and nothing of the machine."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

from custom_components.config.components import instantiate
from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.datasets.chat import chat_dataset
from custom_components.datasets.tokenized_rows import split_validation
from custom_components.export.merged_card import merged_card
from custom_components.models.shapes import LLAMA2_7B
from custom_components.runs.adapter_card import TrainingFacts, adapter_card
from custom_components.training.state import Progress
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapter_settings import adapter_settings
from custom_components.weights.card import CARD_NAME, TrainedSteps
from custom_components.weights.checkpoint_files import BaseCheckpoint
from custom_components.weights.checkpoint_loading import base_format
from tests.support.paths import PROJECT, TINY_TOKENIZER

HUB_BASE = "meta-llama/Llama-2-7b-hf"


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "private place/rows.jsonl"
    path.parent.mkdir()
    lines = [f'{{"prompt": "Who is number {index}?", "completion": "Nobody."}}' for index in range(10)]
    path.write_text("\n".join(lines))
    return path


@pytest.fixture
def hub_checkpoint(tmp_path):
    """As `tune download` leaves it, with the base's own card."""
    directory = tmp_path / "checkpoints/llama"
    directory.mkdir(parents=True)
    (directory / "original_repo_id.json").write_text(json.dumps({"repo_id": HUB_BASE}))
    (directory / CARD_NAME).write_text("---\nlicense: llama2\nlicense_link: LICENSE.txt\n---\n# Llama 2\n")
    return directory


@pytest.fixture
def make_card(rows, tmp_path, monkeypatch):
    """The card of a run over `rows` with these overrides, its validation over one in five rows where asked."""
    monkeypatch.chdir(PROJECT)
    metrics = tmp_path / "metrics.jsonl"
    records = [{"step": 1, "loss": 3.0, "supervised_tokens": 10}, {"step": 2, "loss": 1.0, "supervised_tokens": 30}]
    metrics.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"step": 2, "val_loss": 1.25}]))

    def make(*overrides, sources=None, validates=True, system_prompt=None):
        arguments = ["--config", "configs/tiny_qlora.yaml", f"dataset.source={rows}"]
        arguments.append("model.checkpoint_dir=examples/tiny_llama/checkpoint")
        settings = load_settings(LoRASettings, [*arguments, *overrides])
        with torch.device("meta"):
            model = instantiate(settings.model)
        dataset = chat_dataset(Llama2ChatTransform(TINY_TOKENIZER), str(rows))
        if sources is not None:
            counts = {"num_rows": 12, "num_kept": 10, "num_taken": 10}
            dataset.summaries = [type(dataset.summaries[0])(**part, **counts) for part in sources]
        dataset_val = None
        progress = Progress(num_steps=2)
        if validates:
            dataset, dataset_val = split_validation(dataset, 0.2, seed=0)
            progress = Progress(num_steps=2, best_step=1, best_val_loss=1.25)
        training = TrainingFacts(
            BaseCheckpoint(settings.checkpoint_dir, LLAMA2_7B),
            adapter_settings(model),
            base_format(model),
            PromptFormat(settings.prompt_template, system_prompt, ["</s>"]),
            settings.train_on,
            settings.training_hyperparameters(),
        )
        return adapter_card(training, dataset, dataset_val, progress, TrainedSteps(2, 2, is_finished=True), metrics)

    return make


def assert_says_no_path(card: str, tmp_path: Path) -> None:
    for folder in (tmp_path, PROJECT, Path.home()):
        assert str(folder) not in card
    assert "private place" not in card and "examples/" not in card


def test_an_adapter_of_a_hub_model(make_card, hub_checkpoint, tmp_path):
    text = make_card(f"checkpoint_dir={hub_checkpoint}", "lora_rank=20")
    card = ModelCard(text)
    assert card.data.to_dict() == {
        "base_model": HUB_BASE,
        "training_progress": {"num_steps": 2, "num_planned_steps": 2, "is_finished": True},
        "base_model_relation": "adapter",
        "library_name": "peft",
        "license": "llama2",
        "pipeline_tag": "text-generation",
        "tags": ["lora", "qlora", "llama-lora-recipes"],
    }
    for words in (
        f"# QLoRA adapter for [{HUB_BASE}](https://huggingface.co/{HUB_BASE})",
        "the state after step 1 of 2, the best by validation loss",
        "- `rows.jsonl`: 10 rows\n",
        "- training, last step: 1.0000\n- training, mean over the tokens of all steps: 1.5000\n",
        "- validation, best, after step 1: 1.2500\n",
        "- adapted modules: q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj\n",
        "- optimizer.lr: 0.001\n",
        "<s>[INST] {question} [/INST] {answer} </s><s>[INST] {question} [/INST] {answer} </s>",
        f'AutoModelForCausalLM.from_pretrained("{HUB_BASE}")',
        f"vllm serve {HUB_BASE} --enable-lora --max-lora-rank 32 ",
    ):
        assert words in text, words
    assert_says_no_path(text, tmp_path)


def test_an_adapter_of_a_local_model_names_no_base_and_no_licence(make_card, tmp_path):
    text = make_card(validates=False)
    card = ModelCard(text)
    assert set(card.data.to_dict()) == {"library_name", "pipeline_tag", "tags", "training_progress"}
    assert "# QLoRA adapter for `checkpoint`" in text and 'from_pretrained("path/to/checkpoint")' in text
    assert "the state after the last of 2 steps" in text
    assert "validat" not in text
    assert_says_no_path(text, tmp_path)


def test_hub_data_sets_are_named_and_files_are_not(make_card, tmp_path):
    mix = [{"source": "yahma/alpaca-cleaned", "weight": 0.5}, {"source": "data/rows.jsonl"}]
    text = make_card(sources=[*mix, {"source": "a/b", "split": "validation"}])
    assert ModelCard(text).data.datasets == ["yahma/alpaca-cleaned", "a/b"]
    link = "[yahma/alpaca-cleaned](https://huggingface.co/datasets/yahma/alpaca-cleaned)"
    assert f"- {link}, weight 0.5: 10 of 12 rows\n" in text
    assert "- `rows.jsonl`, weight 1: 10 of 12 rows\n" in text
    assert "a/b), split validation, weight 1: 10 of 12 rows\n" in text
    assert "data/rows" not in text


def test_a_template_of_ones_own_is_shown_as_it_is_tokenized(make_card):
    template = {"user": "Q: ```{content}```\n", "assistant": "A: {content}"}
    text = make_card(f"prompt_template={json.dumps(template)}", system_prompt="Be kind.")
    shown = "Be kind.\n\nQ: ```{question}```\nA: {answer}</s><s>Q: ```{question}```\nA: {answer}</s>"
    assert f"````text\n<s>{shown}\n````" in text


@pytest.mark.parametrize("variant", ["use_rslora", "use_dora"])
def test_variants_are_named(make_card, variant):
    text = make_card(f"{variant}=true", "quantize_base=false")
    assert f"- {variant}: yes\n" in text and "NF4" not in text
    assert ModelCard(text).data.tags == ["lora", "llama-lora-recipes"]
    # vLLM takes no DoRA.
    assert ("vllm serve" in text, "model.load_adapter(" in text) == (
        (True, False) if variant == "use_rslora" else (False, True)
    )


def test_a_merged_model_takes_over_what_the_adapter_says(make_card, hub_checkpoint, tmp_path):
    adapter = tmp_path / "private place/adapter"
    adapter.mkdir()
    card_text = make_card(f"checkpoint_dir={hub_checkpoint}", sources=[{"source": "a/set"}])
    (adapter / CARD_NAME).write_text(card_text)
    text = merged_card(BaseCheckpoint(hub_checkpoint, LLAMA2_7B), [(adapter, 1.0)], "original")
    assert ModelCard(text).data.to_dict() == {
        "base_model": HUB_BASE,
        "base_model_relation": "finetune",
        "datasets": ["a/set"],
        "library_name": "transformers",
        "license": "llama2",
        "pipeline_tag": "text-generation",
        "tags": ["llama-lora-recipes"],
    }
    sections = card_text[card_text.index("## Data") : card_text.index("## How to load it")]
    assert sections in text
    assert "merged in" in text and "PeftModel" not in text and "convert_hf_to_gguf.py path/to/merged" in text
    assert_says_no_path(text, tmp_path)


@pytest.mark.parametrize("theirs", ["library_name: peft", "tags: null", "tags: 5"])
def test_merged_adapters_without_a_card_of_ours_are_only_named(hub_checkpoint, tmp_path, theirs):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    (tmp_path / "second" / CARD_NAME).write_text(f"---\n{theirs}\n---\n# Theirs\n\n## Data\n\nSecret.\n")
    base = BaseCheckpoint(hub_checkpoint, LLAMA2_7B)
    text = merged_card(base, [(tmp_path / "first", 0.7), (tmp_path / "second", 0.3)], "dequantized")
    assert "**Adapter `first`, weight 0.7**" in text and "**Adapter `second`, weight 0.3**" in text
    assert "2 LoRA adapters merged in" in text and "the base's dequantized weights" in text
    assert "Secret" not in text and "## Data" not in text


@pytest.mark.parametrize("front_matter", ["---\nlicense: [a\n---\n", "no front matter\n", "---\n- a\n---\n", "\xff"])
def test_a_card_of_the_base_that_cannot_be_read_gives_no_licence(make_card, hub_checkpoint, front_matter):
    (hub_checkpoint / CARD_NAME).write_text(front_matter, encoding="latin-1")
    assert ModelCard(make_card(f"checkpoint_dir={hub_checkpoint}")).data.license is None
