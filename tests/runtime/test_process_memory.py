"""Peak memory is sampled while somebody measures it, and no longer."""

import gc
import threading

from custom_components.runtime.process_memory import PeakMemory
from tests.support.models import CPU


def test_the_peak_is_that_of_memory_that_is_gone_again():
    gc.collect()  # or what earlier tests left would go while this one measures
    memory = PeakMemory(CPU)
    block = bytearray(2**28)
    memory.sample()
    del block
    assert memory.gib() > 0.7 * 2**28 / 2**30


def test_nobody_samples_for_a_measurement_that_is_gone():
    """Or every run in one process would leave a thread that wakes fifty times a second."""
    before = {*threading.enumerate()}
    memory = PeakMemory(CPU)
    [thread] = {*threading.enumerate()} - before
    del memory
    thread.join(timeout=20)
    assert not thread.is_alive()
