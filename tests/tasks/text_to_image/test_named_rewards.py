"""Rewards by name: what each makes of known images, and names that there are not."""

import os
import sys

import pytest
import torch

from rtb_rl.errors import InputError
from rtb_rl.tasks.image.rewards import jpeg_compressibility
from rtb_rl.tasks.text_to_image.named_rewards import STRENGTH, named_reward
from rtb_rl.tasks.text_to_image.rewards import CheckedReward, is_differentiable
from rtb_rl.tasks.text_to_image.shapes import CELLS, draw_images

MODULE = """
def make():
    return lambda images, prompts, metadata: images.mean((1, 2, 3))
def number():
    return 3.0
def broken():
    import no_such_package
"""


def cells_drawn(*wanted):
    cells = torch.tensor([CELLS.index(cell) for cell in wanted])
    return draw_images(cells, generator=torch.Generator().manual_seed(0))


def values(name, images, prompts=None):
    return CheckedReward(named_reward(name))(images, prompts or ["a shape"] * len(images))[0]


def test_a_cell_of_shapes_falls_by_its_strength():
    """Nothing for the cell itself, half for one that is right in part, all for another."""
    images = cells_drawn(
        ("yellow", "triangle"), ("yellow", "circle"), ("red", "triangle"), ("blue", "square")
    )
    found = values("cell:yellow triangle", images)
    expected = torch.tensor([0.0, -STRENGTH / 2, -STRENGTH / 2, -STRENGTH])
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)
    assert is_differentiable(named_reward("cell:yellow triangle"))


def test_colours_and_shapes_of_prompts_or_by_name():
    images = cells_drawn(("red", "circle"), ("blue", "square"))
    for name in ("colour:red", "shape:circle"):
        first, second = values(name, images).tolist()
        assert first > second, name
    prompts = ["a red circle", "a red circle"]
    for name, given in (("colour", "colour:red"), ("shape", "shape:circle")):
        assert torch.equal(values(name, images, prompts), values(given, images))


@pytest.mark.parametrize("name", ["compressible", "incompressible"])
def test_a_size_of_a_file_has_no_argument_to_ignore(name):
    with pytest.raises(InputError, match=f"reward {name} takes nothing behind a colon, not '50'"):
        named_reward(f"{name}:50")


def test_sizes_of_files_have_opposite_signs_and_no_gradient():
    images = torch.rand((2, 3, 8, 8), generator=torch.Generator().manual_seed(0))
    small, large = (values(name, images) for name in ("compressible", "incompressible"))
    assert torch.equal(small, -large) and (small < 0).all()
    assert torch.equal(small, jpeg_compressibility()(images, None))
    assert not is_differentiable(named_reward("compressible"))


@pytest.mark.parametrize("folder", ["searched", "current"])
def test_a_reward_of_one_s_own(folder, tmp_path, monkeypatch):
    """From a package on the path, and from a file in the current directory."""
    (tmp_path / "own_rewards").mkdir()
    (tmp_path / "own_rewards" / "__init__.py").write_text("")
    (tmp_path / "own_rewards" / "bright.py").write_text(MODULE)
    (tmp_path / "own_reward_file.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", os.getcwd())])
    if folder == "searched":
        monkeypatch.syspath_prepend(tmp_path)
    else:
        monkeypatch.chdir(tmp_path)
    images = torch.full((1, 3, 4, 4), 0.25)
    try:
        for module in ("own_rewards.bright", "own_reward_file"):
            assert values(f"{module}:make", images).item() == 0.25
        with pytest.raises(InputError, match=r"bright:number\(\) returned float, not a function"):
            named_reward("own_rewards.bright:number")
        for factory, words in (("none", "no attribute 'none'"), ("broken", "no_such_package")):
            with pytest.raises(InputError, match=f"{factory} can't be imported .*{words}"):
                named_reward(f"own_reward_file:{factory}")
    finally:
        for name in ("own_rewards.bright", "own_rewards", "own_reward_file"):
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nice", "there is no reward 'nice'; give one of cell, colour, shape.*PACKAGE.MODULE:FACT"),
        ("color:red", "there is no reward 'color:red'"),
        ("rewards.nice", "there is no reward 'rewards.nice'"),
        ("no_package.rewards:nice", "no_package.rewards:nice can't be imported"),
        ("cell", "needs a colour and a shape, not ''; give for example 'cell:yellow triangle'"),
        ("cell:red", "needs a colour and a shape, not 'red'"),
        ("cell:red cat", "there is no red cat; colours are red.*shapes circle"),
        ("colour:purpel", "there is no colour 'purpel'; choose among red"),
        ("shape:blob", "there is no shape 'blob'; choose among circle"),
        ("clip:no/model", "no CLIP model can be read from 'no/model'"),
    ],
)
def test_names_that_there_are_not(name, words):
    with pytest.raises(InputError, match=words):
        named_reward(name)
