"""The image programs run whole, leave what plain diffusers loads, resume exactly, and refuse bad
input before they work."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, DDPMScheduler, PNDMScheduler, UNet2DModel
from diffusers.loaders import PeftAdapterMixin
from rtb_rl.agents import image_baselines, rtb_image
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.trainer import Learner
from rtb_rl.cli import show_names
from rtb_rl.core import rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.image import fit_posterior, load_classifier, open_image_job
from rtb_rl.tasks.image.prior import PriorSettings, new_unet
from rtb_rl.training import Finetuner, loop, posterior_stage
from rtb_rl.training.stage import fingerprint

pytest.importorskip("sklearn", reason="the digits come with scikit-learn")
LEVELS = 6  # of the budget smoke
TIMINGS = {"seconds", "training_seconds"}


class LoraUNet(UNet2DModel, PeftAdapterMixin):
    """What a user of plain diffusers writes to load adapters."""


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def run(out, program=rtb_image, **given):
    """A run of a program; what it found."""
    program.main(program.Settings(out=out, budget="smoke", **given))
    return finished(out)


def finished(out):
    """results.json without timings."""
    results = json.loads((out / "results.json").read_text())
    for row in results["methods"].values():
        for name in TIMINGS:
            del row[name]
    return results


@pytest.fixture(scope="module")
def even(tmp_path_factory):
    """A finished run of everything, for even digits; others share what it fitted."""
    out = tmp_path_factory.mktemp("image") / "even"
    run(out)
    return out


@pytest.fixture(scope="module")
def adapted(even):
    """One class, with adapters."""
    out = even.with_name("adapted")
    run(out, share=even, target="3", lora_rank=2)
    return out


def reopened(out, **given):
    """The posterior of a finished run."""
    settings = rtb_image.Settings(out=out, budget="smoke", **given)
    job = open_image_job(
        settings, program="rtb_image", lora_rank=settings.lora_rank, gradient_checkpointing=False
    )
    return fit_posterior(out / "posterior", job.prior, job.target, job.budget.posterior)


def plain_samples(pipeline, count, seed):
    """What plain diffusers draws, images in [0, 1] of [count, C, H, W]."""
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        batch_size=count, num_inference_steps=LEVELS, generator=seeded(seed), output_type="np"
    ).images
    return torch.from_numpy(images).permute(0, 3, 1, 2)


def our_samples(found, count, seed):
    """Our path, decoded at its last step without the noise that is declared there."""
    diffusion, denoiser = found.task.diffusion, found.task.posterior
    path = rollout(diffusion, denoiser, None, count, generator=seeded(seed))
    one = torch.ones(count, dtype=torch.int64)
    with torch.no_grad():
        last = diffusion.kernel(denoiser(path.x[1], one, None), path.x[1], one)
    noise = float(diffusion.std[1].flatten()[0])
    assert (path.x0 - last.mean).abs().max() < 6 * noise
    return (last.mean / 2 + 0.5).clamp(0, 1)


def test_a_run_leaves_results_table_figure_and_grids(even):
    results = json.loads((even / "results.json").read_text())
    row = results["methods"]["rtb"]
    assert results["target"] == "class 0+2+4+6+8"
    assert list(results["methods"]) == ["rtb", "rtb, by weight"]
    weighted = results["methods"]["rtb, by weight"]
    assert weighted["calls"] == 2 * LEVELS * 4 and 0 < weighted["ess"] <= 1
    assert weighted["draws"] == 20 and weighted["training_calls"] == row["training_calls"]
    assert row == json.loads((even / "rows" / "rtb.json").read_text())
    assert row["draws"] == 20 and row["calls"] == LEVELS
    trained = json.loads((even / "posterior" / "results.json").read_text())
    assert row["training_calls"] == trained["network_calls"] > 0
    assert row["log_z"] == trained["diagnostics"]["log_z"]
    assert load_file(even / "rows" / "rtb.safetensors")["x0"].shape == (20, 1, 8, 8)
    lines = (even / "table.md").read_text().splitlines()
    assert lines[2].startswith("| *reference* |") and lines[3].startswith("| rtb")
    assert f"{row['log_reward']:.3f} ± {row['log_reward_error']:.3f}" in lines[3]
    assert (even / "figure.png").stat().st_size > 10_000
    events = EventAccumulator(str(even / "posterior")).Reload()
    assert set(events.Tags()["images"]) >= {"samples/prior", "samples/posterior"}
    steps = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps["samples/prior"] == [2] and steps["samples/posterior"] == [2, 4]
    assert "rtb/loss" in events.Tags()["scalars"]
    assert "evaluation" in EventAccumulator(str(even)).Reload().Tags()["images"]


def test_the_reference_is_the_prior_weighted_by_the_classifier(even):
    """E[log r] and log Z of results.json, from the files alone."""
    x0 = load_file(even / "reference" / "draws.safetensors")["x0"]
    probabilities = load_classifier(even / "classifier")((x0 / 2 + 0.5).clamp(0, 1)).softmax(-1)
    reward = probabilities[:, ::2].sum(1).double()
    row = json.loads((even / "results.json").read_text())["methods"]["rtb"]
    assert row["reference_log_z"] == pytest.approx(float(reward.mean().log()), abs=1e-5)
    wanted = float((reward * reward.log()).sum() / reward.sum())
    assert row["reference_log_reward"] == pytest.approx(wanted, abs=1e-5)


def test_plain_diffusers_draws_the_posterior_s_samples(even):
    pipeline = DDPMPipeline.from_pretrained(even / "posterior" / "pipeline")
    assert type(pipeline.unet) is UNet2DModel
    plain = plain_samples(pipeline, 4, seed=5)
    assert plain.std(0).mean() > 0.05
    assert (plain - our_samples(reopened(even), 4, seed=5)).abs().max() < 1e-4
    prior = DDPMPipeline.from_pretrained(even / "prior" / "pipeline")
    assert (plain - plain_samples(prior, 4, seed=5)).abs().max() > 1e-4
    card = (even / "posterior" / "pipeline" / "README.md").read_text()
    assert "class 0+2+4+6+8" in card and f"(num_inference_steps={LEVELS})" in card


def test_plain_diffusers_draws_with_the_adapters(even, adapted):
    assert not (adapted / "posterior" / "pipeline").exists()
    unet = LoraUNet.from_pretrained(even / "prior" / "pipeline", subfolder="unet")
    card = (adapted / "posterior" / "lora" / "README.md").read_text()
    weights = "pytorch_lora_weights.safetensors"
    assert f'load_lora_adapter(folder, weight_name="{weights}", prefix=None)' in card
    unet.load_lora_adapter(adapted / "posterior" / "lora", weight_name=weights, prefix=None)
    scheduler = DDPMScheduler.from_pretrained(even / "prior" / "pipeline", subfolder="scheduler")
    plain = plain_samples(DDPMPipeline(unet, scheduler), 4, seed=5)
    found = reopened(adapted, share=even, target="3", lora_rank=2)
    assert (plain - our_samples(found, 4, seed=5)).abs().max() < 1e-4
    row = json.loads((adapted / "results.json").read_text())["methods"]["rtb"]
    reference = json.loads((even / "results.json").read_text())["methods"]["rtb"]
    assert row["reference_log_z"] < reference["reference_log_z"]
    assert not (adapted / "prior").exists()


def test_the_results_have_the_fingerprint_of_the_prior(even, adapted):
    """Adapters on it or not."""
    prior = DDPMPipeline.from_pretrained(even / "prior" / "pipeline")
    for directory in (even, adapted):
        results = json.loads((directory / "results.json").read_text())
        assert results["prior_sha256"] == fingerprint(prior.unet)


def test_each_class_gets_its_own_reference(even, tmp_path):
    results = run(tmp_path / "each", share=even, target="each", gradient_checkpointing=True)
    row = results["methods"]["rtb"]
    assert results["target"] == "every class" and row["draws"] == 20
    kept = load_file(tmp_path / "each" / "rows" / "rtb.safetensors")["x0"]
    assert kept.shape == (20, 1, 8, 8)
    unet = DDPMPipeline.from_pretrained(tmp_path / "each" / "posterior" / "pipeline").unet
    assert unet.config["num_class_embeds"] == 10
    x0 = load_file(even / "reference" / "draws.safetensors")["x0"]
    probabilities = load_classifier(even / "classifier")((x0 / 2 + 0.5).clamp(0, 1)).softmax(-1)
    wanted = float(probabilities.double().mean(0).log().mean())
    assert row["reference_log_z"] == pytest.approx(wanted, abs=1e-5)


@pytest.fixture
def often(monkeypatch):
    """Checkpoints every two updates."""

    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 2})

    monkeypatch.setattr(posterior_stage, "train", train)


@pytest.mark.parametrize(
    "program, trainer, stage, given",
    [
        (rtb_image, Finetuner, "posterior", {}),
        (image_baselines, PolicyGradient, "DDPO", {"methods": ("DDPO",)}),
    ],
    ids=["rtb_image", "image_baselines"],
)
def test_a_run_that_was_killed_ends_like_one_that_was_not(
    program, trainer, stage, given, even, often, tmp_path, monkeypatch
):
    given = {**given, "share": even}
    folder = even if program is rtb_image else tmp_path / "whole"
    whole = finished(even) if program is rtb_image else run(folder, program, **given)
    update, seen = trainer.update, []

    def stop(self, step):
        if step == 3:
            raise KeyboardInterrupt
        return update(self, step)

    def watch(self, step):
        seen.append(step)
        return update(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(trainer, "update", stop)
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut", program, **given)
    assert not (tmp_path / "cut" / "results.json").exists()
    checkpoints = list((tmp_path / "cut" / stage / "checkpoints").iterdir())
    assert [path.name for path in checkpoints] == ["step_00000002"]
    monkeypatch.setattr(trainer, "update", watch)
    assert run(tmp_path / "cut", program, **given) == whole
    resumed = [step for step in seen if step or program is rtb_image]  # 0: pricing an update
    assert resumed[:2] == [2, 3]
    for name in ("model.safetensors", "metrics.jsonl"):
        one, other = (side / stage / name for side in (folder, tmp_path / "cut"))
        assert one.read_bytes() == other.read_bytes(), name
    monkeypatch.setattr(posterior_stage, "train", lambda *a, **k: pytest.fail("trained again"))
    assert run(tmp_path / "cut", program, **given) == whole
    with pytest.raises(InputError, match="another configuration.*seed was 0 and is now 5"):
        run(tmp_path / "cut", program, **given, seed=5)


def test_baselines_spend_what_trajectory_balance_spent(even, tmp_path):
    names = ("best of N", "importance resampling", "DPOK, published weights")
    results = run(tmp_path / "base", image_baselines, share=even, methods=names)
    assert list(results["methods"]) == list(names)
    rtb = json.loads((even / "results.json").read_text())["methods"]["rtb"]
    each = rtb["training_calls"] / rtb["draws"] + rtb["calls"]
    for name in names[:2]:
        row = results["methods"][name]
        assert row["training_calls"] == 0 and 0.9 * each <= row["calls"] <= each
    assert 0.6 < results["methods"][names[2]]["training_calls"] / rtb["training_calls"] < 1.5
    for row in results["methods"].values():
        assert row["reference_log_z"] == rtb["reference_log_z"]


def test_the_trained_baselines_have_a_rate_of_their_own(even, tmp_path, monkeypatch):
    """Not the one at which trajectory balance goes on after its start."""
    rates, begin = [], Learner.begin

    def watched(self, step):
        rates.append(self.settings.learning_rate)
        begin(self, step)

    monkeypatch.setattr(Learner, "begin", watched)
    given = dict(share=even, methods=("DDPO",))
    run(tmp_path / "base", image_baselines, **given, learning_rate=0.02)
    assert set(rates[1:]) == {0.02}  # the first update is priced and thrown away


def test_baselines_of_another_target_are_refused(even, tmp_path):
    """Their allowance would be that of another posterior."""
    for given in (dict(share=even), dict(share=even, against=even)):
        with pytest.raises(InputError, match="has target even, and odd is asked.*--against"):
            run(tmp_path / "base", image_baselines, target="odd", **given)
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    ("told", "words"),
    [
        ({"program": "rtb_text_to_image"}, "is a run of rtb_text_to_image, not of rtb_image"),
        ({"data_sha256": "other"}, "has data_sha256 other, and .* is asked for here.*--against"),
        ({"prior": "google/ddpm"}, "has prior google/ddpm, and None is asked for here"),
        ({"settings": {"prior": {"levels": 50}}}, f"has levels 50, and {LEVELS} is asked for"),
    ],
)
def test_an_allowance_of_another_problem_is_refused(told, words, even, tmp_path):
    against = changed_copy(even, tmp_path / "against", told)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "base", image_baselines, share=even, against=against)
    assert not (tmp_path / "base").exists()


def test_rows_of_another_allowance_are_not_kept(even, tmp_path):
    """They would stand beside the new ones, or in their place."""
    given = dict(share=even, methods=("best of N",))
    run(tmp_path / "base", image_baselines, **given)
    rows = json.loads((even / "results.json").read_text())["methods"]
    rows["rtb"]["training_calls"] *= 10
    against = changed_copy(even, tmp_path / "against", {}, methods=rows)
    with pytest.raises(InputError, match=r"another configuration: .*spent"):
        run(tmp_path / "base", image_baselines, **given, against=against)


def changed_copy(directory, copy, told, **results):
    """What a finished run says, changed."""
    copy.mkdir()
    for name, changed in (("config", told), ("results", results)):
        content = json.loads((directory / f"{name}.json").read_text()) | changed
        (copy / f"{name}.json").write_text(json.dumps(content))
    return copy


def pipeline_of(folder, scheduler, shape=(1, 8, 8), levels=LEVELS):
    unet = new_unet(shape, PriorSettings(widths=(8, 16), levels=levels), generator=seeded(0))
    DDPMPipeline(unet, scheduler).save_pretrained(folder)
    return str(folder)


def npz_of(folder, images):
    labels = np.zeros(len(images), dtype=np.int64)
    np.savez(folder / "images.npz", images=images.astype(np.float32), labels=labels)
    return str(folder / "images.npz")


BAD = {
    "class": (lambda folder: dict(target="11"), "has no class 11; it has labels 0 to 9"),
    "word": (
        lambda folder: dict(target="evn"),
        "has no class 'evn'; .*named 0, 1.*; give one, or even, odd, each, or several such as 1,7",
    ),
    "beta": (lambda folder: dict(beta=-1.0), "beta is -1.0; give a positive number"),
    "beta before the data": (
        lambda folder: dict(beta=0.0, data=str(folder / "none")),
        "beta is 0.0; give a positive number",
    ),
    "path": (lambda folder: dict(data=str(folder / "none")), "no image data at .*give 'digits'"),
    "range": (
        lambda folder: dict(data=npz_of(folder, np.full((9, 8, 8), 3.0))),
        r"values from 3 to 3; rescale them to \[0, 1\]",
    ),
    "odd of one class": (
        lambda folder: dict(data=npz_of(folder, np.zeros((9, 8, 8))), target="odd"),
        "has 1 class, none of them odd",
    ),
    "size": (
        lambda folder: dict(data=npz_of(folder, np.zeros((9, 7, 7))), target="0"),
        "can't be halved",
    ),
    "levels": (lambda folder: dict(levels=0), "0 levels has no step; give 1"),
    "scheduler": (
        lambda folder: dict(prior=pipeline_of(folder, PNDMScheduler())),
        "PNDMScheduler.*use DDPMScheduler",
    ),
    "clipping": (
        lambda folder: dict(prior=pipeline_of(folder, DDPMScheduler(clip_sample=True))),
        "clip_sample=True.*set unclipped",
    ),
    "shape": (
        lambda folder: dict(
            prior=pipeline_of(folder, DDPMScheduler(clip_sample=False), shape=(3, 8, 8))
        ),
        r"makes images of \(3, 8, 8\), the data holds images of \(1, 8, 8\)",
    ),
    "no pipeline": (lambda folder: dict(prior=str(folder)), "no diffusers pipeline can be read"),
    "share": (
        lambda folder: dict(share=folder),
        "no finished run.*classifier, judge, reference, prior not complete; finish it first",
    ),
    "rank": (lambda folder: dict(lora_rank=-3), "adapters of rank -3 hold nothing"),
    "draws": (lambda folder: dict(draws=-5), "-5 draws can't be compared; give 2 or more"),
    "unclipped": (lambda folder: dict(unclipped=True), "--unclipped is of a pipeline given"),
    "adapters": (lambda folder: dict(target="each", lora_rank=2), "leave lora_rank out"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_error_before_anything_is_written(name, tmp_path):
    given, words = BAD[name]
    (tmp_path / "given").mkdir()
    given = given(tmp_path / "given")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=words):
        run(tmp_path / "out", **given)
    assert sorted(tmp_path.rglob("*")) == before


def test_a_shared_run_of_other_data_is_refused(even, tmp_path):
    data = npz_of(tmp_path, np.zeros((9, 8, 8)))
    with pytest.raises(InputError, match=r"another configuration: .*data was 'digits'"):
        run(tmp_path / "out", share=even, data=data, target="0")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "given, words",
    [
        ({}, "name its directory with --share"),
        ({"share": Path("nowhere")}, "holds no finished run of rtb_image; finish it first"),
        ({"beta": -1.0}, "beta is -1.0; give a positive number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; give a positive number"),
        ({"calls": 0.0}, "calls is 0.0; give a positive number"),
        ({"methods": ("DPO",)}, "there is no method 'DPO' for this target; there are 'best of N'"),
        ({"methods": ("DPS as published",), "target": "each"}, "no method 'DPS as published'"),
    ],
)
def test_bad_input_of_the_baselines(given, words, even, tmp_path):
    if "methods" in given:
        given = {**given, "share": even}
    with pytest.raises(InputError, match=words):
        run(tmp_path / "out", image_baselines, **given)
    assert not (tmp_path / "out").exists()


def test_baselines_refuse_to_train_in_several_processes(even, tmp_path, monkeypatch):
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(image_baselines, "Accelerator", lambda: two)
    with pytest.raises(InputError, match="train in one process; start them without a launcher"):
        run(tmp_path / "out", image_baselines, share=even)
    assert not (tmp_path / "out").exists()


def test_both_programs_are_listed(capsys):
    show_names()
    lines = capsys.readouterr().out.splitlines()
    for name in ("rtb_image", "image_baselines"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


def test_without_the_extra_one_line_says_what_to_install():
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from rtb_rl.cli import main; sys.exit(main(['run', 'rtb_image']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rtb-rl: error:") and "pip install 'rtb-rl[image]'" in line


TWO = """
import sys
from pathlib import Path
from rtb_rl.agents import rtb_image
rtb_image.main(rtb_image.Settings(out=Path(sys.argv[1]), budget="smoke"))
"""


def two_processes(out):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(out)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


@pytest.mark.slow
def test_two_processes_share_all_but_their_paths(even, tmp_path):
    """From nothing, and again where the first has finished and the second has lost its results."""
    out = tmp_path / "two"
    two_processes(out)
    prior = "prior/pipeline/unet/diffusion_pytorch_model.safetensors"
    assert (out / prior).read_bytes() == (even / prior).read_bytes()
    weights = load_file(out / "posterior" / "model.safetensors")
    others = load_file(out / "posterior" / "process_1" / "model.safetensors")
    alone = load_file(even / "posterior" / "model.safetensors")
    assert weights.keys() == others.keys() == alone.keys()
    assert all(others[name].equal(value) for name, value in weights.items())
    assert not all(alone[name].equal(value) for name, value in weights.items())
    assert sorted(path.name for path in out.glob("*")) == sorted(
        path.name if "tfevents" not in path.name else next(out.glob("*tfevents*")).name
        for path in even.glob("*")
    )
    one, two = (
        json.loads((folder / "posterior" / "results.json").read_text()) for folder in (even, out)
    )
    assert two["network_calls"] == 2 * one["network_calls"]
    results = (out / "results.json").read_bytes()
    (out / "posterior" / "process_1" / "results.json").unlink()
    two_processes(out)
    assert (out / "results.json").read_bytes() == results
    (out / "posterior" / "results.json").unlink()
    two_processes(out)
    again = load_file(out / "posterior" / "model.safetensors")
    assert all(again[name].equal(value) for name, value in weights.items())
