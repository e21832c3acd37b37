"""A posterior on disk that fills gaps again: what `rtb-rl infill` loads."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Generator

from rtb_rl.core import OnDemand, Sampler
from rtb_rl.errors import CheckpointError, InputError
from rtb_rl.nn.transformer import MaskedTransformer
from rtb_rl.tasks.language.codec import TextCodec, TokenizersCodec, check_texts
from rtb_rl.tasks.language.denoiser import TextPrior
from rtb_rl.tasks.language.prompts import Frame, Gap, Prompts
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import WEIGHTS, load_weights

FILE = "infilling.json"
MERGED = "merged.safetensors"


@dataclass(frozen=True)
class Infiller:
    """A posterior, or a prior, that writes texts into gaps.

    `lengths`: how often sentences of so many tokens were seen; where a gap's length is not given it
    is drawn from them.
    """

    prior: TextPrior
    lengths: Mapping[int, int]

    def infill(
        self,
        left: str,
        right: str,
        n: int,
        *,
        length: int | None = None,
        generator: Generator,
    ) -> list[str]:
        """`n` texts between `left` and `right`; `length` in tokens.

        InputError for a missing left context, texts of unknown words or longer than the window.
        """
        frame = self.prior.frame
        check_texts(frame.codec, [text for text in (left, right) if text], window=frame.window)
        if n < 1:
            raise InputError(f"{n} texts were asked for; ask for one or more")
        if length is not None and frame.ends:
            raise InputError("this posterior ends a gap by itself; leave the length out")
        lengths = None if frame.ends else self._lengths(n, length, generator)
        prompts = Prompts.of(frame, [Gap(left, right)] * n, lengths).to(generator.device)
        denoiser = OnDemand(self.prior.both_sides())
        x0 = Sampler(self.prior.diffusion, denoiser).sample(
            prompts.condition, 1, generator=generator
        )
        return frame.texts(x0.squeeze(1), prompts.condition)

    def _lengths(self, n: int, length: int | None, generator: Generator) -> list[int]:
        if length is not None:
            return [length] * n
        known = sorted(self.lengths)
        weights = torch.tensor([float(self.lengths[one]) for one in known])
        index = weights.to(generator.device).multinomial(n, True, generator=generator)
        return [known[i] for i in index.tolist()]


def export_infiller(
    directory: Path, prior: TextPrior, network: torch.nn.Module, lengths: Sequence[int]
) -> None:
    """Write beside the weights of a posterior what else is needed to infill with it.

    With adapters, the weights merged with the prior's as well.
    """
    frame = prior.frame
    told: dict[str, Any] = {
        "network": prior.recipe,
        "levels": prior.levels,
        "frame": {"slots": frame.slots, "window": frame.window, "ends": frame.ends},
        "lengths": Counter(lengths),
    }
    if any("lora_" in name for name in network.state_dict()):
        from rtb_rl.adapters.lora import merged

        state = {k: v.cpu().contiguous() for k, v in merged(network).state_dict().items()}
        replace_file(directory / MERGED, save(state))
    if isinstance(frame.codec, TokenizersCodec):
        frame.codec.save(directory)
    replace_file(directory / FILE, json.dumps(told, indent=2).encode())


def load_infiller(directory: str | Path) -> Infiller:
    """What `export_infiller` wrote, in the directory or in its posterior/. InputError where there
    is none.
    """
    found = [path for path in (Path(directory) / "posterior", Path(directory)) if path.is_dir()]
    folder = next((path for path in found if (path / FILE).exists()), None)
    if folder is None:
        raise InputError(
            f"{directory} holds no posterior of texts ({FILE}); give the --out of a finished run of"
            " rtb_language"
        )
    told = json.loads((folder / FILE).read_text())
    prior = _rebuilt(folder, told)
    weights = MERGED if (folder / MERGED).exists() else WEIGHTS
    load_weights(folder, prior.network, name=weights)
    prior.network.requires_grad_(False).eval()
    return Infiller(prior, {int(length): count for length, count in told["lengths"].items()})


def infill_gap(
    directory: str | Path, left: str, right: str, n: int, *, length: int | None, seed: int
) -> list[str]:
    """`n` texts between `left` and `right` by the posterior of a run; as `Infiller.infill`."""
    infiller, generator = load_infiller(directory), generator_for(seed, "infill")
    return infiller.infill(left, right, n, length=length, generator=generator)


def _rebuilt(folder: Path, told: Mapping[str, Any]) -> TextPrior:
    """The prior with other weights."""
    recipe = dict(told["network"])
    try:
        if "source" in recipe:
            from rtb_rl.tasks.language.foreign import foreign_prior  # imports transformers

            return foreign_prior(**recipe, levels=told["levels"], **told["frame"])
        codec: TextCodec = TokenizersCodec.load(folder)
        half = recipe.pop("half_precision")
        network = MaskedTransformer(
            codec.vocabulary,
            pad=codec.pad,
            precision=torch.bfloat16 if half else None,
            generator=generator_for(0, "rebuilt"),
            **recipe,
        )
        return TextPrior(Frame(codec, **told["frame"]), network, told["levels"], recipe)
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged ({error}); run the program that wrote it again"
        ) from error
