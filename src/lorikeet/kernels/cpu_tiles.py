"""Inner loops of the CPU kernels: products of a few rows whose sums stay in registers or in the first-level cache.

Low-rank products and attention are the same two steps: *dots* of rows with rows (x with A, queries with keys) that
give a [shared rows, batch rows] block of weights, and *sums* of rows by these weights (B, values). Addresses and
strides are in bytes, `ld` in float32 elements; every sum is in float32.
"""
# mypy: disable-error-code="no-untyped-def,no-untyped-call"

from __future__ import annotations

import numpy as np

from lorikeet.kernels.cpu_runtime import at, device_function, widen

TILE = 256  # columns of sums that one task keeps in the first-level cache
F0 = np.float32(0)
I0 = np.int64(0)


@device_function
def dot(x, a, n, act, slab):
    """x[:n] . a[:n]"""
    px, pa = at(x, act), at(a, slab)
    total = F0
    for i in range(n):
        total += widen(px[i]) * widen(pa[i])
    return total


@device_function
def dot_1x4(x, a, stride, n, u, ldu, act, slab):
    """u[4] = four rows of A, `stride` bytes apart, times x."""
    px, out = at(x, act), at(u, F0)
    a0, a1, a2, a3 = at(a, slab), at(a + stride, slab), at(a + 2 * stride, slab), at(a + 3 * stride, slab)
    s0, s1, s2, s3 = F0, F0, F0, F0
    for i in range(n):
        v = widen(px[i])
        s0 += v * widen(a0[i])
        s1 += v * widen(a1[i])
        s2 += v * widen(a2[i])
        s3 += v * widen(a3[i])
    out[0], out[ldu], out[2 * ldu], out[3 * ldu] = s0, s1, s2, s3


@device_function
def dot_4x4(x0, x1, x2, x3, a, stride, n, u, ldu, act, slab):
    """u[4, 4] = four rows of A times four rows of x: sixteen sums that stay in registers."""
    p0, p1, p2, p3, out = at(x0, act), at(x1, act), at(x2, act), at(x3, act), at(u, F0)
    a0, a1, a2, a3 = at(a, slab), at(a + stride, slab), at(a + 2 * stride, slab), at(a + 3 * stride, slab)
    s00, s01, s02, s03, s10, s11, s12, s13 = F0, F0, F0, F0, F0, F0, F0, F0
    s20, s21, s22, s23, s30, s31, s32, s33 = F0, F0, F0, F0, F0, F0, F0, F0
    for i in range(n):
        v0, v1, v2, v3 = widen(p0[i]), widen(p1[i]), widen(p2[i]), widen(p3[i])
        w0, w1, w2, w3 = widen(a0[i]), widen(a1[i]), widen(a2[i]), widen(a3[i])
        s00 += w0 * v0
        s01 += w0 * v1
        s02 += w0 * v2
        s03 += w0 * v3
        s10 += w1 * v0
        s11 += w1 * v1
        s12 += w1 * v2
        s13 += w1 * v3
        s20 += w2 * v0
        s21 += w2 * v1
        s22 += w2 * v2
        s23 += w2 * v3
        s30 += w3 * v0
        s31 += w3 * v1
        s32 += w3 * v2
        s33 += w3 * v3
    out[0], out[1], out[2], out[3] = s00, s01, s02, s03
    out[ldu], out[ldu + 1], out[ldu + 2], out[ldu + 3] = s10, s11, s12, s13
    out[2 * ldu], out[2 * ldu + 1], out[2 * ldu + 2], out[2 * ldu + 3] = s20, s21, s22, s23
    out[3 * ldu], out[3 * ldu + 1], out[3 * ldu + 2], out[3 * ldu + 3] = s30, s31, s32, s33


@device_function
def add_1x4(total, u, ldu, b, stride, n, slab):
    """total[:n] += u[4] . four rows of B, `stride` bytes apart."""
    out, w = at(total, F0), at(u, F0)
    w0, w1, w2, w3 = w[0], w[ldu], w[2 * ldu], w[3 * ldu]
    b0, b1, b2, b3 = at(b, slab), at(b + stride, slab), at(b + 2 * stride, slab), at(b + 3 * stride, slab)
    for i in range(n):
        out[i] += (w0 * widen(b0[i]) + w1 * widen(b1[i])) + (w2 * widen(b2[i]) + w3 * widen(b3[i]))


@device_function
def add_1x1(total, weight, b, n, slab):
    """total[:n] += weight * b[:n]"""
    out, row = at(total, F0), at(b, slab)
    for i in range(n):
        out[i] += weight * widen(row[i])


@device_function
def add_4x4(totals, u, ldu, b, stride, n, slab):
    """The same for four batch rows at once: totals[4, TILE] += u[4, 4]^T . four rows of B."""
    t0, t1, t2, t3 = at(totals, F0), at(totals + 4 * TILE, F0), at(totals + 8 * TILE, F0), at(totals + 12 * TILE, F0)
    w0, w1, w2, w3 = at(u, F0), at(u + 4 * ldu, F0), at(u + 8 * ldu, F0), at(u + 12 * ldu, F0)
    b0, b1, b2, b3 = at(b, slab), at(b + stride, slab), at(b + 2 * stride, slab), at(b + 3 * stride, slab)
    w00, w01, w02, w03, w10, w11, w12, w13 = w0[0], w0[1], w0[2], w0[3], w1[0], w1[1], w1[2], w1[3]
    w20, w21, w22, w23, w30, w31, w32, w33 = w2[0], w2[1], w2[2], w2[3], w3[0], w3[1], w3[2], w3[3]
    for i in range(n):
        v0, v1, v2, v3 = widen(b0[i]), widen(b1[i]), widen(b2[i]), widen(b3[i])
        t0[i] += (w00 * v0 + w10 * v1) + (w20 * v2 + w30 * v3)
        t1[i] += (w01 * v0 + w11 * v1) + (w21 * v2 + w31 * v3)
        t2[i] += (w02 * v0 + w12 * v1) + (w22 * v2 + w32 * v3)
        t3[i] += (w03 * v0 + w13 * v1) + (w23 * v2 + w33 * v3)


@device_function
def share(low, high, begun, unit, units):
    """Which of `units` units, each worth `unit` and the first at `begun`, begin in [low, high) of all work."""
    return min(max(-((begun - low) // unit), 0), units), min(max(-((begun - high) // unit), 0), units)
