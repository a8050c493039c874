"""What the eager backend is made of: chunks, precision, the largest of a row, matrix products."""
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnn_timm.ops import _common
from convnn_timm.ops.eager import aggregation, products
from convnn_timm.ops.eager.products import columns_by_columns, rows_by_columns, rows_by_rows
from convnn_timm.ops.eager.topk import column_scratch, topk_of_columns, topk_of_rows, topk_of_tied_rows
from random_tokens import tokens


@pytest.mark.parametrize('device, budget', [
    (None, 8), (torch.device('cpu'), 8), (torch.device('cuda'), 128), (torch.device('mps'), 128)])
def test_chunks_fill_the_budget_of_the_device(device, budget):
    """128 images of 1 MiB, or two of 100 MiB that are cut where they do not fit. Each query is in one chunk."""
    assert [b.stop - b.start for b, _ in _common.batch_chunks(128, 1024, 1024, device)] == [budget] * (128 // budget)
    large = list(_common.batch_chunks(2, 100, 2 ** 20, device))
    assert len(large) == 2 * -(-100 // budget)
    assert [i for b, q in large for i in range(100)[q]] == 2 * [*range(100)]


def test_full_precision_lasts_until_the_last_thread_has_left(float32_precision, monkeypatch):
    inside, leave = threading.Event(), threading.Event()

    def other():
        with _common.full_float32():
            inside.set()
            leave.wait(10)

    def found():
        return [backend.fp32_precision for backend in float32_precision]

    torch.set_float32_matmul_precision('medium')
    allowed = found()
    assert allowed == ['tf32', 'bf16']
    thread = threading.Thread(target=other)
    with pytest.raises(KeyError), _common.full_float32():
        thread.start()
        assert inside.wait(10) and found() == ['ieee', 'ieee']
        raise KeyError
    assert found() == ['ieee', 'ieee']
    leave.set()
    thread.join()
    assert found() == allowed
    monkeypatch.setattr(_common, '_matmul_backends', lambda: [_common._AllBackends()])  # as with torch before 2.9
    with _common.full_float32():
        assert torch.get_float32_matmul_precision() == 'highest' and found() == ['ieee', 'ieee']
    assert torch.get_float32_matmul_precision() == 'medium' and found() == allowed


def test_full_precision_leaves_a_wider_setting_in_force():
    """(In a process of its own: torch takes none of these settings back.)"""
    code = """
import torch
from convnn_timm.ops._common import full_float32

def found():
    return [backend.fp32_precision for backend in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)]

torch.backends.fp32_precision = 'tf32'
with full_float32():
    assert found() == ['ieee', 'ieee']
assert found() == ['tf32', 'tf32']
torch.backends.fp32_precision = 'ieee'
assert found() == ['ieee', 'ieee']
"""
    subprocess.run([sys.executable, '-c', code], check=True)


@pytest.mark.parametrize('M, k', [
    (1, 1), (7, 1), (5, 5), (8, 8), (40, 8), (33, 3), (90, 16), (300, 9), (700, 16), (3000, 9)])
def test_topk_orders_equal_values_by_their_index(M, k):
    """By each way, of values that are often equal, both zeros and infinities among them, none to all NaN; or never."""
    special = torch.tensor([0., -0., 1e-45, -1e-45, 3e38, -3e38, torch.inf, -torch.inf, 1., -1., 2.])
    generator = torch.Generator().manual_seed(M)
    score = special[torch.randint(len(special), (200, M), generator=generator)]
    score[::5] = torch.randn(40, M, generator=generator)
    for row, number in enumerate((0, 1, k + 1, M), start=1):
        sign = torch.randn(40, min(number, M), generator=generator)
        score[row::5, torch.randperm(M, generator=generator)[:number]] = torch.tensor(torch.nan).copysign(sign)
    expected = score.sort(dim=1, descending=True, stable=True).indices[:, :k]
    columns = score.view(4, 50, M).mT.clone(memory_format=torch.contiguous_format)  # to be overwritten
    scratch = torch.full((200 * column_scratch(M, k) + 1,), 7)  # a number more than it needs
    by_column = [t.T for t in topk_of_columns(columns, k, scratch)]
    assert scratch[-1] == 7
    for value, index in topk_of_rows(score, k), topk_of_tied_rows(score, k), by_column:
        assert torch.equal(index, expected)
        torch.testing.assert_close(value, score.gather(1, expected), rtol=0, atol=0, equal_nan=True)


def convolutions_in(run):
    """The operators of convolutions that a call runs."""
    found = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            found.extend([op] if 'convolution' in str(op) else [])
            return op(*args, **kwargs or {})

    with Watch():
        run()
    return found


@pytest.mark.parametrize('M, N, K', [(1, 1, 1), (7, 1, 5), (1, 4, 9), (6, 8, 1), (300, 24, 65), (40, 200, 33)])
def test_products_are_those_of_matrices(by_convolution, M, N, K):
    """Of float32 matrices in any layout; in other dtypes there is one way only."""
    for dtype in torch.float32, torch.float64, torch.bfloat16:
        a, b, c = (tokens(*shape, ties=True, dtype=dtype) for shape in ((M, K), (N, K), (M, N)))
        for lay in (lambda t: t), (lambda t: t.T.contiguous().T), (lambda t: t.repeat(2, 2)[:len(t), :t.shape[1]]):
            assert torch.equal(rows_by_rows(lay(a), lay(b)), a @ b.T)  # of integers, exactly
            assert torch.equal(rows_by_columns(lay(c), lay(b)), c @ b)
            assert torch.equal(columns_by_columns(lay(c), lay(a)), c.T @ a)


@pytest.mark.parametrize('allowed, convolves', [('highest', True), ('medium', False)])
def test_products_of_float32_are_convolutions_where_these_are_faster(
        monkeypatch, float32_precision, allowed, convolves):
    """But not where the program allows products with fewer bits, nor those that are too small for the overhead."""
    monkeypatch.setattr(products, 'convolutions_are_faster', lambda: True)
    torch.set_float32_matmul_precision(allowed)
    large, small, flat = torch.randn(512, 512), torch.randn(64, 64), torch.randn(64, 512)
    for multiply in rows_by_rows, rows_by_columns, columns_by_columns:
        assert bool(convolutions_in(lambda: multiply(large, large))) == convolves
        assert not convolutions_in(lambda: multiply(small, small))
        assert not convolutions_in(lambda: multiply(large.double(), large.double()))
    assert bool(convolutions_in(lambda: rows_by_columns(flat, large))) == convolves
    assert not convolutions_in(lambda: columns_by_columns(flat, flat))


@pytest.mark.parametrize('cpuinfo, capability, faster', [
    ('vendor_id : AuthenticAMD', 'AVX512', True), ('vendor_id : AuthenticAMD', 'AVX2', False),
    ('vendor_id : GenuineIntel', 'AVX512', False)])
def test_convolutions_are_faster_on_processors_that_mkl_was_not_made_for(monkeypatch, cpuinfo, capability, faster):
    monkeypatch.setattr(products.Path, 'is_file', lambda path: True)
    monkeypatch.setattr(products.Path, 'read_text', lambda path: cpuinfo)
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: capability)
    monkeypatch.setattr(torch.backends.mkl, 'is_available', lambda: True)
    assert products.convolutions_are_faster.__wrapped__() == faster


@pytest.mark.parametrize('T, Q, C, O, first', [
    (64, 1024, 64, 64, True), (64, 64, 256, 128, True),  # few candidates; outputs fewer than inputs
    (1032, 1024, 64, 64, False), (1032, 256, 64, 128, False),  # as many tokens as queries; strided
    (50176, 50176, 64, 8, False),  # products that would not fit a chunk
])
def test_multiplies_first_where_that_is_less_work(T, Q, C, O, first):
    x, index, weight = (torch.empty(s, device='meta') for s in ((1, T, C), (1, Q, 8), (O, C, 8)))
    assert aggregation.multiplies_first(x, index, weight) == first
