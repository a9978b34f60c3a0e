"""A tokenizer and the model it feeds: whether they fit, and the context that they share."""

from torchtune.modules import TransformerDecoder

from custom_components.runtime.errors import UserError
from custom_components.runtime.terminal import say
from custom_components.transforms.chat_transform import ChatTransform


def fit_tokenizer(tokenizer: ChatTransform, model: TransformerDecoder) -> ChatTransform:
    """Check a tokenizer against the model it feeds, and cap its `max_seq_len` at the model's context.

    Returns:
        the tokenizer for this model; without a `max_seq_len` it gets the model's context.

    Raises:
        UserError: the tokenizer has ids for which the embedding has no row.
    """
    if tokenizer.format_note:
        say(tokenizer.format_note)
        tokenizer = tokenizer.replace(format_note="")
    num_embeddings = model.tok_embeddings.num_embeddings
    if tokenizer.vocab_size > num_embeddings:
        raise UserError(
            f"tokenizer.path: the tokenizer has {tokenizer.vocab_size} pieces, the model embeds {num_embeddings}; "
            "name the tokenizer of this checkpoint"
        )
    embedded, left_out = tokenizer.tokenizer.added_tokens.split_at(num_embeddings)
    if left_out.tokens:
        if named := set(tokenizer.template_tokens) & set(left_out.ids):
            raise UserError(
                f"prompt_template: needs {', '.join(sorted(named))}, and the model embeds {num_embeddings} ids only"
            )
        say(f"warning: {left_out} left out: the model embeds {num_embeddings} ids, and has none for it")
        tokenizer = tokenizer.replace(tokenizer=tokenizer.tokenizer.with_added_tokens(embedded))
    is_padded = tokenizer.tokenizer.num_ids < num_embeddings
    if embedded.tokens or is_padded:
        say(
            f"the tokenizer has {tokenizer.vocab_size} pieces{f' and {embedded}' if embedded.tokens else ''}"
            + (f", the model's padded vocabulary {num_embeddings}" if is_padded else "")
        )
    if tokenizer.max_seq_len is not None and tokenizer.max_seq_len > model.max_seq_len:
        say(f"max_seq_len {tokenizer.max_seq_len} is capped to the model's context of {model.max_seq_len} tokens")
    return tokenizer.replace(max_seq_len=min(tokenizer.max_seq_len or model.max_seq_len, model.max_seq_len))
