"""lmengine's kernels under models that other libraries define; nothing changes before it is asked for.

`register_transformers()` makes `attn_implementation="lmengine"` known to Hugging Face transformers, as importing
`lmengine.integrations.transformers` does. `torch.activate()` of this package puts lmengine's attention under
F.scaled_dot_product_attention until `torch.restore()`.
"""

from lmengine.integrations import torch

__all__ = ["register_transformers", "torch"]


def register_transformers() -> None:
    """Let transformers' models take lmengine's attention: `from_pretrained(..., attn_implementation="lmengine")`.

    Raises:
        ImportError: transformers is not installed, or older than 5.20.
    """
    from lmengine.integrations import transformers

    transformers.register()
