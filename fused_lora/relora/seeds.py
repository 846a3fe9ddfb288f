"""Seeds made of numbers, the same on every rank."""


def mix(*numbers: int) -> int:
    """A seed in [0, 2^62) from several numbers: splitmix64's finalizer, chained."""
    state = 0
    for number in numbers:
        state = ((state ^ number) + 0x9E3779B97F4A7C15) % 2**64
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        state = (state ^ state >> 27) * 0x94D049BB133111EB % 2**64
        state ^= state >> 31
    return state >> 2
