"""Sets of labelled images, and the two spaces that images live in."""

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Generator, Tensor

from rtb_rl.errors import InputError
from rtb_rl.tasks.image.sources import Arrays, read_arrays


@dataclass(frozen=True, eq=False)
class ImageDataset:
    """Images float32 [n, channels, height, width] in [0, 1] and their labels int64 [n].

    `classes`: the name of each label. `sha256`: digest of images and labels. InputError for images
    out of range, not finite or of another shape, and for labels that don't fit.
    """

    name: str
    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    sha256: str = ""

    def __post_init__(self):
        self._check()
        if not self.sha256:
            digest = hashlib.sha256(str(tuple(self.images.shape)).encode())
            for tensor in (self.images, self.labels):
                digest.update(tensor.cpu().contiguous().numpy().data)
            object.__setattr__(self, "sha256", digest.hexdigest())

    def _check(self) -> None:
        images, labels = self.images, self.labels
        if images.ndim != 4 or images.dtype != torch.float32 or not images.numel():
            raise InputError(
                f"images of {self.name} are {images.dtype} {tuple(images.shape)}; at least one is"
                " needed, as float32 [n, channels, height, width]"
            )
        if labels.shape != (len(images),) or labels.dtype != torch.int64:
            raise InputError(
                f"{len(images)} images of {self.name} have labels {labels.dtype}"
                f" {tuple(labels.shape)}; give one int64 label an image"
            )
        low, high = (float(edge) for edge in images.aminmax())
        if not (low >= 0 and high <= 1):  # also NaN
            raise InputError(
                f"images of {self.name} have values from {low:.4g} to {high:.4g}; rescale them to"
                " [0, 1], or give bytes"
            )
        if int(labels.min()) < 0 or int(labels.max()) >= len(self.classes):
            raise InputError(
                f"labels of {self.name} run from {int(labels.min())} to {int(labels.max())}, its"
                f" classes from 0 to {len(self.classes) - 1}; name every class"
            )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width)."""
        return self.images.shape[1], self.images.shape[2], self.images.shape[3]

    def sample(self, n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """`n` images and their labels, drawn with replacement."""
        rows = torch.randint(len(self), (n,), generator=generator, device=self.images.device)
        return self.images[rows], self.labels[rows]

    def split(self, share: float) -> tuple["ImageDataset", "ImageDataset"]:
        """(the rest, `share` of the images), in the order of the images' digests.

        The same split whatever the order of the images: it needs no generator, and neither part is
        one writer's or one camera's share of the file. InputError where a part would be empty.
        """
        count = round(share * len(self))
        if not 0 < count < len(self):
            raise InputError(
                f"a share of {share} of {len(self)} images leaves a part empty; give a share"
                " between 0 and 1, or more images"
            )
        pixels = self.images.cpu().contiguous().numpy()
        order = sorted(range(len(self)), key=lambda row: hashlib.sha256(pixels[row].data).digest())
        chosen = torch.tensor(order)
        return self._rows(chosen[count:].sort().values), self._rows(chosen[:count].sort().values)

    def of(self, classes: Iterable[int | str]) -> "ImageDataset":
        """The images of some classes, given by label or name; labels and `classes` stay."""
        labels = [self.label(one) for one in classes]
        rows = torch.isin(self.labels, torch.tensor(labels, device=self.labels.device))
        if not bool(rows.any()):
            names = ", ".join(self.classes[label] for label in labels) or "(none)"
            raise InputError(f"{self.name} has no image of class {names}; choose another")
        return self._rows(rows.nonzero().squeeze(1))

    def to(self, device: torch.device | str) -> "ImageDataset":
        """The same on another device."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def label(self, given: int | str) -> int:
        """The label of a class given by label or name; InputError for one that is not there."""
        if isinstance(given, str) and given in self.classes:
            return self.classes.index(given)
        if isinstance(given, int) and 0 <= given < len(self.classes):
            return given
        raise InputError(
            f"{self.name} has no class {given!r}; it has labels 0 to {len(self.classes) - 1},"
            f" named {', '.join(self.classes)}"
        )

    def _rows(self, rows: Tensor) -> "ImageDataset":
        rows = rows.to(self.images.device)
        return ImageDataset(self.name, self.images[rows], self.labels[rows], self.classes)


def to_model_space(images: Tensor) -> Tensor:
    """Images in [0, 1] as points in [-1, 1], the space of a diffusion."""
    return 2 * images - 1


def to_images(x: Tensor) -> Tensor:
    """Points of a diffusion as images, clamped into [0, 1]."""
    return ((x + 1) / 2).clamp(0, 1)


def load_images(source: str | Path = "digits") -> ImageDataset:
    """The data set that `source` names.

    "digits": scikit-learn's 1,797 digits, 8x8. An idx file of images (MNIST), plain or gzipped,
    with its labels beside it; an npz file with `images` ([n, height, width], or with channels in
    front or last), `labels` and if it likes `label_names`; a folder: all idx or npz files in it,
    or else one sub-folder of pictures a class. "hf:NAME": the training split of a data set of the
    `datasets` library. Bytes are divided by 255. InputError for anything else.
    """
    name = str(source) if str(source).startswith("hf:") else Path(source).name
    return _joined(name, read_arrays(source))


def _joined(name: str, parts: Sequence[Arrays]) -> ImageDataset:
    """One data set of all parts; classes without names are called by their numbers."""
    images = [_tensor(images, name) for images, _, _ in parts]
    if len({one.shape[1:] for one in images}) > 1:
        shapes = ", ".join(str(tuple(one.shape[1:])) for one in images)
        raise InputError(f"the files of {name} hold images of shapes {shapes}; give one alone")
    labels = torch.from_numpy(np.concatenate([labels for _, labels, _ in parts]).astype(np.int64))
    numbers = tuple(str(label) for label in range(int(labels.max()) + 1)) if len(labels) else ()
    names = {given or numbers for _, _, given in parts}
    if len(names) > 1:
        raise InputError(f"the files of {name} name their classes differently; give one alone")
    return ImageDataset(name, torch.cat(images), labels, names.pop())


def _tensor(images: np.ndarray, name: str) -> Tensor:
    """float32 [n, channels, height, width] in [0, 1] of bytes or floats."""
    if images.ndim == 3:
        images = images[:, None]
    elif images.ndim == 4 and images.shape[3] in (1, 3, 4):
        images = images.transpose(0, 3, 1, 2)
    if images.dtype != np.uint8 and not np.issubdtype(images.dtype, np.floating):
        raise InputError(f"images of {name} are {images.dtype}; give uint8, or floats in [0, 1]")
    scale = np.float32(255 if images.dtype == np.uint8 else 1)
    return torch.from_numpy(np.ascontiguousarray(images, np.float32) / scale)
