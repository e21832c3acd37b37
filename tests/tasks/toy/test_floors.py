import pytest
import torch

from rtb_rl.tasks.toy.enumeration import TokenSpace, tilted, total_variation
from rtb_rl.tasks.toy.floors import (
    chain_law,
    learned_reveal,
    prior_chain,
    projected_chain,
    shared_schedule,
    token_floors,
    transitions,
)

SPACE = TokenSpace(3, 3)


def random_problem(space, seed=0):
    """Arbitrary conditionals and a log-reward."""
    generator = torch.Generator().manual_seed(seed)
    shape = (*space.sequences.shape, space.vocabulary)
    tokens = torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)
    return tokens, 1.5 * space.coupled_logits(generator=generator)


@pytest.mark.parametrize("levels", [1, 2, 6])
def test_the_h_transform_ends_in_the_tilted_law(levels):
    tokens, log_reward = random_problem(SPACE)
    chain = prior_chain(SPACE, tokens, levels)
    value = torch.zeros(len(SPACE.sequences), dtype=torch.float64)
    value[SPACE.clean_index] = log_reward.exp()
    tilts = []
    for step in chain:
        joint = transitions(step) * value
        value = joint.sum(1)
        tilts.append(joint / value.clamp(min=1e-300)[:, None])
    law = torch.zeros_like(value)
    law[-1] = 1
    for tilt in reversed(tilts):
        law = law @ tilt
    prior = chain_law(SPACE, chain)
    expected = tilted(prior, log_reward)
    torch.testing.assert_close(law[SPACE.clean_index], expected, rtol=0, atol=1e-14)
    torch.testing.assert_close(value[-1], prior @ log_reward.exp())


def test_steps_are_laws_and_mask_as_the_schedule_says():
    tokens, _ = random_problem(SPACE)
    law = torch.zeros(len(SPACE.sequences), dtype=torch.float64)
    law[-1] = 1
    for k, step in reversed(list(enumerate(prior_chain(SPACE, tokens, 6)))):
        matrix = transitions(step)
        torch.testing.assert_close(matrix.sum(1), torch.ones_like(law))
        law = law @ matrix
        left = float(law @ SPACE.masked.double().mean(1))
        assert abs(left - k / 6) < 1e-14


@pytest.mark.parametrize("project", [learned_reveal, shared_schedule])
def test_one_position_has_no_floor(project):
    space = TokenSpace(4, 1)
    tokens, log_reward = random_problem(space)
    chain = projected_chain(space, tokens, log_reward, 5, project)
    target = tilted(chain_law(space, prior_chain(space, tokens, 5)), log_reward)
    assert total_variation(chain_law(space, chain), target) < 1e-14


def test_a_reward_of_single_positions_keeps_the_steps_factorised():
    """A prior of independent positions tilted by a sum over positions: no floor at any T."""
    generator = torch.Generator().manual_seed(0)
    each = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    tokens = each.softmax(-1).expand(len(SPACE.sequences), 3, 3)
    log_reward = each.flip(0)[torch.arange(3), SPACE.clean].sum(1)
    for levels in (1, 4):
        target = tilted(chain_law(SPACE, prior_chain(SPACE, tokens, levels)), log_reward)
        for project in (learned_reveal, shared_schedule):
            chain = projected_chain(SPACE, tokens, log_reward, levels, project)
            assert total_variation(chain_law(SPACE, chain), target) < 1e-14


def test_floors_fall_like_one_over_levels_unless_the_schedule_is_shared():
    generator = torch.Generator().manual_seed(0)
    floors = token_floors((1, 8, 64), instances=4, generator=generator)
    tv = {(f.family, f.levels): f.tv for f in floors}
    families = list(dict.fromkeys(f.family for f in floors))
    for family in families:
        ratio = tv[family, 8] / tv[family, 64]
        assert (ratio < 1.5) if "shared" in family else (5 < ratio < 9), family
    for levels, frozen in ((1, 0.596), (8, 0.118), (64, 0.016)):  # one instance of such a law
        assert abs(tv["consistent prior", levels] / frozen - 1) < 0.25
    assert tv["conditionals of the target", 8] < tv["consistent prior", 8]
