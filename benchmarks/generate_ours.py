"""This package's run of generate.py."""

import sys
import time
from pathlib import Path

import torch

from benchmarks.generation_job import Answer, GenerationJob, print_answers
from custom_components.generation.decoding import decode_steps
from custom_components.generation.incremental import IncrementalLlama, made_for_inference
from custom_components.generation.sampling import Sampling
from custom_components.weights.adapted_model import load_model_for_inference
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.checkpoint_files import open_checkpoint


def main(job: GenerationJob) -> None:
    model = load_model_for_inference(
        open_checkpoint(Path(job.checkpoint_dir)),
        open_adapter(Path(job.adapter_dir)),
        quantize_base=True,
        dtype=torch.bfloat16,
        device=torch.device("cpu"),
    )
    inference_model = made_for_inference(model)
    answer(inference_model, job.prompts[0], num_tokens=2)  # what is prepared once is not measured
    print_answers([answer(inference_model, prompt, job.max_new_tokens) for prompt in job.prompts])


def answer(model: IncrementalLlama, prompt: list[int], num_tokens: int) -> Answer:
    tokens, moments = [], [time.perf_counter()]
    for [token] in decode_steps(model, [prompt], num_tokens, Sampling()):
        tokens.append(token)
        moments.append(time.perf_counter())
    return Answer(tokens, moments)


if __name__ == "__main__":
    main(GenerationJob.read(Path(sys.argv[1])))
