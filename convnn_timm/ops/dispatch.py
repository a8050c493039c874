"""Which backend runs a call of an op, and in words why another cannot. Nothing else decides that.

The public functions `choose` once per call; the name goes with the call, from the operator to its backward. Backends:
- 'torch': plain PyTorch, the default everywhere until the Triton kernels have been timed on a GPU.
- 'triton': by `use_path('triton')`, the environment variable CONVNN_TIMM_OPS=triton, or `backend='triton'` in a call.
- 'onnx': standard operators only, for a network that is being exported to ONNX.
"""
import os
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import List, NamedTuple, Optional

import torch

from .eager import aggregation, selection
from .eager.products import convolutions_are_faster

__all__ = [
    'OpPath', 'available_paths', 'can_run_triton_knn', 'can_run_triton_neighbor_conv', 'choose', 'implementation',
    'interpreting', 'resolve', 'use_path',
]

PATHS = ('torch', 'triton')
MAX_TRITON_K = 64  # neighbours that one program keeps on chip
EAGER = {'knn': selection, 'neighbor_conv': aggregation}

_wanted: Optional[str] = os.environ.get('CONVNN_TIMM_OPS') or None  # one choice for all threads of the process


class OpPath(NamedTuple):
    """One implementation of an op: whether it can run here, and the reason in words."""
    op: str
    path: str
    usable: bool
    reason: str


class use_path:
    """Choose the backend of the ops: `use_path('triton')` from here on, `with use_path('triton'):` for a block.

    Args:
        name: 'torch', 'triton', or None for the default choice.

    Raises:
        ValueError: Unknown name.
        RuntimeError: This machine cannot run that path. (Whether it can with certain tensors shows in an op's call.)
    """

    def __init__(self, name: Optional[str]) -> None:
        global _wanted
        _check_name(name)
        reason = _no_triton() if name == 'triton' else None
        if reason:
            raise RuntimeError(f"the path 'triton' cannot run here: {reason}")
        self.previous, _wanted = _wanted, name

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error) -> None:
        global _wanted
        _wanted = self.previous


def choose(op: str, backend: Optional[str], tokens: torch.Tensor) -> str:
    """The backend of one call of 'knn' or 'neighbor_conv'.

    An exported program is given 'auto', which is resolved each time that it runs: it may have moved to another device,
    or to a machine without Triton. A compiled function keeps the name, and is compiled again after `use_path`.

    Args:
        op: 'knn' or 'neighbor_conv'.
        backend: What the caller asks for, or None for the default choice.
        tokens: The candidates of 'knn', the tokens of 'neighbor_conv'.

    Raises:
        ValueError: Unknown name.
    """
    if backend is not None:
        if backend not in (*PATHS, 'onnx'):
            raise ValueError(f'unknown backend {backend!r}, valid are {", ".join(PATHS)}, onnx')
        return backend
    if torch.onnx.is_in_onnx_export():
        return 'onnx'
    if torch.compiler.is_exporting() or torch.jit.is_tracing():
        return 'auto'
    return resolve(op, 'auto', tokens)


def resolve(op: str, backend: str, tokens: torch.Tensor) -> str:
    """The name itself, or for 'auto' the process's choice now. Without `backend=` float64 is ranked by 'torch'."""
    if backend != 'auto':
        return backend
    _check_name(_wanted)
    if _wanted == 'triton' and op == 'knn' and tokens.dtype == torch.float64:  # locations, in a network of any dtype
        return 'torch'
    return _wanted or 'torch'


def implementation(op: str, backend: str, *args) -> ModuleType:
    """The module whose functions run one call. args are those of the op's predicate, `can_run_triton_...`.

    Raises:
        RuntimeError: The backend that was asked for cannot run with these tensors.
    """
    backend = resolve(op, backend, args[0])
    _check_name(backend)
    if backend == 'torch':
        return EAGER[op]
    reason = {'knn': can_run_triton_knn, 'neighbor_conv': can_run_triton_neighbor_conv}[op](*args)
    if reason:
        raise RuntimeError(f"{op}: the path 'triton' was asked for but cannot run: {reason}. "
                           f"convnn_timm.ops.use_path(None) returns to the default path, and so does a call without "
                           f"backend='triton'")
    return import_module({'knn': '.triton.selection', 'neighbor_conv': '.triton.aggregation'}[op], __package__)


def can_run_triton_knn(candidates: torch.Tensor, k: int) -> Optional[str]:
    """None if the Triton kernel can select k of candidates (B, M, C), else the reason."""
    if candidates.dtype != torch.float32:
        return f'tokens are {_name(candidates.dtype)}, it ranks in float32'
    if k > MAX_TRITON_K:
        return f'K = {k} > {MAX_TRITON_K}'
    return _no_triton(candidates.device)


def can_run_triton_neighbor_conv(x: torch.Tensor, weight: torch.Tensor, groups: int) -> Optional[str]:
    """None if the Triton kernels can convolve x (B, T, C) with weight (O, C / groups, K), else the reason."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f'tokens are {_name(x.dtype)}, it takes float32, float16 and bfloat16'
    if weight.dtype != x.dtype:
        return f'tokens are {_name(x.dtype)} but the weight is {_name(weight.dtype)}'
    if groups != 1 and not groups == x.shape[2] == weight.shape[0]:
        return f'groups = {groups}, it takes 1 or depthwise (groups = input channels = output channels)'
    return _no_triton(x.device)


def available_paths() -> List[OpPath]:
    """The paths of `knn` and `neighbor_conv` on this machine, the default one first."""
    missing = _no_triton()
    chosen = 'chosen, though' if _wanted == 'triton' else 'off unless CONVNN_TIMM_OPS=triton:'
    triton = missing or f'{chosen} not timed on a GPU yet'
    torch_path = 'plain PyTorch, any device, memory bounded by chunks; the default'
    if convolutions_are_faster():
        torch_path += '; large float32 products as convolutions, for MKL leaves AVX-512 unused here'
    paths = []
    for op in ('knn', 'neighbor_conv'):
        paths.append(OpPath(op, 'torch', True, torch_path))
        paths.append(OpPath(op, 'triton', missing is None, triton))
    return paths


def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels on the CPU; TRITON_INTERPRET=1 must be set when Python starts."""
    return os.environ.get('TRITON_INTERPRET', '').lower() in ('1', 'true', 'yes', 'on', 'y')


def _no_triton(device: Optional[torch.device] = None) -> Optional[str]:
    """Why Triton cannot run on a device (None: on any of this machine), or None if it can."""
    if not _triton_installed():
        return 'triton is not installed'
    if interpreting():
        return None
    if not torch.cuda.is_available():
        return 'no CUDA device'
    if device is not None and device.type != 'cuda':
        return f'the tensors are on {device.type}, not on a CUDA device'
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return 'the GPU is older than compute capability 8.0'
    return None


@lru_cache(maxsize=None)
def _triton_installed() -> bool:
    return find_spec('triton') is not None


def _check_name(name: Optional[str]) -> None:
    if name is not None and name not in PATHS:
        raise ValueError(f'unknown path {name!r} (use_path or CONVNN_TIMM_OPS), valid are {", ".join(PATHS)}')


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix('torch.')
