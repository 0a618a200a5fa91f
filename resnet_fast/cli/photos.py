"""Real photographs that are already on this machine: the user's own, or those that ship inside Python packages."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import functional as transforms

from . import UserError

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MOST = 64

# Files inside the wheels. They are opened by path: the packages' own loaders would download what they do not find.
_SHIPPED = (
    ("sklearn", "datasets/images/china.jpg"),
    ("sklearn", "datasets/images/flower.jpg"),
    ("skimage", "data/chelsea.png"),
    ("skimage", "data/coffee.png"),
    ("skimage", "data/astronaut.png"),
    ("skimage", "data/rocket.jpg"),
    ("skimage", "data/motorcycle_left.png"),
    ("matplotlib", "mpl-data/sample_data/grace_hopper.jpg"),
)


@dataclass(frozen=True)
class Photo:
    """One photograph and where it came from."""

    name: str
    image: Image.Image
    source: str


def shipped() -> list[Photo]:
    """The photographs of scikit-learn, scikit-image and matplotlib, as far as they are installed.

    Raises:
        UserError: fewer than two.
    """
    found = []
    for package, inside in _SHIPPED:
        spec = importlib.util.find_spec(package)
        path = Path(spec.origin).parent / inside if spec and spec.origin else None
        if path is not None and path.is_file():
            found.append(Photo(path.stem.removesuffix("_left"), _open(path), package))
    if len(found) < 2:
        raise UserError(
            "no photographs on this machine: pip install 'resnet-fast[demo]', whose packages ship some, "
            "or name a folder of your own with --images"
        )
    return found


def from_folder(folder: str | Path) -> list[Photo]:
    """The first `MOST` images in `folder`, by name.

    Raises:
        UserError: no such folder, fewer than two images in it, or one that cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"--images {folder} is not a folder")
    paths = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)[:MOST]
    if len(paths) < 2:
        raise UserError(f"--images {folder} has {len(paths)} images ({', '.join(SUFFIXES)}); two or more are needed")
    return [Photo(path.stem, _open(path), str(folder)) for path in paths]


def preprocess(photos: list[Photo]) -> Tensor:
    """ImageNet's evaluation transform: (N, 3, 224, 224) float32, channels_last."""
    tensors = [transforms.to_tensor(crop(photo)) for photo in photos]
    images = torch.stack([transforms.normalize(tensor, MEAN, STD) for tensor in tensors])
    return images.to(memory_format=torch.channels_last)


def crop(photo: Photo) -> Image.Image:
    """The 224 x 224 pixels that the network sees."""
    return transforms.center_crop(transforms.resize(photo.image, 256, antialias=True), 224)


def _open(path: Path) -> Image.Image:
    try:
        return Image.open(path).convert("RGB")
    except OSError as error:
        raise UserError(f"cannot read {path} as an image: {error}") from None
