"""Layer normalisation for PyTorch: fused CUDA kernels, native CPU kernels, ``torch.nn.LayerNorm``'s interface."""

from ._source import installed

__path__ = installed(__path__)

from ._info import LaunchPlan, build_info, launch_plan
from .convert import Replacement, override, replace_norms, restore_norms
from .functional import add_layer_norm, add_rms_norm, layer_norm, rms_norm
from .functions import LayerNormFunction, RMSNormFunction
from .modules import AddLayerNorm, AddRMSNorm, LayerNorm, RMSNorm
from .rnn import LayerNormGRUCell, LayerNormLSTM, LayerNormLSTMCell

__version__ = "0.1.0"

__all__ = [
    "AddLayerNorm",
    "AddRMSNorm",
    "LaunchPlan",
    "LayerNorm",
    "LayerNormFunction",
    "LayerNormGRUCell",
    "LayerNormLSTM",
    "LayerNormLSTMCell",
    "RMSNorm",
    "RMSNormFunction",
    "Replacement",
    "add_layer_norm",
    "add_rms_norm",
    "build_info",
    "launch_plan",
    "layer_norm",
    "override",
    "replace_norms",
    "restore_norms",
    "rms_norm",
]
