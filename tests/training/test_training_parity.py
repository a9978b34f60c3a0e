"""A whole run against PEFT on transformers' model, step for step, from the same adapter."""

import pytest
import torch
import torch.nn.functional as F

from custom_components.datasets.batching import BatchPlan, collate
from custom_components.datasets.chat import chat_dataset
from custom_components.training.gradients import accumulate_gradients, supervised_loss
from custom_components.training.loss import LinearCrossEntropy
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.weights.adapters import save_adapter
from tests.support.models import CPU, loaded_model, with_random_adapters

NUM_STEPS, LEARNING_RATE, WEIGHT_DECAY = 50, 1e-3, 0.01


@pytest.mark.parametrize("name", ["alpaca.json", "sharegpt.json"])
def test_50_steps_have_the_losses_of_peft(test_data, tmp_path, peft, name):
    transformers = pytest.importorskip("transformers")
    checkpoint = test_data("stories260K/config.json").parent
    tokenizer = Llama2ChatTransform(checkpoint / "tokenizer.model", max_seq_len=96)
    dataset = chat_dataset(tokenizer, str(test_data(f"formats/{name}")))
    plan = BatchPlan(batch_size=1, gradient_accumulation_steps=2, shuffle=True, seed=0)
    steps = [step for epoch in range(2) for step in plan.steps(dataset.lengths, epoch)][:NUM_STEPS]

    ours = with_random_adapters(loaded_model(checkpoint, lora_rank=4, lora_alpha=8)).train()
    save_adapter(ours, tmp_path / "start", "base", PromptFormat("llama2", None, ["</s>"]).texts())
    theirs = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    theirs = peft.PeftModel.from_pretrained(theirs, tmp_path / "start", is_trainable=True).train()

    our_losses = our_run(ours, dataset, steps)
    their_losses = their_run(theirs, dataset, steps)
    assert len(our_losses) == NUM_STEPS and our_losses[-1] < our_losses[0]
    torch.testing.assert_close(torch.tensor(our_losses), torch.tensor(their_losses), atol=1e-4, rtol=0)


def optimizer_of(model):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)


def our_run(model, dataset, steps):
    optimizer = optimizer_of(model)
    losses = []
    for forwards in steps:
        batches = [collate([dataset[row] for row in rows]) for rows in forwards]
        scaler = torch.amp.GradScaler("cpu", enabled=False)
        losses.append(accumulate_gradients(batches, supervised_loss(model, LinearCrossEntropy()), scaler, CPU).item())
        optimizer.step()
        optimizer.zero_grad()
    return losses


def their_run(model, dataset, steps):
    """Row by row, the sum over the step's supervised tokens divided by their number."""
    optimizer = optimizer_of(model)
    losses = []
    for forwards in steps:
        rows = [dataset[row] for forward in forwards for row in forward]
        num_supervised = sum(label >= 0 for row in rows for label in row["labels"][1:])
        total = 0.0
        for row in rows:
            logits = model(torch.tensor([row["tokens"]])).logits[0, :-1]
            loss = F.cross_entropy(logits, torch.tensor(row["labels"][1:]), reduction="sum") / num_supervised
            loss.backward()
            total += loss.item()
        losses.append(total)
        optimizer.step()
        optimizer.zero_grad()
    return losses
