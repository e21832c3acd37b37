"""A posterior of tokens whose network is a transformer."""

import torch
from torch import Tensor, nn

from rtb_rl.core import MaskedDiffusion, TokenLogits
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.training.seeding import generator_for


class TransformerPosterior(nn.Module):
    """The prior's log-probabilities plus the logits of a transformer that starts at zero."""

    def __init__(self, prior: nn.Module, diffusion: MaskedDiffusion):
        super().__init__()
        self.prior = prior
        generator = generator_for(0, "exact posterior")
        size = diffusion.mask + 2
        self.network = TokenLogits(
            MaskedTransformer(size, pad=size - 1, width=64, depth=2, generator=generator),
            diffusion.mask,
        )
        self.scale = nn.Parameter(torch.zeros(()))
        self.vocabulary = diffusion.mask

    def forward(self, x: Tensor, level: Tensor, condition: None) -> Tensor:
        logits = self.network(x, level, condition)[..., : self.vocabulary]
        return (self.prior(x, level, condition) + self.scale * logits).log_softmax(-1)
