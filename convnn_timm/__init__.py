"""Convolution over nearest neighbours (ConvNN) for timm.

PyTorch imports this package at the end of `import torch` (see autoload.py), so it imports nothing itself: the names
below are loaded when they are first used.
"""
import importlib

from . import autoload

__version__ = '0.1.0'

_MODULES = ('layers', 'models', 'ops')
_LAYERS = (
    'ConvNN1d', 'ConvNN2d', 'ConvNNAttention1d', 'ConvNNAttention2d',
    'Branching1d', 'Branching2d', 'BranchingAttention1d', 'BranchingAttention2d', 'CoordConv2d',
)
_CONVERSION = ('ConversionReport', 'convert')
__all__ = [*_MODULES, *_LAYERS, *_CONVERSION]


def __getattr__(name: str):
    if name in _MODULES:
        return importlib.import_module(f'{__name__}.{name}')
    if name in _LAYERS:
        return getattr(importlib.import_module(f'{__name__}.layers'), name)
    if name in _CONVERSION:
        return getattr(importlib.import_module(f'{__name__}.conversion'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


if autoload.timm_is_imported():
    autoload.register()  # timm is there and its user wants the models too: an error is theirs to see
else:
    autoload.install()
