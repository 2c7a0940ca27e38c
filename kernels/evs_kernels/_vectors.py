# SPDX-License-Identifier: Apache-2.0
"""Vectors inside numba kernels: a few types and operations that numba leaves to LLVM's luck.

For loops whose gathers no compiler turns into vectors. The operations are vector IR of LLVM, which every target has;
only `dot` asks what the CPU can. An `at` counts elements from the start of a contiguous array; nothing is checked, and
any alignment will do. A pair in an int32 is low half first, as on every CPU that numba compiles for.
"""

from collections.abc import Callable, Sequence
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic, models, register_model

_I8, _I16, _I32 = ir.IntType(8), ir.IntType(16), ir.IntType(32)
_LANES = 16
_BYTES = 16  # a group of a `Vector` of 64 bytes
_GROUPS = 4
# The multiplication of pairs, by what a CPU must have for it and in how many parts: left to itself LLVM finds it in one
# place and not in the next. With the addition it becomes vpdpwssd where there is VNNI.
_PAIRS_OF_X86 = (("avx512bw", 1, "llvm.x86.avx512.pmaddw.d.512"), ("avx2", 2, "llvm.x86.avx2.pmadd.wd"))


class Vector(types.Type):
    """``lanes`` integers of ``bits`` bits, as a type of numba."""

    def __init__(self, bits: int, lanes: int) -> None:
        self.bits, self.lanes = bits, lanes
        super().__init__(name=f"Vector({bits}x{lanes})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, kind: Vector) -> None:
        super().__init__(manager, kind, ir.VectorType(ir.IntType(kind.bits), kind.lanes))


I32X16 = Vector(32, _LANES)
I16X32 = Vector(16, 2 * _LANES)
U8X16 = Vector(8, _LANES)
U8X64 = Vector(8, _GROUPS * _BYTES)


def _constant(kind: ir.Type, lanes: int, values: Sequence[int]) -> ir.Constant:
    return ir.Constant(ir.VectorType(kind, lanes), list(values))


def _shuffle(builder: Any, a: Any, b: Any, order: Sequence[int]) -> Any:
    return builder.shuffle_vector(a, b, _constant(_I32, len(order), order))


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    kind = ir.VectorType(value.type, lanes)
    one = builder.insert_element(ir.Constant(kind, ir.Undefined), value, _I32(0))
    return _shuffle(builder, one, ir.Constant(kind, ir.Undefined), [0] * lanes)


def _half(builder: Any, pairs: Any, i: int, halves: int) -> Any:
    size = 2 * _LANES // halves
    return pairs if halves == 1 else _shuffle(builder, pairs, pairs, range(i * size, (i + 1) * size))


def _function(builder: Any, name: str, result: ir.Type, arguments: Sequence[ir.Type]) -> Any:
    return cgutils.get_or_insert_function(builder.module, ir.FunctionType(result, arguments), name)


def _pointer(context: Any, builder: Any, kind: types.Array, array: Any, at: Any, to: ir.Type) -> Any:
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), to.as_pointer())


def _load(context: Any, builder: Any, kind: types.Array, array: Any, at: Any, lanes: int) -> Any:
    vector = ir.VectorType(context.get_data_type(kind.dtype), lanes)
    return builder.load(_pointer(context, builder, kind, array, at, vector), align=1)


@intrinsic
def splat(typing: Any, value: Any) -> Any:
    """Sixteen times an int64, as int32."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return _splat(builder, builder.trunc(args[0], _I32), _LANES)

    return I32X16(types.int64), make


@intrinsic
def groups(typing: Any, values: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Sixteen bytes of a uint8 array from each of four places, one group after another."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        a, b, c, d = (_load(context, builder, signature.args[0], args[0], at, _BYTES) for at in args[1:])
        two = range(2 * _BYTES)
        low, high = _shuffle(builder, a, b, two), _shuffle(builder, c, d, two)
        return _shuffle(builder, low, high, range(4 * _BYTES))

    return U8X64(values, *[types.int64] * 4), make


def _make_rgb_pairs(first: int) -> Callable[..., Any]:
    @intrinsic
    def pairs(typing: Any, bytes_: Any) -> Any:
        def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
            zero, order = _GROUPS * _BYTES, []
            for group in range(_GROUPS):
                for channel in range(4):
                    for pixel in (first, first + 1):
                        inside = channel < 3 and 3 * pixel + channel < _BYTES - 1
                        order += [_BYTES * group + 3 * pixel + channel if inside else zero, zero]
            kind = ir.VectorType(_I8, _GROUPS * _BYTES)
            spread = _shuffle(builder, args[0], ir.Constant(kind, None), order)
            return builder.bitcast(spread, ir.VectorType(_I16, 2 * _LANES))

        return I16X32(U8X64), make

    return pairs


rgb_pairs_0, rgb_pairs_2, rgb_pairs_4 = _make_rgb_pairs(0), _make_rgb_pairs(2), _make_rgb_pairs(4)
"""Of groups of five RGB pixels, two that follow each other: lane 4 * group + channel is a pair of values. The fourth
channel, and the pixel after the fifth, are 0."""


@intrinsic
def load_pairs(typing: Any, pairs: Any, at: Any) -> Any:
    """Sixteen pairs from an int16 array."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs, at = args
        return _load(context, builder, signature.args[0], pairs, at, 2 * _LANES)

    return I16X32(pairs, types.int64), make


@intrinsic
def load_singles(typing: Any, values: Any, at: Any) -> Any:
    """Sixteen bytes of a uint8 array, each with a 0 as a pair."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, at = args
        narrow = _load(context, builder, signature.args[0], values, at, _LANES)
        wide = builder.zext(narrow, ir.VectorType(_I32, _LANES))
        return builder.bitcast(wide, ir.VectorType(_I16, 2 * _LANES))

    return I16X32(values, types.int64), make


@intrinsic
def splat_pair(typing: Any, pairs: Any, at: Any) -> Any:
    """Sixteen times one element of an int32 array, read as a pair of int16."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        pairs, at = args
        pair = builder.load(_pointer(context, builder, signature.args[0], pairs, at, _I32))
        return builder.bitcast(_splat(builder, pair, _LANES), ir.VectorType(_I16, 2 * _LANES))

    return I16X32(pairs, types.int64), make


@intrinsic
def dot(typing: Any, sums: Any, a: Any, b: Any) -> Any:
    """Adds to every sum the product of a pair with a pair: ``a0 * b0 + a1 * b1``."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, a, b = args
        _, _, features = context.codegen().magic_tuple()
        has = {name[1:] for name in features.split(",") if name.startswith("+")}
        for feature, halves, name in _PAIRS_OF_X86:
            if feature in has:
                parts = [[_half(builder, x, i, halves) for x in (a, b)] for i in range(halves)]
                kind = ir.VectorType(_I32, _LANES // halves)
                function = _function(builder, name, kind, [parts[0][0].type] * 2)
                made = [builder.call(function, part) for part in parts]
                total = made[0] if halves == 1 else _shuffle(builder, made[0], made[1], range(_LANES))
                return builder.add(sums, total)
        for parity in (0, 1):
            order = range(parity, 2 * _LANES, 2)
            wide = [builder.sext(_shuffle(builder, x, x, order), ir.VectorType(_I32, _LANES)) for x in (a, b)]
            sums = builder.add(sums, builder.mul(*wide))
        return sums

    return I32X16(I32X16, I16X32, I16X32), make


@intrinsic
def joined(typing: Any, high: Any, low: Any, bits: Any) -> Any:
    """``(high << bits) + low`` of sums."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        high, low, bits = args
        return builder.add(builder.shl(high, _splat(builder, builder.trunc(bits, _I32), _LANES)), low)

    return I32X16(I32X16, I32X16, types.int64), make


@intrinsic
def to_bytes(typing: Any, sums: Any, bits: Any) -> Any:
    """Sums shifted right by ``bits``, held to 0 ... 255."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, bits = args
        shifted = builder.ashr(sums, _splat(builder, builder.trunc(bits, _I32), _LANES))
        low, high = (_constant(_I32, _LANES, [bound] * _LANES) for bound in (0, 255))
        held = builder.select(builder.icmp_signed("<", shifted, low), low, shifted)
        held = builder.select(builder.icmp_signed(">", held, high), high, held)
        return builder.trunc(held, ir.VectorType(_I8, _LANES))

    return U8X16(I32X16, types.int64), make


@intrinsic
def load_sums(typing: Any, sums: Any, at: Any) -> Any:
    """Sixteen sums from an int32 array."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        sums, at = args
        return _load(context, builder, signature.args[0], sums, at, _LANES)

    return I32X16(sums, types.int64), make


@intrinsic
def store(typing: Any, array: Any, at: Any, vector: Any) -> Any:
    """Writes a vector into an array of its elements: sixteen bytes (uint8) or sums (int32)."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        array, at, vector = args
        builder.store(vector, _pointer(context, builder, signature.args[0], array, at, vector.type), align=1)
        return context.get_dummy_value()

    return types.none(array, types.int64, vector), make


@intrinsic
def store_planes(typing: Any, values: Any, at: Any, stride: Any, bytes_: Any) -> Any:
    """Writes the first three channels of four groups of four, each as four bytes, ``stride`` apart."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, at, stride, bytes_ = args
        for channel in range(3):
            plane = _shuffle(builder, bytes_, bytes_, range(channel, 16, 4))
            builder.store(plane, _pointer(context, builder, signature.args[0], values, at, plane.type), align=1)
            at = builder.add(at, stride)
        return context.get_dummy_value()

    return types.none(values, types.int64, types.int64, U8X16), make


@intrinsic
def prefetch(typing: Any, values: Any, at: Any) -> Any:
    """Asks for the cache line of an element that will be read soon; the element need not exist."""

    def make(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        values, at = args
        pointer = _pointer(context, builder, signature.args[0], values, at, _I8)
        kind = ir.FunctionType(ir.VoidType(), [pointer.type, _I32, _I32, _I32])
        reading, into_all_caches, data = _I32(0), _I32(3), _I32(1)
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [pointer, reading, into_all_caches, data])
        return context.get_dummy_value()

    return types.none(values, types.int64), make
