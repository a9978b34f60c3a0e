"""Merge an adapter, or several, into their base model, write the result for other tools and prove that it is the same.

`format=gguf_lora` writes the adapter alone; `format=gguf` with `adapter_dir=null` writes the model of checkpoint_dir.

tune run recipes/merge.py --config configs/merge.yaml checkpoint_dir=... adapter_dir=... output_dir=...
tune run recipes/merge.py --config configs/merge.yaml checkpoint_dir=... adapter_dir=null format=gguf output_dir=...
"""

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torchtune.training.precision import PRECISION_STR_TO_DTYPE
from tqdm import tqdm

from custom_components.config.reading import load_settings
from custom_components.config.task_settings import MergeSettings
from custom_components.export.gguf import write_gguf
from custom_components.export.gguf_k_quants import K_QUANTS, import_llama_cpp, quantize_gguf
from custom_components.export.gguf_lora import write_gguf_lora
from custom_components.export.gguf_reading import GgufWeights
from custom_components.export.merge_output import check_output_dir, check_space, merge_directory, restore_replaced
from custom_components.export.merge_proof import (
    Weights,
    check_same_logits,
    compared,
    logits_of_weights,
    logits_with_adapters,
)
from custom_components.export.merge_record import check_not_merged_yet, write_record
from custom_components.export.merged_card import merged_card
from custom_components.export.merged_weights import (
    BaseWeights,
    MergedAdapter,
    MergedWeights,
    num_embeddings_of,
    read_adapter,
)
from custom_components.export.modelfile import write_modelfile
from custom_components.models.quantization import Quantization, chosen_quantization
from custom_components.runs.origin import Origin, open_origin
from custom_components.runtime.errors import UserError, run_recipe
from custom_components.runtime.process_memory import PeakMemory
from custom_components.runtime.terminal import say
from custom_components.transforms.chat_transform import ChatTransform
from custom_components.transforms.own_template import source_template
from custom_components.transforms.prompt_format import (
    PromptFormat,
    read_prompt_format,
    tokenizer_with_format,
    write_prompt_format,
)
from custom_components.transforms.tokenizer_files import (
    ExportedTokenizer,
    exported_tokenizer,
    template_of_format,
    write_tokenizer,
)
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.card import CARD_NAME
from custom_components.weights.checkpoint_files import BaseCheckpoint, open_checkpoint
from custom_components.weights.hugging_face_writing import write_config, write_weights

# q8_0: blocks of 32 values in a byte each, with a scale in f16.
BYTES_PER_VALUE = {
    **{"fp32": 4, "fp16": 2, "bf16": 2, "f16": 2, "q8_0": 34 / 32},
    **{name: bytes_per_value for name, (_, bytes_per_value) in K_QUANTS.items()},
}


def recipe_main() -> None:
    settings = load_settings(MergeSettings, sys.argv[1:])
    memory = PeakMemory(torch.device("cpu"))
    # A model that was trained as a whole has no adapter, and states its prompt format itself.
    trained_dirs = [adapter.dir for adapter in settings.weighted_adapters] or [settings.checkpoint_dir]
    restore_replaced(settings.output_dir)
    check_output_dir(settings.output_dir, overwrite=settings.overwrite_output_dir)
    if settings.gguf_quantization in K_QUANTS:
        import_llama_cpp(settings.gguf_quantization)

    checkpoint = open_checkpoint(settings.checkpoint_dir)
    key = "adapters" if settings.adapters else "adapter_dir"
    adapters = [read_adapter(checkpoint, open_adapter(a.dir, key), a.weight) for a in settings.weighted_adapters]
    num_embeddings = num_embeddings_of(checkpoint, adapters)
    origins = [open_origin(directory) for directory in trained_dirs]
    format = trained_format(origins) if settings.base == "dequantized" else None
    base = BaseWeights(checkpoint, format, num_embeddings)
    if adapters:
        check_not_merged_yet(settings.checkpoint_dir, adapters, allow_merged_base=settings.allow_merged_base)
    if settings.format == "gguf_lora":
        export_adapter(settings, checkpoint, adapters[0])
        return
    merged = MergedWeights(base, adapters)
    formats = [read_prompt_format(directory) for directory in trained_dirs]
    prompt_format = formats[0] or read_prompt_format(settings.checkpoint_dir)
    with_tokens = next((adapter.directory for adapter in adapters if adapter.token_rows), None)
    transform = tokenizer_with_format(settings.checkpoint_dir, prompt_format, with_tokens)
    transform = fit_tokenizer(transform, base.model)
    template = template_of(formats, trained_dirs[0], checkpoint, transform)
    tokenizer = exported_tokenizer(transform, template)
    storage = storage_of(settings, base)
    num_bytes = round(merged.num_values * BYTES_PER_VALUE[storage])
    # llama.cpp's quantizer reads the f16 file that is then deleted.
    num_bytes_aside = merged.num_values * 2 if storage in K_QUANTS else 0
    check_space(settings.output_dir, num_bytes + num_bytes_aside)

    with merge_directory(settings.output_dir) as directory:
        if settings.format == "gguf":
            written: Weights = write_gguf_file(directory, merged, settings, tokenizer, prompt_format)
        else:
            if prompt_format is not None:
                write_prompt_format(prompt_format, directory)
            written = write_hugging_face(directory, merged, checkpoint, tokenizer, storage)
        file_names = [path.name for path in directory.iterdir()]
        card = merged_card(checkpoint, [(a.directory, a.weight) for a in adapters], settings.base, file_names)
        (directory / CARD_NAME).write_text(card, encoding="utf-8")
        write_record(directory, checkpoint, settings.base, adapters)
        if settings.prove:
            prove(written, "f16" if storage in K_QUANTS else storage, base, origins, adapters, transform)
    peak_gib = memory.gib()
    say(
        f"merged {settings.output_dir}: {num_bytes / 1e9:.3g} GB in {storage}"
        + (f", peak memory {peak_gib:.2f} GiB" if peak_gib is not None else "")
    )


def trained_format(origins: Sequence[Origin]) -> Quantization:
    """Tell which format the base had while the adapters were trained; NF4 where no run is known.

    Raises:
        UserError: not the same for all.
    """
    formats = {chosen_quantization(False, origin.quantization or "nf4") for origin in origins}
    if len(formats) > 1:
        raise UserError(
            "base: the adapters were trained over bases in different formats, and dequantized is one of them; merge "
            "onto base=original, or one after the other"
        )
    return formats.pop() or "nf4"


def format_name(format: Quantization) -> str:
    return "int8" if format == "int8" else "NF4"


def storage_of(settings: MergeSettings, base: BaseWeights) -> str:
    """Choose how the weights are stored, one of `BYTES_PER_VALUE`."""
    if settings.format == "gguf":
        return settings.gguf_quantization
    if settings.dtype != "auto":
        return settings.dtype
    names = {dtype: name for name, dtype in PRECISION_STR_TO_DTYPE.items() if name in BYTES_PER_VALUE}
    if base.stored_dtype not in names:
        raise UserError(f"dtype: the checkpoint stores {base.stored_dtype}; set dtype=bf16, fp16 or fp32 to write")
    return names[base.stored_dtype]


def write_hugging_face(
    directory: Path,
    merged: MergedWeights,
    checkpoint: BaseCheckpoint,
    tokenizer: ExportedTokenizer,
    storage: str,
) -> Weights:
    """Write a Hugging Face directory; return its weights, read back."""
    dtype = PRECISION_STR_TO_DTYPE[storage]
    dtypes = dict.fromkeys(merged.shapes, dtype)
    write_weights(directory, with_progress(merged), merged.shapes, merged.shape, dtypes)
    write_config(
        directory,
        checkpoint,
        merged.shape,
        dtype,
        bos_id=tokenizer.tokenizer.bos_id,
        stop_ids=tokenizer.stop_tokens,
        pad_id=tokenizer.pad_id,
    )
    write_tokenizer(directory, tokenizer, merged.shape.max_seq_len)
    return BaseWeights(open_checkpoint(directory))


def write_gguf_file(
    directory: Path,
    merged: MergedWeights,
    settings: MergeSettings,
    tokenizer: ExportedTokenizer,
    prompt_format: PromptFormat | None,
) -> Weights:
    """Write one GGUF file, and a Modelfile for Ollama; return the file's weights, read back.

    Those of a file that llama.cpp quantizes are the weights before, in f16: the merge is proved, not the quantizer.
    """
    name, quantization = settings.output_dir.resolve().name, settings.gguf_quantization
    written: Literal["f16", "q8_0"] = "q8_0" if quantization == "q8_0" else "f16"
    path = directory / f"{name}-{written}.gguf"
    write_gguf(
        path,
        merged.shape,
        with_progress(merged),
        tokenizer=tokenizer,
        quantization=written,
        name=name,
    )
    weights = GgufWeights(path, merged.shape)
    if quantization in K_QUANTS:
        quantized = directory / f"{name}-{quantization}.gguf"
        quantize_gguf(path, quantized, quantization)
        path.unlink()  # note: `weights` goes on reading it, through its memory map
        path = quantized
        print(f"{quantization} by llama.cpp, from the merged weights in f16, which are what is compared")
    pieces, added_tokens = tokenizer.tokenizer.named_pieces, tokenizer.tokenizer.control_ids
    write_modelfile(directory, path.name, prompt_format, pieces, tuple(added_tokens))
    return weights


def export_adapter(settings: MergeSettings, checkpoint: BaseCheckpoint, adapter: MergedAdapter) -> None:
    """Write an adapter alone as a GGUF file, for a base that llama.cpp has already."""
    name = settings.output_dir.resolve().name
    with merge_directory(settings.output_dir) as directory:
        write_gguf_lora(directory / f"{name}-lora.gguf", adapter, checkpoint.shape, name)
        write_record(directory, checkpoint, settings.base, [adapter])
    say(f"adapter {settings.output_dir}/{name}-lora.gguf: llama-server -m BASE.gguf --lora {name}-lora.gguf")


def with_progress(merged: MergedWeights) -> Iterable[tuple[str, Tensor]]:
    return tqdm(merged.tensors(), "merging", len(merged.shapes), unit="tensor", leave=False, delay=1, disable=None)


def template_of(
    formats: Sequence[PromptFormat | None], first_dir: Path, checkpoint: BaseCheckpoint, transform: ChatTransform
) -> str | None:
    """Give the chat template of the adapters' prompt formats, or if they state none the checkpoint's own, if any."""
    if any(other != formats[0] for other in formats):
        say(f"warning: the adapters were trained with different prompt formats; taken is that of {first_dir}")
    if formats[0] is None:
        template = source_template(checkpoint.directory)
        found = "the checkpoint's chat template is kept" if template else "no chat template is written"
        say(f"{first_dir} states no prompt format: {found}")
        return template
    return template_of_format(transform, formats[0])


def prove(
    written: Weights,
    storage: str,
    base: BaseWeights,
    origins: Sequence[Origin],
    adapters: Sequence[MergedAdapter],
    tokenizer: ChatTransform,
) -> None:
    """Compare the written model with base + adapter and print how far they are apart.

    Raises:
        UserError: further than rounding explains.
    """
    base_name = "original" if base.quantization is None else "dequantized"
    rows, kind = origins[0].example_rows(tokenizer)
    say(f"compared in fp32 on {sum(map(len, rows))} tokens of {len(rows)} {kind}:")
    logits_TV = logits_of_weights(written, rows)
    proof = compared(logits_TV, logits_with_adapters(base, adapters, rows))
    check_same_logits(proof, storage)
    if not adapters:
        say(f"  written against the {base_name} weights: {proof}")
        return
    say(f"  merged against the {base_name} weights + adapter: {proof}")
    alone = compared(logits_TV, logits_of_weights(base, rows))
    say(f"  merged against the {base_name} weights alone: {alone}")
    if proof.relative_difference > alone.relative_difference / 2:
        say(f"warning: rounding to {storage} changes the logits about as much as the adapter does; write more bits")
    if base.quantization is None and any(origin.quantization for origin in origins):
        format = trained_format(origins)
        trained_on = BaseWeights(base.checkpoint, format, base.shape.vocab_size)
        trained = compared(logits_TV, logits_with_adapters(trained_on, adapters, rows))
        say(f"  merged against the {format_name(format)} weights + adapter, as trained: {trained}")


if __name__ == "__main__":
    run_recipe(recipe_main)
