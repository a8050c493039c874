"""Folders of small images for the trainer to learn from."""
from pathlib import Path
from typing import Dict, Sequence

import numpy as np
from PIL import Image

CLASSES = ('bee', 'cat', 'dog')


def write_images(root: Path, splits: Dict[str, int], classes: Sequence[str] = CLASSES, size: int = 16) -> Path:
    """Write `root/<split>/<class>/<i>.png`, so many of each class; classes are told apart by a colour in the noise."""
    noise = np.random.default_rng(0)
    for split, count in splits.items():
        for channel, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = noise.integers(0, 160, (size, size, 3)).astype(np.uint8)
                pixels[..., channel] += 40
                Image.fromarray(pixels).save(root / split / name / f'{i}.png')
    return root
