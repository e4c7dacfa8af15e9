"""`attend_quantized` on a GPU: codes become numbers in registers, scales meet q and p, one softmax over all slots.

Paper: Liu et al. 2024, arXiv:2402.02750, for what is stored; the running softmax and the splits are those of `attend`.
Here:  with x = code * scale + offset, q·x = (q * scale)·code + q·offset, and p·x likewise. The scale of a code depends
       on its group, so the rows of a product are stacked, one copy of q (or p) per group of the tile with that group's
       scales in it, and of the product the group's own part is taken. Few query rows leave most of a tensor core's tile
       empty, and four groups of four rows just fill it. Codes are whole numbers up to 255, exact as bfloat16 and as
       TF32; float16 queries take TF32, whose range no scale leaves. The slots that are codes on both sides are one
       loop; those where keys or values are in full precision, at most a few tiles, are another.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kernels.attend.rules import Layout, Rules
from kernels.attend.splits import merged, pick_splits
from kernels.attend.tiles import finish, last_contiguous, packed_rows, scores, strides
from kernels.backend import DTYPES, interpreted
from kernels.launch import launch
from kernels.quantize import BITS, Packed, codes_per_pack
from kernels.quantize.reference import quantize
from kernels.quantize.triton import dense

# elements of the rows that keys' codes are multiplied with, all held by every warp, and of the sums over values' codes
MOST_FACTORS, MOST_SUMS = 4096, 16384
# groups along the channels of a head, or along the tokens of a tile, beyond which a product is mostly other groups'
MOST_GROUPS = 64


@triton.jit
def words(AT, step, mask, BYTES: tl.constexpr):
    """Packs of BYTES bytes `step` apart, the first one lowest."""
    word = tl.load(AT, mask=mask, other=0)
    if BYTES > 1:
        word = word.to(tl.int32)
    for i in tl.static_range(1, BYTES):
        word |= tl.load(AT + i * step, mask=mask, other=0).to(tl.int32) << (8 * i)
    return word


@triton.jit
def plane(word, s: tl.constexpr, BITS: tl.constexpr, LIFT: tl.constexpr, DOT: tl.constexpr):
    """LIFT and code s of every pack, as numbers. Taken apart where they are multiplied, codes need no shuffling.

    LIFT is 2**BITS: the exponent that makes a number of the code's bits, put highest in a mantissa, in fewer and faster
    instructions than a conversion takes. Or 0: bfloat16's mantissa has seven bits.
    """
    if LIFT == 0:
        return ((word >> (BITS * s)) & (2**BITS - 1)).to(tl.float32).to(DOT)
    else:
        HALF: tl.constexpr = DOT.primitive_bitwidth == 16
        INT: tl.constexpr = tl.int16 if HALF else tl.int32
        MANTISSA: tl.constexpr = 7 if HALF else 23
        SHIFT: tl.constexpr = BITS * s + BITS - MANTISSA
        if SHIFT > 0:
            bits = (word >> SHIFT).to(INT)
        else:
            bits = word.to(INT) << -SHIFT
        bits = (bits & ((2**BITS - 1) << (MANTISSA - BITS))) | ((127 + BITS) << MANTISSA)
        return bits.to(DOT, bitcast=True)


@triton.jit
def interleaved(x, n: tl.constexpr):
    """n tensors [M, N] as one [M, n * N] with column i * n + s from column i of x[s]."""
    if n == 1:
        return x[0]
    elif n == 2:
        return tl.interleave(x[0], x[1])
    elif n == 4:
        return tl.interleave(tl.interleave(x[0], x[2]), tl.interleave(x[1], x[3]))
    else:
        even = tl.interleave(tl.interleave(x[0], x[4]), tl.interleave(x[2], x[6]))
        odd = tl.interleave(tl.interleave(x[1], x[5]), tl.interleave(x[3], x[7]))
        return tl.interleave(even, odd)


@triton.jit
def pick(group, groups, x):
    """x [groups, M, N] with the columns of other groups than `group` [N] at zero, summed over the groups: [M, N]."""
    return tl.sum(tl.where(group[None, None, :] == groups[:, None, None], x, 0.0), 0)


@triton.jit(do_not_specialize=["T", "S", "split", "n_keys", "n_values", "settled"])
def quantized(
    Q, KC, KS, KO, K, VC, VS, VO, V, QPOS, KPOS, SLOPES, OUT, LSE,
    q_sb, q_sh, q_st, kc_sb, kc_sh, ks_sb, ks_sh, k_sb, k_sh, k_ss, vc_sb, vc_sh, vs_sb, vs_sh, v_sb, v_sh, v_ss,
    qp_sb, qp_st, kp_sb, kp_sh, H, T, S, split, n_keys, n_values, settled, scale, cap, window,
    G: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr, ALONG_TOKENS: tl.constexpr, KEY_BITS: tl.constexpr,
    KEY_PACK: tl.constexpr, KEY_GROUP: tl.constexpr, KEY_GROUPS: tl.constexpr, VALUE_BITS: tl.constexpr,
    VALUE_PACK: tl.constexpr, VALUE_GROUP: tl.constexpr, VALUE_GROUPS: tl.constexpr, POSITIONS: tl.constexpr,
    CAP: tl.constexpr, WINDOW: tl.constexpr, SPLITS: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """Program (i, b * H + h, j): rows i * BLOCK_M on of one KV head over slots [j * split, (j + 1) * split).

    KC, KS, KO: codes, scales and offsets of the first n_keys keys, or None; K: the keys behind them; values likewise.
    settled: slots, in whole tiles, that are codes on every side that has codes.
    """
    b, h = (tl.program_id(1) // H).to(tl.int64), (tl.program_id(1) % H).to(tl.int64)
    r = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    real = r < T * G
    t, head = r // G, h * G + r % G  # [M]
    d, dv, n = tl.arange(0, BLOCK_D), tl.arange(0, BLOCK_DV), tl.arange(0, BLOCK_N)
    key_groups, value_groups = tl.arange(0, KEY_GROUPS), tl.arange(0, VALUE_GROUPS)
    K_BYTES: tl.constexpr = KEY_PACK * KEY_BITS // 8
    V_BYTES: tl.constexpr = VALUE_PACK * VALUE_BITS // 8
    KEY_LIFT: tl.constexpr = 2**KEY_BITS if KEY_BITS < 8 or DOT.primitive_bitwidth > 16 else 0
    VALUE_LIFT: tl.constexpr = 2**VALUE_BITS if VALUE_BITS < 8 or DOT.primitive_bitwidth > 16 else 0
    KEY_ROWS: tl.constexpr = KEY_GROUPS * BLOCK_M
    VALUE_ROWS: tl.constexpr = VALUE_GROUPS * BLOCK_M
    C: tl.constexpr = BLOCK_D // KEY_PACK
    CV: tl.constexpr = BLOCK_DV // VALUE_PACK
    PACKS: tl.constexpr = BLOCK_N // KEY_PACK
    c, cv, pack = tl.arange(0, C), tl.arange(0, CV), tl.arange(0, PACKS)
    Q += b * q_sb + head[:, None] * q_sh + t.to(tl.int64)[:, None] * q_st
    q = tl.load(Q + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)  # [M, D]
    K += b * k_sb + h * k_sh
    V += b * v_sb + h * v_sh
    if KC is not None:
        KC += b * kc_sb + h * kc_sh
        KS += b * ks_sb + h * ks_sh
        KO += b * ks_sb + h * ks_sh
    if VC is not None:
        VC += b * vc_sb + h * vc_sh
        VS += b * vs_sb + h * vs_sh
        VO += b * vs_sb + h * vs_sh
    q_at = tl.zeros((BLOCK_M,), tl.int32)
    if POSITIONS:
        q_at = tl.load(QPOS + b * qp_sb + t * qp_st, mask=real, other=-1).to(tl.int32)
        KPOS += b * kp_sb + h * kp_sh
    slope = tl.zeros((BLOCK_M,), tl.float32)
    if SLOPES is not None:
        slope = tl.load(SLOPES + head, mask=real, other=0.0)
    q_planes = ()
    q_sums = tl.zeros((KEY_GROUPS, BLOCK_M), tl.float32)
    if not ALONG_TOKENS:  # rows (w, r): q with all channels but those of group w at zero
        for s in tl.static_range(KEY_PACK):
            channel = c * KEY_PACK + s
            apart = tl.load(Q + channel[None, :], mask=real[:, None] & (channel < D)[None, :], other=0.0).to(tl.float32)
            apart = tl.where((channel // KEY_GROUP)[None, None, :] == key_groups[:, None, None], apart[None, :, :], 0.0)
            q_planes += (tl.reshape(apart.to(DOT), (KEY_ROWS, C)),)  # type: ignore[assignment]
            q_sums += tl.sum(apart, 2)

    acc = tl.zeros((BLOCK_M, BLOCK_DV), tl.float32)
    acc_planes = ()
    for _ in tl.static_range(VALUE_PACK):
        acc_planes += (tl.zeros((VALUE_ROWS, CV), tl.float32),)  # type: ignore[assignment]
    # what is summed over the slots is summed place by place of the tile, and over the places at the end
    acc_offset = tl.zeros((VALUE_GROUPS, BLOCK_M, BLOCK_N), tl.float32)
    biggest, total = tl.full((BLOCK_M,), -float("inf"), tl.float32), tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    lo = tl.program_id(2) * split
    hi = tl.minimum(lo + split, S)
    for MIXED in tl.static_range(2):
        if MIXED:
            begin, end = tl.maximum(lo, settled), hi
        else:
            begin, end = lo, tl.minimum(hi, settled)
        # few tiles are mixed: room for more of them in flight would be taken from the others
        for j in tl.range(begin, end, BLOCK_N, num_stages=1 if MIXED else STAGES):
            slot = j + n
            inside = slot < S
            if KC is None or MIXED:
                i = slot - n_keys
                at = K + i.to(tl.int64)[:, None] * k_ss + d[None, :]
                k = tl.load(at, mask=(inside & (i >= 0))[:, None] & (d < D)[None, :], other=0.0)
                x = tl.dot(q.to(DOT), tl.trans(k.to(DOT)), input_precision=PRECISION)  # [M, N]
            if KC is not None:
                if ALONG_TOKENS:
                    first = j // KEY_GROUP
                    group = first + key_groups
                    held = (group * KEY_GROUP < n_keys)[:, None] & (d < D)[None, :]
                    ks = tl.load(KS + group[:, None] * D + d[None, :], mask=held, other=0.0).to(tl.float32)
                    ko = tl.load(KO + group[:, None] * D + d[None, :], mask=held, other=0.0).to(tl.float32)
                    q_rows = (q[None, :, :] * ks[:, None, :]).to(DOT)
                    bias = tl.sum(q[None, :, :] * ko[:, None, :] - q_rows.to(tl.float32) * KEY_LIFT, 2)[:, :, None]
                    q_rows = tl.reshape(q_rows, (KEY_ROWS, BLOCK_D))
                    at = KC + (j // KEY_PACK + pack)[:, None] * (K_BYTES * D) + d[None, :]
                    word = words(at, D, (j + pack * KEY_PACK < n_keys)[:, None] & (d < D)[None, :], K_BYTES)
                    of_pack = (j + pack * KEY_PACK) // KEY_GROUP - first
                    y_planes = ()
                    for s in tl.static_range(KEY_PACK):
                        y = tl.dot(q_rows, tl.trans(plane(word, s, KEY_BITS, KEY_LIFT, DOT)), input_precision=PRECISION)
                        y_planes += (pick(of_pack, key_groups, tl.reshape(y, (KEY_GROUPS, BLOCK_M, PACKS)) + bias),)  # type: ignore[assignment]
                    y = interleaved(y_planes, KEY_PACK)
                else:
                    held = (slot < n_keys)[None, :] & (key_groups < D // KEY_GROUP)[:, None]
                    at = slot[None, :] * (D // KEY_GROUP) + key_groups[:, None]
                    ks = tl.load(KS + at, mask=held, other=0.0).to(tl.float32)  # [KEY_GROUPS, N]
                    ko = tl.load(KO + at, mask=held, other=0.0).to(tl.float32)
                    at = KC + slot[:, None] * (D * KEY_BITS // 8) + c[None, :] * K_BYTES
                    word = words(at, 1, (slot < n_keys)[:, None] & (c < D // KEY_PACK)[None, :], K_BYTES)
                    y = tl.zeros((KEY_ROWS, BLOCK_N), tl.float32)
                    for s in tl.static_range(KEY_PACK):
                        codes = tl.trans(plane(word, s, KEY_BITS, KEY_LIFT, DOT))
                        y = tl.dot(q_planes[s], codes, y, input_precision=PRECISION)
                    y = tl.reshape(y, (KEY_GROUPS, BLOCK_M, BLOCK_N)) * ks[:, None, :]
                    y = tl.sum(y + q_sums[:, :, None] * (ko - KEY_LIFT * ks)[:, None, :], 0)
                if MIXED:
                    x = tl.where((slot < n_keys)[None, :], y, x)
                else:
                    x = y
            k_at = slot
            if POSITIONS:
                k_at = tl.load(KPOS + slot, mask=inside, other=-1).to(tl.int32)
            x = scores(
                x, q_at[:, None], k_at[None, :], slope[:, None], 0, 1.0, scale, cap, window,
                POSITIONS, POSITIONS, CAP, WINDOW, SLOPES is not None, False, False,
            )  # fmt: skip
            x = tl.where(inside[None, :], x, -float("inf"))
            bigger = tl.maximum(biggest, tl.max(x, 1))
            # a row that has seen nothing yet: any finite number stands for its largest logit
            base = tl.where(bigger == -float("inf"), 0.0, bigger)
            p = tl.exp2(x - base[:, None])
            shrink = tl.exp2(biggest - base)
            total = total * shrink[:, None] + p
            biggest = bigger
            if VC is None or MIXED:  # before, where all values are codes, acc is zero and needs no shrinking
                i = slot - n_values
                at = V + i.to(tl.int64)[:, None] * v_ss + dv[None, :]
                v = tl.load(at, mask=(inside & (i >= 0))[:, None] & (dv < DV)[None, :], other=0.0)
                acc = tl.dot(p.to(DOT), v.to(DOT), acc * shrink[:, None], input_precision=PRECISION)
            if VC is not None:
                held = (slot < n_values)[None, :] & (value_groups < DV // VALUE_GROUP)[:, None]
                at = slot[None, :] * (DV // VALUE_GROUP) + value_groups[:, None]
                vs = tl.load(VS + at, mask=held, other=0.0).to(tl.float32)  # [VALUE_GROUPS, N]
                vo = tl.load(VO + at, mask=held, other=0.0).to(tl.float32)
                p_rows = (p[None, :, :] * vs[:, None, :]).to(DOT)
                acc_offset = acc_offset * shrink[None, :, None] + p[None, :, :] * vo[:, None, :]
                acc_offset -= p_rows.to(tl.float32) * VALUE_LIFT
                p_rows = tl.reshape(p_rows, (VALUE_ROWS, BLOCK_N))
                shrinks = tl.reshape(tl.broadcast_to(shrink[None, :], (VALUE_GROUPS, BLOCK_M)), (VALUE_ROWS,))[:, None]
                at = VC + slot[:, None] * (DV * VALUE_BITS // 8) + cv[None, :] * V_BYTES
                word = words(at, 1, (slot < n_values)[:, None] & (cv < DV // VALUE_PACK)[None, :], V_BYTES)
                new_planes = ()
                for s in tl.static_range(VALUE_PACK):
                    codes = plane(word, s, VALUE_BITS, VALUE_LIFT, DOT)
                    new_planes += (tl.dot(p_rows, codes, acc_planes[s] * shrinks, input_precision=PRECISION),)  # type: ignore[assignment]
                acc_planes = new_planes
    if VC is not None:
        offset = tl.sum(acc_offset, 2)[:, :, None]
        y_planes = ()
        for s in tl.static_range(VALUE_PACK):
            y = tl.reshape(acc_planes[s], (VALUE_GROUPS, BLOCK_M, CV)) + offset
            y_planes += (pick(cv * VALUE_PACK // VALUE_GROUP, value_groups, y),)  # type: ignore[assignment]
        acc += interleaved(y_planes, VALUE_PACK)
    row = ((b * H * G + head) * T + t) * SPLITS + tl.program_id(2)
    finish(acc, biggest, tl.sum(total, 1), OUT, LSE, row, dv, real, DV)


def works_on(keys: tuple[Packed | None, Tensor], values: tuple[Packed | None, Tensor]) -> bool:
    """Whether the groups are wide enough for the kernel: of narrow ones, a product would be mostly other groups'."""
    side = (keys[0], keys[1].shape[-1]), (values[0], values[1].shape[-1])
    return all(packed is None or _groups(packed, D, 16) <= MOST_GROUPS for packed, D in side)


def attend_quantized(
    q: Tensor,
    keys: tuple[Packed | None, Tensor],
    values: tuple[Packed | None, Tensor],
    rules: Rules,
    q_pos: Tensor,
    k_pos: Tensor,
    layout: Layout,
    splits: int | None = None,
) -> Tensor:
    """What `kernels.attend_quantized` gives. splits: parts of the slots side by side; None: as the device asks for."""
    positions = layout != "all" or rules.slopes is not None
    q, k, v, k_pos = packed_rows(q), packed_rows(keys[1]), packed_rows(values[1]), last_contiguous(k_pos)
    (B, Hq, T, D), (_, H, _, DV), S = q.shape, v.shape, k_pos.shape[-1]
    G = Hq // H
    tile = _tile(T * G, keys[0], values[0], D, DV)
    M, N = tile["BLOCK_M"], tile["BLOCK_N"]
    key_codes, key_scale, key_offset, n_keys, key_args = _side(keys[0], D, N, "KEY")
    value_codes, value_scale, value_offset, n_values, value_args = _side(values[0], DV, N, "VALUE")
    settled = min([S] + [n for n, packed in ((n_keys, keys[0]), (n_values, values[0])) if packed is not None])
    row_tiles = triton.cdiv(T * G, M)
    if splits is None:
        splits = 2 * pick_splits(q.device, row_tiles * B * H, S)  # its programs are small
    split = triton.cdiv(triton.cdiv(S, splits), N) * N
    splits = max(1, triton.cdiv(S, max(1, split)))
    out, lse = q.new_empty(B, Hq, T, DV), None
    part = out
    if splits > 1:
        part = q.new_empty(B, Hq, T, splits, DV, dtype=torch.float32)
        lse = q.new_empty(B, Hq, T, splits, dtype=torch.float32)
    exact = q.dtype != torch.bfloat16 or interpreted()  # the interpreter multiplies no bfloat16
    launch(
        quantized, (row_tiles, B * H, splits),
        q, key_codes, key_scale, key_offset, k, value_codes, value_scale, value_offset, v, q_pos, k_pos, rules.slopes,
        part, lse, *strides(q, 3), *strides(key_codes, 2), *strides(key_scale, 2), *strides(k, 3),
        *strides(value_codes, 2), *strides(value_scale, 2), *strides(v, 3), *strides(q_pos, 2), *strides(k_pos, 2),
        H, T, S, split, n_keys, n_values, settled // N * N, rules.scale, rules.softcap or 1.0, rules.window or 0,
        G=G, D=D, DV=DV, ALONG_TOKENS=keys[0] is not None and keys[0].dim == 2, **key_args, **value_args,
        POSITIONS=positions, CAP=rules.softcap is not None, WINDOW=positions and rules.window is not None,
        SPLITS=splits, DOT=tl.float32 if exact else tl.bfloat16,
        PRECISION="tf32x3" if q.dtype == torch.float32 else "tf32", **tile,
    )  # fmt: skip
    if splits > 1:
        assert lse is not None
        merged(part, lse, out, None, splits, B * Hq * T, DV)
    return out


def _side(packed: Packed | None, D: int, N: int, name: str) -> tuple[Any, ...]:
    """Codes, scale, offset and their number of tokens, and the constants of keys or values."""
    if packed is None:
        return None, None, None, 0, {f"{name}_{key}": 1 for key in ("BITS", "PACK", "GROUP", "GROUPS")}
    constants = {
        f"{name}_BITS": packed.bits, f"{name}_PACK": codes_per_pack(packed.bits), f"{name}_GROUP": packed.group,
        f"{name}_GROUPS": _groups(packed, D, N),
    }  # fmt: skip
    return *dense(packed), len(packed), constants


def _groups(packed: Packed, D: int, N: int) -> int:
    """Groups that a tile of N tokens meets at most, as a power of two."""
    g = packed.group
    if packed.dim == 3:
        return triton.next_power_of_2(D // g)
    if N % g == 0 or g % N == 0:
        return max(1, N // g)
    return triton.next_power_of_2((N + g - 2) // g + 1)


def _tile(rows: int, keys: Packed | None, values: Packed | None, D: int, DV: int) -> dict[str, int]:
    """Sizes of a tile, warps and stages."""
    # a product is over 16 channels at least, and those of a plane are every KEY_PACK-th
    least = 16 * codes_per_pack(keys.bits) if keys is not None and keys.dim == 3 else 16
    wide = max(least, triton.next_power_of_2(D))
    wide_v = max(16 if values is None else 8 * codes_per_pack(values.bits), triton.next_power_of_2(DV))
    N = 64 if max(wide, wide_v) <= 128 else 32
    while N > 16 and keys is not None and _groups(keys, D, N) > MOST_GROUPS:
        N //= 2
    factors, sums = (1 if x is None else _groups(x, *size) for x, size in ((keys, (D, N)), (values, (DV, N))))
    factors, sums = factors * wide, sums * wide_v  # of one query row
    M = min(16, triton.next_power_of_2(rows), max(1, MOST_FACTORS // factors), max(1, MOST_SUMS // sums))
    warps = 2 if M * sums <= 2048 else 4 if M * sums <= 8192 else 8
    return {"BLOCK_M": M, "BLOCK_N": N, "BLOCK_D": wide, "BLOCK_DV": wide_v, "num_warps": warps, "STAGES": 3}


def compile_cases(brief: bool = False) -> None:
    """Call what is here for types, widths, group sizes and code widths; brief: for one of each."""
    kinds = [(torch.bfloat16, 128, 4, 4, 2, 32)]
    if not brief:
        kinds += [(torch.bfloat16, 128, 4, bits, dim, 32) for bits in BITS for dim in (2, 3)]
        kinds += [(dtype, D, 4, 4, 2, 16) for dtype in DTYPES for D in (32, 64, 80, 128, 256)]
        kinds += [(torch.float16, 128, G, 2, 2, 64) for G in (1, 8)]
    for dtype, D, G, bits, dim, group in kinds:
        q, k = torch.zeros(1, G, 40, D, dtype=dtype), torch.zeros(1, 1, 300, D, dtype=dtype)
        pos = torch.empty(1, 300, dtype=torch.int32)
        at = {"q_pos": pos[:, :1], "k_pos": pos[:, None], "layout": "all"}
        keys, values = (quantize(k[:, :, :256], bits, group, x, "float") for x in (dim, 3))
        rules = Rules(1.0)
        attend_quantized(q[:, :, :1], (keys, k[:, :, 256:]), (values, k[:, :, 256:]), rules, **at, splits=2)
    if not brief:
        every = Rules(1.0, softcap=1.0, window=9, slopes=torch.empty(G))
        at = {"q_pos": pos[:, :40], "k_pos": pos[:, None], "layout": "positions"}
        for x, y in (((keys, k[:, :, 256:]), (None, k)), ((None, k), (values, k[:, :, 256:]))):
            attend_quantized(q, x, y, every, **at)
