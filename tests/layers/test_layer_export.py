"""What becomes of a layer: copies, state dicts, compiled, exported, scripted and traced networks, a single map."""
import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn as nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from convnn_timm.layers import Branching2d, BranchingAttention2d, ConvNN1d, ConvNN2d, ConvNNAttention2d, CoordConv2d
from layer_examples import LAYERS_1D, LAYERS_2D, LOC, example, image


# Life as a module

@pytest.mark.parametrize('layer_type', [
    *LAYERS_1D, *LAYERS_2D, partial(ConvNN2d, stride=3, sampling_type='random', num_samples=9),
    partial(Branching2d, dilation=2, branch_ratio=0.25), partial(ConvNN1d, padding=3, K=4, dilation=3, **LOC)])
def test_meta_deepcopy_pickle_and_state_dict(layer_type):
    meta = layer_type(3, 4, device='meta')
    x = example(meta).float()
    assert meta(x.to('meta')).shape == layer_type(3, 4)(x).shape == (2, 4, *(-(-8 // meta.stride),) * meta.axes)
    layer = layer_type(3, 4).eval()
    x = example(layer).float()
    y = layer(x)
    for twin in copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)):
        assert torch.equal(twin(x), y)
    other = layer_type(3, 4).eval()
    other.load_state_dict(layer.state_dict())
    assert torch.equal(other(x), y)
    assert layer.__dict__.keys() == other.__dict__.keys()
    before = pickle.dumps(layer)
    layer(example(layer, (12,) * layer.axes).float())  # another size, and nothing is left behind
    assert pickle.dumps(layer) == before and torch.equal(layer(x), y)


@pytest.mark.parametrize('layer_type', [
    ConvNN1d, partial(ConvNN2d, magnitude_type='euclidean'), partial(BranchingAttention2d, attention_dropout=0.)])
def test_compiles_without_a_graph_break_and_not_for_every_size(layer_type):
    torch._dynamo.reset()
    layer = layer_type(3, 4)
    graphs = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(layer, fullgraph=True, backend=graphs)
    for i, n in enumerate((8, 11, 14, 12, 17)):
        inputs = [image(2 + i % 2, 3, *(n, 10)[:layer.axes], dtype=torch.float32).requires_grad_() for _ in range(2)]
        outputs = [f(x) for f, x in zip((compiled, layer), inputs)]
        torch.testing.assert_close(*outputs)
        for y in outputs:
            y.square().sum().backward()
        torch.testing.assert_close(*[x.grad for x in inputs])
    assert graphs.frame_count <= 3


@pytest.mark.parametrize('layer_type', [ConvNN2d, ConvNNAttention2d])
@pytest.mark.parametrize('sampling_type, few, more', [('random', 16, 64), ('spatial', 4, 8)])
def test_fewer_candidates_cost_less(layer_type, sampling_type, few, more):
    def cost(**sampling):
        with FlopCounterMode(display=False) as counter:
            layer_type(8, 8, device='meta', **sampling)(torch.empty(1, 8, 16, 16, device='meta'))
        return counter.get_total_flops()

    some, others = (cost(sampling_type=sampling_type, num_samples=n) for n in (few, more))
    assert some < others < cost()


@pytest.mark.parametrize('layer_type', [
    ConvNN1d, Branching2d, ConvNNAttention2d, partial(ConvNN2d, K=4, dilation=2, **LOC)])
def test_exports(layer_type):
    layer = layer_type(3, 4).eval()
    x = example(layer).float()
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))


@pytest.mark.parametrize('layer_type', [
    ConvNN2d, partial(ConvNN2d, magnitude_type='euclidean'), partial(ConvNN2d, similarity_type='Loc_Col'),
    ConvNNAttention2d])
def test_exported_without_autocast_it_runs_with_it(layer_type):
    """And selects the same neighbours as if made with it: others would differ by the whole range of the outputs."""
    net = nn.Sequential(nn.Conv2d(3, 4, 1), layer_type(4, 4)).eval()
    x = image(2, 3, 8, 8, dtype=torch.float32)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        expected = net(x)
    for exported in torch.export.export(net, (x,)).module(), torch.jit.trace(net, x), torch.jit.script(net):
        with torch.autocast('cpu', dtype=torch.bfloat16):
            y = exported(x)
        assert y.dtype == torch.bfloat16
        assert (y - expected).abs().max() < 0.02
        assert (y.float() - net(x)).abs().median() < 0.02  # nearly all neighbours are the same


@pytest.mark.parametrize('dynamo', [False, True])
@pytest.mark.parametrize('layer_type, args', [
    (ConvNN1d, dict(magnitude_type='euclidean')), (ConvNN2d, dict(groups=3)),
    (ConvNN2d, dict(similarity_type='Loc')), (ConvNN2d, dict(dilation=2, **LOC)), (ConvNN2d, dict(dtype=torch.float16)),
    (BranchingAttention2d, dict(stride=2, sampling_type='random', num_samples=20))])
def test_onnx(layer_type, args, dynamo, tmp_path):
    """In standard operators, ties included: the input has dead tokens, and onnxruntime selects the same neighbours.

    So it does of tokens that are nearly dead, too short to have a direction.
    """
    onnxruntime = pytest.importorskip('onnxruntime', reason="needs onnxruntime: pip install 'convnn-timm[test]'")
    layer = layer_type(3, 6, K=5, **args).eval()
    x = example(layer, (9, 8)[:layer.axes]).float().relu()
    x[:, :, ::3] = 0
    x[:, :, 1::3] *= 1e-14
    x = x.to(args.get('dtype'))
    torch.onnx.export(layer, (x,), tmp_path / 'layer.onnx', dynamo=dynamo, verbose=False)
    session = onnxruntime.InferenceSession(tmp_path / 'layer.onnx')
    y, = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    tolerance = dict(rtol=1e-2, atol=1e-2) if x.dtype == torch.float16 else dict(rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(torch.from_numpy(y), layer(x).detach(), **tolerance)


@pytest.mark.parametrize('layer_type, args', [
    *[(layer_type, dict(K=5, shuffle_pattern='BA', shuffle_scale=2)) for layer_type in LAYERS_2D + [CoordConv2d]],
    (ConvNN1d, dict(sampling_type='random', num_samples=12)), (BranchingAttention2d, dict(branch_ratio=0.)),
    (Branching2d, dict(branch_ratio=1., bias=False)), (ConvNNAttention2d, dict(aggregation_type='Loc_Col')),
    *[(layer_type, dict(dilation=2, groups=2)) for layer_type in (ConvNN1d, ConvNN2d, CoordConv2d)],
    (Branching2d, dict(dilation=2, stride=2, groups=2, branch_ratio=2 / 3))])
def test_scripts(layer_type, args, tmp_path):
    args = {name: value for name, value in args.items() if name != 'K' or layer_type is not CoordConv2d}
    layer = layer_type(4, 6, **args).eval()
    x = image(2, 4, *((20,) if layer_type is ConvNN1d else (12, 8)), dtype=torch.float32)
    scripted = torch.jit.script(layer)
    assert torch.equal(scripted(x), layer(x))
    scripted.save(tmp_path / 'layer.pt')
    assert torch.equal(torch.jit.load(tmp_path / 'layer.pt')(x), layer(x))
    scripted(x).sum().backward()
    assert all(p.grad is not None for p in layer.parameters())


def test_scripted_layers_train_and_evaluate():
    layer = ConvNNAttention2d(3, 4, attention_dropout=0.5).train()
    scripted, x = torch.jit.script(layer), image(2, 3, 6, 6, dtype=torch.float32)
    assert not torch.equal(scripted(x), scripted(x))
    assert torch.equal(scripted.eval()(x), layer.eval()(x))


def test_scripted_networks_run_in_threads():
    net = nn.Sequential(ConvNN2d(4, 4, K=3), nn.ReLU(), ConvNN2d(4, 4, K=3)).eval()
    scripted, x = torch.jit.script(net), image(2, 4, 6, 6, dtype=torch.float32)
    y = net(x)
    with ThreadPoolExecutor(2) as pool:
        assert all(pool.map(lambda _: torch.equal(scripted(x), y), range(200)))


def test_a_subclass_may_have_a_constructor_of_its_own():
    class Own(ConvNN2d):
        def __init__(self, channels):
            super().__init__(channels, np.int64(channels), K=5)

    layer, x = Own(4), image(2, 4, 6, 6, dtype=torch.float32)
    assert layer(x).shape == x.shape
    with pytest.raises(TypeError, match=r"Own cannot be scripted: .*the same names \(channels\)"):
        torch.jit.script(layer)
    layer = ConvNN2d(4, np.int64(6), K=5)
    assert torch.equal(torch.jit.script(layer)(x), layer(x))


@pytest.mark.parametrize('args', [
    dict(sampling_type='random', num_samples=12), dict(sampling_type='spatial', num_samples=3),
    dict(K=6, **LOC), dict()], ids=str)
def test_traces(args):
    layer = ConvNN2d(3, 4, **args).eval()
    x = image(2, 3, 8, 8, dtype=torch.float32)
    assert torch.equal(torch.jit.trace(layer, x)(x + 1), layer(x + 1))


# Without a batch, as torch's convolutions

@pytest.mark.parametrize('layer_type, args', [
    *[(layer_type, dict()) for layer_type in LAYERS_1D + LAYERS_2D + [CoordConv2d]],
    *[(layer_type, dict(shuffle_pattern='BA', shuffle_scale=2)) for layer_type in (ConvNN1d, Branching2d, CoordConv2d)],
    *[(Branching2d, dict(branch_ratio=ratio, stride=2)) for ratio in (0., 1.)],
    (ConvNN2d, LOC), (ConvNN2d, dict(K=1)), (ConvNN2d, dict(sampling_type='random', num_samples=9))], ids=str)
def test_a_single_map_is_a_batch_of_one(layer_type, args):
    layer = layer_type(3, 4, dtype=torch.float64, **args).eval()
    x = example(layer, (16,) * layer.axes)[0]
    y = layer(x)
    assert torch.equal(y, layer(x.unsqueeze(0)).squeeze(0)) and torch.equal(torch.jit.script(layer)(x), y)
    if layer_type is not CoordConv2d and getattr(layer, 'branch1', layer) is not None:
        assert torch.equal(layer.neighbors(x), layer.neighbors(x.unsqueeze(0)).squeeze(0))
    torch.testing.assert_close(torch.fx.symbolic_trace(nn.Sequential(layer))(x), y)


@pytest.mark.parametrize('layer_type', [ConvNN1d, BranchingAttention2d])
def test_a_single_map_compiles(layer_type):
    torch._dynamo.reset()
    layer = layer_type(3, 4).eval()
    x = example(layer)[0].float()
    torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend='aot_eager')(x), layer(x))
    torch.testing.assert_close(torch.export.export(layer, (x,)).module()(x), layer(x))
