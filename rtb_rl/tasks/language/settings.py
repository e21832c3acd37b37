"""What the language program asks for, and how much work every stage does."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from rtb_rl.errors import InputError
from rtb_rl.tasks.language.language_model_training import LanguageModelSettings
from rtb_rl.tasks.language.prior import TextPriorSettings
from rtb_rl.tasks.language.trainers import TextPosteriorSettings
from rtb_rl.training.pretrain import PretrainSettings

BudgetName = Literal["smoke", "demo", "full"]


@dataclass(frozen=True)
class TextSettings:
    """What the language program asks for."""

    data: str = "grammar"
    """"grammar" (stories that the package makes itself), or a file of stories: .txt with one a
    line, or .jsonl with "text" or "sentences"; .gz as well."""
    reward_data: tuple[str, ...] = ()
    """Files of the language model that is the reward; not given: a share of the data that the prior
    is not trained on."""
    out: Path = Path("runs/language")
    """Directory of the run; the same command continues what it finds there."""
    hidden: int = 4
    """The sentence that is missing, counted from 1."""
    sentences: int = 5
    """Of every story; others are left out."""
    seed: int = 0
    """Of the posterior and of all that is drawn in the evaluation."""
    prior_seed: int = 0
    """Of prior, language models and reference."""
    budget: BudgetName = "full"
    prior: str | None = None
    """A masked language model, folder or hub id, instead of one trained on the data."""
    trust_remote_code: bool = False
    """Run code that comes with --prior, --reward-model or --judge-model."""
    mask: int | None = None
    """Mask id of --prior, where its configuration names none."""
    tokenizer: str | None = None
    """Tokenizer of --prior, where it brings none (MDLM, SEDD: gpt2)."""
    reward: str = "story"
    """story: log p(right | left, gap) of a language model; contains:WORD,WORD; words:NUMBER; or
    PACKAGE.MODULE:FACTORY, which is called and returns a reward of your own."""
    reward_model: str | None = None
    """A causal language model, folder or hub id, instead of one trained on the data."""
    judge_model: str | None = None
    """A causal language model for the perplexity, never a reward; likewise."""
    levels: int | None = None
    """Denoising steps; not given: those of the budget."""
    window: int = 64
    """Tokens of the longest story; longer ones are left out."""
    ends: bool = False
    """Gaps have a fixed number of slots and an end token, instead of a given length."""
    byte_pairs: bool = False
    """Train a byte-pair tokenizer instead of one of words."""
    beta: float = 1.0
    """Strength of the reward."""
    learned_log_z: bool = False
    """log Z is a network of the contexts, instead of the mean over a gap's paths."""
    lora_rank: int | None = None
    """Train adapters of this rank on the prior's own network instead of all weights of a copy."""
    lora_targets: tuple[str, ...] | None = None
    """Names of the layers of --prior that get adapters."""
    share: Path | None = None
    """Run whose prior, language models and reference are used instead of fitting them here."""
    methods: tuple[str, ...] = ()
    """Those to compare beside the posterior, by their names in the table; not given: all."""
    bert_model: str | None = None
    """Model of BERTScore, such as microsoft/deberta-xlarge-mnli; not given: no such column."""


@dataclass(frozen=True)
class TextBudget:
    """Settings of every stage."""

    vocabulary: int = 2000
    prior: TextPriorSettings = field(default_factory=lambda: TextPriorSettings(half_precision=True))
    reward: LanguageModelSettings = field(
        default_factory=lambda: LanguageModelSettings(half_precision=True)
    )
    judge: LanguageModelSettings = field(
        default_factory=lambda: LanguageModelSettings(half_precision=True, width=160, heads=5)
    )
    posterior: TextPosteriorSettings = field(default_factory=TextPosteriorSettings)
    prompts: int = 100
    """Stories that are held out, for the comparison."""
    reference_draws: int = 512
    """Prior draws of each of these."""
    pool_draws: int = 4
    """Prior draws of each story that the posterior is trained on."""
    draws: int = 4
    """Texts of each method for each of these held out."""
    paths: int = 64
    """Posterior paths of each, for log Z."""


def text_budget(name: BudgetName) -> TextBudget:
    """`smoke`: every stage in seconds; `demo`: minutes; `full`: what the tables are made with."""
    return {"smoke": _smoke, "demo": _demo, "full": TextBudget}[name]()


def _demo() -> TextBudget:
    full = TextBudget()
    small = LanguageModelSettings(width=64, depth=2, steps=400)
    tuned = replace(full.posterior.finetune, updates=250)
    return replace(
        full,
        prior=TextPriorSettings(
            width=64, depth=2, pretrain=PretrainSettings(steps=1500, batch=64, learning_rate=3e-3)
        ),
        reward=small,
        judge=small,
        posterior=replace(full.posterior, finetune=tuned),
        prompts=40,
        reference_draws=256,
        paths=64,
    )


def _smoke() -> TextBudget:
    tiny = LanguageModelSettings(width=16, depth=1, heads=2, steps=6, batch=8, choose_every=3)
    posterior = TextPosteriorSettings()
    few = replace(posterior.denoising, updates=4, conditions=4, refresh=2)
    return TextBudget(
        vocabulary=300,
        prior=TextPriorSettings(
            width=16,
            depth=1,
            heads=2,
            levels=4,
            pretrain=PretrainSettings(steps=10, batch=8, learning_rate=3e-3),
        ),
        reward=tiny,
        judge=tiny,
        posterior=replace(
            posterior,
            finetune=replace(posterior.finetune, updates=4, conditions=4),
            supervised=replace(posterior.supervised, steps=4, batch=8),
            start=replace(few, refresh=4),
            denoising=few,
            log_every=2,
            text_every=2,
        ),
        prompts=4,
        reference_draws=8,
        draws=4,
        paths=4,
    )


def check_used(settings: TextSettings) -> None:
    """InputError for an option that nothing here would read."""
    of_story = settings.reward == "story"
    for name, needed, there in (
        ("mask", "prior", settings.prior is not None),
        ("tokenizer", "prior", settings.prior is not None),
        ("lora_targets", "lora_rank", settings.lora_rank is not None),
        ("reward_model", "reward story", of_story),
    ):
        if getattr(settings, name) is not None and not there:
            raise InputError(
                f"{name} is given without {needed}, and read with it alone; leave it out"
            )
