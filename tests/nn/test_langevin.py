"""What the gradient of a log-reward adds to a prediction."""

import torch
from torch import nn

from rtb_rl.nn import LangevinDenoiser


def test_a_long_gradient_moves_the_prediction_by_scale_times_the_clip():
    """At most: a short one counts as it is, and each level has a scale of its own."""
    given = torch.tensor([[60.0, -80.0], [0.6, -0.8], [60.0, -80.0]])  # norms 100, 1, 100
    clip = 10.0
    denoiser = LangevinDenoiser(Same(), lambda x0, condition: given, levels=3, size=2, clip=clip)
    x, level = torch.arange(6.0).reshape(3, 2), torch.tensor([2, 2, 1])
    assert torch.equal(denoiser(x, level, None), x)
    denoiser.scale.data[2] = 0.5
    moved = denoiser(x, level, None) - x
    torch.testing.assert_close(moved.norm(dim=1), torch.tensor([0.5 * clip, 0.5, 0.0]))
    torch.testing.assert_close(moved[0] / moved[0].norm(), torch.tensor([0.6, -0.8]))


class Same(nn.Module):
    def forward(self, x, level, condition):
        return x
