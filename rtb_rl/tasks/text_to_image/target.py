"""What a text-to-image posterior is asked for: p(x | prompt) r(image, prompt)^beta / Z(prompt)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor, nn

from rtb_rl.adapters.prompts import EncodedPrompts
from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.core import ConditionalLogZ, GroupMeanLogZ
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError
from rtb_rl.nn import MLP
from rtb_rl.tasks.text_to_image.prompt_lists import PromptList
from rtb_rl.tasks.text_to_image.rewards import CheckedReward, PromptReward
from rtb_rl.training.mix import LearnedLogZ


@dataclass(frozen=True, eq=False)
class LatentReward:
    """log r of latents, nats: a reward of images and prompts behind the VAE of the prior.

    The condition is int64 [batch], the number of a prompt.
    """

    prior: TextToImagePrior
    reward: CheckedReward
    prompts: PromptList

    @property
    def differentiable(self) -> bool:
        """As the reward says."""
        return self.reward.differentiable

    def __call__(self, x0: Tensor, condition: Condition) -> Tensor:
        return self.of_images(self.prior.decode(x0), condition).to(x0.device)

    def of_images(self, images: Tensor, condition: Condition) -> Tensor:
        """The same of decoded images [batch, 3, height, width] in [0, 1]."""
        assert isinstance(condition, Tensor)
        index = condition.tolist()
        texts = [self.prompts.texts[i] for i in index]
        rewards, _ = self.reward(images, texts, [dict(self.prompts.metadata[i]) for i in index])
        return rewards


@dataclass(frozen=True)
class DrawPrompts:
    """Numbers of prompts, each as often as any other, but for one: int64 [n]."""

    count: int

    def __call__(self, n: int, *, generator: Generator) -> tuple[Condition, None]:
        rounds = -(-n // self.count)
        order = [
            torch.randperm(self.count, generator=generator, device=generator.device)
            for _ in range(rounds)
        ]
        return torch.cat(order)[:n], None


class PromptValue(nn.Module):
    """A number for each prompt from its embedding, zero at first: int64 [batch] -> [batch]."""

    means: Tensor

    def __init__(self, prompts: EncodedPrompts, *, generator: Generator):
        super().__init__()
        means = prompts.embedding[1:].float().mean(1)
        self.register_buffer("means", means, persistent=False)
        self.network = MLP(means.shape[1], 1, width=64, generator=generator)

    def forward(self, condition: Condition) -> Tensor:
        assert isinstance(condition, Tensor)
        return self.network(self.means[condition]).squeeze(1)


MakeLogZ = Callable[[EncodedPrompts, int, Generator], LearnedLogZ]
"""(prompts, paths of a prompt in an update, generator of the first weights) -> estimate."""


def group_log_z(prompts: EncodedPrompts, paths: int, generator: Generator) -> LearnedLogZ:
    """The mean over a prompt's paths in an update; nothing is learned. InputError for one path."""
    if paths < 2:
        raise InputError(
            f"log Z of a prompt is the mean over its paths, and an update has {paths}; give 2 paths"
            " or more, or a learned log Z"
        )
    return GroupMeanLogZ(paths)


def learned_log_z(prompts: EncodedPrompts, paths: int, generator: Generator) -> LearnedLogZ:
    """A network of the prompt's embedding: one path of a prompt in an update will do."""
    return ConditionalLogZ(PromptValue(prompts, generator=generator))


@dataclass(frozen=True, eq=False)
class PromptTarget:
    """A reward of images and prompts, and how log Z of each prompt is estimated."""

    name: str
    reward: PromptReward
    prompts: PromptList
    make_log_z: MakeLogZ = learned_log_z

    def log_reward(self, prior: TextToImagePrior) -> LatentReward:
        """log r of the prior's latents. InputError for a prior opened with other prompts."""
        if prior.prompts.texts != self.prompts.texts:
            raise InputError(
                f"the prior was opened with the prompts {list(prior.prompts.texts)}, the target has"
                f" {list(self.prompts.texts)}; open it with those of the target"
            )
        return LatentReward(prior, CheckedReward(self.reward), self.prompts)
