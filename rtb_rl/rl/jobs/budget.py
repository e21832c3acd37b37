"""How long each stage runs: three sizes of the same job, and what is tuned per data set."""

import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

from rtb_rl.errors import InputError
from rtb_rl.rl.catalogue import OGBENCH, longest_prefix
from rtb_rl.rl.critics.training import CriticSettings, GaussianSettings
from rtb_rl.rl.posteriors.amortised import AmortisedSettings
from rtb_rl.rl.posteriors.posterior import PosteriorSettings
from rtb_rl.training.pretrain import PretrainSettings
from rtb_rl.training.settings import FinetuneSettings, check_beta

BudgetName = Literal["smoke", "demo", "full"]


@dataclass(frozen=True)
class Budget:
    """Settings of every stage."""

    prior: PretrainSettings = field(default_factory=PretrainSettings)
    critic: CriticSettings = field(default_factory=CriticSettings)
    gaussian: GaussianSettings = field(default_factory=GaussianSettings)
    posterior: PosteriorSettings = field(default_factory=PosteriorSettings)
    episodes: int = 20
    """Episodes of every evaluated method."""
    collected_steps: int = 200_000
    """Transitions of the embedded data set, where no other is given."""

    def with_beta(self, beta: float) -> "Budget":
        """The same budget for another strength of the critic."""
        finetune = replace(self.posterior.finetune, beta=beta)
        return replace(self, posterior=replace(self.posterior, finetune=finetune))

    def amortised(self, **changes: Any) -> AmortisedSettings:
        """Settings of a posterior of all strengths, whose range is given."""
        finetune, rows = replace(self.posterior.finetune, beta=1.0), self.posterior.diagnostic_rows
        return AmortisedSettings(finetune, diagnostic_rows=rows, **changes)


@dataclass(frozen=True)
class Tuning:
    """What is set per data set; `default` serves the others."""

    beta: float = 3.0
    """Inverse temperature, in nats per unit of the critic: of the rewards it is trained on, see
    `critics.training.scaled_for_critic`."""
    expectile: float = 0.7
    discount: float = 0.99
    temperature: float = 3.0
    """Of the Gaussian policy that IQL extracts; its inverse temperature, like beta."""
    published_scaling: bool = False
    """Scale rewards by the factor that published code computes: published temperatures go with it
    (`scores.published_return_scale`)."""
    episodes: int | None = None
    """Episodes of every evaluated method in the budget `full`; None: the budget's own."""


def budget_for(name: BudgetName, tuning: Tuning) -> Budget:
    """`full`: about 20 minutes on two cores; `demo`: a few; `smoke`: every stage in seconds."""
    budget = {"smoke": _smoke, "demo": _demo, "full": Budget}[name]()
    critic = replace(
        budget.critic,
        expectile=tuning.expectile,
        discount=tuning.discount,
        published_scaling=tuning.published_scaling,
    )
    gaussian = replace(budget.gaussian, temperature=tuning.temperature)
    budget = replace(budget, critic=critic, gaussian=gaussian)
    if name == "full" and tuning.episodes is not None:
        budget = replace(budget, episodes=tuning.episodes)
    return budget.with_beta(tuning.beta)


def _demo() -> Budget:
    return Budget(
        prior=PretrainSettings(steps=10_000),
        critic=CriticSettings(steps=15_000),
        gaussian=GaussianSettings(steps=6_000),
        posterior=PosteriorSettings(FinetuneSettings(updates=800, beta_warmup=100)),
        collected_steps=100_000,
    )


def _smoke() -> Budget:
    finetune = FinetuneSettings(updates=40, beta_warmup=10, conditions=16)
    return Budget(
        prior=PretrainSettings(steps=300),
        critic=CriticSettings(steps=300),
        gaussian=GaussianSettings(steps=300),
        posterior=PosteriorSettings(finetune, diagnostic_rows=8),
        episodes=2,
        collected_steps=5_000,
    )


def read_tuning(path: Path, dataset: str) -> Tuning:
    """What a TOML file sets for a data set; see `find_tuning`."""
    return find_tuning(path, dataset)[1]


def find_tuning(path: Path, dataset: str) -> tuple[str, Tuning]:
    """Name and content of the table of a data set in a TOML file, or of its table `default`.

    A table has the whole name of a data set. For a task of OGBench it may be a part: the longest
    that the name begins with, up to a dash. Raises InputError for keys that are no settings and a
    beta that is not positive, in any table.
    """
    known = {f.name for f in fields(Tuning)}
    tables = tomllib.loads(path.read_text())
    for name, table in tables.items():
        if unknown := sorted(set(table) - known):
            raise InputError(
                f"{path.name}, table [{name}]: unknown {', '.join(unknown)}; known are"
                f" {', '.join(sorted(known))}"
            )
        check_beta(table.get("beta", Tuning.beta), f"{path.name}, table [{name}]: beta")
    found = dataset if dataset in tables else None
    if found is None and dataset.startswith(OGBENCH):
        found = longest_prefix(dataset, tables)
    found = found or "default"
    return found, Tuning(**tables.get(found, {}))
