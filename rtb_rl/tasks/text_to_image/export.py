"""A text-to-image posterior as plain diffusers loads it, with a card that says what it is."""

from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import nn

from rtb_rl.adapters.lora import lora_layers
from rtb_rl.adapters.pipelines import last_steps
from rtb_rl.adapters.text_to_image import TextToImagePrior
from rtb_rl.adapters.text_to_image_export import save_lora_weights, save_pipeline_with
from rtb_rl.core import StartStep, steps_of_prior
from rtb_rl.nn import LearnedStart
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.diagnostics import trust
from rtb_rl.training.task import Task

START = "start.safetensors"

CARD = """# {target}: a text-to-image posterior trained by rtb-rl

Its law is p(image | prompt) r(image, prompt)^beta / Z(prompt) with beta = {beta:g} and
r = {target}; p is the pipeline it was made from, with guidance {guidance:g} and {levels} steps, and
no others. Trained on {prompts}.

```python
{usage}
```
{start}
{trust}
"""
LORA = """{before}pipeline = {kind}.from_pretrained(PRIOR{without})
pipeline.scheduler = {scheduler}.from_config(pipeline.scheduler.config, clip_sample=False)
pipeline.load_lora_weights(FOLDER)
{call}"""
PIPELINE = """pipeline = {kind}.from_pretrained(FOLDER)
{before}{call}"""
CALL = (
    "pipeline(PROMPT, num_inference_steps={levels}, eta=1.0, guidance_scale={guidance:g}"
    "{asked}{more}).images"
)
UNCHECKED = ", safety_checker=None"
LAST_STEPS = """def leave_last_steps_to_prior(pipeline, step, t, tensors):
    if step == {step}:
        pipeline.disable_lora()
    return tensors

"""
CALLBACK = ", callback_on_step_end=leave_last_steps_to_prior"
ENABLE = "\npipeline.enable_lora()"
LEARNED = """
The first noise has a law of its own: with `start` from {file}, `mean, log_scale = start` and
`latents = mean + log_scale.exp() * torch.randn(...)`.
"""


def export_posterior(
    directory: Path,
    prior: TextToImagePrior,
    task: Task,
    unet: nn.Module,
    *,
    beta: float,
    diagnostics: Mapping[str, float],
) -> None:
    """Write lora/ for a network with adapters, else pipeline/, where it is not there yet."""
    folder = directory / ("lora" if lora_layers(unet) else "pipeline")
    if not (folder / "README.md").exists():
        card = model_card(prior, task, unet, beta=beta, diagnostics=diagnostics)
        if lora_layers(unet):
            save_lora_weights(folder, prior.pipeline, unet, card=card)
        else:
            keep = steps_of_prior(task.posterior) > 0
            save_pipeline_with(folder, prior.pipeline, unet, card, keep_prior=keep)
    if isinstance(task.posterior, LearnedStart) and not (folder / START).exists():
        start = task.posterior.start.detach().cpu().contiguous()
        replace_file(folder / START, save({"start": start}))


def model_card(
    prior: TextToImagePrior,
    task: Task,
    unet: nn.Module,
    *,
    beta: float,
    diagnostics: Mapping[str, float],
) -> str:
    """Reward, beta, how to sample it, and how far it is from its target, as Markdown."""
    texts = prior.prompts.texts
    return CARD.format(
        target=task.name,
        beta=beta,
        guidance=prior.guidance,
        levels=prior.diffusion.levels,
        prompts=f"the prompt {texts[0]!r}" if len(texts) == 1 else f"{len(texts)} prompts",
        usage=_usage(prior, task, unet),
        start=LEARNED.format(file=START) if isinstance(task.diffusion, StartStep) else "",
        trust=trust(diagnostics),
    )


def _usage(prior: TextToImagePrior, task: Task, unet: nn.Module) -> str:
    """Python that draws with plain diffusers."""
    levels, last = prior.diffusion.levels, steps_of_prior(task.posterior)
    learned, adapted = isinstance(task.diffusion, StartStep), bool(lora_layers(unet))
    before, more, after = "", ", latents=latents" if learned else "", ""
    if last and adapted:
        before, more, after = LAST_STEPS.format(step=levels - last - 1), CALLBACK, ENABLE
    elif last:
        before = last_steps(prior.pipeline.unet, int(prior.grid.timesteps[last])) + "\n"
    given = {"levels": levels, "guidance": prior.guidance}
    call = CALL.format(**given, asked=_asked(prior), more=more)
    unchecked = getattr(prior.pipeline, "safety_checker", UNCHECKED) is None
    return (LORA if adapted else PIPELINE).format(
        kind=type(prior.pipeline).__name__,
        without=UNCHECKED if unchecked else "",
        scheduler=type(prior.pipeline.scheduler).__name__,
        before=before,
        call=call + after,
    )


def _asked(prior: TextToImagePrior) -> str:
    """What a call is told beside the prompt, where that is not what a pipeline does by itself."""
    negative, factor = prior.prompts.negative, prior.pipeline.vae_scale_factor
    asked = f", negative_prompt={negative!r}" if negative else ""
    height, width = prior.diffusion.event_shape[-2:]
    own = prior.pipeline.unet.config["sample_size"]  # of one or two sides, in latents
    if own not in ((height, width), [height, width]) and (own, own) != (height, width):
        asked += f", height={factor * height}, width={factor * width}"
    return asked
