"""Read state dicts of the paper's code, where parameters have other names and shapes."""
from typing import Dict

import torch
import torch.nn as nn

__all__ = ['convert_original_state_dict', 'load_original_state_dict']


def convert_original_state_dict(state_dict: Dict[str, torch.Tensor], module: nn.Module) -> Dict[str, torch.Tensor]:
    """Rename the original's parameters and reshape them to those of `module`. The order of elements is the same."""
    own = module.state_dict()
    converted = {}
    for name, value in state_dict.items():
        name = name.replace('conv1d_layer.', '').replace('conv2d_layer.', '')
        if name in own and [n for n in own[name].shape if n > 1] == [n for n in value.shape if n > 1]:
            value = value.reshape(own[name].shape)
        converted[name] = value
    return converted


def load_original_state_dict(layer: nn.Module, state_dict: Dict[str, torch.Tensor]) -> None:
    """Load the parameters of one of the original's layers into its counterpart in this package.

    Raises:
        RuntimeError: Parameters are missing, unexpected or of another size.
    """
    layer.load_state_dict(convert_original_state_dict(state_dict, layer), strict=True)
