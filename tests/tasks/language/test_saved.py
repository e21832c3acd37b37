"""A posterior on disk writes what the one in memory writes; what can't be loaded or filled."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hub_models import save_bert
from torch import Generator, Tensor

from rtb_rl.core import OnDemand, Sampler
from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language.codec import train_byte_codec, train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.foreign import foreign_prior
from rtb_rl.tasks.language.posterior import TextPosterior, fit_text_posterior
from rtb_rl.tasks.language.prior import frame_for
from rtb_rl.tasks.language.prompts import Gap, Prompts, story_gaps
from rtb_rl.tasks.language.saved import export_infiller, infill_gap, load_infiller
from rtb_rl.tasks.language.texts import load_texts
from rtb_rl.tasks.language.trainers import TextPosteriorSettings
from rtb_rl.training import FinetuneSettings, Mix, generator_for

STORIES = load_texts("grammar").stories[:30]
TEXTS = [" ".join(story) for story in STORIES]
CODEC = train_word_codec(TEXTS, 300)
LEFT, RIGHT = "Anna had a dog. It was her best friend.", "The dog was gone."
SETTINGS = TextPosteriorSettings(
    finetune=FinetuneSettings(
        updates=3,
        beta_warmup=1,
        conditions=4,
        mix=Mix(on_policy=4, data=0),
        levels_per_path=None,
        learning_rate=2e-2,
        average_decay=0.5,
    ),
    log_every=3,
)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def new_prior(*, ends: bool = False, half: bool = False, pairs: bool = False) -> TextPrior:
    codec = train_byte_codec(TEXTS, 300) if pairs else CODEC
    shape = {"width": 16, "depth": 1, "heads": 2}
    network = MaskedTransformer(
        codec.vocabulary,
        pad=codec.pad,
        precision=torch.bfloat16 if half else None,
        generator=seeded(),
        **shape,
    )
    recipe = {**shape, "half_precision": half}
    return TextPrior(frame_for(codec, STORIES, ends=ends), network, 4, recipe)


def reward(gaps: Any) -> Tensor:
    return torch.tensor([float(len(gap.middle or "")) / 4 for gap in gaps])


def fit(directory: Path, prior: TextPrior, lengths: Any = None, **given: Any) -> TextPosterior:
    """A posterior of a few updates, exported."""
    prior.network.requires_grad_(False).eval()
    prompts = Prompts.of(prior.frame, story_gaps(STORIES, 2))
    settings = replace(SETTINGS, **given)
    found = fit_text_posterior(directory, prior, prompts, reward, settings)
    if lengths is None:
        lengths = (prompts.condition["free"] >= 0).sum(1).tolist()
    export_infiller(directory, prior, found.network, lengths)
    return found


def in_memory(found: TextPosterior, n: int, lengths: list[int] | None, seed: int) -> list[str]:
    prompts = Prompts.of(found.prior.frame, [Gap(LEFT, RIGHT)] * n, lengths)
    x0 = found.sampler.sample(prompts.condition, 1, generator=seeded(seed))
    return found.prior.frame.texts(x0.squeeze(1), prompts.condition)


KINDS = {
    "copy": ({}, {}),
    "adapters": ({}, {"lora_rank": 2}),
    "ends": ({"ends": True}, {}),
    "half precision": ({"half": True}, {}),
    "byte pairs": ({"pairs": True}, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_loaded_posterior_writes_what_the_one_in_memory_writes(kind, tmp_path):
    of_prior, of_posterior = KINDS[kind]
    found = fit(tmp_path / "posterior", new_prior(**of_prior), **of_posterior)
    n, ends = 20, of_prior.get("ends", False)
    wanted = in_memory(found, n, None if ends else [6] * n, 3)
    length = None if ends else 6
    for directory in (tmp_path / "posterior", tmp_path):
        infiller = load_infiller(directory)
        texts = infiller.infill(LEFT, RIGHT, n, length=length, generator=seeded(3))
        assert texts == wanted
    assert len(set(texts)) > 10
    prior = OnDemand(found.prior.left_only())
    prompts = Prompts.of(found.prior.frame, [Gap(LEFT, RIGHT)] * n, None if ends else [6] * n)
    x0 = Sampler(found.prior.diffusion, prior).sample(prompts.condition, 1, generator=seeded(3))
    assert found.prior.frame.texts(x0.squeeze(1), prompts.condition) != wanted  # it was trained


def test_adapters_are_merged_and_the_weights_alone_suffice(tmp_path):
    fit(tmp_path / "posterior", new_prior(), lora_rank=2)
    (tmp_path / "posterior" / "model.safetensors").unlink()
    assert len(load_infiller(tmp_path).infill(LEFT, RIGHT, 2, generator=seeded())) == 2


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    return str(save_bert(tmp_path_factory.mktemp("bert") / "model", TEXTS, window=80))


@pytest.mark.parametrize("rank", [None, 2], ids=["copy", "adapters"])
def test_a_posterior_of_a_hub_model_is_loaded_with_the_model(bert, rank, tmp_path):
    prior = foreign_prior(bert, levels=4, slots=16, window=80)
    given = {"lora_rank": rank, "lora_targets": ("query", "value")}
    found = fit(tmp_path / "posterior", prior, **given)
    wanted = in_memory(found, 20, [6] * 20, 3)
    infiller = load_infiller(tmp_path)
    assert infiller.infill(LEFT, RIGHT, 20, length=6, generator=seeded(3)) == wanted
    assert not (tmp_path / "posterior" / "tokenizer.json").exists()
    told = json.loads((tmp_path / "posterior" / "infilling.json").read_text())
    assert told["network"]["source"] == bert and told["frame"]["window"] == 80


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The directory of a run; gaps of 3 tokens were seen three times as often as of 9."""
    directory = tmp_path_factory.mktemp("run")
    fit(directory / "posterior", new_prior(), lengths=[3, 9, 3, 3])
    return directory


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    directory = tmp_path_factory.mktemp("ended")
    fit(directory / "posterior", new_prior(ends=True))
    return directory


def words(text: str) -> int:
    """Tokens of the codec of words."""
    return len(CODEC.encode([text])[0])


def test_lengths_are_drawn_as_they_were_seen(run):
    infiller = load_infiller(run)
    n = 400
    counts = [words(text) for text in infiller.infill(LEFT, RIGHT, n, generator=seeded())]
    assert set(counts) == {3, 9}
    assert counts.count(3) / n == pytest.approx(0.75, abs=4 * (0.75 * 0.25 / n) ** 0.5)
    assert {words(t) for t in infiller.infill(LEFT, RIGHT, 9, length=5, generator=seeded())} == {5}


def test_a_length_that_has_no_room_is_not_drawn(run):
    infiller = load_infiller(run)
    frame = infiller.prior.frame
    right = " ".join(["dog"] * (frame.window - words(LEFT) - 5))
    texts = infiller.infill(LEFT, right, 40, generator=seeded())
    assert {words(text) for text in texts} == {3}
    with pytest.raises(InputError, match="more than the window"):
        infiller.infill(LEFT, f"{right} dog dog dog", 2, generator=seeded())


def test_the_right_context_may_be_missing(run):
    texts = load_infiller(run).infill(LEFT, "", 5, length=4, generator=seeded())
    assert [words(text) for text in texts] == [4] * 5


def test_a_seed_makes_the_same_texts_again(run):
    given = (run, LEFT, RIGHT, 6)
    texts = infill_gap(*given, length=5, seed=1)
    assert texts == infill_gap(*given, length=5, seed=1) != infill_gap(*given, length=5, seed=2)
    generator = generator_for(1, "infill")
    assert texts == load_infiller(run).infill(LEFT, RIGHT, 6, length=5, generator=generator)


def test_a_posterior_that_ends_gaps_itself_writes_texts_of_all_lengths(ended):
    texts = load_infiller(ended).infill(LEFT, RIGHT, 300, generator=seeded())
    assert len({words(text) for text in texts if text}) >= 3


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "nothing": ({"left": "", "right": ""}, "there is no text; give at least one"),
    "no left": ({"left": ""}, "no text before the gap; give a left context"),
    "blank left": ({"left": "  "}, r"text 1 of 2 \('  '\) is empty; leave it out"),
    "unknown left": ({"left": "Zebras yodel."}, r"\('Zebras yodel.'\) has no known word"),
    "unknown right": ({"right": "Zebras yodel."}, r"text 2 of 2 .* has no known word"),
    "no texts": ({"n": 0}, "0 texts were asked for; ask for one or more"),
    "long left": ({"left": "dog " * 90}, "has 90 tokens, the window"),
    "long together": (
        {"left": "dog " * 40, "right": "dog " * 20},
        "60 tokens|more than the window",
    ),
    "long gap": ({"length": 40}, "a gap of 40 tokens is asked for"),
    "no gap": ({"length": 0}, "a gap of 0 tokens is asked for"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_can_not_be_filled_is_one_error(name, run):
    given, says = BAD[name]
    given = {"left": LEFT, "right": RIGHT, "n": 2, "length": None, **given}
    with pytest.raises(InputError, match=says):
        load_infiller(run).infill(**given, generator=seeded())


def test_a_gap_that_ends_itself_takes_no_length(ended):
    with pytest.raises(InputError, match="ends a gap by itself; leave the length out"):
        load_infiller(ended).infill(LEFT, RIGHT, 2, length=4, generator=seeded())


def copied(run: Path, to: Path) -> Path:
    folder = to / "posterior"
    folder.mkdir()
    for name in ("infilling.json", "tokenizer.json", "model.safetensors"):
        (folder / name).write_bytes((run / "posterior" / name).read_bytes())
    return folder


def test_a_directory_without_posterior(tmp_path):
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(InputError, match="holds no posterior of texts.*finished run of"):
            load_infiller(directory)


def without(told: dict[str, Any], name: str) -> str:
    return json.dumps({key: value for key, value in told.items() if key != name})


DAMAGE = {
    "half of it": lambda told: json.dumps(told)[:40],
    "nothing": lambda told: "",
    "a list": lambda told: "[]",
    "no network": lambda told: without(told, "network"),
    "no lengths": lambda told: without(told, "lengths"),
    "no levels": lambda told: without(told, "levels"),
    "words for lengths": lambda told: json.dumps({**told, "lengths": {"many": 1}}),
    "another frame": lambda told: json.dumps({**told, "frame": {"slot": 3}}),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_damaged_description_is_one_error(name, run, tmp_path):
    folder = copied(run, tmp_path)
    told = json.loads((folder / "infilling.json").read_text())
    (folder / "infilling.json").write_text(DAMAGE[name](told))
    with pytest.raises(CheckpointError, match=r"infilling.json is damaged .*run the program that"):
        load_infiller(tmp_path)


def test_damaged_weights_or_tokenizer_are_one_error(run, tmp_path):
    folder = copied(run, tmp_path)
    (folder / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(CheckpointError, match="model.safetensors can't be loaded"):
        load_infiller(tmp_path)
    (folder / "tokenizer.json").unlink()
    with pytest.raises(InputError, match="no tokenizer.json in"):
        load_infiller(tmp_path)
