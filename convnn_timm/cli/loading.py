"""What commands are given: devices, models, images, and the files to write."""
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Callable, Iterator, List, Optional, Sequence, Tuple

from convnn_timm.errors import printable

from .terminal import CommandError, announced, note, one_line, report

if TYPE_CHECKING:
    import torch
    from torch import nn

__all__ = ['ReadableImages', 'check_outputs', 'find_device', 'find_images', 'load_model', 'load_or_draw_model']


def find_device(name: Optional[str]) -> 'torch.device':
    """The device of that name; by default CUDA where there is one, else the CPU.

    Raises:
        CommandError: It cannot be used.
    """
    import torch

    name = name or ('cuda' if torch.cuda.is_available() else 'cpu')
    try:
        tensor = torch.zeros(1, device=name)
        tensor.cpu()
        return tensor.device
    except (RuntimeError, AssertionError, ImportError) as error:
        raise CommandError(f'device {name!r} cannot be used: {one_line(error)}', code=2) from error


def load_model(name: str, checkpoint: Optional[str] = None) -> 'nn.Module':
    """Build a model with weights, published ones or those of a checkpoint file.

    Args:
        name: Name for `timm.create_model`: a registered model, `local-dir:FOLDER` or `hf-hub:OWNER/NAME`.
        checkpoint: Weights of the model called `name`; their number of classes may differ from its default.

    Raises:
        UserError: There is no such model, or no weights that fit.
    """
    import timm
    from convnn_timm.models._checkpoint import checkpoint_kwargs
    from convnn_timm.models._common import unknown_model
    from convnn_timm.models._weights import (
        HUB_FAILURES, WeightsError, check_reach, download, explain, explained, split_revision)

    try:
        source, model_id = timm.models.parse_model_name(name)
    except ValueError as error:
        raise CommandError(str(error), code=2) from error
    if source is None and not timm.is_model(name):
        raise CommandError(unknown_model(name), code=2)
    if source == 'local-dir' and (Path(model_id) / 'model' / 'config.json').is_file():
        raise CommandError(f'{model_id} is the folder of a run, its model is local-dir:{model_id}/model', code=2)

    if source == 'hf-hub':
        repo = split_revision(model_id)
        with explained(*repo):
            download(repo[0], 'config.json', repo[1])  # timm's download would try for minutes where nothing answers

    kwargs = {}
    if checkpoint:
        if source is not None:
            raise CommandError(f'--checkpoint needs the name of an architecture; {name!r} has its own weights', code=2)
        kwargs = checkpoint_kwargs(name, Path(checkpoint))
    try:
        with announced(f'loading {name}'):
            if source is None and not checkpoint:
                check_reach(name)
            return timm.create_model(name, pretrained=True, **kwargs)
    except WeightsError:
        raise
    except Exception as error:
        if 'No pretrained weights exist' in str(error):
            raise CommandError(
                f'{name} has no published weights; train it (`convnn-timm train --model {name} ...`) and use '
                '`--model local-dir:RUN/model`, or name a file of weights with --checkpoint') from error
        if checkpoint:
            raise CommandError(
                f'{checkpoint} does not fit {name}: {one_line(error)} If the model was trained with other arguments, '
                'use the model/ folder of its run: --model local-dir:RUN/model') from error
        if source == 'hf-hub' and isinstance(error, HUB_FAILURES):
            raise CommandError(explain(error, *split_revision(model_id))) from error
        raise CommandError(f'cannot load {name}: {one_line(error)}') from error


def load_or_draw_model(name: str) -> 'nn.Module':
    """Build a model with weights, random ones if there are no others."""
    import timm
    import torch

    weights = True
    if timm.is_model(name):
        with suppress(RuntimeError):  # an unknown tag, of which load_model will tell
            config = timm.get_pretrained_cfg(name)
            weights = config is not None and config.has_weights
    if weights:
        return load_model(name)
    note(f'{name} has no published weights, its weights here are random')
    torch.manual_seed(0)
    return timm.create_model(name)


def find_images(paths: Sequence[str]) -> Iterator[Path]:
    """Yield the files named, and the images in the folders named and below, sorted; says which files it leaves out."""
    from convnn_timm.images import scan

    for path in map(Path, paths):
        if path.is_dir():
            found = scan(path)
            for line in found.notes():
                note(f'{printable(path)}: {line}')
            yield from found.images or [path]  # an empty folder is reported where it is read
        else:
            yield path


class ReadableImages:
    """The pixels of image files. A file that cannot be read is reported and left out; `status` says whether one was."""
    status = 0

    def __init__(self, paths: Sequence[Path], transform: Callable, mode: str):
        self.paths, self.transform, self.mode = paths, transform, mode

    def __iter__(self) -> Iterator[Tuple[Path, 'torch.Tensor']]:
        from convnn_timm.images import ImageError, read_image

        for path in self.paths:
            try:
                yield path, self.transform(read_image(path, self.mode))
            except ImageError as error:
                report(str(error))
                self.status = error.code


def check_outputs(paths: List[Path], force: bool) -> None:
    """Refuse what cannot be written, and to replace files without being told to, before any work is done."""
    for path in paths:
        if path.is_dir():
            raise CommandError(f'{path} is a folder: name a file')
        if path.exists() and not force:
            raise CommandError(f'{path} exists; --force replaces it')
        folder = next(parent for parent in path.absolute().parents if parent.exists())
        try:
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise CommandError(f'cannot write {path}: {folder}: {error.strerror}') from error
