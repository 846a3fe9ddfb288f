"""What the machine code of a kernel that multiplies must be like, as cuobjdump lists it."""

import re

INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@\S+\s+)?(\w+)")


def instructions(listing: str) -> list[str]:
    """Their names in a kernel's machine code, without what follows a dot."""
    return [match[1] for match in map(INSTRUCTION.match, listing.splitlines()) if match]


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


def assert_good(kernel: str) -> None:
    names = instructions(kernel)
    assert {"HGMMA", "UTMALDG"} <= set(names)
    assert not {"LDL", "STL"} & set(names)
    # Where the compiler takes a loop of products for divergent, it makes their descriptors in vector registers, and
    # moves each before its product: 2 to 4% slower. From one product to the next, without a branch:
    between = between_products(names)
    assert between
    assert not any("R2UR" in some for some in between)
    # A step waits for the products of the one before, not for its own.
    assert "gsb0, 0x1" in kernel
