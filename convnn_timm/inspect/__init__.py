"""Look inside a network: its classes, its neighbours, their pictures and statistics, and its export to ONNX."""
from .classes import classify
from .neighbors import (
    LayerNeighbors,
    LayerStats,
    capture_neighbors,
    neighbor_layers,
    neighbor_stats,
    window_neighbors,
    write_csv,
)
from .onnx_export import Comparison, check_onnx, compare_onnx, export_onnx, sensitivity
from .visualize import View, draw_neighbors, draw_stats, see

__all__ = [
    'Comparison', 'LayerNeighbors', 'LayerStats', 'View', 'capture_neighbors', 'check_onnx', 'classify', 'compare_onnx',
    'draw_neighbors', 'draw_stats', 'export_onnx', 'neighbor_layers', 'neighbor_stats', 'see', 'sensitivity',
    'window_neighbors', 'write_csv',
]
