"""The run of generate.py with transformers, PEFT and bitsandbytes.

Runs in the environment of requirements-trl.txt, where this package is not installed.
"""

import sys
import time
from pathlib import Path

import torch
from peft import PeftModel
from transformers.generation.streamers import BaseStreamer

from benchmarks.generation_job import Answer, GenerationJob, print_answers
from benchmarks.peft_model import quantized_peft_model


class MomentStreamer(BaseStreamer):
    """Notes when each token came."""

    def __init__(self) -> None:
        self.moments: list[float] = []

    def put(self, value: torch.Tensor) -> None:
        self.moments.append(time.perf_counter())

    def end(self) -> None:
        """Part of the protocol."""


def main(job: GenerationJob) -> None:
    model = quantized_peft_model(job.checkpoint_dir, job.adapter_dir, is_trainable=False).eval()
    answer(model, job.prompts[0], num_tokens=2)  # what is prepared once is not measured
    print_answers([answer(model, prompt, job.max_new_tokens) for prompt in job.prompts])


def answer(model: PeftModel, prompt: list[int], num_tokens: int) -> Answer:
    streamer = MomentStreamer()
    input_ids = torch.tensor([prompt])
    with torch.inference_mode():
        [ids] = model.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            do_sample=False,
            min_new_tokens=num_tokens,
            max_new_tokens=num_tokens,
            pad_token_id=0,
            streamer=streamer,
        )
    # The first that the streamer gets is the prompt.
    return Answer(ids[len(prompt) :].tolist(), streamer.moments)


if __name__ == "__main__":
    main(GenerationJob.read(Path(sys.argv[1])))
