"""The table holds what the rows hold, and pictures show images where they belong."""

import pytest
import torch
from matplotlib import image as files
from matplotlib import pyplot

from rtb_rl.tasks.image.report import (
    COLUMNS,
    SIDE,
    draw_figure,
    highest_shown,
    markdown,
    mosaic,
    print_table,
    reference_row,
)
from rtb_rl.training.table import cells

ROW = {
    "log_reward": -0.5,
    "log_reward_error": 0.01,
    "reference_log_reward": -0.52,
    "reference_log_reward_error": 0.02,
    "judged": -0.7,
    "judged_error": 0.03,
    "reference_judged": -0.71,
    "reference_judged_error": 0.04,
    "tv": 0.05,
    "frechet": 1.25,
    "frechet_halves": 0.75,
    "diversity": 0.6,
    "diversity_error": 0.005,
    "reference_diversity": 0.61,
    "reference_log_z": -1.5,
    "reference_log_z_error": 0.015,
    "reference_ess": 0.4,
    "log_z": None,
    "ess": None,
    "collapsed": 0.0,
    "training_calls": 123456,
    "calls": 20.0,
    "seconds": 0.0125,
}


def columns(line):
    return [cell.strip() for cell in line.strip("|\n").split("|")]


def test_each_number_stands_under_its_title_with_its_own_error():
    found = dict(zip(COLUMNS, cells(COLUMNS, ROW), strict=True))
    assert found["E[log r]"] == "-0.500 ± 0.010"
    assert found["by the judge"] == "-0.700 ± 0.030"
    assert found["TV of classes"] == "0.050" and found["Frechet"] == "1.250"
    assert found["log Z"] == found["ESS"] == "-"
    assert found["training calls"] == "123456" and found["calls / draw"] == "20.000"
    assert found["s / draw"] == "0.013" or found["s / draw"] == "0.012"


def test_the_reference_is_a_row_of_its_own():
    found = dict(zip(COLUMNS, cells(COLUMNS, reference_row(ROW)), strict=True))
    assert found["E[log r]"] == "-0.520 ± 0.020"
    assert found["by the judge"] == "-0.710 ± 0.040"
    assert found["log Z"] == "-1.500 ± 0.015" and found["ESS"] == "0.400"
    assert found["TV of classes"] == "0.000" and found["Frechet"] == "0.750"
    assert found["training calls"] == found["calls / draw"] == "-"


def test_markdown_marks_what_has_collapsed(capsys):
    rows = {"rtb": ROW, "greedy": {**ROW, "log_reward": -0.1, "collapsed": 1.0}}
    lines = markdown(rows).splitlines()
    assert [columns(line)[0] for line in lines] == [
        "method",
        "---",
        "*reference*",
        "rtb",
        "greedy (collapsed)",
    ]
    assert len({len(columns(line)) for line in lines}) == 1
    assert columns(lines[0])[1:] == list(COLUMNS) and columns(lines[3])[1:] == cells(COLUMNS, ROW)
    print_table("a title", rows)
    shown = capsys.readouterr().out
    assert "E[log r]" in shown and "(collapsed)" in shown and "123456" in shown


@pytest.mark.parametrize("channels", [1, 3])
def test_a_mosaic_puts_image_i_at_row_i_over_side(channels):
    images = torch.rand((SIDE + 2, channels, 4, 5), generator=torch.Generator().manual_seed(0))
    picture = torch.from_numpy(mosaic(images))
    assert picture.shape[:2] == (SIDE * 5 - 1, SIDE * 6 - 1)
    picture = picture.reshape(*picture.shape[:2], channels).permute(2, 0, 1).float()
    for index, image in enumerate(images):
        y, x = index // SIDE * 5, index % SIDE * 6
        assert picture[:, y : y + 4, x : x + 5].equal(image)
    assert picture[:, 4].eq(1).all() and picture[:, :, 5].eq(1).all()
    assert picture[:, 10:].eq(1).all(), "missing images are white"


def test_the_figure_has_a_grid_and_a_histogram_for_every_name(tmp_path):
    names = [f"method {index}" for index in range(7)]
    grids = {name: torch.rand(3, 1, 4, 4) for name in names}
    histograms = {name: [0.25, 0.75] for name in names[:6]}
    figure = draw_figure(tmp_path / "figure.png", grids, histograms, ("even", "odd"))
    titles = [axis.get_title() for axis in figure.axes if axis.get_title()]
    assert titles == names
    bars = [[bar.get_height() for bar in axis.patches] for axis in figure.axes if axis.patches]
    assert bars == [[0.25, 0.75]] * 6
    pixels = files.imread(tmp_path / "figure.png")
    assert min(pixels.shape[:2]) > 300 and pixels[..., :3].std() > 0.05
    pyplot.close(figure)


def test_a_collapsed_method_does_not_flatten_the_histograms_of_others(tmp_path):
    grids = {name: torch.zeros(4, 1, 8, 8) for name in ("prior", "rtb", "DDPO")}
    shares = {"prior": [0.5, 0.5, 0.0], "rtb": [0.2, 0.3, 0.5], "DDPO": [0.0, 0.0, 1.0]}
    wide = {name: [*values, *[0.0] * 7] for name, values in shares.items()}
    wide |= {"prior": [0.1] * 10, "rtb": [0.08] * 9 + [0.28]}
    figure = draw_figure(tmp_path / "figure.png", grids, wide, [str(n) for n in range(10)])
    below = [axis for axis in figure.axes if axis.patches]
    tops = [axis.get_ylim()[1] for axis in below]
    assert tops == pytest.approx([1.05 * 2.5 * 0.28] * 3)
    assert [[text.get_text() for text in axis.texts] for axis in below] == [[], [], ["1.00"]]
    assert highest_shown([0.5, 0.4]) == pytest.approx(1.05 * 0.5) and highest_shown([]) == 1.0
