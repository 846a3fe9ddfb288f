"""How pytest-benchmark is shown samples that were taken elsewhere, interleaved with those of other variants."""


class SampleClock:
    """Its timer: stands still, except that step() moves it by the next recorded sample."""

    now = 0.0
    samples = iter(())

    def read(self) -> float:
        return self.now

    def step(self) -> None:
        self.now += next(self.samples)


CLOCK = SampleClock()


def show(benchmark, samples) -> None:
    """Hands recorded seconds to a test's pytest-benchmark, whose timer is CLOCK.read."""
    CLOCK.now, CLOCK.samples = 0.0, iter(samples)
    benchmark.pedantic(CLOCK.step, rounds=len(samples))
