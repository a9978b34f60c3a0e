"""DoRA, LoRA with learned row lengths: Liu et al. 2024, arXiv 2402.09353.

Section 4: the rows of W + s B A are brought to learned lengths, the magnitude m: m (W + s B A) / ||W + s B A||.

Dimensions: `I` in_dim, `O` out_dim, `R` rank.
"""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from custom_components.models import nf4_product, quantization
from custom_components.models.lora import LoRALinear


class DoRALinear(LoRALinear):
    """A :class:`LoRALinear` that learns the lengths of the weight's rows apart from their directions.

    Its arguments are those of :class:`LoRALinear`. `magnitude` is (out_dim,).
    """

    peft_names: ClassVar[Mapping[str, str]] = {**LoRALinear.peft_names, "magnitude": "lora_magnitude_vector"}
    magnitude: nn.Parameter
    base_squared_norms: Tensor

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.magnitude = nn.Parameter(torch.empty(self.out_dim, dtype=self.lora_a.weight.dtype))
        self.register_buffer("base_squared_norms", torch.empty(self.out_dim, dtype=torch.float32), persistent=False)
        if not self.weight.is_meta:
            self.initialize_dora_magnitude()
        # note: a function, not a method, which a deep copy of the layer would bind to the original.
        self.register_load_state_dict_post_hook(_follow_loaded_weight)

    @property
    def peft_flags(self) -> dict[str, bool]:
        return {**super().peft_flags, "use_dora": True}

    @torch.no_grad()
    def initialize_dora_magnitude(self) -> None:
        """Set the magnitude to the lengths of the rows of W + s B A, so that the output is plain LoRA's; in place.

        With B zero these are the rows of the frozen weight, and the output is the base's. torchtune's protocol: call it
        after the frozen weight got values in any other way than by our loader or `load_state_dict`.

        Raises:
            RuntimeError: the weight, A or B is on the meta device.
        """
        if self.weight.is_meta or self.lora_a.weight.is_meta or self.lora_b.weight.is_meta:
            raise RuntimeError("Cannot initialize DoRA magnitude: the weight, A or B is still on the meta device")
        self.base_changed()
        squared_norms_O = self.base_squared_norms
        if _whole(self.lora_b.weight).any():
            base_of_a_RO = nf4_product.frozen_product(
                _whole(self.lora_a.weight).to(self.weight.dtype), _whole(self.weight)
            )
            squared_norms_O = self.squared_row_norms(base_of_a_RO)
        # As `row_norms` takes the root, so that the first ratio of the two is exactly 1.
        magnitude_O = squared_norms_O.sqrt()
        if isinstance(self.magnitude, DTensor):
            magnitude_O = distribute_tensor(magnitude_O, self.magnitude.device_mesh, self.magnitude.placements)
        self.magnitude.copy_(magnitude_O)

    def allocate_adapter(self, device: torch.device) -> None:
        super().allocate_adapter(device)
        self.magnitude = nn.Parameter(torch.empty_like(self.magnitude, device=device))

    def initialize_adapter(self, device: torch.device) -> None:
        super().initialize_adapter(device)
        self.magnitude = nn.Parameter(torch.empty_like(self.magnitude, device=device))
        self.initialize_dora_magnitude()

    @torch.no_grad()
    def base_changed(self) -> None:
        weight = self.weight
        if quantization.is_quantized(weight):
            weight = quantization.dequantize(weight, weight.dtype)
        # note: whole also where FSDP has sharded the weight, which it gathers for a forward, and buffers not.
        self.base_squared_norms = _whole(torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32)).square()

    def adapted_output(self, input: Tensor, low_rank: Tensor) -> Tensor:
        # W x and W A^T, which the norms need, in one product: NF4 is dequantized once.
        rows = torch.cat([input.reshape(-1, self.in_dim), self.lora_a.weight.detach().to(input.dtype)])
        with nf4_product.FROZEN_VALUES.needed(True):  # for the gradient of the magnitude
            outputs = self.plain_output(rows)
        base, base_of_a_RO = outputs.split([len(rows) - self.rank, self.rank])
        base = base.view(*input.shape[:-1], self.out_dim)
        output = torch.add(base, self.update(low_rank), alpha=self.scaling)
        ratio_O = self.magnitude / self.row_norms(base_of_a_RO)
        # The difference to 1, because bf16 has no steps finer than 1/256 around 1 itself.
        return torch.addcmul(output, output, (ratio_O - 1).to(output.dtype))

    @torch.no_grad()
    def row_norms(self, base_of_a_RO: Tensor) -> Tensor:
        """Compute the lengths of the rows of W + s B A, (out_dim,), none of them 0: see :meth:`squared_row_norms`."""
        # A row of zeros, as of a padded vocabulary, stays one: its magnitude is 0, and 0 over this is 0.
        return self.squared_row_norms(base_of_a_RO).clamp(min=torch.finfo(torch.float32).tiny).sqrt()

    @torch.no_grad()
    def squared_row_norms(self, base_of_a_RO: Tensor) -> Tensor:
        """Compute the squared lengths of the rows of W + s B A, (out_dim,), in fp32 and without building that sum.

        ||w + s b A||^2 = ||w||^2 + 2 s b . (A w) + s^2 b (A A^T) b for a row w of W and its row b of B. They are
        constants of the backward (section 4.3 of the paper).

        Args:
            base_of_a_RO: A W^T.
        """
        a_RI = _whole(self.lora_a.weight).to(base_of_a_RO.dtype).float()
        scaled_b_OR = _whole(self.lora_b.weight).float() * self.scaling
        change_O = (scaled_b_OR * (2 * base_of_a_RO.float().T + scaled_b_OR @ (a_RI @ a_RI.T))).sum(dim=1)
        return (self.base_squared_norms + change_O).clamp(min=0)

    @torch.no_grad()
    def output_ratio_O(self, dtype: torch.dtype) -> Tensor:
        return self.magnitude / self.row_norms(self.plain_output(self.lora_a.weight.to(dtype)))

    def add_change(self, merged_OI: Tensor, base_OI: Tensor, factor: float) -> None:
        a_RI, b_OR = self.lora_a.weight.float(), self.lora_b.weight.float()
        changed_OI = torch.addmm(base_OI, b_OR, a_RI, alpha=self.scaling)
        norms_O = torch.linalg.vector_norm(changed_OI, dim=1).clamp(min=torch.finfo(torch.float32).tiny)
        changed_OI.mul_((self.magnitude.float() / norms_O).unsqueeze(1))
        merged_OI.add_(changed_OI.sub_(base_OI), alpha=factor)


def _whole(tensor: Tensor) -> Tensor:
    """Gather a tensor that is sharded over ranks; give any other as it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def _follow_loaded_weight(layer: DoRALinear, _incompatible_keys: Any) -> None:
    """Take the norms of a weight that `load_state_dict` gave. A magnitude that was given, or trained, is kept.

    One that is still the lengths of the old weight's rows becomes that of the new one's.
    """
    if layer.weight.is_meta:
        return
    old_norms_O = layer.base_squared_norms
    layer.base_changed()
    if layer.magnitude.is_meta or old_norms_O.is_meta or layer.lora_b.weight.is_meta:
        return
    if torch.equal(_whole(layer.magnitude), old_norms_O.sqrt().to(layer.magnitude.dtype)):
        layer.initialize_dora_magnitude()
