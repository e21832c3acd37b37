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
from rtb_rl.tasks.language.denoiser import TextPrior, fading
from rtb_rl.tasks.language.prompts import Frame, Gap, Prompts
from rtb_rl.training.checkpoint import replace_file
from rtb_rl.training.seeding import generator_for
from rtb_rl.training.stage import WEIGHTS, load_weights, tensors_of

FILE = "infilling.json"
MERGED = "merged.safetensors"


@dataclass(frozen=True)
class Infiller:
    """A posterior, or a prior, that writes texts into gaps.

    `lengths`: how often sentences of so many tokens were seen; where a gap's length is not given it
    is drawn from them.
    """

    prior: TextPrior
    network: torch.nn.Module
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
        if length is None and not frame.ends:
            context = frame.codec.encode([left, f" {right}" if right else ""])
            lengths = self._lengths(n, frame.window - sum(map(len, context)), generator)
        else:
            lengths = None if length is None else [length] * n
        prompts = Prompts.of(frame, [Gap(left, right)] * n, lengths).to(generator.device)
        denoiser = OnDemand(self.prior.both_sides(self.network))
        x0 = Sampler(self.prior.diffusion, denoiser).sample(
            prompts.condition, 1, generator=generator
        )
        return frame.texts(x0.squeeze(1), prompts.condition)

    def _lengths(self, n: int, room: int, generator: Generator) -> list[int]:
        """Of those that there is room for; the shortest where there is room for none."""
        known = sorted(self.lengths)
        known = [length for length in known if length <= room] or known[:1]
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

        replace_file(directory / MERGED, save(tensors_of(merged(network))))
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
    prior, lengths = _rebuilt(folder)
    network = fading(prior.network, prior.frame.codec.pad)
    weights = MERGED if (folder / MERGED).exists() else WEIGHTS
    load_weights(folder, network, name=weights)
    network.requires_grad_(False).eval()
    return Infiller(prior, network, lengths)


def infill_gap(
    directory: str | Path, left: str, right: str, n: int, *, length: int | None, seed: int
) -> list[str]:
    """`n` texts between `left` and `right` by the posterior of a run; as `Infiller.infill`."""
    infiller, generator = load_infiller(directory), generator_for(seed, "infill")
    return infiller.infill(left, right, n, length=length, generator=generator)


def _rebuilt(folder: Path) -> tuple[TextPrior, dict[int, int]]:
    """The prior with other weights, and how often gaps of each length were seen."""
    try:
        told = json.loads((folder / FILE).read_text())
        lengths = {int(length): int(count) for length, count in told["lengths"].items()}
        recipe = dict(told["network"])
        if "source" in recipe:
            from rtb_rl.tasks.language.foreign import foreign_prior  # imports transformers

            return foreign_prior(**recipe, levels=told["levels"], **told["frame"]), lengths
        codec: TextCodec = TokenizersCodec.load(folder)
        half = recipe.pop("half_precision")
        network = MaskedTransformer(
            codec.vocabulary,
            pad=codec.pad,
            precision=torch.bfloat16 if half else None,
            generator=generator_for(0, "rebuilt"),
            **recipe,
        )
        frame = Frame(codec, **told["frame"])
        return TextPrior(frame, network, told["levels"], told["network"]), lengths
    except InputError:
        raise
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{folder / FILE} is damaged ({error}); run the program that wrote it again"
        ) from error
