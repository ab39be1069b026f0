"""Two Triton kernels: the sums and the gradient of arithmetic.py, each in one pass, in fp32.

The forward reads every logit once; the backward reads it once and writes it once. What a plan consists of
comes as compile-time tuples over which `static_range` is unrolled, so one source serves every loss. Shifts
are in bits, since the hardware's exponential is base 2: `scale` is log2(e) over the temperature.

triton_rows.py says which plans they cover and launches them; only it imports this file, where Triton is.
"""

# What stands in a kernel is read by Triton's compiler; as Python it has other types.
# pyright: reportGeneralTypeIssues=false, reportArgumentType=false
# pyright: reportAssignmentType=false, reportOperatorIssue=false

from __future__ import annotations

import triton
import triton.language as tl

COUNT = tl.constexpr(-1)
"""In place of a source's number: weight 1 for every column."""

# exp(shift) is 0 far above it, and products with it are finite: 0 times it is 0.
LOWEST_SHIFT = tl.constexpr(-8e28)

MOST_UNROLLED = tl.constexpr(4)
"""Picked ids a token; more are looked at in a loop."""


@triton.jit(do_not_specialize=["num_tokens"])
def column_sums(
    out,
    scales,
    logits,
    strides,
    num_tokens,
    num_columns,
    ORIGINS: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    """Maxima, partition sums and moments of one token over all columns.

    A lane sees WIDTH neighbouring columns, one load, in each of ROUNDS pieces of a block, and has sums of its
    own, relative to maxima of its own; lanes meet at the end of the row. So no thread waits for another one
    in the loop, and following the maximum costs one exponential for ROUNDS * WIDTH columns.

    Args:
        out: [2 * sources + moments, T] fp32: maxima, partition sums, and moments in bits.
        scales: [sources, T] fp32.
        logits, strides: of each origin: [T, >= num_columns] floating point, elements from row to row.
        ORIGINS: of each source: the number of its origin.
        MOMENTS: of each: numbers of two sources, for sum_v exp(shift_v of the first) * shift_v of the second.
    """
    token = tl.program_id(0).to(tl.int64)
    num_sources: tl.constexpr = len(ORIGINS)
    rows, maximum, mass, moment, scale = (), (), (), (), ()
    for o in tl.static_range(len(logits)):
        rows += (logits[o] + token * strides[o],)
        maximum += (tl.full([LANES], float("-inf"), tl.float32),)
    for i in tl.static_range(num_sources):
        mass += (tl.zeros([LANES], tl.float32),)
        scale += (tl.load(scales + i * num_tokens + token),)
    for _ in tl.static_range(len(MOMENTS)):
        moment += (tl.zeros([LANES], tl.float32),)
    count = tl.zeros([LANES], tl.float32)

    block: tl.constexpr = ROUNDS * LANES * WIDTH
    num_whole = num_columns // block * block
    for start in tl.range(0, num_whole, block):
        maximum, mass, moment, count = _with_block(
            maximum, mass, moment, count, rows, scale, start, num_columns,
            ORIGINS, MOMENTS, ROUNDS, LANES, WIDTH, True,
        )  # fmt: skip
    maximum, mass, moment, count = _with_block(
        maximum, mass, moment, count, rows, scale, num_whole, num_columns,
        ORIGINS, MOMENTS, ROUNDS, LANES, WIDTH, False,
    )  # fmt: skip

    largest = ()
    for o in tl.static_range(len(rows)):
        largest += (tl.max(maximum[o], axis=0),)
    mass, moment = _moved(mass, moment, count, maximum, largest, scale, ORIGINS, MOMENTS)
    for i in tl.static_range(num_sources):
        tl.store(out + i * num_tokens + token, largest[ORIGINS[i]])
        tl.store(out + (num_sources + i) * num_tokens + token, tl.sum(mass[i], axis=0))
    for k in tl.static_range(len(MOMENTS)):
        tl.store(out + (2 * num_sources + k) * num_tokens + token, tl.sum(moment[k], axis=0))


@triton.jit
def _with_block(
    maximum,
    mass,
    moment,
    count,
    rows,
    scale,
    start,
    num_columns,
    ORIGINS: tl.constexpr,
    MOMENTS: tl.constexpr,
    ROUNDS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """Every lane's maxima and sums after one more block; columns from `num_columns` on are not read."""
    piece = start + tl.arange(0, ROUNDS)[:, None, None] * (LANES * WIDTH)
    column = piece + tl.arange(0, LANES)[None, :, None] * WIDTH + tl.arange(0, WIDTH)[None, None, :]
    is_real = column < num_columns
    logit, new_maximum = (), ()
    for o in tl.static_range(len(rows)):
        if IS_WHOLE:
            z = tl.load(rows[o] + column).to(tl.float32)
        else:
            z = tl.load(rows[o] + column, mask=is_real, other=float("-inf")).to(tl.float32)
        logit += (z,)
        new_maximum += (tl.maximum(maximum[o], tl.max(tl.max(z, axis=0), axis=1)),)
    mass, moment = _moved(mass, moment, count, maximum, new_maximum, scale, ORIGINS, MOMENTS)

    shift, weight, new_mass, new_moment = (), (), (), ()
    for i in tl.static_range(len(ORIGINS)):
        difference = logit[ORIGINS[i]] - _finite(new_maximum[ORIGINS[i]])[None, :, None]
        shift += (difference * scale[i],)
        weight += (tl.exp2(shift[i]),)
        new_mass += (mass[i] + _lane_sum(weight[i]),)
    for k in tl.static_range(len(MOMENTS)):
        if MOMENTS[k][0] != COUNT:
            term = _product(weight[MOMENTS[k][0]], shift[MOMENTS[k][1]])
        elif IS_WHOLE:
            term = shift[MOMENTS[k][1]]
        else:
            term = tl.where(is_real, shift[MOMENTS[k][1]], 0.0)
        new_moment += (moment[k] + _lane_sum(term),)
    count = count + (ROUNDS * WIDTH if IS_WHOLE else _lane_sum(is_real.to(tl.float32)))
    return new_maximum, new_mass, new_moment, count


@triton.jit
def _moved(mass, moment, count, old, new, scale, ORIGINS: tl.constexpr, MOMENTS: tl.constexpr):
    """Sums relative to the `old` maxima, made relative to the `new` ones."""
    offset, factor, new_mass, new_moment = (), (), (), ()
    for i in tl.static_range(len(ORIGINS)):
        before, after = old[ORIGINS[i]], new[ORIGINS[i]]
        offset += ((_finite(before) - _finite(after)) * scale[i],)
        factor += (tl.where(before == float("-inf"), 0.0, tl.exp2(offset[i])),)
        new_mass += (factor[i] * mass[i],)
    for k in tl.static_range(len(MOMENTS)):
        if MOMENTS[k][0] == COUNT:
            moved = moment[k] + count * offset[MOMENTS[k][1]]
        else:
            moved = moment[k] + mass[MOMENTS[k][0]] * offset[MOMENTS[k][1]]
            moved = _product(factor[MOMENTS[k][0]], moved)
        new_moment += (moved,)
    return new_mass, new_moment


@triton.jit
def _product(weight, shift):
    """weight * shift of weight >= 0 >= shift, where 0 * -inf is 0: a minimum passes over NaN."""
    return tl.minimum(weight * shift, 0.0)


@triton.jit
def _finite(maximum):
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _lane_sum(values):
    return tl.sum(tl.sum(values, axis=0), axis=1)


@triton.jit(do_not_specialize=["num_tokens"])
def logit_gradient(
    out,
    out_stride,
    vectors,
    picked,
    logits,
    strides,
    num_tokens,
    num_columns,
    width,
    ORIGINS: tl.constexpr,
    LINEAR: tl.constexpr,
    OTHER: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    NUM_PICKED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """d loss / d logits of source 0 for one token and one block of columns:

    exp(shift_0) (constant + sum_j linear_j shift_j) + sum_j other_j exp(shift_j) + uniform + onehots.

    Args:
        out: [T, width], `out_stride` elements from row to row; may be the logits of source 0. Columns from
            num_columns on become 0.
        vectors: [.., T] fp32: maximum and scale of each source; constant; a coefficient for each of LINEAR
            and OTHER; uniform, if there is one; one for each id picked.
        picked: [NUM_PICKED, T] int32 columns of the ids, -1 for an id that lives elsewhere.
        logits, strides, ORIGINS: as for the sums.
        LINEAR, OTHER: numbers of sources.
    """
    token = tl.program_id(0).to(tl.int64)
    start = tl.program_id(1) * BLOCK
    if start + BLOCK <= num_columns:
        _write_block(
            out + token * out_stride, vectors + token, picked + token, logits, strides, token, num_tokens,
            start, num_columns, width, ORIGINS, LINEAR, OTHER, HAS_UNIFORM, NUM_PICKED, BLOCK, True,
        )  # fmt: skip
    else:
        _write_block(
            out + token * out_stride, vectors + token, picked + token, logits, strides, token, num_tokens,
            start, num_columns, width, ORIGINS, LINEAR, OTHER, HAS_UNIFORM, NUM_PICKED, BLOCK, False,
        )  # fmt: skip


@triton.jit
def _write_block(
    out,
    vectors,
    picked,
    logits,
    strides,
    token,
    num_tokens,
    start,
    num_columns,
    width,
    ORIGINS: tl.constexpr,
    LINEAR: tl.constexpr,
    OTHER: tl.constexpr,
    HAS_UNIFORM: tl.constexpr,
    NUM_PICKED: tl.constexpr,
    BLOCK: tl.constexpr,
    IS_WHOLE: tl.constexpr,
):
    """The block that begins at column `start`; pointers to vectors, ids and `out` stand at the token."""
    column = start + tl.arange(0, BLOCK)
    is_real = column < num_columns
    logit, shift = (), ()
    for o in tl.static_range(len(logits)):
        row = logits[o] + token * strides[o]
        if IS_WHOLE:
            logit += (tl.load(row + column).to(tl.float32),)
        else:
            logit += (tl.load(row + column, mask=is_real, other=0.0).to(tl.float32),)
    for j in tl.static_range(len(ORIGINS)):
        maximum = tl.load(vectors + 2 * j * num_tokens)
        scale = tl.load(vectors + (2 * j + 1) * num_tokens)
        shift += ((logit[ORIGINS[j]] - maximum) * scale,)

    vectors += 2 * len(ORIGINS) * num_tokens
    factor = tl.load(vectors)
    for j in tl.static_range(len(LINEAR)):
        vectors += num_tokens
        factor = factor + tl.maximum(shift[LINEAR[j]], LOWEST_SHIFT) * tl.load(vectors)
    gradient = tl.exp2(shift[0]) * factor
    for j in tl.static_range(len(OTHER)):
        vectors += num_tokens
        gradient += tl.exp2(shift[OTHER[j]]) * tl.load(vectors)
    if HAS_UNIFORM:
        vectors += num_tokens
        gradient += tl.load(vectors)
    if NUM_PICKED <= MOST_UNROLLED:
        for p in tl.static_range(NUM_PICKED):
            vectors += num_tokens
            gradient += tl.where(column == tl.load(picked + p * num_tokens), tl.load(vectors), 0.0)
    else:  # few of many ids are in this block, and unrolled they need more registers than there are
        for p in range(NUM_PICKED):
            vectors += num_tokens
            place = tl.load(picked + p * num_tokens)
            if (place >= start) & (place < start + BLOCK):
                gradient += tl.where(column == place, tl.load(vectors), 0.0)
    if IS_WHOLE:
        tl.store(out + column, gradient.to(out.dtype.element_ty))
    else:
        kept = tl.where(is_real, gradient, 0.0)
        tl.store(out + column, kept.to(out.dtype.element_ty), mask=column < width)
