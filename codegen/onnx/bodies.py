"""What an operator is in standard ONNX: a function of the same name, which a runtime without our library inlines.

Every input but x is a constant, so what is decoded is folded once, when a session is made, to one MatMul of the dense
weight. Positions of floats are the running sum of gaps that are stored for this alone, a byte each: twice the load time
of a dense layer instead of five times where they are worked out from bits. Of codes a byte each would be as much as the
codes, so there a bit's value lies where the running sum of the bits before its byte says, and in its byte a table.
(NonZero would give positions, but ONNX Runtime does not fold it.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from sparsec.codegen.onnx import body_index
from sparsec.codegen.onnx.ops import DOMAIN, Op

if TYPE_CHECKING:
    import onnx

OPSET = 21

_BITS = [[byte >> bit & 1 for bit in range(8)] for byte in range(256)]
# Of every two bits of a byte that follow each other: the kept values before them in it, and which of the two are kept.
_BEFORE = [[sum(row[:bit]) for bit in range(0, 8, 2)] for row in _BITS]
_WHICH = [[3 - 2 * row[bit] - row[bit + 1] for bit in range(0, 8, 2)] for row in _BITS]


LEAST_OPSET = 18  # in which the operators of bodies are as they are used here
MOST = 2**31 - 1  # what a body counts to
MOST_K = MOST // 127**2  # products of bytes that int32 sums, in bodies and in MatMulInteger


def countable(op: Op, n: int, k: int, kept: int) -> bool:
    """Whether the body of an operator counts right: its positions are int32, half the bytes of what ONNX prefers."""
    return 4 * (kept + 66) <= MOST and k <= MOST_K if op.x else (n + 15) * (k + 127) <= MOST


def _table(rows: list[list[int]]) -> str:
    return ", ".join(str(number) for row in rows for number in row)


def _spread() -> str:
    """Text that gives ``scattered`` [bytes of masks, 4, 2]: numbers of ``signed`` where a bit is set, zeros elsewhere.

    Two at once, from a table of pairs that has four parts of one size: pair i of the first is numbers i and i + 1, of
    the second i and 0, of the third 0 and i, of the last zeros.
    """
    return f"""
  minus_one = Constant<value_ints = [-1]>()
  begin = Constant<value_ints = [0]>()
  second = Constant<value_ints = [1]>()
  end = Constant<value_ints = [9223372036854775807]>()
  first_axis = Constant<value_int = 0>()
  as_column = Constant<value_ints = [-1, 1]>()
  two_zeros = Constant<value = int8[2] {{0, 0}}>()
  before = Constant<value = int32[256, 4] {{{_table(_BEFORE)}}}>()
  part = Constant<value = int32[256, 4] {{{_table(_WHICH)}}}>()
  kept_in_byte = Constant<value = int32[256, 1] {{{_table([[sum(row)] for row in _BITS])}}}>()
  longer = Concat<axis = 0>(signed, two_zeros)
  number = Reshape(longer, as_column)
  these = Slice(number, begin, minus_one)
  following = Slice(number, second, end)
  size = Shape(these)
  zeros = ConstantOfShape<value = int8[1] {{0}}>(size)
  two = Concat<axis = 1>(these, following)
  first_alone = Concat<axis = 1>(these, zeros)
  second_alone = Concat<axis = 1>(zeros, these)
  neither = Concat<axis = 1>(zeros, zeros)
  pairs = Concat<axis = 0>(two, first_alone, second_alone, neither)
  whole_size = Cast<to = 6>(size)
  part_size = Slice(whole_size, begin, second)
  part_begin = Mul(part, part_size)
  in_part = Add(before, part_begin)
  byte = Cast<to = 6>(masks)
  in_byte = Gather<axis = 0>(in_part, byte)
  counts = Gather<axis = 0>(kept_in_byte, byte)
  before_byte = CumSum<exclusive = 1>(counts, first_axis)
  place = Add(before_byte, in_byte)
  scattered = Gather<axis = 0>(pairs, place)
"""


def _as_stored() -> str:
    """The same where all codes are stored, and a few more behind them."""
    return f"""
  minus_one = Constant<value_ints = [-1]>()
  begin = Constant<value_ints = [0]>()
  in_tile = Constant<value_int = 256>()
{_up_to("tiles", "n_number", 16)}
{_up_to("across", "k_number", 16)}
  in_row_of_tiles = Mul(across, in_tile)
  all_codes = Mul(tiles, in_row_of_tiles)
  stored = Reshape(all_codes, one_axis)
  scattered = Slice(signed, begin, stored)
"""


def function(op: Op, opset: int = OPSET) -> onnx.FunctionProto:
    """The body of an operator, in the opset of the model it is for, which is LEAST_OPSET or later."""
    import onnx

    inputs = ", ".join(("x", "bias", "work", *op.packs))
    attributes = "n, k, outer_from, version" + (", x_scale" if op.fixed else "")
    index = op.format.pattern.kind == "index"
    body = _integer_body(op) if op.x else (body_index.TEXT if index else _bitmap_body()) + _SCATTERED
    text = f"""
<opset_import: ["" : {opset}], domain: "{DOMAIN}">
{op.name} <{attributes}> ({inputs}) => (y) {{
  n_number = Constant<value_int : int = @n>()
  k_number = Constant<value_int : int = @k>()
  one_axis = Constant<value_ints = [1]>()
  n = Reshape(n_number, one_axis)
  k = Reshape(k_number, one_axis)
{body}
}}"""
    return onnx.parser.parse_function(text)


def _in_rows(unit: int, rows: int, multiple: int) -> str:
    """Text that gives ``weight`` [k, n]: ``scattered`` lies by (``rows`` rows, ``unit`` columns, row, column), with
    columns up to a multiple."""
    return f"""
  multiple = Constant<value_ints = [{multiple}]>()
  less = Constant<value_ints = [{multiple - 1}]>()
  unit = Constant<value_ints = [{unit}]>()
  rows = Constant<value_ints = [{rows}]>()
  both = Constant<value_ints = [0, 0]>()
  more = Add(k, less)
  multiples = Div(more, multiple)
  columns = Mul(multiples, multiple)
  units = Div(columns, unit)
  order = Concat<axis = 0>(minus_one, units, rows, unit)
  apart = Reshape(scattered, order)
  turned = Transpose<perm = [1, 3, 0, 2]>(apart)
  flat = Concat<axis = 0>(columns, minus_one)
  whole = Reshape(turned, flat)
  ends = Concat<axis = 0>(k, n)
  weight = Slice(whole, both, ends)
"""


def gaps(masks: torch.Tensor) -> torch.Tensor:
    """How many positions each set bit of ``masks`` is behind the one before it, [kept] in the smallest type that holds
    them: what the body of a bitmap of floats knows positions from."""
    bits = np.unpackbits(masks.contiguous().numpy().view(np.uint8).ravel(), bitorder="little")
    return torch.from_numpy(steps(np.flatnonzero(bits)))


def steps(positions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """How far each of ascending positions lies behind the one before it, in the smallest type that holds them."""
    found = np.diff(positions, prepend=0)
    most = int(found.max(initial=0))
    return found.astype(np.uint8 if most < 2**8 else np.uint16 if most < 2**16 else np.int32)


def _bitmap_body() -> str:
    """bitmap.h: (4 rows, 32 columns, row, column). Positions are turned into those of ``weight`` [k, n] while they are
    few, 32 columns at a time by a table: moving the values afterwards takes three times as long."""
    return f"""
  first_axis = Constant<value_int = 0>()
  minus_one = Constant<value_ints = [-1]>()
  begin = Constant<value_ints = [0]>()
  zero = Constant<value_int = 0>()
  one = Constant<value_int = 1>()
{_up_to("words", "k_number", 32)}
{_up_to("groups", "n_number", 4)}
  of_word = Constant<value = int32 {{32}}>()
  columns = Constant<value_int = 32>()
  four_rows = Constant<value_int = 4>()
  word = Range(zero, words, one)
  columns_before = Mul(word, columns)
  elements_before = Mul(columns_before, n_number)
  word_shape = Constant<value_ints = [1, -1, 1]>()
  by_word = Reshape(elements_before, word_shape)
  all_rows = Mul(groups, four_rows)
  row = Range(zero, all_rows, one)
  row_shape = Constant<value_ints = [-1, 1, 4]>()
  by_row = Reshape(row, row_shape)
  starts = Add(by_word, by_row)
  flat_starts = Reshape(starts, minus_one)
  table = Cast<to = 6>(flat_starts)
  steps = Cast<to = 6>(gaps)
  positions = CumSum(steps, first_axis)
  segment = Div(positions, of_word)
  column = Mod(positions, of_word)
  above = Gather<axis = 0>(table, segment)
  stride = Cast<to = 6>(n)
  down = Mul(column, stride)
  places = Add(above, down)
  count = Shape(gaps)
  kept = Slice(values, begin, count)
"""


_SCATTERED = """
  size = Mul(n, k)
  zeros = ConstantOfShape<value = float[1] {0.0}>(size)
  scattered = ScatterElements<axis = 0>(zeros, places, kept)
  shape = Concat<axis = 0>(k, n)
  weight = Reshape(scattered, shape)
  product = MatMul(x, weight)
  y = Add(product, bias)
"""


def _up_to(name: str, size: str, unit: int) -> str:
    """Text that gives ``name``: how many units of ``unit`` hold ``size``."""
    return f"""
  {name}_unit = Constant<value_int = {unit}>()
  {name}_less = Constant<value_int = {unit - 1}>()
  {name}_more = Add({size}, {name}_less)
  {name} = Div({name}_more, {name}_unit)
"""


_ROW_BY_ROW = """
  last_axis = Constant<value_ints = [-1]>()
  one = Constant<value_float = 1.0>()
  most = Constant<value_float = 127.0>()
  size_of_x = Abs(x)
  largest = ReduceMax<keepdims = 1>(size_of_x, last_axis)
  exact = Div(largest, most)
  is_zero = Equal(exact, none)
  step = Where(is_zero, one, exact)
  in_steps = Div(x, step)
  nearest = Round(in_steps)
  zeros_of_x = Mul(x, none)
"""
_FIXED = """
  last_axis = Constant<value_ints = [-1]>()
  least = Constant<value_float = -127.0>()
  most = Constant<value_float = 127.0>()
  step = Constant<value_float : float = @x_scale>()
  in_steps = Div(x, step)
  not_clipped = Round(in_steps)
  nearest = Clip(not_clipped, least, most)
  is_bad = IsNaN(x)
  zeros_of_x = Where(is_bad, x, none)
"""


def _integer_body(op: Op) -> str:
    """int_steps.h: 16 rows, 4 columns, padded to 16 columns; x is rounded as int_x.h does it, row by row or with one
    scale, which clips infinities.

    Codes are made signed where they are few, before they are scattered, and x unsigned: ONNX Runtime has fast products
    of just these. A row with a NaN, or an infinity that its scale comes from, gives NaN, which no whole number can say.
    """
    return f"""
  none = Constant<value_float = 0.0>()
{_FIXED if op.fixed else _ROW_BY_ROW}
  shift = Constant<value_float = 128.0>()
  from_zero = Add(nearest, shift)
  q = Cast<to = 2>(from_zero)
  zero_of_q = Constant<value = uint8 {{128}}>()
  middle = Constant<value = int32 {{128}}>()
  unsigned = Cast<to = 6>(codes)
  centred = Sub(unsigned, middle)
  signed = Cast<to = 3>(centred)
{_spread() if op.masked else _as_stored()}
{_in_rows(4, 16, 16)}
  product = MatMulInteger(q, weight, zero_of_q)
  sums = Cast<to = 1>(product)
  scales = Slice(scale, begin, n)
  in_rows = Mul(sums, step)
  scaled = Mul(in_rows, scales)
  shifted = Add(scaled, bias)
  bad = ReduceSum<keepdims = 1>(zeros_of_x, last_axis)
  y = Add(shifted, bad)
"""
