"""Layer normalisation for PyTorch: fused CUDA kernels, native CPU kernels, ``torch.nn.LayerNorm``'s interface."""

from ._info import build_info
from .functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .functions import LayerNormFunction, RMSNormFunction
from .modules import LayerNorm, RMSNorm

__version__ = "0.1.0"

__all__ = [
    "LayerNorm",
    "LayerNormFunction",
    "RMSNorm",
    "RMSNormFunction",
    "add_layer_norm",
    "add_rms_norm",
    "build_info",
    "layer_norm",
    "rms_norm",
]
