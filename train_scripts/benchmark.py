"""What ConvNN costs on this machine, beside the paper's algorithm, a convolution and attention of the same shape.

    python train_scripts/benchmark.py                         # prints its tables
    python train_scripts/benchmark.py --large --output cpu    # also writes results/benchmarks/cpu.md and cpu.csv
    python train_scripts/benchmark.py --device cuda --dtype bfloat16 --channels-last --batch-size 256

Contenders of one case take turns (A B C A B C ...), so that a machine that slows down slows them all: compare ratios,
not milliseconds of different runs. Before a layer is timed, its neighbours are compared with the original algorithm's.
"""
import argparse
import csv
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from statistics import median, quantiles
from typing import Any, Callable, Dict, List, Optional, Sequence

os.environ.setdefault('KINETO_LOG_LEVEL', '99')  # the profiler reports its starts and stops

import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.autograd import DeviceType

import convnn_timm  # noqa: F401, registers the models
from convnn_timm.layers import ConvNN2d
from convnn_timm.ops import available_paths, use_path
from convnn_timm.train.run_folder import environment

RESULTS = Path(__file__).parent / 'results' / 'benchmarks'
LAYERS = [  # C_in, C_out, side of the map: those of VGG-11 and ResNet-18, then other numbers of tokens
    (3, 64, 32), (64, 64, 32), (128, 128, 16), (256, 256, 8), (512, 512, 4),
    (64, 64, 4), (64, 64, 8), (64, 64, 16), (64, 64, 64)]
CANDIDATES = {
    'all': {}, 'random 64': {'sampling_type': 'random', 'num_samples': 64},
    'spatial 8': {'sampling_type': 'spatial', 'num_samples': 8}}
PAPER = {'sampling_type': 'all', 'branch_ratio': 0.5, 'branch_mix': True, 'neighbor_init': 'random'}  # of a ResNet
MODELS = {  # variants of each network: kind of layer and arguments
    'vgg11': {
        'conv2d': ('conv2d', {}), 'ratio 0': ('convnn_branching', {'branch_ratio': 0.}),
        'hybrid': ('convnn_branching', {})},
    'resnet18': {
        'conv2d': ('conv2d', {}), 'hybrid': ('convnn_branching', PAPER),
        'hybrid random 64': ('convnn_branching', {**PAPER, **CANDIDATES['random 64']}),
        'hybrid as published': ('convnn_branching', {})}}
SHARES = 'Where the time of a training step goes'
PROFILED = [(64, 64, 32), (512, 512, 4)]  # with most tokens of a CIFAR network, and most weights for its tokens
SHOWN_OPS = 8
SAMPLE_SECONDS = 0.01  # a call that is shorter is repeated within one repetition
SCORE_ROUNDING = 1e-5  # of a cosine in float32

Row = Dict[str, Any]
Step = Callable[[], None]


class OriginalConvNN2d(nn.Module):
    """The paper code's algorithm (cosine, features, all candidates): T x T similarities, a K-fold copy, a Conv1d.

    It searches for the padded positions too, and drops them before the convolution.
    """

    def __init__(self, in_channels: int, out_channels: int, K: int = 9, padding: int = 1) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv1d(in_channels, out_channels, K, stride=K)

    def similarity(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, T) of the padded map; a token is most similar to itself."""
        unit = F.normalize(x.flatten(2), dim=1)
        similarity = (unit.mT @ unit).clamp(-1, 1)
        similarity.diagonal(dim1=1, dim2=2).fill_(1.1)
        return similarity

    def inner(self, tokens: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
        """(B, T, ...) of the padded map x -> (B, H * W, ...)."""
        p, (H, W) = self.padding, x.shape[2:]
        return tokens.unflatten(1, (H, W))[:, p:H - p, p:W - p].flatten(1, 2)

    def neighbors(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H * W, K), as `ConvNN2d.neighbors`."""
        x = F.pad(x, (self.padding,) * 4)
        return self.inner(self.similarity(x).topk(self.conv.stride[0]).indices, x)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        size, x = x.shape[2:], F.pad(x, (self.padding,) * 4)
        similarity = self.similarity(x)  # in memory to the end, as there
        index = similarity.topk(self.conv.stride[0]).indices.unsqueeze(1).expand(-1, x.shape[1], -1, -1)  # B, C, T, K
        gathered = x.flatten(2).unsqueeze(-1).expand(index.shape).contiguous().gather(2, index)
        return self.conv(self.inner(gathered.transpose(1, 2), x).transpose(1, 2).flatten(2)).unflatten(2, size)


class Attention(nn.Module):
    """torch's attention over the same tokens, one head, without projections."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        tokens = x.flatten(2).mT.unsqueeze(1).contiguous()  # else the CPU's fused kernel steps aside for a T x T one
        return F.scaled_dot_product_attention(tokens, tokens, tokens)


def op_paths(device: torch.device) -> List[str]:
    """Paths of the ops that are worth timing: Triton's on a GPU only, for its interpreter says nothing about speed."""
    usable = dict.fromkeys(path.path for path in available_paths() if path.usable)
    return [path for path in usable if path != 'triton' or device.type == 'cuda']


def layer_step(layer: nn.Module, x: torch.Tensor, train: bool, autocast: Callable, path: Optional[str] = None) -> Step:
    """A forward pass without gradients, or forward and backward to input and weights."""
    layer.train(train)

    def step() -> None:
        with use_path(path), torch.set_grad_enabled(train):
            with autocast():
                y = layer(x)
            if train:
                torch.autograd.grad(y, [x, *layer.parameters()], torch.ones_like(y))

    return step


def model_step(
        model: nn.Module,
        x: torch.Tensor,
        target: torch.Tensor,
        autocast: Callable,
        path: Optional[str] = None,
) -> Step:
    """A training step that costs what any costs, but leaves the weights alone: all repetitions see the same maps."""
    optimizer = torch.optim.SGD(model.train().parameters(), lr=0., momentum=0.9)

    def step() -> None:
        with use_path(path):
            with autocast():
                loss = F.cross_entropy(model(x), target)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def seconds(step: Step, calls: int, device: torch.device) -> float:
    """Seconds per call."""
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    wait()
    start = time.perf_counter()
    for _ in range(calls):
        step()
    wait()
    return (time.perf_counter() - start) / calls


def interleaved(steps: Dict[str, Step], repetitions: int, device: torch.device) -> Dict[str, List[float]]:
    """Seconds per call of all contenders, one after the other in every repetition, after a warm-up."""
    for step in steps.values():
        step()
    calls = {name: max(1, round(SAMPLE_SECONDS / seconds(step, 1, device))) for name, step in steps.items()}
    turns = [{name: seconds(step, calls[name], device) for name, step in steps.items()} for _ in range(repetitions)]
    return {name: [turn[name] for turn in turns] for name in steps}


def peak_memory(step: Step, device: torch.device) -> int:
    """Bytes that torch's allocator handed out on top of what there was, at the worst moment of the step.

    CUDA counts them; on a CPU they are added up from the profiler's record of every allocation and release. Scratch
    memory that a library takes for itself shows in neither.
    """
    if device.type == 'cuda':
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / 'trace.json'
        profile.export_chrome_trace(str(trace))
        events = [event for event in json.loads(trace.read_text())['traceEvents'] if event['name'] == '[memory]']
    used = peak = 0
    for event in sorted(events, key=lambda event: event['ts']):
        used += event['args']['Bytes']
        peak = max(peak, used)
    return peak


def compare(
        case: str,
        steps: Dict[str, Step],
        peers: Sequence[str],
        images: int,
        args: argparse.Namespace,
) -> List[Row]:
    """Time and memory of the contenders of one case, absolute and as ratios to the peers among them."""
    print(case, file=sys.stderr, flush=True)
    times = interleaved(steps, args.repetitions, args.device)
    ms = {name: 1e3 * median(values) / images for name, values in times.items()}
    mib = {name: peak_memory(step, args.device) / 2 ** 20 for name, step in steps.items()}
    quartiles = {name: quantiles(values, n=4) for name, values in times.items()}
    return [{
        'case': case, 'contender': name,
        'ms/image': ms[name], **{f'ms / {peer}': ms[name] / ms[peer] for peer in peers},
        'spread': (quartiles[name][2] - quartiles[name][0]) / quartiles[name][1],
        'MiB': mib[name], **{f'MiB / {peer}': mib[name] / mib[peer] for peer in peers},
    } for name in steps]


def time_shares(case: str, contender: str, step: Step, device: torch.device) -> Row:
    """The operators that a step spends most of its time in, each with its share."""
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == 'cuda' else []
    step()
    with torch.profiler.profile(activities=kinds) as profile:
        step()
    field = 'self_device_time_total' if device.type == 'cuda' else 'self_cpu_time_total'
    operators = [event for event in profile.key_averages() if event.device_type == DeviceType.CPU]  # not kernels too
    spent = {event.key.removeprefix('aten::'): getattr(event, field) for event in operators}
    most = sorted(spent, key=spent.get, reverse=True)[:SHOWN_OPS]
    shares = [f'{name} {spent[name] / sum(spent.values()):.0%}' for name in most]
    return {'case': case, 'contender': contender, 'share of the time': ', '.join(shares)}


def compare_neighbors(original: OriginalConvNN2d, ours: ConvNN2d, x: torch.Tensor) -> Row:
    """Check that both select the same neighbours, but for cosines that float32 cannot tell apart.

    Raises:
        RuntimeError: They do not.
    """
    theirs, own = original.neighbors(x), ours.neighbors(x)
    image, place = (theirs != own).any(-1).nonzero(as_tuple=True)
    tokens = F.normalize(F.pad(x.double(), (ours.padding,) * 4).flatten(2).mT, dim=2)
    query = tokens[image, ours.queries(tuple(x.shape[2:]), x.device)[place]].unsqueeze(1)
    theirs_score, own_score = (
        (query * tokens[image.unsqueeze(1), index[image, place]]).sum(-1) for index in (theirs, own))
    difference = (theirs_score - own_score).abs().max().item() if len(image) else 0.
    equal = 1 - len(image) / own[..., 0].numel()
    if difference > SCORE_ROUNDING:
        raise RuntimeError(
            f'ConvNN2d selects other neighbours than the original algorithm for {tuple(x.shape)}: {equal:.2%} of the '
            f'positions agree, and at the others similarities differ by {difference:.2g}, more than rounding')
    return {'equal positions': f'{equal:.3%}', 'similarity differs by': difference}


def measure_layers(args: argparse.Namespace) -> Dict[str, List[Row]]:
    """A table of agreement, one of inference, one of training."""
    tables = defaultdict(list)
    for C, O, side in LAYERS[4:6] if args.quick else LAYERS:
        torch.manual_seed(0)
        case = f'{C} -> {O}, {side}x{side}'
        # Positive, as after a ReLU, but without its ties, which the original gives to any of the equals.
        x = torch.rand(args.batch_size, C, side, side, device=args.device).to(memory_format=args.memory_format)
        layers = {
            'original': OriginalConvNN2d(C, O), 'conv2d': nn.Conv2d(C, O, 3, padding=1), 'attention': Attention()}
        forced = {}
        for path in op_paths(args.device):
            for candidates, sampling in CANDIDATES.items():
                name = f'convnn {candidates}, {path}'
                layers[name], forced[name] = ConvNN2d(C, O, **sampling), path
        for name, layer in layers.items():
            layer.to(args.device, memory_format=args.memory_format)
            if name.startswith('convnn all'):
                with use_path(forced[name]):
                    row = compare_neighbors(layers['original'], layer, x)
                tables['Neighbours'].append({'case': case, 'contender': name, **row})
        for title, train in (('Layers, forward', False), ('Layers, forward and backward', True)):
            x.requires_grad_(train)
            steps = {
                name: layer_step(layer, x, train, args.autocast, forced.get(name)) for name, layer in layers.items()}
            tables[title] += compare(case, steps, ('original', 'conv2d'), args.batch_size, args)
            if train and (C, O, side) in PROFILED:
                tables[SHARES] += [time_shares(case, name, step, args.device) for name, step in steps.items()]
    return tables


def measure_models(args: argparse.Namespace) -> Dict[str, List[Row]]:
    """Whole training steps of hybrids and their twins, and how long one image takes them."""
    tables, images = defaultdict(list), args.model_batch_size
    for family in ['resnet18'] if args.quick else MODELS:
        x = torch.randn(images, 3, 32, 32, device=args.device).to(memory_format=args.memory_format)
        target = torch.randint(10, (images,), device=args.device)
        models = {}
        for variant, (layer, kwargs) in MODELS[family].items():
            torch.manual_seed(0)
            model = timm.create_model(f'{family}_{layer}', **kwargs)
            model.to(args.device, memory_format=args.memory_format)
            for path in op_paths(args.device) if 'hybrid' in variant else [None]:
                models[f'{variant}, {path}' if path else variant] = model, path
        peers = [name for name in models if 'hybrid' not in name]
        steps = {name: model_step(model, x, target, args.autocast, path) for name, (model, path) in models.items()}
        case = f'{family}, batch {images}'
        tables['Training steps'] += compare(case, steps, peers, images, args)
        tables[SHARES] += [time_shares(case, name, step, args.device) for name, step in steps.items()]
        steps = {name: layer_step(model, x[:1], False, args.autocast, path) for name, (model, path) in models.items()}
        tables['One image, forward'] += compare(f'{family}, batch 1', steps, peers, 1, args)
    return tables


def large_step(path: str, args: argparse.Namespace) -> Row:
    """One 64 -> 64 layer on one large map, forward and backward."""
    def resident() -> float:  # the most that this process ever had
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2 ** 20 if sys.platform == 'darwin' else 2 ** 10)

    side = 32 if args.quick else 224
    x = torch.rand(1, 64, side, side, device=args.device).to(memory_format=args.memory_format).requires_grad_()
    layer = ConvNN2d(64, 64).to(args.device, memory_format=args.memory_format)
    step, before = layer_step(layer, x, True, args.autocast, path), resident()
    row = {'case': f'64 -> 64, {side}x{side}, batch 1', 'contender': f'convnn all, {path}'}
    if args.device.type == 'cuda':  # which warms it up, too
        row['peak CUDA MiB'] = peak_memory(step, args.device) / 2 ** 20
    row['seconds'] = seconds(step, 1, args.device)
    return {**row, 'resident MiB before': before, 'peak resident MiB': resident()}


def measure_large(args: argparse.Namespace, argv: Sequence[str]) -> Dict[str, List[Row]]:
    """`large_step` in a process of its own."""
    rows = []
    for path in op_paths(args.device):
        command = [sys.executable, __file__, *argv, '--large-step', path]
        rows.append(json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout))
    return {'Large map, forward and backward': rows}


def load_warning(start: float, end: float, cores: int, threads: int) -> str:
    """What to think of the timings, from the load averages before and after; '' if nothing."""
    if max(start, end - threads) <= 0.25 * cores:  # at the end the benchmark itself makes a load of its threads
        return ''
    return (
        f'**The machine was busy with other work (load {start:.1f} before, {end:.1f} after, {threads} of {cores} cores '
        f'used here). Do not trust the timings; repeat on an idle machine.**\n')


def markdown_table(rows: List[Row]) -> str:
    def cell(value: Any) -> str:  # floats with three significant digits
        return f'{float(f"{value:.3g}"):g}' if isinstance(value, float) else str(value)

    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [names, ['---'] * len(names), *[[cell(row.get(name, '')) for name in names] for row in rows]]
    return '\n'.join(f'| {" | ".join(cells)} |' for cells in lines)


def write_csv(path: Path, tables: Dict[str, List[Row]]) -> None:
    rows = [{'table': title, **row} for title, table in tables.items() for row in table]
    with path.open('w', newline='') as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)))
        writer.writeheader()
        writer.writerows(rows)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--device', type=torch.device, default=torch.device('cpu'))
    parser.add_argument('--dtype', choices=('float32', 'float16', 'bfloat16'), default='float32', help='of autocast')
    parser.add_argument('--channels-last', action='store_true')
    parser.add_argument('--batch-size', type=int, default=16, help='of the layers')
    parser.add_argument('--model-batch-size', type=int, default=32, help='of the training steps')
    parser.add_argument('--repetitions', type=int, default=11, help='whose median counts, at least 2')
    parser.add_argument('--large', action='store_true', help='also one layer on a 224x224 map')
    parser.add_argument('--quick', action='store_true', help='tiny sizes: shows that it runs, the figures mean nothing')
    parser.add_argument('--output', metavar='FILE', help='write FILE.md and FILE.csv in results/benchmarks/')
    parser.add_argument('--large-step', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.repetitions < 2:
        parser.error('--repetitions must be at least 2')
    if args.device.type == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch finds no GPU here')
    if args.device.type == 'cuda' and args.device.index is not None:
        torch.cuda.set_device(args.device)
    if args.quick:
        args.batch_size = args.model_batch_size = args.repetitions = 2
    args.memory_format = torch.channels_last if args.channels_last else torch.contiguous_format
    dtype = getattr(torch, args.dtype)
    args.autocast = lambda: torch.autocast(args.device.type, dtype, enabled=dtype != torch.float32)
    return args


def main(argv: Optional[Sequence[str]] = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    args = parse(argv)
    torch.backends.cudnn.benchmark = True
    if args.large_step:
        print(json.dumps(large_step(args.large_step, args)))
        return
    start = os.getloadavg()[0]
    large = measure_large(args, argv) if args.large else {}  # first, for a process inherits the peak of its parent
    layers, models = measure_layers(args), measure_models(args)
    tables = {**layers, **models, **large, SHARES: layers[SHARES] + models[SHARES]}
    end = os.getloadavg()[0]
    facts = environment(
        argparse.Namespace(device=args.device, data_dir=None), ['python', 'train_scripts/benchmark.py', *argv])
    facts['load'] = f'{start:.2f} before, {end:.2f} after'
    report = '\n'.join([
        '# Benchmark\n', *[f'- {name}: {value}' for name, value in facts.items()],
        f'\nMedians of {args.repetitions} interleaved repetitions; spread: between quartiles, over the median. Layers: '
        f'batch {args.batch_size}, K=9, cosine. MiB: the most that torch allocated during a call, for the whole batch, '
        f"on top of what there was. x / y: this row's x over y's.\n",
        load_warning(start, end, facts['cores'], facts['threads']),
        *[f'## {title}\n\n{markdown_table(rows)}\n' for title, rows in tables.items()]])
    print(report)
    if args.output:
        RESULTS.mkdir(parents=True, exist_ok=True)
        (RESULTS / f'{args.output}.md').write_text(report)
        write_csv(RESULTS / f'{args.output}.csv', tables)


if __name__ == '__main__':
    main()
