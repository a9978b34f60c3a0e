"""Adapters with trained rows of single tokens: PEFT's `trainable_token_indices` read here, and ours read by PEFT."""

import pytest
import torch
from torchtune.modules.peft import disable_adapter

from custom_components.models.builders import lora_llama_from_config
from custom_components.models.token_rows import add_token_rows, token_rows
from custom_components.runtime.errors import UserError
from custom_components.weights.adapter_files import open_adapter
from custom_components.weights.adapters import load_adapter, save_adapter
from custom_components.weights.checkpoint_files import open_checkpoint
from custom_components.weights.checkpoint_loading import load_base_weights
from tests.support.models import CPU, inference_model, loaded_model, with_random_variants
from tests.support.recipe_runs import run_merge

# Of the checkpoint's own tokens, and of two that are new.
TOKENS = torch.tensor([[1, 5, 7, 1024, 9, 1025, 300, 5], [2, 1025, 1024, 8, 7, 7, 0, 1023]])
OLD_TOKENS = TOKENS % 1024


def trained_model(checkpoint, token_ids, **lora):
    """A model with adapters and rows of tokens that have values."""
    settings = {"lora_attn_modules": ["q_proj", "v_proj"], "apply_lora_to_mlp": True, "lora_rank": 3} | lora
    with torch.device("meta"):
        model = lora_llama_from_config(checkpoint, **settings)
    add_token_rows(model, token_ids, None)
    load_base_weights(model, open_checkpoint(checkpoint), torch.float32, CPU)
    return with_random_variants(model)


def with_random_rows(model):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for rows in token_rows(model).values():
            rows.rows.add_(torch.randn(rows.rows.shape, generator=generator) * 0.1)
    return model.eval()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "indices",
    [
        [5, 7],
        [7, 5],
        {"embed_tokens": [5, 7], "lm_head": [5, 7]},
        {"embed_tokens": [5, 7], "lm_head": [7, 8, 9]},
        {"lm_head": [7]},
        {"model.embed_tokens": [1023]},
    ],
    ids=str,
)
def test_rows_of_the_checkpoint_s_tokens_give_peft_s_logits(make_checkpoint, tmp_path, peft_model, indices, tied):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    theirs = peft_model(checkpoint, trainable_token_indices=indices)
    theirs.save_pretrained(tmp_path / "theirs")
    model = inference_model(checkpoint, tmp_path / "theirs")
    with torch.no_grad():
        expected = theirs(OLD_TOKENS).logits
        torch.testing.assert_close(model(OLD_TOKENS), expected, atol=1e-4, rtol=0)
        with theirs.disable_adapter(), disable_adapter(model):
            torch.testing.assert_close(model(OLD_TOKENS), theirs(OLD_TOKENS).logits, atol=1e-4, rtol=0)
        save_adapter(model, tmp_path / "ours", "a/base", {})
        again = inference_model(checkpoint, tmp_path / "ours")
        torch.testing.assert_close(again(OLD_TOKENS), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "indices",
    [
        None,
        [1024, 1025],
        [7, 1025],
        {"embed_tokens": [1024, 1025], "lm_head": [1024, 1025]},
    ],
    ids=str,
)
def test_rows_of_new_tokens_give_peft_s_logits(make_checkpoint, tmp_path, peft_model, indices, tied):
    """PEFT's vocabulary was resized; None: and the new rows were not trained, as of a padding token."""
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    theirs = peft_model(checkpoint, 1026, trainable_token_indices=indices)
    theirs.save_pretrained(tmp_path / "theirs")
    model = inference_model(checkpoint, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("lora", [{}, {"use_dora": True, "layers_to_transform": [1]}])
def test_peft_gives_the_logits_of_what_is_saved(make_checkpoint, tmp_path, peft, lora, tied):
    """After resizing the vocabulary, which gives the new rows other values."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = with_random_rows(trained_model(checkpoint, [7, 1024, 1025], **lora))
    save_adapter(model, tmp_path / "ours", str(checkpoint), {})
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    base.resize_token_embeddings(1026)
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "ours")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), theirs(TOKENS).logits, atol=1e-4, rtol=0)
        assert torch.equal(model(TOKENS), inference_model(checkpoint, tmp_path / "ours")(TOKENS))
    again = trained_model(checkpoint, [7, 1024, 1025], **lora).eval()
    load_adapter(again, open_adapter(tmp_path / "ours"))
    assert torch.equal(model(TOKENS), again(TOKENS))
    with pytest.raises(UserError, match=r"trained rows of the tokens \[7, 1024, 1025\].*trainable_tokens"):
        load_adapter(
            loaded_model(checkpoint, lora_attn_modules=["q_proj", "v_proj"], lora_rank=3, **lora),
            open_adapter(tmp_path / "ours"),
        )
    with pytest.raises(UserError, match=r"no rows of the tokens \[8\]"):
        load_adapter(trained_model(checkpoint, [7, 8, 1024, 1025], **lora), open_adapter(tmp_path / "ours"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("quantize_base", [False, True])
def test_rows_begin_as_their_own_or_the_mean_and_learn(make_checkpoint, tied, quantize_base):
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    model = trained_model(checkpoint, [7, 1024], quantize_base=quantize_base)
    base = open_checkpoint(checkpoint)
    assert set(token_rows(model)) == ({"tok_embeddings"} if tied else {"tok_embeddings", "output"})
    for name, rows in token_rows(model).items():
        weight = base.tensors[f"{name}.weight"].read()
        torch.testing.assert_close(rows.rows.detach(), torch.stack([weight[7], weight.mean(dim=0)]))
        assert rows.rows.dtype == torch.float32 and rows.rows.requires_grad
    plain = loaded_model(checkpoint, lora_attn_modules=["q_proj", "v_proj"], lora_rank=3, quantize_base=quantize_base)
    with torch.no_grad(), disable_adapter(plain), disable_adapter(model):
        assert torch.equal(model(OLD_TOKENS)[..., :1024], plain(OLD_TOKENS))
    model(TOKENS % 1025).logsumexp(-1).sum().backward()
    for rows in token_rows(model).values():
        assert rows.rows.grad.isfinite().all() and rows.rows.grad.any(dim=1).all()
    assert not [
        name
        for name, parameter in model.named_parameters()
        if parameter.grad is not None and not parameter.requires_grad
    ]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("num_embeddings", "indices"),
    [(None, {"embed_tokens": [5, 7], "lm_head": [7, 8]}), (1026, [7, 1024, 1025])],
    ids=str,
)
def test_a_merge_has_the_rows(make_checkpoint, tmp_path, peft_model, num_embeddings, indices, tied):
    """The merge's own proof compares it with base and adapter; transformers and PEFT have to agree."""
    transformers = pytest.importorskip("transformers")
    checkpoint = make_checkpoint(tie_word_embeddings=tied)
    theirs = peft_model(checkpoint, num_embeddings, trainable_token_indices=indices)
    theirs.save_pretrained(tmp_path / "theirs")
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir=tmp_path / "theirs", output_dir=tmp_path / "merged", dtype="fp32"
    )
    assert code == 0, err
    merged = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
    tokens = TOKENS % (num_embeddings or 1024)
    with torch.no_grad():
        torch.testing.assert_close(merged(tokens).logits, theirs(tokens).logits, atol=1e-4, rtol=0)
    assert merged.config.vocab_size == (num_embeddings or 1024)


def test_rows_of_two_adapters_are_not_merged_into_one(make_checkpoint, tmp_path, peft_model):
    checkpoint = make_checkpoint()
    for name in ("a", "b"):
        peft_model(checkpoint, trainable_token_indices=[7]).save_pretrained(tmp_path / name)
    adapters = ", ".join(f"{{dir: {tmp_path / name}, weight: 0.5}}" for name in ("a", "b"))
    code, _, err = run_merge(
        checkpoint_dir=checkpoint, adapter_dir="null", adapters=f"[{adapters}]", output_dir=tmp_path / "out"
    )
    assert code == 2 and "more than one of them has trained rows of tokens" in err


def test_untrained_rows_of_a_resized_vocabulary_are_no_hindrance_to_train_on(
    make_checkpoint, tmp_path, peft_model, capsys
):
    """As of a padding token: what a run begins from has the checkpoint's own rows, and that is said."""
    checkpoint = make_checkpoint()
    peft_model(checkpoint, 1025).save_pretrained(tmp_path / "theirs")
    lora = {"lora_attn_modules": ["q_proj", "k_proj"], "apply_lora_to_mlp": False, "lora_rank": 3, "lora_alpha": 9}
    model = loaded_model(checkpoint, **lora)
    load_adapter(model, open_adapter(tmp_path / "theirs"))
    assert "new tokens, [1024], that nothing trained: left out" in capsys.readouterr().out
    expected = inference_model(checkpoint, tmp_path / "theirs")
    with torch.no_grad():
        torch.testing.assert_close(model(OLD_TOKENS), expected(OLD_TOKENS)[..., :1024], atol=1e-5, rtol=0)
    assert expected.tok_embeddings.num_embeddings == 1025


def test_rows_beside_an_adapter_of_the_head_are_refused(make_checkpoint):
    checkpoint = make_checkpoint()
    with pytest.raises(UserError, match="output head, which has an adapter as well"):
        trained_model(checkpoint, [7], apply_lora_to_output=True)
