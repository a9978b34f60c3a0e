"""A Llama that reads a text piece by piece: each forward continues where the cache of keys and values ends.

Dimensions: `B` texts, `S` new tokens of each, `L` tokens so far, the new ones included, `D` embed_dim, `N` query heads,
`K` key/value heads, `G` query heads of a key/value head, `H` head_dim, `P` pairs of it, `V` vocab_size.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchtune.modules import TransformerDecoder, TransformerSelfAttentionLayer

from custom_components.generation.inference_linear import InferenceLinear
from custom_components.models import quantization
from custom_components.models.attention import attend
from custom_components.models.lora import FrozenLinear, adapter_modules, lora_linears, merged_weight
from custom_components.models.rotary import rotate
from custom_components.runtime.errors import UserError

_CACHE_GROWTH = 256


class KeyValueCache:
    """The keys and values of the tokens read so far, in tensors that are written in place and grow in steps.

    Attributes:
        num_tokens: how far they are filled. To forget the latest tokens, set it back.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._tensors: list[list[Tensor]] = []

    def extended(self, layer: int, new_BKSH: tuple[Tensor, Tensor]) -> list[Tensor]:
        """Append a layer's keys and values to the first `num_tokens`; returns all of them, (B, K, L, H) each."""
        if layer == len(self._tensors):
            self._tensors.append([new.new_empty(*new.shape[:2], 0, new.shape[3]) for new in new_BKSH])
        end = self.num_tokens + new_BKSH[0].shape[2]
        for index, new in enumerate(new_BKSH):
            tensor = self._tensors[layer][index]
            if tensor.shape[2] < end:
                tensor = F.pad(tensor, (0, 0, 0, end + _CACHE_GROWTH - tensor.shape[2]))
                self._tensors[layer][index] = tensor
            tensor[:, :, self.num_tokens : end] = new
        return [tensor[:, :, :end] for tensor in self._tensors[layer]]


class IncrementalLlama(nn.Module):
    """A model's weights with a forward for answering. torchtune's `disable_adapter` works on it as on the model.

    Args:
        model: its weights are shared and stay trainable.
        joined: take them over and join products of one input; the model is unusable afterwards, see
            :func:`made_for_inference`.
    """

    rotations_SP: Tensor

    def __init__(self, model: TransformerDecoder, *, joined: bool = False) -> None:
        super().__init__()
        dtype = model.tok_embeddings.weight.dtype
        joined_linears = partial(InferenceLinear, dtype=dtype) if joined else SharedLinears
        self.max_seq_len = model.max_seq_len
        self.tok_embeddings = model.tok_embeddings
        self.layers = nn.ModuleList(
            IncrementalLayer(layer, index, joined_linears) for index, layer in enumerate(model.layers)
        )
        self.norm = model.norm
        self.output = model.output
        self.register_buffer("rotations_SP", model.layers[0].attn.pos_embeddings.rotations_SP, persistent=False)

    @property
    def vocab_size(self) -> int:
        return self.tok_embeddings.num_embeddings

    @property
    def device(self) -> torch.device:
        return self.tok_embeddings.weight.device

    def forward(
        self, tokens_BS: Tensor, cache: KeyValueCache, positions_BS: Tensor, mask_BSL: Tensor | None = None
    ) -> Tensor:
        """Compute the logits after the last new token of each text, (B, V), in fp32.

        Args:
            cache: of the tokens before; the new ones are added.
            positions_BS: for the rotary embedding.
            mask_BSL: True where new token s attends to l; None: to all up to itself.
        """
        num_new_tokens = tokens_BS.shape[1]
        if mask_BSL is None and num_new_tokens > 1 and cache.num_tokens > 0:
            num_tokens = cache.num_tokens + num_new_tokens
            is_seen_SL = torch.ones(num_new_tokens, num_tokens, dtype=torch.bool, device=tokens_BS.device)
            mask_BSL = is_seen_SL.tril(cache.num_tokens).unsqueeze(0)
        hidden_BSD = self.tok_embeddings(tokens_BS)
        rotations_BS1P = self.rotations_SP[positions_BS].unsqueeze(2)
        for layer in self.layers:
            hidden_BSD = layer(hidden_BSD, cache, rotations_BS1P, mask_BSL)
        cache.num_tokens += num_new_tokens
        return self.output(self.norm(hidden_BSD[:, -1])).float()


class IncrementalLayer(nn.Module):
    """A transformer layer: attention, then the gated feed-forward, each of the normalized input and added to it.

    Args:
        index: of the layer, in the cache.
        joined_linears: makes one module of linear layers that share an input.
    """

    def __init__(
        self,
        layer: TransformerSelfAttentionLayer,
        index: int,
        joined_linears: Callable[[Sequence[Any]], nn.Module],
    ) -> None:
        super().__init__()
        attention, mlp = layer.attn, layer.mlp
        self.index = index
        self.num_heads: int = attention.num_heads
        self.num_kv_heads: int = attention.num_kv_heads
        self.attention_norm: nn.Module = layer.sa_norm
        self.qkv = joined_linears((attention.q_proj, attention.k_proj, attention.v_proj))
        self.attention_output = joined_linears((attention.output_proj,))
        self.mlp_norm: nn.Module = layer.mlp_norm
        self.gate_up = joined_linears((mlp.w1, mlp.w3))
        self.down = joined_linears((mlp.w2,))

    def forward(
        self, hidden_BSD: Tensor, cache: KeyValueCache, rotations_BS1P: Tensor, mask_BSL: Tensor | None
    ) -> Tensor:
        hidden_BSD = hidden_BSD + self._attend(self.attention_norm(hidden_BSD), cache, rotations_BS1P, mask_BSL)
        gate, up = self.gate_up(self.mlp_norm(hidden_BSD).flatten(0, 1)).chunk(2, dim=-1)
        return hidden_BSD + self.down(F.silu(gate) * up).view_as(hidden_BSD)

    def _attend(
        self, input_BSD: Tensor, cache: KeyValueCache, rotations_BS1P: Tensor, mask_BSL: Tensor | None
    ) -> Tensor:
        batch_size, num_new_tokens, _ = input_BSD.shape
        num_rotated = self.num_heads + self.num_kv_heads
        qkv = self.qkv(input_BSD.flatten(0, 1)).view(batch_size, num_new_tokens, num_rotated + self.num_kv_heads, -1)
        rotated = rotate(qkv[:, :, :num_rotated], rotations_BS1P).transpose(1, 2)
        query_BNSH, key_BKSH = rotated.split([self.num_heads, self.num_kv_heads], dim=1)
        key_BKLH, value_BKLH = cache.extended(self.index, (key_BKSH, qkv[:, :, num_rotated:].transpose(1, 2)))
        if num_new_tokens == 1:
            # The query heads of one key/value head are laid out as positions, so that keys and values are not repeated.
            query = query_BNSH.reshape(batch_size, self.num_kv_heads, -1, query_BNSH.shape[-1])
            mask = None if mask_BSL is None else mask_BSL.unsqueeze(1)
            output = F.scaled_dot_product_attention(query, key_BKLH, value_BKLH, attn_mask=mask)
            output_BSD = output.reshape(batch_size, 1, -1)  # not view: some CUDA kernels give another memory layout
        else:
            output_BNSH = attend(query_BNSH, key_BKLH, value_BKLH, mask_BSL)
            output_BSD = output_BNSH.transpose(1, 2).reshape(batch_size, num_new_tokens, -1)
        return self.attention_output(output_BSD.flatten(0, 1)).view_as(input_BSD)


class SharedLinears(nn.Module):
    """Linear layers of one input as they are, with adapters that stay trainable; their outputs are joined."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, input: Tensor) -> Tensor:
        return torch.cat(lora_linears(input, tuple(self.layers)), dim=-1)


def made_for_inference(model: TransformerDecoder, *, fold_adapter: bool = False) -> IncrementalLlama:
    """Make the fastest form for answering. It takes the weights over layer by layer; `model` is unusable afterwards.

    Args:
        fold_adapter: put the adapters into the weights, after which they cost nothing and cannot be disabled.

    Raises:
        UserError: `fold_adapter` on a quantized base.
    """
    if fold_adapter:
        fold_adapters(model)
    return IncrementalLlama(model, joined=True)


def fold_adapters(model: TransformerDecoder) -> None:
    """Replace every layer that has an adapter by a frozen one of the merged weight, in place.

    Raises:
        UserError: a layer's weight is quantized.
    """
    for name, module in adapter_modules(model).items():
        if quantization.is_quantized(module.weight):
            raise UserError(
                "fold_adapter: true needs an unquantized base, the weights of a quantized one have no room for it; "
                "set quantize_base=false and quantization=null, or fold_adapter=false"
            )
        with torch.device("meta"):
            frozen = FrozenLinear(module.in_dim, module.out_dim)
        merged = merged_weight(module.weight, [(1.0, module)]).to(module.weight.dtype)
        frozen.weight = nn.Parameter(merged, requires_grad=False)
        model.set_submodule(name, frozen)
