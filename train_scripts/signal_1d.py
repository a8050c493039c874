"""ConvNN in one dimension: remove noise from the membrane potential of a firing neuron.

    python train_scripts/signal_1d.py > train_scripts/results/signal_1d.md

The signal is a recording of 12000 samples that matplotlib ships (membrane.dat), whose action potentials look alike:
the samples most like one lie at the same phase of other spikes, far outside a convolution's window. The noise is added.
Networks learn from the first 7200 samples, where the neuron fires regularly, and are judged on samples 7200 to 11000,
where it does not. Twins differ in two layers only; `Conv1d` and `ConvNN1d` have the same number of parameters.
The convolution wins by a decibel and a half over ConvNN alone, and by less than half a decibel over the hybrid.
"""
import argparse
import statistics
import sys
import time
from typing import Callable, Dict, List

import matplotlib.cbook
import numpy as np
import torch
import torch.nn as nn

from convnn_timm.layers import Branching1d, ConvNN1d
from convnn_timm.macs import count_parameters
from convnn_timm.train.run_folder import environment

NOISE = 0.5  # standard deviation, in those of the signal
TRAIN, TEST = slice(0, 7200), slice(7200, 11000)
WIDTH = 16

LAYERS: Dict[str, Callable[[], nn.Module]] = {
    'Conv1d': lambda: nn.Conv1d(WIDTH, WIDTH, 9, padding=4),
    'ConvNN1d': lambda: ConvNN1d(WIDTH, WIDTH, K=9, padding=0),
    'Branching1d': lambda: Branching1d(WIDTH, WIDTH, kernel_size=9, K=9, padding=0),
}


def load_signal() -> torch.Tensor:
    """The recording, (12000,), with mean 0 and variance 1."""
    with matplotlib.cbook.get_sample_data('membrane.dat') as file:
        signal = torch.from_numpy(np.frombuffer(file.read(), np.float32).copy())
    return (signal - signal.mean()) / signal.std()


class Denoiser(nn.Module):
    """(B, 1, T) -> (B, 1, T): two of the layers between two convolutions; what they give is subtracted."""

    def __init__(self, layer: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.noise = nn.Sequential(
            nn.Conv1d(1, WIDTH, 9, padding=4), nn.ReLU(), layer(), nn.ReLU(), layer(), nn.ReLU(),
            nn.Conv1d(WIDTH, 1, 9, padding=4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x - self.noise(x)


def train(layer: Callable[[], nn.Module], signal: torch.Tensor, seed: int, steps: int, length: int = 256) -> nn.Module:
    """Train a network on random windows of the training part, each with fresh noise."""
    torch.manual_seed(seed)
    model = Denoiser(layer)
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, steps)
    windows = signal[TRAIN].unfold(0, length, 1)
    for _ in range(steps):
        clean = windows[torch.randint(len(windows), (16,))].unsqueeze(1)
        loss = (model(clean + NOISE * torch.randn_like(clean)) - clean).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model


def gain(model: nn.Module, signal: torch.Tensor, length: int) -> float:
    """Decibels that the network adds to the signal-to-noise ratio of the test part, seen in windows of that length."""
    clean = signal[TEST].unfold(0, length, length).unsqueeze(1)
    noise = NOISE * torch.randn(clean.shape, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        left = model(clean + noise) - clean
    return 10 * (noise.square().mean() / left.square().mean()).log10().item()


def main(steps: int = 400, seeds: int = 3) -> List[str]:
    """Train the twins and print a table in Markdown; return its lines."""
    facts = environment(
        argparse.Namespace(device='cpu', data_dir=None), ['python', 'train_scripts/signal_1d.py', *sys.argv[1:]])
    signal, seconds = load_signal(), {}
    lines = [
        '# A firing neuron, denoised', '', *[f'- {name}: {value}' for name, value in facts.items()], '',
        f'{steps} steps, mean and range of {seeds} seeds, on samples that were not trained on. Gain: decibels added to '
        'the signal-to-noise ratio, seen in windows of 256 samples as in training, or of 950. Time: of the processor, '
        "for one training, over that of the convolution's.", '',
        '| layer | parameters | gain, 256 samples | gain, 950 samples | time |', '|---|---|---|---|---|']
    for name, layer in LAYERS.items():
        start = time.process_time()
        models = [train(layer, signal, seed, steps) for seed in range(seeds)]
        seconds[name] = time.process_time() - start
        cells = []
        for length in 256, 950:
            gains = [gain(model, signal, length) for model in models]
            cells.append(f'{statistics.mean(gains):.2f} dB ({min(gains):.2f} to {max(gains):.2f})')
        lines.append(
            f'| `{name}` | {count_parameters(models[0]):,} | {cells[0]} | {cells[1]} '
            f'| {seconds[name] / seconds["Conv1d"]:.1f} |')
    print('\n'.join(lines))
    return lines


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--steps', type=int, default=400)
    parser.add_argument('--seeds', type=int, default=3)
    args = parser.parse_args()
    torch.set_num_threads(1)
    main(args.steps, args.seeds)
