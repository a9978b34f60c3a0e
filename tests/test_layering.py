"""Imports run one way: config -> data -> model -> train -> checkpoint -> generate; recipes on top, never each other."""

import ast

import pytest

from tests.conftest import PROJECT

# A component may import those of its own row and of the rows above.
LAYERS = [
    [
        "errors",
        "components",
        "atomic_files",
        "memory",
        "host_allocator",
        "stopping",
        "quiet_bitsandbytes",
        "out_of_memory",
        "tune_startup",
    ],
    ["settings", "config", "config_checks", "config_overrides", "precision", "run_directory", "metrics", "schedules"],
    [
        "sentencepiece_model",
        "prompts",
        "transforms",
        "row_formats",
        "row_formats_messages",
        "data_sources",
        "token_cache",
        "tokenized_rows",
        "datasets",
        "row_preview",
        "text_stream",
    ],
    [
        "nf4",
        "lora",
        "blockwise_attention",
        "attention",
        "mlp",
        "rms_norm",
        "rotary",
        "llama_shapes",
        "builders",
        "nf4_gemv",
        "inference_linear",
    ],
    ["packing", "batching", "loss", "gradients", "compiling", "simulated_step"],
    [
        "checkpoint_files",
        "quantized_cache",
        "checkpoint_loading",
        "memory_estimate",
        "memory_report",
        "fitting",
        "peft_format",
        "adapter_files",
        "adapters",
        "merging",
        "prompt_formats",
        "training_state",
    ],
    [
        "run_report",
        "sample_answers",
        "sampling",
        "incremental",
        "generation",
        "prompt_files",
        "chat",
        "evaluation",
        "evaluation_report",
        "lm_eval_model",
        "model_card",
        "model_card_loading",
        "gguf_export",
    ],
    [
        "chat_template",
        "tokenizer_json",
        "safetensors_streaming",
        "hugging_face_export",
        "gguf_weights",
        "merge_record",
        "merge_output",
        "merge_proof",
        "training_origin",
    ],
]
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
SOURCES = {
    ".".join(path.relative_to(PROJECT).with_suffix("").parts): path
    for folder in ("custom_components", "recipes")
    for path in (PROJECT / folder).glob("*.py")
    if path.name != "__init__.py"
}


def imported_modules(path) -> set[str]:
    modules = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            modules |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return modules & set(SOURCES)


def test_every_component_has_its_layer():
    assert {f"custom_components.{name}" for name in RANKS} == {name for name in SOURCES if name.startswith("custom")}


@pytest.mark.parametrize("name", SOURCES)
def test_imports_run_one_way(name):
    imports = imported_modules(SOURCES[name])
    assert not [imported for imported in imports if imported.startswith("recipes.")]
    if name.startswith("custom_components."):
        rank = RANKS[name.partition(".")[2]]
        assert [imported for imported in imports if RANKS[imported.partition(".")[2]] > rank] == []


def test_no_import_circle():
    imports = {name: imported_modules(path) for name, path in SOURCES.items()}
    while leaves := [name for name, imported in imports.items() if not imported]:
        for leaf in leaves:
            del imports[leaf]
        for imported in imports.values():
            imported.difference_update(leaves)
    assert not imports
