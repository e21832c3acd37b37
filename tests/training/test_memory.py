"""Peak memory is that of the work alone, in a process of its own."""

from functools import partial

from rtb_rl.training.memory import peak_memory

MIB = 1 << 20


def test_the_peak_has_what_the_work_holds_and_not_what_this_process_does():
    held = b"x" * (900 * MIB)
    peak = peak_memory(partial(list, range(4_000_000)))
    assert 4e6 * 36 / MIB < peak < len(held) / MIB  # a pointer and a number for each
