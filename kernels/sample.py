"""Tokens from logits, without a sort: the highest of each tile, then one program a row (Triton).

Weights are exp((logit - highest) / temperature) in float64, as the reference computes them: its probabilities times one
number. Every filter keeps a set of highest weights, so each is a threshold, and a threshold is found by halving the
range of the ordered bits of a float32 logit. What certainly lies below the threshold is left out first.
"""

import triton
import triton.language as tl

from pyruntime.kernels._common import let_next_start, wait_for_inputs

NAN_FOUND = tl.constexpr(-1)
INFINITY_FOUND = tl.constexpr(-2)
NOTHING_FINITE = tl.constexpr(-3)

# relative, far above the error of sums of float32 weights
_MARGIN = tl.constexpr(1e-4)
_LOWEST_ORDERED = tl.constexpr(-2139095041)  # _ordered(-inf)


@triton.jit
def sample_tiles_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32 or float64
    highest_ptr,  # [rows, tiles] float32, NaN where the tile holds one
    first_ptr,  # [rows, tiles] int32, first id of the highest logit
    sum_ptr,  # [rows, tiles] float64, sum of exp((logit - highest of the tile) / temperature); unwritten if greedy
    vocab,
    num_tiles,
    logits_stride,
    TILE: tl.constexpr,
    PDL: tl.constexpr,
):
    """What a row must know of each tile of its logits. Grid: rows, tiles."""
    row = tl.program_id(0).to(tl.int64)
    tile = tl.program_id(1)
    ids = tile * TILE + tl.arange(0, TILE)
    wait_for_inputs(PDL)
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    values = tl.load(logits_ptr + row * logits_stride + ids, mask=ids < vocab, other=float("-inf"))
    let_next_start(PDL)
    is_nan = values != values
    values = tl.where(is_nan, float("-inf"), values)
    highest = tl.max(values, axis=0)
    at = row * num_tiles + tile
    tl.store(highest_ptr + at, tl.where(tl.max(is_nan.to(tl.int32), axis=0) > 0, float("nan"), highest))
    tl.store(first_ptr + at, tl.min(tl.where((values == highest) & (ids < vocab), ids, vocab), axis=0))
    if temperature > 0:
        # without a finite logit the differences are NaN
        finite = (highest > float("-inf")) & (highest < float("inf"))
        weights = tl.exp(_scaled(values, tl.where(finite, highest, 0.0), _rate(temperature)))
        tl.store(sum_ptr + at, tl.where(finite, tl.sum(weights, axis=0), 0.0))


@triton.jit
def sample_rows_kernel(
    logits_ptr,  # [rows, vocab] float32
    temperature_ptr,  # [rows] float32 or float64, 0 is greedy
    top_k_ptr,  # [rows] int32, 0 or less is off
    top_p_ptr,  # [rows] float32 or float64
    min_p_ptr,  # [rows] float32 or float64
    seed_ptr,  # [rows] int64
    step_ptr,  # [rows] int32
    highest_ptr,  # [rows, tiles] float32, as sample_tiles_kernel leaves it
    first_ptr,  # [rows, tiles] int32
    sum_ptr,  # [rows, tiles] float64
    values_ptr,  # [rows, ROOM] float32, scratch
    ids_ptr,  # [rows, ROOM] int32, scratch
    weights_ptr,  # [rows, ROOM] float64, scratch
    out_ptr,  # [rows] int32, a token or one of the codes above
    token_ids_ptr,  # [rows] int32, left alone where there is no token; these three unread without FEEDBACK
    positions_ptr,  # [rows] int32
    contexts_ptr,  # [rows] int32
    vocab,
    num_tiles,
    logits_stride,
    TILE: tl.constexpr,
    TILES: tl.constexpr,  # a power of two, at least num_tiles
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
    FEEDBACK: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token a row; with FEEDBACK the inputs of the next decode step follow it. Grid: rows."""
    row = tl.program_id(0).to(tl.int64)
    tiles = tl.arange(0, TILES)
    wait_for_inputs(PDL)
    let_next_start(PDL)
    temperature = tl.load(temperature_ptr + row).to(tl.float64)
    # read by every thread before the barriers of the reductions below, as one of them stores the next step
    step = tl.load(step_ptr + row)
    highest_ptr += row * num_tiles
    highs = tl.load(highest_ptr + tiles, mask=tiles < num_tiles, other=float("-inf"))
    has_nan = tl.max((highs != highs).to(tl.int32), axis=0) > 0
    best = tl.max(tl.where(highs != highs, float("-inf"), highs), axis=0)
    firsts = tl.load(first_ptr + row * num_tiles + tiles, mask=tiles < num_tiles, other=vocab)
    token = tl.min(tl.where(highs == best, firsts, vocab), axis=0)
    token = tl.where(best == float("-inf"), NOTHING_FINITE, token)
    token = tl.where(best == float("inf"), INFINITY_FOUND, token)
    token = tl.where(has_nan, NAN_FOUND, token)
    if (temperature > 0) & (token >= 0):
        token = _draw(
            logits_ptr + row * logits_stride,
            highest_ptr,
            sum_ptr + row * num_tiles,
            values_ptr + row * ROOM,
            ids_ptr + row * ROOM,
            weights_ptr + row * ROOM,
            best,
            temperature,
            tl.load(top_k_ptr + row),
            tl.load(top_p_ptr + row).to(tl.float64),
            tl.load(min_p_ptr + row).to(tl.float64),
            _uniform(tl.load(seed_ptr + row), step),
            vocab,
            num_tiles,
            TILE,
            TILES,
            BLOCK,
            ROOM,
        )
    tl.store(out_ptr + row, token)
    tl.store(step_ptr + row, step + 1)
    if FEEDBACK:
        tl.store(token_ids_ptr + row, tl.minimum(token, vocab - 1), mask=token >= 0)
        tl.store(positions_ptr + row, tl.load(positions_ptr + row) + 1)
        tl.store(contexts_ptr + row, tl.load(contexts_ptr + row) + 1)


@triton.jit
def _draw(
    row_ptr,
    highest_ptr,
    sum_ptr,
    values_ptr,
    ids_ptr,
    weights_ptr,
    best,
    temperature,
    top_k,
    top_p,
    min_p,
    uniform,
    vocab,
    num_tiles,
    TILE: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    ROOM: tl.constexpr,
):
    rate = _rate(temperature)
    tiles = tl.arange(0, TILES)
    highs = tl.load(highest_ptr + tiles, mask=tiles < num_tiles, other=float("-inf"))
    sums = tl.load(sum_ptr + tiles, mask=tiles < num_tiles, other=0.0)
    sums *= tl.exp(_scaled(highs, best, rate))
    total = tl.sum(sums, axis=0)
    nothing = tl.full([], 0.0, tl.float64)
    if (top_p < 1) | (min_p > 0) | ((top_k > 0) & (top_k < vocab)):
        token = _draw_filtered(
            row_ptr, highest_ptr, values_ptr, ids_ptr, weights_ptr, best, rate, total, top_k, top_p, min_p, uniform,
            vocab, num_tiles, TILES, BLOCK, ROOM,
        )  # fmt: skip
    else:
        # the tile that the random number falls into, then the id within
        target = uniform * total
        hit = (tl.cumsum(sums, axis=0) > target) & (sums > 0)
        last = tl.max(tl.where(sums > 0, tiles, 0), axis=0)
        tile = tl.minimum(tl.min(tl.where(hit, tiles, TILES), axis=0), last)
        target -= tl.sum(tl.where(tiles < tile, sums, 0.0), axis=0)
        end = tl.minimum((tile + 1) * TILE, vocab)
        lowest = tl.full([], float("-inf"), tl.float64)
        token = _find(
            row_ptr, ids_ptr, False, tile * TILE, end, best, rate, lowest, nothing, nothing, nothing, target, TILE
        )  # fmt: skip
    return token


@triton.jit
def _draw_filtered(
    row_ptr, highest_ptr, values_ptr, ids_ptr, weights_ptr, best, rate, total, top_k, top_p, min_p, uniform,
    vocab, num_tiles, TILES: tl.constexpr, BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    limited = (top_k > 0) & (top_k < vocab)
    floor = _floor(highest_ptr, num_tiles, best, rate, total, top_k, top_p, min_p, limited, vocab, TILES)
    low = _ordered(floor).to(tl.int64)
    high = _ordered(best).to(tl.int64)
    count = tl.full([], 0, tl.int32) + vocab
    # candidates are copied out; if they are too many the row itself is searched
    gathered = floor > float("-inf")
    if gathered:
        count = _gather(row_ptr, values_ptr, ids_ptr, floor, best, vocab, BLOCK, ROOM)
        gathered = count <= ROOM
    lowest = tl.full([], float("-inf"), tl.float64)
    if limited & (count > top_k):
        if gathered:
            kth = _kth_highest(values_ptr, count, top_k, low, high + 1, BLOCK)
        else:
            kth = _kth_highest(row_ptr, vocab, top_k, low, high + 1, BLOCK)
            count = _gather(row_ptr, values_ptr, ids_ptr, kth, best, vocab, BLOCK, ROOM)
            gathered = count <= ROOM
        lowest = _scaled(kth, best, rate)
        low = _ordered(kth).to(tl.int64)
    source_ptr = row_ptr
    size = tl.full([], 0, tl.int32) + vocab
    if gathered:
        source_ptr = values_ptr
        size = count
    least = tl.full([], 0.0, tl.float64)
    if limited | (min_p > 0):
        total, _ = _above(source_ptr, size, best, rate, lowest, min_p, least, BLOCK)
    if top_p < 1:
        border = _border(
            row_ptr, values_ptr, ids_ptr, weights_ptr, gathered, count, best, rate, top_p * total, low - 1, high,
            vocab, BLOCK, ROOM,
        )  # fmt: skip
        least = tl.exp(_scaled(border, best, rate))
    above, num_equal = _above(source_ptr, size, best, rate, lowest, min_p, least, BLOCK)
    num_kept = num_equal.to(tl.float64)
    if top_p < 1:
        # of equals, those are kept in front of which less than top_p lies
        fitting = tl.ceil((top_p * total - above) / tl.where(least > 0, least, 1.0))
        num_kept = tl.maximum(tl.minimum(fitting, num_kept), 1.0)
    target = uniform * (above + num_kept * least)
    return _find(
        source_ptr, ids_ptr, gathered, 0, size, best, rate, lowest, min_p, least, num_kept, target, BLOCK
    )  # fmt: skip


@triton.jit
def _floor(highest_ptr, num_tiles, best, rate, total, top_k, top_p, min_p, limited, vocab, TILES: tl.constexpr):
    """A logit below which nothing is kept, -inf where none is known."""
    floor = tl.full([], float("-inf"), tl.float32)
    if limited & (top_k <= num_tiles):
        # as many tiles hold a logit as high
        low, high = tl.full([], _LOWEST_ORDERED, tl.int64), _ordered(best).to(tl.int64) + 1
        floor = _kth_highest(highest_ptr, num_tiles, top_k, low, high, TILES)
    # all that is lighter than an equal share of what top_p leaves out is left out; other filters change the whole
    weight = min_p
    if (top_p < 1) & (min_p <= 0) & (limited == 0):
        weight = (1.0 - top_p) * total / vocab
    if weight > 0:
        reach = tl.log(weight) / rate
        bound = (best.to(tl.float64) + reach).to(tl.float32)
        # rounding must not drop the border
        bound -= (tl.abs(reach).to(tl.float32) + tl.abs(bound) + tl.abs(best)) * 1e-6
        floor = tl.maximum(floor, bound)
    return floor


@triton.jit
def _gather(row_ptr, values_ptr, ids_ptr, floor, ceiling, vocab, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """Copies logits from `floor` to `ceiling` and their ids, in the order of the ids; how many there are, in all."""
    # reads of what was there before end first
    tl.debug_barrier()
    count = tl.full([], 0, tl.int32)
    for begin in range(0, vocab, BLOCK):
        ids = begin + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + ids, mask=ids < vocab, other=float("-inf"))
        taken = ((values >= floor) & (values <= ceiling) & (ids < vocab)).to(tl.int32)
        at = count + tl.cumsum(taken, axis=0) - 1
        fits = (taken > 0) & (at < ROOM)
        tl.store(values_ptr + at, values, mask=fits)
        tl.store(ids_ptr + at, ids, mask=fits)
        count += tl.sum(taken, axis=0)
    # other threads of this program read what was stored
    tl.debug_barrier()
    return count


@triton.jit
def _kth_highest(values_ptr, count, k, low, high, BLOCK: tl.constexpr):
    """The highest logit that at least `k` of `count` values reach; `low` does in ordered bits, `high` does not."""
    while high - low > 1:
        middle = low + (high - low) // 2
        threshold = _unordered(middle)
        reached = tl.zeros([BLOCK], tl.int32)
        for begin in range(0, count, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            values = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
            reached += (values >= threshold).to(tl.int32)
        enough = tl.sum(reached, axis=0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _unordered(low)


@triton.jit
def _border(
    row_ptr, values_ptr, ids_ptr, weights_ptr, gathered, count, best, rate, mass, low, high, vocab,
    BLOCK: tl.constexpr, ROOM: tl.constexpr,
):  # fmt: skip
    """The lowest logit above which less than `mass` lies; in ordered bits above `low`, at most `high`.

    The `count` candidates lie at values_ptr if they are `gathered`; else the logits around the border come there.
    """
    beyond = tl.full([], 0.0, tl.float64)
    few = gathered
    if gathered == 0:
        low, high, count = _narrow(row_ptr, vocab, count, best, rate, mass, low, high, BLOCK, ROOM)
        few = count <= ROOM
        if few:
            ceiling = _unordered(high)
            count = _gather(row_ptr, values_ptr, ids_ptr, _unordered(low + 1), ceiling, vocab, BLOCK, ROOM)
            few = count <= ROOM
            beyond = _beyond(row_ptr, vocab, ceiling, best, rate, BLOCK)
    if few:
        _weigh(values_ptr, weights_ptr, count, best, rate, BLOCK)
    while high - low > 1:
        middle = low + (high - low) // 2
        threshold = _unordered(middle)
        if few:
            weight = tl.exp(_scaled(threshold, best, rate))
            above = beyond + _heavier(weights_ptr, count, weight, BLOCK)
        else:
            above = _beyond(row_ptr, vocab, threshold, best, rate, BLOCK)
        enough = above >= mass
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return _unordered(high)


@triton.jit
def _narrow(row_ptr, vocab, count, best, rate, mass, low, high, BLOCK: tl.constexpr, ROOM: tl.constexpr):
    """A range around the border with at most ROOM logits, or as few as float32 sums can tell; and how many."""
    most = (mass * (1.0 - _MARGIN)).to(tl.float32)
    least = (mass * (1.0 + _MARGIN)).to(tl.float32)
    narrow_rate = tl.minimum(rate, 1e30).to(tl.float32)
    # logits above either end
    above_low, above_high = count, tl.full([], 0, tl.int32)
    width = high - low + 1
    while (above_low - above_high > ROOM) & (high - low < width) & (high - low > 3):
        width = high - low
        # three at a time, so that a pass tells more than it costs
        first, second, third = low + width // 4, low + width // 2, low + width // 4 * 3
        one, two, three = _unordered(first), _unordered(second), _unordered(third)
        none, nobody = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.int32)
        sum_one, sum_two, sum_three = none, none, none
        num_one, num_two, num_three = nobody, nobody, nobody
        for begin in range(0, vocab, BLOCK):
            at = begin + tl.arange(0, BLOCK)
            values = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf"))
            weights = tl.exp((values - best) * narrow_rate)
            sum_one += tl.where(values > one, weights, 0.0)
            sum_two += tl.where(values > two, weights, 0.0)
            sum_three += tl.where(values > three, weights, 0.0)
            num_one += (values > one).to(tl.int32)
            num_two += (values > two).to(tl.int32)
            num_three += (values > three).to(tl.int32)
        ends = (low, high, above_low, above_high)
        ends = _tightened(ends, first, sum_one, num_one, most, least)
        ends = _tightened(ends, second, sum_two, num_two, most, least)
        low, high, above_low, above_high = _tightened(ends, third, sum_three, num_three, most, least)
    return low, high, above_low - above_high


@triton.jit
def _tightened(ends, threshold, sums, nums, most, least):
    low, high, above_low, above_high = ends
    total, count = tl.sum(sums, axis=0), tl.sum(nums, axis=0)
    raises = (total >= least) & (threshold > low)
    lowers = (total < most) & (threshold < high)
    low, above_low = tl.where(raises, threshold, low), tl.where(raises, count, above_low)
    high, above_high = tl.where(lowers, threshold, high), tl.where(lowers, count, above_high)
    return low, high, above_low, above_high


@triton.jit
def _beyond(row_ptr, vocab, threshold, best, rate, BLOCK: tl.constexpr):
    """The weight of all logits above `threshold`."""
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, vocab, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(row_ptr + at, mask=at < vocab, other=float("-inf"))
        sums += tl.where(values > threshold, tl.exp(_scaled(values, best, rate)), 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _weigh(values_ptr, weights_ptr, count, best, rate, BLOCK: tl.constexpr):
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(values_ptr + at, mask=at < count, other=float("-inf"))
        tl.store(weights_ptr + at, tl.exp(_scaled(values, best, rate)), mask=at < count)
    tl.debug_barrier()


@triton.jit
def _heavier(weights_ptr, count, least, BLOCK: tl.constexpr):
    """The sum of the weights above `least`."""
    sums = tl.zeros([BLOCK], tl.float64)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        weights = tl.load(weights_ptr + at, mask=at < count, other=0.0)
        sums += tl.where(weights > least, weights, 0.0)
    return tl.sum(sums, axis=0)


@triton.jit
def _above(source_ptr, count, best, rate, lowest, min_p, least, BLOCK: tl.constexpr):
    """The sum of the kept weights above `least`, and how many equal it."""
    sums = tl.zeros([BLOCK], tl.float64)
    equals = tl.zeros([BLOCK], tl.int32)
    for begin in range(0, count, BLOCK):
        at = begin + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + at, mask=at < count, other=float("-inf"))
        weights = _weights(values, best, rate, lowest, min_p)
        sums += tl.where(weights > least, weights, 0.0)
        equals += ((weights == least) & (weights > 0)).to(tl.int32)
    return tl.sum(sums, axis=0), tl.sum(equals, axis=0)


@triton.jit
def _find(
    source_ptr, ids_ptr, gathered, begin, end, best, rate, lowest, min_p, least, num_equal, target, BLOCK: tl.constexpr
):  # fmt: skip
    """The first id with which the sum of the kept weights exceeds `target`; the last kept one where rounding hides it.

    Kept are weights above `least` and the first `num_equal` that equal it.
    """
    sum_before = tl.full([], 0.0, tl.float64)
    equal_before = tl.full([], 0, tl.int32)
    nowhere = tl.full([], 2147483647, tl.int32)
    token, last = nowhere, tl.full([], 0, tl.int32)
    for start in range(begin, end, BLOCK):
        at = start + tl.arange(0, BLOCK)
        values = tl.load(source_ptr + at, mask=at < end, other=float("-inf"))
        ids = at
        if gathered:
            ids = tl.load(ids_ptr + at, mask=at < end, other=0)
        weights = _weights(values, best, rate, lowest, min_p)
        equal = (weights == least) & (weights > 0)
        rank = equal_before + tl.cumsum(equal.to(tl.int32), axis=0)
        kept = (weights > least) | (equal & (rank.to(tl.float64) <= num_equal))
        weights = tl.where(kept, weights, 0.0)
        ends = sum_before + tl.cumsum(weights, axis=0)
        token = tl.minimum(token, tl.min(tl.where(kept & (ends > target), ids, nowhere), axis=0))
        last = tl.maximum(last, tl.max(tl.where(kept, ids, 0), axis=0))
        sum_before += tl.sum(weights, axis=0)
        equal_before += tl.sum(equal.to(tl.int32), axis=0)
    return tl.where(token == nowhere, last, token)


@triton.jit
def _weights(values, best, rate, lowest, min_p):
    scaled = _scaled(values, best, rate)
    weights = tl.exp(scaled)
    # equals of the k-th are judged on scaled logits: two of them can round to one weight
    return tl.where((scaled >= lowest) & (weights >= min_p), weights, 0.0)


@triton.jit
def _scaled(values, best, rate):
    # subtracting the highest first keeps a tiny temperature from overflowing
    return (values.to(tl.float64) - best.to(tl.float64)) * rate


@triton.jit
def _rate(temperature):
    # finite, so that the highest logit stays 0
    return 1.0 / tl.maximum(temperature, 1e-300)


@triton.jit
def _ordered(value):
    """float32 as int32 in the same order."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _unordered(ordered):
    bits = ordered.to(tl.int32)
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.float32, bitcast=True)


@triton.jit
def _uniform(seed, step):
    """The upper 53 bits of two rounds of the splitmix64 finaliser, as a number in [0, 1)."""
    bits = _finalised(seed.to(tl.uint64)) + (step.to(tl.int64) + 1).to(tl.uint64) * 0x9E3779B97F4A7C15
    return (_finalised(bits) >> 11).to(tl.int64).to(tl.float64) * 1.1102230246251565e-16  # 2 ** -53


@triton.jit
def _finalised(bits):
    bits = (bits ^ (bits >> 30)) * 0xBF58476D1CE4E5B9
    bits = (bits ^ (bits >> 27)) * 0x94D049BB133111EB
    return bits ^ (bits >> 31)
