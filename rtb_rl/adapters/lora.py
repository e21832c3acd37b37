"""One network seen twice: with low-rank adapters it is the posterior, without them the prior.

Low-rank adaptation (arXiv 2106.09685): W x + (alpha / rank) B A x, with A and B trained, W frozen
and B zero at first, so that the posterior starts exactly at the prior. There is no second copy:

    add_lora(unet, rank=4, generator=generator)
    views = LoraViews(denoiser_from_unet(unet, scheduler, grid))
    Task(..., prior=views.prior, posterior=views.posterior, ...)
"""

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Generator, Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.core.on_demand import log_probs_at
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

with extra("image"):
    from peft import (
        LoraConfig,
        get_peft_model_state_dict,
        inject_adapter_in_model,
        set_peft_model_state_dict,
    )
    from peft.tuners.lora import LoraLayer

Network = TypeVar("Network", bound=nn.Module)

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
ADAPTER = "default"
FILE = "pytorch_lora_weights.safetensors"
METADATA = "lora_adapter_metadata"  # where diffusers looks for rank and alpha


class WithoutLora(nn.Module):
    """The denoiser with its LoRA layers switched off: what it was before they were added.

    They are on again after each call, so that whatever is recomputed in a backward pass is the
    posterior's; a gradient through this one needs a network without gradient checkpointing. The
    network is not a submodule: freezing this freezes nothing, and its device is the posterior's.
    """

    def __init__(self, denoiser: nn.Module):
        super().__init__()
        self._shared = (denoiser,)
        self._layers = lora_layers(denoiser)
        if not self._layers:
            raise InputError("this denoiser has no LoRA layers to switch off; call add_lora first")

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        self._switch(off=True)
        try:
            return self._shared[0](x, level, condition)
        finally:
            self._switch(off=False)

    def at(self, x: Tensor, level: Tensor, condition: Any, row: Tensor, place: Tensor) -> Tensor:
        """Of tokens: what it says at the places (row, place)."""
        self._switch(off=True)
        try:
            return log_probs_at(self._shared[0], x, level, condition, row, place)
        finally:
            self._switch(off=False)

    def _switch(self, *, off: bool) -> None:
        for layer in self._layers:
            layer._disable_adapters = off  # enable_adapters() would change requires_grad as well


class LoraViews:
    """A denoiser whose network has LoRA layers, as `posterior`, and without them, as `prior`."""

    def __init__(self, denoiser: nn.Module):
        self.posterior = denoiser
        self.prior = WithoutLora(denoiser)


def add_lora(
    unet: Network,
    *,
    rank: int,
    alpha: int | None = None,
    targets: Sequence[str] = ATTENTION,
    generator: Generator,
) -> Network:
    """Put LoRA layers on the modules of `unet` whose names end in one of `targets`; returns it.

    Everything else is frozen. A ~ N(0, 1 / rank^2), B = 0: the output is unchanged at first. Both
    are float32, whatever the network is in.
    Whatever else holds this network sees the posterior from now on, and the prior through LoraViews
    only. `alpha` is the rank unless given. Raises InputError where a target is not in the network.
    """
    if rank < 1:
        raise InputError(f"adapters of rank {rank} hold nothing; give a rank of 1 or more")
    if missing := [target for target in targets if not _has(unet, target)]:
        raise InputError(
            f"no module of this {type(unet).__name__} is named {' or '.join(missing)}"
            f" (attention layers: {'yes' if has_attention(unet) else 'none'}); fine-tune the whole"
            ' network, or name its convolutions, e.g. targets=("conv1", "conv2")'
        )
    _inject(unet, rank, rank if alpha is None else alpha, targets)
    for layer in lora_layers(unet):
        first = layer.lora_A[ADAPTER].get_parameter("weight")
        second = layer.lora_B[ADAPTER].get_parameter("weight")
        noise = torch.randn(first.shape, generator=generator, device=generator.device)
        with torch.no_grad():
            first.copy_(noise / rank)
            second.zero_()
    return unet


def shared_view(unet: Network) -> Network:
    """A copy whose weights are the same memory: adapters put on it leave `unet` as it is."""
    return copy.deepcopy(unet, {id(p): p for p in unet.parameters()})


def has_attention(unet: nn.Module) -> bool:
    """Whether the default targets of LoRA are there."""
    return all(_has(unet, target) for target in ATTENTION)


def lora_layers(network: nn.Module) -> list[LoraLayer]:
    """The LoRA layers inside, in the order of the network."""
    return [module for module in network.modules() if isinstance(module, LoraLayer)]


def merged(unet: Network) -> Network:
    """A plain copy with W + (alpha / rank) B A in the place of W, for `save_pipeline`."""
    copied = copy.deepcopy(unet)
    for name, module in list(copied.named_modules()):
        if isinstance(module, LoraLayer):
            module.merge()
            copied.set_submodule(name, module.get_base_layer())
    if hasattr(copied, "peft_config"):
        del copied.peft_config
    return copied.requires_grad_(True)


def save_lora(directory: str | Path, unet: nn.Module) -> None:
    """Write the LoRA weights of `unet` as diffusers does: pytorch_lora_weights.safetensors.

    In plain diffusers, over the prior's pipeline folder:

        class LoraUNet(UNet2DModel, PeftAdapterMixin): ...
        unet = LoraUNet.from_pretrained(folder, subfolder="unet")
        unet.load_lora_adapter(directory, weight_name=FILE, prefix=None)

    with PeftAdapterMixin from diffusers.loaders.
    """
    weights, described = lora_weights(unet)
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    partial = directory / f".{FILE}.partial"
    metadata = {"format": "pt", METADATA: json.dumps(described)}
    save_file(weights, partial, metadata)
    partial.replace(directory / FILE)


def lora_weights(unet: nn.Module) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The weights of the LoRA layers under peft's names, and the config that puts them there.

    Raises InputError where there are none.
    """
    if not lora_layers(unet):
        raise InputError("this network has no LoRA layers to save; call add_lora first")
    weights = get_peft_model_state_dict(unet, adapter_name=ADAPTER)
    configs: Any = unet.peft_config
    config = configs[ADAPTER]
    described = {
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "target_modules": sorted(config.target_modules),
    }
    return {k: v.detach().contiguous() for k, v in weights.items()}, described


def load_lora(directory: str | Path, unet: nn.Module) -> None:
    """Add to `unet` the LoRA layers that `save_lora` wrote.

    InputError where there are none, or where they are not those of this network, which then stays
    as it is.
    """
    path = Path(directory) / FILE
    try:
        with safe_open(path, "pt") as file:
            config = json.loads(file.metadata()[METADATA])
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} can't be read as LoRA weights ({error}); give a directory that save_lora wrote"
        ) from error
    _check_without(unet)
    given = {name: tuple(weight.shape) for name, weight in weights.items()}
    wanted = _lora_shapes(unet, config["r"], config["target_modules"])
    for name in sorted(given.keys() | wanted.keys()):
        if given.get(name) != wanted.get(name):
            raise InputError(
                f"{path} has {_said(given.get(name))} for {name}, and this network takes"
                f" {_said(wanted.get(name))}; load it into the network that it was trained on"
            )
    _inject(unet, config["r"], config["lora_alpha"], config["target_modules"])
    set_peft_model_state_dict(unet, weights, adapter_name=ADAPTER)


def _lora_shapes(unet: nn.Module, rank: int, targets: Sequence[str]) -> dict[str, tuple[int, ...]]:
    """The weights of LoRA layers on the targets, under peft's names. Of a convolution A keeps the
    kernel and B has one pixel.
    """
    shapes = {}
    for name, layer in unet.named_modules():
        if not any(f".{name}".endswith(f".{target}") for target in targets):
            continue
        if isinstance(layer, nn.Linear):
            first, second = (rank, layer.in_features), (layer.out_features, rank)
        elif isinstance(layer, nn.Conv2d):
            first = (rank, layer.in_channels, *layer.kernel_size)
            second = (layer.out_channels, rank // layer.groups, 1, 1)
        else:
            continue
        shapes[f"{name}.lora_A.weight"], shapes[f"{name}.lora_B.weight"] = first, second
    return shapes


def _said(shape: tuple[int, ...] | None) -> str:
    return "nothing" if shape is None else f"weights {shape}"


def _inject(unet: nn.Module, rank: int, alpha: int, targets: Sequence[str]) -> None:
    """LoRA layers with any weights; the global generator, from which peft draws, is put back."""
    _check_without(unet)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=list(targets))
    with torch.random.fork_rng(devices=[]):
        inject_adapter_in_model(config, unet, adapter_name=ADAPTER)
    for layer in lora_layers(unet):
        layer.lora_A.float()  # small updates would be lost in half precision
        layer.lora_B.float()


def _check_without(unet: nn.Module) -> None:
    if lora_layers(unet):
        raise InputError("this network already has LoRA layers; train those, or use merged(unet)")


def _has(network: nn.Module, target: str) -> bool:
    return any(f".{name}".endswith(f".{target}") for name, _ in network.named_modules())
