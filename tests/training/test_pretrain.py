"""Denoising training of a prior: what each level counts."""

import torch
from torch import nn

from rtb_rl.core import MaskedDiffusion, RandomOrder
from rtb_rl.training import Pretrainer, PretrainSettings

LENGTH, TOKENS = 6, 3
DIFFUSION = MaskedDiffusion(LENGTH, TOKENS, RandomOrder(LENGTH))


class Table(nn.Module):
    """The same log-probabilities whatever it is shown."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(torch.randn(LENGTH, TOKENS, generator=seeded()))

    def forward(self, x, level, condition):
        return self.logits.log_softmax(-1).expand(len(x), -1, -1)


def seeded():
    return torch.Generator().manual_seed(0)


def draw(n, *, generator):
    return torch.randint(TOKENS, (n, LENGTH), generator=generator), None


def trainer(power):
    settings = PretrainSettings(steps=4, batch=32, level_power=power)
    return Pretrainer(DIFFUSION, Table(), draw, settings, generator=seeded())


def test_weighed_by_their_number_all_masked_tokens_count_alike():
    """One reveal a step: at level k each of k masked tokens has probability 1 / k of it, so that k
    times the bound's loss is the cross-entropy of all masked tokens, as in arXiv 2202.04200.
    """
    x0, _ = draw(500, generator=seeded())
    level = torch.arange(500) % LENGTH + 1
    x = DIFFUSION.corrupt(x0, level, generator=seeded())
    one = trainer(1.0)
    log_probs = one.denoiser(x, level, None)
    loss = DIFFUSION.denoising_loss(log_probs, x0, x, level) * one.level_weight(level)
    masked = x == TOKENS
    assert torch.equal(masked.sum(1), level)
    entropy = -(log_probs.gather(-1, x0[..., None])[..., 0] * masked).sum(1)
    mean_level = (LENGTH + 1) / 2
    torch.testing.assert_close(loss, entropy / mean_level)


def test_weights_of_levels_are_one_on_average_and_by_default():
    level = torch.arange(1, LENGTH + 1)
    for power in (0.0, 0.5, 2.0):
        torch.testing.assert_close(trainer(power).level_weight(level).mean(), torch.tensor(1.0))
    left, even = trainer(None), trainer(0.0)
    for step in range(4):
        assert torch.equal(left.update(step)["prior/loss"], even.update(step)["prior/loss"])
