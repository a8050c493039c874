"""The trainer's command line and recipes: which value counts, and what is refused."""
import pytest
import timm

from convnn_timm.train.engine import main, parse_args
from convnn_timm.train.flags import complete, defaults, recipe_names


def test_command_line_beats_recipe_beats_default(tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('epochs: 7\nlr: 1e-3\namp: true\ndevice_modules: [convnn_timm]\n')
    args = parse_args(['-c', str(recipe), 'somewhere', '--epochs', '9', '--no-amp'])
    assert (args.epochs, args.lr, args.amp, args.momentum, args.data_dir) == (9, 1e-3, False, 0.9, 'somewhere')


def test_command_line_beats_what_a_recipe_says_in_other_words(tmp_path, caplog):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('input_size: [1, 16, 16]\nno_aug: true\nmodel_kwargs: {K: 3, branch_ratio: 0.5}\n')
    args = parse_args(['-c', str(recipe), 'x', '--img-size', '32', '--aug', '--model-kwargs', 'K=5'])
    assert (args.input_size, args.no_aug, args.model_kwargs) == ([1, 32, 32], False, dict(K=5))
    assert 'replaces those of the recipe, which had branch_ratio=0.5 too' in caplog.text
    assert parse_args(['-c', str(recipe), 'x']).no_aug


def test_null_and_numbers_in_a_recipe(tmp_path):
    recipe = tmp_path / 'mine.yaml'
    recipe.write_text('mixup: null\nmodel_kwargs: null\ncolor_jitter: null\nclip_grad: null\nexperiment: 5\n')
    args = parse_args(['-c', str(recipe), 'x'])
    assert (args.mixup, args.model_kwargs, args.color_jitter, args.clip_grad) == (0, {}, None, None)
    assert args.experiment == '5'


def test_records_of_earlier_versions(tmp_path):
    recipe = tmp_path / 'args.yaml'
    recipe.write_text('epochs: 7\ncrop_off_epoch: 0\n')
    args = parse_args(['-c', str(recipe), 'x'])
    assert args.epochs == 7 and 'crop_off_epoch' not in args
    assert complete({'crop_off_epoch': 0}) == defaults()
    assert complete({'crop_off_epoch': 2}) == {**defaults(), 'crop_off_epoch': 2}  # cards tell it


def test_recipes_of_the_package():
    assert recipe_names() == ['cifar10', 'digits', 'finetune', 'imagenet', 'paper_resnet18', 'paper_vgg11']
    short, long = (vars(parse_args(['-c', name, 'x'])) for name in ('cifar10', 'cifar10.yaml'))
    assert {**short, 'config': ''} == {**long, 'config': ''}
    for name in recipe_names():
        args = parse_args(['-c', name, 'x'])
        kwargs = {**args.model_kwargs, 'device': 'meta', 'drop_rate': args.drop}
        timm.create_model(args.model, **kwargs)


@pytest.mark.parametrize('text, message', [
    ('epocs: 3', "unknown key 'epocs', did you mean 'epochs'?"),
    ('colour: red', "unknown key 'colour'"),
    ('- epochs', 'expected lines'),
    ('epochs: [', 'expected the node content'),
    ("amp: 'false'", "amp must be true or false, not 'false'"),
    ('epochs: 1.5', 'epochs must be an integer, not 1.5'),
    ('lr: [0.1]', 'lr must be a number, not [0.1]'),
    ('scale: 0.08', 'scale must be a list of 2 numbers, not 0.08'),
    ('model_kwargs: K=5', "model_kwargs must be names with values, not 'K=5'"),
    ('train_sizes: [16, half]', "train_sizes must be a list of integers, not [16, 'half']"),
    ('train_sizes: [16, 24.5]', 'train_sizes must be a list of integers, not [16, 24.5]'),
    ('ratio: [1]', 'ratio must be a list of 2 numbers, not [1]'),
    ('clip_mode: foo', '--clip-mode must be one of norm, value, agc, got foo'),
    ('opt: true', 'opt must be text, not True'),
    ('warmup_epochs: null', 'warmup_epochs must be an integer, not None'),
    ('lr_cycle_mul: 0', '--lr-cycle-mul must be more than 0, got 0'),
    ('crop_off_epoch: 12', 'crop_off_epoch is 12, an argument of earlier versions that this one lacks'),
    ("hflip: '3'", '--hflip must be from 0 to 1, got 3.0'),
])
def test_wrong_recipe(tmp_path, text, message, capsys):
    (tmp_path / 'wrong.yaml').write_text(text)
    with pytest.raises(SystemExit) as error:
        main(['-c', str(tmp_path / 'wrong.yaml'), 'x'])
    assert message in f'{error.value} {capsys.readouterr().err}'


@pytest.mark.parametrize('argv, message', [
    (['-c', 'cifar11', 'x'], "no recipe 'cifar11': neither a file nor one of cifar10"),
    ([], '--data-dir DIR'),
    (['x', '--epoch', '3'], 'unrecognized arguments: --epoch'),
    (['x', '--sched', 'plateau'], 'plateau is not supported'),
    (['x', '--amp-dtype', ''], '--amp-dtype must be one of float16, bfloat16, got'),
    (['x', '--amp-dtype', 'float8'], '--amp-dtype must be one of float16, bfloat16, got float8'),
    (['x', '--interpolation', 'random'], '--interpolation must be one of nearest, '),
    (['x', '--train-interpolation', 'foo'], '--train-interpolation must be one of nearest, '),
    (['x', '--train-crop-mode', 'foo'], '--train-crop-mode must be one of rrc, rkrc, rkrr, got foo'),
    (['x', '--remode', 'foo'], '--remode must be one of pixel, rand, const'),
    (['x', '--mixup-mode', 'foo'], '--mixup-mode must be one of batch, pair, elem'),
    (['x', '--lr-base-scale', 'foo'], '--lr-base-scale must be one of linear, sqrt'),
    (['x', '--smoothing', '1'], '--smoothing must be 0 or more and less than 1, got 1.0'),
    (['x', '--model-ema-decay', '5'], '--model-ema-decay must be from 0 to 1'),
    (['x', '--crop-pct', '2'], '--crop-pct must be more than 0 and at most 1, got 2.0'),
    (['x', '--mixup', 'nan'], '--mixup must be 0 or more, got nan'),
    (['x', '--scale', '0.5'], 'argument --scale: expected 2 arguments'),
    (['x', '--opt-betas', '0.9'], '--opt-betas must be two numbers or more, got [0.9]'),
    (['x', '--cutmix', '1', '-b', '7'], '--mixup and --cutmix pair the images: --batch-size must be even, got 7'),
    (['/nowhere', '--model', 'resnet18'], 'there is no folder /nowhere'),
    (['x'], 'which network? -c NAME takes a recipe, such as finetune'),
    (['x', '--train-sizes', '8', '0'], '--train-sizes must be 1 or more, got [8, 0]'),
    (['x', '--epochs', '0'], '--epochs must be 1 or more, got 0'),
    (['x', '--workers', '-1'], '--workers must be from 0 to 512, got -1'),
    (['x', '--workers', '10000'], '--workers must be from 0 to 512, got 10000'),
    (['x', '--lr', '-1'], '--lr must be 0 or more, got -1.0'),
    (['x', '--clip-grad', '-1'], '--clip-grad must be 0 or more, got -1.0'),
    (['x', '--seed', '5000000000'], '--seed must be from 0 to 2147483647'),
    (['x', '--decay-epochs', '0'], '--decay-epochs must be more than 0, got 0.0'),
    (['x', '--grad-accum-steps', '-1'], '--grad-accum-steps must be 1 or more'),
    (['x', '--model-kwargs', 'foo'], 'take KEY=VALUE'),
    (['x', '--model', 'resnet18', '--dataset', 'cifar10'], '--dataset cifar10: name it with its source, e.g. torch/cifar10'),
    (['x', '--model', 'resnet18', '--dataset', 'uoft-cs/cifar10'], 'e.g. torch/cifar10 or hfds/uoft-cs/cifar10'),
    (['--evaluate', 'nowhere', 'x'], 'nowhere is no run folder: it has no args.yaml'),
])
def test_wrong_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as error:
        main(argv)
    assert error.value.code
    assert message in f'{error.value} {capsys.readouterr().err}'
