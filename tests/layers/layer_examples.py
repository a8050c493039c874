"""Layers and inputs that the tests of layers share."""
import torch

from convnn_timm.layers import (
    Branching1d, Branching2d, BranchingAttention1d, BranchingAttention2d, ConvNN1d, ConvNN2d, ConvNNAttention1d,
    ConvNNAttention2d)

LAYERS_1D = [ConvNN1d, ConvNNAttention1d, Branching1d, BranchingAttention1d]
LAYERS_2D = [ConvNN2d, ConvNNAttention2d, Branching2d, BranchingAttention2d]
LOC = dict(similarity_type='Loc', magnitude_type='euclidean')


def image(*shape, dtype=torch.float64, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def example(layer, size=None):
    return image(2, layer.in_channels, *(size or (8,) * layer.axes))
