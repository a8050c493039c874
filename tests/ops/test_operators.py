"""Both ops together, and as operators of PyTorch: autograd, autocast, torch.func, torch.library's checks."""
import pytest
import torch
from hypothesis import given, settings, strategies as st

import convnn_timm.ops
from convnn_timm.ops import knn, neighbor_conv, reference
from random_tokens import tokens


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


def test_neighbor_conv_takes_the_scores_that_knn_gives(order):
    """In float32, whatever the tokens are."""
    x, weight = tokens(2, 9, 4, dtype=torch.bfloat16), tokens(5, 4, 3, dtype=torch.bfloat16)
    index, score = knn(x, x, 3)
    y = neighbor_conv(x, index, weight, None, score)
    expected = reference.neighbor_conv(x.float(), index, weight.float(), None, score)
    assert y.dtype == torch.bfloat16 and score.dtype == torch.float32
    torch.testing.assert_close(y.float(), expected, rtol=0.05, atol=0.05)


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


def test_a_backward_pass_inside_autocast_is_that_outside(order):
    def gradients(inside):
        x, weight = (tokens(*shape, dtype=torch.float32).requires_grad_() for shape in ((2, 9, 4), (5, 4, 3)))
        index, score = knn(x, x, 3)
        y = neighbor_conv(x, index, weight, None, score)
        with torch.autocast('cpu', dtype=torch.bfloat16, enabled=inside):
            y.square().sum().backward()
        return x.grad, weight.grad

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


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
