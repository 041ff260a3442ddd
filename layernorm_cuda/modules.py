"""The modules: ``torch.nn``'s, by our functions. What they do not define here is their parents'."""

from typing import Final

import torch
from torch import Tensor

from . import functional


class LayerNorm(torch.nn.LayerNorm):
    """Drop-in for :class:`torch.nn.LayerNorm`: same arguments, initialisation, ``state_dict`` and ``extra_repr``.

    Shape: input and output ``[*, *normalized_shape]``. See :func:`layernorm_cuda.layer_norm` for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class RMSNorm(torch.nn.RMSNorm):
    """Drop-in for :class:`torch.nn.RMSNorm`: same arguments, initialisation, ``state_dict`` and ``extra_repr``.

    ``zero_centered=True`` multiplies by ``1 + weight``, as Gemma does: the weight starts at 0, weight decay pulls the
    scale to 1, and the sum is taken in float32, so that small weights in bfloat16 are not rounded away.

    Shape: input and output ``[*, *normalized_shape]``. See :func:`layernorm_cuda.rms_norm` for dtypes and errors.
    """

    zero_centered: Final[bool] = False  # once constructed: what TorchScript takes for a constant

    def __init__(
        self, normalized_shape, eps=None, elementwise_affine=True, device=None, dtype=None, *, zero_centered=False
    ):
        super().__init__(normalized_shape, eps, elementwise_affine, device, dtype)
        if zero_centered:
            self.zero_centered = True
            self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.zero_centered and self.weight is not None:
            torch.nn.init.zeros_(self.weight)

    def scale(self) -> Tensor | None:
        """What the normalised input is multiplied by: ``[*normalized_shape]``, or None for ones."""
        return one_plus(self.weight) if self.zero_centered else self.weight

    def forward(self, input: Tensor) -> Tensor:
        return functional.rms_norm(input, self.normalized_shape, self.scale(), self.eps)

    def extra_repr(self) -> str:
        return super().extra_repr() + (", zero_centered=True" if self.zero_centered else "")


class AddLayerNorm(LayerNorm):
    """:class:`LayerNorm` of ``input + residual``, in one pass.

    Shape: both ``[*, *normalized_shape]``, and so are the two results, ``(output, sum)``: a pre-norm block hands the
    sum on to its next addition, a post-norm block leaves it. See :func:`layernorm_cuda.add_layer_norm`.
    """

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return functional.add_layer_norm(input, residual, self.normalized_shape, self.weight, self.bias, self.eps)


class AddRMSNorm(RMSNorm):
    """:class:`RMSNorm` of ``input + residual``, in one pass; as :class:`AddLayerNorm`."""

    def forward(self, input: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return functional.add_rms_norm(input, residual, self.normalized_shape, self.scale(), self.eps)


def one_plus(weight: Tensor | None) -> Tensor | None:
    """``1 + weight`` in float32 (float64 for float64); None, which stands for ones, stays None."""
    return None if weight is None else 1 + weight.to(torch.promote_types(weight.dtype, torch.float32))
