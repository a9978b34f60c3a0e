"""A config.json or params.json with a damaged or foreign value is one error line that names the file and the key."""

import json
import random

import pytest

from custom_components.models.shapes import LlamaShape, shape_and_config
from custom_components.runtime.errors import UserError

CONFIG = {
    "model_type": "llama",
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_size": 64,
    "intermediate_size": 176,
    "max_position_embeddings": 256,
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "rope_scaling": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}
PARAMS = {
    "dim": 64,
    "n_layers": 2,
    "n_heads": 4,
    "n_kv_heads": 2,
    "multiple_of": 32,
    "norm_eps": 1e-5,
    "vocab_size": 512,
    "rope_theta": 1e4,
    "use_scaled_rope": True,
}
FILES = {"config.json": CONFIG, "params.json": PARAMS}
WRONG = ["32000", None, [], {}, 0, -1, 1.5, 10**9, 10**30, True, float("nan"), float("inf"), -1.0, "\ud83d"]


def shape_of(folder, name, values):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(values))
    return shape_and_config(folder)[0]


@pytest.mark.parametrize("name", FILES)
def test_every_wrong_value_of_every_key_is_an_error_with_its_place_or_a_shape_that_can_be_built(tmp_path, name):
    assert isinstance(shape_of(tmp_path, name, FILES[name]), LlamaShape)
    keys = [(key,) for key in FILES[name]] + [("rope_scaling", key) for key in FILES[name].get("rope_scaling", ())]
    num_errors = 0
    for *outer, key in keys:
        for wrong in WRONG:
            values = json.loads(json.dumps(FILES[name]))
            (values[outer[0]] if outer else values)[key] = wrong
            try:
                shape = shape_of(tmp_path, name, values)
            except UserError as error:
                num_errors += 1
                for message in error.messages:
                    assert name in message and "\n" not in message and len(message) < 500
                    assert "Traceback" not in message
            else:
                assert 0 < shape.num_layers <= 1000 and shape.num_heads % shape.num_kv_heads == 0
                assert 0 < shape.norm_eps < 1 and 0 < shape.rope_base < float("inf")
    assert num_errors > len(keys) * len(WRONG) * 0.7


@pytest.mark.parametrize(("name", "key"), [(name, key) for name in FILES for key in FILES[name]])
def test_a_missing_key_is_named_or_has_the_default_of_its_file(tmp_path, name, key):
    values = {other: value for other, value in FILES[name].items() if other != key}
    try:
        shape = shape_of(tmp_path, name, values)
    except UserError as error:
        assert f"{key}: missing" in str(error)
    else:
        assert isinstance(shape, LlamaShape)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 66}, "hidden_size 66 is not a multiple of num_attention_heads 4"),
        ({"hidden_size": 60, "num_key_value_heads": 4}, "heads of width 15 cannot be rotated in pairs"),
        ({"rms_norm_eps": -1}, "rms_norm_eps: -1 should be greater than 0"),
        ({"rope_theta": -1}, "rope_theta: -1 should be greater than 0"),
        ({"vocab_size": "32000"}, "vocab_size: '32000' should be a valid integer"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "without low_freq_factor, high_freq_factor"),
    ],
)
def test_what_cannot_be_is_said(tmp_path, changes, words):
    with pytest.raises(UserError) as error:
        shape_of(tmp_path, "config.json", CONFIG | changes)
    assert words in str(error.value)


def test_damaged_bytes_are_an_error_of_one_line(tmp_path):
    content = bytearray(json.dumps(CONFIG).encode())
    generator = random.Random(0)
    for _ in range(300):
        damaged = bytearray(content)
        for _ in range(generator.randint(1, 3)):
            damaged[generator.randrange(len(damaged))] = generator.randrange(256)
        (tmp_path / "config.json").write_bytes(damaged)
        try:
            shape_and_config(tmp_path)
        except UserError as error:
            assert all("\n" not in message for message in error.messages)
