"""Models that are not Llama 2 as published, from preview to GGUF, by their shapes, their tokenizers and their files."""

import pytest
import torch
import yaml

from custom_components.transforms.prompt_format import read_prompt_format, tokenizer_with_format
from tests.support.go_template import rendered_in_python
from tests.support.modelfile import ollama_prompt
from tests.support.other_llamas import OTHER_LLAMAS
from tests.support.recipe_runs import arguments, run_here, run_merge
from tests.support.rows import random_dialogs, write_dialogs


def done(recipe: str, *overrides: str) -> str:
    code, out, err = run_here(recipe, *overrides)
    assert code == 0, err
    return out


@pytest.mark.parametrize(
    "name",
    ["llama3_2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("mistral", "json", "meta", "chatml"))],
)
def test_from_preview_to_gguf(tmp_path, name):
    gguf = pytest.importorskip("gguf")
    transformers = pytest.importorskip("transformers")
    llama = OTHER_LLAMAS[name]
    checkpoint = llama.write(tmp_path)
    rows = write_dialogs(tmp_path / "rows.jsonl", random_dialogs(8))
    output = tmp_path / "out"
    training = arguments(
        checkpoint, rows, output, f"prompt_template={llama.template}", "max_steps=4", "save_every_n_steps=2"
    )
    training += ["lora_rank=4", "device=cpu", "dtype=fp32", "quantize_base=true"]

    shown = done("preview", *training)
    assert llama.stops[0].strip("<>") in shown
    done("lora_single_device", *training, "max_steps=2")
    done(
        "lora_single_device",
        *training,
        f"resume_from_checkpoint={output}/checkpoints/step_000002",
        "overwrite_output_dir=false",
    )
    prompt_format = yaml.safe_load((output / "adapter/prompt_format.yaml").read_text())
    assert (prompt_format["prompt_template"], prompt_format["stop_tokens"]) == (llama.chosen, llama.stops)
    of_adapter = [f"checkpoint_dir={checkpoint}", f"adapter_dir={output}/adapter", "device=cpu"]
    done("evaluate", "--config", "configs/evaluate.yaml", *of_adapter, f"dataset.source={rows}")
    answer = done("generate", "--config", "configs/generate.yaml", *of_adapter, "prompt=Where to?", "max_new_tokens=8")

    ours = tokenizer_with_format(checkpoint, read_prompt_format(output / "adapter"))
    question = [{"role": "user", "content": "Where to?"}]
    prompt = ours({"messages": question}, inference=True)["tokens"]
    merged = tmp_path / "merged"
    code, out, err = run_merge(checkpoint_dir=checkpoint, adapter_dir=output / "adapter", output_dir=merged)
    assert code == 0, err
    theirs = transformers.AutoTokenizer.from_pretrained(merged)
    assert theirs.apply_chat_template(question, add_generation_prompt=True, return_dict=False) == prompt
    model = transformers.AutoModelForCausalLM.from_pretrained(merged)
    generated = model.generate(torch.tensor([prompt]), max_new_tokens=8, do_sample=False)[0][len(prompt) :].tolist()
    ends = [index for index, token in enumerate(generated) if token in ours.stop_tokens]
    assert ours.decode(generated[: ends[0] if ends else None]).strip() == answer.strip()

    in_gguf = tmp_path / "in_gguf"
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=output / "adapter", output_dir=in_gguf, format="gguf"
    )
    assert code == 0, err
    reader = gguf.GGUFReader(next(in_gguf.glob("*.gguf")))

    def field(key):
        return reader.get_field(key).contents()

    assert field("tokenizer.ggml.model") == ("gpt2" if name in ("llama3_2", "meta") else "llama")
    assert field("tokenizer.ggml.eos_token_id") in ours.stop_tokens
    assert field("tokenizer.ggml.add_bos_token") is llama.begins_with_bos
    if name in ("llama3_2", "meta"):
        assert field("tokenizer.ggml.pre") == "llama-bpe"
        [divisors] = [tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight"]
        assert divisors.data.shape == (8,) and divisors.data.max() == (32 if name == "llama3_2" else 8)
    asked = ollama_prompt((in_gguf / "Modelfile").read_text(), question, rendered_in_python)
    bos = [ours.bos_id] if field("tokenizer.ggml.add_bos_token") else []
    assert bos + theirs(asked, add_special_tokens=False).input_ids == prompt
