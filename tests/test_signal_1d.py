"""The example in one dimension, for a few steps, and its committed output."""
import re
from pathlib import Path

import pytest
import torch

RESULTS = Path(__file__).parents[1] / 'train_scripts' / 'results'


@pytest.fixture
def script(load_script):
    return load_script('signal_1d')


def test_a_few_steps_remove_noise(script, capsys):
    signal = script.load_signal()
    assert signal.shape == (12000,) and signal.std().isclose(torch.tensor(1.))
    rows = [re.findall(r'[-\w.,]+', line) for line in script.main(steps=25, seeds=1) if line.startswith('| `')]
    assert [row[0] for row in rows] == ['Conv1d', 'ConvNN1d', 'Branching1d']
    assert rows[0][1] == rows[1][1] == '4,945'
    assert all(float(row[2]) > 1 for row in rows), rows
    assert '| `ConvNN1d` |' in capsys.readouterr().out


def test_the_committed_table_is_of_these_networks(script):
    table = (RESULTS / 'signal_1d.md').read_text()
    for name, layer in script.LAYERS.items():
        assert f'| `{name}` | {sum(p.numel() for p in script.Denoiser(layer).parameters()):,} |' in table
