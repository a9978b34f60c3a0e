"""The fixtures that tests share. What they are made of is in tests/support/."""

import os
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from custom_components.transforms.llama2_chat import Llama2ChatTransform
from tests.support.checkpoints import write_checkpoint
from tests.support.paths import PROJECT, TINY_TOKENIZER
from tests.support.rows import random_dialogs, write_dialogs


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


@pytest.fixture
def peft_model(peft: ModuleType) -> Callable[..., Any]:
    """A function that puts a LoRA adapter with random values on transformers' model of a checkpoint.

    `num_embeddings` resizes its vocabulary first.
    """
    transformers = pytest.importorskip("transformers")

    def build(checkpoint: Path, num_embeddings: int | None = None, **config: object) -> Any:
        torch.manual_seed(0)
        base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
        if num_embeddings is not None:
            base.resize_token_embeddings(num_embeddings)
        settings = {"r": 3, "lora_alpha": 9, "target_modules": ["q_proj", "k_proj"], "init_lora_weights": False}
        model = peft.get_peft_model(base, peft.LoraConfig(**settings | config))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "magnitude" in name or "trainable_tokens_delta" in name:
                    parameter.mul_(1 + 0.3 * torch.rand(parameter.shape))
        return model.eval()

    return build


@pytest.fixture
def make_checkpoint(tmp_path: Path) -> Callable[..., Path]:
    """Writes a small random checkpoint directory; keyword arguments change its config.json."""

    def make(name: str = "checkpoint", **changes: object) -> Path:
        return write_checkpoint(tmp_path / name, **changes)

    return make


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """A file of three dialogs."""
    dialogs = [("What is it?", "A word."), ("And that?", "Another, longer word."), ("Who?", "Nobody.")]
    return write_dialogs(tmp_path / "rows.jsonl", dialogs)


@pytest.fixture
def many_rows(tmp_path: Path) -> Path:
    """A file of forty dialogs."""
    return write_dialogs(tmp_path / "many.jsonl", random_dialogs(40))
