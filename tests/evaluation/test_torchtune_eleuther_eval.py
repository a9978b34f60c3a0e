"""torchtune's own recipe eleuther_eval: its wrapper of a model for lm-eval, around ours."""

import importlib.metadata
import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import torchtune
from omegaconf import OmegaConf

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


TASK = """
task: tiny_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{validation: {rows}}}}}
validation_split: validation
output_type: {kind}
doc_to_text: question
{entries}
"""
ENTRIES = {
    "multiple_choice": "doc_to_choice: choices\ndoc_to_target: label\nmetric_list: [{metric: acc}]",
    "generate_until": "doc_to_target: answer\nmetric_list: [{metric: exact_match}]\n"
    "generation_kwargs: {until: ['.'], do_sample: false, temperature: 0.0}",
}


@pytest.mark.slow
def test_the_recipe_as_a_whole_measures_our_model(test_data, recipe, tmp_path, monkeypatch, caplog):
    """On a multiple choice that the model of children's stories knows, and on a question."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    # lm-eval's class loads "gpt2", of which torchtune uses nothing: a directory of that name is found first.
    monkeypatch.chdir(tmp_path)
    sizes = {"vocab_size": 3, "n_embd": 8, "n_layer": 1, "n_head": 1, "bos_token_id": 1, "eos_token_id": 1}
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).save_pretrained("gpt2")
    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "</s>": 1, "?": 2}, unk_token="?"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained("gpt2")
    # torchtune compares versions as texts, in which 0.4.13 comes before its 0.4.5.
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.4.9")
    checkpoint = tmp_path / "checkpoint"
    shutil.copytree(test_data("stories260K/config.json").parent, checkpoint)
    (checkpoint / "model.safetensors.index.json").write_text("{}")  # torchtune's checkpointer wants one
    row = {
        "question": "Once upon a time, there was a little",
        "choices": [" girl", " qzx"],
        "label": 0,
        "answer": "girl",
    }
    (tmp_path / "rows.jsonl").write_text((json.dumps(row) + "\n") * 3)
    for kind, entries in ENTRIES.items():
        (tmp_path / f"{kind}.yaml").write_text(TASK.format(kind=kind, rows=tmp_path / "rows.jsonl", entries=entries))
    config = OmegaConf.load(PATH.parent / "configs/eleuther_evaluation.yaml")
    config |= {
        "device": "cpu",
        "dtype": "fp32",
        "model": {"_component_": "custom_components.models.llama_from_config", "checkpoint_dir": str(checkpoint)},
        "tokenizer": {
            "_component_": "custom_components.models.llama2_tokenizer",
            "path": f"{checkpoint}/tokenizer.model",
        },
        "tasks": [f"tiny_{kind}" for kind in ENTRIES],
        "batch_size": 2,
        "max_seq_length": 512,
        "include_path": str(tmp_path),
    }
    config.checkpointer |= {"checkpoint_dir": str(checkpoint), "checkpoint_files": ["model.safetensors"]}
    measured = recipe.EleutherEvalRecipe(config)
    measured.setup(config)
    with caplog.at_level("INFO"):
        measured.evaluate()
    [choice] = [line for line in caplog.text.splitlines() if line.startswith("|tiny_multiple_choice")]
    assert re.search(r"\|acc +\|.*\| +1\|", choice)
    assert "|tiny_generate_until" in caplog.text
