"""neighbor_conv against its definition: values and gradients."""
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from convnn_timm.ops import _common, neighbor_conv, reference
from random_tokens import tokens


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


def test_neighbor_conv_in_float16_holds_sums_whose_parts_it_could_not():
    x = torch.full((1, 4, 4), 200., dtype=torch.float16)
    weight = torch.tensor([100., -99.], dtype=torch.float16).expand(1, 4, 2)
    y = neighbor_conv(x, torch.zeros(1, 64, 2, dtype=torch.int64), weight)
    assert (y == 800).all()


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
