"""The text-to-image programs on pipelines, prompts and rewards of one's own: what they leave loads
in plain diffusers, and what doesn't fit is refused before anything is written.
"""

import json
import sys

import pytest
import torch
from diffusers import AutoencoderKL, PNDMScheduler, StableDiffusionPipeline
from rtb_rl.agents import rtb_text_to_image, text_to_image_baselines
from safetensors.torch import load_file
from tiny_stable_diffusion import LEVELS_OF_NOISE, WINDOW, tiny_sd

from rtb_rl.adapters.lora import lora_layers
from rtb_rl.core import rollout
from rtb_rl.errors import InputError, NonFiniteError
from rtb_rl.tasks.text_to_image import fit_text_to_image, group_log_z, open_text_to_image_job

pytestmark = pytest.mark.filterwarnings("ignore:the schedule leaves signal")

LEVELS, GUIDANCE, DRAWS = 4, 7.5, 8  # of the budget smoke
ROWS = ({"prompt": "a red cat", "scale": 1.0}, {"prompt": "two dogs", "scale": 3.0})
REWARDS = """
import torch
def scaled():
    def reward(images, prompts, metadata):
        scale = torch.tensor([one["scale"] for one in metadata])
        return scale * images.mean((1, 2, 3)), {"seen": len(prompts)}
    return reward
def short():
    return lambda images, prompts, metadata: images.mean()
def lost():
    return lambda images, prompts, metadata: images.mean((1, 2, 3)) * float("nan")
"""


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    """A folder with a pipeline, one as published, prompts, and rewards that can be imported."""
    folder = tmp_path_factory.mktemp("given")
    tiny_sd().save_pretrained(folder / "sd")
    pndm = PNDMScheduler(**LEVELS_OF_NOISE, skip_prk_steps=True, steps_offset=1)
    tiny_sd(scheduler=pndm).save_pretrained(folder / "published")
    (folder / "prompts.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    (folder / "prompts.txt").write_text(f"a red cat\n\n{'abcdefgh' * 3}\n")
    (folder / "empty.txt").write_text("\n")
    (folder / "own_rewards.py").write_text(REWARDS)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(folder)
        yield folder
    sys.modules.pop("own_rewards", None)


def asked(given, **more):
    """Two prompts with metadata for a reward of one's own."""
    files = {"prior": str(given / "sd"), "prompt_file": given / "prompts.jsonl"}
    return {**files, "reward": "own_rewards:scaled", "budget": "smoke", **more}


def run(out, program=rtb_text_to_image, **settings):
    program.main(program.Settings(out=out, **settings))
    return json.loads((out / "results.json").read_text())


@pytest.fixture(scope="module")
def listed(given, tmp_path_factory):
    """A finished run with adapters, log Z by groups."""
    out = tmp_path_factory.mktemp("pipelines") / "listed"
    run(out, **asked(given, group_log_z=True))
    return out


def reopened(given, out):
    """The posterior of that run."""
    settings = rtb_text_to_image.Settings(out=out, **asked(given, group_log_z=True))
    program = {"program": "rtb_text_to_image", "make_log_z": group_log_z}
    job = open_text_to_image_job(settings, **program)
    return fit_text_to_image(out / "posterior", job.prior, job.target, job.budget.posterior)


def latents(pipeline, text, seed):
    """What plain diffusers draws: [1, 4, 8, 8]."""
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": LEVELS, "eta": 1.0, "guidance_scale": GUIDANCE}
    return pipeline(
        text, generator=torch.Generator().manual_seed(seed), output_type="latent", **steps
    ).images


def test_prompts_come_with_metadata_and_each_has_its_own_reference(given, listed):
    """log r is the scale of the prompt's line times the brightness that plain diffusers decodes."""
    kept = load_file(listed / "reference" / "draws.safetensors")
    vae = AutoencoderKL.from_pretrained(given / "sd", subfolder="vae").eval()
    with torch.no_grad():
        images = vae.decode(kept["x0"].flatten(0, 1) / vae.config["scaling_factor"]).sample
    bright = (images / 2 + 0.5).clamp(0, 1).mean((1, 2, 3)).reshape(2, -1)
    scale = torch.tensor([[row["scale"]] for row in ROWS])
    torch.testing.assert_close(kept["log_reward"], scale * bright, atol=1e-4, rtol=1e-4)
    results = json.loads((listed / "results.json").read_text())
    wanted = kept["log_reward"].double().exp().mean(1).log()
    row = results["methods"]["rtb"]
    assert row["reference_log_z"] == pytest.approx(float(wanted.mean()), abs=1e-5)
    assert row["draws"] == 2 * DRAWS and results["classes"] == [] and "tv" not in row
    assert list(row["prompts"]) == [row["prompt"] for row in ROWS]
    of_prompts = [one["reference_log_reward"] for one in row["prompts"].values()]
    assert row["reference_log_reward"] == pytest.approx(sum(of_prompts) / 2)
    assert of_prompts[1] > 2 * of_prompts[0] > 0
    lines = (listed / "posterior" / "metrics.jsonl").read_text().splitlines()
    assert all("reward/1 two dogs" in json.loads(line) for line in lines[1::2])
    assert json.loads((listed / "config.json").read_text())["metadata"][1] == {"scale": 3.0}


def test_plain_diffusers_draws_with_the_adapters(given, listed):
    folder = listed / "posterior" / "lora"
    names = {path.name for path in folder.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "README.md"}
    assert "own_rewards:scaled" in (folder / "README.md").read_text()
    plain = StableDiffusionPipeline.from_pretrained(given / "sd")
    before = latents(plain, "two dogs", 5)
    plain.load_lora_weights(folder)
    after = latents(plain, "two dogs", 5)
    assert (after - before).abs().max() > 1e-4
    found = reopened(given, listed)
    own = StableDiffusionPipeline.from_pretrained(given / "sd")
    own.register_modules(unet=found.unet)
    assert len(lora_layers(found.unet)) > 0 and torch.equal(latents(own, "two dogs", 5), after)
    second = torch.tensor([1])
    path = rollout(
        found.task.diffusion,
        found.task.posterior,
        second,
        1,
        generator=torch.Generator().manual_seed(5),
    )
    noise = float(found.task.diffusion.std[1].flatten()[0])
    assert (path.x0 - after).abs().max() < 6 * noise  # the scheduler adds none in its last step


def test_gradient_checkpointing_changes_nothing_but_memory(given, listed, tmp_path, capsys):
    """The very same curves and weights; and a word on what is not exact about this pipeline."""
    more = {"group_log_z": True, "gradient_checkpointing": True, "share": listed}
    run(tmp_path / "out", **asked(given, **more))
    for name in ("metrics.jsonl", "model.safetensors"):
        one, other = (side / "posterior" / name for side in (listed, tmp_path / "out"))
        assert one.read_bytes() == other.read_bytes()
    assert "--learned-start learns another" in " ".join(capsys.readouterr().err.split())


def test_half_precision_is_another_prior(given, listed, tmp_path):
    """Its own draws, near those of full precision, and not to be mistaken for them."""
    half = asked(given, group_log_z=True, half_precision=True)
    with pytest.raises(InputError, match="precision was 'None' and is now 'torch.bfloat16'"):
        run(tmp_path / "shared", share=listed, **half)
    row = run(tmp_path / "half", **half)["methods"]["rtb"]
    one, other = (
        load_file(out / "reference" / "draws.safetensors")["x0"]
        for out in (listed, tmp_path / "half")
    )
    distance = (one - other).abs().mean()
    assert one.dtype == other.dtype == torch.float32 and 0 < distance < 0.1 * one.abs().mean()
    assert row["log_z"] is not None and row["training_calls"] > 0


def test_a_published_pipeline_with_a_file_of_prompts(given, tmp_path, capsys):
    """PNDM is refused with the cure; with it, a learned first noise and the published temperature.

    One prompt is longer than the text encoder's window.
    """
    files = {"prior": str(given / "published"), "prompt_file": given / "prompts.txt"}
    settings = {**files, "reward": "compressible", "budget": "smoke"}
    with pytest.raises(InputError, match="PNDMScheduler has no Gaussian step .*--ancestral"):
        run(tmp_path / "out", **settings)
    assert list(tmp_path.iterdir()) == []
    capsys.readouterr()
    flags = {"ancestral": True, "learned_start": True, "per_dimension": True, "lora_rank": 2}
    cut = f"has 26 tokens, more than the {WINDOW} .*what is cut off: 'ghabcdefgh'"
    with pytest.warns(UserWarning, match=cut):
        results = run(tmp_path / "out", **settings, **flags)
    assert "--learned-start" not in capsys.readouterr().err
    folder = tmp_path / "out" / "posterior" / "lora"
    start = load_file(folder / "start.safetensors")["start"]
    assert start.shape == (2, 4, 8, 8) and start.abs().max() > 0
    card = (folder / "README.md").read_text()
    assert f"beta = {4 * 8 * 8}" in card and "latents=latents" in card
    assert "DDIMScheduler.from_config" in card
    row = results["methods"]["rtb"]
    assert row["draws"] == 2 * DRAWS and row["calls"] == LEVELS + 1  # one more for the first noise


def test_all_weights_of_a_pipeline(given, tmp_path, capsys):
    """For one prompt, which stands above the table as it was given."""
    one = {"prompts": ("a [/b] cat",), "prompt_file": None, "reward": "compressible"}
    run(tmp_path / "out", **asked(given, **one, all_weights=True))
    assert "'a [/b] cat', compressible, beta 1" in capsys.readouterr().out
    plain = StableDiffusionPipeline.from_pretrained(tmp_path / "out" / "posterior" / "pipeline")
    kept = load_file(tmp_path / "out" / "posterior" / "model.safetensors")
    loaded = plain.unet.state_dict()
    assert len(loaded) <= len(kept)
    for name, value in loaded.items():
        (ours,) = [key for key in kept if key.endswith(f".unet.{name}")]
        assert torch.equal(kept[ours], value)


def test_baselines_of_a_black_box(given, listed, tmp_path):
    """All but the method that needs a gradient, which is refused by name."""
    with pytest.raises(
        InputError, match="adjoint matching needs a reward with a gradient, and 'ow"
    ):
        methods = ("best of N", "adjoint matching")
        run(
            tmp_path / "out",
            text_to_image_baselines,
            **asked(given, share=listed, methods=methods),
        )
    assert not (tmp_path / "out").exists()
    assert "adjoint matching" not in text_to_image_baselines.all_methods(differentiable=False)
    assert "adjoint matching" in text_to_image_baselines.all_methods(differentiable=True)
    methods = ("importance resampling", "DDPO")
    found = run(
        tmp_path / "out", text_to_image_baselines, **asked(given, share=listed, methods=methods)
    )["methods"]
    assert list(found) == list(methods)
    rtb = json.loads((listed / "results.json").read_text())["methods"]["rtb"]
    each = rtb["training_calls"] / rtb["draws"] + rtb["calls"]
    assert each - LEVELS < found["importance resampling"]["calls"] <= each
    assert (tmp_path / "out" / "DDPO" / "lora" / "README.md").exists()


def test_other_metadata_make_another_reward(given, listed, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({**row, "scale": 2.0}) for row in ROWS))
    with pytest.raises(InputError, match="metadata was .*'scale': 3.0.* and is now .*'scale': 2.0"):
        run(tmp_path / "out", **asked(given, prompt_file=path, share=listed, group_log_z=True))
    assert not (tmp_path / "out").exists()


BAD = {
    "no pipeline": (lambda given: dict(prior=str(given)), "no diffusers pipeline can be read"),
    "no folder": (
        lambda given: dict(prior="no/model"),
        "no diffusers pipeline can be read from 'no",
    ),
    "no line": (lambda given: dict(prompt_file=given / "empty.txt"), "holds no prompt; write one"),
    "both": (lambda given: dict(prompts=("a",)), "both prompts and a prompt file are given"),
    "no prompt": (lambda given: dict(prompt_file=None), "give --prompts or --prompt-file"),
    "no reward": (lambda given: dict(reward=None), "no reward is given for .*; give --reward"),
    "cell": (lambda given: dict(reward="cell:red circle"), "is of shapes alone; give another"),
    "unknown reward": (lambda given: dict(reward="own_rewards:best"), "no attribute 'best'"),
    "one number": (
        lambda given: dict(reward="own_rewards:short"),
        "the reward returned 1 value for 2 images; return one number an image",
    ),
    "NaN": (lambda given: dict(reward="own_rewards:lost"), "is nan, for the prompt 'a red cat'"),
    "no metadata": (
        lambda given: dict(prompt_file=None, prompts=("a cat",)),
        r"'own_rewards:scaled' fails on images \(2, 3, 16, 16\) .*\(KeyError: 'scale'\)",
    ),
    "levels": (lambda given: dict(levels=1001), "1001 levels don't fit a scheduler with num_train"),
    "size": (lambda given: dict(size=17), "images of 17 x 17 pixels don't fit this pipeline"),
    "share": (lambda given: dict(share=given), "reference not complete; finish that run first"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_before_anything_is_written(name, given, tmp_path):
    changed, words = BAD[name]
    before = sorted(given.rglob("*"))
    with pytest.raises((InputError, NonFiniteError), match=words):
        run(tmp_path / "out", **asked(given, **changed(given)))
    assert not (tmp_path / "out").exists()
    assert [path for path in sorted(given.rglob("*")) if "__pycache__" not in str(path)] == [
        path for path in before if "__pycache__" not in str(path)
    ]
