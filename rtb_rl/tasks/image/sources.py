"""Where images come from: scikit-learn's digits, idx and npz files, folders, a hub."""

import gzip
import struct
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from rtb_rl.errors import InputError

EXTRA = "pip install 'rtb-rl[image]'"
PICTURES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"}
IDX_IMAGES, IDX_LABELS = 2051, 2049  # magic numbers: unsigned bytes in three axes, in one
FORMS = (
    "'digits', an idx or npz file, a folder of such files or of one folder of pictures a class,"
    " or hf:NAME of the datasets library"
)

Arrays = tuple[np.ndarray, np.ndarray, tuple[str, ...] | None]
"""Images of any layout, labels [n], and the names of the classes where the file has them."""


def read_arrays(source: str | Path) -> list[Arrays]:
    """The parts that `source` names, see `load_images`; InputError where there are none."""
    name = str(source)
    if name == "digits":
        return [_digits()]
    if name.startswith("hf:"):
        return [_from_hub(name)]
    path = Path(source).expanduser()
    if path.is_dir():
        return _from_folder(path)
    if not path.exists():
        raise InputError(f"no image data at {name}; give {FORMS}")
    return [_from_file(path)]


def _digits() -> Arrays:
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError(f"the digits come with scikit-learn, not installed: {EXTRA}") from None
    pixels, labels = load_digits(return_X_y=True)
    return pixels.reshape(-1, 8, 8).astype(np.float32) / 16, labels, None


def _from_folder(path: Path) -> list[Arrays]:
    files = sorted(file for file in path.iterdir() if file.suffix == ".npz" or _is_idx(file))
    return [_from_file(file) for file in files] if files else [_from_pictures(path)]


def _from_pictures(path: Path) -> Arrays:
    """The pictures in the sub-folders of a folder, one a class."""
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir())
    files = [(file, label) for label, folder in enumerate(folders) for file in _pictures(folder)]
    if not files:
        raise InputError(f"no images in the folder {path}; give {FORMS}")
    images = _stacked([_picture(file) for file, _ in files], [str(file) for file, _ in files])
    return images, np.array([label for _, label in files]), tuple(one.name for one in folders)


def _stacked(pictures: Sequence[Image.Image], names: Sequence[str]) -> np.ndarray:
    """uint8 [n, height, width] where all pictures are grey, else [n, height, width, 3]."""
    for name, picture in zip(names, pictures, strict=True):
        if picture.size != pictures[0].size:
            raise InputError(
                f"{name} is {picture.width}x{picture.height} pixels, {names[0]}"
                f" {pictures[0].width}x{pictures[0].height}; resize them to one size"
            )
    pictures = [_of_bytes(picture, name) for picture, name in zip(pictures, names, strict=True)]
    mode = "L" if all(picture.mode in {"1", "L"} for picture in pictures) else "RGB"
    return np.stack([np.asarray(picture.convert(mode)) for picture in pictures])


def _of_bytes(picture: Image.Image, name: str) -> Image.Image:
    """A grey picture of two bytes a pixel as one of a byte, which `convert` would make white."""
    if picture.mode.startswith("I;16"):
        return Image.fromarray((np.asarray(picture) / 257).round().astype(np.uint8))
    if picture.mode in {"I", "F"}:
        raise InputError(
            f"{name} has pixels of mode {picture.mode}, whose white is not known; save it with one"
            " or two bytes a pixel"
        )
    return picture


def _is_idx(file: Path) -> bool:
    return file.name.endswith(("-images-idx3-ubyte", "-images-idx3-ubyte.gz"))


def _pictures(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in PICTURES)


def _picture(file: Path) -> Image.Image:
    try:
        with Image.open(file) as picture:
            picture.load()
            return picture
    except OSError as error:
        raise InputError(f"{file} is no whole picture ({error}); remove or replace it") from None


def _from_file(path: Path) -> Arrays:
    if path.suffix == ".npz":
        return _from_npz(path)
    if not _is_idx(path):
        raise InputError(f"{path} is neither .npz nor named ...-images-idx3-ubyte; give {FORMS}")
    labels = path.with_name(path.name.replace("-images-idx3-", "-labels-idx1-"))
    if not labels.exists():
        raise InputError(f"{path} has no labels beside it: {labels.name} is missing; put it there")
    return _idx(path, IDX_IMAGES), _idx(labels, IDX_LABELS), None


def _idx(path: Path, magic: int) -> np.ndarray:
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        axes = magic & 0xFF
        found, *shape = struct.unpack_from(f">{axes + 1}I", data)
        if found != magic:
            raise ValueError(f"it begins with {found}, not {magic}")
        return np.frombuffer(data, np.uint8, offset=4 * (axes + 1)).reshape(shape)
    except (OSError, EOFError, ValueError, struct.error, zlib.error) as error:
        raise InputError(f"{path} is no whole idx file ({error}); get it again") from None


def _from_npz(path: Path) -> Arrays:
    try:
        with np.load(path, allow_pickle=False) as file:
            names = file.get("label_names")
            images, labels = file["images"], file["labels"]
    except KeyError:
        raise InputError(f"{path} needs arrays 'images' and 'labels'; save both") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise InputError(
            f"{path} is no whole npz file of numbers ({error}); save it again"
        ) from None
    if (
        labels.ndim != 1
        or labels.dtype.kind not in "biuf"
        or not np.array_equal(labels, labels // 1)
    ):
        raise InputError(
            f"{path} has labels {labels.dtype} {labels.shape}; give one whole number an image, as"
            " int64 [n], and names in 'label_names'"
        )
    return images, labels, None if names is None else tuple(str(name) for name in names)


def _from_hub(name: str) -> Arrays:
    try:
        import datasets  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise InputError(f"{name} needs the datasets library: pip install datasets") from None
    try:
        data = datasets.load_dataset(name.removeprefix("hf:"), split="train")
    except Exception as error:
        raise InputError(
            f"{name} can't be had ({str(error).splitlines()[0]}); give its files by path"
        ) from None
    kinds = {type(feature).__name__: column for column, feature in data.features.items()}
    if not {"Image", "ClassLabel"} <= kinds.keys():
        raise InputError(f"{name} has columns {data.features}; one Image and one ClassLabel needed")
    pictures, labels = list(data[kinds["Image"]]), np.array(data[kinds["ClassLabel"]])
    images = _stacked(pictures, [f"image {row} of {name}" for row in range(len(pictures))])
    return images, labels, tuple(data.features[kinds["ClassLabel"]].names)
