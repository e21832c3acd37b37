"""log Z of a gap from its context: networks of the words in it, whatever their order."""

import torch
from torch import Generator, Tensor, nn
from torch.nn import functional

from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.initial import initialise
from rtb_rl.tasks.language.prompts import Frame
from rtb_rl.training.mix import LearnedLogZ
from rtb_rl.training.settings import FinetuneSettings


class ContextValue(nn.Module):
    """One number a row from the left context, the right one and the gap as it is: [batch].

    Each is the mean of its tokens' embeddings, with its number of tokens. The last layer starts at
    zero.
    """

    def __init__(self, frame: Frame, *, width: int = 64, generator: Generator):
        super().__init__()
        self.pad, self.mask = frame.codec.pad, frame.codec.mask
        size = max(frame.codec.vocabulary, self.pad + 1, self.mask + 1)
        table = torch.empty(size, width, device=generator.device).normal_(generator=generator)
        self.tokens = nn.Embedding(size, width, _weight=table)
        last = nn.Linear(2 * width, 1)
        self.layers = nn.Sequential(nn.Linear(3 * (width + 1), 2 * width), nn.SiLU(), last)
        self.layers.to(generator.device)
        initialise(self.layers, generator=generator)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)

    def forward(self, condition: Condition, x: Tensor | None = None) -> Tensor:
        """`x`: int64 [batch, slots], what is known of the gap; None: nothing."""
        assert isinstance(condition, dict)
        tokens, free, right = condition["tokens"], condition["free"], condition["right"]
        used = free >= 0
        gap = torch.where(used, self.mask if x is None else x, self.pad)
        inside = functional.pad(torch.zeros_like(right), (0, 1)).scatter(
            1, torch.where(used, free, right.shape[1]), True
        )[:, :-1]
        left = (tokens != self.pad) & ~right & ~inside
        parts = [self._mean(tokens, left), self._mean(tokens, right), self._mean(gap, used)]
        return self.layers(torch.cat(parts, 1)).squeeze(1)

    def _mean(self, tokens: Tensor, counted: Tensor) -> Tensor:
        weight = counted.unsqueeze(-1).float()
        count = weight.sum(1)
        mean = (self.tokens(tokens) * weight).sum(1) / count.clamp(min=1)
        return torch.cat([mean, count / 10], 1)


class NoisyContextValue(nn.Module):
    """`ContextValue` of what is revealed, as DDPP-LB asks for it: (x, level, condition).

    Added to the condition's "baseline", where it has one.
    """

    def __init__(self, frame: Frame, *, generator: Generator):
        super().__init__()
        self.value = ContextValue(frame, generator=generator)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        assert isinstance(condition, dict)
        return self.value(condition, x) + condition.get("baseline", 0.0)


def group_log_z(frame: Frame, settings: FinetuneSettings, *, generator: Generator) -> LearnedLogZ:
    """The mean log-weight of the paths of a gap (VarGrad)."""
    return GroupMeanLogZ(settings.mix.total)


def network_log_z(frame: Frame, settings: FinetuneSettings, *, generator: Generator) -> LearnedLogZ:
    """A learned function of the context."""
    return ConditionalLogZ(ContextValue(frame, generator=generator))
