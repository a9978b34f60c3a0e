"""Attention on CUDA, as far as it shows without a card: a stub stands for the kernel.

Dimensions: `B` batch, `S` positions, `N` query heads, `K` key/value heads, `H` head_dim.
"""

import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from custom_components.models import attention
from custom_components.models.attention import RowLengths, attend, attend_within_rows_at_once, heads_for_cuda

LENGTHS = (5, 3)
ROWS = RowLengths(LENGTHS, torch.tensor([0, 5, 8], dtype=torch.int32))


def reference(query_NSH, key_KSH, value_KSH, scale):
    """Row by row, in plain operations."""
    outputs = []
    for query, key, value in zip(
        *(tensor.split(LENGTHS, 1) for tensor in (query_NSH, key_KSH, value_KSH)), strict=True
    ):
        num_sharing = len(query) // len(key)
        key, value = key.repeat_interleave(num_sharing, 0), value.repeat_interleave(num_sharing, 0)
        scores = (query @ key.transpose(1, 2) * scale).masked_fill(
            torch.ones(query.shape[1], query.shape[1]).triu(1).bool(), -torch.inf
        )
        outputs.append(scores.softmax(-1) @ value)
    return torch.cat(outputs, 1)


def kernel_of(has_enable_gqa):
    """A variable-length kernel of torch 2.11 or of 2.13, on the CPU, which refuses heads of odd sizes as CUDA's do."""

    def attend(query_SNH, key_SKH, value_SKH, *_boundaries_and_lengths, scale, window_size):
        assert query_SNH.shape[-1] % 8 == 0 and window_size == (-1, 0)
        return reference(*(x.transpose(0, 1) for x in (query_SNH, key_SKH, value_SKH)), scale).transpose(0, 1)

    def attend_newer(query_SNH, key_SKH, value_SKH, *others, scale, window_size, enable_gqa):
        assert enable_gqa == (query_SNH.shape[1] != key_SKH.shape[1])
        return attend(query_SNH, key_SKH, value_SKH, *others, scale=scale, window_size=window_size)

    return attend_newer if has_enable_gqa else attend


@pytest.mark.parametrize("has_enable_gqa", [True, False])
@pytest.mark.parametrize("num_kv_heads", [4, 2])
@pytest.mark.parametrize("head_dim", [16, 100])
def test_the_kernel_is_called_as_each_torch_and_each_head_size_needs(
    monkeypatch, has_enable_gqa, num_kv_heads, head_dim
):
    kernel = SimpleNamespace(varlen_attn=kernel_of(has_enable_gqa))
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", kernel)
    query_1NSH = torch.randn(1, 4, 8, head_dim)
    key_1KSH, value_1KSH = torch.randn(2, 1, num_kv_heads, 8, head_dim)
    output_1NSH = attend_within_rows_at_once(query_1NSH, key_1KSH, value_1KSH, ROWS)
    expected_NSH = reference(query_1NSH[0], key_1KSH[0], value_1KSH[0], head_dim**-0.5)
    torch.testing.assert_close(output_1NSH[0], expected_NSH)


def test_the_backward_copies_into_no_tensor_of_zeros(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", SimpleNamespace(varlen_attn=kernel_of(True)))
    tensors = [torch.randn(1, 4, 8, 16, requires_grad=True) for _ in range(3)]
    node, names = attend_within_rows_at_once(*tensors, ROWS).grad_fn, []
    waiting = [node]
    while waiting:
        node = waiting.pop()
        names.append(node.name())
        waiting += [following for following, _ in node.next_functions if following is not None]
    assert "SqueezeBackward1" in names and not {"SelectBackward0", "SliceBackward0"} & {*names}


@pytest.mark.parametrize(("num_kv_heads", "head_dim"), [(4, 64), (2, 64), (4, 100), (2, 100)])
def test_heads_for_cuda_are_of_one_number_and_of_a_size_its_kernels_take(num_kv_heads, head_dim):
    query_BNSH = torch.randn(2, 4, 8, head_dim)
    key_BKSH, value_BKSH = torch.randn(2, 2, num_kv_heads, 8, head_dim)
    heads = heads_for_cuda(query_BNSH, key_BKSH, value_BKSH)
    assert {tensor.shape for tensor in heads} == {(2, 4, 8, 104 if head_dim == 100 else 64)}
    output_BNSH = F.scaled_dot_product_attention(*heads, is_causal=True, scale=head_dim**-0.5)[..., :head_dim]
    torch.testing.assert_close(output_BNSH, attend(query_BNSH, key_BKSH, value_BKSH, None))


def test_an_estimate_for_cuda_takes_the_kernel_for_all_rows():
    rows = RowLengths(LENGTHS, torch.empty(3, dtype=torch.int32, device="meta"))
    tensors = [torch.empty(1, heads, 8, 16, device="meta", requires_grad=True) for heads in (4, 2, 2)]
    output = attention.attend_within_rows(*tensors, rows)
    assert output.shape == tensors[0].shape and "Cat" not in str(output.grad_fn)
    output.sum().backward()
    assert [tensor.grad.shape for tensor in tensors] == [tensor.shape for tensor in tensors]
