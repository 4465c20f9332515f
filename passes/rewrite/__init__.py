"""The table of graph rules, tried in this order; the last one names what no other took."""

from sparsec.passes.rewrite.contract import Rule
from sparsec.passes.rewrite.conv import conv2d
from sparsec.passes.rewrite.embedding import embedding
from sparsec.passes.rewrite.linear import linear
from sparsec.passes.rewrite.matmul import matmul
from sparsec.passes.rewrite.packed import packed
from sparsec.passes.rewrite.untaken import untaken

RULES: tuple[Rule, ...] = (linear, matmul, conv2d, embedding, packed, untaken)
