"""A complete stage: its weights are those that were fitted, or it says so."""

import pytest
from torch import nn

from rtb_rl.errors import CheckpointError
from rtb_rl.training import Run
from rtb_rl.training.stage import WEIGHTS, complete


def test_one_wrong_bit_in_the_weights_is_noticed(tmp_path):
    module = nn.Linear(4, 4)
    complete(Run(tmp_path, {}), module, dict)
    again = nn.Linear(4, 4)
    complete(Run(tmp_path, {}), again, dict)
    assert bool((again.weight == module.weight).all())
    data = bytearray((tmp_path / WEIGHTS).read_bytes())
    data[-1] ^= 0x40
    (tmp_path / WEIGHTS).write_bytes(bytes(data))
    with pytest.raises(CheckpointError, match="doesn't match its digest"):
        complete(Run(tmp_path, {}), again, dict)
