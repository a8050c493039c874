"""What the ops share: chunks that keep temporary tensors within a budget, dtypes, registration of derivatives."""
import threading
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Callable, Iterator, List, NoReturn, Optional, Tuple

import torch
import torch.library
from torch.autograd.forward_ad import unpack_dual

from .reference import inverse_norm

# Bytes of temporary memory that one step of an op may take. A few MiB stay in a CPU's cache. On other devices a step is
# dozens of kernel launches, which must have enough to do.
CHUNK_BYTES = 8 * 2 ** 20
DEVICE_CHUNK_BYTES = 128 * 2 ** 20

_library = torch.library.Library('convnn_timm', 'FRAGMENT')
_float32_lock, _float32_users, _float32_before = threading.Lock(), 0, []


def chunk_bytes(device: Optional[torch.device]) -> int:
    """The budget of one step on a device; None and meta count as the CPU."""
    on_cpu = device is None or torch.device(device).type in ('cpu', 'meta')
    return CHUNK_BYTES if on_cpu else DEVICE_CHUNK_BYTES


def batch_chunks(
        B: int,
        Q: int,
        bytes_per_query: int,
        device: Optional[torch.device],
) -> Iterator[Tuple[slice, slice]]:
    """Cut B images of Q queries into (images, queries) slices within the budget, whole images where they fit."""
    queries = max(1, chunk_bytes(device) // max(1, bytes_per_query))
    images = max(1, queries // max(1, Q))
    for b in range(0, B, images):
        for q in range(0, Q, queries):
            yield slice(b, min(b + images, B)), slice(q, min(q + queries, Q))


def widen(x: torch.Tensor) -> torch.Tensor:
    """float32 for narrower floating dtypes, so that norms neither overflow nor lose ranks.

    A graph that was traced in float32 may run under autocast and meet narrower tensors. Adding a zero of the traced
    dtype stays in the graph and widens them. (torch.export would turn a cast into an assertion.)
    """
    if x.dtype in (torch.float16, torch.bfloat16):
        return x.float()
    if torch.jit.is_tracing() or torch.compiler.is_compiling():
        return x + x.new_zeros(1, dtype=x.dtype)
    return x


def has_direction(query: torch.Tensor) -> torch.Tensor:
    """Which queries are long enough to have a direction, (..., 1). To others all candidates are equally similar."""
    return inverse_norm(query) != 0


def flat_rows(index: torch.Tensor, T: int) -> torch.Tensor:
    """Row numbers in the flattened (n * T, C) tokens of an (n, q, K) index."""
    first = torch.arange(0, index.shape[0] * T, T, device=index.device)
    return (index + first[:, None, None]).reshape(-1)


def no_autocast(x: torch.Tensor) -> AbstractContextManager:
    """Compute in the dtypes of the tensors themselves. (The meta device knows no autocast.)"""
    if x.device.type == 'meta' or not torch.is_autocast_enabled(x.device.type):
        return nullcontext()  # the block below would stay in an exported network, which then fails under autocast
    return torch.autocast(x.device.type, enabled=False)


@contextmanager
def full_float32() -> Iterator[None]:
    """Multiply float32 matrices in full, even if the program allows TF32 or bfloat16: ranks depend on every bit.

    The setting belongs to the process: the first thread to enter changes it, and the last one to leave restores it.
    """
    global _float32_users, _float32_before
    backends = _matmul_backends()
    with _float32_lock:
        if not _float32_users:
            _float32_before = [backend.fp32_precision for backend in backends]
            for backend, before in zip(backends, _float32_before):
                if before not in ('ieee', 'none'):
                    backend.fp32_precision = 'ieee'
        _float32_users += 1
    try:
        yield
    finally:
        with _float32_lock:
            _float32_users -= 1
            if not _float32_users:
                for backend, before in zip(backends, _float32_before):
                    for value in 'none', before:  # none of its own, if it was that of a wider setting
                        if backend.fp32_precision != before:
                            backend.fp32_precision = value


def cpu_multiplies_full_float32() -> bool:
    """Whether a CPU multiplies float32 in full now, in matrices and convolutions."""
    backends = _matmul_backends()[-1:]
    if hasattr(torch.backends.mkldnn, 'conv'):
        backends.append(torch.backends.mkldnn.conv)
    return all(backend.fp32_precision in ('ieee', 'none') for backend in backends)


class _AllBackends:
    """The precision setting of torch before 2.9, which holds for any device, with the interface of later ones."""

    @property
    def fp32_precision(self) -> str:
        return torch.get_float32_matmul_precision().replace('highest', 'ieee')

    @fp32_precision.setter
    def fp32_precision(self, value: str) -> None:
        torch.set_float32_matmul_precision('highest' if value in ('ieee', 'none') else value)


def _matmul_backends() -> List[Any]:
    """The objects with a precision setting, one for each type of device, the CPU's last."""
    if hasattr(torch.backends.cuda.matmul, 'fp32_precision'):
        return [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    return [_AllBackends()]


def cast_under_autocast(op: str, dtype: Callable[[str], torch.dtype]) -> None:
    """Make an op take its floating tensors in one dtype under autocast, which leaves float64 as it is.

    (torch.library.register_autocast knows fixed dtypes only.)

    Args:
        op: Its name.
        dtype: The dtype on a type of device, such as 'cuda'.
    """
    for device in 'cpu', 'cuda', 'mps', 'xpu':

        def rule(*args, device=device):
            wanted, narrow = dtype(device), (torch.float16, torch.bfloat16, torch.float32)
            args = [x.to(wanted) if isinstance(x, torch.Tensor) and x.dtype in narrow else x for x in args]
            with torch.autocast(device, enabled=False):
                return getattr(torch.ops.convnn_timm, op)(*args)

        _library.impl(op, rule, f'Autocast{device.upper()}')


def differentiable(op: torch.library.CustomOpDef, backward: Callable, setup_context: Callable) -> Callable:
    """Register an op's backward; return what calls the op so that torch.func's grad, vjp and jacrev find it too."""
    op.register_autograd(backward, setup_context=setup_context)
    methods = dict(forward=op, setup_context=setup_context, backward=backward, jvp=_no_forward_mode)
    function = type(
        op._name, (torch.autograd.Function,),
        {'generate_vmap_rule': True, **{name: staticmethod(method) for name, method in methods.items()}})

    def call(*args):
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return function.apply(*args)
        return op(*args)

    return call


def once_differentiable(backward_op: torch.library.CustomOpDef) -> Callable:
    """Make a second derivative through an op's backward a clear error; return what calls it."""

    def refuse(ctx, *grads):
        raise RuntimeError(
            'ConvNN layers have a first derivative only: torch.autograd.grad(..., create_graph=True) and '
            'torch.func.grad of a gradient cannot go through them. convnn_timm.ops.reference has definitions of the '
            'ops that can be differentiated twice.')

    return differentiable(backward_op, refuse, lambda ctx, inputs, output: None)


def refuse_forward_mode(*tensors: Optional[torch.Tensor]) -> None:
    """Make a derivative in forward mode, which torch would take for zero, a clear error."""
    if any(tensor is not None and unpack_dual(tensor).tangent is not None for tensor in tensors):
        _no_forward_mode()


def _no_forward_mode(*args) -> NoReturn:
    raise RuntimeError(
        'ConvNN layers have derivatives in reverse mode only: torch.func.jvp, jacfwd, hessian and other forward modes '
        'cannot go through them. convnn_timm.ops.reference has definitions of the ops that have both.')
