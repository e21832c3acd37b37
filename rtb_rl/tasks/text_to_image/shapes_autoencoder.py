"""Training the autoencoder of the shapes' pipeline, and a set of latents made with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.adapters.extras import extra
from rtb_rl.tasks.image.images import to_model_space
from rtb_rl.tasks.text_to_image.shapes import draw_cells, draw_images
from rtb_rl.training.checkpoint import Stateful
from rtb_rl.training.loop import train
from rtb_rl.training.rates import cosine
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import GeneratorState
from rtb_rl.training.stage import complete

with extra("text-to-image"):
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

CHUNK = 500  # images encoded at once


@dataclass(frozen=True)
class AutoencoderSettings:
    """A small AutoencoderKL, and how it is trained."""

    widths: tuple[int, ...] = (16, 32)
    """Channels of the whole image and of the half."""
    steps: int = 1200
    batch: int = 64
    learning_rate: float = 2e-3
    """Falls to zero along a cosine."""
    kl_weight: float = 2e-3
    """Of the divergence from N(0, 1), nats a value of the latents, beside the squared error."""


class AutoencoderTrainer:
    """Minimises squared error + kl_weight KL on new images of the world (arXiv 1312.6114 eq. 10).

    Both are means over values; images in [-1, 1].
    """

    def __init__(
        self, autoencoder: AutoencoderKL, settings: AutoencoderSettings, *, generator: Generator
    ):
        self.autoencoder, self.settings, self.generator = autoencoder, settings, generator
        self.optimiser = torch.optim.AdamW(
            autoencoder.parameters(), lr=settings.learning_rate, weight_decay=1e-4, fused=True
        )

    def update(self, step: int) -> Mapping[str, Tensor]:
        """One gradient step; the losses before it."""
        settings = self.settings
        rate = cosine(settings.learning_rate, step, settings.steps)
        self.optimiser.param_groups[0]["lr"] = rate
        cells = draw_cells(settings.batch, generator=self.generator)
        images = to_model_space(draw_images(cells, generator=self.generator))
        posterior = self.autoencoder.encode(images).latent_dist  # type: ignore[union-attr]
        latents = posterior.sample(generator=self.generator)
        decoded = self.autoencoder.decode(latents).sample  # type: ignore[union-attr]
        error = (decoded - images).square().mean()
        divergence = posterior.kl().mean() / latents[0].numel()
        self.optimiser.zero_grad(set_to_none=True)
        (error + settings.kl_weight * divergence).backward()
        self.optimiser.step()
        return {
            "autoencoder/squared_error": error.detach(),
            "autoencoder/divergence": divergence.detach(),
        }

    @property
    def parts(self) -> dict[str, Stateful]:
        """All that a checkpoint must hold."""
        return {
            "autoencoder": self.autoencoder,
            "optimiser": self.optimiser,
            "generator": GeneratorState(self.generator),
        }


def fit_autoencoder(
    run: Run, autoencoder: AutoencoderKL, settings: AutoencoderSettings, *, generator: Generator
) -> None:
    """Train the autoencoder in this run's directory, or load it from there."""

    def fit() -> dict[str, Any]:
        trainer = AutoencoderTrainer(autoencoder, settings, generator=generator)
        seconds = train(
            run,
            trainer.update,
            trainer.parts,
            steps=settings.steps,
            description="autoencoder",
            checkpoint_every=500,
        )
        return {"seconds": seconds, "parameters": sum(p.numel() for p in autoencoder.parameters())}

    complete(run, autoencoder, fit)


@dataclass(frozen=True, eq=False)
class Latents:
    """Encoded images of the world: mean and spread of the latents [n, 4, 8, 8], cells int64 [n].

    Not scaled.
    """

    mean: Tensor
    std: Tensor
    cells: Tensor

    def sample(self, n: int, *, generator: Generator) -> tuple[Tensor, Tensor]:
        """`n` latents, encoded anew each time, and their cells."""
        device = self.mean.device
        rows = torch.randint(len(self.cells), (n,), generator=generator, device=device)
        eps = torch.randn((n, *self.mean.shape[1:]), generator=generator, device=device)
        return self.mean[rows] + self.std[rows] * eps, self.cells[rows]

    @property
    def scale(self) -> float:
        """What makes the variance of their values one."""
        return float((self.mean.var() + self.std.square().mean()).rsqrt())


@torch.no_grad()
def encode_world(autoencoder: AutoencoderKL, n: int, *, generator: Generator) -> Latents:
    """`n` new images of the world, encoded."""
    cells = draw_cells(n, generator=generator)
    means, stds = [], []
    for part in cells.split(CHUNK):
        images = to_model_space(draw_images(part, generator=generator))
        posterior = autoencoder.encode(images).latent_dist  # type: ignore[union-attr]
        means.append(posterior.mean)
        stds.append(posterior.std)
    return Latents(torch.cat(means), torch.cat(stds), cells)
