"""The first thing to run: a trained network names two pictures, then another is trained on handwritten digits.

The pictures are a photograph of a cat and the outline of a horse, from packages that this one requires. The digits
come with scikit-learn (`load_digits`): 1,797 real scans of 8x8 pixels from 13 writers, who wrote the training scans
and the held-out ones alike. All results are in one folder:

    photographs.png                               the two pictures, and what the trained network takes them for
    digits/{train,validation}/<digit>/NNNN.png    the scans
    run/                                          the training run, its model in run/model/
    predictions.png                               held-out scans, and what the new network read

A second call goes on where the first one stopped: an interrupted training resumes, a finished one is only shown.
"""
import logging
import os
import shutil
import time
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, List, NamedTuple, Sequence, Tuple

from .errors import UserError

if TYPE_CHECKING:
    import torch

__all__ = ['QuickstartError', 'quickstart']

MODEL = 'resnet18_convnn_branching'
GOAL = 95.0  # percent of the held-out scans
DISK = 0.5e9  # bytes: a checkpoint with its optimizer is 151 MB, there are three at most, and the model
PHOTOGRAPHS = {  # of classes that the network knows: what they show, and the packages that bring them
    'a cat': ('skimage', 'data/chelsea.png'),
    'the outline of a horse': ('skimage', 'data/horse.png'),
}
NOTE = 'Made by `convnn-timm quickstart`. Nothing else depends on this folder: delete it when you like.\n'


class QuickstartError(UserError):
    """The quickstart cannot go on, or ended below its goal; the message says what to do."""


class Guess(NamedTuple):
    """What the network takes a photograph for."""
    path: Path
    title: str  # what it shows
    answers: List[Tuple[str, float]]  # the most probable classes and their probabilities
    seen: 'torch.Tensor'  # the square that the network looked at


class Reading(NamedTuple):
    """What the network read on a scan."""
    path: Path
    truth: str
    answer: str

    @property
    def right(self) -> bool:
        return self.answer == self.truth


def quickstart(output: Path = Path('convnn-quickstart'), train_args: Sequence[str] = ()) -> float:
    """Name the pictures, write the digits, train on them, load the trained model and read the held-out scans.

    Args:
        output: Folder to make, or one that an earlier call made.
        train_args: Arguments for the trainer that override the recipe.

    Returns:
        Share of the held-out scans that the network reads right, in percent.

    Raises:
        QuickstartError: If `output` is in use for something else or its disk is full, or the share is below 95 %.
    """
    start = time.time()
    # PyTorch reads this when it is loaded. Threads that wait for each other then sleep instead of spinning. Beside
    # other programs the training takes minutes, not an hour.
    os.environ.setdefault('OMP_WAIT_POLICY', 'passive')
    data, run, picture = output / 'digits', output / 'run', output / 'predictions.png'
    say('', f'All goes to {output}: up to {DISK / 1e9:g} GB on the disk. The training takes minutes on the CPU.')
    claim_folder(output)
    say('', 'Ctrl-C stops it; the same command goes on from there. Delete the folder when you like.')

    say('1. Pictures', f"timm.create_model('{MODEL}', pretrained=True)")
    show_photographs(output / 'photographs.png')

    say('2. Data', f'1,797 scans of handwritten digits, 8x8, that come with scikit-learn: {data}')
    write_digits(data)
    counts = {split: len(list((data / split).rglob('*.png'))) for split in ('train', 'validation')}
    say('', f'{counts["train"]:,} to train on, {counts["validation"]:,} held out, as 16x16 PNG, one folder per digit.')

    say('3. Training', f'{MODEL} on the CPU. In each 3x3 layer of this ResNet, an eighth of the')
    say('', 'channels look at the pixels most like a pixel, the others at those around it.')
    train_digits(data, run, train_args)

    say('4. Loading', f"timm.create_model('local-dir:{run / 'model'}', pretrained=True)")
    readings = read_digits(run / 'model', data / 'validation')
    accuracy = 100 * sum(r.right for r in readings) / len(readings)
    say('', f'It reads {accuracy:.2f} % of the {len(readings)} held-out scans right.')

    say('5. Picture', f'Some of them, all mistakes first: {picture}')
    draw(readings, picture)
    if accuracy < GOAL:
        raise QuickstartError(
            f'{accuracy:.2f} % of the held-out scans are read right, {GOAL:.0f} % is the goal. '
            f'The curve of the training is {run / "curve.png"}; to start over, delete {output}')

    print(f'\nDone in {time.time() - start:.0f} s. What next?')
    print(f'  convnn-timm predict {data / "validation" / "3"} --model local-dir:{run / "model"}')
    print("  convnn-timm list 'resnet18*'")
    print('  convnn-timm train -c cifar10 --dataset torch/cifar10 --dataset-download --data-dir data')
    return accuracy


def say(step: str, text: str) -> None:
    print(f'{step:<13}{text}', flush=True)


def claim_folder(folder: Path) -> None:
    """Make the folder, with a note by which a later call knows that it may write here."""
    note = folder / 'README.txt'
    if note.is_file() and note.read_text() == NOTE:
        return
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise QuickstartError(f'{folder} exists and is not from a quickstart; choose another folder with --output')
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if free < DISK:
        raise QuickstartError(
            f'the disk of {folder} has {free / 1e9:.2f} GB left, up to {DISK / 1e9:g} are needed; '
            'choose another folder with --output')
    note.write_text(NOTE)


def show_photographs(picture: Path) -> None:
    """Let the published weights name the pictures, and draw both; without weights, say why and go on."""
    import timm
    import convnn_timm.models  # noqa: F401, registers the models

    logging.getLogger('huggingface_hub').setLevel(logging.ERROR)  # without network it reports each of its attempts
    try:
        model = timm.create_model(MODEL, pretrained=True).eval()
    except RuntimeError as error:  # WeightsError, or timm's if there are none
        say('', f'Left out, no trained weights can be had: {" ".join(str(error).split())}')
        return
    guesses = name_photographs(model)
    for guess in guesses:
        say('', f'{guess.title + ":":<24}' + ', '.join(f'{answer} {100 * p:.0f} %' for answer, p in guess.answers))
    say('', f'It answers with one of these, whatever it sees: {", ".join(model.pretrained_cfg["label_names"])}.')
    draw_photographs(guesses, picture)
    say('', f'The pictures, and what it saw of them: {picture}')


def name_photographs(model: 'torch.nn.Module') -> List[Guess]:
    """Classify those of the photographs whose package is installed."""
    from convnn_timm.images import preprocessing, read_image
    from convnn_timm.inspect import classify

    transform, mode, _ = preprocessing(model)
    mean, std = (values[:, None, None] for values in (transform.transforms[-1].mean, transform.transforms[-1].std))
    guesses = []
    for title, (package, file) in PHOTOGRAPHS.items():
        spec = find_spec(package)  # of a package that need not be imported
        if spec is None or not (path := Path(spec.origin).parent / file).is_file():
            continue
        pixels = transform(read_image(path, mode))
        answers, = classify(model, pixels[None], topk=3)
        guesses.append(Guess(path, title, answers, (pixels * std + mean).clip(0, 1)))
    return guesses


def draw_photographs(guesses: List[Guess], picture: Path) -> None:
    """Draw the photographs with the answers as titles, and below each what the network saw of it."""
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(4.6 * len(guesses), 9), layout='constrained')
    for axes, guess in zip(figure.subplots(2, len(guesses), squeeze=False).T, guesses):
        for ax in axes:
            ax.axis('off')
        axes[0].imshow(Image.open(guess.path).convert('RGB'))
        axes[0].set_title('\n'.join(f'{answer} {100 * p:.0f} %' for answer, p in guess.answers), fontsize=13)
        axes[1].imshow(guess.seen.permute(1, 2, 0).numpy())
        axes[1].set_title(f'{guess.title}, as {"x".join(map(str, guess.seen.shape[1:]))} pixels', fontsize=11)
    figure.savefig(picture, dpi=110)


def write_digits(folder: Path) -> None:
    """Write the scans as an image folder. The same 360 are held out each time, about 36 of each digit."""
    if folder.exists():
        return
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    scans = range(len(digits.target))
    held_out = set(train_test_split(scans, test_size=360, stratify=digits.target, random_state=0)[1])

    partial = folder.with_name(folder.name + '.partial')  # so that an interrupted call leaves no half-filled folder
    shutil.rmtree(partial, ignore_errors=True)
    for i, (scan, digit) in enumerate(zip(digits.images, digits.target)):
        image = Image.fromarray((scan * (255 / 16)).round().astype(np.uint8))  # values 0 .. 16, ink is bright
        path = partial / ('validation' if i in held_out else 'train') / str(digit) / f'{i:04d}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.resize((16, 16), Image.Resampling.BICUBIC).save(path)
    os.replace(partial, folder)


def train_digits(data: Path, run: Path, train_args: Sequence[str] = ()) -> None:
    from .train.engine import main as train

    try:
        train([
            '-c', 'digits', '--model', MODEL, '--data-dir', str(data), '--device', 'cpu',
            '--output', str(run.parent), '--experiment', run.name, '--resume', 'auto', *train_args,
        ])
    except SystemExit as stop:
        if not isinstance(stop.code, str):
            raise QuickstartError('interrupted; run the quickstart again to go on', code=stop.code) from stop
        raise QuickstartError(
            f'the training ended early: {str(stop).removeprefix("error: ")}\n'
            f'Run the quickstart again to go on, or delete {run.parent} to start over') from stop


def read_digits(model_folder: Path, images: Path) -> List[Reading]:
    """Classify all scans of a folder with a saved model."""
    import timm
    import torch
    from convnn_timm.images import preprocessing, read_image
    from convnn_timm.inspect import classify

    model = timm.create_model(f'local-dir:{model_folder}', pretrained=True).eval()
    transform, mode, _ = preprocessing(model)
    files = sorted(images.rglob('*.png'))
    pixels = torch.stack([transform(read_image(file, mode)) for file in files])
    answers = [answer for part in pixels.split(60) for (answer, _), in classify(model, part, topk=1)]
    return [Reading(file, file.parent.name, answer) for file, answer in zip(files, answers)]


def draw(readings: List[Reading], picture: Path, rows: int = 6, columns: int = 10) -> None:
    """Draw a sheet of scans with the answers as titles: the mistakes first, then right ones evenly from all digits."""
    from matplotlib.figure import Figure
    from PIL import Image

    wrong = [r for r in readings if not r.right][:rows * columns]
    right = [r for r in readings if r.right]
    room = min(rows * columns - len(wrong), len(right))
    shown = wrong + [right[i * len(right) // room] for i in range(room)]

    figure = Figure(figsize=(columns, 1.25 * rows + 0.6), layout='constrained')
    figure.suptitle(
        f'{len(shown)} of {len(readings)} held-out scans and what {MODEL} read\n'
        f'{sum(not r.right for r in readings)} of {len(readings)} are wrong (framed, ✗)')
    for axes in figure.subplots(rows, columns).flat:
        axes.axis('off')
    for axes, reading in zip(figure.axes, shown):
        axes.axis('on')
        axes.set(xticks=[], yticks=[])
        axes.imshow(Image.open(reading.path), cmap='gray_r', vmin=0, vmax=255)
        axes.spines[:].set(visible=not reading.right, linewidth=3, color='tab:red')
        if reading.right:
            axes.set_title(reading.answer, fontsize=11)
        else:
            axes.set_title(f'✗ {reading.answer}, is {reading.truth}', fontsize=11, color='tab:red', weight='bold')
    figure.savefig(picture, dpi=120)
