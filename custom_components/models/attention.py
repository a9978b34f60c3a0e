"""Causal self-attention over rows that are padded, cached or laid end to end.

Dimensions: `B` batch, `S` positions, `L` positions attended to, `T` tokens of one row, `D` embed_dim, `N` query heads,
`K` key/value heads, `H` head_dim.
"""

import functools
import importlib.util
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import KVCache

from custom_components.models.blockwise_attention import attend_blockwise
from custom_components.models.lora import lora_linears
from custom_components.models.shapes import LlamaShape
from custom_components.runtime.out_of_memory import is_out_of_memory

# Beyond this length a block's scores no longer fit in cache, and torch's own kernel is as fast.
_MAX_BLOCKWISE_TOKENS = 1024
# Head sizes are multiples of this in 16-bit flash and memory-efficient attention; OpenLLaMA-3B's 100 is not one. torch
# 2.13, aten/src/ATen/native/transformers/cuda/sdp_utils.cpp.
_CUDA_HEAD_ALIGNMENT = 8


@dataclass(frozen=True)
class RowLengths:
    """The lengths of rows laid end to end in one sequence, used as a mask: attention is causal and stays in its row.

    The mask itself, (S, S), is never built.

    Attributes:
        lengths: in tokens.
        boundaries: where rows begin and end, (num_rows + 1,), int32, for CUDA's kernels, which take all rows at
            once.
    """

    lengths: tuple[int, ...]
    boundaries: Tensor | None = field(default=None, compare=False)

    def to(self, device: torch.device) -> "RowLengths":
        if device.type != "cuda":
            return self
        boundaries = torch.tensor([0, *accumulate(self.lengths)], dtype=torch.int32)
        return replace(self, boundaries=boundaries.to(device))


class SelfAttention(nn.Module):
    """Grouped-query self-attention with rotary positions, for torchtune's TransformerSelfAttentionLayer.

    Parameter names are those of torchtune's MultiHeadAttention. It replaces that class for three things: rows laid
    end to end without a dense mask, one product for the adapters of q, k and v, and a cache that is read only as
    far as it is filled.
    """

    def __init__(
        self,
        shape: LlamaShape,
        *,
        q_proj: nn.Module,
        k_proj: nn.Module,
        v_proj: nn.Module,
        output_proj: nn.Module,
        pos_embeddings: nn.Module,
    ) -> None:
        super().__init__()
        assert shape.num_heads % shape.num_kv_heads == 0, (shape.num_heads, shape.num_kv_heads)
        self.num_heads = shape.num_heads
        self.num_kv_heads = shape.num_kv_heads
        self.head_dim = shape.head_dim
        self.q_proj = q_proj
        self.k_proj = k_proj
        self.v_proj = v_proj
        self.output_proj = output_proj
        self.pos_embeddings = pos_embeddings
        self.kv_cache: KVCache | None = None
        self.cache_enabled = False

    def setup_cache(self, batch_size: int, dtype: torch.dtype, max_seq_len: int) -> None:
        """Allocate the key/value cache; torchtune's protocol."""
        self.kv_cache = KVCache(batch_size, max_seq_len, self.num_kv_heads, self.head_dim, dtype)
        self.cache_enabled = True

    def reset_cache(self) -> None:
        """Empty the cache that `setup_cache` made."""
        assert self.kv_cache is not None
        self.kv_cache.reset()

    def forward(
        self,
        input_BSD: Tensor,
        _same_input_BSD: Tensor | None = None,
        *,
        mask: Tensor | RowLengths | None = None,
        input_pos: Tensor | None = None,
    ) -> Tensor:
        """Attend to earlier positions.

        Args:
            input_BSD: the normalized hidden states.
            mask: None: causal over each of the B rows. A boolean (B, S, L) tensor: True where position s attends to l;
                with a cache, L is how far it is filled. :class:`RowLengths`: B is 1, the sequence is rows end to end.
            input_pos: positions for the rotary embedding, see :class:`RotaryPositions`; default 0 .. S-1.

        Returns:
            (B, S, D).
        """
        batch_size, seq_len, _ = input_BSD.shape
        heads = self.heads(input_BSD, input_pos)
        query_BNSH, key_BKSH, value_BKSH = (tensor.transpose(1, 2) for tensor in heads)
        if isinstance(mask, RowLengths):
            output_BNSH = attend_within_rows(query_BNSH, key_BKSH, value_BKSH, mask)
        else:
            if self.kv_cache is not None and self.cache_enabled:
                assert mask is not None
                key_cache_BKMH, value_cache_BKMH = self.kv_cache.update(key_BKSH, value_BKSH)
                key_BKSH = key_cache_BKMH[:batch_size, :, : mask.shape[-1]]
                value_BKSH = value_cache_BKMH[:batch_size, :, : mask.shape[-1]]
            output_BNSH = attend(query_BNSH, key_BKSH, value_BKSH, mask)
        output_BSD = output_BNSH.transpose(1, 2).reshape(batch_size, seq_len, self.num_heads * self.head_dim)
        return self.output_proj(output_BSD)

    def heads(self, input_BSD: Tensor, input_pos: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Compute queries, (B, S, N, H), keys and values, (B, S, K, H), from normalized hidden states."""
        query, key, value = (
            projected.unflatten(2, (-1, self.head_dim))
            for projected in lora_linears(input_BSD, (self.q_proj, self.k_proj, self.v_proj))
        )
        query_BSNH = self.pos_embeddings(query, input_pos=input_pos)
        key_BSKH = self.pos_embeddings(key, input_pos=input_pos)
        return query_BSNH, key_BSKH, value


# note: the lengths differ from step to step, and the compiler would recompile every layer for each of them.
@torch.compiler.disable
def attend_within_rows(query_1NSH: Tensor, key_1KSH: Tensor, value_1KSH: Tensor, rows: RowLengths) -> Tensor:
    """Attend causally inside each row of a sequence of rows: (1, N, S, H)."""
    is_on_cpu = rows.boundaries is None
    if is_on_cpu and query_1NSH.element_size() == 2 and max(rows.lengths) <= _MAX_BLOCKWISE_TOKENS:
        return attend_blockwise(query_1NSH, key_1KSH, value_1KSH, rows.lengths)
    if not is_on_cpu and _variable_length_kernel_works(
        query_1NSH.device, query_1NSH.dtype, query_1NSH.shape[1], key_1KSH.shape[1], query_1NSH.shape[3]
    ):
        return attend_within_rows_at_once(query_1NSH, key_1KSH, value_1KSH, rows)
    return attend_row_by_row(query_1NSH, key_1KSH, value_1KSH, rows)


def attend_row_by_row(query_1NSH: Tensor, key_1KSH: Tensor, value_1KSH: Tensor, rows: RowLengths) -> Tensor:
    """Compute `attend_within_rows` with one call for each row, on any device."""
    inputs_of_rows = zip(
        query_1NSH.split(rows.lengths, dim=2),
        key_1KSH.split(rows.lengths, dim=2),
        value_1KSH.split(rows.lengths, dim=2),
        strict=True,
    )
    outputs = [_causal_attention(*inputs_of_row) for inputs_of_row in inputs_of_rows]
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=2)


def _causal_attention(query_1NTH: Tensor, key_1KTH: Tensor, value_1KTH: Tensor) -> Tensor:
    if query_1NTH.is_meta:
        # For meta tensors torch would choose the computation that keeps all probabilities, which no device does.
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query_1NTH, key_1KTH, value_1KTH, is_causal=True
        )[0]
    return attend(query_1NTH, key_1KTH, value_1KTH, None)


def attend(query_BNSH: Tensor, key_BKLH: Tensor, value_BKLH: Tensor, mask_BSL: Tensor | None) -> Tensor:
    """Attend with torch's own kernels, causally where there is no mask: (B, N, S, H)."""
    head_dim = query_BNSH.shape[3]
    if query_BNSH.is_cuda:
        query_BNSH, key_BKLH, value_BKLH = heads_for_cuda(query_BNSH, key_BKLH, value_BKLH)
    output_BNSH = F.scaled_dot_product_attention(
        query_BNSH,
        key_BKLH,
        value_BKLH,
        attn_mask=None if mask_BSL is None else mask_BSL.unsqueeze(1),
        is_causal=mask_BSL is None,
        scale=head_dim**-0.5,
        enable_gqa=query_BNSH.shape[1] != key_BKLH.shape[1],
    )
    return output_BNSH[..., :head_dim]


def heads_for_cuda(query_BNSH: Tensor, key_BKLH: Tensor, value_BKLH: Tensor) -> list[Tensor]:
    """Give every query head its key/value head, and all a size that CUDA's kernels take: (B, N, S or L, H).

    Without flash attention, which takes no mask and which a T4 does not have, CUDA shares key/value heads, and
    multiplies heads of other sizes, only in the computation that keeps all probabilities.
    """
    num_sharing = query_BNSH.shape[1] // key_BKLH.shape[1]
    if num_sharing > 1:
        key_BKLH, value_BKLH = (tensor.repeat_interleave(num_sharing, dim=1) for tensor in (key_BKLH, value_BKLH))
    return padded_heads(query_BNSH, key_BKLH, value_BKLH)


def padded_heads(*tensors: Tensor) -> list[Tensor]:
    """Append zeros to heads, (..., H), up to a multiple of CUDA's alignment; they change no score and no sum."""
    num_missing = -tensors[0].shape[-1] % _CUDA_HEAD_ALIGNMENT
    return [F.pad(tensor, (0, num_missing)) if num_missing else tensor for tensor in tensors]


def attend_within_rows_at_once(query_1NSH: Tensor, key_1KSH: Tensor, value_1KSH: Tensor, rows: RowLengths) -> Tensor:
    """Compute `attend_within_rows` in one call of torch's variable-length flash attention (CUDA, 16 bits)."""
    assert rows.boundaries is not None
    longest, head_dim = max(rows.lengths), query_1NSH.shape[3]
    # note: not every supported torch has it; 2.11's shares key/value heads without being told.
    kernel: Callable[..., Tensor] = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    options = {"enable_gqa": query_1NSH.shape[1] != key_1KSH.shape[1]}
    # note: squeezed, because the backward of an index fills a tensor with zeros and copies into it.
    output_SNH = kernel(
        *padded_heads(*(tensor.squeeze(0).transpose(0, 1) for tensor in (query_1NSH, key_1KSH, value_1KSH))),
        rows.boundaries,
        rows.boundaries,
        longest,
        longest,
        scale=head_dim**-0.5,
        window_size=(-1, 0),  # causal
        **{name: value for name, value in options.items() if name in inspect.signature(kernel).parameters},
    )
    return output_SNH[..., :head_dim].transpose(0, 1).unsqueeze(0)


@functools.cache
def _variable_length_kernel_works(
    device: torch.device, dtype: torch.dtype, num_heads: int, num_kv_heads: int, head_dim: int
) -> bool:
    """Check whether torch and the card have the kernel for these heads, by comparing it with the row loop.

    The meta device stands for a card that has it.
    """
    if device.type == "meta":
        return importlib.util.find_spec("torch.nn.attention.varlen") is not None
    lengths = (5, 3)
    # note: it has its own generator, or the step's first dropout would differ when it is recomputed.
    random = partial(torch.randn, device=device, generator=torch.Generator(device).manual_seed(0))
    query_1NSH = random(1, num_heads, sum(lengths), head_dim).to(dtype)
    key_1KSH, value_1KSH = random(2, 1, num_kv_heads, sum(lengths), head_dim).to(dtype)
    rows = RowLengths(lengths).to(device)
    try:
        output_1NSH = attend_within_rows_at_once(query_1NSH, key_1KSH, value_1KSH, rows)
    except (ImportError, TypeError, RuntimeError, ValueError) as error:
        if isinstance(error, RuntimeError) and is_out_of_memory(error):
            raise
        return False
    return torch.allclose(output_1NSH, attend_row_by_row(query_1NSH, key_1KSH, value_1KSH, rows), atol=2e-2, rtol=2e-2)
