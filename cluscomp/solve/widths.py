"""How many numbers have a bit less, so that a limit of bits is kept where all bits of a number are whole."""

from cluscomp.forms.rotated import SEED_BITS


def chosen(
    bits: float | None,
    width: int | None,
    shape: tuple[int, int],
    *,
    parts: int,
    length: int,
    scaled_outputs: bool,
    most: int,
) -> tuple[int, int]:
    """Bits of a number, and the parts that have one less: `width` and none, or the most `within` a limit of `bits`.

    For a rotated weight of this shape (O, I), beside whose numbers a seed stands and a scale of 16 bits, or one for
    each output. One of `bits` and `width` is given. Raises ValueError if nothing fits.
    """
    if bits is None:
        assert width is not None  # `check_choice` of the settings
        return width, 0
    beside = SEED_BITS + 16 * (shape[0] if scaled_outputs else 1)
    return within(bits, shape, parts=parts, length=length, beside=beside, most=most)


def within(bits: float, shape: tuple[int, int], *, parts: int, length: int, beside: int, most: int) -> tuple[int, int]:
    """Bits of a number, `most` at most, and how many parts have one less, for a weight of this shape (O, I).

    The weight is cut into `parts` of `length` numbers each, and `beside` bits are stored beside them. All together are
    at most `bits` a weight, and so many that no part could have one more. Raises ValueError if nothing fits.
    """
    outputs, inputs = shape
    steps = (int(bits * outputs * inputs) - beside) // length  # of one bit for all numbers of one part
    if steps < 1:
        raise ValueError(f"bits={bits} is out of reach for a {outputs} x {inputs} matrix: {beside} bits stand beside")
    width = min(-(-steps // parts), most)
    return width, max(width * parts - steps, 0)
