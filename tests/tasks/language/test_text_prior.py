"""The masked language model of stories: its examples, what it is shown, and its training."""

import json
import math
from dataclasses import replace
from itertools import chain

import pytest
import torch
from safetensors.torch import load_file
from torch import Generator, Tensor

from rtb_rl.core import IndependentReveals, MaskedDiffusion, OnDemand, Sampler, linear_masking
from rtb_rl.errors import InputError
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language import prior as prior_module
from rtb_rl.tasks.language.codec import train_byte_codec, train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.prior import (
    StoryGaps,
    TextPriorSettings,
    fit_text_prior,
    frame_for,
    held_out_loss,
)
from rtb_rl.tasks.language.prompts import Frame, Prompts, story_gaps
from rtb_rl.tasks.language.texts import load_texts
from rtb_rl.training import Pretrainer, PretrainSettings, loop

STORIES = load_texts("grammar").stories[:60]
CODEC = train_word_codec([" ".join(story) for story in STORIES], 300)
FRAME = frame_for(CODEC, STORIES, ends=False)
ENDED = frame_for(CODEC, STORIES, ends=True)
TINY = TextPriorSettings(
    width=16,
    depth=1,
    heads=2,
    levels=4,
    pretrain=PretrainSettings(steps=6, batch=8, learning_rate=3e-3),
)


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def sentences(story: tuple[str, ...]) -> list[list[int]]:
    """Ids of each sentence where it stands."""
    return CODEC.encode([" " * (i > 0) + sentence for i, sentence in enumerate(story)])


def test_a_frame_has_room_for_the_longest_sentence_and_the_longest_story():
    lengths = [[len(row) for row in sentences(story)] for story in STORIES]
    longest, window = max(map(max, lengths)), max(map(sum, lengths))
    assert (FRAME.slots, FRAME.window, FRAME.ends) == (longest, window, False)
    assert (ENDED.slots, ENDED.window, ENDED.ends) == (longest + 1, window + longest + 1, True)
    for frame in (FRAME, ENDED):
        for hidden in range(1, 5):
            Prompts.of(frame, story_gaps(STORIES, hidden))  # each has a place


def written(x0: Tensor, condition: dict[str, Tensor], row: int) -> list[int]:
    """The sequence of an example with its point in it."""
    found = condition["tokens"][row].tolist()
    for token, place in zip(x0[row].tolist(), condition["free"][row].tolist(), strict=True):
        if place >= 0:
            assert found[place] == token
    return found


@pytest.mark.parametrize("ends", [False, True])
def test_examples_are_whole_stories_and_sentences_with_and_without_what_follows(ends):
    frame, n = (ENDED if ends else FRAME), 2000
    x0, condition = StoryGaps(frame, STORIES)(n, generator=seeded())
    assert x0.shape == condition["free"].shape == condition["tokens"].shape == (n, frame.window)
    known = {}
    for story in STORIES:
        parts = sentences(story)
        known[tuple(chain(*parts))] = ("whole", 0)
        for hidden in range(1, 5):
            gap = parts[hidden] + [CODEC.end] * (frame.slots - len(parts[hidden])) * ends
            for kind, right in (("right", parts[hidden + 1 :]), ("left", [])):
                row = (*chain(*parts[:hidden]), *gap, *chain(*right))
                known.setdefault(row, (kind, hidden))
    counts: dict[str, int] = {}
    for row in range(n):
        sequence = written(x0, condition, row)
        used = [place for place in condition["free"][row].tolist() if place >= 0]
        assert used == list(range(used[0], used[-1] + 1)) and not x0[row, len(used) :].any()
        text = tuple(token for token in sequence if token != CODEC.pad)
        assert sequence[len(text) :] == [CODEC.pad] * (frame.window - len(text))
        assert text in known
        if used[0] == 0:
            kind = "whole"
            assert len(used) == len(text)
        else:
            kind = "left" if used[-1] == len(text) - 1 else "right"
            if ends:
                assert len(used) == frame.slots
        counts[kind] = counts.get(kind, 0) + 1
    # the last sentence, a quarter of the hidden ones, has nothing to its right
    for kind, share in (("whole", 0.5), ("left", 0.25 + 0.25 / 4), ("right", 0.25 * 3 / 4)):
        error = 4 * (share * (1 - share) / n) ** 0.5
        assert counts[kind] / n == pytest.approx(share, abs=error), kind


def test_every_sentence_but_the_first_is_hidden_equally_often():
    n = 3000
    examples = StoryGaps(FRAME, STORIES[:1])
    _, condition = examples(n, generator=seeded(1))
    begins = condition["free"][:, 0]
    ends = torch.tensor([len(row) for row in sentences(STORIES[0])]).cumsum(0)
    parts = [int((begins == end).sum()) for end in ends[:4]]
    for count in parts:
        assert count / n == pytest.approx(1 / 8, abs=4 * (7 / 64 / n) ** 0.5)
    assert sum(parts) + int((begins == 0).sum()) == n


def test_examples_have_the_tokens_of_prompts_to_the_last_byte():
    """Bytes hold the space before a word: the first sentence of a text has none."""
    codec = train_byte_codec([" ".join(story) for story in STORIES], 400)
    frame = frame_for(codec, STORIES, ends=False)
    (prompt,) = Prompts.of(frame, story_gaps(STORIES[:1], 2)).condition["tokens"].tolist()
    x0, condition = StoryGaps(frame, STORIES[:1])(200, generator=seeded())
    whole = codec.encode([" ".join(STORIES[0])])[0]
    seen = [place for place, token in enumerate(prompt) if token not in (codec.pad, codec.mask)]
    assert [prompt[place] for place in seen] == [whole[place] for place in seen]
    for row in range(200):
        text = [token for token in written(x0, condition, row) if token != codec.pad]
        assert text == whole[: len(text)]
    stories = codec.encode([" ".join(story) for story in STORIES])
    assert frame.window == max(map(len, stories))


def untrained(frame: Frame = FRAME, levels: int = 8, seed: int = 0) -> TextPrior:
    network = MaskedTransformer(
        CODEC.vocabulary, pad=CODEC.pad, width=16, depth=1, heads=2, generator=seeded(seed)
    )
    return TextPrior(frame, network, levels, {})


def test_the_prior_is_not_shown_what_is_right_of_the_gap():
    prior = untrained()
    condition = Prompts.of(FRAME, story_gaps(STORIES[:6], 2)).condition
    changed = dict(condition)
    other = condition["tokens"].roll(1, 0)
    changed["tokens"] = torch.where(condition["right"], other, condition["tokens"])
    assert not torch.equal(changed["tokens"], condition["tokens"])
    x, level = prior.diffusion.start(6, generator=seeded()), torch.full((6,), 8)
    with torch.no_grad():
        left = [prior.left_only()(x, level, given) for given in (condition, changed)]
        both = [prior.both_sides()(x, level, given) for given in (condition, changed)]
    assert torch.equal(*left)
    used = condition["free"] >= 0
    assert ((both[0] - both[1]).nan_to_num().abs().amax(-1)[used] > 1e-6).all()
    # neither how much there is of it
    shorter = dict(condition)
    shorter["tokens"] = torch.where(condition["right"], CODEC.pad, condition["tokens"])
    shorter["right"] = torch.zeros_like(condition["right"])
    with torch.no_grad():
        alone = prior.both_sides()(x, level, shorter)
    torch.testing.assert_close(alone, left[0])


def test_left_context_matters_to_the_prior():
    prior = untrained()
    condition = Prompts.of(FRAME, story_gaps(STORIES[:2], 2)).condition
    changed = {**condition, "tokens": condition["tokens"].clone()}
    changed["tokens"][:, 0] = CODEC.encode(["dog"])[0][0]
    x, level = prior.diffusion.start(2, generator=seeded()), torch.full((2,), 8)
    with torch.no_grad():
        one, other = (prior.left_only()(x, level, given) for given in (condition, changed))
    assert (one - other).nan_to_num().abs().max() > 1e-4


@pytest.mark.parametrize("frame", [FRAME, ENDED], ids=["lengths", "ends"])
def test_drawn_texts_hold_no_special_token(frame):
    prior = untrained(frame)
    prompts = Prompts.of(frame, story_gaps(STORIES, 3))
    x0 = Sampler(prior.diffusion, OnDemand(prior.left_only())).sample(
        prompts.condition, 4, generator=seeded()
    )
    used = (prompts.condition["free"] >= 0)[:, None].expand_as(x0)
    drawn = set(x0[used].tolist())
    assert drawn.isdisjoint(CODEC.never) and len(drawn) > 150
    assert (CODEC.end in drawn) == frame.ends
    assert not x0[~used].any()


def test_an_untrained_network_costs_about_log_v_a_token():
    network = untrained().network
    assert isinstance(network, MaskedTransformer)
    with torch.no_grad():
        network.trunk.tokens.weight.mul_(1e-3)  # nearly equal logits
    for levels in (1, 16):
        reveals = IndependentReveals(linear_masking(levels), FRAME.window)
        diffusion = MaskedDiffusion(FRAME.window, CODEC.mask, reveals)
        denoiser = TextPrior(FRAME, network, levels, {}).both_sides()
        loss = held_out_loss(diffusion, denoiser, StoryGaps(FRAME, STORIES), seed=0)
        # the mask has no probability; at many levels noise draws more or fewer masks than is due
        assert loss == pytest.approx(math.log(CODEC.vocabulary - 1), rel=[0.01, 0.06][levels > 1])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A trained prior and its directory."""
    directory = tmp_path_factory.mktemp("prior") / "whole"
    return fit_text_prior(directory, FRAME, STORIES, TINY, seed=1), directory


def test_training_leaves_weights_and_what_they_cost(whole):
    prior, directory = whole
    results = json.loads((directory / "results.json").read_text())
    assert results["perplexity"] == pytest.approx(math.exp(results["held_out_nats"]))
    assert 4 < results["held_out_nats"] < 9
    saved = load_file(directory / "model.safetensors")
    state = prior.network.state_dict()
    assert all(torch.equal(saved[name], value) for name, value in state.items())
    assert not any(parameter.requires_grad for parameter in prior.network.parameters())
    assert prior.recipe == {"width": 16, "depth": 1, "heads": 2, "half_precision": False}


def test_training_learns(tmp_path):
    """More than which words are frequent: it gets below the entropy of single words."""
    pretrain = PretrainSettings(steps=150, batch=32, learning_rate=1e-2, average_decay=0.98)
    settings = TextPriorSettings(width=16, depth=1, heads=2, levels=8, pretrain=pretrain)
    few = STORIES[:20]
    prior = fit_text_prior(tmp_path / "prior", FRAME, few, settings)
    counts = torch.zeros(CODEC.vocabulary)
    for row in CODEC.encode([" ".join(story) for story in few]):
        counts += torch.bincount(torch.tensor(row), minlength=CODEC.vocabulary)
    law = counts / counts.sum()
    entropy = -float(torch.special.xlogy(law, law).sum())
    reveals = IndependentReveals(linear_masking(8), FRAME.window)
    diffusion = MaskedDiffusion(FRAME.window, CODEC.mask, reveals)
    loss = held_out_loss(diffusion, prior.both_sides(), StoryGaps(FRAME, few), seed=0)
    assert loss < entropy - 0.1


def test_a_second_call_loads_what_the_first_trained(whole, monkeypatch):
    prior, directory = whole
    monkeypatch.setattr(prior_module, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit_text_prior(directory, FRAME, STORIES, TINY, seed=1)
    for one, other in zip(again.network.parameters(), prior.network.parameters(), strict=True):
        assert torch.equal(one, other)
    with pytest.raises(InputError, match="another configuration: seed was 1 and is now 2"):
        fit_text_prior(directory, FRAME, STORIES, TINY, seed=2)
    with pytest.raises(InputError, match="stories was 60 and is now 59"):
        fit_text_prior(directory, FRAME, STORIES[1:], TINY, seed=1)


def test_an_interruption_changes_no_bit(whole, tmp_path, monkeypatch):
    _, directory = whole

    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 2})

    update, seen = Pretrainer.update, []

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step)

    def watch(self, step):
        seen.append(step)
        return update(self, step)

    monkeypatch.setattr(prior_module, "train", train)
    with monkeypatch.context() as patch:
        patch.setattr(Pretrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_text_prior(tmp_path / "cut", FRAME, STORIES, TINY, seed=1)
    monkeypatch.setattr(Pretrainer, "update", watch)
    fit_text_prior(tmp_path / "cut", FRAME, STORIES, TINY, seed=1)
    assert seen == [2, 3, 4, 5]
    name = "model.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (directory / name).read_bytes()


def test_half_precision_is_part_of_the_recipe(tmp_path):
    settings = replace(TINY, half_precision=True)
    prior = fit_text_prior(tmp_path / "half", FRAME, STORIES, settings)
    assert prior.recipe["half_precision"] is True
    network = prior.network
    assert isinstance(network, MaskedTransformer) and network.trunk.precision == torch.bfloat16


def test_one_story_is_too_few(tmp_path):
    with pytest.raises(InputError, match="at least two stories to train on, not 1"):
        fit_text_prior(tmp_path / "prior", FRAME, STORIES[:1], TINY)
    assert not (tmp_path / "prior").exists()
