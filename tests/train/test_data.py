"""The trainer's images: which ones are read, and what becomes of them."""
import json
import shutil
import struct
from collections import Counter
from unittest.mock import Mock

import numpy as np
import pytest
import timm
import torch
import yaml
from image_folders import CLASSES
from PIL import Image
from runs import printed_result
from safetensors.torch import load_file

from convnn_timm.train.data import (
    FolderReader, MemoryBatches, class_names, class_numbers, create_batches, create_parts, holdout_split)
from convnn_timm.train.engine import main, parse_args
from convnn_timm.train.run_folder import read_summary


# Data sets

@pytest.mark.parametrize('argv, message', [
    (['--val-split', 'test'], "no folder 'test': it has train, validation. Expected are .*see --train-split"),
    (['--val-split', 'test', '--dataset', 'torch/image_folder'], "no folder 'test': it has train, validation. Exp"),
    (['--train-split', 'train[:50%]', '--val-split', 'train[50%:]'], 'only hfds/ data sets have parts of a split'),
])
def test_a_missing_split_is_not_replaced_by_all_images(flags, tmp_path, argv, message):
    with pytest.raises(SystemExit, match=message):
        main([*flags, *argv, '--output', str(tmp_path)])


@pytest.mark.parametrize('workers', ['0', '1'])
@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_an_unreadable_image_is_not_replaced_by_another(flags, images, tmp_path, cache, workers):
    data = shutil.copytree(images, tmp_path / 'data')
    bad = data / 'validation' / 'cat' / '3.png'
    bad.write_text('not an image')
    with pytest.raises(SystemExit) as error:
        main([*flags, cache, '--workers', workers, '--data-dir', str(data), '--output', str(tmp_path / 'out')])
    assert str(error.value) == f'error: {bad}: not an image'


def test_classes_that_differ_are_named(flags, images, tmp_path):
    data = shutil.copytree(images, tmp_path / 'data')
    (data / 'validation' / 'cat').rename(data / 'validation' / 'Cat')
    with pytest.raises(SystemExit, match=r'(?s)different classes:.*only in train: cat.*only in validation: Cat'):
        main([*flags, '--data-dir', str(data), '--output', str(tmp_path / 'out')])
    for split in 'train', 'validation':
        for name in 'Cat', 'cat', 'dog':
            shutil.rmtree(data / split / name, ignore_errors=True)
    with pytest.raises(SystemExit, match='several classes, and has bee'):
        main([*flags, '--data-dir', str(data), '--output', str(tmp_path / 'out')])


def test_a_data_set_of_torchvision_has_the_channels_of_the_model(flags, tmp_path):
    raw = tmp_path / 'MNIST' / 'raw'
    raw.mkdir(parents=True)
    for split in 'train', 't10k':
        images = torch.randint(256, (16, 28, 28), dtype=torch.uint8).numpy()
        head = struct.pack('>4i', 0x803, *images.shape)
        (raw / f'{split}-images-idx3-ubyte').write_bytes(head + images.tobytes())
        (raw / f'{split}-labels-idx1-ubyte').write_bytes(struct.pack('>2i', 0x801, 16) + bytes(range(10)) + bytes(6))
    flags = [
        *flags, '--data-dir', str(tmp_path), '--dataset', 'torch/mnist', '--epochs', '1', '--num-classes', '10',
        '--output', str(tmp_path / 'out'), '--experiment', 'run']
    with pytest.raises(SystemExit, match="torch/mnist has no split 'Train': it has train and validation"):
        main([*flags, '--train-split', 'Train'])  # not the test set
    main(flags)
    assert read_summary(tmp_path / 'out' / 'run')[-1]['eval_images'] == '16'


def test_a_class_with_several_names_is_one_class():
    imagenet = Mock(classes=[('crane',), ('tench', 'Tinca tinca'), ('crane',)], class_to_idx={'crane': 2, 'tench': 1})
    assert class_names(imagenet) == ['crane', 'tench, Tinca tinca', 'crane']


def test_classes_of_splits_have_timms_numbers(images, tmp_path):
    """The folder that an image lies in is its class, and numbers are in the order of numbers."""
    for name in 'x/10', 'x/9', 'b', 'A', 'y/9':
        shutil.copytree(images / 'train' / 'cat', tmp_path / 'train' / name)
    timms = timm.data.create_dataset('', root=tmp_path, split='train').reader
    ours = FolderReader(str(tmp_path / 'train'))
    assert ours.class_to_idx == timms.class_to_idx == {'9': 0, '10': 1, 'A': 2, 'b': 3}
    assert ours.samples == timms.samples


def test_holdout_is_stratified_and_always_the_same():
    targets = torch.randint(4, (1000,)).tolist()
    held_out = holdout_split(targets, 100)
    torch.manual_seed(5)
    assert held_out == holdout_split(targets, 100) and len(set(held_out)) == 100
    share = Counter(targets[i] for i in held_out)
    assert all(abs(share[c] - n / 10) <= 1 for c, n in Counter(targets).items())


def test_holdout_never_reads_the_validation_set(images, flags, tmp_path):
    (tmp_path / 'data').mkdir()
    (tmp_path / 'data' / 'train').symlink_to(images / 'train')  # and no validation/
    args = parse_args([*flags, '--data-dir', str(tmp_path / 'data'), '--holdout', '30'])
    train_part, eval_part, _ = create_parts(args)
    assert set(train_part.indices).isdisjoint(eval_part.indices)
    assert len(train_part) == 90
    assert Counter(eval_part.dataset[i][1] for i in eval_part.indices) == {0: 10, 1: 10, 2: 10}


# Batches

def loader_of(args, train, **kwargs):
    part = create_parts(args)[0 if train else 1]
    config = dict(input_size=(3, 16, 16), mean=(0.5,) * 3, std=(0.25,) * 3, interpolation='bicubic', crop_pct=1.)
    return create_batches(part, args, config, torch.device('cpu'), train, **kwargs)


def test_images_from_memory_are_timms(flags):
    def load(cache, train):
        loader = loader_of(parse_args([*flags, '--no-aug', '-b', '1', cache]), train)
        return [images[0].numpy().tobytes() for images, _ in loader]
    assert load('--cache', False) == load('--no-cache', False)
    assert sorted(load('--cache', True)) == sorted(load('--no-cache', True))  # each in an order of its own


@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_crops_are_of_what_the_evaluation_sees(flags, tmp_path, cache):
    """Not of a distorted image: the sides of a wide one are left out."""
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :8] = 255
    for split in ('train', 'validation'):
        (tmp_path / split / 'only').mkdir(parents=True)
        Image.fromarray(pixels).save(tmp_path / split / 'only' / '0.png')
    args = parse_args([*flags, '--data-dir', str(tmp_path), '-b', '1', cache, '--crop-padding', '0', '--crop-pct', '1'])
    (train_batch, _), (eval_batch, _) = (next(iter(loader_of(args, train))) for train in (True, False))
    assert torch.equal(train_batch, eval_batch) and eval_batch.unique().numel() == 1


@pytest.mark.parametrize('mode', ['constant', 'reflect'])
@pytest.mark.parametrize('cache', ['--cache', '--no-cache'])
def test_crop_padding(flags, tmp_path, cache, mode):
    """Every offset of the crop is equally likely, both directions of the flip too; outside is black or a mirror."""
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    for split in ('train', 'validation'):
        (tmp_path / split / 'only').mkdir(parents=True)
        for i in range(25 if split == 'train' else 1):
            Image.fromarray(np.repeat(pixels[..., None], 3, 2)).save(tmp_path / split / 'only' / f'{i}.png')
    args = parse_args([*flags, '--data-dir', str(tmp_path), '-b', '25', cache, '--crop-padding-mode', mode])
    loader, padded, crops, seen = loader_of(args, True), np.pad(pixels, 2, mode), {}, Counter()
    for y in range(5):
        for x in range(5):
            crop = padded[y:y + 16, x:x + 16]
            crops[crop.tobytes()], crops[crop[:, ::-1].tobytes()] = (y, x, False), (y, x, True)
    for epoch in range(40):
        if cache == '--cache':
            loader.loader.set_epoch(epoch)
        for batch, _ in loader:
            for image in (batch * 0.25 + 0.5).mul(255).round().byte()[:, 0].numpy():
                seen[crops[image.tobytes()]] += 1
    assert len(seen) == 50 and sum(seen.values()) == 1000
    assert max(seen.values()) < 45  # 20 expected, standard deviation 4.4


def test_images_are_flipped_in_every_other_epoch():
    images = torch.rand(400, 1, 1, 2).mul(255).byte()
    batches = MemoryBatches(images, torch.arange(400), 100, train=True, hflip=0.5, hflip_mode='alternate', seed=1)
    assert all(batch.dtype == torch.float32 for batch, _ in batches)  # whole ones, too: timm has nothing to convert
    flipped = []
    for epoch in range(4):
        batches.set_epoch(epoch)
        flips = torch.empty(400, dtype=torch.bool)
        for x, which in batches:
            flips[which] = (x == images[which].flip(3)).flatten(1).all(1)
        flipped.append(flips)
    different = images[:, 0, 0, 0] != images[:, 0, 0, 1]
    first, *others = [flips[different] for flips in flipped]
    assert 0.4 < first.float().mean() < 0.6
    assert torch.equal(others[0], ~first) and torch.equal(others[1], first) and torch.equal(others[2], ~first)


@pytest.mark.parametrize('other', [['--no-cache'], ['--color-jitter', '0.4']])
def test_images_that_are_not_in_memory_cannot_take_turns(flags, tmp_path, other):
    with pytest.raises(SystemExit, match='--hflip-mode alternate needs the training images in memory: with --cache'):
        main([*flags, '--hflip-mode', 'alternate', *other, '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_an_image_is_mirrored_no_further_than_it_reaches(flags, tmp_path):
    with pytest.raises(SystemExit, match='--crop-padding 16: images of 16x16 cannot be mirrored so far'):
        main([*flags, '--crop-padding', '16', '--crop-padding-mode', 'reflect', '--output', str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_processes_share_the_images_of_an_epoch():
    images = torch.arange(50, dtype=torch.uint8).reshape(50, 1, 1, 1).expand(50, 3, 4, 4)
    shares = [
        torch.cat([targets for _, targets in MemoryBatches(
            images, torch.arange(50), 8, train=True, seed=3, rank=rank, world_size=world_size)])
        for rank, world_size in ((0, 2), (1, 2), (0, 1))
    ]
    assert [len(share) for share in shares] == [24, 24, 48]
    assert torch.equal(torch.stack(shares[:2], 1).flatten(), shares[2])
    assert len(shares[2].unique()) == 48


# Own photographs

@pytest.fixture
def photos(images, tmp_path):
    """A folder for each class: 5 bees, 9 cats, 12 dogs, in several formats and sizes."""
    for name, count in zip(CLASSES, (5, 9, 12)):
        (tmp_path / 'photos' / name).mkdir(parents=True)
        for i in range(count):
            image = Image.open(images / 'train' / name / f'{i}.png').resize((40 + i, 30))
            image.save(tmp_path / 'photos' / name / f'{i}.{("png", "webp", "bmp", "tif")[i % 4]}')
    return tmp_path / 'photos'


def test_photographs_are_split_trained_resumed_and_evaluated(flags, photos, tmp_path, capsys, caplog):
    caplog.set_level('INFO', 'convnn_timm')
    for name in '.ipynb_checkpoints/x.png', 'cat/._0.png', 'cat/notes.txt', 'owl/.keep':
        (photos / name).parent.mkdir(exist_ok=True)
        (photos / name).write_text('no image')
    folder = main([str(photos), *flags[2:], '-b', '64', '--output', str(tmp_path), '--experiment', 'run'])
    trained = printed_result(capsys)
    assert trained.endswith('(epoch 3, 5 images)')
    assert f'{photos}: left out 1 file: 1 .txt' in caplog.text and f'no images in {photos}/owl' in caplog.text
    assert '26 images of 3 classes; 5 of them, always the same, are held out' in caplog.text
    assert '21 training images do not fill a batch of 64: --batch-size is now 21' in caplog.text
    assert json.loads((folder / 'model' / 'config.json').read_text())['label_names'] == list(CLASSES)

    recorded = yaml.safe_load((folder / 'args.yaml').read_text())
    assert (recorded['holdout'], recorded['holdout_share'], recorded['batch_size']) == (0, 0.2, 21)
    moved = photos.rename(tmp_path / 'moved')
    main(['--evaluate', str(folder), '--data-dir', str(moved)])
    assert printed_result(capsys) == trained
    moved = ['--resume', 'auto', '--data-dir', str(moved)]
    main(['-c', str(folder / 'args.yaml'), *moved])
    main([*flags, '-b', '64', *moved, '--output', str(tmp_path), '--experiment', 'run'])
    (tmp_path / 'moved' / 'bee' / '4.png').rename(tmp_path / 'moved' / 'bee' / '5.png')
    for argv in ['--evaluate', str(folder), *moved[2:]], ['-c', str(folder / 'args.yaml'), *moved]:
        with pytest.raises(SystemExit, match='moved holds other images than when the run began'):
            main(argv)


def test_the_recipe_for_photographs_starts_from_published_weights(photos, tmp_path, capsys):
    argv = ['-c', 'finetune', str(photos), '--img-size', '16', '--epochs', '1', '--output', str(tmp_path)]
    folder = main([*argv, '--lr', '1e-9', '--warmup-lr', '1e-9', '--experiment', 'run'])
    result = printed_result(capsys)
    tuned = load_file(folder / 'model' / 'model.safetensors')
    published = timm.create_model('resnet18_convnn_branching.cifar10', pretrained=True).state_dict()
    torch.testing.assert_close(tuned['layer4.0.conv1.branch2.weight'], published['layer4.0.conv1.branch2.weight'])
    assert tuned['fc.weight'].shape == (3, 512)
    main(['--evaluate', str(folder)])
    assert printed_result(capsys) == result


def test_photographs_are_held_out_of_every_class(photos):
    def split(*argv):
        args = parse_args([str(photos), '--model', 'test_resnet', *argv])
        train_part, eval_part, names = create_parts(args)
        assert names == list(CLASSES) and set(train_part.indices).isdisjoint(eval_part.indices)
        share = ['--holdout', '0', '--holdout-share', str(args.holdout_share)]
        again = parse_args([str(photos), '--model', 'test_resnet', *share])
        assert create_parts(again)[1].indices == eval_part.indices
        classes = class_numbers(eval_part.dataset)
        return [Counter(classes[i] for i in part.indices) for part in (train_part, eval_part)]

    assert split('--holdout', '13')[1].total() == 13
    assert split('--holdout', '1')[1] == {0: 1, 1: 1, 2: 1}
    assert split('--holdout', '25')[0] == {0: 1, 1: 1, 2: 1}
    assert split('--holdout-share', '0.5')[1].total() == 13


@pytest.mark.parametrize('folders, message', [
    (['a/cat', 'a/dog'], 'a folder of images for each of several classes, and has a$'),
    (['cat', 'dog', 'train'], "no folder 'validation': it has cat, dog, train. Expected are train/<class>/ and "),
    (['cat', 'dog', 'test'], "no folder 'train': it has cat, dog, test. Expected"),
    (['Train/cat', 'Train/dog', 'Val/cat', 'Val/dog'], "no folder 'train': it has Train, Val. Expected"),
    (['cat', ''], 'several classes, and has cat, and images outside of these folders$'),
    ([], 'there are no images in .*photos$'),
])
def test_a_folder_that_is_neither_of_classes_nor_of_splits(images, tmp_path, folders, message):
    (tmp_path / 'photos').mkdir()
    for i, name in enumerate(folders):
        (tmp_path / 'photos' / name).mkdir(parents=True, exist_ok=True)
        shutil.copy(images / 'train' / 'cat' / '0.png', tmp_path / 'photos' / name / '0.png')
    with pytest.raises(SystemExit, match=message):
        main([str(tmp_path / 'photos'), '--model', 'test_resnet', '--output', str(tmp_path / 'out')])
    assert not (tmp_path / 'out').exists()


def test_a_class_of_one_photograph(photos, tmp_path):
    (photos / 'a\x1b[31mpe').mkdir()
    shutil.copy(photos / 'bee' / '0.png', photos / 'a\x1b[31mpe')
    with pytest.raises(SystemExit, match=r'one to evaluate on is the least, and there is only one of a\\x1b\[31mpe'):
        main([str(photos), '--model', 'test_resnet', '--output', str(tmp_path / 'out')])
