"""lmengine: a language-model engine on its own fused kernels.

`lmengine.nn` replaces torch.nn's layers, `lmengine.ops` holds the operators under them, `lmengine.use_backend`
and `lmengine.explain` say which kernel runs. On the command line: `lmengine --help`.
"""

from lmengine import nn
from lmengine.backends import Explanation, UnsupportedCall, info, use_backend
from lmengine.ops import explain

__version__ = "0.1.0"
__all__ = ["Explanation", "UnsupportedCall", "__version__", "explain", "info", "nn", "use_backend"]
