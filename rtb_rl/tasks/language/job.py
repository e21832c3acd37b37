"""What the language program begins with: stories, prior, language models, prompts, reference."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rtb_rl.baselines import ImportanceReference
from rtb_rl.errors import InputError
from rtb_rl.tasks.language.codec import TextCodec, train_byte_codec, train_word_codec
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.language_model_training import (
    LanguageModel,
    LanguageModelSettings,
    fit_language_model,
)
from rtb_rl.tasks.language.methods import GapProblem
from rtb_rl.tasks.language.named_rewards import named_reward
from rtb_rl.tasks.language.prior import fit_text_prior, frame_for
from rtb_rl.tasks.language.prompts import Prompts, story_gaps
from rtb_rl.tasks.language.reference import fit_reference
from rtb_rl.tasks.language.rewards import (
    ContinuationLikelihood,
    TextReward,
)
from rtb_rl.tasks.language.settings import TextBudget, TextSettings, text_budget
from rtb_rl.tasks.language.texts import Story, load_texts, split
from rtb_rl.training.run import Run
from rtb_rl.training.stage import device_for_training

OWN_SHARES = {"test": 0.06, "prior": 0.47, "reward": 0.47}
GIVEN_SHARES = {"test": 0.06, "prior": 0.94}


@dataclass(frozen=True)
class TextJob:
    """An open run with all that is fitted before the posterior."""

    settings: TextSettings
    budget: TextBudget
    run: Run
    prior: TextPrior
    reward: TextReward
    model: LanguageModel | None
    """The language model of the reward, where it is one."""
    judge: LanguageModel
    prompts: Prompts
    """What the posterior is trained on."""
    problem: GapProblem
    """What every method is compared on."""
    reference: ImportanceReference


def open_text_job(settings: TextSettings, *, program: str) -> TextJob:
    """Load and check all that is given, fit what is not.

    Raises InputError for data, a prior, a reward or a shared run that don't fit, before anything is
    trained or written.
    """
    budget = _budget(settings)
    parts, digest = _stories(settings)
    hidden = settings.hidden - 1
    if settings.share is not None and not (settings.share / "results.json").exists():
        raise InputError(f"{settings.share} holds no finished run of rtb_language; finish it first")
    root = settings.share or settings.out
    device, seed = device_for_training(), settings.prior_seed
    foreign = None
    if settings.prior is not None:
        foreign = _foreign(settings, budget, parts["prior"])
    codec = foreign.frame.codec if foreign else _codec(settings, budget, parts["prior"])
    kept = {name: _short(codec, stories, settings.window) for name, stories in parts.items()}
    _check_kept(kept, settings)
    reward = named_reward(settings)
    given = {name: value for name, value in asdict(settings).items() if name != "out"}
    facts = {"data_sha256": digest, "settings": asdict(budget), "program": program}
    run = Run(settings.out, {**given, **facts})

    if foreign is None:
        frame = frame_for(codec, kept["prior"] + kept["test"], ends=settings.ends)
        prior = fit_text_prior(root / "prior", frame, kept["prior"], budget.prior, seed=seed)
    else:
        prior = foreign
    prior.network.to(device).requires_grad_(False).eval()
    model = None
    if reward is None:
        model = _model(
            root / "reward", settings.reward_model, settings, codec, kept["reward"], budget.reward
        )
        reward = ContinuationLikelihood(model)
    judge = _model(
        root / "judge", settings.judge_model, settings, codec, kept["prior"], budget.judge, 1
    )
    prompts = Prompts.of(prior.frame, story_gaps(kept["prior"], hidden)).to(device)
    test = Prompts.of(prior.frame, story_gaps(kept["test"][: budget.prompts], hidden)).to(device)
    problem = GapProblem(prior, test, reward, budget.draws, settings.beta)
    reference = fit_reference(root / "reference", problem, budget.reference_draws, seed=seed)
    return TextJob(settings, budget, run, prior, reward, model, judge, prompts, problem, reference)


def _budget(settings: TextSettings) -> TextBudget:
    """The budget of that name with what was asked for otherwise."""
    budget = text_budget(settings.budget)
    prior = replace(budget.prior, ends=settings.ends)
    if settings.levels is not None:
        prior = replace(prior, levels=settings.levels)
    posterior = replace(
        budget.posterior,
        finetune=replace(budget.posterior.finetune, beta=settings.beta),
        denoising=replace(budget.posterior.denoising, beta=settings.beta),
        lora_rank=settings.lora_rank,
    )
    if settings.lora_targets is not None:
        posterior = replace(posterior, lora_targets=settings.lora_targets)
    return replace(budget, prior=prior, posterior=posterior)


def _stories(settings: TextSettings) -> tuple[dict[str, list[Story]], str]:
    """Stories by what they are for, and a digest of all files."""
    if not 2 <= settings.hidden <= settings.sentences:
        raise InputError(
            f"sentence {settings.hidden} of {settings.sentences} can't be hidden; give 2 to"
            f" {settings.sentences}, so that there is a left context"
        )
    texts = load_texts(settings.data, sentences=settings.sentences)
    own = not settings.reward_data
    parts = split(texts, OWN_SHARES if own else GIVEN_SHARES, seed=settings.prior_seed)
    digests = [texts.sha256]
    if not own:
        more = [load_texts(one, sentences=settings.sentences) for one in settings.reward_data]
        parts["reward"] = [story for one in more for story in one.stories]
        digests += [one.sha256 for one in more]
    return parts, " ".join(digests)


def _codec(settings: TextSettings, budget: TextBudget, stories: Sequence[Story]) -> TextCodec:
    train = train_byte_codec if settings.byte_pairs else train_word_codec
    sentences = [sentence for story in stories for sentence in story]
    return train(sentences, vocabulary=budget.vocabulary)


def _short(codec: TextCodec, stories: Sequence[Story], window: int) -> list[Story]:
    ids = codec.encode([" ".join(story) for story in stories])
    return [story for story, row in zip(stories, ids, strict=True) if len(row) <= window]


def _check_kept(kept: Mapping[str, Sequence[Story]], settings: TextSettings) -> None:
    least = {"test": 2, "prior": 20, "reward": 20}
    for name, stories in kept.items():
        if len(stories) < least[name]:
            raise InputError(
                f"{len(stories)} stories of at most {settings.window} tokens are left for the"
                f" {name} part of {settings.data}, fewer than {least[name]}; give more stories or a"
                " larger window"
            )


def _foreign(settings: TextSettings, budget: TextBudget, stories: Sequence[Story]) -> TextPrior:
    from rtb_rl.tasks.language.foreign import foreign_prior  # transformers takes long to import

    assert settings.prior is not None
    return foreign_prior(
        settings.prior,
        levels=budget.prior.levels,
        slots=settings.window // 2,
        window=settings.window,
        ends=settings.ends,
        tokenizer=settings.tokenizer,
        mask=settings.mask,
        trust_remote_code=settings.trust_remote_code,
    )


def _model(
    directory: Path,
    source: str | None,
    settings: TextSettings,
    codec: TextCodec,
    stories: Sequence[Story],
    chosen: LanguageModelSettings,
    offset: int = 0,
) -> LanguageModel:
    """A language model from elsewhere, or one fitted here."""
    if source is None:
        seed = settings.prior_seed + offset
        return fit_language_model(directory, codec, stories, chosen, seed=seed)
    from rtb_rl.tasks.language.foreign import foreign_language_model

    model = foreign_language_model(source, trust_remote_code=settings.trust_remote_code)
    model.network.to(device_for_training())
    return model
