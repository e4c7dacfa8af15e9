"""The contract between a method, the model it runs under, and everything that measures it.

A `Method` holds hyperparameters and builds one `LayerCache` per layer. A layer's turn in a forward pass is one `Step`:
`append` brings the new keys and values in, `attend` gives the output, `end_step` compresses. Only `attend` needs the
model's output to go on, so several caches can be filled from one model pass.
"""

from methods.core.contract.layer import Holding, LayerCache, SharedState
from methods.core.contract.method import Method
from methods.core.contract.spec import ModelSpec, Rope, Shape
from methods.core.contract.step import Stage, Step
from methods.core.contract.text import SPANS, Vocabulary

__all__ = [
    "SPANS", "Holding", "LayerCache", "Method", "ModelSpec", "Rope", "Shape", "SharedState", "Stage", "Step",
    "Vocabulary",
]  # fmt: skip
