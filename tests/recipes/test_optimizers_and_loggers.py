"""Components that a config may name in place of the defaults."""

import json

import pytest
import torch

from custom_components.config.lora_settings import LoRASettings
from custom_components.config.reading import load_settings
from custom_components.config.training_settings import refuse_cuda_only_settings
from custom_components.memory.step_limit import StepLimit
from custom_components.runtime.errors import UserError
from custom_components.training.optimizer import page_loaded_state
from tests.support.models import CPU
from tests.support.paths import PROJECT
from tests.support.recipe_runs import arguments, tune_run
from tests.support.run_results import records


def test_8_bit_adam_learns_as_adam_does_and_a_logger_logs(make_checkpoint, many_rows, tmp_path):
    checkpoint = make_checkpoint(hidden_size=256, intermediate_size=512)  # bitsandbytes leaves small tensors in 32 bits

    def run(output_dir, *overrides):
        overrides = ("dtype=fp32", "optimizer.lr=2e-3", "batch_size=4", "epochs=3", "lora_dropout=0", *overrides)
        result = tune_run(*arguments(checkpoint, many_rows, output_dir, *overrides))
        assert result.returncode == 0, result.stderr
        losses = [record["loss"] for record in records(output_dir)]
        assert len(losses) == 30
        return losses, result

    adam, result = run(
        tmp_path / "adam",
        "metric_logger={_component_: torchtune.training.metric_logging.StdoutLogger}",
        "log_every_n_steps=15",
    )
    assert result.stdout.count("Step 15 | step:15") == result.stdout.count("Step 30 | step:30") == 1
    assert "Step 16" not in result.stdout
    eight_bit, result = run(tmp_path / "8bit", "optimizer._component_=bitsandbytes.optim.AdamW8bit", "~optimizer.fused")
    assert "kernels" not in result.stdout + result.stderr
    assert adam[-1] < 0.8 * adam[0]
    assert eight_bit[-1] == pytest.approx(adam[-1], rel=0.01)
    state = torch.load(tmp_path / "8bit/checkpoints/step_000030/state.pt", weights_only=True)
    assert "dtype=torch.uint8" in str(state["optimizer"])


def test_what_needs_cuda_is_refused_on_the_cpu(monkeypatch):
    monkeypatch.chdir(PROJECT)

    def settings(*overrides):
        return load_settings(LoRASettings, ["--config", "configs/tiny_qlora.yaml", *overrides])

    paged = settings("optimizer._component_=bitsandbytes.optim.PagedAdamW", "~optimizer.fused")
    offloading = settings("enable_activation_offloading=true", "enable_activation_checkpointing=true")
    for refused, reason in ((paged, "PagedAdamW needs CUDA"), (offloading, "enable_activation_offloading")):
        with pytest.raises(UserError, match=reason):
            refuse_cuda_only_settings(refused, CPU)
        refuse_cuda_only_settings(refused, torch.device("cuda"))
    refuse_cuda_only_settings(settings("optimizer._component_=bitsandbytes.optim.AdamW8bit", "~optimizer.fused"), CPU)


def test_loaded_state_of_a_paged_optimizer_is_paged_again():
    """A stub of bitsandbytes' class, which pages on CUDA only."""
    parameter = torch.nn.Parameter(torch.zeros(3))
    pages = []

    class Paged(torch.optim.AdamW):
        is_paged = True

        def get_state_buffer(self, parameter, dtype):
            pages.append(torch.zeros(parameter.shape, dtype=dtype))
            return pages[-1]

    optimizer = Paged([parameter])
    loaded = {"step": 5, "state1": torch.tensor([1.0, 2.0, 3.0]), "state2": torch.tensor([4, 5, 6], dtype=torch.uint8)}
    optimizer.state[parameter] = dict(loaded)
    page_loaded_state(optimizer)
    state = optimizer.state[parameter]
    assert {id(page) for page in pages} == {id(state["state1"]), id(state["state2"])}
    assert state["step"] == 5 and all(torch.equal(state[name], loaded[name]) for name in ("state1", "state2"))
    assert state["state2"].dtype is torch.uint8


def test_sgd_samples_and_init_from_an_adapter(make_checkpoint, tmp_path):
    """Another optimizer, answers at every validation, and a second run that begins with the first one's adapter."""
    common = [
        *("--config", "configs/tiny_qlora.yaml", "cache_dir=null", "max_steps_per_epoch=4", "epochs=1", "lora_rank=4"),
        *("run_val_every_n_steps=2", "sample_prompts=['Who?', 'What: that?']"),
    ]
    first = tune_run(*common, f"output_dir={tmp_path / 'first'}")
    assert first.returncode == 0, first.stderr
    samples = [json.loads(line) for line in (tmp_path / "first/samples.jsonl").read_text().splitlines()]
    assert [(sample["step"], sample["prompt"]) for sample in samples] == [
        *((2, "Who?"), (2, "What: that?"), (4, "Who?"), (4, "What: that?")),
    ]
    from_first = f"init_adapter_from={tmp_path / 'first/adapter'}"
    second = tune_run(
        *common,
        *("optimizer={_component_: torch.optim.SGD, lr: 1e-4}", from_first, f"output_dir={tmp_path / 'second'}"),
    )
    assert second.returncode == 0, second.stderr
    first_losses, second_losses = (
        [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        for name in ("first", "second")
    )
    assert second_losses[0]["loss"] < first_losses[0]["loss"]
    wrong = tune_run(*common, from_first, "lora_rank=8", f"output_dir={tmp_path / 'wrong'}")
    assert wrong.returncode == 2 and "lora_rank is 4, the model's 8" in wrong.stderr


@pytest.mark.parametrize(
    ("batch_size", "words"), [(8, "set batch_size=4 "), (1, "set batch_size=1 and max_seq_len=500 ")]
)
def test_out_of_memory_says_what_would_fit(batch_size, words):
    error = StepLimit(CPU, batch_size).error(step=3, largest_forward_tokens=1000)
    assert words in str(error) and "step 3: 1000 tokens" in str(error)


def test_out_of_memory_reckons_with_the_steps_that_fitted(monkeypatch):
    """Standing 2 GB, a step of 1000 tokens took 2 GB more, the card has 10 GB: 0.9 x 10 - 2 is room for 3500 tokens."""
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2e9)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 4e9)
    properties = type("Properties", (), {"total_memory": 10e9})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    memory = StepLimit(cuda, batch_size=8)
    memory.add_step(1000)
    assert "set batch_size=3 " in str(memory.error(step=9, largest_forward_tokens=8000))
