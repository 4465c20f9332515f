"""What a post-pass is: a frozen dataclass that repairs a block after its masks were written.

Its step follows that of the mask method: ``steps: [{method: wanda, pattern: 2:4}, {method: variance}]``. Registered in
``sparsec.passes.masks.METHODS`` with ``role = "post"``. It may change kept values, and masks where ``moves_masks`` is
True; the executor checks afterwards that what the masks prune is zero and that the pattern and each layer's number of
kept weights are what they were. One that takes gradients of the block's weights says ``trains = True``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Protocol

if TYPE_CHECKING:
    from sparsec.passes.masks.block import Block


class Post(Protocol):
    role: ClassVar[str]  # "post"
    needs: ClassVar[tuple[str, ...]]
    moves_masks: ClassVar[bool]
    compares: ClassVar[bool]  # whether it asks for ``block.targets()``, which costs a forward and their memory
    source: ClassVar[str]
    cost: ClassVar[str]

    def refine(self, block: Block) -> None:
        """Write better values into ``block.layers[i].weight`` (and ``keep``), in place."""
        ...
