"""knn, knn_index and grid_neighbors against their definitions: values, indices and gradients."""
from functools import partial

import pytest
import torch

from convnn_timm.ops import grid_neighbors, knn, knn_index, reference
from random_tokens import tokens


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


@pytest.mark.parametrize('k', [0, 5])
def test_grid_neighbors_refuses(k):
    with pytest.raises(ValueError, match=rf'k must lie in \[1, 4\], the number of positions, but is {k}'):
        grid_neighbors((2, 2), k)
