"""Pre-trains the tiny Llama on the corpus of make_world.py and writes it as a Hugging Face checkpoint.

    python pretrain.py

One pass of next-token prediction over all documents, each as BOS + text + EOS, packed into fixed windows. Shapes:
B windows in a batch, S tokens in a window, V pieces in the vocabulary.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy
import sentencepiece
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

HERE = Path(__file__).resolve().parent

# Every linear weight holds a whole number of NF4 scaler blocks: 64 weights a block, 256 blocks a scaler block.
# Written by hand rather than by transformers, whose version 5 renames rope_theta and torch_dtype.
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "max_position_embeddings": 512,
    "initializer_range": 0.02,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def packed_windows(corpus_path: Path, tokenizer_path: Path, window_length: int) -> torch.Tensor:
    """All documents in file order, cut into windows: int64 [num_windows, window_length]."""
    tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path), add_bos=True, add_eos=True)
    with corpus_path.open(encoding="utf-8") as corpus:
        documents = [json.loads(line)["text"] for line in corpus]
    tokens = numpy.concatenate([numpy.array(ids, dtype=numpy.int64) for ids in tokenizer.encode(documents)])
    num_windows = len(tokens) // window_length
    return torch.from_numpy(tokens[: num_windows * window_length]).view(num_windows, window_length)


def learning_rate(step: int, num_steps: int, num_warmup_steps: int, peak: float) -> float:
    """Linear warm-up to the peak, then a cosine to a hundredth of it."""
    if step < num_warmup_steps:
        return peak * (step + 1) / num_warmup_steps
    progress = (step - num_warmup_steps) / max(1, num_steps - num_warmup_steps)
    return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * progress)))


def make_optimizer(model: LlamaForCausalLM, weight_decay: float) -> torch.optim.AdamW:
    """AdamW that decays matrices and leaves the norms' scales alone."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    scales = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": weight_decay}, {"params": scales, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)


def next_token_loss(model: LlamaForCausalLM, tokens_BS: torch.Tensor) -> torch.Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        logits_BSV = model(tokens_BS[:, :-1], use_cache=False).logits
    return F.cross_entropy(logits_BSV.float().flatten(0, 1), tokens_BS[:, 1:].flatten())


def pretrain(model: LlamaForCausalLM, windows: torch.Tensor, args: argparse.Namespace) -> None:
    optimizer = make_optimizer(model, args.weight_decay)
    order = torch.randperm(len(windows))
    num_steps = len(windows) // args.batch_windows
    recent_losses = []
    start = time.perf_counter()
    for step in range(num_steps):
        batch = windows[order[step * args.batch_windows : (step + 1) * args.batch_windows]]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, num_steps, args.num_warmup_steps, args.learning_rate)
        loss = next_token_loss(model, batch)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

        recent_losses.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == num_steps:
            elapsed_s = time.perf_counter() - start
            num_tokens = (step + 1) * batch.numel()
            print(
                f"step {step + 1}/{num_steps}  loss {sum(recent_losses) / len(recent_losses):.4f}  "
                f"{num_tokens / 1e6:.2f}M tokens in {elapsed_s:.0f} s ({num_tokens / elapsed_s:.0f} a second)",
                flush=True,
            )
            recent_losses.clear()


def write_checkpoint(model: LlamaForCausalLM, config: dict, output_dir: Path) -> None:
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    weights = {name: tensor.to(torch.bfloat16).contiguous() for name, tensor in model.state_dict().items()}
    save_file(weights, output_dir / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--window-length", type=int, default=256, help="tokens")
    parser.add_argument("--batch-windows", type=int, default=16, help="windows per optimizer step")
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--num-warmup-steps", type=int, default=100)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--build-dir", type=Path, default=HERE / "build", help="holds corpus.jsonl")
    parser.add_argument(
        "--checkpoint-dir", type=Path, default=HERE / "checkpoint", help="holds tokenizer.model, receives the model"
    )
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    tokenizer_path = args.checkpoint_dir / "tokenizer.model"
    windows = packed_windows(args.build_dir / "corpus.jsonl", tokenizer_path, args.window_length)
    vocab_size = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer_path)).vocab_size()
    config = CONFIG | {"vocab_size": vocab_size}
    model = LlamaForCausalLM(LlamaConfig(**config))
    # note: with torch_dtype in its config the model may start out in bf16, where AdamW's small updates round away.
    model.float().train()
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.2f}M parameters, {windows.numel() / 1e6:.2f}M tokens")

    pretrain(model, windows, args)
    write_checkpoint(model, config, args.checkpoint_dir)


if __name__ == "__main__":
    main()
