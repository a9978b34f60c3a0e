"""Write a checkpoint of a named model's shape with random values, in Hugging Face's format and two shards.

    python -m benchmarks.make_checkpoint --shape LLAMA2_7B --output-dir checkpoints/random-7b

For measuring time and memory where the real weights are not at hand. The tokenizer is the embedded tiny one, smaller
than the embedding, unless --tokenizer names another. --num-layers makes a shorter model of the same widths.
"""

import argparse
import dataclasses
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from custom_components.models import shapes as llama_shapes
from custom_components.models.shapes import LlamaShape
from custom_components.weights.hugging_face_writing import config_of_shape

NUM_SHARDS = 2
SHAPES = {name: value for name, value in vars(llama_shapes).items() if isinstance(value, LlamaShape)}
TINY_TOKENIZER = Path(__file__).parent.parent / "examples/tiny_llama/checkpoint/tokenizer.model"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="LLAMA2_7B", choices=SHAPES)
    parser.add_argument("--num-layers", type=int, help="instead of the shape's own")
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--tokenizer", type=Path, default=TINY_TOKENIZER)
    arguments = parser.parse_args()
    shape = SHAPES[arguments.shape]
    if arguments.num_layers:
        shape = dataclasses.replace(shape, num_layers=arguments.num_layers)
    write_random_checkpoint(shape, arguments.output_dir, arguments.tokenizer)


def write_random_checkpoint(shape: LlamaShape, output_dir: Path, tokenizer: Path) -> None:
    """Write bf16 weights, normal with standard deviation 0.02, a shard at a time."""
    output_dir.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    names = list(tensor_shapes(shape))
    weight_map: dict[str, str] = {}
    for shard in range(NUM_SHARDS):
        file_name = f"model-{shard + 1:05}-of-{NUM_SHARDS:05}.safetensors"
        part = names[shard * len(names) // NUM_SHARDS : (shard + 1) * len(names) // NUM_SHARDS]
        tensors = {name: random_tensor(size, generator) for name, size in part}
        save_file(tensors, output_dir / file_name, metadata={"format": "pt"})
        weight_map |= {name: file_name for name, _ in part}
    index = {"metadata": {}, "weight_map": weight_map}
    (output_dir / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {**config_of_shape(shape, bos_id=1), "eos_token_id": 2}
    config |= {"tie_word_embeddings": shape.tied_embeddings, "torch_dtype": "bfloat16"}
    (output_dir / "config.json").write_text(json.dumps(config, indent=2))
    shutil.copyfile(tokenizer, output_dir / "tokenizer.model")


def tensor_shapes(shape: LlamaShape) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Hugging Face's names and sizes."""
    dim, kv_dim = shape.embed_dim, shape.num_kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab_size, dim)
    for layer in range(shape.num_layers):
        prefix = f"model.layers.{layer}"
        yield f"{prefix}.self_attn.q_proj.weight", (dim, dim)
        yield f"{prefix}.self_attn.k_proj.weight", (kv_dim, dim)
        yield f"{prefix}.self_attn.v_proj.weight", (kv_dim, dim)
        yield f"{prefix}.self_attn.o_proj.weight", (dim, dim)
        yield f"{prefix}.mlp.gate_proj.weight", (shape.intermediate_dim, dim)
        yield f"{prefix}.mlp.up_proj.weight", (shape.intermediate_dim, dim)
        yield f"{prefix}.mlp.down_proj.weight", (dim, shape.intermediate_dim)
        yield f"{prefix}.input_layernorm.weight", (dim,)
        yield f"{prefix}.post_attention_layernorm.weight", (dim,)
    yield "model.norm.weight", (dim,)
    yield "lm_head.weight", (shape.vocab_size, dim)


def random_tensor(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    if len(size) == 1:
        return torch.ones(size, dtype=torch.bfloat16)
    return torch.empty(size, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)


if __name__ == "__main__":
    main()
