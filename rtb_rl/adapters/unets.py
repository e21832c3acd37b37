"""diffusers U-Nets as Denoisers, and U-Nets that take a condition and start without it."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rtb_rl.adapters.extras import extra
from rtb_rl.adapters.schedulers import Scheduler, SchedulerGrid, check_scheduler
from rtb_rl.core import NoisePrediction, VelocityPrediction
from rtb_rl.core.protocols import Condition
from rtb_rl.errors import InputError

with extra("image"):
    from diffusers.models.unets.unet_2d import UNet2DModel


class UNetInputs(NamedTuple):
    """What a U-Net is given of a condition, one row an image.

    `class_labels`: int64 [batch]; `channels`: [batch, extra, height, width], joined to x on axis 1.
    """

    class_labels: Tensor | None = None
    channels: Tensor | None = None


Encode = Callable[[Condition], UNetInputs]


def ignore(condition: Condition) -> UNetInputs:
    """For a U-Net that knows nothing of the condition."""
    return UNetInputs()


class UNetDenoiser(nn.Module):
    """The raw output of a diffusers U-Net at a level: shaped as x, in the dtype of x.

    `timesteps`: int64 [K + 1], of a SchedulerGrid. `precision`: a dtype for autocast, e.g.
    torch.bfloat16. The network is put into evaluation mode: a denoiser has no dropout.
    """

    timesteps: Tensor

    def __init__(
        self,
        unet: nn.Module,
        timesteps: Tensor,
        *,
        encode: Encode | None = None,
        precision: torch.dtype | None = None,
    ):
        super().__init__()
        self.unet = unet.eval()
        self.encode = encode or ignore
        self.precision = precision
        self.register_buffer("timesteps", timesteps, persistent=False)

    def forward(self, x: Tensor, level: Tensor, condition: Condition) -> Tensor:
        labels, channels = self.encode(condition)
        noisy = x if channels is None else torch.cat([x, channels.to(x.dtype)], 1)
        with torch.autocast(x.device.type, self.precision, enabled=self.precision is not None):
            output = self.unet(noisy, self.timesteps[level], class_labels=labels).sample
        return output.to(x.dtype)


def denoiser_from_unet(
    unet: nn.Module,
    scheduler: Scheduler,
    grid: SchedulerGrid,
    *,
    encode: Encode | None = None,
    precision: torch.dtype | None = None,
) -> nn.Module:
    """The U-Net as a Denoiser: predicts x0 whatever the scheduler says that it predicts.

    Without `encode` the condition is ignored. Raises InputError where a prediction of noise is
    asked about x0 at a level without signal.
    """
    network = UNetDenoiser(unet, grid.timesteps, encode=encode, precision=precision)
    return denoiser_from_output(network, scheduler, grid)


def denoiser_from_output(
    network: nn.Module, scheduler: Scheduler, grid: SchedulerGrid
) -> nn.Module:
    """What the network says of x0; its own output is whatever the scheduler says that it predicts.

    Raises InputError as `denoiser_from_unet`.
    """
    check_scheduler(scheduler)
    prediction = scheduler.config["prediction_type"]
    if prediction == "sample":
        return network
    if prediction == "v_prediction":
        return VelocityPrediction(network, grid.schedule)
    if grid.schedule.signal[-1] == 0:
        raise InputError(
            'prediction_type "epsilon" says nothing about x0 at the last level, where this'
            " scheduler leaves no signal; use a network trained with"
            ' prediction_type="v_prediction", or rescale_betas_zero_snr=False'
        )
    return NoisePrediction(network, grid.schedule)


def with_classes(unet: UNet2DModel, count: int) -> UNet2DModel:
    """A copy that takes class labels 0..count - 1 and starts as `unet` for each of them.

    Still a plain UNet2DModel: the class embedding, zero at first, is added to that of the time.
    """
    if unet.class_embedding is not None:
        raise InputError("this U-Net already takes classes; give one without a class embedding")
    size = unet.time_embedding.linear_2.out_features
    copied = copy.deepcopy(unet)
    zeros = torch.zeros(count, size, dtype=unet.dtype, device=unet.device)
    copied.class_embedding = nn.Embedding.from_pretrained(zeros, freeze=False)
    copied.register_to_config(num_class_embeds=count)
    return copied


def with_channels(unet: UNet2DModel, count: int) -> UNet2DModel:
    """A copy with `count` input channels behind those of the image, which it ignores at first.

    Still a plain UNet2DModel: the weights of the first convolution for them are zero.
    """
    copied = copy.deepcopy(unet)
    first = copied.conv_in
    zeros = first.weight.new_zeros(first.out_channels, count, *first.kernel_size)
    first.weight = nn.Parameter(torch.cat([first.weight.detach(), zeros], 1))
    first.in_channels += count
    copied.register_to_config(in_channels=first.in_channels)
    return copied
