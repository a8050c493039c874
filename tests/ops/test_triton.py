"""The Triton kernels against the definitions: on the GPU if there is one, else in Triton's interpreter on the CPU.

Triton decides at its import whether it interprets, and timm imports it; so the interpreter gets a process of its own,
which runs the tests of TestKernels.
"""
import os
import subprocess
import sys

import pytest
import random_tokens
import torch

from convnn_timm import ops
from convnn_timm.ops import dispatch, reference

pytest.importorskip('triton', reason='triton is not installed')

INTERPRETED = dispatch.interpreting()
RUN_HERE = INTERPRETED or torch.cuda.is_available()
DEVICE = 'cpu' if INTERPRETED else 'cuda'


@pytest.mark.skipif(RUN_HERE, reason='the kernels run in this process')
def test_kernels_in_the_interpreter():
    done = subprocess.run(
        [sys.executable, '-m', 'pytest', '-q', '-n', '0', '-p', 'no:cacheprovider', f'{__file__}::TestKernels'],
        env={**os.environ, 'TRITON_INTERPRET': '1'}, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(INTERPRETED, reason='compiling needs a process without the interpreter')
@pytest.mark.parametrize('scored', [False, True])
@pytest.mark.parametrize('name', [
    'knn', '_forward', '_forward_depthwise', '_backward_input', '_backward_weight', '_backward_weight_depthwise'])
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path, name, scored):
    """What the interpreter accepts the compiler may not. Compiling for Hopper needs no GPU."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from convnn_timm.ops.triton import aggregation, selection

    monkeypatch.setenv('TRITON_CACHE_DIR', str(tmp_path))
    kernel = selection._knn if name == 'knn' else getattr(aggregation, name)
    types = {name: '*bf16' for name in ('x', 'matrix', 'bias', 'score', 'y', 'grad', 'grad_score')}
    types |= {'index': '*i64', 'exclude': '*i64', 'out': '*fp32', 'partial': '*fp32'}
    if name == 'knn':
        types |= {name: '*fp32' for name in ('query', 'candidates', 'offset', 'score')}
    optional = ('offset', 'exclude') if name == 'knn' else ('score', 'bias')
    config = kernel.configs[0]
    constants = {'KP': 16, 'BC': 32, 'BO': 64, 'DEPTHWISE': False, 'ATOMIC': scored, **config.kwargs}
    constants |= {} if scored else {name: None for name in optional}
    names = kernel.fn.arg_names
    constants = {name: value for name, value in constants.items() if name in names}
    signature = {name: 'constexpr' if name in constants else types.get(name, 'i32') for name in names}
    compiled = triton.compile(
        ASTSource(fn=kernel.fn, signature=signature, constexprs=constants), target=GPUTarget('cuda', 90, 32),
        options={'num_warps': config.num_warps, 'num_stages': config.num_stages})
    assert compiled.asm['cubin']


def tokens(*shape, **kwargs):
    return random_tokens.tokens(*shape, dtype=torch.float32, **kwargs).to(DEVICE)


def largest(query, candidates, offset, exclude, k):
    """Definition of the kernel: all scores in float64, sorted."""
    score = query.double() @ candidates.double().mT
    if offset is not None:
        score = score + offset.double().unsqueeze(1)
    rank = score
    if exclude is not None:
        excluded = exclude.unsqueeze(1) == torch.arange(score.shape[2], device=score.device)
        rank = score.masked_fill(excluded, -torch.inf)
    index = rank.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return score.gather(-1, index), index


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


class TestKernels:
    __test__ = RUN_HERE

    def check_knn(self, *args):
        from convnn_timm.ops.triton.selection import knn

        (score, index), (expected_score, expected_index) = knn(*args), largest(*args)
        assert torch.equal(index, expected_index)
        torch.testing.assert_close(score.double(), expected_score, rtol=1e-5, atol=1e-5, equal_nan=True)
        return index

    @pytest.mark.parametrize('extras, ties', [
        ((), True), (('offset',), False), (('exclude',), False), (('offset', 'exclude'), True)])
    @pytest.mark.parametrize('B, Q, M, C, k', [
        (2, 19, 21, 5, 4),     # nothing is a multiple of a tile
        (1, 32, 32, 33, 9),    # several blocks of channels
        (2, 3, 17, 2, 17),     # all candidates: the excluded one too
        (1, 6, 6, 33, 6),      # both
        (1, 1, 1, 3, 1),
    ])
    def test_knn_selects_the_largest(self, B, Q, M, C, k, extras, ties):
        query, candidates = tokens(B, Q, C, ties=ties), tokens(B, M, C, seed=1, ties=ties)
        offset = tokens(B, M, seed=2, ties=ties) if 'offset' in extras else None
        exclude = (torch.arange(Q, device=DEVICE) % (M + 1) - 1) if 'exclude' in extras else None
        self.check_knn(query, candidates, offset, exclude, k)

    def test_knn_keeps_up_to_64(self):
        self.check_knn(tokens(1, 2, 3, ties=True), tokens(1, 70, 3, seed=1, ties=True), None, None, 64)

    def test_knn_gives_ties_to_the_lower_index(self):
        """All candidates equal, all dead, and equal but for the sign of zero."""
        from convnn_timm.ops.triton.selection import knn

        tiny = torch.full((1, 40, 1), 1e-30, device=DEVICE)  # products underflow to 0 and -0
        sign = torch.tensor([1., -1.], device=DEVICE).repeat(20).view(1, 40, 1)
        for query, candidates in (tiny.sign(), tiny.sign()), (tiny, 0 * tiny), (tiny, tiny * sign):
            index = knn(query[:, :5], candidates, None, torch.arange(5, device=DEVICE), 4)[1]
            assert index[0, 1].tolist() == [0, 2, 3, 4] and index[0, 4].tolist() == [0, 1, 2, 3]

    def test_knn_puts_nan_first_and_infinities_at_their_ends(self):
        query, candidates = tokens(2, 5, 2), tokens(2, 20, 2, seed=1)
        candidates[0, [3, 17]] = float('nan')
        candidates[1, 4], candidates[1, 18] = float('inf'), float('-inf')
        query[0, 2] = float('nan')
        index = self.check_knn(query, candidates, None, torch.arange(5, device=DEVICE), 6)
        assert index[0, 0, :2].tolist() == [3, 17] and index[0, 2].tolist() == [0, 1, 3, 4, 5, 6]

    def test_knn_takes_any_memory_layout(self):
        exclude = torch.arange(12, device=DEVICE)[::2]
        self.check_knn(tokens(2, 4, 6).mT, tokens(2, 4, 9).mT, tokens(9, 2).T, exclude, 3)

    def test_knn_takes_the_excluded_candidate_last_where_squares_overflow(self):
        x, own = 1e20 * tokens(1, 20, 4), torch.arange(20, device=DEVICE)
        index = ops.knn(x, x, 20, 'euclidean', own, backend='triton')[0]
        assert torch.equal(index, reference.knn(x.double(), x.double(), 20, 'euclidean', own)[0])

    @staticmethod
    def run_neighbor_conv(B, T, C, O, Q, K, groups, dtype, scored, biased):
        """Kernels and the definition in float64 on the same inputs: output, gradients to x, weight and score."""
        from convnn_timm.ops.triton.aggregation import neighbor_conv, neighbor_conv_backward

        x, weight = tokens(B, T, C).to(dtype), tokens(O, C // groups, K, seed=1).to(dtype)
        bias = tokens(O, seed=2).to(dtype) if biased else None
        score = tokens(B, Q, K, seed=3).to(dtype) if scored else None
        grad = tokens(B, Q, O, seed=4).to(dtype)
        index = torch.randint(T, (B, Q, K), generator=torch.Generator().manual_seed(5)).to(DEVICE)
        found = [neighbor_conv(x, index, weight, bias, score, groups)]
        grad_x, grad_weight, grad_score = neighbor_conv_backward(grad, x, index, weight, score, groups, True, True)
        found += [grad_x, grad_weight.mT] + [grad_score] * scored

        x, weight, score, bias = (
            None if t is None else t.double().requires_grad_() for t in (x, weight, score, bias))
        expected = reference.neighbor_conv(x, index, weight, bias, score, groups)
        inputs = [x, weight] + [score] * scored
        return found, [expected.detach(), *torch.autograd.grad(expected, inputs, grad.double())]

    @pytest.mark.parametrize('scored', [False, True], ids=['plain', 'scored'])
    @pytest.mark.parametrize('dtype, tolerance, B, T, C, O, Q, K, groups', [
        (torch.float32, 1e-5, 2, 12, 4, 6, 5, 3, 1),
        (torch.float32, 1e-5, 1, 1, 1, 1, 1, 1, 1),
        *((dtype, tolerance, 2, 9, 18, outputs, 19, 2, groups)  # several blocks of queries, channels and outputs
          for dtype, tolerance in ((torch.float32, 1e-5), (torch.float16, 1e-2), (torch.bfloat16, 6e-2))
          for outputs, groups in ((20, 1), (18, 18))),
    ])
    def test_neighbor_conv(self, monkeypatch, B, T, C, O, Q, K, groups, scored, dtype, tolerance):
        from convnn_timm.ops.triton import aggregation

        monkeypatch.setattr(aggregation, 'QUERIES_PER_PARTIAL', 17)
        found, expected = self.run_neighbor_conv(B, T, C, O, Q, K, groups, dtype, scored, biased=scored)
        assert all(f.dtype == dtype for f in found)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f.double(), e, rtol=tolerance, atol=tolerance * float(e.abs().max()))

    @pytest.mark.parametrize('scored', [False, True], ids=['plain', 'scored'])
    def test_neighbor_conv_backward_returns_what_is_asked_for(self, deterministic, scored):
        from convnn_timm.ops.triton.aggregation import neighbor_conv_backward

        x, weight, grad = tokens(2, 6, 4), tokens(5, 4, 3), tokens(2, 7, 5, seed=1)
        index, score = torch.randint(6, (2, 7, 3)).to(DEVICE), tokens(2, 7, 3) if scored else None
        all_of_them = neighbor_conv_backward(grad, x, index, weight, score, 1, True, True)
        assert (all_of_them[2] is not None) == scored
        for asked in (False, True), (True, False), (False, False):
            some = neighbor_conv_backward(grad, x, index, weight, score, 1, *asked)
            for found, expected, wanted in zip(some, all_of_them, (*asked, scored)):
                assert torch.equal(found, expected) if wanted else found is None

    @pytest.mark.parametrize('groups', [1, 18])
    def test_neighbor_conv_backward_can_be_deterministic(self, monkeypatch, deterministic, groups):
        from convnn_timm.ops.triton import aggregation

        monkeypatch.setattr(aggregation, 'ROW_GRADIENT_BYTES', 1)  # image by image
        kernel, atomic = aggregation._input_gradient, []
        monkeypatch.setattr(
            aggregation, '_input_gradient',
            lambda *args, **kwargs: (atomic.append(kwargs['atomic']), kernel(*args, **kwargs)))
        case = 2, 5, 18, 18, 19, 3, groups, torch.float32, True, True
        found, expected = self.run_neighbor_conv(*case)
        for f, e in zip(found, expected):
            torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-5)
        for f, again in zip(found, self.run_neighbor_conv(*case)[0]):
            assert torch.equal(f, again)
        assert atomic and not any(atomic)  # the interpreter does one thing after the other: nothing else tells

    def test_neighbor_conv_takes_any_memory_layout(self):
        from convnn_timm.ops.triton.aggregation import neighbor_conv

        x, index = tokens(2, 4, 10).mT, torch.randint(10, (1, 7, 3)).to(DEVICE).expand(2, -1, -1)
        weight, score = tokens(3, 4, 5).permute(2, 1, 0), tokens(2, 3, 7).mT
        for bias in None, tokens(10)[::2], tokens(1).expand(5):
            expected = reference.neighbor_conv(x, index, weight, bias, score)
            torch.testing.assert_close(neighbor_conv(x, index, weight, bias, score, 1), expected)

    def test_neighbor_conv_without_queries(self):
        found, expected = self.run_neighbor_conv(2, 5, 3, 4, 0, 2, 1, torch.float32, True, True)
        for f, e in zip(found, expected):
            assert torch.equal(f.double(), e)

    @pytest.mark.parametrize('metric', ['cosine', 'euclidean'])
    def test_ops_reach_the_kernels(self, monkeypatch, metric):
        """With the path chosen around forward alone; values and gradients equal those of the definitions."""
        from convnn_timm.ops.triton import aggregation, selection

        ran = []
        for module, name in (selection, 'knn'), (aggregation, 'neighbor_conv'), (aggregation, 'neighbor_conv_backward'):
            kernel = getattr(module, name)
            monkeypatch.setattr(module, name, lambda *args, kernel=kernel, name=name: ran.append(name) or kernel(*args))

        def run(module):
            x, weight = tokens(2, 20, 5).requires_grad_(), tokens(4, 5, 3, seed=1).requires_grad_()
            index, score = module.knn(x, x, 3, metric, torch.arange(20, device=DEVICE))
            y = module.neighbor_conv(x, index, weight, None, score)
            with ops.use_path(None):
                y.backward(tokens(*y.shape, seed=2))
            return index, y.detach(), x.grad, weight.grad

        with ops.use_path('triton'):
            found = run(ops)
        assert ran == ['knn', 'neighbor_conv', 'neighbor_conv_backward']
        for f, e in zip(found, run(reference)):
            torch.testing.assert_close(f, e, rtol=1e-4, atol=1e-4)
