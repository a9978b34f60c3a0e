"""A directory that is not what its key needs: every recipe says the same, first of all, and what to name instead."""

import json
import os
from pathlib import Path

import pytest

from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from tests.support.adapters import saved_adapter
from tests.support.checkpoints import write_checkpoint
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import PROJECT
from tests.support.recipe_runs import run_here

TRAINING = ["lora_single_device", "full_single_device", "lora_dpo_single_device", "preview", "estimate"]
CONFIGS = {
    "lora_dpo_single_device": "tiny_dpo",
    "full_single_device": "tiny_full",
    **dict.fromkeys(("lora_single_device", "preview", "estimate"), "llama_qlora"),
}
RECIPES = [*TRAINING, "generate", "evaluate", "merge"]
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 13476\n"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a model and the run of an adapter on it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    checkpoint = write_checkpoint(tmp_path / "models/Llama-2-7b-hf")
    saved_adapter(with_random_adapters(loaded_model(checkpoint)), tmp_path / "run/adapter")
    (tmp_path / "run/config.yaml").write_text("checkpoint_dir: models/Llama-2-7b-hf\n")
    return tmp_path


def error_of(recipe, **directories):
    """The one error line of a recipe, before anything is written."""
    config = str(PROJECT / f"configs/{CONFIGS.get(recipe, recipe)}.yaml")
    overrides = {
        **dict.fromkeys(TRAINING, {"output_dir": "out", "cache_dir": "null", "dataset.source": "rows.jsonl"}),
        **{"generate": {"prompt": "Who?"}, "evaluate": {"dataset": "null", "tasks": "[hellaswag]"}},
        **{"merge": {"output_dir": "out"}},
    }[recipe]
    given = {"device": "cpu"} if recipe != "merge" else {}
    chosen = given | overrides | directories
    code, _, err = run_here(recipe, "--config", config, *(f"{key}={value}" for key, value in chosen.items()))
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert code == 2 and len(errors) == 1, err
    assert not Path("out").exists()
    return errors[0].removeprefix("error: ")


def hub_name(_):
    return (
        "meta-llama/Llama-2-7b-hf",
        "is not a directory; download it with `tune download meta-llama/Llama-2-7b-hf --output-dir "
        "checkpoints/Llama-2-7b-hf --ignore-patterns '*.bin'`, then set checkpoint_dir=checkpoints/Llama-2-7b-hf",
    )


def address_on_the_hub(_):
    return "https://huggingface.co/meta-llama/Llama-2-7b-hf", "download it with `tune download meta-llama/Llama-2-7b-hf"


def not_downloaded_yet(_):
    return (
        "checkpoints/Llama-2-7b",
        "is not a directory; download a model with `tune download REPOSITORY --output-dir checkpoints/Llama-2-7b ",
    )


def mistyped(_):
    return "models/Llama-2-7b-fh", "is not a directory; did you mean 'models/Llama-2-7b-hf'?"


def of_another_size(_):
    return "models/Llama-2-13b-hf", "is not a directory; download a model with `tune download REPOSITORY --output-dir "


def mistyped_folder(_):
    return "model/Llama-2-7b-hf", "is not a directory; did you mean 'models/Llama-2-7b-hf'?"


def folder_of_models(_):
    return "models", "holds no model itself; name 'models/Llama-2-7b-hf' in it"


def file_of_weights(_):
    return "models/Llama-2-7b-hf/model.safetensors", "is a file, not a directory; name its directory, 'models/Llama-2"


def hub_cache(folder):
    for name, time in (("older", 1), ("newer", 2)):
        path = folder / f"hub/models--a--b/snapshots/{name}"
        path.mkdir(parents=True)
        (path / "config.json").write_text("{}")
        os.utime(path, (time, time))
    return (
        "hub/models--a--b",
        "is a folder of the hub's cache; name its newest snapshot, 'hub/models--a--b/snapshots/n",
    )


def unfetched_clone(folder):
    checkpoint = write_checkpoint(folder / "clone")
    for name in ("model.safetensors", "tokenizer.model"):
        (checkpoint / name).write_text(POINTER)
    files = "'clone/model.safetensors', 'clone/tokenizer.model' are a Git LFS pointer"
    return "clone", f"{files}, not the file itself; run `git lfs pull` in 'clone'"


def quantized(folder, name, settings, card=""):
    checkpoint = write_checkpoint(folder / name, quantization_config=settings)
    (checkpoint / "tokenizer.model").unlink()
    (checkpoint / "README.md").write_text(card)
    return name


def quantized_by_bitsandbytes(folder):
    name = quantized(folder, "llama-2-7b-bnb-4bit", {"quant_method": "bitsandbytes", "load_in_4bit": True})
    words = (
        "is already quantized (bitsandbytes); name the model that it was made from, 'llama-2-7b'; quantize_base=true"
    )
    return name, words


def quantized_by_gptq(folder):
    card = "---\nbase_model: meta-llama/Llama-2-7b-hf\n---\n"
    name = quantized(folder, "Llama-2-7B-GPTQ", {"quant_method": "gptq", "bits": 4}, card)
    return name, "is already quantized (GPTQ); name the model that it was made from, 'meta-llama/Llama-2-7b-hf'"


def quantized_by_awq(folder):
    return quantized(folder, "mine", {"quant_method": "awq"}), "is already quantized (AWQ); name the model that it"


def quantized_to_fp8(folder):
    settings = {"quant_method": "fp8", "activation_scheme": "dynamic"}
    return quantized(folder, "Llama-2-7b-FP8", settings), "is already quantized (FP8); name the model that it was made"


def gguf_file(folder):
    (folder / "x.gguf").write_bytes(b"GGUF")
    return "x.gguf", "is a GGUF file, not a directory, which only llama.cpp and Ollama read; name a model"


def gguf_directory(folder):
    (folder / "gguf").mkdir()
    (folder / "gguf/x.gguf").write_bytes(b"GGUF")
    return "gguf", "holds only x.gguf, which only llama.cpp and Ollama read; name the model that it was made from"


def an_adapter(_):
    words = (
        "is an adapter, not a model; set adapter_dir=run/adapter, and checkpoint_dir to the model that it was trained"
    )
    return "run/adapter", f"{words} on, 'a/base'"


def a_run(_):
    words = "is the output of a training run, not a model; set adapter_dir=run/adapter, and checkpoint_dir to the model"
    return "run", f"{words} that it was trained on, 'models/Llama-2-7b-hf'"


def a_run_of_transformers(folder):
    (folder / "trainer/checkpoint-20").mkdir(parents=True)
    (folder / "trainer/checkpoint-20/adapter_config.json").write_text("{}")
    words = "is the output of a training run, not a model; set adapter_dir=trainer/checkpoint-20, and checkpoint_dir to"
    return "trainer", words


def empty(folder):
    (folder / "empty").mkdir()
    return "empty", "has neither config.json nor params.json; is the download whole?"


@pytest.mark.parametrize(
    "mistake",
    [
        *(
            hub_name,
            address_on_the_hub,
            not_downloaded_yet,
            mistyped,
            of_another_size,
            mistyped_folder,
            folder_of_models,
            hub_cache,
        ),
        *(a_run_of_transformers, file_of_weights, unfetched_clone, gguf_file, gguf_directory, an_adapter, a_run, empty),
        *(quantized_by_bitsandbytes, quantized_by_gptq, quantized_by_awq, quantized_to_fp8),
    ],
)
def test_a_checkpoint_dir_that_is_not_a_model_s(folder, mistake):
    path, words = mistake(folder)
    with pytest.raises(UserError) as raised:
        open_checkpoint(Path(path))
    message = str(raised.value)
    assert words in message and message.startswith(f"checkpoint_dir: {str(Path(path))!r} ") or "LFS" in message


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mistake", [hub_name, quantized_by_gptq])
def test_every_recipe_says_the_same_before_it_reads_the_tokenizer(folder, recipe, mistake):
    path, _ = mistake(folder)
    with pytest.raises(UserError) as raised:
        open_checkpoint(Path(path))
    adapter = {} if recipe in TRAINING else {"adapter_dir": "run/adapter"}
    assert error_of(recipe, checkpoint_dir=path, **adapter) == str(raised.value)


OTHER_MODELS = {
    "qwen2": "model_type = 'qwen2' is not supported: its attention has biases, and that is not built here",
    **dict.fromkeys(("qwen3", "gemma3_text", "olmo2"), "it normalizes queries and keys"),
    **dict.fromkeys(("mixtral", "llama4", "gpt_oss"), "its feed-forward is of experts"),
    **dict.fromkeys(("gpt2", "falcon"), "its layers are put together otherwise"),
    "gemma": "its embeddings and norms are scaled in another way",
    "phi3": "its projections are joined in one weight",
    "mllama": "it reads images",
    "smollm3": "some of its layers have no rotary positions",
    "someones_own": "this package trains the Llama and Mistral architectures, model_type llama or mistral",
}


def other_model(folder, model_type):
    directory = folder / model_type
    directory.mkdir()
    (directory / "tokenizer.json").write_text("not read")
    (directory / "config.json").write_text(json.dumps({"model_type": model_type, "vocab_size": 64}))
    return directory.name


def scaled_otherwise(folder, kind):
    write_checkpoint(folder / kind, rope_scaling={"rope_type": kind, "factor": 4.0})
    return kind


@pytest.mark.parametrize("model_type", OTHER_MODELS)
def test_another_model_is_named_with_what_is_missing(folder, model_type):
    with pytest.raises(UserError) as raised:
        open_checkpoint(Path(other_model(folder, model_type)))
    [message] = raised.value.messages
    assert message.startswith(f"{model_type}/config.json: model_type = {model_type!r} is not supported: ")
    assert OTHER_MODELS[model_type] in message


@pytest.mark.parametrize("kind", ["yarn", "dynamic", "longrope"])
def test_other_rotary_scalings_are_named(folder, kind):
    with pytest.raises(UserError) as raised:
        open_checkpoint(Path(scaled_otherwise(folder, kind)))
    words = f"{kind}/config.json: rope scaling = {kind!r} is not supported; default, linear and llama3 are"
    assert raised.value.messages == (words,)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize(("make", "kind"), [(other_model, "mllama"), (scaled_otherwise, "yarn")])
def test_every_recipe_says_so_of_another_model(folder, recipe, make, kind):
    path = make(folder, kind)
    with pytest.raises(UserError) as raised:
        open_checkpoint(Path(path))
    adapter = {} if recipe in TRAINING else {"adapter_dir": "run/adapter"}
    assert error_of(recipe, checkpoint_dir=path, **adapter) == str(raised.value)


def not_trained_yet(_):
    return "elsewhere/adapter", "is not a directory; name the adapter/ of a run, or download an adapter with `tune down"


def adapter_s_hub_name(_):
    words = "is not a directory; download it with `tune download someone/my-lora --output-dir adapters/my-lora"
    return "someone/my-lora", words


def mistyped_adapter(_):
    return "rn/adapter", "is not a directory; did you mean 'run/adapter'?"


def file_of_an_adapter(_):
    return "run/adapter/adapter_model.safetensors", "is a file, not a directory; name its directory, 'run/adapter'"


def a_model(_):
    words = "is a model, not an adapter; to use it without one set checkpoint_dir=models/Llama-2-7b-hf "
    return "models/Llama-2-7b-hf", words


def the_run_of_an_adapter(_):
    return "run", "has no adapter_config.json; name run/adapter"


def adapter_in_the_hub_s_cache(folder):
    path = folder / "hub/models--a--b/snapshots/c"
    path.mkdir(parents=True)
    (path / "adapter_config.json").write_text("{}")
    return (
        "hub/models--a--b",
        "is a folder of the hub's cache; name its newest snapshot, 'hub/models--a--b/snapshots/",
    )


def unfetched_adapter(folder):
    (folder / "run/adapter/adapter_model.safetensors").write_text(POINTER)
    return "run/adapter", "'run/adapter/adapter_model.safetensors' is a Git LFS pointer, not the file itself"


def adapter_as_gguf(folder):
    (folder / "gguf").mkdir()
    (folder / "gguf/x-lora.gguf").write_bytes(b"GGUF")
    return (
        "gguf",
        "holds only x-lora.gguf, which only llama.cpp and Ollama read; name the adapter that it was made",
    )


@pytest.mark.parametrize(
    "mistake",
    [
        *(not_trained_yet, adapter_s_hub_name, mistyped_adapter, file_of_an_adapter, a_model, the_run_of_an_adapter),
        *(adapter_in_the_hub_s_cache, unfetched_adapter, adapter_as_gguf),
    ],
)
def test_an_adapter_dir_that_is_not_an_adapter_s(folder, mistake):
    path, words = mistake(folder)
    with pytest.raises(UserError) as raised:
        open_adapter(Path(path))
    assert words in str(raised.value)
    assert str(raised.value).startswith((f"adapter_dir: {path!r} ", f"adapter_dir: '{path}/adapter_model"))


def test_every_recipe_that_reads_an_adapter_says_the_same(folder, rows):
    base = {"checkpoint_dir": "models/Llama-2-7b-hf"}
    words = "'models/Llama-2-7b-hf' is a model, not an adapter; to use it without one set checkpoint_dir=models/Llama-"
    for recipe in ("generate", "evaluate", "merge"):
        assert error_of(recipe, adapter_dir="models/Llama-2-7b-hf", **base).startswith(f"adapter_dir: {words}")
    started = {"init_adapter_from": "models/Llama-2-7b-hf", "dataset.source": str(rows)}
    assert error_of("lora_single_device", **base, **started).startswith(f"init_adapter_from: {words}")


def test_a_merged_model_is_a_model(folder):
    assert run_here(
        *("merge", "--config", str(PROJECT / "configs/merge.yaml"), "checkpoint_dir=models/Llama-2-7b-hf"),
        *("adapter_dir=run/adapter", "output_dir=merged", "prove=false"),
    )[0] == 0  # fmt: skip
    code, out, err = run_here(
        *("generate", "--config", str(PROJECT / "configs/generate.yaml"), "checkpoint_dir=merged"),
        *("prompt=Who?", "max_new_tokens=2", "device=cpu"),
    )
    assert code == 0, err


@pytest.mark.parametrize("settings", [{}, {"quant_method": "bitsandbytes", "load_in_4bit": False}])
def test_settings_that_quantize_nothing_are_no_mistake(folder, settings):
    write_checkpoint(folder / "plain", quantization_config=settings)
    assert run_here(
        *("generate", "--config", str(PROJECT / "configs/generate.yaml"), "checkpoint_dir=plain"),
        *("prompt=Who?", "max_new_tokens=2", "device=cpu"),
    )[0] == 0  # fmt: skip


def test_a_model_without_a_tokenizer_is_named_by_its_own_key(folder):
    (folder / "models/Llama-2-7b-hf/tokenizer.model").unlink()
    base = {"checkpoint_dir": "models/Llama-2-7b-hf", "adapter_dir": "run/adapter"}
    for recipe in ("generate", "evaluate", "merge"):
        assert "checkpoint_dir: 'models/Llama-2-7b-hf' has no SentencePiece tokenizer.model" in error_of(recipe, **base)
