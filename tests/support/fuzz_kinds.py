"""What is read, for the fuzz: files that are right, and what recipes do with them."""

import gzip
import hashlib
import json
import random
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from torch.amp import GradScaler
from torchtune.modules import TransformerDecoder

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.config.task_settings import GenerationSettings, MergeSettings
from custom_components.datasets.chat import chat_dataset
from custom_components.export.merge_record import check_not_merged_yet, merge_in
from custom_components.export.merged_weights import read_adapter
from custom_components.models.builders import lora_llama_from_config
from custom_components.runs.checkpoints import run_checkpoint_path, save_run_checkpoint
from custom_components.runs.metrics import keep_metrics_until
from custom_components.runs.origin import open_origin
from custom_components.runs.recognition import is_metrics, is_run_config
from custom_components.runs.recorded_run import open_recorded_runs
from custom_components.runs.resuming import open_run_to_resume
from custom_components.runs.trained_weights import AdapterWeights
from custom_components.training.state import Progress, TrainingState
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import stated_prompt_format, tokenizer_with_format
from custom_components.transforms.sentencepiece_model import read_sentencepiece_model
from custom_components.transforms.tokenizer_files import exported_tokenizer, template_of_format, tokenizer_texts
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import load_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import check_base_weights, load_base_weights
from custom_components.weights.hugging_face_writing import write_config
from tests.support.adapters import saved_adapter
from tests.support.checkpoints import as_meta_checkpoint, split_into_shards, write_checkpoint
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.paths import PROJECT, TINY_TOKENIZER
from tests.support.rows import random_dialogs, write_dialogs
from tests.support.tokenizers import write_byte_level_tokenizer
from tests.support.written_runs import step_records, write_run


@dataclass(frozen=True)
class Kind:
    """One kind of input.

    Attributes:
        files: of the folder, that are damaged, one at a time: patterns.
        use: does with the folder what recipes do; returns a digest of what came of it, or "" where any value is right.
        is_checked: what comes of a damaged file is either an error or what came of the right one.
        weight: how often it is tried, beside others.
    """

    name: str
    files: Sequence[str]
    make: Callable[[Path], object]
    use: Callable[[Path], str]
    is_checked: bool = False
    weight: int = 10


def _model(checkpoint: Path) -> TransformerDecoder:
    with torch.device("meta"):
        return lora_llama_from_config(checkpoint, ["q_proj", "v_proj"], lora_rank=2)


def _digest(values: object) -> str:
    return hashlib.sha256(repr(values).encode()).hexdigest()


def _make_config(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "config.yaml").write_bytes((PROJECT / f"configs/{name}.yaml").read_bytes())


def _use_config(settings_type: type) -> Callable[[Path], str]:
    def use(folder: Path) -> str:
        load_settings(settings_type, ["--config", str(folder / "config.yaml")])
        return ""

    return use


_OVERRIDES = json.dumps(
    {"prompt": "a", "system_prompt": "b", "batch_size": "2", "seed": "1", "prompt_template": "{a: b}", "top_p": "0.5"}
)


def _use_overrides(folder: Path) -> str:
    try:
        overrides = json.loads((folder / "overrides.json").read_text())
    except (OSError, ValueError, RecursionError):
        return ""  # what is damaged is what is typed, not the file that it is kept in here
    if not isinstance(overrides, dict):
        return ""
    texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in overrides.items()}
    arguments = [f"{key}={text}" for key, text in texts.items()]
    settings = load_settings(GenerationSettings, ["--config", str(PROJECT / "configs/generate.yaml"), *arguments])
    for key in ("prompt",):
        assert getattr(settings, key) == texts.get(key, ""), f"{key} is not verbatim"
    return ""


def _make_meta(folder: Path) -> None:
    # A multiple of 128 above two thirds of four times the width, as Meta rounds it.
    write_checkpoint(folder / "base", intermediate_size=256)
    as_meta_checkpoint(folder / "base", 2)


def _make_shards(suffix: str) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        split_into_shards(write_checkpoint(folder / "base"), suffix)

    return make


def _use_shape(folder: Path) -> str:
    checkpoint = open_checkpoint(folder / "base")
    _ = checkpoint.hub_name
    check_base_weights(_model(folder / "base"), checkpoint)
    return ""


def _use_weights(folder: Path) -> str:
    load_base_weights(_model(folder / "base"), open_checkpoint(folder / "base"), torch.float32, CPU)
    return ""


def _make_tokenizer(folder: Path) -> None:
    write_checkpoint(folder / "base")
    added = {"content": "<pad>", "special": True, "lstrip": False}
    config = {"bos_token": "<s>", "eos_token": {"content": "</s>"}, "added_tokens_decoder": {"1024": added}}
    config |= {"chat_template": "{% for m in messages %}{{ m['content'] }}{% endfor %}", "pad_token": "<pad>"}
    (folder / "base/tokenizer_config.json").write_text(json.dumps(config))
    (folder / "base/special_tokens_map.json").write_text(json.dumps({"pad_token": "<pad>", "eos_token": "</s>"}))
    (folder / "base/added_tokens.json").write_text(json.dumps({"<pad>": 1024}))
    (folder / "base/generation_config.json").write_text(
        json.dumps({"eos_token_id": [2], "do_sample": False, "top_p": 0.9})
    )
    (folder / "base/prompt_format.yaml").write_text(
        yaml.safe_dump({"prompt_template": "zephyr", "system_prompt": "Be kind.", "stop_tokens": ["</s>"]})
    )


def _make_json_tokenizer(folder: Path) -> None:
    _make_tokenizer(folder)
    for name in ("tokenizer.model", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json"):
        (folder / "base" / name).unlink()
    (folder / "base/prompt_format.yaml").unlink()
    write_byte_level_tokenizer(folder / "base")


def _use_tokenizer(folder: Path) -> str:
    base = folder / "base"
    checkpoint = open_checkpoint(base)
    prompt_format = stated_prompt_format(base, None)
    tokenizer = tokenizer_with_format(base, prompt_format)
    dialog = [{"role": "user", "content": "Où? 漢 a  b\n"}, {"role": "assistant", "content": "So."}]
    tokens = tokenizer({"messages": dialog})["tokens"]
    tokenizer.decode(tokens)
    exported = exported_tokenizer(tokenizer, template_of_format(tokenizer, prompt_format) if prompt_format else None)
    tokenizer_texts(exported, 256)
    if tokenizer.tokenizer.path.suffix == ".model":
        read_sentencepiece_model(tokenizer.tokenizer.path)
    with_output = folder / "output"
    with_output.mkdir()
    write_config(
        with_output, checkpoint, checkpoint.shape, torch.float32, bos_id=tokenizer.bos_id, stop_ids=[2], pad_id=None
    )
    shutil.rmtree(with_output)
    return ""


def _make_adapter(folder: Path) -> None:
    write_checkpoint(folder / "base")
    adapter = saved_adapter(with_random_adapters(loaded_model(folder / "base")), folder / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    config |= {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"layers.0.self_attn.k_proj": 16}}
    config |= {"layers_to_transform": [0, 1], "exclude_modules": ["lm_head"], "modules_to_save": None, "bias": "none"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))


def _use_adapter(folder: Path) -> str:
    adapter = open_adapter(folder / "adapter")
    checkpoint = open_checkpoint(folder / "base")
    read_adapter(checkpoint, adapter, 1.0)
    with torch.device("meta"):
        model = lora_llama_from_config(
            folder / "base", ["q_proj", "k_proj", "v_proj", "output_proj"], apply_lora_to_mlp=True, lora_rank=4
        )
    load_base_weights(model, checkpoint, torch.float32, CPU)
    load_adapter(model, adapter)
    tokenizer_with_format(folder / "base", stated_prompt_format(folder / "base", folder / "adapter"))
    return ""


def _state(model: TransformerDecoder) -> TrainingState:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    return TrainingState(optimizer, GradScaler("cpu", enabled=False), "digest of the rows")


def _weights(checkpoint: Path) -> AdapterWeights:
    return AdapterWeights(loaded_model(checkpoint, lora_attn_modules=["q_proj"], apply_lora_to_mlp=False), "a/base", {})


def _make_run(folder: Path) -> None:
    write_checkpoint(folder / "base")
    write_run(folder / "run", f"checkpoint_dir={folder / 'base'}", records=step_records([3.0, 2.0, 1.5, 1.2]))
    weights = _weights(folder / "base")
    state = _state(weights.model)
    generator = torch.Generator().manual_seed(0)
    config = (folder / "run/config.yaml").read_text()
    for step in (2, 4):
        for group in state.optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        state.optimizer.step()
        state.keep_best(weights.model)
        state.progress = Progress(step, 0, 100 * step, 1.0, 2.5, step)
        save_run_checkpoint(folder / "run", weights, state, config, 2)


def _use_run(folder: Path) -> str:
    resumed = open_run_to_resume(True, folder / "run")
    assert resumed is not None
    resumed.check_config(yaml.safe_load((folder / "run/config.yaml").read_text()), LoRASettings)
    step = resumed.progress.num_steps
    weights = _weights(folder / "base")
    state = _state(weights.model)
    resumed.restore(weights, state)
    tensors = [parameter.tolist() for parameter in weights.model.parameters() if parameter.requires_grad]
    moments = [value.tolist() for values in state.optimizer.state.values() for value in values.values()]
    best = {name: value.tolist() for name, value in state.best_adapter.items()}
    # An older checkpoint is as good as the newest: the steps after it are taken again.
    return f"{step} {_digest((tensors, moments, best, state.progress))}"


def _use_records(folder: Path) -> str:
    run = folder / "run"
    is_run_config(run / "config.yaml")
    is_metrics(run / "metrics.jsonl")
    open_origin(run_checkpoint_path(run, 4) / "adapter")
    keep_metrics_until(run / "metrics.jsonl", folder / "kept.jsonl", 3)
    for recorded in open_recorded_runs([run]):
        _ = (recorded.best_validation, recorded.tokens_per_second, recorded.progress_words, recorded.tokens_by_step())
    return ""


def _make_merge(folder: Path) -> None:
    _make_adapter(folder)
    record = {
        "base_model": "a/base",
        "base": "original",
        "adapters": [{"dir": "b/adapter", "weight": 1.0, "digest": "abc"}],
        "files": {"config.json": 10, "model.safetensors": 20},
    }
    (folder / "base/merge.yaml").write_text(yaml.safe_dump(record, sort_keys=False))


def _use_merge(folder: Path) -> str:
    merge_in(folder / "base")
    check_not_merged_yet(folder / "base", [], allow_merged_base=True)
    return ""


_TOKENIZER = Llama2ChatTransform(TINY_TOKENIZER)


def _make_rows(folder: Path) -> None:
    write_dialogs(folder / "rows.jsonl", random_dialogs(8))


def _use_cache(folder: Path) -> str:
    dataset = chat_dataset(_TOKENIZER, str(folder / "rows.jsonl"), cache_dir=folder / "cache")
    return _digest([dataset[index] for index in range(len(dataset))])


def _make_cache(folder: Path) -> None:
    _make_rows(folder)
    _use_cache(folder)


def _quantized(folder: Path) -> TransformerDecoder:
    with torch.device("meta"):
        model = lora_llama_from_config(folder / "base", ["q_proj"], quantize_base=True)
    load_base_weights(model, open_checkpoint(folder / "base"), torch.bfloat16, CPU, folder / "cache")
    return model


def _use_quantized(folder: Path) -> str:
    from custom_components.weights.checkpoint_loading import frozen_checksum

    return str(frozen_checksum(_quantized(folder)))


def _make_quantized(folder: Path) -> None:
    write_checkpoint(folder / "base")
    _quantized(folder)


def _make_data(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    _make_rows(folder)
    rows = [{"instruction": question, "output": answer} for question, answer in random_dialogs(8)]
    (folder / "rows.json").write_text(json.dumps(rows))
    lines = [",".join(row) for row in [["instruction", "output"], *([*row.values()] for row in rows)]]
    (folder / "rows.csv").write_text("\n".join(lines))
    (folder / "packed.jsonl.gz").write_bytes(gzip.compress((folder / "rows.jsonl").read_bytes(), mtime=0))
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "rows.parquet")


def _use_data(folder: Path) -> str:
    for file in sorted(folder.glob("*rows.*")) + sorted(folder.glob("packed.*")):
        dataset = chat_dataset(_TOKENIZER, str(file), on_bad_row="skip")
        for index in range(len(dataset)):
            _ = dataset[index]
    return ""


KINDS = [
    Kind("training config", ["config.yaml"], _make_config("tiny_qlora"), _use_config(LoRASettings), weight=30),
    Kind("generation config", ["config.yaml"], _make_config("generate"), _use_config(GenerationSettings)),
    Kind("merge config", ["config.yaml"], _make_config("merge"), _use_config(MergeSettings)),
    Kind("overrides", ["overrides.json"], lambda f: (f / "overrides.json").write_text(_OVERRIDES), _use_overrides),
    Kind("config.json", ["base/config.json"], lambda f: write_checkpoint(f / "base"), _use_shape, weight=20),
    Kind("params.json", ["base/params.json"], _make_meta, _use_shape),
    Kind("Meta's shards", ["base/*.pth"], _make_meta, _use_weights),
    Kind(
        "safetensors and index", ["base/*.safetensors", "base/*.index.json"], _make_shards("safetensors"), _use_weights
    ),
    Kind("pickles and index", ["base/*.bin", "base/*.index.json"], _make_shards("bin"), _use_weights),
    Kind("SentencePiece", ["base/tokenizer.model"], _make_tokenizer, _use_tokenizer, weight=20),
    Kind("tokenizer's files", ["base/*_*.json", "base/prompt_format.yaml"], _make_tokenizer, _use_tokenizer, weight=25),
    Kind("tokenizer.json", ["base/tokenizer.json", "base/*_config.json"], _make_json_tokenizer, _use_tokenizer),
    Kind("adapter", ["adapter/*"], _make_adapter, _use_adapter, weight=25),
    Kind("run checkpoint", ["run/checkpoints/*4/*.*", "run/checkpoints/*4/adapter/*"], _make_run, _use_run, True, 25),
    Kind("run's records", ["run/*.*"], _make_run, _use_records, weight=15),
    Kind("merge.yaml", ["base/merge.yaml"], _make_merge, _use_merge),
    Kind("token cache", ["cache/tokens/*/*"], _make_cache, _use_cache, True, 15),
    Kind("quantized cache", ["cache/quantized/*"], _make_quantized, _use_quantized, True, 10),
    Kind("data files", ["*rows.*", "packed.*"], _make_data, _use_data, weight=15),
]


def drawn_kind(chance: random.Random) -> Kind:
    return chance.choices(KINDS, [kind.weight for kind in KINDS])[0]
