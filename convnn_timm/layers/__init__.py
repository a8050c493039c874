"""ConvNN layers: nn.Modules over `convnn_timm.ops`, one class for sequences (1d) and one for images (2d) each."""
from .attention import ConvNNAttention1d, ConvNNAttention2d
from .branching import Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d
from .convnn import ConvNN1d, ConvNN2d
from .coord_conv import CoordConv2d
from .registry import LAYER_TYPES, create_layer, layer_arguments
from .original import convert_original_state_dict, load_original_state_dict
from .pixel_shuffle import PixelShuffle1d, PixelUnshuffle1d

__all__ = [
    'Branching1d', 'Branching2d', 'BranchingAttention1d', 'BranchingAttention2d', 'ConvNN1d', 'ConvNN2d',
    'ConvNNAttention1d', 'ConvNNAttention2d', 'CoordConv2d', 'LAYER_TYPES', 'PixelShuffle1d', 'PixelUnshuffle1d',
    'convert_original_state_dict', 'create_layer', 'layer_arguments', 'load_original_state_dict',
]
