"""The modules: ``torch.nn``'s, by our functions. What they do not define here is their parents'."""

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

    Shape: input and output ``[*, *normalized_shape]``. See :func:`layernorm_cuda.rms_norm` for dtypes and errors.
    """

    def forward(self, input: Tensor) -> Tensor:
        return functional.rms_norm(input, self.normalized_shape, self.weight, self.eps)
