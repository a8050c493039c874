"""Stateless tensor functions of ConvNN: select neighbours (`knn`, `knn_index`, `grid_neighbors`), aggregate them
(`neighbor_conv`).

`reference` holds the same functions as short definitions that every path here is tested against.
"""
from . import reference
from .aggregation import neighbor_conv
from .dispatch import available_paths, use_path
from .eager.grid import grid_neighbors
from .selection import knn, knn_index

__all__ = ['available_paths', 'grid_neighbors', 'knn', 'knn_index', 'neighbor_conv', 'reference', 'use_path']
