"""What a training run wrote, told by names and content: nothing else is replaced or deleted by a later one."""

import json
import re
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

from custom_components.runs.loss_plot import PLOT_AUTHOR
from custom_components.runtime.ownership import OwnDirectory, Recognises
from custom_components.runtime.plain_yaml import MOST_YAML_BYTES, read_yaml
from custom_components.runtime.text_files import read_text
from custom_components.transforms.prompt_format import PROMPT_FORMAT_NAME, read_prompt_format
from custom_components.transforms.tokenizer_files import TOKENIZER_NAMES
from custom_components.weights.adapter_files import WEIGHTS_NAME
from custom_components.weights.card import CARD_NAME, TAG, card_metadata
from custom_components.weights.peft_format import ADAPTER_CONFIG_NAME

RUN_CONFIG_NAME = "config.yaml"
STATE_NAME = "state.pt"
ADAPTER_NAME, MODEL_NAME = "adapter", "model"
WANDB_ID_KEY = "wandb_run_id"
STEP_DIRECTORY = r"step_\d{6,}"
TRIAL_NAME = ".trial"  # a checkpoint that is written before the first step, and deleted again

# Of every training config, whatever the recipe and its version.
RUN_CONFIG_KEYS = {
    "checkpoint_dir",
    "output_dir",
    "overwrite_output_dir",
    "resume_from_checkpoint",
    "dataset",
    "optimizer",
}
# And the flags of a variant, such as use_dora. PEFT itself writes many more.
_ADAPTER_CONFIG_KEYS = {
    *("peft_type", "task_type", "base_model_name_or_path", "r", "lora_alpha", "lora_dropout", "target_modules"),
    *("bias", "fan_in_fan_out", "inference_mode", "rank_pattern", "alpha_pattern", "layers_to_transform"),
    "trainable_token_indices",
}
_RECORD_HEAD = b'{"step": '
# The first key of the file with a preference run's reference.
REFERENCE_DIGEST = "reference_digest"
# Width and height in pixels of the plots of before 0.2, which name no author: PNG specification, section 11.2.2, IHDR.
_UNSIGNED_PLOT_SIZE = (960, 540)
# The format's own limit: huggingface/safetensors, README.md, section "Format".
_MAX_HEADER_BYTES = 100 * 10**6


def _or_no(recognises: Callable[[Path], bool]) -> Callable[[Path], bool]:
    """What cannot be read as what it should be is not ours."""

    def recognises_or_not(path: Path) -> bool:
        try:
            return recognises(path)
        except (OSError, ValueError, TypeError, LookupError, AttributeError, struct.error, RecursionError):
            return False

    return recognises_or_not


@_or_no
def is_run_config(path: Path) -> bool:
    """A config as a run writes it, every key resolved; not one that a person wrote, which has comments or spaces."""
    text = read_text(path, MOST_YAML_BYTES)
    values = read_yaml(text)
    return values.keys() >= RUN_CONFIG_KEYS and yaml.safe_dump(values, sort_keys=False, allow_unicode=True) == text


def _has_records(path: Path, is_record: Callable[[dict[str, Any]], bool]) -> bool:
    """Say whether every line is a record; a kill may have torn the last one."""
    *lines, torn = path.read_bytes().split(b"\n")
    return torn[: len(_RECORD_HEAD)] == _RECORD_HEAD[: len(torn)] and all(is_record(json.loads(line)) for line in lines)


@_or_no
def is_metrics(path: Path) -> bool:
    return _has_records(path, lambda record: "step" in record and bool(record.keys() & {"loss", "val_loss"}))


@_or_no
def is_samples(path: Path) -> bool:
    return _has_records(path, lambda record: record.keys() >= {"step", "prompt", "answer"})


@_or_no
def is_reference(path: Path) -> bool:
    """Look at the head only: of a damaged file, too, which is then computed anew."""
    head = f'{{"{REFERENCE_DIGEST}": '.encode()
    with path.open("rb") as file:
        return file.read(len(head)) in (head, bytes(len(head)))


@_or_no
def is_plot(path: Path) -> bool:
    with path.open("rb") as file:
        head = file.read(4096)
    is_unsigned = b"Matplotlib" in head and struct.unpack(">II", head[16:24]) == _UNSIGNED_PLOT_SIZE
    return head.startswith(b"\x89PNG") and (PLOT_AUTHOR.encode() in head or is_unsigned)


@_or_no
def is_logged_config(path: Path) -> bool:
    """The config as torchtune's loggers write it, beside what they log."""
    from omegaconf import OmegaConf

    text = read_text(path, MOST_YAML_BYTES)
    config = OmegaConf.create(text)
    return config.keys() >= RUN_CONFIG_KEYS and OmegaConf.to_yaml(config) == text


@_or_no
def is_wandb_run(path: Path) -> bool:
    return json.loads(path.read_text(encoding="utf-8")).keys() == {WANDB_ID_KEY}


@_or_no
def _is_adapter_config(path: Path) -> bool:
    config = json.loads(path.read_text(encoding="utf-8"))
    flags = config.keys() - _ADAPTER_CONFIG_KEYS
    return config["peft_type"] == "LORA" and all(name.startswith("use_") for name in flags)


@_or_no
def _is_adapter_weights(path: Path) -> bool:
    return _has_tensors_of(path, ("base_model.model.",))


@_or_no
def _is_model_weights(path: Path) -> bool:
    return _has_tensors_of(path, ("model.", "lm_head."))


def _has_tensors_of(path: Path, prefixes: tuple[str, ...]) -> bool:
    """Look at the header of a safetensors file only: of a damaged file, too."""
    with path.open("rb") as file:
        (num_bytes,) = struct.unpack("<Q", file.read(8))
        names = json.loads(file.read(num_bytes)).keys() if num_bytes <= _MAX_HEADER_BYTES else set()
    return bool(names) and all(name == "__metadata__" or name.startswith(prefixes) for name in names)


def _has_keys(*keys: str) -> Recognises:
    """Recognise a JSON object by keys that it has."""
    return _or_no(lambda path: json.loads(path.read_text(encoding="utf-8")).keys() >= {*keys})


@_or_no
def _is_sentencepiece_model(path: Path) -> bool:
    """Look at the head only: the list of pieces, which is field 1 of sentencepiece_model.proto's ModelProto."""
    with path.open("rb") as file:
        return file.read(1) == b"\n"


@_or_no
def _is_prompt_format(path: Path) -> bool:
    return read_prompt_format(path.parent) is not None


@_or_no
def _is_json_object(path: Path) -> bool:
    return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)


@_or_no
def _is_card(path: Path) -> bool:
    return TAG in card_metadata(path)["tags"]


@_or_no
def _is_state(path: Path) -> bool:
    """Look at the head only, which names the first entry of torch.save's zip archive: of a damaged file, too."""
    with path.open("rb") as file:
        head = file.read(100)
    return head.startswith(b"PK") and b"/data.pkl" in head


def _or_blank(recognises: Recognises) -> Recognises:
    """A power cut may leave a file of the right length and zero bytes: nothing is lost with it."""
    return lambda path: recognises(path) or not path.read_bytes().strip(b"\0")


_ADAPTER_FILES = {
    re.escape(WEIGHTS_NAME): _is_adapter_weights,
    re.escape(ADAPTER_CONFIG_NAME): _is_adapter_config,
    re.escape(PROMPT_FORMAT_NAME): _is_prompt_format,
    re.escape(CARD_NAME): _is_card,
    # Of an adapter with new tokens.
    **dict.fromkeys(map(re.escape, TOKENIZER_NAMES), _is_json_object),
}
# What a whole model has; tests hold it against what is written.
_MODEL_FILES = {
    r"model(-\d{5}-of-\d{5})?\.safetensors": _is_model_weights,
    r"model\.safetensors\.index\.json": _has_keys("metadata", "weight_map"),
    r"config\.json": _has_keys("model_type", "num_hidden_layers"),
    r"generation_config\.json": _has_keys("eos_token_id"),
    r"tokenizer_config\.json": _has_keys("tokenizer_class"),
    r"tokenizer\.json": _has_keys("model", "added_tokens"),
    r"tokenizer\.model": _is_sentencepiece_model,
    r"added_tokens\.json": _has_keys(),
    re.escape(PROMPT_FORMAT_NAME): _is_prompt_format,
    re.escape(CARD_NAME): _is_card,
}
ADAPTER = OwnDirectory(_ADAPTER_FILES)
# The trained weights of a run, by the name of their directory.
RESULTS = {ADAPTER_NAME: ADAPTER, MODEL_NAME: OwnDirectory(_MODEL_FILES)}
# The state goes first: a checkpoint that is half deleted is not resumed from.
CHECKPOINT = OwnDirectory(
    {
        re.escape(STATE_NAME): _or_blank(_is_state),
        re.escape(RUN_CONFIG_NAME): _or_blank(is_run_config),
        **{
            name: OwnDirectory({file: _or_blank(recognises) for file, recognises in files.items()})
            for name, files in ((ADAPTER_NAME, _ADAPTER_FILES), (MODEL_NAME, _MODEL_FILES))
        },
    }
)
