"""`export-onnx`: a network as an ONNX file, compared with PyTorch on photographs."""
import argparse
import importlib
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Callable, Dict, List, Optional

from .loading import check_outputs, find_images, load_or_draw_model
from .terminal import CommandError, note, say, wrong_values

if TYPE_CHECKING:
    from PIL import Image


def add_commands(add: Callable[..., argparse.ArgumentParser]) -> None:
    sub = add(
        'export-onnx', export_onnx, 'write an ONNX file, and compare it with PyTorch on photographs',
        'export-onnx local-dir:output/my-run/model -o model.onnx\n'
        'export-onnx resnet18_convnn_branching.cifar10 -o model.onnx --dynamic-batch --check cat.jpg dog.jpg\n'
        'export-onnx resnet50_convnn_branching_224 -o model.onnx --img-size 192 --batch 8')
    sub.add_argument('model', metavar='MODEL', help='as for `predict`, or a model without weights')
    sub.add_argument('-o', '--output', required=True, type=Path, metavar='OUT.onnx', help='file to make')
    sub.add_argument('--img-size', type=int, metavar='N', help="side of the images (default: the model's)")
    batch = sub.add_mutually_exclusive_group()
    batch.add_argument('--batch', type=int, default=1, metavar='N', help='images at a time (default: %(default)s)')
    batch.add_argument('--dynamic-batch', action='store_true', help='any number of images at a time')
    sub.add_argument('--opset', type=int, metavar='N', help="version of ONNX's operators (default: 20)")
    sub.add_argument(
        '--check', nargs='+', metavar='IMAGE',
        help='images to compare on, with onnxruntime (default: two photographs that come with scikit-learn)')
    sub.add_argument('--force', action='store_true', help='replace a file that is there')


def export_onnx(args: argparse.Namespace) -> int:
    import torch
    from convnn_timm.images import preprocessing
    from convnn_timm.inspect import onnx_export

    opset = args.opset or onnx_export.OPSET
    newest = onnx_module('onnx').defs.onnx_opset_version()
    onnx_module('onnxscript')
    if not 18 <= opset <= newest:
        raise CommandError(f'--opset {opset}: torch and onnx write 18 to {newest} here', code=2)
    for flag, value in ('--batch', args.batch), ('--img-size', args.img_size):
        if value is not None and value < 1:
            raise CommandError(f'{flag} must be 1 or more, got {value}', code=2)
    runtime = onnx_module('onnxruntime', required=bool(args.check))
    check_outputs([args.output], args.force)
    with wrong_values():
        model = load_or_draw_model(args.model).eval()
        transform, mode, size = preprocessing(model, args.img_size)
        photos = {name: transform(photo) for name, photo in read_photos(args.check, mode).items()} if runtime else {}
        args.output.parent.mkdir(parents=True, exist_ok=True)
        say(f'exporting {args.model}, which takes minutes if it is large')
        onnx_export.export_onnx(model, args.output, size, args.batch, args.dynamic_batch, opset)
    shape = ' x '.join(map(str, ('any number' if args.dynamic_batch else args.batch, *size)))
    print(f'{args.output}: opset {opset}, images {shape}, {args.output.stat().st_size / 1e6:.1f} MB')
    if any(getattr(layer, 'sampling_type', '') == 'random' for layer in model.modules()):
        note('random candidates are those of every evaluation here, drawn once')
    if not runtime:
        note('not compared with PyTorch, for onnxruntime is missing')
        return 0

    say(f'comparing with PyTorch on {len(photos)} images')
    comparisons = onnx_export.check_onnx(model, args.output, torch.stack(list(photos.values())))
    for name, found in zip(photos, comparisons):
        verdict = 'agrees' if found.agrees else 'DIFFERS'
        if found.undecided:
            verdict = f"tells nothing: PyTorch's own logits move by {found.moved:.1g} if pixels change by a millionth"
        answer = 'same class' if found.same_class else 'ANOTHER CLASS'
        print(f'{name}: {answer}, logits of onnxruntime and PyTorch are {found.difference:.1g} apart, {verdict}')
    agreed = sum(found.agrees for found in comparisons)
    print(f'{agreed} of {len(photos)} images agree to {onnx_export.TOLERANCE:g}')
    if not all(found.agrees or found.undecided for found in comparisons):
        raise CommandError(f'{args.output} does not compute what {args.model} computes')
    return 0


def onnx_module(name: str, required: bool = True) -> Optional[ModuleType]:
    """Import a package that only `export-onnx` needs; None if it is missing and not required."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if required:
            raise CommandError(f'{name} is missing: pip install onnx onnxscript onnxruntime') from error


def read_photos(paths: Optional[List[str]], mode: str) -> Dict[str, 'Image.Image']:
    """Photographs to compare on, by name: those of the user, or scikit-learn's."""
    from convnn_timm.images import read_image, sample_photographs

    if paths:
        return {str(path): read_image(path, mode) for path in find_images(paths)}
    return {f'{name} of scikit-learn': photo for name, photo in sample_photographs(mode).items()}
