"""Which implementation of each op this machine can run, and why."""
from typing import List, NamedTuple

__all__ = ['OpPath', 'available_paths']


class OpPath(NamedTuple):
    """One implementation of an op: whether it is used here, and the reason in words."""
    op: str
    path: str
    usable: bool
    reason: str


def available_paths() -> List[OpPath]:
    """The paths of `knn` and `neighbor_conv`, in the order in which they are tried."""
    paths = []
    for op in ('knn', 'neighbor_conv'):
        paths.append(OpPath(op, 'torch', True, 'plain PyTorch, any device, memory bounded by chunks'))
    return paths
