"""The text-to-image programs on shapes: whole, resumed exactly, against a reference recomputed from
its files, and what they refuse.
"""

import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from matplotlib import image as pictures
from rtb_rl.agents import rtb_text_to_image, text_to_image_baselines
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from rtb_rl.baselines.policy_gradient import PolicyGradient
from rtb_rl.baselines.trained import trained_methods
from rtb_rl.baselines.trainer import Learner
from rtb_rl.cli import show_names
from rtb_rl.core import Sampler, rollout
from rtb_rl.errors import InputError
from rtb_rl.tasks.text_to_image import (
    TextToImageJob,
    fit_text_to_image,
    open_text_to_image_job,
)
from rtb_rl.tasks.text_to_image.named_rewards import STRENGTH
from rtb_rl.tasks.text_to_image.shapes import CELLS, cell_log_probs
from rtb_rl.training import Finetuner, loop, posterior_stage
from rtb_rl.training.table import slug

LEVELS, DRAWS, REFERENCE_DRAWS = 4, 8, 16  # of the budget smoke
METHODS = ["prior", "rtb", "rtb, by weight"]
TIMINGS = {"seconds", "training_seconds"}
FREE = ("best of N", "importance resampling", "FK steering")


def run(out, program=rtb_text_to_image, **given):
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
def shapes(tmp_path_factory):
    """A finished run of everything, for a yellow triangle; others share what it made."""
    out = tmp_path_factory.mktemp("text_to_image") / "shapes"
    run(out)
    return out


def test_a_run_leaves_results_table_figure_and_grids(shapes):
    results = json.loads((shapes / "results.json").read_text())
    assert results["target"] == "cell:yellow triangle" and len(results["classes"]) == 12
    assert list(results["methods"]) == METHODS
    for name, row in results["methods"].items():
        assert row == json.loads((shapes / "rows" / f"{slug(name)}.json").read_text())
        assert row["draws"] == DRAWS
        assert row["calls"] == LEVELS * (8 if name == "rtb, by weight" else 1)
        assert sum(row["shares"]) == pytest.approx(1) and list(row["prompts"]) == ["a shape"]
        kept = load_file(shapes / "rows" / f"{slug(name)}.safetensors")
        assert kept["x0"].shape == (DRAWS, 4, 8, 8)
    row = results["methods"]["rtb"]
    trained = json.loads((shapes / "posterior" / "results.json").read_text())
    assert row["training_calls"] == trained["network_calls"] > 0
    assert row["log_z"] == trained["diagnostics"]["log_z"]
    lines = (shapes / "table.md").read_text().splitlines()
    titles = [line.split("|")[1].strip() for line in lines[2:]]
    assert titles[0] == "*reference*" and titles[1:] == METHODS
    assert f"{row['log_reward']:.3f} ± {row['log_reward_error']:.3f}" in lines[4]
    drawn = pictures.imread(shapes / "figure.png")[..., :3]
    assert min(drawn.shape[:2]) > 200 and drawn.std() > 0.05
    assert "evaluation" in EventAccumulator(str(shapes)).Reload().Tags()["images"]


def test_tensorboard_has_images_and_rewards_of_the_prompt(shapes):
    events = EventAccumulator(str(shapes / "posterior")).Reload()
    steps = {tag: [e.step for e in events.Images(tag)] for tag in events.Tags()["images"]}
    assert steps == {"posterior/0 a shape": [2, 4], "prior/0 a shape": [2]}
    scalars = events.Tags()["scalars"]
    assert {"rtb/loss", "rtb/log_z", "rtb/log_reward", "reward/0 a shape"} <= set(scalars)
    rewards = [event.value for event in events.Scalars("reward/0 a shape")]
    assert len(rewards) == 2 and all(-STRENGTH <= value <= 0 for value in rewards)


def cells_and_rewards(shapes, x0):
    """Class probabilities and log r of latents, by plain diffusers and the definition."""
    vae = AutoencoderKL.from_pretrained(shapes / "prior" / "pipeline", subfolder="vae").eval()
    with torch.no_grad():
        images = vae.decode(x0 / vae.config["scaling_factor"]).sample.mul(0.5).add(0.5).clamp(0, 1)
    probabilities = cell_log_probs(images).exp().double()
    near = [(c == "yellow") + (s == "triangle") for c, s in CELLS]
    values = STRENGTH * (torch.tensor(near, dtype=torch.float64) / 2 - 1)
    return probabilities, probabilities @ values


def test_the_reference_is_the_prior_weighted_by_the_reward(shapes):
    """E[log r], log Z, its error, the effective share and TV of results.json, from the draws."""
    kept = load_file(shapes / "reference" / "draws.safetensors")
    assert kept["x0"].shape == (1, REFERENCE_DRAWS, 4, 8, 8)
    probabilities, log_reward = cells_and_rewards(shapes, kept["x0"][0])
    torch.testing.assert_close(kept["log_reward"][0].double(), log_reward, atol=1e-3, rtol=0)
    weight = log_reward.exp()
    mean = weight.mean()
    wanted = (weight[:, None] * probabilities).sum(0) / weight.sum()
    for name, row in finished(shapes)["methods"].items():
        target = float((weight * log_reward).sum() / weight.sum())
        assert row["reference_log_reward"] == pytest.approx(target, abs=1e-3)
        assert row["reference_log_z"] == pytest.approx(float(mean.log()), abs=1e-3)
        error = float(weight.std() / mean) / REFERENCE_DRAWS**0.5
        assert row["reference_log_z_error"] == pytest.approx(error, rel=0.05)
        share = float(weight.sum() ** 2 / weight.square().sum()) / REFERENCE_DRAWS
        assert row["reference_ess"] == pytest.approx(share, abs=1e-3)
        x0 = load_file(shapes / "rows" / f"{slug(name)}.safetensors")["x0"]
        found, rewards = cells_and_rewards(shapes, x0)
        assert row["log_reward"] == pytest.approx(float(rewards.mean()), abs=1e-3)
        assert row["log_reward_error"] == pytest.approx(float(rewards.std()) / DRAWS**0.5, rel=1e-3)
        distance = float((found.mean(0) - wanted).abs().sum() / 2)
        assert row["tv"] == pytest.approx(distance, abs=1e-4)
        assert row["shares"] == pytest.approx(found.mean(0).tolist(), abs=1e-4)
    prior = load_file(shapes / "rows" / "prior.safetensors")["x0"]
    assert torch.equal(prior, kept["x0"][0, :DRAWS])


def test_plain_diffusers_draws_the_posterior_s_latents(shapes):
    """Also what the card says, and not what the prior draws; but for the noise of the last step."""
    folder = shapes / "posterior" / "pipeline"
    plain, prior = (
        latents(StableDiffusionPipeline.from_pretrained(one))
        for one in (folder, shapes / "prior" / "pipeline")
    )
    assert (plain - prior).abs().max() > 1e-4
    settings = rtb_text_to_image.Settings(out=shapes, budget="smoke")
    job = open_text_to_image_job(settings, program="rtb_text_to_image")
    found = fit_text_to_image(shapes / "posterior", job.prior, job.target, job.budget.posterior)
    diffusion, denoiser, prompt = found.task.diffusion, found.task.posterior, torch.zeros(1).long()
    path = rollout(diffusion, denoiser, prompt, 1, generator=torch.Generator().manual_seed(5))
    one = torch.ones(1, dtype=torch.int64)
    with torch.no_grad():
        last = diffusion.kernel(denoiser(path.x[1], one, prompt), path.x[1], one)
    torch.testing.assert_close(last.mean, plain, atol=1e-4, rtol=1e-4)
    card = (folder / "README.md").read_text()
    assert "cell:yellow triangle" in card and "the prompt 'a shape'" in card
    assert f"num_inference_steps={LEVELS}, eta=1.0, guidance_scale=2" in card


def latents(pipeline):
    """Of the prompt, from one seed: [1, 4, 8, 8]."""
    pipeline.set_progress_bar_config(disable=True)
    steps = {"num_inference_steps": LEVELS, "eta": 1.0, "guidance_scale": 2.0}
    generator = torch.Generator().manual_seed(5)
    return pipeline("a shape", generator=generator, output_type="latent", **steps).images


def test_a_second_call_makes_nothing_anew(shapes, monkeypatch):
    before = {path: path.read_bytes() for path in shapes.rglob("*.safetensors")}
    whole = finished(shapes)

    def again(*arguments, **given):
        pytest.fail("made again")

    with monkeypatch.context() as patch:
        patch.setattr(posterior_stage, "train", again)
        patch.setattr(Sampler, "sample", again)
        assert run(shapes) == whole
    assert {path: path.read_bytes() for path in shapes.rglob("*.safetensors")} == before
    with pytest.raises(InputError, match="another configuration: seed was 0 and is now 5"):
        run(shapes, seed=5)


def test_what_a_run_made_is_shared_by_one_of_the_same_prior_and_reward(shapes, tmp_path):
    results = run(tmp_path / "other", share=shapes, lora_rank=2, beta=2.0)
    assert {path.name for path in (tmp_path / "other").iterdir() if path.is_dir()} == {
        "posterior",
        "rows",
    }
    assert (tmp_path / "other" / "posterior" / "lora" / "README.md").exists()
    log_reward = load_file(shapes / "reference" / "draws.safetensors")["log_reward"].double()
    wanted = float((2 * log_reward).exp().mean().log())
    assert results["methods"]["rtb"]["reference_log_z"] == pytest.approx(wanted, abs=1e-5)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(reward="cell:red circle"), "reward was 'cell:yellow triangle' and is now 'cell:red "),
        (dict(prompts=("a circle",)), r"prompts was \['a shape'\] and is now \['a circle'\]"),
        (dict(guidance=1.0), "guidance was 2.0 and is now 1.0"),
        (dict(half_precision=True), "precision was 'None' and is now 'torch.bfloat16'"),
        (dict(levels=5), "levels was 4 and is now 5"),
        (dict(prior_seed=1), "seed was 0 and is now 1"),
    ],
)
def test_a_shared_run_of_something_else_is_refused(given, words, shapes, tmp_path):
    with pytest.raises(InputError, match=f"another configuration: .*{words}"):
        run(tmp_path / "out", share=shapes, **given)
    assert not (tmp_path / "out").exists()


@pytest.fixture
def often(monkeypatch):
    """Checkpoints every two updates."""

    def train(*arguments, **given):
        return loop.train(*arguments, **{**given, "checkpoint_every": 2})

    monkeypatch.setattr(posterior_stage, "train", train)


@pytest.mark.parametrize(
    ("program", "trainer", "stage", "given"),
    [
        (rtb_text_to_image, Finetuner, "posterior", {}),
        (text_to_image_baselines, PolicyGradient, "DDPO", {"methods": ("DDPO",)}),
    ],
    ids=["rtb_text_to_image", "text_to_image_baselines"],
)
def test_a_run_that_was_killed_ends_like_one_that_was_not(
    program, trainer, stage, given, shapes, often, tmp_path, monkeypatch
):
    given = {**given, "share": shapes}
    ours = program is rtb_text_to_image
    folder = shapes if ours else tmp_path / "whole"
    whole = finished(shapes) if ours else run(folder, program, **given)
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
    assert [step for step in seen if step or ours][:2] == [2, 3]  # 0: pricing an update
    for name in ("model.safetensors", "metrics.jsonl"):
        one, other = (side / stage / name for side in (folder, tmp_path / "cut"))
        assert one.read_bytes() == other.read_bytes(), name
    with pytest.raises(InputError, match="another configuration.*seed was 0 and is now 5"):
        run(tmp_path / "cut", program, **given, seed=5)


def test_baselines_spend_what_trajectory_balance_spent(shapes, tmp_path, monkeypatch):
    """As the rows say, and the count of what goes through the U-Net: two rows a guided call."""
    rows, counts = [0], {}
    forward, add = UNet2DConditionModel.forward, TextToImageJob.add

    def counted(self, sample, *arguments, **given):
        rows[0] += len(sample)
        return forward(self, sample, *arguments, **given)

    def watched(self, name, *arguments):
        begun = rows[0]
        add(self, name, *arguments)
        counts[name] = (rows[0] - begun) / (2 * DRAWS)

    monkeypatch.setattr(UNet2DConditionModel, "forward", counted)
    monkeypatch.setattr(TextToImageJob, "add", watched)
    results = run(tmp_path / "base", text_to_image_baselines, share=shapes)
    assert list(results["methods"]) == [*FREE, *trained_methods()]
    rtb = finished(shapes)["methods"]["rtb"]
    each = rtb["training_calls"] / rtb["draws"] + rtb["calls"]
    for name, row in results["methods"].items():
        assert row["reference_log_z"] == rtb["reference_log_z"] and row["draws"] == DRAWS
        assert math.isfinite(row["log_reward"]) and row["calls"] == counts[name]
        if name in FREE:
            assert row["training_calls"] == 0 and each - LEVELS < row["calls"] <= each
        else:
            assert row["calls"] == LEVELS
            assert 0.7 < row["training_calls"] / rtb["training_calls"] < 1.4, name
            folder = tmp_path / "base" / name.translate(str.maketrans(" /,", "___"))
            assert (folder.parent / folder.name.replace("__", "_") / "pipeline").is_dir(), name


def test_the_trained_baselines_have_a_rate_of_their_own(shapes, tmp_path, monkeypatch):
    """Not the one at which trajectory balance goes on after its start."""
    rates, begin = [], Learner.begin

    def watched(self, step):
        rates.append(self.settings.learning_rate)
        begin(self, step)

    monkeypatch.setattr(Learner, "begin", watched)
    given = dict(share=shapes, methods=("DDPO",))
    run(tmp_path / "base", text_to_image_baselines, **given, learning_rate=0.02)
    assert set(rates[1:]) == {0.02}  # the first update is priced and thrown away


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(share=None), "baselines stand on a run of rtb_text_to_image; name its .* --share"),
        (dict(share=None, against=Path("x")), "name its directory with --share"),
        (dict(share=Path("nowhere")), "holds no finished run of rtb_text_to_image; finish it"),
        (dict(methods=("DPO",)), "there is no method 'DPO'; there are 'best of N'"),
        (dict(reward="compressible"), "has reward cell:yellow triangle, and compressible is asked"),
        (dict(prompts=("a circle",)), r"has prompts \['a shape'\], and \['a circle'\] is asked"),
        (dict(share=None, beta=-1.0), "beta is -1.0; give a positive number"),
        (dict(beta=3.0), "has beta 1.0, and 3.0 is asked for here.*--against"),
        (dict(calls=math.nan), "calls is nan; give a positive number"),
        (dict(learning_rate=0.0), "learning_rate is 0.0; give a positive number"),
        (dict(lora_rank=0), "adapters of rank 0 hold nothing"),
        (dict(lora_rank=-1), "adapters of rank -1 hold nothing"),
        (dict(negative="ugly"), "has negative , and ugly is asked for here.*--against"),
        (dict(size=32), "has size None, and 32 is asked for here.*--against"),
        (dict(levels=9), "has levels 4, and 9 is asked for here.*--against"),
        (dict(guidance=9.0), "has guidance 2.0, and 9.0 is asked for here.*--against"),
        (dict(prior="folder", prompts=("a",), reward="compressible"), "has prior shapes, and fold"),
    ],
)
def test_bad_input_of_the_baselines(given, words, shapes, tmp_path):
    with pytest.raises(InputError, match=words):
        run(tmp_path / "out", text_to_image_baselines, **{"share": shapes, **given})
    assert not (tmp_path / "out").exists()


def test_a_beta_for_each_number_of_a_latent_is_not_that_of_the_baselines(shapes, tmp_path):
    against = tmp_path / "against"
    against.mkdir()
    for name, told in (("config", {}), ("results", {"beta": 256.0})):
        content = json.loads((shapes / f"{name}.json").read_text()) | told
        (against / f"{name}.json").write_text(json.dumps(content))
    assert json.loads((shapes / "results.json").read_text())["beta"] == 1.0
    with pytest.raises(InputError, match=r"has beta 256.0, and 1.0 is asked for here.*--against"):
        run(tmp_path / "out", text_to_image_baselines, share=shapes, against=against)


def test_rows_of_another_allowance_are_not_kept(shapes, tmp_path):
    """Also where it is that of another --share."""
    given = dict(methods=("best of N",))
    run(tmp_path / "base", text_to_image_baselines, **given, share=shapes)
    other = shutil.copytree(shapes, tmp_path / "other")
    results = json.loads((other / "results.json").read_text())
    results["methods"]["rtb"]["training_calls"] *= 10
    (other / "results.json").write_text(json.dumps(results))
    with pytest.raises(InputError, match=r"another configuration: .*spent"):
        run(tmp_path / "base", text_to_image_baselines, **given, share=other)


def test_baselines_refuse_to_train_in_several_processes(shapes, tmp_path, monkeypatch):
    two = SimpleNamespace(num_processes=2)
    monkeypatch.setattr(text_to_image_baselines, "Accelerator", lambda: two)
    with pytest.raises(InputError, match="train in one process; start them without a launcher"):
        run(tmp_path / "out", text_to_image_baselines, share=shapes)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (dict(reward="cell:red cat"), "there is no red cat; colours are red"),
        (dict(reward="nice"), "there is no reward 'nice'; give one of cell, colour"),
        (dict(prompts=("a",), prompt_file=Path("p.txt")), "both prompts and a prompt file"),
        (dict(prompt_file=Path("nowhere.txt")), "prompts can't be read from nowhere.txt"),
        (dict(share=Path("nowhere")), "reference, prior not complete; finish that run first"),
        (dict(levels=0), "0 levels don't fit"),
        (dict(beta=-1.0), "beta is -1.0; give a positive number"),
        (dict(beta=math.inf, reward="nice"), "beta is inf; give a positive number"),
        (dict(guidance=0.5), r"guidance must be 1 \(none\) or more, not 0.5"),
        (dict(guidance=math.nan), "guidance must be 1"),
        (dict(learned_start=True), "don't go together"),
        (dict(ancestral=True), "leave --ancestral out"),
        (dict(size=15), "images of 15 x 15 pixels don't fit this pipeline"),
        (dict(size=32), r"images of shapes are \[n, 3, 16, 16\], these are \(2, 3, 32, 32\)"),
        (dict(draws=1), "1 draws can't be compared; give 2 or more"),
        (dict(group_log_z=True), "give 2 paths or more, or a learned log Z"),
        (dict(lora_rank=0), "adapters of rank 0 hold nothing"),
        (dict(lora_rank=2, all_weights=True), "lora_rank 2 doesn't go with all_weights"),
        (dict(embedder="no/model"), "no CLIP model can be read from 'no/model'"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_bad_input_is_one_error_before_anything_is_written(given, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=words):
        run(tmp_path / "out", **given)
    assert list(tmp_path.iterdir()) == []


def test_both_programs_are_listed(capsys):
    show_names()
    lines = capsys.readouterr().out.splitlines()
    for name in ("rtb_text_to_image", "text_to_image_baselines"):
        assert any(line.split()[:1] == [name] and len(line.split()) > 3 for line in lines), name


def test_without_the_extra_one_line_says_what_to_install():
    script = (
        "import sys; sys.modules['diffusers'] = None\n"
        "from rtb_rl.cli import main; sys.exit(main(['run', 'rtb_text_to_image']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("rtb-rl: error:") and "pip install 'rtb-rl[" in line


TWO = """
import sys
from pathlib import Path
from rtb_rl.agents import rtb_text_to_image
out, share = map(Path, sys.argv[1:])
rtb_text_to_image.main(rtb_text_to_image.Settings(out=out, share=share, budget="smoke"))
"""


def two_processes(out, share):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    environment |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO, str(out), str(share)],
            env={**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(2)
    ]
    try:
        assert [process.wait(timeout=300) for process in started] == [0, 0]
    finally:
        for process in started:
            process.kill()


def test_two_processes_end_with_the_same_weights(shapes, tmp_path):
    out = tmp_path / "two"
    two_processes(out, shapes)
    first = load_file(out / "posterior" / "model.safetensors")
    second = load_file(out / "posterior" / "process_1" / "model.safetensors")
    alone = load_file(shapes / "posterior" / "model.safetensors")
    assert first.keys() == second.keys() == alone.keys()
    assert all(torch.equal(second[name], value) for name, value in first.items())
    assert not all(torch.equal(alone[name], value) for name, value in first.items())
    one, two = finished(shapes)["methods"], finished(out)["methods"]
    trained = json.loads((shapes / "posterior" / "results.json").read_text())
    start = trained["start"]["network_calls"]  # by the first process, for both
    wanted = start + 2 * (one["rtb"]["training_calls"] - start)
    assert two["rtb"]["training_calls"] == wanted
    assert two["prior"] == one["prior"]
