"""Stateless tensor functions of ConvNN: select neighbours (`knn`, `knn_index`, `grid_neighbors`), aggregate them
(`neighbor_conv`).

`reference` holds the same functions as short definitions that every path here is tested against.
"""
from . import reference
from .knn import grid_neighbors, knn, knn_index
from .neighbor_conv import neighbor_conv
from .paths import available_paths, use_path

__all__ = ['available_paths', 'grid_neighbors', 'knn', 'knn_index', 'neighbor_conv', 'reference', 'use_path']
