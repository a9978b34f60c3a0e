"""Merged tensors, their files, and what is refused before anything is written."""

import json
import shutil
import weakref

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from custom_components.config.reading import load_settings
from custom_components.config.task_settings import MergeSettings
from custom_components.export import merge_output
from custom_components.export.merge_output import check_space
from custom_components.export.merged_weights import BaseWeights, MergedWeights, read_adapter
from custom_components.models.dora import DoRALinear
from custom_components.models.lora import adapter_modules, merged_weight
from custom_components.runs.origin import open_origin
from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.safetensors_writing import write_safetensors
from tests.support.adapters import saved_adapter
from tests.support.models import loaded_model, merged_dora_weight, merged_lora_weight, with_random_variants
from tests.support.paths import PROJECT
from tests.support.recipe_runs import run_merge

SHAPES = {"a": (3, 5), "b": (7,), "c": (2, 4), "d": (1, 1)}


@pytest.fixture
def base_and_adapter(make_checkpoint, tmp_path):
    checkpoint = make_checkpoint()
    return checkpoint, saved_adapter(with_random_variants(loaded_model(checkpoint)), tmp_path / "adapter")


def tensors_of(shapes, dtype):
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("max_shard_bytes", "num_shards"), [(10**9, 1), (64, 2), (1, 4)])
def test_streamed_safetensors_read_back(tmp_path, dtype, max_shard_bytes, num_shards):
    tensors = tensors_of(SHAPES, torch.float32)
    write_safetensors(
        tmp_path,
        tensors.items(),
        SHAPES,
        dict.fromkeys(SHAPES, dtype),
        max_shard_bytes if dtype.itemsize == 4 else max_shard_bytes // 2,
    )
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) == max(num_shards, 1)
    read = {name: tensor for file in files for name, tensor in load_file(file).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], tensors[name].to(dtype)) for name in tensors)
    if num_shards > 1:
        index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
        assert index["metadata"]["total_size"] == sum(t.numel() for t in tensors.values()) * dtype.itemsize
        assert all(name in load_file(tmp_path / file) for name, file in index["weight_map"].items())


def test_L22_no_tensor_is_kept_while_the_next_is_written(tmp_path):
    alive = []

    def one_by_one():
        for name, shape in SHAPES.items():
            assert sum(reference() is not None for reference in alive) <= 1
            tensor = torch.zeros(shape)
            alive.append(weakref.ref(tensor))
            yield name, tensor

    write_safetensors(tmp_path, one_by_one(), SHAPES, dict.fromkeys(SHAPES, torch.float32))


@pytest.mark.parametrize("variants", [{}, {"use_rslora": True}, {"use_dora": True}])
def test_a_merged_weight_is_the_papers(make_checkpoint, variants):
    """W + s B A, or m (W + s B A) / ||W + s B A||, and for several the sum of their changes."""
    model = with_random_variants(loaded_model(make_checkpoint(), lora_alpha=7.0, **variants))
    for layer in adapter_modules(model).values():
        base = layer.weight.detach()
        each = merged_dora_weight(layer) if isinstance(layer, DoRALinear) else merged_lora_weight(layer)
        torch.testing.assert_close(merged_weight(base, [(1.0, layer)]), each)
        torch.testing.assert_close(merged_weight(base, [(0.7, layer), (-0.2, layer)]), base + 0.5 * (each - base))


def test_a_base_is_not_changed_by_its_merge(base_and_adapter):
    checkpoint, adapter = base_and_adapter
    before = (checkpoint / "model.safetensors").read_bytes()
    base = BaseWeights(open_checkpoint(checkpoint))
    merged = MergedWeights(base, [read_adapter(base.checkpoint, open_adapter(adapter))])
    assert all(merged.shapes[name] == tuple(tensor.shape) for name, tensor in merged.tensors())
    assert (checkpoint / "model.safetensors").read_bytes() == before


def test_dequantized_weights_are_those_of_a_qlora_run(base_and_adapter):
    checkpoint, _ = base_and_adapter
    model = loaded_model(checkpoint, quantize_base=True)
    base = BaseWeights(open_checkpoint(checkpoint), "nf4")
    input = torch.eye(64)
    for name in ("layers.0.attn.k_proj", "layers.1.mlp.w1"):
        torch.testing.assert_close(model.get_submodule(name).plain_output(input), input @ base.read(f"{name}.weight").T)


def test_merge_config_is_right_and_complete():
    settings = load_settings(MergeSettings, ["--config", str(PROJECT / "configs/merge.yaml")])
    assert [str(adapter.dir) for adapter in settings.weighted_adapters] == ["outputs/llama2_7b_qlora/adapter"]
    assert set(yaml.safe_load((PROJECT / "configs/merge.yaml").read_text())) == set(MergeSettings.model_fields)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ({"adapter_dir": "null"}, "adapter_dir: null: name the adapter/ of a run"),
        ({"adapters": "[{dir: a}]"}, "name one, or several, not both"),
        (
            {"adapter_dir": "null", "adapters": "[{dir: a, wieght: 2}]"},
            "should be a list of {dir: an adapter directory",
        ),
        ({"adapter_dir": "null", "adapters": "[{weight: 2}]"}, "should be a list of {dir: an adapter directory"),
        ({"adapter_dir": "null", "adapters": "[{dir: a, weight: x}]"}, "should be a valid number"),
        ({"adapter_dir": "null", "adapters": "[{dir: a, weight: .nan}]"}, "adapters"),
        ({"quantization": "q8_0"}, "set format=gguf"),
        ({"format": "gguf", "dtype": "bf16"}, "for a GGUF file set quantization"),
        ({"base": "quantized"}, "base: 'quantized' should be 'original' or 'dequantized'"),
    ],
)
def test_L26_settings_that_cannot_be(overrides, words):
    code, _, err = run_merge(**overrides)
    assert code == 2 and err.count("error: ") == 1 and words in err


def wrong_adapter(make_checkpoint, tmp_path, **changes):
    other = make_checkpoint("other", **changes)
    return saved_adapter(with_random_variants(loaded_model(other)), tmp_path / "wrong")


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("another model", "has shape"),
        ("another number of layers", "has no place in the model"),
        ("another rank", "lora_rank"),
        ("missing tensor", "is missing"),
        ("not finite", "is not finite"),
        ("no adapter", "is not a directory"),
        ("no checkpoint", "is not a directory"),
        ("output is the base", "output_dir"),
        ("output in the base", "output_dir"),
        ("output holds the base", "output_dir"),
        ("output is the adapter", "output_dir"),
        ("output is not empty", "is not empty"),
        ("output is a file", "is a file"),
        ("output below a file", "cannot be written"),
        ("disk too small", "GB free"),
        ("stop token", "stop_tokens"),
    ],
)
def test_L24_bad_input_is_one_line_and_leaves_nothing(
    make_checkpoint, base_and_adapter, tmp_path, monkeypatch, case, words
):
    checkpoint, adapter = base_and_adapter
    output = tmp_path / "outputs" / "merged"
    weights = adapter / "adapter_model.safetensors"
    match case:
        case "another model":
            adapter = wrong_adapter(make_checkpoint, tmp_path, hidden_size=128)
        case "another number of layers":
            adapter = wrong_adapter(make_checkpoint, tmp_path, num_hidden_layers=3)
        case "another rank":
            config = json.loads((adapter / "adapter_config.json").read_text())
            (adapter / "adapter_config.json").write_text(json.dumps(config | {"r": 5}))
            words = "has shape"
        case "missing tensor" | "not finite":
            tensors = load_file(weights)
            name = next(iter(tensors))
            changed = {} if case == "missing tensor" else {name: torch.full_like(tensors[name], torch.nan)}
            save_file({k: v for k, v in tensors.items() if k != name} | changed, weights)
        case "no adapter":
            adapter = tmp_path / "nothing"
        case "no checkpoint":
            checkpoint = tmp_path / "nothing"
        case "output is the base":
            output = checkpoint
        case "output in the base":
            output = checkpoint / "merged"
        case "output holds the base":
            output = tmp_path
        case "output is the adapter":
            output = adapter
        case "output is not empty":
            output.mkdir(parents=True)
            (output / "notes.txt").write_text("mine")
        case "output is a file":
            output.parent.mkdir()
            output.write_text("mine")
        case "output below a file":
            output.parent.write_text("mine")
        case "disk too small":
            monkeypatch.setattr(merge_output.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
        case "stop token":
            path = adapter / "prompt_format.yaml"
            path.write_text(path.read_text().replace("</s>", "<|im_end|>"))

    def everything():
        return {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}

    before = everything()
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=output, overwrite_output_dir="true"
    )
    assert code == 2, err
    assert err.count("error: ") == 1 and len(err.strip().splitlines()) == 1 and words in err
    assert everything() == before


def test_a_merge_is_replaced_only_when_asked(base_and_adapter, tmp_path):
    checkpoint, adapter = base_and_adapter
    keys = {"checkpoint_dir": checkpoint, "adapter_dir": adapter, "output_dir": tmp_path / "merged", "prove": "false"}
    assert run_merge(**keys)[0] == 0
    code, _, err = run_merge(**keys)
    assert code == 2 and "overwrite_output_dir=true" in err
    (tmp_path / ".merged.writing-1").mkdir()
    assert run_merge(**keys, overwrite_output_dir="true")[0] == 0
    assert not (tmp_path / ".merged.writing-1").exists()


def test_what_a_merge_was_killed_while_replacing_comes_back(base_and_adapter, tmp_path):
    checkpoint, adapter = base_and_adapter
    merged, replaced = tmp_path / "merged", tmp_path / ".merged.replaced-1"
    keys = {"checkpoint_dir": checkpoint, "adapter_dir": adapter, "output_dir": merged, "prove": "false"}
    assert run_merge(**keys)[0] == 0
    shutil.copytree(merged, replaced)
    assert run_merge(**keys)[0] == 2 and merged.exists() and not replaced.exists()
    merged.rename(replaced)
    code, _, err = run_merge(**keys)
    assert code == 2 and "overwrite_output_dir=true" in err
    assert (merged / "config.json").exists() and not replaced.exists()


def test_a_merged_base(base_and_adapter, tmp_path):
    """Never with the same adapter again, however it is spelled; with another one only when it is said."""
    checkpoint, adapter = base_and_adapter
    merged = tmp_path / "merged"
    assert run_merge(checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=merged, prove="false")[0] == 0
    again = shutil.copytree(adapter, tmp_path / "copy of the adapter")
    other = saved_adapter(with_random_variants(loaded_model(merged, use_rslora=True, seed=3)), tmp_path / "other")
    keys = {"checkpoint_dir": merged, "output_dir": tmp_path / "twice", "prove": "false"}
    for allowed in ("false", "true"):
        code, _, err = run_merge(**keys, adapter_dir=again, allow_merged_base=allowed)
        assert code == 2 and "in it already" in err
    code, _, err = run_merge(**keys, adapter_dir=other)
    assert code == 2 and "allow_merged_base=true" in err
    assert run_merge(**keys, adapter_dir=other, allow_merged_base="true")[0] == 0
    code, _, err = run_merge(
        checkpoint_dir=tmp_path / "twice", adapter_dir=adapter, output_dir=tmp_path / "thrice", allow_merged_base="true"
    )
    assert code == 2 and "in it already" in err
    (merged / "merge.yaml").write_text("adapters: [1]")
    code, _, err = run_merge(**keys, adapter_dir=other, overwrite_output_dir="true")
    assert code == 2 and "not the record of a merge" in err


def test_space_is_looked_for_where_the_directory_will_be(tmp_path):
    check_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"needs 1000000\.\d GB"):
        check_space(tmp_path / "not" / "yet", 10**15)


def test_proof_is_of_training_rows_where_they_are(base_and_adapter, tmp_path, tiny_tokenizer):
    checkpoint, adapter = base_and_adapter
    rows = tmp_path / "rows.jsonl"
    dialog = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "Nobody, " * 100}]
    rows.write_text(json.dumps({"messages": dialog}) + "\n")
    expected = tiny_tokenizer({"messages": dialog})["tokens"]
    node = {"_component_": "custom_components.datasets.chat_dataset", "source": str(rows)}
    config = adapter.parent / "config.yaml"

    def found(dataset, **others):
        config.write_text(yaml.safe_dump({"dataset": dataset, **others}))
        tokens, kind = open_origin(adapter).example_rows(tiny_tokenizer)
        return tokens if kind == "training rows" else None

    assert found(node) == found(node | {"source": [{"source": str(rows), "weight": 1.0}]}) == [expected[:64]]
    for away in (
        {"source": str(tmp_path / "gone.jsonl")},
        {"source": "owner/on-the-hub"},
        {"source": 5},
        {"_component_": "os.getcwd"},
        {"format": "nothing"},
    ):
        assert found(node | away) is None
    assert found(None) is None and open_origin(adapter).quantization is None
    found(node, quantize_base=True)
    assert open_origin(adapter).quantization == "nf4"
    config.write_text("[")
    origin = open_origin(adapter)
    assert len(origin.example_rows(tiny_tokenizer)[0]) == 4 and origin.quantization is None


def test_adapters_of_another_tool(base_and_adapter, tmp_path):
    """No prompt format is stated: nothing is made up, and the checkpoint's own template stays."""
    checkpoint, adapter = base_and_adapter
    (adapter / "prompt_format.yaml").unlink()
    keys = {"checkpoint_dir": checkpoint, "adapter_dir": adapter, "prove": "false"}
    code, out, _ = run_merge(**keys, output_dir=tmp_path / "without")
    assert code == 0 and "no chat template is written" in out
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    code, out, _ = run_merge(**keys, output_dir=tmp_path / "with")
    assert code == 0 and "the checkpoint's chat template is kept" in out
    for name, template in (("without", None), ("with", "{{ messages }}")):
        assert json.loads((tmp_path / name / "tokenizer_config.json").read_text()).get("chat_template") == template
