"""Networks of sequences as denoisers of their free tokens, and networks of logits."""

import math

import pytest
import torch
from torch import Generator, Tensor, nn

from rtb_rl.core import (
    IndependentReveals,
    Infilling,
    MaskedDiffusion,
    RandomOrder,
    TokenLogits,
    linear_masking,
    log_ratio,
    rollout_against,
)
from rtb_rl.core.protocols import Condition


def seeded(seed: int = 0) -> Generator:
    return Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


def test_token_logits_leave_the_mask_out():
    logits = normal(2, 3, 4).half()
    denoiser = TokenLogits(lambda x, level, condition: logits, mask=2)
    log_probs = denoiser(torch.zeros(2, 3), torch.ones(2), None)
    assert log_probs.dtype == torch.float32
    assert bool((log_probs[..., 2] == -math.inf).all())
    others = logits[..., [0, 1, 3]].float()
    torch.testing.assert_close(log_probs[..., [0, 1, 3]], others.log_softmax(-1))
    beyond = TokenLogits(lambda x, level, condition: logits, mask=4)
    full = beyond(torch.zeros(2, 3), torch.ones(2), None)
    torch.testing.assert_close(full, logits.float().log_softmax(-1))


CONTEXT = {
    "tokens": torch.tensor([[5, 9, 9, 7, 6], [9, 5, 6, 9, 7]]),
    "free": torch.tensor([[2, 1, -1], [3, 0, -1]]),
    "row": torch.tensor([0, 1]),
}


class Table(nn.Module):
    """Free log-probabilities for each sequence and position, whatever the tokens are."""

    def __init__(self, seed: int):
        super().__init__()
        self.log_probs = nn.Parameter(normal(2, 5, 8, seed=seed).log_softmax(-1))

    def forward(self, x: Tensor, level: Tensor, condition: dict[str, Tensor]) -> Tensor:
        return self.log_probs[condition["row"]]


def test_infilling_shows_the_network_the_sequence_and_keeps_the_free_positions():
    seen = []
    log_probs = normal(2, 5, 9).log_softmax(-1)

    def network(x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        seen.append((x, level, condition))
        return log_probs

    x, level = torch.tensor([[8, 1, 8], [2, 3, 0]]), torch.tensor([2, 1])
    free = Infilling(network)(x, level, CONTEXT)
    assert seen[0][0].tolist() == [[5, 1, 8, 7, 6], [3, 5, 6, 2, 7]]
    assert seen[0][1] is level and seen[0][2] is CONTEXT
    assert torch.equal(free[0, :2], log_probs[0, [2, 1]])
    assert torch.equal(free[1, :2], log_probs[1, [3, 0]])
    assert free[:, 2, 0].tolist() == [0, 0] and bool((free[:, 2, 1:] == -math.inf).all())


@pytest.mark.parametrize("law", [RandomOrder(3), IndependentReveals(linear_masking(4), 3)])
def test_context_and_unused_slots_never_count(law):
    """Two networks that disagree everywhere: only the free positions enter the log-ratio."""
    diffusion, posterior, prior = MaskedDiffusion(3, 8, law), Table(1), Table(2)
    networks = Infilling(posterior), Infilling(prior)
    path, total = rollout_against(diffusion, *networks, CONTEXT, 2, generator=seeded())
    gap = (posterior.log_probs - prior.log_probs).detach()
    expected = [
        sum(gap[row, CONTEXT["free"][row, slot], path.x0[row, slot]] for slot in range(2))
        for row in range(2)
    ]
    torch.testing.assert_close(total, torch.stack(expected))
    assert path.x0[:, 2].tolist() == [0, 0]
    log_ratio(diffusion, *networks, path).sum().backward()
    touched = posterior.log_probs.grad.abs().sum(-1).nonzero()
    assert touched.tolist() == [[0, 1], [0, 2], [1, 0], [1, 3]]


def test_infilling_says_what_is_missing():
    x, level = torch.zeros(2, 3, dtype=torch.int64), torch.ones(2)
    short = Infilling(lambda x, level, condition: torch.zeros(2, 3, 8))
    with pytest.raises(ValueError, match="'tokens' and 'free', not NoneType"):
        short(x, level, None)
    with pytest.raises(ValueError, match=r"\['tokens'\]"):
        short(x, level, {"tokens": CONTEXT["tokens"]})
    with pytest.raises(ValueError, match=r"\[2, 3\], x \[2, 2\]"):
        short(x[:, :2], level, CONTEXT)
    with pytest.raises(ValueError, match=r"\[2, 3, 8\] don't fit tokens \[2, 5\]"):
        short(x, level, CONTEXT)
