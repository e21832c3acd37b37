"""Image data sets: what is read is what was written, splits, and what is refused."""

import gzip
import struct
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from rtb_rl.errors import InputError
from rtb_rl.tasks.image import sources
from rtb_rl.tasks.image.images import ImageDataset, load_images, to_images, to_model_space

NAMES = ("zero", "one", "two")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (12, 6, 5), dtype=np.uint8)


@pytest.fixture
def labels():
    return np.arange(12, dtype=np.uint8) % 3


@pytest.fixture
def dataset(pixels, labels):
    images = torch.from_numpy(pixels)[:, None].float() / 255
    return ImageDataset("test", images, torch.from_numpy(labels).long(), NAMES)


def write_idx(folder, pixels, labels, *, kind="train", pack=lambda data: data, suffix=""):
    header = struct.pack(">4I", 2051, *pixels.shape), struct.pack(">2I", 2049, len(labels))
    for name, start, array in zip(("images-idx3", "labels-idx1"), header, (pixels, labels)):
        file = folder / f"{kind}-{name}-ubyte{suffix}"
        file.write_bytes(pack(start + array.tobytes()))
    return folder / f"{kind}-images-idx3-ubyte{suffix}"


def test_the_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    dataset, source = load_images(), load_digits(return_X_y=True)
    assert dataset.shape == (1, 8, 8) and len(dataset) == 1797
    assert np.array_equal(dataset.images.numpy().reshape(1797, 64) * 16, source[0])
    assert np.array_equal(dataset.labels.numpy(), source[1])
    assert dataset.classes == tuple("0123456789")


@pytest.mark.parametrize(("pack", "suffix"), [(lambda data: data, ""), (gzip.compress, ".gz")])
def test_idx_files_give_their_bytes_over_255(tmp_path, dataset, pixels, labels, pack, suffix):
    file = write_idx(tmp_path, pixels, labels, pack=pack, suffix=suffix)
    read = load_images(file)
    assert read.images.equal(dataset.images) and read.labels.equal(dataset.labels)
    assert read.sha256 == dataset.sha256
    assert read.classes == ("0", "1", "2")


def test_a_folder_of_idx_files_holds_all_of_them(tmp_path, pixels, labels):
    write_idx(tmp_path, pixels[:4], labels[:4], kind="t10k")
    write_idx(tmp_path, pixels[4:], labels[4:], kind="train")
    read = load_images(tmp_path)
    assert np.array_equal((read.images * 255).round().numpy()[:, 0], pixels)
    assert np.array_equal(read.labels.numpy(), labels)


def layouts(pixels):
    colours = np.stack([pixels, 255 - pixels, pixels // 2], -1)
    return {
        "without channels": (pixels, pixels[:, None]),
        "channels last": (colours, colours.transpose(0, 3, 1, 2)),
        "channels in front": (colours.transpose(0, 3, 1, 2), colours.transpose(0, 3, 1, 2)),
        "floats": (pixels.astype(np.float64) / 255, pixels[:, None]),
    }


@pytest.mark.parametrize(
    "layout", ["without channels", "channels last", "channels in front", "floats"]
)
def test_npz_files_are_read_in_every_layout(tmp_path, pixels, labels, layout):
    given, expected = layouts(pixels)[layout]
    np.savez(tmp_path / "a.npz", images=given, labels=labels, label_names=np.array(NAMES))
    read = load_images(tmp_path / "a.npz")
    assert torch.allclose(read.images, torch.from_numpy(expected.astype(np.float32)) / 255)
    assert read.classes == NAMES and np.array_equal(read.labels.numpy(), labels)


def test_a_folder_of_npz_files_holds_all_of_them(tmp_path, pixels, labels):
    for name, part in (("b", slice(5, None)), ("a", slice(0, 5))):
        np.savez(tmp_path / f"{name}.npz", images=pixels[part], labels=labels[part])
    read = load_images(tmp_path)
    assert np.array_equal((read.images * 255).round().numpy()[:, 0], pixels)


def test_a_folder_of_pictures_has_a_class_for_each_sub_folder(tmp_path, pixels):
    for name, rows in (("cat", [0, 1]), ("ant", [2])):
        (tmp_path / name).mkdir()
        for row in rows:
            Image.fromarray(pixels[row]).save(tmp_path / name / f"{row}.png")
    read = load_images(tmp_path)
    assert read.classes == ("ant", "cat") and read.labels.tolist() == [0, 1, 1]
    assert np.array_equal((read.images * 255).round().numpy()[:, 0], pixels[[2, 0, 1]])
    Image.fromarray(np.stack([pixels[3]] * 3, -1)).save(tmp_path / "cat" / "3.png")
    assert load_images(tmp_path).shape == (3, 6, 5)


def test_pictures_of_two_bytes_a_pixel_are_not_made_white(tmp_path):
    grey = np.arange(9, dtype=np.uint16).reshape(3, 3) * 8000
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        Image.fromarray(grey).save(tmp_path / name / "0.png")
    found = load_images(tmp_path).images[0, 0]
    torch.testing.assert_close(found, torch.from_numpy(grey / 65535).float(), atol=2e-3, rtol=0)


def test_pictures_whose_white_is_not_known_are_refused():
    with pytest.raises(InputError, match="x has pixels of mode I,"):
        sources._stacked([Image.new("I", (2, 2))], ["x"])


def test_a_split_depends_on_the_images_and_not_on_their_order(dataset):
    order = torch.randperm(12, generator=generator())
    other = ImageDataset("test", dataset.images[order], dataset.labels[order], NAMES)
    rest, held_out = dataset.split(0.25)
    assert (len(rest), len(held_out)) == (9, 3)
    found = {image.numpy().tobytes() for image in held_out.images}
    assert found == {image.numpy().tobytes() for image in other.split(0.25)[1].images}
    all_of_them = found | {image.numpy().tobytes() for image in rest.images}
    assert all_of_them == {image.numpy().tobytes() for image in dataset.images}
    assert len(all_of_them) == 12


def test_labels_go_with_their_images(dataset):
    known = {
        image.numpy().tobytes(): int(label) for image, label in zip(dataset.images, dataset.labels)
    }
    parts = [dataset.split(0.5)[1], dataset.of(["two", 0])]
    pairs = [(part.images, part.labels) for part in parts]
    for images, labels in [*pairs, dataset.sample(50, generator=generator())]:
        assert [known[image.numpy().tobytes()] for image in images] == labels.tolist()


def test_some_classes_keep_labels_and_names(dataset):
    part = dataset.of(["two", 0])
    assert set(part.labels.tolist()) == {0, 2} and len(part) == 8
    assert part.classes == NAMES and part.sha256 != dataset.sha256


def test_draws_are_uniform_and_follow_the_generator(dataset):
    images, _ = dataset.sample(12_000, generator=generator(1))
    assert images.equal(dataset.sample(12_000, generator=generator(1))[0])
    share = torch.bincount(torch.cdist(images.flatten(1), dataset.images.flatten(1)).argmin(1))
    assert float((share - 1000).square().sum() / 1000) < 32  # chi^2, 11 degrees: p = 0.0008


def test_model_space_and_back():
    images = torch.tensor([0.0, 0.25, 1.0])
    assert to_model_space(images).tolist() == [-1.0, -0.5, 1.0]
    assert to_images(to_model_space(images)).equal(images)
    assert to_images(torch.tensor([-3.0, 3.0])).tolist() == [0.0, 1.0]


IMAGES, LABELS = torch.rand(4, 1, 3, 3, generator=generator()), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("images", "labels", "said"),
    [
        (IMAGES * 255, LABELS, r"values from .* rescale them to \[0, 1\]"),
        (IMAGES - 0.5, LABELS, "values from -"),
        (IMAGES.where(IMAGES < 0.9, torch.nan), LABELS, "values from nan"),
        (IMAGES.where(IMAGES < 0.9, torch.inf), LABELS, "to inf"),
        (IMAGES[:, 0], LABELS, r"float32 \(4, 3, 3\).*\[n, channels, height, width\]"),
        (IMAGES.double(), LABELS, "torch.float64"),
        (IMAGES[:0], LABELS[:0], r"\(0, 1, 3, 3\); at least one"),
        (IMAGES, LABELS[:3], r"4 images .* labels torch.int64 \(3,\)"),
        (IMAGES, LABELS.float(), "int64 label an image"),
        (IMAGES, LABELS + 1, "from 1 to 3, its classes from 0 to 2"),
        (IMAGES, LABELS - 1, "from -1 to 1"),
    ],
)
def test_images_that_do_not_fit_are_refused(images, labels, said):
    with pytest.raises(InputError, match=said):
        ImageDataset("test", images, labels, NAMES)


def test_classes_and_parts_that_do_not_exist_are_refused(dataset):
    with pytest.raises(InputError, match="no class 'four'.*named zero, one, two"):
        dataset.of(["four"])
    with pytest.raises(InputError, match="no class 3; it has labels 0 to 2"):
        dataset.of([3])
    with pytest.raises(InputError, match="no image of class two"):
        dataset.of(["zero"]).of(["two"])
    with pytest.raises(InputError, match="leaves a part empty"):
        dataset.split(0.01)


def test_files_that_are_not_images_are_refused(tmp_path, pixels, labels):
    file = write_idx(tmp_path, pixels, labels)
    whole = file.read_bytes()
    for data in (whole[:-1], whole[:3], b"\0" + whole):
        file.write_bytes(data)
        with pytest.raises(InputError, match="no whole idx file"):
            load_images(file)
    file.with_name("train-labels-idx1-ubyte").unlink()
    with pytest.raises(InputError, match="train-labels-idx1-ubyte is missing"):
        load_images(file)
    packed = tmp_path / "t10k-images-idx3-ubyte.gz"
    packed.write_bytes(b"no gzip")
    (tmp_path / "t10k-labels-idx1-ubyte.gz").write_bytes(b"no gzip")
    with pytest.raises(InputError, match="no whole idx file"):
        load_images(packed)


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"images": np.zeros((2, 3, 3))}, "needs arrays 'images' and 'labels'"),
        ({"images": np.full((2, 3, 3), 7.0), "labels": [0, 1]}, r"rescale them to \[0, 1\]"),
        ({"images": np.zeros((2, 3, 3), np.int64), "labels": [0, 1]}, "are int64"),
        ({"images": np.zeros((2, 3)), "labels": [0, 1]}, r"\(2, 3\)"),
        ({"images": np.array([None, 1]), "labels": [0, 1]}, "no whole npz file of numbers"),
        ({"images": np.zeros((2, 3, 3)), "labels": ["a", "b"]}, "one whole number an image"),
        ({"images": np.zeros((2, 3, 3)), "labels": 3}, "one whole number an image"),
        ({"images": np.zeros((2, 3, 3)), "labels": [0.5, 1.9]}, "one whole number an image"),
        ({"images": np.zeros((2, 3, 3)), "labels": [np.nan, 1]}, "one whole number an image"),
    ],
)
def test_npz_files_that_do_not_fit_are_refused(tmp_path, arrays, said):
    np.savez(tmp_path / "a.npz", **arrays, allow_pickle=True)
    with pytest.raises(InputError, match=said):
        load_images(tmp_path / "a.npz")


def test_folders_that_do_not_fit_are_refused(tmp_path, pixels, labels):
    with pytest.raises(InputError, match="no images in the folder"):
        load_images(tmp_path)
    (tmp_path / "a").mkdir()
    Image.fromarray(pixels[0]).save(tmp_path / "a" / "0.png")
    Image.fromarray(pixels[0, :4]).save(tmp_path / "a" / "1.png")
    with pytest.raises(InputError, match=r"1.png is 5x4 pixels, .*0.png 5x6; resize"):
        load_images(tmp_path)
    (tmp_path / "a" / "1.png").write_bytes(b"no picture")
    with pytest.raises(InputError, match="1.png is no whole picture"):
        load_images(tmp_path)
    np.savez(tmp_path / "a.npz", images=pixels, labels=labels)
    np.savez(tmp_path / "b.npz", images=pixels[:, :4], labels=labels)
    with pytest.raises(InputError, match=r"shapes \(1, 6, 5\), \(1, 4, 5\)"):
        load_images(tmp_path)


def test_a_source_that_is_nothing_names_what_could_be():
    with pytest.raises(InputError, match="no image data at nowhere; give 'digits'"):
        load_images("nowhere")
    with pytest.raises(InputError, match="neither .npz nor named"):
        load_images(__file__)


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(InputError, match=r"scikit-learn.*pip install 'rtb-rl\[image\]'"):
        load_images("digits")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(InputError, match="hf:mnist needs the datasets library: pip install"):
        load_images("hf:mnist")


def test_a_hub_that_is_out_of_reach_is_one_error():
    pytest.importorskip("datasets")
    with pytest.raises(InputError, match="hf:no/such-set can't be had"):
        load_images("hf:no/such-set")
