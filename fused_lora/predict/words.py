"""What explain() says of predicted times, and how far they can be trusted."""

from ..cards import CARDS
from . import CSRC_FROM, Prediction, predict
from .csrc import MOST_RANK
from .products import total

# By `python -m bench.predictions`; a pass is forward or backward.
_CHECKED = {
    "H200": "checked on an H200, on shapes that were not fitted: csrc's passes within 8%, Triton's within 10%",
    "H100": "of an H200's model with this card's datasheet, checked on an H100: passes within 19%",
}
_EXTRAPOLATED = (
    "extrapolated from this card's datasheet, public measurements of cuBLAS, and an H200 that plays an A100; nobody "
    "has checked them on this card"
)
NOT_PREDICTED = "predicted times: only of 16-bit products without dropout"


def trust(name: str) -> str:
    """How far predictions for a card can be trusted."""
    return _CHECKED.get(name, _EXTRAPOLATED)


def lines(shape: tuple[int, int, int, int], name: str, shown: Prediction) -> list[str]:
    """Of the launches that are shown, of csrc's where the card has them, and of torch's own products."""
    card = CARDS[name]
    told = [f"predicted: {_ratios(shown)}"]
    if card.capability >= CSRC_FROM and shape[-1] <= MOST_RANK:
        told.append(f"predicted with the CUDA extension: {_ratios(predict(*shape, card, 'csrc'))}")
    told.append(f"predicted with torch's products (addmm): {_ratios(predict(*shape, card, 'addmm'))}")
    return [*told, f"predictions are {trust(name)}"]


def _ratios(of: Prediction) -> str:
    forward, both = total(of.forward), total(of.forward) + total(of.backward)
    return (
        f"forward {forward:.0f} us, {of.forward_ratio:.2f} of the frozen linear's {of.frozen[0].us:.0f}; "
        f"forward + backward {both:.0f} us, {of.ratio:.2f} of its {total(of.frozen):.0f}"
    )
