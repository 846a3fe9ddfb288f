"""A launch of csrc's kernels played on the CPU, for what its threads wait for and tell each other; nothing is computed.

Each thread that waits or raises flags is a generator with the name of what it is in csrc/sm90. It yields a condition
before whatever may not come yet, and whose turn is next is drawn. Warpgroups that multiply are one thread each.
"""

import itertools
from collections.abc import Callable

from tests.csrc.consumers import Consumer
from tests.csrc.items import GRADIENT_B, SHRINK, TILE, Item
from tests.csrc.passes import (
    BLOCK_M,
    BOX,
    CLUSTER,
    CONSUMERS,
    FLAG_ROWS,
    LOOKAHEAD,
    NONE,
    PAIR_ROWS,
    Pass,
    Sizes,
    Turns,
    boxes_of,
)


def lookahead(size: int, width: int) -> int:
    return max(0, size - LOOKAHEAD * width) // width * width


FINISHING_WARPS = 2


class Launch:
    """What clusters share, and how they are played. rows_start_anywhere: out leaves through the finisher."""

    def __init__(self, each: Pass, sizes: Sizes, items: list, rng, clusters: int):
        self.each, self.sizes, self.items, self.rng = each, sizes, items, rng
        self.raised, self.taken, self.exited = set(), 0, 0
        self.pieces = 0  # of weights that are dequantised, taken
        self.rows_start_anywhere = rng.random() < 0.5
        self.sums = [rng.random() < 0.5 or part.r == 0 for part in each.parts]
        self.copied = rng.random() < 0.5
        self.clusters = [Cluster(self) for _ in range(min(clusters, len(items)))]

    def play(self) -> None:
        threads = [thread for cluster in self.clusters for thread in cluster.threads()]
        weights = [self.rng.choice([1, 1, 0.01]) for _ in threads]  # some are slow
        waiting_for = [next(thread) for thread in threads]
        while threads:
            ready = [i for i, condition in enumerate(waiting_for) if condition()]
            assert ready, f"all wait for ever, with {self.raised} raised"
            (i,) = self.rng.choices(ready, [weights[i] for i in ready])
            waiting_for[i] = self.advance(threads[i])
            if waiting_for[i] is None:
                del threads[i], weights[i], waiting_for[i]
        assert self.exited == CLUSTER * len(self.clusters), "the last one makes the counters ready for the next launch"

    def advance(self, thread) -> Callable[[], bool] | None:
        """Lets it go on, for a while or until it must wait. What it waits for then; None at its end."""
        for _ in range(self.rng.choice([1, 5, 1000])):
            condition = next(thread, None)
            if condition is None or not condition():
                break
        return condition

    # ---- flags ----

    def wait(self, *flags: int) -> Turns:
        yield lambda: self.raised.issuperset(flags)

    def raise_(self, flag: int) -> None:
        assert 0 <= flag < self.sizes.flags
        assert flag not in self.raised, f"{flag} has two writers"
        self.raised.add(flag)

    def leave(self) -> None:
        """Of a block whose producer has seen the list's end."""
        self.exited += 1
        assert self.exited < CLUSTER * len(self.clusters) or self.pieces == 0 or self.pieces >= self.sizes.ring.pieces

    # ---- what the kernels' parameters say ----

    def parts_of_tile(self, item: Item) -> range:
        return range(self.each.summed) if self.each.backward else range(item.part, item.part + 1)

    def column_of(self, item: Item) -> int:
        """Of tiles, where their weights are dequantised."""
        return (item.raises - self.sizes.ring.done) // (2 * self.row_count)

    @property
    def row_count(self) -> int:
        return -(-self.each.M // PAIR_ROWS)

    def read_flags(self, column: int) -> range:
        """Those of a column's tiles, which have read their weights."""
        first = self.sizes.ring.done + 2 * column * self.row_count
        return range(first, first + 2 * self.row_count)

    def tokens(self, item: Item) -> int:
        return min(self.each.M - item.row, item.rows)


class Cluster:
    def __init__(self, launch: Launch):
        self.items, self.seen = [], 0  # seen: how often somebody allowed the next item
        self.consumers = []  # of both blocks
        self.blocks = [Block(launch, self, rank) for rank in range(CLUSTER)]
        self.launch = launch

    def threads(self) -> list[Turns]:
        return [self.take_items(), *(thread for block in self.blocks for thread in block.threads())]

    def take_items(self) -> Turns:
        launch = self.launch
        yield lambda: True
        for taken in itertools.count(1):
            number = launch.taken
            launch.taken += 1
            self.items.append(launch.items[number] if number < len(launch.items) else None)
            if self.items[-1] is None:
                return
            yield lambda taken=taken: self.seen == taken * CLUSTER * (CONSUMERS + 1)

    def release_item(self) -> None:
        self.seen += 1

    def await_item(self, number: int) -> Turns:
        yield lambda: len(self.items) > number
        return self.items[number]


class Block:
    """Its producer and its finisher; the warpgroups that multiply are Consumers."""

    def __init__(self, launch: Launch, cluster: Cluster, rank: int):
        self.launch, self.cluster, self.rank = launch, cluster, rank
        self.steps = []  # of each that was loaded: boxes that both blocks share, every other one loaded by each
        self.consumers = [Consumer(launch, self, index) for index in range(CONSUMERS)]
        self.tiles, self.given, self.taken = [], [0] * CONSUMERS, [0] * CONSUMERS  # the finisher's; two in boxes
        self.waiting_to_finish = self.dequantised = 0
        cluster.consumers += self.consumers

    def threads(self) -> list[Turns]:
        pieces = [self.dequantise() for _ in range(FINISHING_WARPS)] if self.launch.sizes.ring.pieces else []
        return [self.produce(), self.finish_tiles(), *pieces, *(consumer.run() for consumer in self.consumers)]

    def full(self, step: int) -> bool:
        other = self.cluster.blocks[1 - self.rank]
        return len(self.steps) > step and (self.steps[step] <= other.rank or len(other.steps) > step)

    # ---- producer.cuh ----

    def produce(self) -> Turns:
        for number in itertools.count():
            item = yield from self.cluster.await_item(number)
            if item is None:
                break
            load = {SHRINK: self.shrink, TILE: self.tile}.get(item.work, self.gradient)
            yield from load(item)
        if self.launch.sizes.ring.pieces:
            yield lambda: self.dequantised == FINISHING_WARPS
        self.launch.leave()

    def wait_for_weight(self, item: Item) -> Turns:
        ring = self.launch.sizes.ring
        if ring.pieces:
            first = ring.ready + self.launch.column_of(item) * ring.ready_stride
            yield from self.launch.wait(*range(first, first + ring.of_tile))

    def step(self, shared_boxes: int) -> Turns:
        step, stages = len(self.steps), self.launch.sizes.stages
        yield lambda: all(consumer.released > step - stages for consumer in self.cluster.consumers)
        self.steps.append(shared_boxes)

    def wait_for_low(self, flag: int) -> Turns:
        """Of a block's rows."""
        yield from self.launch.wait(flag, flag + 1)

    def wait_for_own_low(self, item: Item, part: int) -> Turns:
        yield from self.wait_for_low(item.waits + part * self.launch.sizes.low_flags + self.rank * CONSUMERS)

    def shrink(self, item: Item) -> Turns:
        sizes, depth = self.launch.sizes, self.launch.each.parts[item.part].depth
        width = sizes.shrink_halves * BOX
        for row in item.shrunk_rows:
            for k in range(0, depth, width):
                yield from self.step(sizes.rank_boxes)
                if row == item.shrunk_rows[-1] and k == lookahead(depth, width):
                    self.cluster.release_item()

    def tile(self, item: Item) -> Turns:
        each, sizes, parts = self.launch.each, self.launch.sizes, self.launch.parts_of_tile(item)
        yield from self.wait_for_weight(item)
        for i in parts:
            depth = each.parts[i].depth
            for k in range(0, depth, BOX):
                yield from self.step(sizes.tile_boxes)
                if i == parts[-1] and k == lookahead(depth, BOX):
                    self.cluster.release_item()
        yield from self.tile_ranks(item)

    def tile_ranks(self, item: Item) -> Turns:
        each, sizes = self.launch.each, self.launch.sizes
        gates = each.gated and not each.backward
        for i in range(2) if gates else self.launch.parts_of_tile(item):
            r = each.parts[i].r
            if r > 0 and not item.rides:
                yield from self.wait_for_own_low(item, i if gates or each.backward else 0)
            for _ in range(sizes.out_boxes if gates and r else boxes_of(r)):
                yield from self.step(sizes.rank_boxes if gates else sizes.tile_boxes)

    def gradient(self, item: Item) -> Turns:
        tokens = self.launch.tokens(item)
        for i in range(0, tokens, BOX):
            if item.waits != NONE and i % BLOCK_M == 0:
                yield from self.wait_for_low(item.waits + i // FLAG_ROWS)
            yield from self.step(self.launch.sizes.rank_boxes)
            if item.work == GRADIENT_B and self.launch.each.parts[item.part].reads_y:
                yield from self.step(0)
            if i == lookahead(tokens, BOX):
                self.cluster.release_item()

    # ---- dequantiser.cuh ----

    def dequantise(self) -> Turns:
        """A warp of the finisher. It never waits for boxes, nor boxes for it."""
        launch, ring = self.launch, self.launch.sizes.ring
        while True:
            yield lambda: True
            piece = launch.pieces
            launch.pieces += 1
            if piece >= ring.pieces:
                break
            column = piece // ring.of_tile
            if column >= ring.tiles:
                yield from launch.wait(*launch.read_flags(column - ring.tiles))
            launch.raise_(ring.ready + column * ring.ready_stride + piece % ring.of_tile)
        self.dequantised += 1

    # ---- finisher.cuh ----

    def finish_tiles(self) -> Turns:
        if not (self.launch.each.gated or self.launch.rows_start_anywhere):
            yield lambda: True
            return
        for number in itertools.count():
            yield lambda number=number: len(self.tiles) > number
            if self.tiles[number] is None:
                return
            for box in range(CONSUMERS * self.launch.sizes.out_boxes):
                w = box % CONSUMERS
                yield lambda w=w: self.given[w] > self.taken[w]
                self.taken[w] += 1
