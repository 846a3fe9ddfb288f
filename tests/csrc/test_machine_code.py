"""Small listings, good and bad."""

import pytest

from tests.csrc.machine_code import assert_good, between_products, instructions, loops

PRODUCT, WAIT = "HGMMA.64x256x16.F32.BF16 R24, gdesc[UR8], R24", "WARPGROUP.DEPBAR.LE gsb0, 0x1"
COPY, ADD, BRANCH = "UTMALDG.2D [UR8], [UR4]", "UIADD3 UR8, UR8, 0x2, URZ", "@!P0 BRA 0x30"
GOOD = [COPY, PRODUCT, ADD, PRODUCT, WAIT, BRANCH, "R2UR UR4, R3", PRODUCT]
BAD = {
    "waits for its own": [text.replace("gsb0, 0x1", "gsb0, 0x0") for text in GOOD],
    "no copies": [text for text in GOOD if text != COPY],
    "no products": [text for text in GOOD if text != PRODUCT],
    "loads what was spilled": [*GOOD, "@P1 LDL.64 R2, [R1]"],
    "spills": [*GOOD, "STL [R1+0x8], R2"],
    "moves a descriptor": [*GOOD, "@P2 R2UR UR8, R3", PRODUCT],
    "a branch between all": [COPY, PRODUCT, BRANCH, PRODUCT, WAIT],
}


def listing(names):
    code = "/* 0x000fe20000000800 */"
    lines = [f"        /*{16 * i:04x}*/   {name} ;   {code}\n   {code}" for i, name in enumerate(names)]
    return "\n".join(["kernel", '\t.headerflags\t@"EF_CUDA_SM90"', *lines])


def test_good_code():
    assert_good(listing(GOOD))
    assert between_products(instructions(listing(GOOD))) == [["UIADD3"]]


@pytest.mark.parametrize("wrong", BAD)
def test_bad_code_is_found(wrong):
    with pytest.raises(AssertionError):
        assert_good(listing(BAD[wrong]))


def test_loops_of_products_are_the_innermost():
    names = [
        "MOV R1, R2",
        "HMMA.16816 R4, R8",
        "LDL R5, [R1]",
        "@P0 BRA 0x10",
        "STL [R1], R5",
        "@P1 BRA P2, 0x0",
        "EXIT",
    ]
    assert loops(listing(names), "HMMA") == [["HMMA", "LDL", "BRA"]]
    assert loops(listing(["MOV R1, R2", "BRA 0x0"]), "HMMA") == []
