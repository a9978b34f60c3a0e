"""DPO beside TRL's DPOTrainer: the same pairs, adapter and order have the same losses, step for step."""

import pytest
import torch

from custom_components.datasets.pair_batching import collate_pairs
from custom_components.training.gradients import accumulate_gradients
from custom_components.training.loss import LinearCrossEntropy
from custom_components.training.preference import PairMeasures, preference_loss, reference_log_probabilities
from custom_components.training.preference_losses import ipo, robust, sigmoid
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.models import CPU, loaded_model, with_random_adapters
from tests.support.rows import random_rows

NUM_STEPS, BATCH_SIZE, LEARNING_RATE, CLIP = 20, 2, 1e-3, 1.0
HEAD = LinearCrossEntropy()


def pairs_of_ids():
    """Pairs as TRL holds them: the ids of a prompt and of its two completions."""
    rows = [row["tokens"] for row in random_rows(3 * NUM_STEPS * BATCH_SIZE, seed=3)]
    return [
        {"prompt_ids": prompt[:12], "chosen_ids": chosen[:15], "rejected_ids": rejected[:15]}
        for prompt, chosen, rejected in zip(rows[::3], rows[1::3], rows[2::3], strict=True)
    ]


def as_ours(pair):
    prompt = pair["prompt_ids"]
    return {
        name: {"tokens": prompt + pair[f"{name}_ids"], "labels": [-100] * len(prompt) + pair[f"{name}_ids"]}
        for name in ("chosen", "rejected")
    }


def our_losses(model, pairs, loss_function):
    batches = [collate_pairs(pairs[start : start + BATCH_SIZE]) for start in range(0, len(pairs), BATCH_SIZE)]
    rated = reference_log_probabilities(model, batches, HEAD, CPU)
    pairs = [pair | {"reference": values} for pair, values in zip(pairs, rated, strict=True)]
    loss_of = preference_loss(model, loss_function, HEAD, PairMeasures())
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=0.0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    losses = []
    for start in range(0, len(pairs), BATCH_SIZE):
        losses.append(accumulate_gradients([collate_pairs(pairs[start : start + BATCH_SIZE])], loss_of, scaler, CPU))
        torch.nn.utils.clip_grad_norm_(parameters, CLIP)
        optimizer.step()
        optimizer.zero_grad()
    return torch.stack(losses)


def their_losses(trl, model, pairs, tmp_path, **settings):
    datasets, tokenizers = pytest.importorskip("datasets"), pytest.importorskip("tokenizers")
    transformers = pytest.importorskip("transformers")
    losses = []

    class InOrder(trl.DPOTrainer):
        def _prepare_dataset(self, dataset, *_, **__):
            return dataset

        def _get_train_sampler(self, *_):
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def compute_loss(self, *arguments, **named):
            result = super().compute_loss(*arguments, **named)
            losses.append((result[0] if isinstance(result, tuple) else result).detach().float())
            return result

    words = tokenizers.Tokenizer(tokenizers.models.WordLevel({"<pad>": 0, "</s>": 1}, unk_token="<pad>"))
    args = trl.DPOConfig(
        str(tmp_path / "trl"),
        **{"per_device_train_batch_size": BATCH_SIZE, "max_steps": NUM_STEPS, "learning_rate": LEARNING_RATE},
        **{"lr_scheduler_type": "constant", "warmup_steps": 0, "weight_decay": 0.0, "max_grad_norm": CLIP},
        **{"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none", "max_length": None},
        **{"save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "optim": "adamw_torch"},
        **settings,
    )
    trainer = InOrder(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_list(pairs),
        processing_class=transformers.PreTrainedTokenizerFast(
            tokenizer_object=words, pad_token="<pad>", eos_token="</s>"
        ),
    )
    trainer.train()
    return torch.stack(losses)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("loss_function", "settings"),
    [
        (sigmoid, {"loss_type": "sigmoid"}),
        (ipo, {"loss_type": "ipo"}),
        (robust, {"loss_type": "robust", "label_smoothing": 0.1}),
    ],
)
def test_L37_20_steps_have_the_losses_of_trl(make_checkpoint, tmp_path, peft, loss_function, settings):
    """From an adapter that was trained before: the reference is that adapter, and not the base."""
    trl, transformers = pytest.importorskip("trl"), pytest.importorskip("transformers")
    checkpoint, pairs = make_checkpoint(), pairs_of_ids()
    ours = with_random_adapters(loaded_model(checkpoint, lora_rank=4, lora_alpha=8)).train()
    save_adapter(ours, tmp_path / "start", "base", PromptFormat("llama2", None, ["</s>"]).texts())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True)
    losses = our_losses(ours, [as_ours(pair) for pair in pairs], loss_function)
    expected = their_losses(trl, theirs, pairs, tmp_path, beta=0.1, **settings)
    assert len(losses) == NUM_STEPS and losses[-1] != losses[0]
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=0)
