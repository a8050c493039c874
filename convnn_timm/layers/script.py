"""TorchScript: a scripted network calls one of these layers as a single operator, which runs the layer's Python code.

A scripted network can be saved and loaded. Where it runs, convnn_timm must be imported. torch.fx cannot follow the
control flow of these layers either: it records the call of the whole module.
"""
import importlib
import inspect
import json
import threading
from typing import Any, Dict, List, Optional, Tuple

import torch
import torch.nn as nn

from .inputs import on_batch

__all__ = ['ScriptedWhole', 'record_call']

_library = torch.library.Library('convnn_timm', 'FRAGMENT')
_library.define('layer(Tensor x, Tensor?[] tensors, str spec, bool training) -> Tensor')


class ScriptedWhole(nn.Module):
    """Base of layers whose `compute` TorchScript and torch.fx do not look into.

    A subclass keeps its constructor's arguments as attributes of the same names, and lists its parameters in `tensors`,
    in the order of `named_parameters`.
    """
    axes: int  # of the map: 1 or 2
    spec: str

    def __prepare_scriptable__(self) -> nn.Module:
        """torch.jit.script calls this."""
        self.spec = layer_spec(self)
        check_unchanged(self, self.spec)
        return self

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_scripting():
            return torch.ops.convnn_timm.layer(x, self.tensors(), self.spec, self.training)
        elif isinstance(x, torch.fx.Proxy):
            return record_call(self, x)
        else:
            return on_batch(self.compute, x, self.axes, self.in_channels)

    @torch.jit.unused
    def compute(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def tensors(self) -> List[Optional[torch.Tensor]]:
        return [self.weight, self.bias]


def record_call(module: nn.Module, x: torch.fx.Proxy) -> torch.fx.Proxy:
    """Record the call of a module as one node of torch.fx's graph."""
    return x.tracer.create_proxy('call_module', x.tracer.path_of_module(module), (x,), {})


def layer_spec(layer: nn.Module) -> str:
    """Class and constructor arguments of a layer as text."""
    kind = type(layer)
    names = inspect.signature(kind).parameters.keys() - {'bias', 'device', 'dtype'}
    if missing := [name for name in sorted(names) if not hasattr(layer, name)]:
        raise TypeError(
            f'{kind.__name__} cannot be scripted: it must keep its constructor\'s arguments as attributes of the same '
            f'names ({", ".join(missing)}), or have the constructor of the layer that it derives from')
    if getattr(importlib.import_module(kind.__module__), kind.__name__, None) is not kind:
        raise TypeError(
            f'{kind.__name__} cannot be scripted: there is no such class in {kind.__module__} to import where it runs. '
            f'Define it there; a parametrization is to be removed first (torch.nn.utils.parametrize)')
    arguments = {name: getattr(layer, name) for name in sorted(names)}
    arguments['bias'] = layer.bias is not None
    return json.dumps([kind.__module__, kind.__name__, arguments], default=lambda number: number.item())  # numpy's


def check_unchanged(layer: nn.Module, spec: str) -> None:
    """Refuse a layer that was changed after its construction: the operator builds it anew and gives it the weights."""
    made = dict(_build(spec, layer.training).named_modules())
    for name, module in layer.named_modules():
        twin = made.get(name)
        hooked = 'forward' in vars(module)  # so Accelerate hooks a module
        if name:  # TorchScript itself calls the hooks of the layer
            hooked = hooked or module._forward_hooks or module._forward_pre_hooks
        if type(module) is not type(twin) or module.extra_repr() != twin.extra_repr() or hooked:
            which = f'its module {name}' if name else 'it'
            raise TypeError(
                f'{type(layer).__name__} cannot be scripted: {which} was replaced, changed or given hooks, which '
                f'TorchScript would leave out. Merge or remove these first, or use torch.export')


class _Layers(threading.local):
    """The layers that a thread has built. Threads share none: a layer that runs holds the tensors of its call."""

    def __init__(self) -> None:
        self.built: Dict[Tuple[str, bool], Any] = {}


_layers = _Layers()


def _build(spec: str, training: bool) -> nn.Module:
    if (spec, training) not in _layers.built:
        module, name, arguments = json.loads(spec)
        layer = getattr(importlib.import_module(module), name)(**arguments, device='meta')
        _layers.built[spec, training] = layer.train(training)
    return _layers.built[spec, training]


def _run(x: torch.Tensor, tensors: List[Optional[torch.Tensor]], spec: str, training: bool) -> torch.Tensor:
    layer = _build(spec, training)
    names = [name for name, _ in layer.named_parameters()]
    return torch.func.functional_call(layer, dict(zip(names, [t for t in tensors if t is not None])), (x,))


_library.impl('layer', _run, 'CompositeImplicitAutograd')
