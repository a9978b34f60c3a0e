"""The quantized base that is kept across runs is the one that would be made."""

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
    monkeypatch.setattr(checkpoint_loading.nf4, "quantize", None)
    again = load(checkpoint, tmp_path / "cache")
    assert frozen_checksum(again) == plain
    weight = again.layers[0].mlp.w1.weight
    assert nf4.is_quantized(weight) and weight.dtype is torch.bfloat16
    # note: no view of the file, which another run may replace.
    file.write_bytes(bytes(file.stat().st_size))
    assert frozen_checksum(again) == plain


def test_another_checkpoint_and_a_damaged_cache_are_quantized_anew(make_checkpoint, tmp_path):
    first, second = make_checkpoint("first"), make_checkpoint("second", rms_norm_eps=1e-6)
    weights = second / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 0x41
    weights.write_bytes(content)
    load(first, tmp_path / "cache")
    assert frozen_checksum(load(second, tmp_path / "cache")) == frozen_checksum(load(second, None))
    files = list((tmp_path / "cache/quantized").iterdir())
    assert len(files) == 2
    for file in files:
        file.write_bytes(file.read_bytes()[:-100])
    assert frozen_checksum(load(first, tmp_path / "cache")) == frozen_checksum(load(first, None))


def test_a_folder_that_cannot_be_written_is_said(make_checkpoint, tmp_path, capsys):
    (tmp_path / "cache").write_text("a file, not a folder")
    load(make_checkpoint(), tmp_path / "cache")
    assert "quantized_cache: not kept" in capsys.readouterr().out
