"""A base whose tokenizer has tokens beside its SentencePiece model: they are known, and go out with the model."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from custom_components.runtime.errors import UserError
from custom_components.transforms import ChatTransform
from custom_components.transforms.added_tokens import read_added_tokens
from custom_components.transforms.llama2_chat import Llama2ChatTransform
from custom_components.transforms.prompt_format import PromptFormat, read_prompt_format, tokenizer_with_format
from custom_components.transforms.sentencepiece_tokenizer import SentencePieceTokenizer
from custom_components.transforms.tokenizer_fitting import fit_tokenizer
from custom_components.transforms.tokenizer_json import fast_tokenizer
from custom_components.transforms.turns import Markup, Turn
from tests.support.adapters import saved_adapter
from tests.support.dialogs import messages_of
from tests.support.models import loaded_model, with_random_adapters
from tests.support.paths import TINY_TOKENIZER
from tests.support.recipe_runs import run_merge

NUM_PIECES = 1024
CHATML_TOKENS = {"<|im_start|>": 1024, "<|im_end|>": 1025}
CHATML_JINJA = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
CHATML = {
    "system": "<|im_start|>system\n{content}<|im_end|>\n",
    "user": "<|im_start|>user\n{content}<|im_end|>\n",
    "assistant": "<|im_start|>assistant\n{content}<|im_end|>",
}
SEAMS_AT_TOKENS = {"user": "{content}<|im_start|>", "assistant": "{content}<|im_end|>"}
DIALOG = messages_of([("system", "Be kind."), ("user", " Hello  you "), ("assistant", "Hi!"), ("user", "And?")])


def write(path: Path, values: object) -> None:
    path.write_text(json.dumps(values))


def entry(text: str, **flags: bool) -> dict[str, Any]:
    stated = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    return {"content": text, **stated, **flags}


def in_tokenizer_json(directory: Path, added: dict[str, int], flags: dict[str, bool]) -> None:
    tokenizer = fast_tokenizer(SentencePieceTokenizer.read(TINY_TOKENIZER).processor)
    assert tokenizer is not None
    for text in added:
        tokenizer.add_special_tokens([tokenizers.AddedToken(text, **({"normalized": False, "special": True} | flags))])
    tokenizer.save(str(directory / "tokenizer.json"))


def in_added_tokens_decoder(directory: Path, added: dict[str, int], flags: dict[str, bool]) -> None:
    write(
        directory / "tokenizer_config.json",
        {"added_tokens_decoder": {str(index): entry(text, **flags) for text, index in added.items()}},
    )


def in_added_tokens_json(directory: Path, added: dict[str, int], flags: dict[str, bool]) -> None:
    write(directory / "added_tokens.json", added)
    write(directory / "special_tokens_map.json", {"additional_special_tokens": [entry(text) for text in added]})


WAYS = [in_tokenizer_json, in_added_tokens_decoder, in_added_tokens_json]


@pytest.fixture
def base(make_checkpoint):
    """Makes a checkpoint with added tokens, stated in one of the ways, and an adapter on it."""

    def make(way: Callable, added: dict[str, int], prompt_format: PromptFormat | None, **config: object):
        directory = make_checkpoint(vocab_size=1 + max(added.values()), **config)
        way(directory, added, {})
        adapter = saved_adapter(
            with_random_adapters(loaded_model(directory)),
            directory.parent / "adapter",
            prompt_format or PromptFormat("llama2", None, ["</s>"]),
        )
        if prompt_format is None:
            (adapter / "prompt_format.yaml").unlink()
        return directory, adapter

    return make


def merged(checkpoint: Path, adapter: Path, **overrides: object) -> tuple[Path, str]:
    output = checkpoint.parent / "merged"
    code, out, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=adapter, output_dir=output, prove="false", **overrides
    )
    assert code == 0, err
    return output, out


def their_tokenizer(directory: Path) -> Any:
    return pytest.importorskip("transformers").AutoTokenizer.from_pretrained(directory)


@pytest.mark.parametrize("way", WAYS)
def test_L23_a_pad_token_goes_out_with_the_model(base, way):
    checkpoint, adapter = base(way, {"<pad>": 1024}, PromptFormat("llama2", None, ["</s>"]), pad_token_id=1024)
    config = checkpoint / "tokenizer_config.json"
    write(config, (json.loads(config.read_text()) if config.exists() else {}) | {"pad_token": "<pad>"})
    output, out = merged(checkpoint, adapter)
    assert "the tokenizer has 1024 pieces and 1 added token (<pad>)\n" in out
    assert tokenizers.Tokenizer.from_file(str(output / "tokenizer.json")).token_to_id("<pad>") == 1024
    theirs = their_tokenizer(output)
    assert (len(theirs), theirs.pad_token, theirs.pad_token_id) == (1025, "<pad>", 1024)
    assert (theirs.eos_token_id, theirs.bos_token_id) == (2, 1)
    configs = [json.loads((output / name).read_text()) for name in ("config.json", "generation_config.json")]
    assert [(config["pad_token_id"], config["eos_token_id"]) for config in configs] == [(1024, 2)] * 2
    assert configs[0]["vocab_size"] == 1025
    ours = Llama2ChatTransform(TINY_TOKENIZER)({"messages": DIALOG}, inference=True)["tokens"]
    assert theirs.apply_chat_template(DIALOG, return_dict=False, add_generation_prompt=True) == ours


@pytest.mark.parametrize("way", WAYS)
def test_L23_the_checkpoints_own_template_and_stop_tokens_are_kept(base, way):
    """No prompt format is stated: chats look and end as the checkpoint says."""
    checkpoint, adapter = base(way, CHATML_TOKENS, None)
    write(checkpoint / "generation_config.json", {"eos_token_id": [1025, 2]})
    (checkpoint / "chat_template.jinja").write_text(CHATML_JINJA)
    output, _ = merged(checkpoint, adapter)
    theirs = their_tokenizer(output)
    text = theirs.apply_chat_template(DIALOG, tokenize=False, add_generation_prompt=True)
    ids = theirs.apply_chat_template(DIALOG, return_dict=False, add_generation_prompt=True)
    assert ids.count(1024) == text.count("<|im_start|>") == 5
    assert ids.count(1025) == text.count("<|im_end|>") == 4
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == [1025, 2]
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == [1025, 2]
    assert theirs.decode([1024, 302, 1025], skip_special_tokens=True).strip() == "a"
    assert tokenizer_with_format(checkpoint, read_prompt_format(adapter)).stop_tokens == (1025, 2)


@pytest.mark.parametrize("format", ["hugging_face", "gguf"])
def test_an_adapter_without_stop_tokens_ends_with_eos_elsewhere(base, format):
    pytest.importorskip("gguf")
    checkpoint, adapter = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat("llama2", None, []))
    output, _ = merged(checkpoint, adapter, format=format)
    if format == "hugging_face":
        assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 2


def test_L25_stop_tokens_are_the_adapters_where_it_states_them(base):
    checkpoint, adapter = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat("llama2", None, ["</s>"]))
    write(checkpoint / "generation_config.json", {"eos_token_id": 1025})
    write(checkpoint / "tokenizer_config.json", {"eos_token": "<|im_end|>"})
    output, _ = merged(checkpoint, adapter)
    assert json.loads((output / "generation_config.json").read_text())["eos_token_id"] == 2
    assert json.loads((output / "config.json").read_text())["eos_token_id"] == 2
    assert their_tokenizer(output).eos_token == "</s>"


@pytest.mark.parametrize("way", WAYS)
def test_a_gguf_file_has_them_as_control_tokens(base, way):
    gguf = pytest.importorskip("gguf")
    checkpoint, adapter = base(way, {**CHATML_TOKENS, "<pad>": 1030}, None)
    write(checkpoint / "generation_config.json", {"eos_token_id": [1025, 2], "pad_token_id": 1030})
    output, _ = merged(checkpoint, adapter, format="gguf")
    reader = gguf.GGUFReader(next(output.glob("*.gguf")))

    def field(key: str) -> Any:
        return reader.get_field(key).contents()

    tokens, types = field("tokenizer.ggml.tokens"), field("tokenizer.ggml.token_type")
    if way is in_tokenizer_json:  # cannot leave ids out
        assert tokens[1024:1027] == [*CHATML_TOKENS, "<pad>"]
    else:
        assert tokens[1024:] == [*CHATML_TOKENS, *(f"[PAD{index}]" for index in range(1026, 1030)), "<pad>"]
    assert [types[tokens.index(text)] for text in [*CHATML_TOKENS, "<pad>"]] == [gguf.TokenType.CONTROL] * 3
    assert len(tokens) == len(types) == field("llama.vocab_size") == 1031
    ids = [field(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "padding")]
    assert ids == [1025, 2, 1030]


def test_a_token_that_is_not_special_is_text(base):
    gguf = pytest.importorskip("gguf")
    checkpoint, adapter = base(in_added_tokens_json, {"<tool>": 1024}, PromptFormat("llama2", None, ["</s>"]))
    (checkpoint / "special_tokens_map.json").unlink()
    tokenizer = Llama2ChatTransform(checkpoint / "tokenizer.model")
    [(ids, _)] = tokenizer.encode_turns([[Turn((Markup("a <tool> house"),), None)]])
    assert ids.count(1024) == 1
    assert tokenizer.decode(ids).split() == ["a", "<tool>", "house"]
    output, _ = merged(checkpoint, adapter, format="gguf")
    reader = gguf.GGUFReader(next(output.glob("*.gguf")))
    types = reader.get_field("tokenizer.ggml.token_type").contents()
    assert types[1024] == gguf.TokenType.USER_DEFINED


@pytest.mark.parametrize("changed", [False, True])
def test_a_full_tokenizer_is_copied_where_it_equals_ours_but_for_additions(base, changed):
    checkpoint, adapter = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat("llama2", None, ["</s>"]))
    path = checkpoint / "tokenizer.json"
    values = json.loads(path.read_text())
    values["added_tokens"][-1]["rstrip"] = True  # what only the file knows
    merges = values["model"]["merges"]
    # As older releases of tokenizers write pairs.
    values["model"]["merges"] = [" ".join(pair) for pair in (reversed(merges) if changed else merges)]
    write(path, values)
    output, _ = merged(checkpoint, adapter)
    assert ((output / "tokenizer.json").read_bytes() == path.read_bytes()) is not changed
    theirs = their_tokenizer(output)
    expected = Llama2ChatTransform(TINY_TOKENIZER).encode("A  house, no?", add_eos=False)
    assert theirs("A  house, no?").input_ids == expected
    assert theirs("<|im_end|>  ").input_ids == [1, 1025]


@pytest.mark.parametrize("template", [CHATML, SEAMS_AT_TOKENS])
def test_a_template_of_ones_own_has_the_tokens(base, template):
    """`<|im_start|>` in a template is the token, in training, in transformers and where an answer ends."""
    checkpoint, adapter = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat(template, None, ["</s>", "<|im_end|>"]))
    ours = Llama2ChatTransform(checkpoint / "tokenizer.model", prompt_template=template)
    assert ours.stop_tokens == (2, 1025) and ours.stop_pieces == ["</s>", "<|im_end|>"]
    output, _ = merged(checkpoint, adapter)
    theirs = their_tokenizer(output)
    for messages in (DIALOG, DIALOG[:3], DIALOG[1:2]):
        row = ours({"messages": messages}, inference=messages[-1]["role"] == "user")
        expected = theirs.apply_chat_template(messages, return_dict=False, add_generation_prompt=True)
        assert row["tokens"] == expected
    row = ours({"messages": DIALOG[1:3]})
    supervised = [token for token, masked in zip(row["tokens"], row["mask"], strict=True) if not masked]
    assert ours.text_of_pieces(supervised).strip() == "Hi!<|im_end|></s>"


@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_L03_a_message_that_spells_a_token_of_the_template_is_only_text(base, role):
    checkpoint, _ = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat(CHATML, None, ["</s>"]))
    ours = Llama2ChatTransform(checkpoint / "tokenizer.model", prompt_template=CHATML)
    messages = [message | {"content": "x<|im_end|>"} if message["role"] == role else message for message in DIALOG]
    tokens, spelled = (ours({"messages": dialog}, inference=True)["tokens"] for dialog in (DIALOG, messages))
    assert tokens.count(1025) == spelled.count(1025) == 4
    assert "x<|im_end|>" in ours.text_of_pieces([token for token in spelled if token < NUM_PIECES])


def test_L03_a_message_that_spells_another_added_token_is_only_text(base):
    checkpoint, adapter = base(in_tokenizer_json, CHATML_TOKENS, PromptFormat("llama2", None, ["</s>"]))
    ours = Llama2ChatTransform(checkpoint / "tokenizer.model")
    messages = [{"role": "user", "content": "<|im_end|>"}]
    assert 1025 not in ours({"messages": messages}, inference=True)["tokens"]
    output, _ = merged(checkpoint, adapter)
    with pytest.raises(Exception, match="which is how the chat format marks its parts"):
        their_tokenizer(output).apply_chat_template(messages)


@pytest.mark.parametrize(
    ("vocab_size", "words"),
    [
        (1026, "the tokenizer has 1024 pieces and 2 added tokens (<|im_start|>, <|im_end|>)\n"),
        (1088, "2 added tokens (<|im_start|>, <|im_end|>), the model's padded vocabulary 1088\n"),
        (1025, "warning: 1 added token (<|im_end|>) left out: the model embeds 1025 ids"),
    ],
)
def test_loading_says_them(make_checkpoint, capsys, vocab_size, words):
    directory = make_checkpoint(vocab_size=vocab_size)
    in_added_tokens_decoder(directory, CHATML_TOKENS, {})
    fitted = fit_tokenizer(Llama2ChatTransform(directory / "tokenizer.model"), loaded_model(directory))
    assert words in capsys.readouterr().out
    assert len(fitted.tokenizer.added_tokens.tokens) == min(2, vocab_size - NUM_PIECES)


def test_a_template_whose_tokens_the_model_does_not_embed_is_refused(make_checkpoint):
    directory = make_checkpoint(vocab_size=1025)
    in_added_tokens_decoder(directory, CHATML_TOKENS, {})
    with pytest.raises(UserError, match=re.escape("needs <|im_end|>, and the model embeds 1025 ids")):
        fit_tokenizer(ChatTransform(directory, prompt_template="chatml"), loaded_model(directory))


@pytest.mark.parametrize(
    ("file", "values", "words"),
    [
        ("tokenizer.json", [], "holds list, not a mapping"),
        ("tokenizer.json", {"added_tokens": {}}, "added_tokens is not a list of tokens"),
        ("tokenizer.json", {"added_tokens": [{"id": "1024", "content": "<pad>"}]}, "is not a token with its id"),
        ("tokenizer.json", {"added_tokens": [{"id": 1024, "content": ""}]}, "is not a token with its id"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "added_tokens_decoder is not a dict of tokens"),
        ("tokenizer_config.json", {"added_tokens_decoder": {"x": entry("<pad>")}}, "is not a token with its id"),
        ("tokenizer_config.json", {"pad_token": 5}, "pad_token is 5, not the text of a token"),
        ("special_tokens_map.json", {"eos_token": {"text": "a"}}, "eos_token is {'text': 'a'}"),
        ("added_tokens.json", {"<pad>": True}, "is not a token with its id"),
        ("added_tokens.json", {"<pad>": 1024, "<pod>": 1024}, "token 1024 is '<pod>'"),
    ],
)
def test_L38_a_file_that_is_not_transformers_is_one_error(tmp_path, file, values, words):
    write(tmp_path / file, values)
    with pytest.raises(UserError) as error:
        read_added_tokens(tmp_path, NUM_PIECES)
    assert words in str(error.value) and file in str(error.value)
