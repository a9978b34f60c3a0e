"""L31: the peak of memory is measured and reported, and the estimate made before the run is within a tenth of it."""

import json

import pytest
import torch

from custom_components.config.components import instantiate
from custom_components.config.reading import load_settings
from custom_components.config.training_kinds import AnyTrainingSettings
from custom_components.memory.estimate import Recomputing, estimate_memory
from custom_components.recipe_parts.step_choices import step_parts
from tests.support.checkpoints import write_checkpoint
from tests.support.recipe_runs import started_tune

NUM_ROWS, ROW_TOKENS = 4, 400


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    """A checkpoint whose step takes far more than the process itself, and rows that are all cut to one length.

    With its layers recomputed it would not: what the process takes beside its tensors moves by 50 MiB from run to run.
    """
    folder = tmp_path_factory.mktemp("memory")
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 8, "num_attention_heads": 8}
    write_checkpoint(folder / "checkpoint", **sizes, num_key_value_heads=8, max_position_embeddings=1024)
    words = " ".join(f"word{number}" for number in range(ROW_TOKENS))
    rows = [json.dumps({"prompt": "say", "completion": f"{index} {words}"}) for index in range(3 * NUM_ROWS)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


LORA = ("lora_single_device", "configs/llama_qlora.yaml")
FULL = ("full_single_device", "configs/tiny_full.yaml")
KEPT = "enable_activation_checkpointing=false"


@pytest.mark.parametrize(
    ("recipe", "choices"),
    [
        (LORA, ("quantize_base=true", KEPT)),
        pytest.param(LORA, ("quantize_base=false", KEPT), marks=pytest.mark.slow),
        pytest.param(LORA, ("quantize_base=false", "quantization=int8", KEPT), marks=pytest.mark.slow),
        pytest.param(FULL, (KEPT,), marks=pytest.mark.slow),
        pytest.param(FULL, (KEPT, "optimizer_in_backward=true", "clip_grad_norm=null"), marks=pytest.mark.slow),
    ],
    ids=lambda value: " ".join(value),
)
def test_L31_the_estimate_is_within_a_tenth_of_the_measured_peak(job, tmp_path, recipe, choices):
    name, config = recipe
    arguments = [
        *("--config", config, f"checkpoint_dir={job / 'checkpoint'}", f"output_dir={tmp_path}/out", "device=cpu"),
        *(f"dataset.source={job / 'rows.jsonl'}", f"max_seq_len={ROW_TOKENS}", f"batch_size={NUM_ROWS}"),
        *("gradient_accumulation_steps=1", "dtype=bf16", "cache_dir=null", "dataset_val=null"),
        *("run_val_every_n_steps=null", *choices),
    ]
    result = started_tune("run", f"recipes/{name}.py", *arguments)
    assert result.returncode == 0, result.stderr
    records = [json.loads(line) for line in (tmp_path / "out/metrics.jsonl").read_text().splitlines()]
    settings = load_settings(AnyTrainingSettings, arguments)
    num_step_tokens = settings.gradient_accumulation_steps * NUM_ROWS * ROW_TOKENS
    assert num_step_tokens in {record["tokens"] for record in records}
    with torch.device("meta"):
        model = instantiate(settings.model)
    estimate = estimate_memory(model, step_parts(settings), torch.bfloat16, "cpu", [ROW_TOKENS] * NUM_ROWS)
    num_recomputed_layers = len(model.layers) if settings.enable_activation_checkpointing else 0
    estimated_gib = estimate.peak_bytes(Recomputing(num_recomputed_layers)) / 2**30
    assert estimated_gib == pytest.approx(records[-1]["peak_memory_gib"], rel=0.1)
