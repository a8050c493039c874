"""The tables of results that train_scripts/results_table.py writes."""
import json
import re
import shutil

import pytest

from publishing import NAME, set_column, set_top1


def test_tables_in_the_repository_are_what_the_command_writes(results_table):
    for file, text in results_table.tables().items():
        assert file.read_text() == text, f'{file}: run python train_scripts/results_table.py'


def test_table_of_published_weights(results_table, manifest, card, tmp_path, monkeypatch):
    for folder in (tmp_path, tmp_path / 'model_cards'):
        folder.mkdir(exist_ok=True)
        (folder / 'README.md').write_text('before\n<!-- zoo -->\nold\n<!-- /zoo -->\nafter\n')
    (tmp_path / 'train_scripts' / 'results').mkdir(parents=True)

    def zoo(file='README.md'):
        text = results_table.tables(tmp_path)[tmp_path / file]
        assert re.fullmatch('before\n<!-- zoo -->\n.*\n<!-- /zoo -->\nafter\n', text, re.DOTALL) and 'old' not in text
        return text

    assert 'No weights are published yet.' in zoo()
    shutil.copytree(card, tmp_path / 'model_cards' / NAME)
    (tmp_path / 'model_cards' / f'.{NAME}.partial').mkdir()  # an export was killed
    shutil.copy(card / 'config.json', tmp_path / 'model_cards' / f'.{NAME}.partial')
    shutil.copytree(card, tmp_path / 'model_cards' / 'resnet18_convnn_branching.toy')  # is in no line of the manifest
    training = tmp_path / 'model_cards' / NAME / 'training'
    for folder, top1 in ((training, 90.), (training / 'seeds' / '1', 91.), (training / 'twin', 92.5)):
        set_top1(folder, top1)
    set_column(training, 'train_images_per_s', 100.)
    set_column(training / 'twin', 'train_images_per_s', 140.)
    assert 'No weights are published yet.' in zoo()  # these were exported, no more
    entry, = json.loads(manifest.read_text())
    manifest.write_text(json.dumps([dict(entry, published=True)]))
    row, = (line for line in zoo().splitlines() if line.startswith(f'| [`{NAME}`](model_cards/{NAME}) |'))
    cells = [cell.strip() for cell in row.split('|')[2:-1]]
    assert cells[:6] == ['90.50 ± 0.71', '2 seeds', '`resnet18_conv2d` 92.50', '11.2 M', '0.142 G', '2']
    assert re.fullmatch(r'1\.4 x, on .* threads?', cells[6]) and 'toy' not in zoo()
    assert f'| [`{NAME}`]({NAME}) |' in zoo('model_cards/README.md') and 'CIFAR-10 (made of noise)' in zoo()
    shutil.rmtree(training / 'seeds')
    shutil.rmtree(training / 'twin')
    assert '| 90.00 | 1 seed |  |' in zoo() and '| 2 | – |\n' in zoo()
    (tmp_path / 'README.md').write_text('no marks')
    with pytest.raises(SystemExit, match='README.md needs the lines <!-- zoo --> and <!-- /zoo -->'):
        zoo()
