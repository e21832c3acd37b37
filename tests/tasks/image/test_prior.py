"""Priors of images: trained here they resume exactly, foreign ones are checked, draws are kept."""

import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, PNDMScheduler

from rtb_rl.errors import InputError
from rtb_rl.tasks.image import prior as priors
from rtb_rl.tasks.image.images import ImageDataset
from rtb_rl.tasks.image.prior import (
    PriorSettings,
    fit_prior,
    foreign_prior,
    new_scheduler,
    new_unet,
    prior_draws,
)
from rtb_rl.training import PretrainSettings, loop

SETTINGS = PriorSettings(widths=(8, 16), levels=5, pretrain=PretrainSettings(steps=8, batch=8))
SHAPE = (1, 8, 8)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def squares():
    """Bright on the left."""
    images = torch.rand((60, *SHAPE), generator=seeded()) / 4
    images[..., :4] += 0.7
    return ImageDataset("squares", images, torch.zeros(60, dtype=torch.int64), ("left",))


@pytest.fixture(scope="module")
def fitted(squares, tmp_path_factory):
    directory = tmp_path_factory.mktemp("prior")
    return directory, fit_prior(directory, squares, SETTINGS)


def saved(folder, scheduler, shape=SHAPE):
    DDPMPipeline(new_unet(shape, SETTINGS, generator=seeded()), scheduler).save_pretrained(folder)
    return folder


def test_a_finished_prior_is_not_trained_again(squares, fitted, monkeypatch):
    directory, prior = fitted
    monkeypatch.setattr(priors, "train", lambda *a, **k: pytest.fail("trained again"))
    again = fit_prior(directory, squares, SETTINGS)
    for one, other in zip(prior.denoiser.parameters(), again.denoiser.parameters(), strict=True):
        assert one.equal(other) and not one.requires_grad
    with pytest.raises(InputError, match="seed was 0 and is now 1"):
        fit_prior(directory, squares, SETTINGS, seed=1)


def test_an_interrupted_prior_ends_like_one_that_was_not(squares, fitted, tmp_path, monkeypatch):
    weights = "pipeline/unet/diffusion_pytorch_model.safetensors"
    update = priors.Pretrainer.update

    def stop(self, step):
        if step == 5:
            raise KeyboardInterrupt
        return update(self, step)

    often = lambda *a, **k: loop.train(*a, **{**k, "checkpoint_every": 2})  # noqa: E731
    monkeypatch.setattr(priors, "train", often)
    with monkeypatch.context() as patch:
        patch.setattr(priors.Pretrainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            fit_prior(tmp_path, squares, SETTINGS)
    assert not (tmp_path / "pipeline").exists()
    fit_prior(tmp_path, squares, SETTINGS)
    assert (tmp_path / weights).read_bytes() == (fitted[0] / weights).read_bytes()


def test_it_learns_where_it_is_bright(squares, tmp_path):
    longer = PriorSettings(widths=(8, 16), levels=5, pretrain=PretrainSettings(steps=60, batch=32))
    prior = fit_prior(tmp_path, squares, longer)
    x0 = prior.sampler.sample(None, 64, generator=seeded(1))
    left, right = (float(x0[..., columns].mean()) for columns in (slice(4), slice(4, 8)))
    assert left > 0.3 and right < -0.3  # of the data: 0.65 and -0.75


def test_draws_are_kept_and_belong_to_their_prior(fitted, tmp_path, monkeypatch):
    _, prior = fitted
    monkeypatch.setattr(priors, "BATCH", 4)
    x0 = prior_draws(tmp_path, prior, 10, seed=3)
    assert x0.shape == (10, *SHAPE) and len(x0.unique(dim=0)) == 10
    monkeypatch.setattr(priors, "BATCH", None)  # nothing can be drawn now
    assert prior_draws(tmp_path, prior, 10, seed=3).equal(x0)
    with pytest.raises(InputError, match="draws was 10 and is now 11"):
        prior_draws(tmp_path, prior, 11, seed=3)


def test_images_and_levels_that_no_network_fits():
    with pytest.raises(InputError, match=r"7 x 8 can't be halved 1 times.*fewer widths"):
        new_unet((1, 7, 8), SETTINGS, generator=seeded())
    with pytest.raises(InputError, match="0 levels has no step; give 1 level or more"):
        new_scheduler(0)


def test_a_foreign_pipeline_comes_with_its_own_levels(tmp_path):
    saved(tmp_path, DDPMScheduler(clip_sample=False))
    prior = foreign_prior(tmp_path, SHAPE, levels=7)
    assert prior.diffusion.levels == 7 and tuple(prior.diffusion.event_shape) == SHAPE
    assert not any(p.requires_grad for p in prior.denoiser.parameters())
    with pytest.raises(InputError, match=r"makes images of \(1, 8, 8\).*images of \(3, 8, 8\)"):
        foreign_prior(tmp_path, (3, 8, 8), levels=7)
    with pytest.raises(InputError, match=r"2000 levels don't fit.*use 1 to 1000"):
        foreign_prior(tmp_path, SHAPE, levels=2000)


def test_clipping_is_refused_unless_it_is_given_up(tmp_path):
    saved(tmp_path, DDPMScheduler(clip_sample=True))
    with pytest.raises(InputError, match="clip_sample=True.*set unclipped"):
        foreign_prior(tmp_path, SHAPE, levels=7)
    prior = foreign_prior(tmp_path, SHAPE, levels=7, unclipped=True)
    assert not prior.pipeline.scheduler.config["clip_sample"]
    ddim = saved(tmp_path / "ddim", DDIMScheduler(clip_sample=True))
    assert foreign_prior(ddim, SHAPE, levels=7, unclipped=True).diffusion.levels == 7


@pytest.mark.parametrize("unclipped", [False, True])
def test_a_scheduler_without_a_density_is_refused(tmp_path, unclipped):
    saved(tmp_path, PNDMScheduler())
    with pytest.raises(InputError, match="PNDMScheduler.*use DDPMScheduler.from_config"):
        foreign_prior(tmp_path, SHAPE, levels=7, unclipped=unclipped)
