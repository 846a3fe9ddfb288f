"""Batches whose rows have adapters of their own, that are timed."""

from dataclasses import dataclass

Rows = tuple[
    tuple[tuple[int, ...], int], ...
]  # adapters that add up, and how many rows that follow one another have them


@dataclass(frozen=True)
class Case:
    """Rows through a K -> N linear whose adapters have these ranks."""

    name: str
    K: int
    N: int
    ranks: tuple[int, ...]
    rows: Rows

    @property
    def counts(self) -> list[int]:
        return [count for _, count in self.rows]

    @property
    def M(self) -> int:
        return sum(self.counts)

    @property
    def has_sums(self) -> bool:
        return any(len(adapters) > 1 for adapters, _ in self.rows)

    def __str__(self) -> str:
        return f"{self.M}, {self.K}, {self.N}: {self.name}"


def each(*counts: int) -> Rows:
    """The adapters in their order, each with its rows."""
    return tuple(((adapter,), count) for adapter, count in enumerate(counts))


def tree(leaves: int, count: int) -> Rows:
    """Rows at each leaf, below one root and one of two branches."""
    return tuple(((0, 1 + 2 * leaf // leaves, 3 + leaf), count) for leaf in range(leaves))


UNEVEN = (4000, 1999, 1001, 500, 300, 192, 100, 100)
GPU_CASES = (
    Case("8 of r = 16, 1,024 rows each", 4096, 4096, (16,) * 8, each(*(1024,) * 8)),
    Case("64 of r = 16, 128 rows each", 4096, 4096, (16,) * 64, each(*(128,) * 64)),
    Case(f"8 of r = 16; {', '.join(map(str, UNEVEN))} rows", 4096, 4096, (16,) * 8, each(*UNEVEN)),
    Case("8 of r = 8 to 128, 1,024 rows each", 4096, 4096, (8, 16, 24, 32, 48, 64, 96, 128), each(*(1024,) * 8)),
    Case("256 of r = 16, 64 rows each", 2048, 2048, (16,) * 256, each(*(64,) * 256)),
    Case("8 of r = 16, 1,024 rows each", 4096, 14336, (16,) * 8, each(*(1024,) * 8)),
    Case("a tree: three of r = 16 add up, 8 leaves", 4096, 4096, (16,) * 11, tree(8, 1024)),
)
TINY_CASES = (
    Case("3 of r = 2 to 8, 32 rows each", 64, 32, (2, 8, 5), each(32, 32, 32)),
    Case("3 of r = 3; 20, 1, 9 rows", 64, 32, (3,) * 3, each(20, 1, 9)),
    Case("a tree: three of r = 4 add up, 4 leaves", 64, 32, (4,) * 7, tree(4, 8)),
)


def few(rows: int, adapters: int, K: int, N: int) -> Case:
    """As generation has it: an adapter for each row."""
    return Case(f"{rows} rows, each by one of {adapters} of r = 16", K, N, (16,) * adapters, each(*(1,) * rows))


FEW_CASES = tuple(few(rows, 64, 4096, 4096) for rows in (1, 8, 64))
TINY_FEW_CASES = tuple(few(rows, 6, 64, 32) for rows in (1, 6))
