"""Every op against its definition in ops/reference.py: values, indices and gradients."""
import subprocess
import sys
import threading
from functools import partial

import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

import convnn_timm.ops
from convnn_timm.ops import grid_neighbors, knn, knn_index, neighbor_conv, reference
from convnn_timm.ops import _common
from convnn_timm.ops.eager import aggregation, products, topk
from convnn_timm.ops.eager.products import columns_by_columns, rows_by_columns, rows_by_rows
from convnn_timm.ops.eager.topk import column_scratch, topk_of_columns, topk_of_rows, topk_of_tied_rows


@pytest.fixture(params=[2 ** 23, 4096], ids=['one chunk', 'many chunks'])
def chunk_bytes(request, monkeypatch):
    monkeypatch.setattr(_common, 'CHUNK_BYTES', request.param)


@pytest.fixture(params=[1, 2 ** 30], ids=['by column', 'by row'])
def least_columns(request, monkeypatch):
    monkeypatch.setattr(topk, 'LEAST_COLUMNS', request.param)


@pytest.fixture(params=[False, True], ids=['gather first', 'multiply first'])
def order(request, monkeypatch):
    monkeypatch.setattr(aggregation, 'multiplies_first', lambda *args: request.param)


@pytest.fixture(params=[False, True], ids=['product', 'convolution'])
def by_convolution(request, monkeypatch):
    monkeypatch.setattr(products, 'convolutions_are_faster', lambda: request.param)
    monkeypatch.setattr(products, 'LEAST_PRODUCT', 0)
    monkeypatch.setattr(products, 'LEAST_ROWS', 0)


@pytest.mark.parametrize('device, budget', [
    (None, 8), (torch.device('cpu'), 8), (torch.device('cuda'), 128), (torch.device('mps'), 128)])
def test_chunks_fill_the_budget_of_the_device(device, budget):
    """128 images of 1 MiB, or two of 100 MiB that are cut where they do not fit. Each query is in one chunk."""
    assert [b.stop - b.start for b, _ in _common.batch_chunks(128, 1024, 1024, device)] == [budget] * (128 // budget)
    large = list(_common.batch_chunks(2, 100, 2 ** 20, device))
    assert len(large) == 2 * -(-100 // budget)
    assert [i for b, q in large for i in range(100)[q]] == 2 * [*range(100)]


def tokens(*shape, dtype=torch.float64, seed=0, ties=False):
    """Random tokens; with ties: small integers, a quarter of them dead (exact in every dtype, many equal scores)."""
    generator = torch.Generator().manual_seed(seed)
    if not ties:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    x = torch.randint(-1, 2, shape, generator=generator)
    return (x * (torch.rand(shape[:-1], generator=generator) > 0.25).unsqueeze(-1)).to(dtype)


@pytest.mark.parametrize('dtype, ties', [
    (torch.float64, False), (torch.float64, True), (torch.float32, True)], ids=['distinct', 'ties', 'ties in float32'])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('B, Q, M, C, k', [
    (2, 20, 20, 5, 4), (3, 7, 31, 2, 31), (1, 1, 1, 3, 1), (5, 33, 9, 1, 8), (2, 40, 90, 3, 13)])
def test_knn_selects_what_the_definition_selects(chunk_bytes, least_columns, B, Q, M, C, k, metric, dtype, ties):
    if ties and metric == 'cosine' and C > 1:  # norms of 1 keep cosine scores exact: at most one channel alive
        query, candidates = (tokens(B, n, C, ties=True) * torch.eye(C, dtype=torch.float64)[torch.arange(n) % C]
                             for n in (Q, M))
    else:
        query, candidates = tokens(B, Q, C, ties=ties), tokens(B, M, C, seed=1, ties=ties)
    query, candidates = query.to(dtype), candidates.to(dtype)
    exclude = torch.arange(Q) % (M + 1) - 1 if M > 1 else None
    index, score = knn(query, candidates, k, metric, exclude)
    expected_index, expected_score = reference.knn(query, candidates, k, metric, exclude)
    assert torch.equal(index, expected_index)
    torch.testing.assert_close(score, expected_score, rtol=1e-12, atol=1e-12)
    if ties and M > 20:  # the case is worth its name
        assert (score[..., 1:] == score[..., :-1]).any()


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


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
@pytest.mark.parametrize('M', [20, 300])
def test_knn_index_is_that_of_knn(chunk_bytes, least_columns, by_convolution, M, metric, dtype):
    query, candidates = tokens(3, 20, 100, dtype=dtype), tokens(3, M, 100, seed=1, dtype=dtype)
    query[:, 0], query[:, 1] = 0, query[:, 1] * 1e-14  # too short to have a direction
    candidates[:, 5:7] = candidates[:, 7:8]
    query.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(kept.append, lambda tensor: tensor):
        index = knn_index(query, candidates, 9, metric, torch.arange(20))
    assert torch.equal(index, knn(query, candidates, 9, metric, torch.arange(20))[0]) and not kept
    if metric == 'cosine':
        assert (index[:, 0] == torch.arange(1, 10)).all() and (index[:, 1] == torch.tensor([0, *range(2, 10)])).all()


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_knn_of_narrow_dtypes_ranks_in_float32(dtype):
    query, candidates = tokens(2, 15, 6, dtype=dtype) * 300, tokens(2, 40, 6, seed=1, dtype=dtype) * 300
    for metric in 'cosine', 'euclidean':  # squares of 300 overflow float16
        index, score = knn(query, candidates, 9, metric)
        expected = reference.knn(query.double(), candidates.double(), 9, metric)
        assert score.dtype == torch.float32 and torch.equal(index, expected[0])
        torch.testing.assert_close(score.double(), expected[1], rtol=1e-4, atol=1e-5)


@pytest.fixture
def float32_precision():
    """How a program lets float32 matrices be multiplied; as before after the test."""
    before = torch.get_float32_matmul_precision()
    yield torch.backends.cuda.matmul, torch.backends.mkldnn.matmul
    torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize('allowed', ['highest', 'high', 'medium'])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_knn_ranks_in_full_precision_whatever_the_program_allows(float32_precision, monkeypatch, metric, allowed):
    query, candidates = tokens(2, 200, 64, dtype=torch.float32), tokens(2, 200, 64, seed=1, dtype=torch.float32)
    expected = reference.knn(query.double(), candidates.double(), 9, metric)[0]
    torch.set_float32_matmul_precision(allowed)

    def found():
        return [backend.fp32_precision for backend in float32_precision]

    def product(*args, multiply=torch.bmm, **kwargs):  # for processors that do not know how to multiply with fewer bits
        assert found() == ['ieee', 'ieee']
        return multiply(*args, **kwargs)

    before = found()
    monkeypatch.setattr(torch, 'bmm', product)
    assert torch.equal(knn_index(query, candidates, 9, metric), expected)
    assert found() == before and torch.get_float32_matmul_precision() == allowed


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


def test_knn_ties_go_to_the_lower_index(by_convolution, chunk_bytes):
    """All candidates equal, then all zero (a dead ReLU map), in each dtype and at a size where topk has no order."""
    for value in 1., 0.:
        for dtype in torch.float32, torch.float64, torch.bfloat16:
            index, _ = knn(torch.full((1, 300, 8), value, dtype=dtype), torch.full((1, 300, 8), value, dtype=dtype), 9)
            assert torch.equal(index, torch.arange(9).expand(1, 300, 9))
    exclude = torch.arange(300)
    index, _ = knn(torch.ones(1, 300, 8), torch.ones(1, 300, 8), 8, exclude=exclude)
    assert torch.equal(index[0, 4], torch.tensor([0, 1, 2, 3, 5, 6, 7, 8]))


@pytest.mark.parametrize('M', [50, 200])
@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_knn_ranks_what_is_hardly_a_number_as_the_definition_does(by_convolution, chunk_bytes, metric, M):
    query, candidates = tokens(2, 12, 4, dtype=torch.float32), tokens(2, M, 4, dtype=torch.float32, seed=1)
    for i, value in enumerate((torch.nan, torch.inf, -torch.inf, 1e30, -1e30, 1e-30)):
        candidates[:, 7 * i + 1, i % 4] = value
    candidates[:, 3] = torch.inf
    candidates[:, 4:6] = torch.nan
    query[0, 1] *= 1e-14  # too short and too long to have a direction
    query[1, 2] *= 1e25
    query[0, 3], query[1, 4, 2] = torch.nan, torch.nan
    index, score = knn(query, candidates, M, metric)
    expected, expected_score = reference.knn(query, candidates, M, metric)
    usual = expected_score.isfinite().any(-1) if metric == 'euclidean' else torch.ones(2, 12, dtype=torch.bool)
    assert usual.sum() >= 21  # a query that is infinitely far from all has no order of them
    assert torch.equal(index[usual], expected[usual]) and index.sort().values.eq(torch.arange(M)).all()
    torch.testing.assert_close(score[usual], expected_score[usual], rtol=1e-4, atol=1e-5, equal_nan=True)


def huge(case, M, dtype):
    """Tokens (2, M, 4) whose squares float32 cannot hold, some or all of them."""
    x = tokens(2, M, 4)
    if case == 'all':
        x *= 1e20
    elif case == 'infinite distances':  # too coarse for finite ones
        x *= 1e37
    elif case == 'groups':  # near each other, but far from 0
        x[:, ::2] = 1e20 * (1 + x[:, ::2] / 20)
    elif case == 'products':  # squares fit, twice their products do not
        x = 1e19 + 3e18 * x
    elif case == 'outliers':
        x[:, 3], x[:, 5] = 1e30, -1e30
    elif case == 'infinite':
        x[:, 2:10] = torch.inf
    return x.to(dtype)


@pytest.mark.parametrize('backend', ['torch', 'onnx'])
@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('M', [20, 200])
@pytest.mark.parametrize('case', ['all', 'infinite distances', 'groups', 'products', 'outliers', 'infinite'])
def test_knn_takes_the_excluded_candidate_last(least_columns, backend, case, M, dtype):
    """Also where squares overflow, be it those of all others."""
    x, own = huge(case, M, dtype), torch.arange(M)
    for metric in 'cosine', 'euclidean':
        for index in knn(x, x, M, metric, own, backend)[0], reference.knn(x.float(), x.float(), M, metric, own)[0]:
            assert (index[..., -1] == own).all()
        assert not (knn(x, x, M - 1, metric, own, backend)[0] == own.unsqueeze(1)).any()


@pytest.mark.parametrize('backend', ['torch', 'onnx'])
@pytest.mark.parametrize('case', ['all', 'groups', 'products'])
def test_euclidean_knn_selects_as_without_an_overflow(chunk_bytes, least_columns, backend, case):
    x, own = huge(case, 40, torch.float32), torch.arange(40)
    index, score = knn(x, x, 9, 'euclidean', own, backend)
    expected, expected_score = reference.knn(x.double(), x.double(), 9, 'euclidean', own)
    assert torch.equal(index, expected) and torch.equal(knn_index(x, x, 9, 'euclidean', own, backend), index)
    torch.testing.assert_close(score, expected_score.float(), rtol=1e-3, atol=1e-3)  # -inf where float32 ends
    usual, grads = expected_score.float().isfinite(), []
    for find, x in (partial(knn, backend=backend), x), (reference.knn, x.double()):
        x.requires_grad_()
        find(x, x, 9, 'euclidean', own)[1][usual].sum().backward()
        grads.append(x.grad.double())
    assert usual.any() == (case != 'all')
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-3 * float(grads[1].abs().max()))


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_knn_takes_any_memory_layout(metric):
    query, candidates = tokens(3, 5, 20).mT, tokens(1, 30, 10)[:, ::2, ::2].expand(3, -1, -1)
    index, score = knn(query, candidates, 4, metric)
    expected = knn(query.contiguous(), candidates.contiguous(), 4, metric)
    assert torch.equal(index, expected[0])
    torch.testing.assert_close((index, score), reference.knn(query, candidates, 4, metric), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
def test_knn_score_has_the_gradient_of_the_definition(chunk_bytes, metric):
    def grads(fn):
        query, candidates = tokens(2, 9, 3).requires_grad_(), tokens(2, 12, 3, seed=1).requires_grad_()
        _, score = fn(query, candidates, 4, metric)
        (score * torch.arange(score.numel()).view_as(score)).sum().backward()
        return query.grad, candidates.grad

    torch.testing.assert_close(grads(knn), grads(reference.knn), rtol=1e-10, atol=1e-10)


def test_knn_gives_zero_vectors_score_zero_without_gradient():
    query, candidates = tokens(1, 3, 4), tokens(1, 5, 4, seed=1)
    query[0, 1] = candidates[0, 2] = 0
    query.requires_grad_(), candidates.requires_grad_()
    index, score = knn(query, candidates, 5)
    (score * torch.arange(1, 6)).sum().backward()
    assert (score[0, 1] == 0).all() and (score[0][index[0] == 2] == 0).all()
    assert (query.grad[0, 1] == 0).all() and (candidates.grad[0, 2] == 0).all()
    assert (query.grad[0, 0] != 0).all()


@pytest.mark.parametrize('args, message', [
    (dict(metric='manhattan'), 'unknown metric .*cosine, euclidean'),
    (dict(k=0), r'k must lie in \[1, 6\]'),
    (dict(k=7), r'k must lie in \[1, 6\]'),
    (dict(query=torch.ones(2, 6, 5)), r'knn takes query \(B, Q, C\)'),
    (dict(query=torch.ones(1, 6, 3)), r'knn takes query \(B, Q, C\)'),
    (dict(exclude=torch.zeros(1).long()), r'exclude names one candidate for each of 6 queries, but is \(1,\)'),
    (dict(query=torch.ones(2, 6, 3).double()), r'of one dtype, not torch.float64 and torch.float32'),
])
@pytest.mark.parametrize('select', [knn, knn_index])
def test_knn_refuses(select, args, message):
    with pytest.raises(ValueError, match=message):
        select(**{'query': torch.ones(2, 6, 3), 'candidates': torch.ones(2, 6, 3), 'k': 2, **args})


@pytest.mark.parametrize('offset', [0, 100, 10000])
def test_euclidean_knn_does_not_depend_on_where_the_features_lie(offset):
    x = tokens(2, 64, 8).mul(2 ** 10).round().div(2 ** 10) + offset  # numbers that float32 holds with the offset
    index, score = knn(x.float(), x.float(), 9, 'euclidean')
    expected, expected_score = reference.knn(x.double(), x.double(), 9, 'euclidean')
    assert torch.equal(index, expected)
    torch.testing.assert_close(score.double(), expected_score, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize('place', [0, 32, 50, 63])
@pytest.mark.parametrize('value', [1e2, 1e4])
def test_euclidean_knn_does_not_depend_on_an_outlier(place, value):
    x = tokens(1, 64, 8, dtype=torch.float32)
    x[0, place] = value
    assert torch.equal(knn(x, x, 9, 'euclidean')[0], reference.knn(x.double(), x.double(), 9, 'euclidean')[0])


def test_euclidean_knn_depends_neither_on_an_outlier_nor_on_where_the_others_lie():
    x = tokens(1, 64, 8).mul(2 ** 10).round().div(2 ** 10) + 10000
    x[0, 0] = 1e6
    index, expected = knn(x.float(), x.float(), 9, 'euclidean')[0], reference.knn(x, x, 9, 'euclidean')[0]
    assert torch.equal(index[:, 1:], expected[:, 1:])


def test_knn_orders_ties_whatever_the_default_dtype(monkeypatch):
    candidates = torch.zeros(1, 1027, 1)
    candidates[0, -4:, 0] = torch.tensor([1., 2., 3., 4.])
    expected = knn(torch.tensor([[[2.]]]), candidates, 6, 'euclidean')[0]
    try:
        torch.set_default_dtype(torch.bfloat16)
        assert torch.equal(knn(torch.tensor([[[2.]]]).float(), candidates, 6, 'euclidean')[0], expected)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize('size, k', [
    (size, k) for size in [(7,), (1, 1), (1, 9), (5, 8), (10, 3), (12, 12)] for k in [1, 2, 5, 9, 20, 25, 49]
    if k <= torch.Size(size).numel()])
def test_grid_neighbors_selects_what_the_definition_selects(chunk_bytes, size, k):
    total = torch.Size(size).numel()
    everywhere = reference.grid_neighbors(size, k)
    assert torch.equal(grid_neighbors(size, k), everywhere)
    some = torch.arange(total).view(size)[tuple(slice(n // 3, n - n // 4, 2) for n in size)].flatten()
    starts, stops = tuple(n // 3 for n in size), tuple(n - n // 4 for n in size)
    assert torch.equal(grid_neighbors(size, k, starts, 2, stops), everywhere[some])


@pytest.mark.parametrize('B, T, C, O, Q, K, groups', [
    (2, 12, 4, 6, 5, 3, 1), (3, 4, 4, 6, 25, 3, 1), (1, 30, 3, 2, 30, 9, 1), (3, 9, 6, 6, 9, 4, 6),
    (2, 9, 6, 4, 7, 4, 2), (2, 8, 1, 1, 3, 1, 1), (2, 5, 7, 17, 6, 3, 1)])
@pytest.mark.parametrize('scored', [False, True])
def test_neighbor_conv_computes_what_the_definition_computes(chunk_bytes, order, B, T, C, O, Q, K, groups, scored):
    def run(fn):
        x, weight = tokens(B, T, C).requires_grad_(), tokens(O, C // groups, K, seed=1).requires_grad_()
        bias, score = tokens(O, seed=2).requires_grad_(), tokens(B, Q, K, seed=3).requires_grad_()
        index = torch.randint(T, (B, Q, K), generator=torch.Generator().manual_seed(4))
        y = fn(x, index, weight, bias, score if scored else None, groups)
        y.backward(tokens(*y.shape, seed=5))
        return [y, x.grad, weight.grad, bias.grad] + [score.grad] * scored

    torch.testing.assert_close(run(neighbor_conv), run(reference.neighbor_conv), rtol=1e-11, atol=1e-11)


def test_neighbor_conv_gradcheck(order):
    index = torch.randint(6, (2, 4, 3), generator=torch.Generator().manual_seed(0))
    for groups in 1, 2, 4:
        inputs = [tokens(2, 6, 4), index, tokens(4, 4 // groups, 3, seed=1), tokens(4, seed=2), tokens(2, 4, 3, seed=3)]
        inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        assert torch.autograd.gradcheck(lambda *t: neighbor_conv(*t, groups), inputs)


@pytest.mark.parametrize('groups', [1, 2, 4])
@pytest.mark.parametrize('learning', [('x',), ('weight',), ('bias',), ('score',), ('x', 'score'), ('weight', 'bias')])
def test_neighbor_conv_gives_gradients_to_what_learns_only(order, learning, groups):
    """Those of the definition; nothing else is computed."""
    asked = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, op, types, args=(), kwargs=None):
            if op is torch.ops.convnn_timm.neighbor_conv_backward.default:
                asked.append(args[6:8])
            return op(*args, **kwargs or {})

    def run(fn):
        inputs = dict(
            x=tokens(2, 6, 4), weight=tokens(4, 4 // groups, 3, seed=1), bias=tokens(4, seed=2),
            score=tokens(2, 5, 3, seed=3))
        for name in learning:
            inputs[name].requires_grad_()
        index = torch.randint(6, (2, 5, 3), generator=torch.Generator().manual_seed(4))
        y = fn(inputs['x'], index, inputs['weight'], inputs['bias'], inputs['score'], groups)
        with Watch():
            y.backward(tokens(*y.shape, seed=5))
        return [inputs[name].grad for name in learning]

    torch.testing.assert_close(run(neighbor_conv), run(reference.neighbor_conv), rtol=1e-11, atol=1e-11)
    assert asked == ([('x' in learning, 'weight' in learning)] if learning != ('bias',) else [])


@pytest.mark.parametrize('scored', [False, True])
def test_neighbor_conv_backward_returns_what_is_asked_for(order, scored):
    x, weight, grad = tokens(2, 6, 4), tokens(5, 4, 3), tokens(2, 5, 5, seed=1)
    index, score = torch.randint(6, (2, 5, 3)), tokens(2, 5, 3) if scored else None
    all_of_them = torch.ops.convnn_timm.neighbor_conv_backward(grad, x, index, weight, score, 1, True, True)
    assert [t.numel() for t in all_of_them] == [x.numel(), weight.numel(), index.numel() * scored]
    for asked in (False, True), (True, False), (False, False):
        some = torch.ops.convnn_timm.neighbor_conv_backward(grad, x, index, weight, score, 1, *asked)
        for found, expected, wanted in zip(some, all_of_them, (*asked, True)):
            assert torch.equal(found, expected) if wanted else found.numel() == 0


def test_neighbor_conv_takes_any_memory_layout(order):
    x, index = tokens(2, 4, 10).mT, torch.randint(10, (1, 10, 3)).expand(2, -1, -1)
    weight = tokens(3, 5, 4).permute(2, 0, 1)[:, :, :3].mT.mT.reshape(4, 3, 3)[:, :1].expand(4, 4, 3)
    torch.testing.assert_close(neighbor_conv(x, index, weight), reference.neighbor_conv(x, index, weight))


def test_neighbor_conv_under_autocast_computes_like_a_convolution(order):
    x, index, weight = tokens(2, 9, 4, dtype=torch.float32), torch.randint(9, (2, 9, 3)), torch.randn(5, 4, 3)
    x.requires_grad_()
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = neighbor_conv(x, index, weight, torch.zeros(5))
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), reference.neighbor_conv(x, index, weight), rtol=0.05, atol=0.1)
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_ops_have_rules_of_autocast_of_their_own():
    """A network that was exported without autocast calls them with whatever dtypes there are."""
    x, weight = tokens(2, 9, 4, dtype=torch.float32), tokens(5, 4, 3, dtype=torch.float32)
    index, half = torch.randint(9, (2, 9, 3)), x.bfloat16()
    ops = torch.ops.convnn_timm
    with torch.autocast('cpu', dtype=torch.bfloat16):
        y = ops.neighbor_conv(x, index, weight, None, None, 1)
        assert torch.equal(ops.neighbor_conv(half, index, weight, None, None, 1), y)
        assert ops.neighbor_conv(x.half(), index, weight, None, None, 1).dtype == torch.bfloat16
        score, place = ops.knn(half, x, None, None, 3)
        assert ops.neighbor_conv(x.double(), index, weight.double(), None, None, 1).dtype == torch.float64
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close((score, place), ops.knn(half.float(), x, None, None, 3), rtol=0, atol=0)
    for key in 'AutocastCUDA', 'AutocastMPS', 'AutocastXPU':  # of machines that are not here
        for op in 'knn', 'neighbor_conv':
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f'convnn_timm::{op}', key)


def test_neighbor_conv_in_float16_holds_sums_whose_parts_it_could_not():
    x = torch.full((1, 4, 4), 200., dtype=torch.float16)
    weight = torch.tensor([100., -99.], dtype=torch.float16).expand(1, 4, 2)
    y = neighbor_conv(x, torch.zeros(1, 64, 2, dtype=torch.int64), weight)
    assert (y == 800).all()


def test_backward_keeps_inputs_and_selected_scores_only(order):
    """No gathered tokens, no score of every query with every candidate."""
    kept = []

    def keep(tensor):
        kept.append(tensor)
        return tensor

    x, weight, bias = tokens(2, 60, 8).requires_grad_(), tokens(4, 8, 5).requires_grad_(), tokens(4).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        index, score = knn(x, x, 5)
        assert kept and max(tensor.numel() for tensor in kept) == x.numel()
        kept.clear()
        neighbor_conv(x, index, weight, bias, score)
    assert {tensor.data_ptr() for tensor in kept} == {tensor.data_ptr() for tensor in (x, index, weight, score)}


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


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize('scored', [False, True])
@pytest.mark.parametrize('groups', [1, 8])
def test_neighbor_conv_in_narrow_dtypes(order, by_convolution, dtype, scored, groups):
    """One rounding more than the definition at most."""
    def run(fn, dtype):
        inputs = tokens(2, 6, 8), tokens(8, 8 // groups, 4, seed=1) / 4, tokens(8), tokens(2, 300, 4, seed=3) / 8
        x, weight, bias, score = [t.to(narrow).to(dtype).requires_grad_() for t in inputs]
        index = torch.randint(6, (2, 300, 4), generator=torch.Generator().manual_seed(4))
        y = fn(x, index, weight, bias, score if scored else None, groups)
        y.backward(tokens(*y.shape, seed=5).to(narrow).to(dtype))
        return [y, x.grad, weight.grad] + [score.grad] * scored

    narrow = dtype
    for ours, exact in zip(run(neighbor_conv, dtype), run(reference.neighbor_conv, torch.float64)):
        assert ours.dtype == dtype
        scale = exact.abs().amax()
        assert (ours.double() - exact).abs().amax() < 4 * torch.finfo(dtype).eps * scale


def test_neighbor_conv_in_bfloat16_holds_sums_of_thousands(order, monkeypatch):
    """Over many chunks; 256 + 1 is 256 in bfloat16."""
    monkeypatch.setattr(_common, 'CHUNK_BYTES', 64)
    x, weight = (torch.ones(shape, dtype=torch.bfloat16, requires_grad=True) for shape in ((4, 2, 2), (2, 2, 2)))
    neighbor_conv(x, torch.zeros(4, 1000, 2, dtype=torch.int64), weight).sum().backward()
    torch.testing.assert_close(weight.grad.float(), torch.full((2, 2, 2), 4000.), rtol=0.01, atol=0)
    torch.testing.assert_close(x.grad[:, 0].float(), torch.full((4, 2), 4000.), rtol=0.01, atol=0)


def test_neighbor_conv_takes_the_scores_that_knn_gives(order):
    """In float32, whatever the tokens are."""
    x, weight = tokens(2, 9, 4, dtype=torch.bfloat16), tokens(5, 4, 3, dtype=torch.bfloat16)
    index, score = knn(x, x, 3)
    y = neighbor_conv(x, index, weight, None, score)
    expected = reference.neighbor_conv(x.float(), index, weight.float(), None, score)
    assert y.dtype == torch.bfloat16 and score.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


def test_a_backward_pass_inside_autocast_is_that_outside(order):
    def gradients(inside):
        x, weight = (tokens(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 9, 4), (5, 4, 3)))
        index, score = knn(x, x, 3)
        y = neighbor_conv(x, index, weight, None, score)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=inside):
            y.square().sum().backward()
        return x.grad, weight.grad

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_neighbor_conv_gives_the_same_numbers_each_time(order, by_convolution):
    x, weight, score = torch.randn(4, 50, 16), torch.randn(8, 16, 5), torch.rand(4, 200, 5)
    index = torch.randint(50, (4, 200, 5))
    runs = []
    for _ in range(3):
        inputs = [t.clone().requires_grad_() for t in (x, weight, score)]
        y = neighbor_conv(inputs[0], index, inputs[1], None, inputs[2])
        y.square().sum().backward()
        runs.append([y, *(t.grad for t in inputs)])
    for run in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(run, runs[0]))


@pytest.mark.parametrize('T, Q, C, O, first', [
    (64, 1024, 64, 64, True), (64, 64, 256, 128, True),  # few candidates; outputs fewer than inputs
    (1032, 1024, 64, 64, False), (1032, 256, 64, 128, False),  # as many tokens as queries; strided
    (50176, 50176, 64, 8, False),  # products that would not fit a chunk
])
def test_multiplies_first_where_that_is_less_work(T, Q, C, O, first):
    x, index, weight = (torch.empty(s, device='meta') for s in ((1, T, C), (1, Q, 8), (O, C, 8)))
    assert aggregation.multiplies_first(x, index, weight) == first


@settings(max_examples=80, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_shape(data):
    """Selection, then aggregation over what was selected, for shapes that nobody thought of; ties included."""
    B, Q, M, C, O = (data.draw(st.integers(1, n), name) for name, n in zip('BQMCO', (3, 40, 40, 9, 5)))
    K = data.draw(st.integers(1, M), 'K')
    metric = data.draw(st.sampled_from(['cosine', 'euclidean']), 'metric')
    ties, own = data.draw(st.booleans(), 'ties'), data.draw(st.booleans(), 'exclude')
    C = 1 if ties and metric == 'cosine' else C  # else the same cosine comes out with another last bit
    query, candidates = tokens(B, Q, C, ties=ties), tokens(B, M, C, seed=1, ties=ties)
    exclude = torch.arange(Q).remainder(M + 1) - 1 if own else None

    index, score = knn(query, candidates, K, metric, exclude)
    expected, expected_score = reference.knn(query, candidates, K, metric, exclude)
    assert torch.equal(index, expected)
    torch.testing.assert_close(score, expected_score, rtol=1e-11, atol=1e-11)

    def run(fn):
        x, weight = candidates.clone().requires_grad_(), tokens(O, C, K, seed=2).requires_grad_()
        y = fn(x, index, weight)
        y.backward(tokens(*y.shape, seed=3))
        return y, x.grad, weight.grad

    torch.testing.assert_close(run(neighbor_conv), run(reference.neighbor_conv), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize('weight, message', [
    (torch.ones(4, 3, 3), r'weight \(4, 3, 3\) with 1 groups does not fit x \(2, 9, 4\)'),
    (torch.ones(4, 4, 2), r'does not fit x'),
])
def test_neighbor_conv_refuses(weight, message):
    with pytest.raises(ValueError, match=message):
        neighbor_conv(torch.ones(2, 9, 4), torch.zeros(2, 9, 3, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r'takes x \(B, T, C\)'):
        neighbor_conv(torch.ones(9, 4), torch.zeros(2, 9, 3, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match=r'takes x \(B, T, C\)'):
        neighbor_conv(torch.ones(1, 9, 4), torch.zeros(2, 9, 3, dtype=torch.int64), weight)
    with pytest.raises(ValueError, match='with 2 groups does not fit'):
        neighbor_conv(torch.ones(2, 9, 4), torch.zeros(2, 9, 3, dtype=torch.int64), torch.ones(5, 2, 3), groups=2)


def test_neighbor_conv_refuses_a_score_of_another_shape():
    index = torch.zeros(2, 9, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r'score \(2, 3, 9\) must have the shape of index, \(2, 9, 3\)'):
        neighbor_conv(torch.ones(2, 9, 4), index, torch.ones(6, 4, 3), score=torch.ones(2, 3, 9))


@pytest.mark.parametrize('k', [0, 5])
def test_grid_neighbors_refuses(k):
    with pytest.raises(ValueError, match=rf'k must lie in \[1, 4\], the number of positions, but is {k}'):
        grid_neighbors((2, 2), k)


def test_a_second_derivative_is_refused():
    x, index = tokens(2, 6, 4).requires_grad_(), torch.randint(6, (2, 5, 3))
    for y in knn(x, x, 3)[1], neighbor_conv(x, index, tokens(6, 4, 3).requires_grad_()):
        grad, = torch.autograd.grad(y.square().sum(), x, create_graph=True)
        with pytest.raises(RuntimeError, match='ConvNN layers have a first derivative only'):
            grad.sum().backward()


@pytest.mark.parametrize('op, arguments', [
    ('knn', (tokens(2, 5, 4), tokens(2, 6, 4), 3)),
    ('neighbor_conv', (
        tokens(2, 6, 4), torch.ones(2, 5, 3, dtype=torch.int64), tokens(6, 4, 3), tokens(6), tokens(2, 5, 3))),
])
def test_forward_mode_is_refused(op, arguments):
    for place, argument in enumerate(arguments):
        if not isinstance(argument, torch.Tensor) or not argument.is_floating_point():
            continue

        def change(module):
            def of(x):
                y = getattr(module, op)(*arguments[:place], x, *arguments[place + 1:])
                return y[1] if op == 'knn' else y
            return torch.func.jvp(of, (argument,), (argument.flip(-1),))[1]

        with pytest.raises(RuntimeError, match='ConvNN layers have derivatives in reverse mode only'):
            change(convnn_timm.ops)
        assert change(reference).abs().sum() > 0.1


def of_selected(ops):
    """Functions of tokens through each op, and through both."""
    index = torch.randint(6, (2, 5, 3), generator=torch.Generator().manual_seed(0))
    weight, bias = tokens(6, 4, 3, seed=1), tokens(6, seed=2)

    def both(x, metric):
        index, score = ops.knn(x, x, 3, metric, torch.arange(6))
        return ops.neighbor_conv(x, index, weight, bias, score)

    return [
        lambda x: ops.knn(x, x, 3)[1], lambda x: ops.neighbor_conv(x, index, weight, bias),
        lambda x: both(x, 'cosine'), lambda x: both(x, 'euclidean')]


@pytest.mark.parametrize('transform', [
    lambda f: torch.func.grad(lambda x: f(x).square().sum()),
    lambda f: lambda x: torch.func.vjp(f, x)[1](torch.ones_like(f(x)))[0],
    lambda f: torch.func.jacrev(f),
    lambda f: lambda x: torch.vmap(f)(torch.stack([x, 2 * x, x.flip(1)])),
    lambda f: lambda x: torch.vmap(torch.func.grad(lambda x: f(x).square().sum()))(torch.stack([x, x.flip(1)])),
], ids=['grad', 'vjp', 'jacrev', 'vmap', 'vmap of grad'])
@pytest.mark.parametrize('which', range(4), ids=['knn', 'neighbor_conv', 'both by cosine', 'both by distance'])
def test_transforms_of_torch_func_go_through(transform, which):
    x = tokens(2, 6, 4)
    found, expected = (transform(of_selected(ops)[which])(x) for ops in (convnn_timm.ops, reference))
    assert expected.abs().sum() > 0.1
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('op', range(2))
def test_second_derivatives_of_torch_func_are_refused(op):
    f = of_selected(convnn_timm.ops)[op]
    first = torch.func.grad(lambda x: f(x).square().sum())
    with pytest.raises(RuntimeError, match='ConvNN layers have a first derivative only'):
        torch.func.grad(lambda x: first(x).sum())(tokens(2, 6, 4))
    with pytest.raises(RuntimeError, match='ConvNN layers have derivatives in reverse mode only'):
        torch.func.hessian(lambda x: f(x).square().sum())(tokens(2, 6, 4))


def test_ops_pass_pytorchs_own_checks():
    """Schema, fake kernels, autograd registration and tracing, by torch.library.opcheck."""
    x, index = tokens(2, 6, 4).requires_grad_(), torch.randint(6, (2, 5, 3))
    torch.library.opcheck(torch.ops.convnn_timm.knn, (x, x.detach(), None, torch.arange(6), 3))
    torch.library.opcheck(torch.ops.convnn_timm.knn, (x, x.detach(), torch.zeros(2, 6, dtype=x.dtype), None, 3))
    torch.library.opcheck(
        torch.ops.convnn_timm.neighbor_conv,
        (x, index, tokens(6, 2, 3).requires_grad_(), tokens(6).requires_grad_(), tokens(2, 5, 3).requires_grad_(), 2))
    torch.library.opcheck(  # of frozen inputs
        torch.ops.convnn_timm.neighbor_conv, (x.detach(), index, tokens(6, 4, 3).requires_grad_(), None, None, 1))
    torch.library.opcheck(torch.ops.convnn_timm.neighbor_conv, (x, index, tokens(6, 4, 3), None, None, 1))
