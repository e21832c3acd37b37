"""Prompts through the pipeline's own encoder, and guidance against its own combination."""

import warnings
from typing import Any

import pytest
import torch
from tiny_stable_diffusion import WINDOW, tiny_sd, tiny_sd2, tiny_sdxl
from torch import Tensor, nn

from rtb_rl.adapters.prompts import CHUNK, Guided, encode_prompts
from rtb_rl.adapters.text_to_image import open_text_to_image
from rtb_rl.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

TEXTS = ["a red cat", "two dogs", "a fox"]
LONG = "abcdefghijklmnopqrst"


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def own(pipeline: Any, text: str, negative: str | None = None) -> tuple[Tensor, ...]:
    """The pipeline's encoding of one prompt: for SDXL of text, negative, pooled, negative."""
    settings = {"num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    with torch.no_grad():
        return pipeline.encode_prompt(text, device="cpu", negative_prompt=negative, **settings)


@pytest.mark.parametrize("negative", ["", "ugly"])
@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_tables_are_the_pipelines_own(make: Any, negative: str) -> None:
    """Row 0 is what it takes without a negative prompt, or with the one given."""
    pipeline = make()
    texts = [f"{letter}{number}" for letter in "abc" for number in range(CHUNK // 2)]
    prompts = encode_prompts(pipeline, texts, negative=negative)
    assert prompts.texts == tuple(texts) and prompts.negative == negative
    assert len(prompts.embedding) == len(texts) + 1 > CHUNK + 1
    for number in (0, CHUNK, len(texts) - 1):
        expected = own(pipeline, texts[number], negative or None)
        tables = (
            [prompts.embedding] if prompts.pooled is None else [prompts.embedding, prompts.pooled]
        )
        assert len(expected) == 2 * len(tables)
        for table, given, without in zip(tables, expected[::2], expected[1::2]):
            torch.testing.assert_close(table[number + 1], given[0])
            assert torch.equal(table[0], without[0])
    assert not prompts.embedding.requires_grad and prompts.state_dict() == {}
    assert not torch.allclose(prompts.embedding[1], prompts.embedding[2], atol=0.1)


def test_sdxl_without_a_negative_prompt_is_told_zeros() -> None:
    """force_zeros_for_empty_prompt, which an empty text that is given does not set off."""
    prompts = encode_prompts(tiny_sdxl(), TEXTS)
    assert prompts.pooled is not None
    assert not prompts.embedding[0].any() and not prompts.pooled[0].any()
    assert encode_prompts(tiny_sd(), TEXTS).embedding[0].any()


def test_sdxl_is_told_the_size_in_pixels() -> None:
    pipeline: Any = tiny_sdxl()
    for size, told in ((None, (16, 16)), (24, (24, 24)), ((8, 32), (8, 32))):
        prompts = encode_prompts(pipeline, TEXTS, size=size)
        theirs = pipeline._get_add_time_ids(told, (0, 0), told, torch.float32, 16)
        assert prompts.time_ids is not None and torch.equal(prompts.time_ids, theirs)
    assert encode_prompts(tiny_sd(), TEXTS).time_ids is None


@pytest.mark.parametrize("make", [tiny_sd, tiny_sdxl])
def test_warns_once_of_each_prompt_that_is_cut(make: Any) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_prompts(make(), ["a cat", LONG, LONG, LONG.upper()], negative=LONG[::-1])
    told = [
        str(warning.message) for warning in caught if "text encoder sees" in str(warning.message)
    ]
    assert len(told) == 3
    assert f"{LONG!r} has 22 tokens, more than the {WINDOW}" in told[0]
    assert told[0].endswith("cut off: 'opqrst'"), told[0]


def test_a_prompt_that_just_fits_is_not_warned_of() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        encode_prompts(tiny_sd(), [LONG[: WINDOW - 2]])
        just = len(caught)
        encode_prompts(tiny_sd(), [LONG[: WINDOW - 1]])
    assert just == 0 and len(caught) == 1


def test_refusals() -> None:
    with pytest.raises(InputError, match="no prompts; give at least one"):
        encode_prompts(tiny_sd(), [])
    with pytest.raises(InputError, match=r"give a list of prompts, \['a cat'\]"):
        encode_prompts(tiny_sd(), "a cat")
    with pytest.raises(InputError, match="images of 16 x 15 pixels don't fit.*multiples of 2"):
        encode_prompts(tiny_sdxl(), TEXTS, size=(16, 15))


@pytest.mark.parametrize("make", [tiny_sd, tiny_sd2, tiny_sdxl])
def test_guidance_is_the_pipelines_own(make: Any) -> None:
    """Its combination of two outputs, turned into x0, at every level; one call on two batches."""
    pipeline: Any = make()
    prior = open_text_to_image(pipeline, TEXTS, levels=4, guidance=3.0)
    x, number = torch.randn((3, 4, 8, 8), generator=seeded(1)), torch.tensor([2, 0, 2])
    added = own_inputs(pipeline, [TEXTS[i] for i in number])
    batches: list[int] = []
    handle = pipeline.unet.register_forward_pre_hook(lambda _, given: batches.append(len(given[0])))
    for k in range(1, 5):
        level = torch.full((3,), k)
        ours = prior.denoiser(x, level, number)
        assert batches.pop() == 6 and not batches
        timestep = prior.grid.timesteps[k]
        outputs = pipeline.unet(torch.cat([x, x]), timestep, **added).sample
        batches.clear()
        without, given = outputs.chunk(2)
        step = pipeline.scheduler.step
        pipeline.scheduler.set_timesteps(4)
        theirs = step(without + 3.0 * (given - without), int(timestep), x).pred_original_sample
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    handle.remove()


def own_inputs(pipeline: Any, texts: list[str]) -> dict[str, Any]:
    """The arguments of the U-Net with guidance, as the pipeline makes them."""
    rows = [own(pipeline, text) for text in texts]
    tables = [torch.cat(parts) for parts in zip(*rows)]
    inputs: dict[str, Any] = {"encoder_hidden_states": torch.cat([tables[1], tables[0]])}
    if len(tables) == 4:
        size = torch.tensor([[16.0, 16.0, 0.0, 0.0, 16.0, 16.0]]).repeat(2 * len(texts), 1)
        pooled = torch.cat([tables[3], tables[2]])
        inputs["added_cond_kwargs"] = {"text_embeds": pooled, "time_ids": size}
    return inputs


class RowDenoiser(nn.Module):
    """x + 10 row, and the rows of each call."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[list[int]] = []

    def forward(self, x: Tensor, level: Tensor, condition: Any) -> Tensor:
        assert len(x) == len(level) == len(condition)
        self.calls.append(condition.tolist())
        return x + 10.0 * condition.reshape(-1, 1, 1, 1)


def test_scale_one_is_the_prompt_alone() -> None:
    """Prompt i is row i + 1; one call on one batch at scale 1, on two batches else."""
    denoiser = RowDenoiser()
    x, level, number = torch.zeros(2, 1, 1, 1), torch.tensor([1, 2]), torch.tensor([0, 4])
    assert Guided(denoiser, 1.0)(x, level, number).flatten().tolist() == [10.0, 50.0]
    assert Guided(denoiser, 3.0)(x, level, number).flatten().tolist() == [30.0, 150.0]
    assert denoiser.calls == [[1, 5], [0, 0, 1, 5]]
