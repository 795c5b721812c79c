"""Items of unequal length, a batch at a time."""


def batches_by_length(lengths: dict[int, int], size: int) -> list[list[int]]:
    """Indices in batches of at most `size`, from short to long, so that little is padded.

    >>> batches_by_length({0: 5, 1: 3, 3: 5, 4: 9}, 2)
    [[1, 0], [3, 4]]
    """
    order = sorted(lengths, key=lengths.__getitem__)
    return [order[first : first + size] for first in range(0, len(order), size)]
