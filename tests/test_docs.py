"""What README, CONTRIBUTING and docs/ say runs: their Python blocks, commands, tables and links."""
import inspect
import re
from pathlib import Path

import pytest
import timm

import convnn_timm.models  # noqa: F401
from convnn_timm.cli.parser import build_parser
from convnn_timm.layers import LAYER_TYPES, layer_arguments
from convnn_timm.macs import count_macs
from convnn_timm.train.engine import build_parser as build_train_parser

ROOT = Path(__file__).parent.parent
FILES = ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *ROOT.glob('docs/*.md')
PAGES = {file.relative_to(ROOT).as_posix(): file.read_text() for file in FILES}
README = PAGES['README.md']

AUTHORS_FLAGS = """
    model layer K kernel_size padding sampling_type num_samples sample_padding attention_dropout shuffle_pattern
    shuffle_scale magnitude_type similarity_type aggregation_type lambda_param branch_ratio dataset resize augment noise
    data_path use_compiled compile_mode batch_size num_epochs use_amp clip_grad_norm criterion optimizer momentum
    weight_decay lr lr_step lr_gamma scheduler device seed output_dir test_only
""".split()


def rows(page, first_cell):
    """Cells of a page's table rows whose first cell matches, without backticks."""
    lines = [line.replace('`', '') for line in PAGES[page].splitlines() if line.startswith('|')]
    table = [[cell.strip() for cell in line[1:-1].split('|')] for line in lines]
    return [row for row in table if re.fullmatch(first_cell, row[0])]


@pytest.mark.parametrize('page, code', [
    (page, code) for page, text in PAGES.items() for code in re.findall(r'^```python\n(.*?)^```', text, re.DOTALL | re.MULTILINE)])
def test_python_block(page, code):
    exec(compile(code, page, 'exec'), {})


def test_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize('page', PAGES)
def test_lines_are_short(page):
    """Tables and addresses aside."""
    prose = [line for line in PAGES[page].splitlines() if not line.lstrip().startswith(('|', '!['))]
    assert not [line for line in prose if len(line) > 120 and ' ' in line.strip()]


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    for link in re.findall(r'\]\(([^)]+)\)', PAGES[page]):
        path, _, heading = link.partition('#')
        if not path.startswith('http'):
            target = (ROOT / page).parent / path if path else ROOT / page
            assert target.exists(), link
            headings = re.findall(r'^#+ (.*)', target.read_text(), re.MULTILINE) if heading else []
            assert not heading or heading in [title.lower().replace(' ', '-') for title in headings], link


def test_each_page_says_for_whom_it_is():
    for page, text in PAGES.items():
        assert page == 'README.md' or text.split('\n\n')[1].startswith('For those who '), page


def test_each_flag_of_the_authors_has_one_row():
    assert sorted(row[0] for row in rows('docs/authors.md', r'--\w+')) == sorted(f'--{flag}' for flag in AUTHORS_FLAGS)


def test_what_stands_for_a_flag_exists():
    """Arguments of our trainer, unless the row says that only timm's script has them, and keywords of the models."""
    known = set(build_train_parser()._option_string_actions) | {'input_noise', *layer_arguments()}
    for flag, here, note in rows('docs/authors.md', r'--\w+'):
        named = re.findall(r'--[a-z][a-z-]*', here) + re.findall(r'keyword (\w+)', here)
        unknown = set(named) - known
        assert not unknown or "timm's script only" in note, f'{flag}: {unknown}'
        assert named or flag == '--test_only'


def test_keywords_and_defaults():
    """The table has every keyword of the models, with its default."""
    shown = {}
    for names, defaults, *_ in rows('docs/models.md', r'[a-zK]\w*(, \w+)*'):
        shown.update(zip(names.split(', '), defaults.split(', ')))
    keywords = {'input_noise': '0', 'bias': '', 'kernel_size': '3'}
    for layer in ('convnn', 'convnn_branching_attn'):
        parameters = inspect.signature(LAYER_TYPES[layer]).parameters
        keywords |= {name: str(parameters[name].default) for name in layer_arguments(layer) if name not in keywords}
    assert {name: shown.get(name) for name in keywords} == keywords
    assert set(layer_arguments()) < set(keywords)


def test_sizes_of_models():
    for layer, _, *sizes in rows('docs/models.md', r'_conv\w+'):
        for network, size in zip(('resnet18', 'vgg11'), sizes, strict=True):
            model = timm.create_model(network + layer, device='meta')
            parameters, macs = sum(p.numel() for p in model.parameters()), count_macs(model)
            assert size == f'{parameters / 1e6:.1f} M, {macs / 1e9:.3f} G', network + layer


def test_commands_exist():
    commands = build_parser()._subparsers._group_actions[0].choices
    named = {name for text in PAGES.values() for name in re.findall(r'(?:convnn-timm|-m convnn_timm) ([a-z-]+)', text)}
    assert named == set(commands)


def test_install_commands_stand_alone():
    """.ci/run takes the lines from here."""
    assert re.findall(r'^pip install .*', README, re.MULTILINE) == [
        'pip install . && convnn-timm quickstart', 'pip install ".[test]" && pytest']
