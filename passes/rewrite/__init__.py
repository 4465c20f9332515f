"""The table of graph rules, tried in this order; the last one names what no other took."""

from sparsec.passes.rewrite.contract import Rule
from sparsec.passes.rewrite.conv import conv1x1
from sparsec.passes.rewrite.linear import linear
from sparsec.passes.rewrite.matmul import matmul
from sparsec.passes.rewrite.packed import packed
from sparsec.passes.rewrite.untaken import untaken

RULES: tuple[Rule, ...] = (linear, matmul, conv1x1, packed, untaken)
