"""PiSSA, LoRA that starts at the weight's principal part: Meng et al. 2024, arXiv 2404.02948, section 3.

There the base becomes what is left of it, W - s B0 A0. Here it stays as it is, quantized or not, so that it can be
kept, compared and merged as under any adapter: y = W x + s (B A - B0 A0) x, which begins as the base.

Dimensions: `I` in_dim, `O` out_dim, `R` rank.
"""

import math
from typing import Any

import torch
from torch import Tensor

from custom_components.models import quantization
from custom_components.models.lora import LoRALinear

# Iterations of torch.svd_lowrank, and its rank as a multiple of R: singular values within 1.5 to 4%.
_NUM_ITERATIONS = 4
_OVERSAMPLING = 2


class PiSSALinear(LoRALinear):
    """A :class:`LoRALinear` whose A and B start at the principal singular vectors of the frozen weight.

    Its arguments are those of :class:`LoRALinear`. `start_a` is A0, (rank, in_dim), `start_b` is B0, (out_dim, rank).
    On disk it is PEFT's LoRA of twice the rank (peft 0.21.2, tuners/lora/model.py, `subtract_mutated_init`), which fits
    the base as it is: A' = [A; A0], B' = [B, -B0].
    """

    start_a: Tensor
    start_b: Tensor

    def __init__(self, *sizes: Any, **settings: Any) -> None:
        super().__init__(*sizes, **settings)
        self.register_buffer("start_a", torch.empty_like(self.lora_a.weight), persistent=False)
        self.register_buffer("start_b", torch.empty_like(self.lora_b.weight), persistent=False)
        if not self.weight.is_meta:
            self.start_at_principal_part()

    @property
    def exported_rank(self) -> int:
        return 2 * self.rank

    @property
    def exported_alpha(self) -> float:
        return self.alpha * (math.sqrt(2) if self.use_rslora else 2)

    @torch.no_grad()
    def start_at_principal_part(self) -> None:
        """Set A and B, and A0 and B0, so that s B A is the weight's best approximation of rank R, nearly.

        The singular vectors are found on the CPU, from torch's global generator, so that they are those of any device.
        """
        weight_OI = self.weight.detach()
        if quantization.is_quantized(weight_OI):
            weight_OI = quantization.dequantize(weight_OI, torch.float32)
        weight_OI = weight_OI.cpu().float()
        num_vectors = min(_OVERSAMPLING * self.rank, *weight_OI.shape)
        u_OK, s_K, v_IK = torch.svd_lowrank(weight_OI, q=num_vectors, niter=_NUM_ITERATIONS)
        # note: columns that a rank above the weight's sizes leaves over are zeros, and learn nothing.
        num_found = min(self.rank, num_vectors)
        roots_R = (s_K[:num_found] / self.scaling).sqrt()
        self.start_a.zero_()[:num_found] = roots_R.unsqueeze(1) * v_IK[:, :num_found].T
        self.start_b.zero_()[:, :num_found] = u_OK[:, :num_found] * roots_R
        self.lora_a.weight.copy_(self.start_a)
        self.lora_b.weight.copy_(self.start_b)

    def allocate_adapter(self, device: torch.device) -> None:
        super().allocate_adapter(device)
        self.start_a = torch.empty_like(self.start_a, device=device)
        self.start_b = torch.empty_like(self.start_b, device=device)

    def initialize_adapter(self, device: torch.device) -> None:
        self.allocate_adapter(device)
        self.start_at_principal_part()

    def down(self) -> Tensor:
        # B A - B0 A0 as (B - B0) A + B0 (A - A0): exactly 0 at the start, in every dtype, and what is learned is not
        # rounded away beside what cancels.
        return torch.cat([self.lora_a.weight, self.lora_a.weight - self.start_a])

    def up(self) -> Tensor:
        return torch.cat([self.lora_b.weight - self.start_b, self.start_b], dim=1)

    def exported(self, parameter: str) -> Tensor:
        if parameter == "lora_a.weight":
            return torch.cat([self.lora_a.weight, self.start_a])
        return torch.cat([self.lora_b.weight, -self.start_b], dim=1)

    def load_exported(self, parameter: str, values: Tensor) -> None:
        if parameter == "lora_a.weight":
            trained, start = values.split(self.rank)
            self.start_a.copy_(start)
        else:
            trained, minus_start = values.split(self.rank, dim=1)
            self.start_b.copy_(-minus_start)
        self.get_parameter(parameter).copy_(trained)

    def has_learned(self) -> bool:
        return not torch.equal(self.lora_b.weight, self.start_b)
