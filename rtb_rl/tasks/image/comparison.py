"""An open image job: methods measured one by one, then a table and a figure of all."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Generator, Tensor

from rtb_rl.adapters.pipelines import PipelinePrior
from rtb_rl.baselines.draws import Draws
from rtb_rl.baselines.weighted import posterior_by_weight
from rtb_rl.core import conditions
from rtb_rl.core.protocols import Condition
from rtb_rl.nn.convolution import ConvClassifier
from rtb_rl.tasks.image.evaluation import Judge, Reference, average_rows, compare
from rtb_rl.tasks.image.images import ImageDataset, to_images
from rtb_rl.tasks.image.posterior import ImagePosterior
from rtb_rl.tasks.image.report import SIDE, draw_figure, mark, markdown, print_table
from rtb_rl.tasks.image.settings import Budget, ImageSettings
from rtb_rl.tasks.image.target import ImageTarget
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.kept_rows import KeptRows, of_reference, of_training
from rtb_rl.training.run import Run
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import fingerprint

WEIGHED = 1000
"""Paths that are drawn and weighed together."""


@dataclass(frozen=True)
class ImageJob:
    """An open run with all that is fitted before the posterior."""

    settings: ImageSettings
    budget: Budget
    run: Run
    data: ImageDataset
    prior: PipelinePrior
    labels: tuple[int, ...] | None
    """The classes that are asked for together; None: each alone."""
    classifier: ConvClassifier
    target: ImageTarget
    judge: Judge
    references: Sequence[Reference]
    """One for each condition that is evaluated; one alone where there is none."""

    @property
    def condition(self) -> Condition:
        """The conditions of the references, a row each."""
        return conditions.concatenate([one.condition for one in self.references])

    def compare(
        self, draws: Draws, seconds: float, training: Mapping[str, Any] | None = None
    ) -> dict[str, Any]:
        """One row of the table: a method's draws for every reference's condition.

        `training`: the results of a posterior's run; its diagnostics stand in for log Z and ESS.
        """
        x0 = draws.x0 if self.condition is not None else draws.x0.unsqueeze(0)
        generator = generator_for(self.settings.seed, "compare", device=x0.device)
        source = draws.sources(len(x0))
        rows = [
            compare(points, reference, self.judge, source=one, generator=generator)
            for points, reference, one in zip(x0, self.references, source, strict=True)
        ]
        return {
            **average_rows(rows),
            **of_reference([one.draws for one in self.references]),
            **of_training(training),
            **draws.evidence(),
            "calls": draws.calls,
            "seconds": seconds / (x0.shape[0] * x0.shape[1]),
            "draws": x0.shape[0] * x0.shape[1],
            "histogram": self._histogram(x0.flatten(0, 1)),
        }

    @property
    def draws_each(self) -> int:
        """Draws of a method for each condition."""
        return max(2, self.budget.draws // len(self.references))

    def measure(
        self,
        name: str,
        draw: Callable[[Generator], Draws],
        training: Mapping[str, Any] | None = None,
    ) -> None:
        """Draw for `condition` and compare, unless that was done before; kept as row and samples.

        `training`: the results of the posterior's run, for a method that was trained.
        """
        self._rows.measure(
            name,
            draw,
            lambda draws, seconds: self.compare(draws, seconds, training),
            lambda draws: {"x0": self._shown(draws.x0)},
            seed=self.settings.seed,
            device=self.data.images.device,
        )

    def draw(self, posterior: ImagePosterior, generator: Generator) -> Draws:
        """Draws of a trained posterior for `condition`."""
        x0 = posterior.sampler.sample(self.condition, self.draws_each, generator=generator)
        return Draws(x0, self.prior.diffusion.levels)

    def draw_by_weight(self, posterior: ImagePosterior, generator: Generator) -> Draws:
        """Draws of a trained posterior for `condition`, kept by the weights of their paths."""
        return posterior_by_weight(
            posterior.task,
            self.condition,
            self.draws_each,
            beta=self.settings.beta,
            batch=WEIGHED,
            generator=generator,
        )

    def finish(self, names: Sequence[str]) -> None:
        """Print the table, draw the figure, write table.md and results.json, in this order."""
        rows, kept = self._rows.read(names)
        titles = {name: name + mark(row) for name, row in rows.items()}
        samples = {titles[name]: tensors["x0"] for name, tensors in kept.items()}
        self._draw(samples, {titles[name]: row["histogram"] for name, row in rows.items()})
        print_table(f"{self.data.name}, {self.target.name}, beta {self.settings.beta}", rows)
        replace_file(self.run.directory / "table.md", markdown(rows).encode())
        prior = {"prior_sha256": fingerprint(self.prior.pipeline.unet)}
        self._rows.finish({"methods": rows, "target": self.target.name, **prior})

    @property
    def _rows(self) -> KeptRows:
        return KeptRows(self.run)

    def _shown(self, x0: Tensor) -> Tensor:
        """As many draws as a grid has, of all conditions in turn."""
        x0 = x0 if self.condition is None else x0[:, : SIDE**2].transpose(0, 1)
        return x0.flatten(0, x0.ndim - 4)[: SIDE**2]

    def _draw(self, samples: Mapping[str, Tensor], found: Mapping[str, Sequence[float]]) -> None:
        """Images of prior, reference and methods; class histograms of all draws, by the judge."""
        first = self.references[0]
        generator = generator_for(self.settings.seed, "figure", device=first.draws.x0.device)
        resampled = [one.draws.resample(SIDE**2, generator=generator)[0] for one in self.references]
        wanted = [one.mean(one.judgement.probabilities)[0] for one in self.references]
        prior = first.draws.x0[0]
        held = {"prior": prior, "reference": torch.stack(resampled, 1).flatten(0, 1), **samples}
        histograms = {
            "prior": self._histogram(prior),
            "reference": torch.stack(wanted).mean(0).tolist(),
            **found,
        }
        figure = draw_figure(
            self.run.directory / "figure.png",
            {name: to_images(x0[: SIDE**2]) for name, x0 in held.items()},
            histograms,
            self.data.classes,
        )
        self.run.log_figure(0, "evaluation", figure)

    def _histogram(self, x0: Tensor) -> list[float]:
        classifier = self.judge.classifier
        with torch.no_grad():
            logits = torch.cat([classifier(to_images(part)) for part in x0.split(1000)])
        return logits.double().softmax(-1).mean(0).tolist()
