"""A model card tells what the runs recorded, and nothing else."""
import json
import re
import shutil

import pytest
import timm
import yaml
from huggingface_hub import ModelCard

from convnn_timm.hub.card import write_card
from publishing import NAME, last_top1, repeat, rewrite, set_column, set_last, set_top1


def test_metadata_is_what_the_hub_asks_for(published):
    data = ModelCard.load(published / 'cards' / NAME / 'README.md').data
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    assert data.library_name == 'timm' and data.pipeline_tag == 'image-classification' and data.license == 'mit'
    assert data.datasets == ['uoft-cs/cifar10'] and data.metrics == ['accuracy'] and data.model_name == NAME
    top1 = data.eval_results[0]
    assert top1.dataset_split == 'test'  # as the Hub calls it, in the folder it is `validation`
    assert top1.dataset_type == 'uoft-cs/cifar10' and top1.dataset_name == 'CIFAR-10 (made of noise)'
    assert top1.task_type == 'image-classification'
    assert top1.metric_value == round(evaluation[evaluation['stored']]['top1'], 2)


def test_the_card_tells_what_was_recorded(published):
    text = (published / 'cards' / NAME / 'README.md').read_text()
    titles = re.findall('^## (.*)', text, re.MULTILINE)
    assert titles == [
        'Model Details', 'Model Usage', 'Training', 'Evaluation', 'Limitations', 'Citation']
    assert 'More Information Needed' not in text and 'None' not in text
    evaluation = json.loads((published / 'cards' / NAME / 'training' / 'evaluation.json').read_text())
    model = timm.create_model(f'local-dir:{published}/cards/{NAME}', pretrained=True)
    assert f'**Parameters (M):** {sum(p.numel() for p in model.parameters()) / 1e6:.2f}' in text
    assert 'CIFAR-10 (made of noise)' in text and '3: bee, cat, dog' in text and '`num_samples=32`' in text
    assert '`epochs: 2`' in text and '`batch_size: 8`' in text  # where the run left its recipe
    assert 'On all 24 images of the split `test`' in text
    speed = evaluation['inference']
    assert f'{speed["images_per_s"]:.0f} images/s, float32, batches of 64, on {speed["machine"]}' in text
    for folder in ('training', 'training/twin'):
        last = (published / 'cards' / NAME / folder / 'summary.csv').read_text().split()[-1].split(',')
        model = yaml.safe_load((published / 'cards' / NAME / folder / 'args.yaml').read_text())['model']
        seeds, points = (r'0, 1', r' ± \d+\.\d\d') if folder == 'training' else ('0', '')
        top1 = last_top1(published / 'cards' / NAME / folder) + (2.5 if folder == 'training' else 0)
        assert re.search(rf'\| `{model}` \|.*\| {seeds} \| 2 \| {top1:.2f}{points} \| {float(last[6]):.2f}', text)
    assert 'The twin was trained with the same arguments.' in text
    assert 'Of several seeds these are the mean and the sample standard deviation' in text


def test_the_card_says_how_far_seeds_differ(card):
    training = card / 'training'
    repeat(training / 'seeds' / '1', 2).rename(training / 'seeds' / '2')
    for folder, top1 in ((training, 90.), (training / 'seeds' / '1', 91.), (training / 'seeds' / '2', 92.5)):
        set_top1(folder, top1)
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'The same training with 3 seeds, as recorded after the last epoch.' in text
    assert 'sample standard deviation: **91.17 ± 1.26**' in text and '| 1 | 91.00 |' in text and '1 seed:' not in text
    shutil.rmtree(training / 'seeds')
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'one run with 1 seed: how far others would differ from it was not measured' in text and '±' not in text
    assert 'Of several seeds' not in text


def test_seeds_beyond_nine_are_in_order(card):
    seeds = card / 'training' / 'seeds'
    for seed in (10, 2):
        repeat(seeds / '1', seed).rename(seeds / str(seed))
    write_card(card, NAME)
    assert '| 0, 1, 2, 10 | 2 |' in (card / 'README.md').read_text()


@pytest.mark.parametrize('architecture, model_args, text', [
    ('resnet18_convnn', {'sampling_type': 'all', 'K': 9}, 'as in the paper, with its standard arguments\n'),
    ('resnet18_convnn_branching_224', dict(
        sampling_type='random', num_samples=64, branch_mix=False, K=5, global_pool='avg'),
     'except that neighbours are searched among 64 random positions; the branches stand side by side, no 1x1 '
     'convolution mixes them; `K` is 5, not 9\n'),
    ('resnet18_conv2d', dict(sampling_type='random', in_chans=3), 'convolutions of PyTorch\n'),
    ('convnn_converted', dict(base='test_resnet', convert=dict(branch_ratio=0.25)), 'as the arguments say\n')])
def test_the_card_says_in_which_form_the_layers_are(card, architecture, model_args, text):
    rewrite(card / 'config.json', architecture=architecture, model_args=model_args)
    write_card(card, NAME)
    arguments, line = re.findall(
        r'^- \*\*(?:Architecture|Layers):\*\* (.*\n)', (card / 'README.md').read_text(), re.MULTILINE)
    assert line.endswith(text)
    if architecture == 'resnet18_conv2d':  # which has no use for it
        assert arguments == '`resnet18_conv2d`, `in_chans=3`\n'


def test_the_card_says_where_the_twin_differs(published, card):
    file = card / 'training' / 'twin' / 'args.yaml'
    args = yaml.safe_load(file.read_text())
    file.write_text(yaml.safe_dump({**args, 'lr': 0.3, 'device': 'mps'}))
    write_card(card, NAME)
    assert f'with other arguments: `lr`: {args["lr"]} here, 0.3 there.' in (card / 'README.md').read_text()
    set_last(file.parent, 'eval_images', 12)
    write_card(card, NAME)
    assert '0.3 there, and evaluated on 12 images, not 24. Both' in (card / 'README.md').read_text()


def test_step_times_are_compared_on_one_machine(card):
    def text():
        write_card(card, NAME)
        return (card / 'README.md').read_text()

    training, twin = card / 'training', card / 'training' / 'twin'
    (twin / 'seeds').mkdir()
    repeat(twin, 1).rename(twin / 'seeds' / '1')
    for run, speed in ((training, 100.), (training / 'seeds' / '1', 100.), (twin, 140.), (twin / 'seeds' / '1', 250.)):
        set_column(run, 'train_images_per_s', speed)
    assert 'with seed 0, both on ' in text() and '| 1.4 x |\n' in text() and 'do not compare' not in text()
    rewrite(twin / 'environment.json', gpu='H200')
    assert 'with seed 1, both on ' in text() and '| 2.5 x |\n' in text()
    for run in (training / 'seeds' / '1', twin / 'seeds' / '1'):  # resumed on another machine, which epoch was where?
        shutil.copy(twin / 'environment.json', run / 'environment-1.json')
    assert 'No run and its twin were trained on one machine' in text() and text().count('| – |\n') == 2
    assert 'images/s in training' not in text().partition('### Model Comparison')[2]


def test_what_an_older_trainer_did_not_know_was_as_by_default(card):
    args = yaml.safe_load((card / 'training' / 'args.yaml').read_text())
    assert args.pop('lr_k_decay') == 1
    (card / 'training' / 'twin' / 'args.yaml').write_text(yaml.safe_dump(args))
    write_card(card, NAME)
    assert 'The twin was trained with the same arguments.' in (card / 'README.md').read_text()


def test_the_card_says_that_epochs_were_trained_on_smaller_images(card):
    file = card / 'training' / 'args.yaml'
    assert 'train_sizes' not in (card / 'README.md').read_text()
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), 'train_sizes': [8, 12]}))
    write_card(card, NAME)
    assert '\n| train_sizes | 8 12 |\n' in (card / 'README.md').read_text()
    assert re.search(r'by training/recipe\.yaml with .*`train_sizes: \[8, 12\]`', (card / 'README.md').read_text())


@pytest.mark.parametrize('crop_padding, rows', [
    (2, '| crop_padding | 2 |\n| crop_padding_mode | reflect |\n'), (0, ''), (None, '')])
def test_the_card_says_how_images_were_cropped(card, crop_padding, rows):
    file = card / 'training' / 'args.yaml'
    crops = dict(crop_padding=crop_padding, crop_padding_mode='reflect')
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **crops}))
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert rows in text and text.count('| crop_') == rows.count('| crop_')


def test_a_card_without_twin_recipe_or_classes(card):
    shutil.rmtree(card / 'training' / 'twin')
    shutil.rmtree(card / 'training' / 'seeds')
    (card / 'training' / 'recipe.yaml').unlink()
    rewrite(card / 'config.json', label_names=None)
    rewrite(card / 'training' / 'evaluation.json', note='')
    write_card(card, NAME)
    text = (card / 'README.md').read_text()
    assert 'twin' not in text and 'recipe' not in text and 'None' not in text
    assert 'Trained on CIFAR-10: 48 images in 3 classes.' in text and '**Classes:** 3\n' in text


@pytest.mark.parametrize('args, told, name, hub_id, split', [
    ({}, {}, 'the folder images', None, 'validation'),  # though the tag is cifar10
    (dict(data_dir='.'), {}, 'a folder', None, 'validation'),
    ({}, dict(dataset_name='Pets'), 'Pets', None, 'validation'),
    ({}, dict(dataset_id='me/pets'), 'me/pets', 'me/pets', 'validation'),
    ({}, dict(dataset_id='me/pets', dataset_name='Pets', dataset_split='dev'), 'Pets', 'me/pets', 'dev'),
    ({}, dict(dataset_id='uoft-cs/cifar100', dataset_split='test'), 'CIFAR-100', 'uoft-cs/cifar100', 'test'),
    (dict(dataset='torch/cifar10'), {}, 'CIFAR-10', 'uoft-cs/cifar10', 'test'),
    (dict(dataset='torch/cifar10'), dict(split='train'), 'CIFAR-10', 'uoft-cs/cifar10', 'train'),
    (dict(dataset='torch/places365'), {}, 'places365', None, 'validation'),
    (dict(dataset='hfds/me/pets'), {}, 'me/pets', 'me/pets', 'validation'),
    (dict(dataset='hfds/pets'), {}, 'pets', None, 'validation'),
])
def test_the_data_is_what_the_run_and_the_user_say_it_is(card, args, told, name, hub_id, split):
    """A tag alone says nothing, and no identifier on the Hub is made up."""
    unknown = dict(dataset_id='', dataset_name='', dataset_split='')
    rewrite(card / 'training' / 'evaluation.json', **{**unknown, 'tag': 'cifar10', **told})
    file = card / 'training' / 'args.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), **args}))
    write_card(card, NAME)
    data, text = ModelCard.load(card / 'README.md').data, (card / 'README.md').read_text()
    classes = '' if hub_id else ' (bee, cat, dog)'
    assert f'Trained on {name} (made of noise): 48 images in 3 classes{classes}.\n' in text
    assert f'On all 24 images of the split `{split}` of {name} (made of noise)' in text
    assert data.datasets == (hub_id and [hub_id])
    result = data.eval_results[0]
    assert result.dataset_type == hub_id or not hub_id and '/' not in result.dataset_type
    assert result.dataset_name == f'{name} (made of noise)' and result.dataset_split == split


def test_images_held_out_of_a_folder_are_no_split(card):
    rewrite(card / 'training' / 'evaluation.json', dataset_id='', dataset_split='')
    file = card / 'training' / 'args.yaml'
    file.write_text(yaml.safe_dump({**yaml.safe_load(file.read_text()), 'holdout_id': '0123', 'holdout_share': 0.2}))
    write_card(card, NAME)
    assert 'On all 24 images held out of the folder images (made of noise), mean' in (card / 'README.md').read_text()
    assert ModelCard.load(card / 'README.md').data.eval_results[0].dataset_split is None


def test_names_do_not_break_the_card(card, results_table):
    names = ['a|b', '- c', 'd\n\n# e', '*f*', '_g_h_', '`i`', '<b>', 'j\x07\udcff', '[k](l)']
    rewrite(card / 'config.json', label_names=names)
    rewrite(card / 'training' / 'evaluation.json', dataset_id='', dataset_name='x: "y"\n---\n|z`', note='')
    args = card / 'training' / 'args.yaml'
    recorded = yaml.safe_load(args.read_text())
    args.write_text(yaml.safe_dump({**recorded, 'initial_checkpoint': 'a`b\n.pt', 'opt': 'a|b'}))
    write_card(card, NAME)
    text, clean = (card / 'README.md').read_text(), ModelCard.load(card / 'README.md').data
    shown = r'a|b, - c, d  \# e, \*f\*, \_g_h\_, \`i\`, \<b\>, j  , \[k\](l)'
    assert f'**Classes:** 3: {shown}\n' in text and f'3 classes ({shown}).\n' in text
    assert clean.eval_results[0].dataset_name == 'x: "y" --- |z`' and 'Trained on x: "y" --- |z\\`: 48' in text
    assert 'from the weights in `` a`b .pt ``.' in text and '\n| opt | a\\|b |\n' in text
    assert results_table.markdown(['a|b'], [['c|d']]) == '| a\\|b |\n|---|\n| c\\|d |\n'
