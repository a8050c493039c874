"""TorchScript: a scripted network calls one of these layers as a single operator, which runs the layer's Python code.

A scripted file can be saved and loaded, as long as convnn_timm is imported where it runs.
"""
import importlib
import inspect
import json
from functools import lru_cache
from typing import List, Optional

import torch
import torch.nn as nn

__all__ = ['ScriptedWhole']

_library = torch.library.Library('convnn_timm', 'FRAGMENT')
_library.define('layer(Tensor x, Tensor?[] tensors, str spec, bool training) -> Tensor')


class ScriptedWhole(nn.Module):
    """Base of layers whose `compute` is opaque to TorchScript.

    A subclass keeps its constructor's arguments as attributes of the same names, ends its constructor with
    `self.spec = layer_spec(self)`, and lists its parameters in `tensors`, in the order of `named_parameters`.
    """
    spec: str

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.convnn_timm.layer(x, self.tensors(), self.spec, self.training)
        else:
            return self.compute(x)

    @torch.jit.unused
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def tensors(self) -> List[Optional[torch.Tensor]]:
        return [self.weight, self.bias]


def layer_spec(layer: nn.Module) -> str:
    """Class and constructor arguments of a layer as text."""
    names = inspect.signature(type(layer)).parameters.keys() - {'bias', 'device', 'dtype'}
    arguments = {name: getattr(layer, name) for name in sorted(names)}
    return json.dumps([type(layer).__module__, type(layer).__name__, {**arguments, 'bias': layer.bias is not None}])


@lru_cache(maxsize=None)
def _build(spec: str, training: bool) -> nn.Module:
    module, name, arguments = json.loads(spec)
    return getattr(importlib.import_module(module), name)(**arguments, device='meta').train(training)


def _run(x: torch.Tensor, tensors: List[Optional[torch.Tensor]], spec: str, training: bool) -> torch.Tensor:
    layer = _build(spec, training)
    names = [name for name, _ in layer.named_parameters()]
    return torch.func.functional_call(layer, dict(zip(names, [t for t in tensors if t is not None])), (x,))


_library.impl('layer', _run, 'CompositeImplicitAutograd')
