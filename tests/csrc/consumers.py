"""A warpgroup that multiplies, as playing.py plays it: consumer.cuh, chain.cuh, and what outbox.cuh keeps for later."""

import itertools

from tests.csrc.items import GRADIENT_A, SHRINK, TILE, Item
from tests.csrc.passes import (
    BOX,
    CONSUMERS,
    FLAG_PARTS,
    FLAG_ROWS,
    NONE,
    Turns,
    boxes_of,
)


class Outbox:
    """Boxes and a flag that leave a part a step, while the next item is multiplied."""

    def __init__(self, launch, block, index):
        self.launch, self.block, self.index = launch, block, index
        self.flag = NONE
        self.next_part = self.boxes = self.parts = self.pause = 0
        self.whole_tile = self.to_finisher = False

    def keep(self, boxes, flag=NONE) -> Turns:
        yield from self.send_all()
        self.hold(boxes, flag)

    def keep_out(self) -> Turns:
        launch = self.launch
        yield from self.keep(launch.sizes.tile_boxes)
        self.whole_tile, self.to_finisher = True, launch.each.gated or launch.rows_start_anywhere
        if self.to_finisher:
            self.parts, self.pause = launch.sizes.out_boxes, self.index * launch.sizes.finish_spacing // 2

    def hold(self, boxes, flag=NONE) -> None:
        self.next_part, self.boxes, self.flag = 0, boxes, flag
        self.parts = boxes + (0 if flag == NONE else FLAG_PARTS)
        self.whole_tile = self.to_finisher = False

    def pending(self) -> bool:
        return self.next_part < self.parts

    def send_all(self) -> Turns:
        while self.pending():
            yield from self.send_part()

    def empty(self) -> Turns:
        yield from self.send_all()

    def send_boxes(self) -> Turns:
        while self.next_part < self.boxes:
            yield from self.send_part()

    def send_flag(self) -> Turns:
        if self.flag != NONE:
            yield from self.send_all()

    def send_part(self) -> Turns:
        if self.to_finisher:
            self.pause -= 1
            if self.pause >= 0:
                return
            yield from self.await_buffer()
            if self.next_part == 0:
                self.announce("a tile")
            self.block.given[self.index] += 1
            self.pause = self.launch.sizes.finish_spacing - 1
        elif self.next_part < self.boxes:
            yield from self.await_buffer()
        elif self.next_part + 1 == self.parts:
            self.launch.raise_(self.flag)
        self.next_part += 1

    def await_buffer(self) -> Turns:
        given, taken = self.block.given, self.block.taken
        yield lambda: given[self.index] == taken[self.index]

    def announce(self, tile) -> None:
        if self.index == 0:
            self.block.tiles.append(tile)

    def finish(self) -> Turns:
        """After the last item."""
        if self.next_part == 0 and self.parts > 0 and self.whole_tile:
            self.block.waiting_to_finish += 1
            yield lambda: self.block.waiting_to_finish == CONSUMERS
        else:
            yield from self.send_all()
        self.announce(None)


class Consumer:
    def __init__(self, launch, block, index):
        self.launch, self.block, self.index = launch, block, index
        self.outbox = Outbox(launch, block, index)
        self.step = self.released = 0

    def run(self) -> Turns:
        for number in itertools.count():
            item = yield from self.block.cluster.await_item(number)
            if item is None:
                break
            self.block.cluster.release_item()
            multiply = {SHRINK: self.shrink, TILE: self.tile}.get(item.work, self.gradient)
            yield from multiply(item)
        yield from self.outbox.finish()

    def await_stage(self) -> Turns:
        yield lambda: self.block.full(self.step)
        self.step += 1

    def issue(self, steps, sends=True) -> Turns:
        for _ in range(steps):
            yield from self.await_stage()
            self.released = self.step - 1
            if sends and self.outbox.pending():
                yield from self.outbox.send_part()

    def drain(self) -> None:
        self.released = self.step

    def own_flag(self, flag: int) -> int:
        return flag + CONSUMERS * self.block.rank + self.index

    def shrink(self, item: Item) -> Turns:
        each, sizes = self.launch.each, self.launch.sizes
        for row in item.shrunk_rows:
            masked = each.drops and not each.backward
            if masked:
                yield from self.outbox.empty()
            yield from self.issue(-(-each.parts[item.part].depth // (sizes.shrink_halves * BOX)), not masked)
            self.drain()
            yield from self.outbox.keep(sizes.rank_boxes, self.own_flag(item.raises + (row - item.row) // FLAG_ROWS))
            yield from self.outbox.send_boxes()

    def tile(self, item: Item) -> Turns:
        launch, each, sizes = self.launch, self.launch.each, self.launch.sizes
        parts = [each.parts[i] for i in launch.parts_of_tile(item)]
        steps, rank_steps = (sum(map(boxes_of, sizes)) for sizes in zip(*((p.depth, p.r) for p in parts), strict=True))
        masked = each.backward and each.drops
        drawn = min(steps, 2 * sizes.out_boxes) if masked else 0
        if self.sends_flag_first(steps, masked):
            yield from self.outbox.send_flag()
        yield from self.issue(steps - drawn)
        if masked:
            yield from self.outbox.empty()
            yield from self.issue(drawn, sends=False)
            self.drain()
            in_pairs = not each.gated and max(part.r for part in each.parts) <= 128
            yield from self.hold_steps(rank_steps, 2 if in_pairs else 1)
        elif each.gated and not each.backward:
            self.drain()
            yield from self.outbox.empty()
            yield from self.hold_steps(sizes.out_boxes * sum(part.r > 0 for part in each.parts))
        elif item.rides:
            yield from self.ride(item)
        else:
            yield from self.issue(rank_steps)
        self.drain()
        if sizes.ring.pieces and self.index == 0:
            launch.raise_(item.raises + self.block.rank)
        yield from self.outbox.keep_out()

    def sends_flag_first(self, steps, masked) -> bool:
        return self.waits_for_weight() or self.has_few_steps(steps, masked)

    def waits_for_weight(self) -> bool:
        return self.launch.sizes.ring.pieces > 0

    def has_few_steps(self, steps, masked) -> bool:
        return not masked and steps <= self.launch.sizes.tile_boxes + FLAG_PARTS

    def hold_steps(self, steps, at_once=1) -> Turns:
        """Whole stages of several steps are held until all of them are multiplied: of ranks, of dy and y."""
        while steps > 0:
            for _ in range(min(steps, at_once)):
                yield from self.await_stage()
            self.drain()
            steps -= at_once

    def ride(self, item: Item) -> Turns:
        self.drain()
        yield from self.await_stage()
        if item.raises != NONE:
            self.launch.raise_(self.own_flag(item.raises))

    def gradient(self, item: Item) -> Turns:
        launch, outbox = self.launch, self.outbox
        yield from outbox.send_flag()
        products = item.work != GRADIENT_A and launch.each.parts[item.part].reads_y
        sums = products or (item.work != GRADIENT_A and launch.sums[item.part])
        beside = sums or (item.work == GRADIENT_A and launch.each.drops)
        if beside:
            yield from outbox.empty()
        steps = boxes_of(launch.tokens(item))
        yield from self.hold_steps(2 * steps, 2) if products else self.issue(steps, not beside)
        self.drain()
        yield from outbox.send_all()
        flag = self.own_flag(item.raises)
        if not item.is_first:
            yield from launch.wait(flag - launch.sizes.chain_flags)
        if not item.is_last:
            outbox.hold(0, flag)
        elif launch.copied and (item.work == GRADIENT_A or launch.each.parts[item.part].r > 0):
            outbox.hold(launch.sizes.gradient_blocks * launch.sizes.rank_boxes)
