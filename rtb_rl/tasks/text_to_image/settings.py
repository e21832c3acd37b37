"""What text-to-image programs ask for, and how much work every stage does."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from rtb_rl.tasks.text_to_image.shapes_prior import ShapesPriorSettings
from rtb_rl.tasks.text_to_image.trainers import TextToImagePosteriorSettings
from rtb_rl.training.mix import Mix
from rtb_rl.training.rewarded import RewardedSettings
from rtb_rl.training.settings import FinetuneSettings

SHAPES = "shapes"
SHAPES_PROMPT = "a shape"
SHAPES_REWARD = "cell:yellow triangle"

BudgetName = Literal["smoke", "demo", "full"]


@dataclass(frozen=True)
class TextToImageSettings:
    """What all text-to-image programs ask for."""

    prior: str = SHAPES
    """"shapes" (a small Stable Diffusion of coloured shapes, trained here), or the folder or hub id
    of a Stable Diffusion or SDXL pipeline."""
    prompts: tuple[str, ...] = ()
    """One posterior for all of them; not given: "a shape", for shapes."""
    prompt_file: Path | None = None
    """Instead: a file with one prompt a line, or .jsonl with "prompt" and metadata."""
    reward: str | None = None
    """cell:COLOUR SHAPE (shapes alone), colour:NAME, shape:NAME, compressible, incompressible,
    clip:SOURCE, pick-score[:SOURCE], hps[:SOURCE], aesthetic[:HEAD], image-reward[:MODEL], or
    PACKAGE.MODULE:FACTORY, which is called and returns a reward of your own."""
    out: Path = Path("runs/text_to_image")
    """Directory of the run; the same command continues what it finds there."""
    seed: int = 0
    """Of the posterior and its draws."""
    prior_seed: int = 0
    """Of the prior of shapes and of the reference."""
    budget: BudgetName = "full"
    levels: int | None = None
    """Denoising steps; not given: those of the budget."""
    guidance: float | None = None
    """Scale of classifier-free guidance; not given: 2 for shapes, 7.5 for other pipelines."""
    negative: str = ""
    """The prompt that guidance moves away from."""
    size: int | None = None
    """Pixels of a side; not given: those that the pipeline was trained on."""
    ancestral: bool = False
    """Sample the pipeline by DDIM at eta 1, for one whose own scheduler has no densities."""
    half_precision: bool = False
    """Evaluate the U-Net in bfloat16; log-ratios stay in float32."""
    share: Path | None = None
    """Run whose prior and reference are used instead of making them here."""
    beta: float = 1.0
    """Strength of the reward."""
    draws: int | None = None
    """Of each method for each prompt, in the comparison; not given: those of the budget."""
    embedder: str | None = None
    """A CLIP model, folder or hub id, in whose features diversity is measured; not given: in pixels
    averaged over 8 x 8 fields."""


@dataclass(frozen=True)
class Budget:
    """Settings of every stage."""

    prior: ShapesPriorSettings | None
    posterior: TextToImagePosteriorSettings
    levels: int
    guidance: float
    reference_draws: int
    """Of the prior for each prompt."""
    draws: int
    """Of each method for each prompt, in the evaluation."""
    draw_batch: int
    """Images drawn at once."""


def budget_for(name: BudgetName, prior: str) -> Budget:
    """`smoke`: every stage in seconds; `demo`: minutes; `full`: what the tables are made with."""
    full = _shapes() if prior == SHAPES else _pipeline()
    return {"smoke": _smoke, "demo": _demo, "full": lambda budget: budget}[name](full)


def _shapes() -> Budget:
    """For 16 x 16 pixels on one core."""
    finetune = FinetuneSettings(
        updates=60,
        beta_warmup=1,
        conditions=64,
        mix=Mix(on_policy=1, data=0),
        draw_batch=500,
        levels_per_path=10,
        chunk=128,
        learning_rate=1e-5,
        last_learning_rate=0.03,
        log_z_learning_rate=0.1,
        average_decay=0.97,
    )
    posterior = TextToImagePosteriorSettings(
        finetune,
        lora_rank=None,
        huber_threshold=20.0,
        linex_limit=4.0,
        look_ahead=True,
        start=RewardedSettings(),
        diagnostic_samples=1000,
    )
    return Budget(
        prior=ShapesPriorSettings(),
        posterior=posterior,
        levels=20,
        guidance=2.0,
        reference_draws=5000,
        draws=2000,
        draw_batch=500,
    )


def _pipeline() -> Budget:
    """For Stable Diffusion on a GPU."""
    return Budget(
        prior=None,
        posterior=TextToImagePosteriorSettings(),
        levels=50,
        guidance=7.5,
        reference_draws=64,
        draws=32,
        draw_batch=8,
    )


def _demo(budget: Budget) -> Budget:
    given = budget.posterior
    start = given.start and replace(given.start, draws=1000, steps=given.start.steps // 4)
    posterior = replace(
        _with(given, updates=max(1, given.finetune.updates // 4)),
        start=start,
        diagnostic_samples=max(16, given.diagnostic_samples // 5),
    )
    return replace(
        budget,
        posterior=posterior,
        reference_draws=max(16, budget.reference_draws // 5),
        draws=max(16, budget.draws // 5),
    )


def _smoke(budget: Budget) -> Budget:
    paths = min(2, budget.posterior.finetune.mix.on_policy)
    tiny = _with(
        budget.posterior,
        updates=4,
        conditions=4,
        mix=Mix(on_policy=paths, data=0),
        beta_warmup=1,
        levels_per_path=2,
        draw_batch=4,
    )
    return replace(
        budget,
        prior=budget.prior and _tiny(budget.prior),
        posterior=replace(
            tiny,
            start=tiny.start and RewardedSettings(draws=16, steps=4, batch=8),
            diagnostic_samples=4,
            log_every=2,
            grid_every=2,
        ),
        levels=4,
        reference_draws=16,
        draws=8,
        draw_batch=8,
    )


def _tiny(settings: ShapesPriorSettings) -> ShapesPriorSettings:
    short = replace(settings.pretrain, steps=10, batch=8)
    autoencoder = replace(settings.autoencoder, widths=(8, 8), steps=10, batch=8)
    return replace(settings, widths=(8, 16), images=64, autoencoder=autoencoder, pretrain=short)


def _with(settings: TextToImagePosteriorSettings, **changes: Any) -> TextToImagePosteriorSettings:
    return replace(settings, finetune=replace(settings.finetune, **changes))
