"""Dealing: items of several sizes into bins of equal counts whose sums are as nearly equal as whole items allow.

Best fit with the count held: items are sorted, as many neighbours as there are bins make a round, and each round gives
every bin one of its items, the largest to the bin that holds least. Where sizes have several parts (patches, text
tokens, work), a round looks at the part in which it can even out most. Rounds of unlike items come first, those of
nearly equal ones level what is left. A function of the sizes alone, in whole numbers: equal on any machine. Cost: about
20 µs a round. Longest processing time first: Graham, SIAM J. Appl. Math. 17 (1969).
"""

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def deal(sizes: Ints, bins: int) -> Ints:
    """`sizes` (items, parts), the first part at least 1, to the items of each bin: (bins, ⌈items / bins⌉). A bin that
    goes without an item in one round has -1 there.

    Sizes [5, 4, 2, 1] in 2 bins: the round [5, 4] gives 5 | 4, the round [2, 1] then 5 + 1 | 4 + 2.
    """
    count, rounds = len(sizes), -(-len(sizes) // bins)
    padded = np.zeros((rounds * bins, sizes.shape[1]), np.int64)
    padded[:count] = sizes
    order = np.lexsort(tuple(-part for part in padded.T[::-1]))
    groups = padded[order].reshape(rounds, bins, -1)
    spread = np.ptp(groups, axis=1)
    given = np.empty((rounds, bins), np.int64)
    loads = np.zeros(groups.shape[1:], np.int64)
    for number in np.argsort(-spread.max(1), kind="stable"):
        part = np.argmax(np.ptp(loads, axis=0) * spread[number])
        heavy = np.argsort(-groups[number, :, part], kind="stable")
        light = np.argsort(loads[:, part], kind="stable")
        given[number, light] = heavy
        loads[light] += groups[number, heavy]
    taken = np.take_along_axis(order.reshape(rounds, bins), given, axis=1)
    return np.where(taken < count, taken, -1).T
