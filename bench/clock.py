"""How pytest-benchmark is shown samples that were taken elsewhere, interleaved with those of other variants."""

import functools
import traceback
from collections.abc import Callable


class SampleClock:
    """Its timer: stands still, except that step() moves it by the next recorded sample."""

    now = 0.0
    samples = iter(())

    def read(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.samples)


CLOCK = SampleClock()


def remembered(measure: Callable) -> Callable:
    """measure, whose last result stands for the same arguments; a failure too, told anew as it was: an exception that
    was kept would keep the tensors of its frames."""

    @functools.lru_cache(maxsize=1)  # only one case is in memory at a time
    def attempt(*case):
        try:
            return measure(*case), None
        except Exception:
            return None, traceback.format_exc()

    def result(*case):
        found, failure = attempt(*case)
        if failure is not None:
            raise RuntimeError(failure)
        return found

    return result


def show(benchmark, samples) -> None:
    """Hands recorded seconds to a test's pytest-benchmark, whose timer is CLOCK.read."""
    CLOCK.now, CLOCK.samples = 0.0, iter(samples)
    benchmark.pedantic(CLOCK.step, rounds=len(samples))
