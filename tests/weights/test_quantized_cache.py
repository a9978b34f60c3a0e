"""The quantized base that is kept across runs is the one that would be made."""

import os
import random

import pytest
import torch

from custom_components.models import nf4
from custom_components.models.builders import lora_llama_from_config
from custom_components.weights import checkpoint_loading
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import frozen_checksum, load_base_weights
from tests.support.models import CPU


def load(checkpoint, cache_dir):
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint, ["q_proj"], quantize_base=True)
    load_base_weights(model, open_checkpoint(checkpoint), torch.bfloat16, CPU, cache_dir)
    return model


def test_a_second_start_quantizes_nothing_and_has_the_same_bytes(make_checkpoint, tmp_path, monkeypatch):
    checkpoint = make_checkpoint()
    plain = frozen_checksum(load(checkpoint, None))
    assert frozen_checksum(load(checkpoint, tmp_path / "cache")) == plain
    [file] = (tmp_path / "cache/quantized").iterdir()
    monkeypatch.setattr(checkpoint_loading.quantization, "quantize", None)
    again = load(checkpoint, tmp_path / "cache")
    assert frozen_checksum(again) == plain
    weight = again.layers[0].mlp.w1.weight
    assert nf4.is_quantized(weight) and weight.dtype is torch.bfloat16
    # note: no view of the file, which another run may replace.
    file.write_bytes(bytes(file.stat().st_size))
    assert frozen_checksum(again) == plain


def test_another_checkpoint_is_quantized_anew_though_its_time_of_change_is_set_back(make_checkpoint, tmp_path):
    """As `cp -p` and `rsync -t` do."""
    checkpoint = make_checkpoint()
    weights = checkpoint / "model.safetensors"
    load(checkpoint, tmp_path / "cache")
    status = weights.stat()
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x41
    weights.write_bytes(content)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert frozen_checksum(load(checkpoint, tmp_path / "cache")) == frozen_checksum(load(checkpoint, None))
    assert len(list((tmp_path / "cache/quantized").iterdir())) == 2


DAMAGES = {
    "cut off": lambda content, position: content[:-100],
    "empty": lambda content, position: b"",
    "zeros": lambda content, position: content[:position] + bytes(4096) + content[position + 4096 :],
    "a flipped bit": lambda content, position: (
        content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :]
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_gives_no_other_weights_and_is_made_again(make_checkpoint, tmp_path, capsys, damage):
    checkpoint = make_checkpoint()
    plain = frozen_checksum(load(checkpoint, tmp_path / "cache"))
    [file] = (tmp_path / "cache/quantized").iterdir()
    content = file.read_bytes()
    # In the header too: names, types, places, digests.
    positions = random.Random(0).sample(range(len(content) - 4096), 6) + random.Random(1).sample(range(3000), 6)
    for position in positions:
        file.write_bytes(DAMAGES[damage](content, position))
        capsys.readouterr()
        assert frozen_checksum(load(checkpoint, tmp_path / "cache")) == plain
        is_said = "is damaged: the base is quantized again" in capsys.readouterr().out
        # Spaces that pad the header, for instance, change nothing.
        assert is_said or damage in ("a flipped bit", "zeros")
        if is_said:
            assert file.read_bytes() == content


def test_a_folder_that_cannot_be_written_is_said(make_checkpoint, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file, not a folder")
    load(make_checkpoint(), tmp_path / "cache")
    assert "quantized_cache: not kept" in capsys.readouterr().out
