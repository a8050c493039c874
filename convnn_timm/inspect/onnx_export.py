"""Export a network to ONNX, and compare onnxruntime's logits with PyTorch's."""
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import Iterator, List, NamedTuple, Tuple

import torch
import torch.nn as nn

__all__ = ['OPSET', 'TOLERANCE', 'Comparison', 'check_onnx', 'compare_onnx', 'export_onnx', 'sensitivity']

OPSET = 20  # version of the standard operators that torch's exporter writes by default
IMAGES_AT_ONCE = 16  # where the file takes any number
TOLERANCE = 1e-4  # largest difference of a logit that counts as agreement


def export_onnx(
        model: nn.Module,
        path: Path,
        input_size: Tuple[int, int, int],
        batch: int = 1,
        dynamic_batch: bool = False,
        opset: int = OPSET,
) -> None:
    """Write a network as one ONNX file, in standard operators, its weights included.

    Args:
        model: A network on the CPU in evaluation mode, (batch, *input_size) -> (batch, classes).
        path: The file. One that is there is replaced once the new one is complete.
        input_size: Channels, height and width of the images.
        batch: Number of images that the file takes at a time.
        dynamic_batch: Any number of images instead.
        opset: Version of ONNX's operators.

    Raises:
        ValueError: The network cannot take such images, or torch cannot export it.
    """
    images = torch.zeros(2 if dynamic_batch else batch, *input_size)  # torch.export would take 1 for a constant
    with torch.no_grad():
        try:
            model(images)  # says what is wrong in fewer words than the exporter
        except (AssertionError, RuntimeError) as error:
            raise ValueError(f'no images of {input_size[1]}x{input_size[2]}: {error}') from error
    shapes = ({0: torch.export.Dim('batch')},) if dynamic_batch else None
    with no_warnings():
        try:
            program = torch.onnx.export(
                model, (images,), dynamo=True, dynamic_shapes=shapes, opset_version=opset, input_names=['images'],
                output_names=['logits'], verbose=False)
        except torch.onnx.errors.OnnxExporterError as error:
            of = ' with any number of images; try a fixed one' if dynamic_batch else ''
            why = str(error.__cause__ or error).strip().splitlines()
            raise ValueError(f'torch cannot export this network{of}: {why[0]}') from error
    partial = path.with_name(f'{path.name}.part')
    try:
        program.save(partial, external_data=False)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


class Comparison(NamedTuple):
    """onnxruntime beside PyTorch on one image."""
    difference: float  # the largest of a logit
    same_class: bool
    moved: float = 0.  # how far PyTorch's own logits move, see `sensitivity`; measured where the two differ

    @property
    def agrees(self) -> bool:
        return self.difference <= TOLERANCE and self.same_class  # NaN does not

    @property
    def undecided(self) -> bool:
        """Whether the two differ on an image on which PyTorch differs from itself."""
        return self.moved > TOLERANCE


def check_onnx(model: nn.Module, path: Path, images: torch.Tensor) -> List[Comparison]:
    """Judge an exported file on images (N, *input_size)."""
    comparisons = []
    for image, *found in zip(images, *(values.tolist() for values in compare_onnx(model, path, images))):
        comparison = Comparison(*found)
        if not comparison.agrees:
            comparison = Comparison(*found, sensitivity(model, image.unsqueeze(0)).item())
        comparisons.append(comparison)
    return comparisons


def compare_onnx(model: nn.Module, path: Path, images: torch.Tensor) -> Tuple[torch.Tensor, torch.Tensor]:
    """Compare onnxruntime with PyTorch on images (N, *input_size).

    Returns:
        The largest difference of a logit, and whether both give the same class, (N,) each.
    """
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=['CPUExecutionProvider'])
    name, batch = session.get_inputs()[0].name, session.get_inputs()[0].shape[0]
    batch = batch if isinstance(batch, int) else min(len(images), IMAGES_AT_ONCE)
    padded = torch.cat([images, images[-1:].expand(-len(images) % batch, -1, -1, -1)])
    differences, same = [], []
    for part in padded.split(batch):
        found = torch.from_numpy(session.run(None, {name: part.numpy()})[0])
        with torch.no_grad():
            expected = model(part)
        differences.append((found - expected).abs().amax(1))
        same.append(found.argmax(1) == expected.argmax(1))
    return torch.cat(differences)[:len(images)], torch.cat(same)[:len(images)]


@torch.no_grad()
def sensitivity(model: nn.Module, images: torch.Tensor, step: float = 1e-6, repeats: int = 8) -> torch.Tensor:
    """How far a logit moves, (N,), if the pixels of images (N, *input_size) are changed at random by about `step`.

    The choice of the nearest neighbours is not continuous. Where two candidates differ by rounding alone, two programs
    may choose differently, and their logits differ by more than rounding. Such an image moves here too.
    """
    generator = torch.Generator().manual_seed(0)
    logits, moved = model(images), images.new_zeros(len(images))
    for _ in range(repeats):
        changed = images + step * torch.randn(images.shape, generator=generator)
        moved = moved.maximum((model(changed) - logits).abs().amax(1))
    return moved


@contextmanager
def no_warnings() -> Iterator[None]:
    """Keep the exporter's remarks on its own optimizations from the screen."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
