"""Formats with control tokens of their own, in transformers and Ollama: they give the tokens of training."""

import json

import pytest

from custom_components.export.modelfile import modelfile
from custom_components.transforms import ChatTransform
from custom_components.transforms.prompt_format import PromptFormat
from custom_components.transforms.tokenizer_files import ExportedTokenizer, template_of_format, write_tokenizer
from tests.support.dialogs import DIALOGS, messages_of
from tests.support.go_template import rendered_in_python
from tests.support.modelfile import ollama_prompt
from tests.support.paths import TINY_TOKENIZER
from tests.support.tokenizers import SMOLLM2_TOKENS, write_byte_level_tokenizer, write_sentencepiece_model

OWN = {
    "start": "<|begin_of_text|>",
    "user": "<|start_header_id|>u<|end_header_id|> {content}<|eot_id|>",
    "assistant": "<|start_header_id|>a<|end_header_id|>{content}<|eot_id|>\n",
}
CASES = [
    *(("tiny", "chatml"), ("smollm2", "chatml"), ("llama3", "llama3"), ("llama3", "llama3_1"), ("llama3", OWN)),
    *(("mistral", "mistral"), ("llama3", "llama2"), ("llama3", "alpaca")),
]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    tiny, mistral = (tmp_path_factory.mktemp(name) for name in ("tiny", "mistral"))
    (tiny / "tokenizer.model").write_bytes(TINY_TOKENIZER.read_bytes())
    added = {"<|im_start|>": 1024, "<|im_end|>": 1025}
    (tiny / "added_tokens.json").write_text(json.dumps(added))
    (tiny / "special_tokens_map.json").write_text(json.dumps({"additional_special_tokens": list(added)}))
    write_sentencepiece_model(mistral / "tokenizer.model", ["[INST]", "[/INST]"])
    return {
        "tiny": tiny,
        "mistral": mistral,
        "llama3": write_byte_level_tokenizer(tmp_path_factory.mktemp("llama3")),
        "smollm2": write_byte_level_tokenizer(tmp_path_factory.mktemp("smollm2"), SMOLLM2_TOKENS),
    }


@pytest.mark.parametrize("system_prompt", [None, "Be kind.", ""])
@pytest.mark.parametrize(("kind", "description"), CASES)
def test_L40_prompts_have_the_tokens_of_training(checkpoints, tmp_path, kind, description, system_prompt):
    transformers = pytest.importorskip("transformers")
    ours = ChatTransform(checkpoints[kind], None, system_prompt, description)
    prompt_format = PromptFormat(ours.prompt_template, ours.system_prompt, ours.stop_pieces)
    pieces, added = ours.tokenizer.named_pieces, tuple(ours.tokenizer.control_ids)
    template = template_of_format(ours, prompt_format)
    exported = ExportedTokenizer(ours.tokenizer, ours.stop_tokens, template, ours.begins_with_bos)
    write_tokenizer(tmp_path, exported, 512)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = modelfile("x.gguf", prompt_format, pieces, added)
    for name, dialog in DIALOGS.items():
        messages = messages_of(dialog)
        expected = ours({"messages": messages}, inference=dialog[-1][0] == "user")["tokens"]
        rendered = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert rendered == expected, name
        asked = ollama_prompt(text, messages, rendered_in_python)
        bos = [ours.bos_id] if ours.begins_with_bos else []
        assert bos + theirs(asked, add_special_tokens=False).input_ids == expected, name
    for token in [ours.stop_pieces[0], *ours.template_tokens]:
        with pytest.raises(Exception, match="which is how the chat format marks its parts"):
            theirs.apply_chat_template(messages_of([("user", f"a {token}")]))
