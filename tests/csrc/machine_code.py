"""What the machine code of a kernel that multiplies must be like, as cuobjdump lists it."""

import re

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\w+)")


def instructions(listing: str) -> list[str]:
    """Their names in a kernel's machine code, without what follows a dot."""
    return [match[1] for match in map(INSTRUCTION.match, listing.splitlines()) if match]


LINE = re.compile(r"\s+/\*([0-9a-f]{4,})\*/\s+(.*)")
JUMP = re.compile(r"(?:@\S+\s+)?BRA\s+(?:\S+\s+)?0x([0-9a-f]+)")


def loops(listing: str, product: str) -> list[list[str]]:
    """Of each innermost loop with such products, the names of its instructions."""
    lines = [(int(match[1], 16), match[2]) for match in map(LINE.match, listing.splitlines()) if match]
    jumps = [(at, int(found[1], 16)) for at, text in lines if (found := JUMP.match(text))]
    back = [(to, at) for at, to in jumps if to <= at]
    inner = [
        one for one in back if not any(one != other and one[0] <= other[0] <= other[1] <= one[1] for other in back)
    ]
    names = dict(zip((at for at, _ in lines), instructions(listing), strict=True))
    bodies = [[name for at, name in names.items() if first <= at <= last] for first, last in inner]
    return [body for body in bodies if product in body]


def between_products(names: list[str]) -> list[list[str]]:
    """The instructions from one product to the next, where no branch is among them."""
    found, since = [], None
    for name in names:
        if name == "HGMMA":
            found += [] if since is None else [since]
            since = []
        elif name == "BRA":
            since = None
        elif since is not None:
            since.append(name)
    return found


def assert_good(kernel: str, spills: bool = False) -> None:
    names = instructions(kernel)
    assert {"HGMMA", "UTMALDG"} <= set(names)
    assert spills or not {"LDL", "STL"} & set(names)
    # Where the compiler takes a loop of products for divergent, it makes their descriptors in vector registers, and
    # moves each before its product: 2 to 4% slower. From one product to the next, without a branch:
    between = between_products(names)
    assert between
    assert not any("R2UR" in some for some in between)
    # A step waits for the products of the one before, not for its own.
    assert "gsb0, 0x1" in kernel
