"""An open text-to-image job: methods measured one by one, then a table and a figure of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from rich.markup import escape
from torch import Generator, Tensor

from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.weighted import posterior_by_weight
from rtb_rl.core import conditions
from rtb_rl.tasks.image.evaluation import average_rows
from rtb_rl.tasks.image.report import SIDE, draw_figure, mark
from rtb_rl.tasks.text_to_image.evaluation import Measure, Measured, Reference, compare
from rtb_rl.tasks.text_to_image.posterior import TextToImagePosterior
from rtb_rl.tasks.text_to_image.reference import PriorDraws
from rtb_rl.tasks.text_to_image.report import markdown, print_table
from rtb_rl.tasks.text_to_image.settings import Budget, TextToImageSettings
from rtb_rl.tasks.text_to_image.target import PromptTarget
from rtb_rl.tasks.text_to_image.trainers import nominal_beta
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.kept_rows import KeptRows, of_reference, of_training
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

PRIOR = "prior"


@dataclass(frozen=True)
class TextToImageJob:
    """An open run with all that is made before the posterior."""

    settings: TextToImageSettings
    budget: Budget
    run: Run
    prior: TextToImagePrior
    target: PromptTarget
    draws: PriorDraws
    measure: Measure
    references: Sequence[Reference]
    """One for each prompt."""
    classes: Sequence[str]
    """Names of the classes of images, where there are any."""

    @property
    def beta(self) -> float:
        """That of the target, p r^beta: see nominal_beta."""
        return nominal_beta(self.budget.posterior, self.prior.diffusion.event_shape)

    @property
    def condition(self) -> Tensor:
        """The numbers of all prompts."""
        return torch.arange(len(self.target.prompts), device=self.draws.x0.device)

    def add(
        self,
        name: str,
        draw: Callable[[Generator], Draws],
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Draw for every prompt and compare, unless that was done before; kept as row and samples
        (latents `x0`, and the `images` that they decode to, uint8 [n, 3, H, W]).

        `training`: the results of the posterior's run, for a method that was trained.
        """
        self._rows.measure(
            name,
            draw,
            lambda draws, seconds: self.row(draws, seconds, training),
            lambda draws: self._kept(self._shown(draws.x0)),
            seed=self.settings.seed,
            device=self.draws.x0.device,
        )

    def row(
        self, draws: Draws, seconds: float, training: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One row of the table: a method's latents [prompts, n, C, h, w]."""
        measured = [self.measure(x0, number) for number, x0 in enumerate(draws.x0)]
        parts = zip(measured, self.references, draws.sources(len(measured)), strict=True)
        rows = [compare(*part) for part in parts]
        count = draws.x0.shape[0] * draws.x0.shape[1]
        return {
            **average_rows(rows),
            **of_reference([one.draws for one in self.references]),
            **of_training(training),
            **draws.evidence(),
            "calls": draws.calls,
            "seconds": seconds / count,
            "draws": count,
            "shares": _shares(measured),
            "prompts": dict(zip(self.target.prompts.texts, rows, strict=True)),
        }

    @torch.no_grad()
    def draw(self, posterior: TextToImagePosterior, generator: Generator) -> Draws:
        """Draws of a trained posterior for every prompt, a batch at a time."""
        each, sampler = self.condition.repeat_interleave(self.budget.draws), posterior.sampler
        batches = conditions.split(each, len(each), self.budget.draw_batch)
        parts = [sampler.sample(part, 1, generator=generator)[:, 0] for part, _ in batches]
        x0 = torch.cat(parts).reshape(len(self.condition), self.budget.draws, *parts[0].shape[1:])
        return Draws(x0, sampler.diffusion.levels)

    def draw_by_weight(self, posterior: TextToImagePosterior, generator: Generator) -> Draws:
        """Draws of a trained posterior for every prompt, kept by the weights of their paths."""
        return posterior_by_weight(
            posterior.task,
            self.condition,
            self.budget.draws,
            beta=self.beta,
            batch=self.budget.draw_batch,
            generator=generator,
        )

    def draw_prior(self, generator: Generator) -> Draws:
        """The first of the prior's draws, which are the reference's as well."""
        return Draws(self.draws.x0[:, : self.budget.draws], self.prior.diffusion.levels)

    def finish(self, names: Sequence[str]) -> None:
        """Print the table, draw the figure, write table.md and results.json, in this order."""
        rows, kept = self._rows.read(names)
        images = {name + mark(rows[name]): held["images"] for name, held in kept.items()}
        self._draw(images, {name + mark(row): row["shares"] for name, row in rows.items()})
        prompts = self.target.prompts.texts
        asked = repr(prompts[0]) if len(prompts) == 1 else f"{len(prompts)} prompts"
        title = f"{asked}, {self.target.name}, beta {self.beta:g}"
        print_table(escape(title), rows)
        replace_file(self.run.directory / "table.md", markdown(rows).encode())
        prior = {"prior_sha256": fingerprint(self.prior.pipeline.unet)}
        target = {"target": self.target.name, "beta": self.beta, "classes": self.classes}
        self._rows.finish({"methods": rows, **target, **prior})

    @property
    def _rows(self) -> KeptRows:
        return KeptRows(self.run)

    def _kept(self, x0: Tensor) -> dict[str, Tensor]:
        images = (255 * self.prior.decode(x0)).round().to(torch.uint8)
        return {"x0": x0, "images": images}

    def _shown(self, x0: Tensor) -> Tensor:
        """As many latents as a grid has, of all prompts in turn: [n, C, h, w]."""
        return x0[:, : SIDE**2].transpose(0, 1).flatten(0, 1)[: SIDE**2]

    def _draw(self, images: Mapping[str, Tensor], shares: Mapping[str, Any]) -> None:
        """Images of reference and methods (these in 0 to 255), and the shares of the classes among
        all draws.
        """
        generator = generator_for(self.settings.seed, "figure", device=self.draws.x0.device)
        kept = [one.draws.resample(SIDE**2, generator=generator)[0] for one in self.references]
        reference = self.prior.decode(self._shown(torch.stack(kept)))
        held = {"reference": reference, **{name: value / 255 for name, value in images.items()}}
        wanted = {"reference": self._wanted(), **shares} if self.classes else {}
        figure = draw_figure(self.run.directory / "figure.png", held, wanted, self.classes)
        self.run.log_figure(0, "evaluation", figure)

    def _wanted(self) -> list[float]:
        shares = [
            one.mean(one.measured.probabilities)[0]
            for one in self.references
            if one.measured.probabilities is not None
        ]
        return torch.stack(shares).mean(0).tolist()


def _shares(measured: Sequence[Measured]) -> list[float]:
    """The shares of the classes among all draws; none without classes."""
    held = [one.probabilities.mean(0) for one in measured if one.probabilities is not None]
    return torch.stack(held).mean(0).tolist() if held else []
