"""One network seen twice: exact prior and posterior, gradients, copies, and files for diffusers."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel
from diffusers.loaders import PeftAdapterMixin
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rtb_rl.adapters.lora import (
    LoraViews,
    WithoutLora,
    add_lora,
    has_attention,
    load_lora,
    lora_layers,
    merged,
    save_lora,
)
from rtb_rl.adapters.pipelines import load_pipeline, open_pipeline, replacing, save_pipeline
from rtb_rl.adapters.schedulers import diffusion_from_scheduler, scheduler_grid
from rtb_rl.adapters.unets import denoiser_from_unet
from rtb_rl.core import ScalarLogZ, log_ratio, rollout
from rtb_rl.errors import InputError
from rtb_rl.training.finetune import Finetuner
from rtb_rl.training.mix import Mix
from rtb_rl.training.settings import FinetuneSettings
from rtb_rl.training.task import Task

LEVELS = 6
SCHEDULER = DDPMScheduler(clip_sample=False, prediction_type="v_prediction")
DIFFUSION = diffusion_from_scheduler(SCHEDULER, (3, 8, 8), levels=LEVELS)
ATTENTION = ("DownBlock2D", "AttnDownBlock2D"), ("AttnUpBlock2D", "UpBlock2D")
CONVOLUTIONS = ("DownBlock2D", "DownBlock2D"), ("UpBlock2D", "UpBlock2D")


class LoraUNet(UNet2DModel, PeftAdapterMixin):
    """What a user of plain diffusers writes to load adapters into an unconditional U-Net."""


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def new_unet(blocks: tuple = ATTENTION, **config: Any) -> UNet2DModel:
    """The same weights each time, whatever has drawn before."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        unet = UNet2DModel(
            sample_size=8,
            layers_per_block=1,
            block_out_channels=(8, 16),
            norm_num_groups=4,
            down_block_types=blocks[0],
            up_block_types=blocks[1],
            **config,
        )
    return unet.eval()


def adapted(unet: UNet2DModel, **settings: Any) -> LoraViews:
    add_lora(unet, **{"rank": 2, "generator": seeded(0), **settings})
    return LoraViews(denoiser_from_unet(unet, SCHEDULER, scheduler_grid(SCHEDULER, LEVELS)))


def change(network: nn.Module) -> None:
    """Give the adapters something to do."""
    for layer in lora_layers(network):
        nn.init.normal_(layer.lora_B["default"].weight, std=0.5, generator=seeded(9))


def inputs(batch: int = 3) -> tuple[Tensor, Tensor, None]:
    x = torch.randn((batch, 3, 8, 8), generator=seeded(1))
    return x, torch.arange(batch) % LEVELS + 1, None


def trainable(network: nn.Module) -> list[str]:
    return [name for name, value in network.named_parameters() if value.requires_grad]


def test_starts_exactly_at_the_prior() -> None:
    """Both views give the original predictions bit for bit, and every log-ratio is zero."""
    unet = new_unet()
    original = denoiser_from_unet(copy.deepcopy(unet), SCHEDULER, scheduler_grid(SCHEDULER, LEVELS))
    views = adapted(unet)
    assert torch.equal(views.posterior(*inputs()), original(*inputs()))
    assert torch.equal(views.prior(*inputs()), original(*inputs()))
    path = rollout(DIFFUSION, views.posterior, None, 3, generator=seeded(2))
    assert (log_ratio(DIFFUSION, views.posterior, views.prior, path) == 0).all()


def test_prior_stays_and_posterior_moves() -> None:
    unet = new_unet()
    original = denoiser_from_unet(copy.deepcopy(unet), SCHEDULER, scheduler_grid(SCHEDULER, LEVELS))
    views = adapted(unet)
    change(unet)
    before = views.posterior(*inputs())
    assert torch.equal(views.prior(*inputs()), original(*inputs()))
    assert (before - original(*inputs())).abs().max() > 1e-3
    assert torch.equal(views.posterior(*inputs()), before)  # on again after the prior


def test_the_prior_leaves_adapters_on_after_an_error() -> None:
    views = adapted(new_unet())
    change(views.posterior)
    before = views.posterior(*inputs())
    with pytest.raises(RuntimeError):
        views.prior(torch.zeros(1, 5, 8, 8), torch.ones(1, dtype=torch.int64), None)
    assert torch.equal(views.posterior(*inputs()), before)


def test_one_copy_in_memory() -> None:
    """The frozen weights are those of the network given; the prior owns nothing."""
    unet = new_unet()
    before = {value.data_ptr() for value in unet.parameters()}
    views = adapted(unet)
    frozen = {p.data_ptr() for p in views.posterior.parameters() if not p.requires_grad}
    assert frozen == before
    assert list(views.prior.parameters()) == [] and list(views.prior.buffers()) == []
    assert views.prior.state_dict() == {}


def test_only_adapters_train_and_freezing_the_prior_keeps_it_so() -> None:
    views = adapted(new_unet())
    names = trainable(views.posterior)
    assert names and all(".lora_" in name for name in names)
    views.prior.requires_grad_(False).eval()
    views.prior(*inputs())
    assert trainable(views.posterior) == names
    frozen = copy.deepcopy(views.posterior).requires_grad_(False)
    WithoutLora(frozen)(*inputs())
    assert trainable(frozen) == []


def test_checkpointed_gradients_are_the_posteriors() -> None:
    """Activations recomputed after a call of the prior are those of the posterior."""
    gradients, calls, original = [], [], new_unet()
    for checkpointing in (False, True):
        unet = copy.deepcopy(original)
        views = adapted(unet, targets=("conv1", "to_q"))  # diffusers recomputes convolutions only
        change(unet)
        if checkpointing:
            unet.enable_gradient_checkpointing()
        lora_layers(unet)[0].register_forward_hook(lambda *_: calls.append(1))
        prediction = views.posterior(*inputs())
        with torch.no_grad():
            views.prior(*inputs())
        prediction.square().sum().backward()
        gradients.append([p.grad for p in views.posterior.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients)
    assert len(calls) == 2 + 3  # the last one in the backward pass


def test_a_copy_is_independent() -> None:
    """Of the posterior alone, as for an average, and of both views together."""
    views = adapted(new_unet())
    average, both = copy.deepcopy(views.posterior), copy.deepcopy(views)
    start = views.posterior(*inputs())
    change(average)
    assert torch.equal(views.posterior(*inputs()), start)
    assert torch.equal(WithoutLora(average)(*inputs()), start)
    change(both.posterior)
    assert not torch.equal(both.posterior(*inputs()), start)
    assert torch.equal(both.prior(*inputs()), start)
    assert torch.equal(views.posterior(*inputs()), start)


def test_fine_tuning_moves_adapters_only() -> None:
    views = adapted(new_unet())
    before = {name: p.clone() for name, p in views.posterior.named_parameters()}
    task = Task("bright", DIFFUSION, views.prior, views.posterior, lambda x0, c: x0.mean((1, 2, 3)))
    settings = FinetuneSettings(updates=2, conditions=4, mix=Mix(on_policy=1, data=0))
    tuner = Finetuner(task, ScalarLogZ(), settings, generator=seeded(3))
    start = rollout(DIFFUSION, views.prior, None, 2, generator=seeded(4)).x0
    first = tuner.update(0)
    assert first["rtb/log_ratio"] == 0
    second = tuner.update(1)
    assert second["rtb/log_ratio"] != 0
    for name, parameter in views.posterior.named_parameters():
        assert torch.equal(parameter, before[name]) != (".lora_" in name), name
    assert torch.equal(rollout(DIFFUSION, views.prior, None, 2, generator=seeded(4)).x0, start)


def test_weights_come_from_the_generator() -> None:
    """Of whatever state the global generator is in, which stays as it was."""
    unet = new_unet()
    first, second, other = (copy.deepcopy(unet) for _ in range(3))
    state = torch.get_rng_state()
    add_lora(first, rank=2, generator=seeded(0))
    assert torch.equal(torch.get_rng_state(), state)
    torch.rand(3)
    add_lora(second, rank=2, generator=seeded(0))
    add_lora(other, rank=2, generator=seeded(1))
    values = [nn.utils.parameters_to_vector(x.parameters()) for x in (first, second, other)]
    assert torch.equal(values[0], values[1]) and not torch.equal(values[0], values[2])


def test_output_is_that_of_the_formula() -> None:
    """W + (alpha / rank) B A on every target, merged: arXiv 2106.09685 section 4.1."""
    unet = new_unet()
    weights = {name: value.clone() for name, value in unet.state_dict().items()}
    views = adapted(unet, alpha=6)
    change(unet)
    plain = merged(unet)
    assert type(plain) is UNet2DModel and plain.state_dict().keys() == weights.keys()
    layer = lora_layers(unet)[0]
    name = next(name for name, module in unet.named_modules() if module is layer)
    low_rank = layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    expected = weights[f"{name}.weight"] + 3 * low_rank
    torch.testing.assert_close(plain.state_dict()[f"{name}.weight"], expected)
    assert torch.equal(plain.state_dict()["conv_in.weight"], weights["conv_in.weight"])
    denoiser = denoiser_from_unet(plain, SCHEDULER, scheduler_grid(SCHEDULER, LEVELS))
    torch.testing.assert_close(
        denoiser(*inputs()), views.posterior(*inputs()), rtol=1e-4, atol=1e-4
    )
    assert len(trainable(plain)) == len(list(plain.parameters()))


def sample(unet: UNet2DModel) -> Tensor:
    pipeline = DDPMPipeline(unet, SCHEDULER)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=2, num_inference_steps=LEVELS, generator=seeded(5), output_type="np"
    ).images
    return torch.from_numpy(images)


def test_saved_adapters_load_in_plain_diffusers(tmp_path: Path) -> None:
    """Over the prior's folder, by diffusers alone and by load_lora: the same samples."""
    unet = new_unet()
    save_pipeline(tmp_path / "prior", unet, SCHEDULER, card="")
    prior = sample(unet)
    views = adapted(unet, alpha=6)
    change(unet)
    save_lora(tmp_path / "adapters", unet)
    assert [path.name for path in (tmp_path / "adapters").iterdir()] == [
        "pytorch_lora_weights.safetensors"
    ]
    expected = sample(unet)
    assert (expected - prior).abs().max() > 0.01

    plain = LoraUNet.from_pretrained(tmp_path / "prior", subfolder="unet")
    weights = "pytorch_lora_weights.safetensors"
    plain.load_lora_adapter(tmp_path / "adapters", weight_name=weights, prefix=None)
    assert torch.equal(sample(plain), expected)

    ours = load_pipeline(tmp_path / "prior").unet
    load_lora(tmp_path / "adapters", ours)
    assert torch.equal(sample(ours), expected)
    assert trainable(ours) == trainable(unet)
    grid = scheduler_grid(SCHEDULER, LEVELS)
    again = LoraViews(denoiser_from_unet(ours, SCHEDULER, grid))
    assert torch.equal(again.prior(*inputs()), views.prior(*inputs()))


def test_merged_pipeline_is_an_ordinary_one(tmp_path: Path) -> None:
    unet = new_unet()
    adapted(unet)
    change(unet)
    with pytest.raises(InputError, match=r"save merged\(unet\)"):
        save_pipeline(tmp_path / "posterior", unet, SCHEDULER, card="")
    save_pipeline(tmp_path / "posterior", merged(unet), SCHEDULER, card="")
    loaded = open_pipeline(load_pipeline(tmp_path / "posterior"), levels=LEVELS)
    torch.testing.assert_close(sample(loaded.pipeline.unet), sample(unet), rtol=0, atol=1e-4)


def test_networks_without_attention() -> None:
    """Refused with the cure; with convolutions named, exact at the start and merged as well."""
    unet = new_unet(CONVOLUTIONS, add_attention=False)
    assert not has_attention(unet) and has_attention(new_unet())
    with pytest.raises(InputError, match=r"to_q or to_k.*fine-tune the whole network"):
        add_lora(unet, rank=2, generator=seeded(0))
    start = unet(inputs()[0], 5).sample
    views = adapted(unet, targets=("conv1", "conv2"))
    assert torch.equal(unet(inputs()[0], 5).sample, start)
    change(unet)
    assert not torch.equal(views.posterior(*inputs()), views.prior(*inputs()))
    torch.testing.assert_close(
        merged(unet)(inputs()[0], 5).sample, unet(inputs()[0], 5).sample, rtol=1e-4, atol=1e-4
    )


def test_saved_adapters_of_convolutions_load_again(tmp_path: Path) -> None:
    """By load_lora and by plain diffusers; not into a network whose kernels have another size."""
    unet = new_unet(CONVOLUTIONS, add_attention=False)
    save_pipeline(tmp_path / "prior", unet, SCHEDULER, card="")
    prior = sample(unet)
    adapted(unet, alpha=6, targets=("conv1", "conv2", "conv_shortcut", "time_emb_proj"))
    change(unet)
    save_lora(tmp_path / "adapters", unet)
    expected = sample(unet)
    assert (expected - prior).abs().max() > 0.01
    ours = load_pipeline(tmp_path / "prior").unet
    load_lora(tmp_path / "adapters", ours)
    assert torch.equal(sample(ours), expected)
    assert trainable(ours) == trainable(unet)
    plain = LoraUNet.from_pretrained(tmp_path / "prior", subfolder="unet")
    weights = "pytorch_lora_weights.safetensors"
    plain.load_lora_adapter(tmp_path / "adapters", weight_name=weights, prefix=None)
    assert torch.equal(sample(plain), expected)

    other = new_unet(CONVOLUTIONS, add_attention=False)
    for block in other.down_blocks:
        block.resnets[0].conv1 = nn.Conv2d(block.resnets[0].conv1.in_channels, 8, 1)
    with pytest.raises(InputError, match=r"conv1.lora_A.weight.*takes weights \(2, 8, 1, 1\)"):
        load_lora(tmp_path / "adapters", other)
    assert not lora_layers(other)


def test_refusals(tmp_path: Path) -> None:
    unet = new_unet()
    plain = denoiser_from_unet(unet, SCHEDULER, scheduler_grid(SCHEDULER, LEVELS))
    with pytest.raises(InputError, match="no LoRA layers to switch off; call add_lora first"):
        LoraViews(plain)
    with pytest.raises(InputError, match="no LoRA layers to save"):
        save_lora(tmp_path, unet)
    with pytest.raises(InputError, match="can't be read as LoRA weights"):
        load_lora(tmp_path, unet)
    add_lora(unet, rank=2, generator=seeded(0))
    with pytest.raises(InputError, match="already has LoRA layers"):
        add_lora(unet, rank=2, generator=seeded(0))
    save_lora(tmp_path, unet)
    with pytest.raises(InputError, match="already has LoRA layers"):
        load_lora(tmp_path, unet)
    with pytest.raises(InputError, match="load it into the network that it was trained on"):
        load_lora(tmp_path, new_unet(CONVOLUTIONS))


def test_a_file_that_lacks_a_layer_is_refused_and_leaves_the_network_as_it_is(tmp_path: Path):
    unet = new_unet()
    add_lora(unet, rank=2, generator=seeded(0))
    save_lora(tmp_path, unet)
    path = next(tmp_path.glob("*.safetensors"))
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    lacking = next(name for name in weights if "to_k" in name)
    save_file({k: v for k, v in weights.items() if k != lacking}, path, metadata)
    again = new_unet()
    with pytest.raises(InputError, match=f"has nothing for {lacking}"):
        load_lora(tmp_path, again)
    assert not lora_layers(again)


@pytest.mark.parametrize("killed_after", [1, 2])
def test_a_folder_outlives_a_kill_while_it_is_replaced(tmp_path, monkeypatch, killed_after):
    """After the first rename, before the second, or after both: what is there is whole."""
    target, renames = tmp_path / "pipeline", []

    def write(text):
        with replacing(target, "marker", "test folder") as folder:
            folder.mkdir()
            (folder / "marker").write_text(text)

    write("old")
    rename = Path.rename

    def dying(self, other):
        rename(self, other)
        renames.append(other)
        if len(renames) == killed_after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        with pytest.raises(KeyboardInterrupt):
            write("new")
    with pytest.raises(ZeroDivisionError), replacing(target, "marker", "test folder"):
        raise ZeroDivisionError
    assert (target / "marker").read_text() == ("old" if killed_after == 1 else "new")
    write("newest")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
