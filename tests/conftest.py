"""What the tests share: where real data lies, and small checkpoints made on the spot."""

import os

os.environ.setdefault(
    "GOMP_SPINCOUNT", "3000"
)  # before torch is imported; see custom_components/runtime/tune_startup.py
os.environ["HF_HUB_OFFLINE"] = "1"

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchtune.modules import TransformerDecoder

from custom_components.models.builders import lora_llama_from_config
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.weights.checkpoint_loading import load_base_weights

PROJECT = Path(__file__).parent.parent
TINY_LLAMA = PROJECT / "examples/tiny_llama"
TINY_TOKENIZER = TINY_LLAMA / "checkpoint/tokenizer.model"
CPU = torch.device("cpu")
ALL_ATTENTION = ["q_proj", "k_proj", "v_proj", "output_proj"]


@pytest.fixture(scope="session")
def test_data() -> Callable[[str], Path]:
    """Paths in the folder of real data: LLAMA_TEST_DATA, by default ../shared/data. Skips where the file is absent."""
    folder = Path(os.environ.get("LLAMA_TEST_DATA", PROJECT.parent / "shared/data"))

    def path_of(name: str) -> Path:
        if not (folder / name).exists():
            pytest.skip(f"real data not there: set LLAMA_TEST_DATA to a folder with {name}")
        return folder / name

    return path_of


@pytest.fixture(scope="session")
def tiny_tokenizer() -> Llama2ChatTransform:
    return Llama2ChatTransform(TINY_TOKENIZER)


@pytest.fixture
def peft(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """PEFT, which refuses to build any LoRA layer beside a torchao older than 0.16, told that there is no torchao."""
    module = pytest.importorskip("peft")
    monkeypatch.setattr("peft.tuners.lora.torchao.is_torchao_available", lambda: False)
    return module


def hugging_face_config(**changes: object) -> dict[str, object]:
    """config.json of a Llama small enough to make in a test: grouped-query heads, untied embeddings."""
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "max_position_embeddings": 256,
        "tie_word_embeddings": False,
        "vocab_size": 1024,
        "torch_dtype": "float32",
    } | changes


def hugging_face_tensors(config: dict, seed: int = 0) -> dict[str, Tensor]:
    """Random weights for a config.json, under Hugging Face's names."""
    generator = torch.Generator().manual_seed(seed)
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    kv_dim = dim // config["num_attention_heads"] * config["num_key_value_heads"]

    def weight(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator) * 0.1

    tensors = {"model.embed_tokens.weight": weight(vocab, dim), "model.norm.weight": 1 + weight(dim)}
    if not config["tie_word_embeddings"]:
        tensors["lm_head.weight"] = weight(vocab, dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}"
        tensors |= {
            f"{prefix}.self_attn.q_proj.weight": weight(dim, dim),
            f"{prefix}.self_attn.k_proj.weight": weight(kv_dim, dim),
            f"{prefix}.self_attn.v_proj.weight": weight(kv_dim, dim),
            f"{prefix}.self_attn.o_proj.weight": weight(dim, dim),
            f"{prefix}.mlp.gate_proj.weight": weight(hidden, dim),
            f"{prefix}.mlp.up_proj.weight": weight(hidden, dim),
            f"{prefix}.mlp.down_proj.weight": weight(dim, hidden),
            f"{prefix}.input_layernorm.weight": 1 + weight(dim),
            f"{prefix}.post_attention_layernorm.weight": 1 + weight(dim),
        }
    return tensors


def write_checkpoint(directory: Path, **changes: object) -> Path:
    """A small random checkpoint; keyword arguments change its config.json."""
    directory.mkdir()
    config = hugging_face_config(**changes)
    (directory / "config.json").write_text(json.dumps(config))
    save_file(hugging_face_tensors(config), directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    return directory


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random checkpoint directory; keyword arguments change its config.json."""

    def make(name: str = "checkpoint", **changes: object) -> Path:
        return write_checkpoint(tmp_path / name, **changes)

    return make


def loaded_model(
    checkpoint_dir: Path, dtype: torch.dtype = torch.float32, seed: int = 0, **lora: object
) -> TransformerDecoder:
    """A checkpoint's model with adapters on all linear layers, unless told otherwise."""
    settings = {"lora_attn_modules": ALL_ATTENTION, "apply_lora_to_mlp": True, "lora_rank": 4} | lora
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint_dir, **settings)
    torch.manual_seed(seed)
    load_base_weights(model, checkpoint_dir, dtype, CPU)
    return model


def with_random_adapters(model: TransformerDecoder, seed: int = 1) -> TransformerDecoder:
    """Gives every B a value, so that the adapters change the output."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_b" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model
