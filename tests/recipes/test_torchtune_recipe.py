"""The parts in torchtune's own recipe and configs, in which only the package of the models' names is replaced."""

import json
from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf
from torchtune.config import instantiate
from torchtune.config._utils import _get_component_from_path
from torchtune.training import set_default_dtype

from custom_components.models import llama2_tokenizer
from custom_components.models.shapes import LLAMA2_7B, LLAMA2_13B, LLAMA2_70B
from custom_components.transforms import Llama2ChatTransform
from tests.support.forked_tune import ForkedTune
from tests.support.models import loaded_model
from tests.support.paths import TINY_TOKENIZER

STOCK_CONFIGS = Path(torchtune.__file__).parents[1] / "recipes/configs/llama2"


def with_our_models(config: str, folder: Path = STOCK_CONFIGS) -> str:
    return (folder / config).read_text().replace("torchtune.models.llama2.", "custom_components.models.")


def our_chat_dataset(rows):
    return ["dataset._component_=custom_components.datasets.chat_dataset", f"dataset.source={rows}"]


def torchtune_chat_dataset(rows):
    component = "dataset._component_=torchtune.datasets.chat_dataset"
    columns = ["dataset.conversation_column=messages", "dataset.conversation_style=openai", "dataset.split=train"]
    return [component, "dataset.source=json", f"dataset.data_files={rows}", *columns]


@pytest.mark.parametrize(
    ("config", "dtype", "dataset"),
    [
        ("7B_lora_single_device.yaml", "fp32", torchtune_chat_dataset),
        ("7B_lora_single_device.yaml", "bf16", our_chat_dataset),
        ("7B_qlora_single_device.yaml", "bf16", our_chat_dataset),
    ],
)
def test_torchtunes_own_recipe_and_config_train_our_parts(make_checkpoint, tmp_path, config, dtype, dataset):
    checkpoint = make_checkpoint(hidden_size=128, intermediate_size=256)
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    rows = tmp_path / "rows.jsonl"
    dialog = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
    rows.write_text("".join(json.dumps({"messages": dialog}) + "\n" for _ in range(4)))
    (tmp_path / "config.yaml").write_text(with_our_models(config))
    tiny = ["model._component_=custom_components.models.lora_llama_from_config", f"model.checkpoint_dir={checkpoint}"]
    files = [f"checkpointer.checkpoint_dir={checkpoint}", "checkpointer.checkpoint_files=[model.safetensors]"]
    short = ["max_steps_per_epoch=1", "gradient_accumulation_steps=1", "save_adapter_weights_only=true", "seed=0"]
    result = ForkedTune(
        *("run", "lora_finetune_single_device", "--config", str(tmp_path / "config.yaml")),
        *("device=cpu", f"dtype={dtype}", f"output_dir={tmp_path / 'out'}", "log_peak_memory_stats=false"),
        *(f"tokenizer.path={checkpoint}/tokenizer.model", *dataset(rows), *tiny, *files, *short),
        *(["model.quantize_base=true"] if "qlora" in config else []),
    ).result()
    assert result.returncode == 0, result.stderr[-3000:]
    assert "loss:" in next((tmp_path / "out/logs").glob("*.txt")).read_text()
    assert list((tmp_path / "out").rglob("adapter_model.safetensors"))


@pytest.mark.parametrize("cached", [True, False])
def test_torchtunes_own_generate_answers_with_our_parts(make_checkpoint, tmp_path, cached):
    checkpoint = make_checkpoint()
    model = loaded_model(checkpoint).eval()
    (checkpoint / "model.safetensors.index.json").write_text("{}")
    (tmp_path / "config.yaml").write_text(with_our_models("generation.yaml", STOCK_CONFIGS.parent))
    prompt, tiny = "Which tree grows there?", "custom_components.models.llama_from_config"
    result = ForkedTune(
        *("run", "generate", "--config", str(tmp_path / "config.yaml"), "device=cpu", "dtype=fp32", "top_k=1"),
        *(f"model._component_={tiny}", f"model.checkpoint_dir={checkpoint}", f"tokenizer.path={TINY_TOKENIZER}"),
        *(f"checkpointer.checkpoint_dir={checkpoint}", "checkpointer.checkpoint_files=[model.safetensors]"),
        *(f"checkpointer.output_dir={tmp_path / 'out'}", f"prompt.user={prompt}", "max_new_tokens=12"),
        f"enable_kv_cache={cached}",
    ).result()
    assert result.returncode == 0, result.stderr[-3000:]
    tokenizer = llama2_tokenizer(str(TINY_TOKENIZER), prompt_template=None)
    ids = tokenizer({"messages": [{"role": "user", "content": prompt}]}, inference=True)["tokens"]
    with torch.no_grad():
        for _ in range(12):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    assert tokenizer.decode(ids) in result.stdout + result.stderr


@pytest.mark.parametrize("config", ["7B_full.yaml", "7B_qlora_single_device.yaml"])
def test_a_stock_config_makes_torchtune_s_parameters(config):
    """Their names, shapes and dtypes: torchtune's recipes refuse adapters in another dtype than their own."""
    ours, theirs = with_our_models(config), (STOCK_CONFIGS / config).read_text()
    with torch.device("meta"), set_default_dtype(torch.bfloat16):
        model = instantiate(OmegaConf.create(ours).model)
        # Not quantized, which it does on the CPU whatever the device: for a minute.
        expected = instantiate(OmegaConf.create(theirs.replace("qlora_", "lora_")).model)

    def parameters(model):
        return {name: (parameter.shape, parameter.dtype) for name, parameter in model.named_parameters()}

    assert parameters(model) == parameters(expected)


@pytest.mark.parametrize("config", sorted(path.name for path in STOCK_CONFIGS.glob("*[0-9]B_*.yaml")))
def test_every_name_in_a_stock_config_is_here(config):
    ours = OmegaConf.create(with_our_models(config))
    assert "torchtune.models" not in f"{ours.model} {ours.tokenizer}"
    assert _get_component_from_path(ours.model._component_).args[0] in (LLAMA2_7B, LLAMA2_13B, LLAMA2_70B)
    ours.tokenizer.path = str(TINY_TOKENIZER)
    assert isinstance(instantiate(ours.tokenizer), Llama2ChatTransform)
