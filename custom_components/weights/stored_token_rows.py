"""Rows of single tokens in an adapter's file: trained ones, and those by which its base's vocabulary was resized.

PEFT stores trained rows by `trainable_token_indices`, and where the vocabulary was resized embedding and head as well.
"""

import torch
from torch import Tensor
from torchtune.modules import TiedLinear, TransformerDecoder

from custom_components.models.token_rows import added_rows, token_rows
from custom_components.weights.adapter_files import StoredAdapter
from custom_components.weights.peft_format import TOKEN_MATRICES, TOKEN_ROWS


def stored_token_ids(stored: StoredAdapter, num_base_rows: int, *, is_tied: bool) -> dict[str, list[int]]:
    """List the tokens of which an adapter's file has rows of its own, in ascending order, by the matrix.

    Args:
        num_base_rows: of the checkpoint's embedding; the file's rows beyond these are new.
        is_tied: the checkpoint's head is its embedding. One with the same rows is then not listed.
    """
    ids = {}
    for matrix in TOKEN_MATRICES.values():
        whole = stored.tensors.get(f"{matrix}.weight")
        new = range(num_base_rows, whole.shape[0]) if whole is not None else ()
        ids[matrix] = sorted({*stored.config.token_ids.get(matrix, []), *new})
    listed = stored.config.token_ids
    is_same = "output" not in listed or listed.get("tok_embeddings") == listed["output"]
    if is_tied and is_same:
        del ids["output"]
    return {matrix: tokens for matrix, tokens in ids.items() if tokens}


def read_token_rows(stored: StoredAdapter, matrix: str, token_ids: list[int]) -> Tensor:
    """Read the rows of some tokens of :func:`stored_token_ids`: (num_tokens, embed_dim)."""
    listed = stored.config.token_ids.get(matrix, [])
    rows: dict[int, Tensor] = {}
    if listed:
        rows |= dict(zip(listed, stored.tensors[f"{matrix}.{TOKEN_ROWS}"].read(), strict=True))
    if new := [token for token in token_ids if token not in rows]:
        whole = stored.tensors[f"{matrix}.weight"].read()
        rows |= {token: whole[token] for token in new}
    return torch.stack([rows[token].float() for token in token_ids])


def num_checkpoint_rows(model: TransformerDecoder) -> int:
    """Count the rows of the model's embedding that are in its checkpoint."""
    return model.tok_embeddings.num_embeddings - added_rows(model)


def token_rows_problems(model: TransformerDecoder, stored: StoredAdapter) -> list[str]:
    """Find trained rows that only one of model and adapter has, and listed ones that the file lacks."""
    problems = []
    listed_ids = stored.config.token_ids
    for matrix, listed in listed_ids.items():
        tensor = stored.tensors.get(f"{matrix}.{TOKEN_ROWS}")
        expected = (len(listed), model.tok_embeddings.embedding_dim)
        if tensor is None and not (matrix == "output" and isinstance(model.output, TiedLinear)):
            problems.append(f"{stored.key(f'{matrix}.{TOKEN_ROWS}')} is missing")
        elif tensor is not None and tensor.shape != expected:
            problems.append(f"{tensor.stored_name} has shape {tensor.shape}, its trainable_token_indices {expected}")
    problems += [
        f"{stored.tensors[name].stored_name} is none of its trainable_token_indices"
        for name in (f"{matrix}.{TOKEN_ROWS}" for matrix in TOKEN_MATRICES.values() if matrix not in listed_ids)
        if name in stored.tensors and not _is_copy_for_tied_head(model, stored, name)
    ]
    theirs = stored_token_ids(stored, num_checkpoint_rows(model), is_tied=isinstance(model.output, TiedLinear))
    ours = {matrix: rows.token_ids.tolist() for matrix, rows in token_rows(model).items() if len(rows.token_ids)}
    for matrix in TOKEN_MATRICES.values():
        has, wants = {*theirs.get(matrix, [])}, {*ours.get(matrix, [])}
        if lacking := sorted(wants - has):
            problems.append(f"it has no rows of the tokens {lacking} for {matrix}, which the model trains")
        # Rows of a resized vocabulary that nothing has trained are left out of a model without them.
        if trained := sorted({*listed_ids.get(matrix, [])} & has - wants):
            problems.append(f"it has trained rows of the tokens {trained} for {matrix}; name them in trainable_tokens")
    return problems


def tokens_left_out(model: TransformerDecoder, stored: StoredAdapter) -> list[int]:
    """List the new tokens of an adapter's resized vocabulary for which the model has no rows."""
    has_place = {token for rows in token_rows(model).values() for token in rows.token_ids.tolist()}
    theirs = stored_token_ids(stored, num_checkpoint_rows(model), is_tied=False)
    return sorted({token for tokens in theirs.values() for token in tokens} - has_place)


def _is_copy_for_tied_head(model: TransformerDecoder, stored: StoredAdapter, name: str) -> bool:
    """Tell whether a tensor is what PEFT stores a second time for a head that is the embedding."""
    embedding_rows = stored.tensors.get(f"tok_embeddings.{TOKEN_ROWS}")
    is_of_tied_head = name == f"output.{TOKEN_ROWS}" and isinstance(model.output, TiedLinear)
    return (
        is_of_tied_head
        and embedding_rows is not None
        and torch.equal(embedding_rows.read(), stored.tensors[name].read())
    )
