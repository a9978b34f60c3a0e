"""torchtune's own recipe eleuther_eval: its wrapper of a model for lm-eval, around ours."""

import importlib.util
from pathlib import Path

import pytest
import torch
import torchtune

from tests.support.models import CPU, loaded_model, with_random_adapters

pytest.importorskip("lm_eval.models.huggingface")
PATH = Path(torchtune.__file__).parents[1] / "recipes/eleuther_eval.py"


@pytest.fixture(scope="module")
def recipe():
    spec = importlib.util.spec_from_file_location("torchtune_eleuther_eval", PATH)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        pytest.skip(f"torchtune's recipe cannot be imported here: {error}")
    return module


@torch.inference_mode()
@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_batch_is_answered_as_its_prompts_alone(make_checkpoint, tiny_tokenizer, recipe, monkeypatch, batch_size):
    """Its batches are padded to the left, and with rows up to `batch_size`."""
    model = with_random_adapters(loaded_model(make_checkpoint())).eval()
    # Its parent loads GPT-2 from the hub and uses nothing of it.
    monkeypatch.setattr(recipe.HFLM, "__init__", lambda self, **_: None)
    settings = {"device": CPU, "max_seq_length": 96, "dtype": torch.float32}
    wrapper = recipe._LLMEvalWrapper(model, tiny_tokenizer, batch_size=batch_size, **settings)
    wrapper._device = CPU
    monkeypatch.setattr(type(wrapper), "max_gen_toks", 6)
    texts = ["Which tree grows there?", "Who?", "The river is"][:batch_size]
    prompts, _ = wrapper.tok_batch_encode(texts)
    answers = wrapper._model_generate(prompts)[:, prompts.shape[1] :]
    for text, answer in zip(texts, answers, strict=True):
        [ids] = wrapper.tok_batch_encode([text])[0]
        for expected in answer.tolist():
            if expected in (0, tiny_tokenizer.eos_id):
                break
            assert wrapper._model_call(ids[None])[0, -1].argmax() == expected
            ids = torch.cat([ids, torch.tensor([expected])])
    assert isinstance(wrapper.tok_decode(answers[0].tolist()), str)
