"""Functions: arguments are checked here once, then a kernel runs, and all of it can be differentiated to any order."""

from gradkernels.ops import _recurrent_direct  # noqa: F401 - registers what exported graphs need
from gradkernels.ops.attention import attention
from gradkernels.ops.causal_conv1d import causal_conv1d
from gradkernels.ops.recurrent import recurrent
from gradkernels.ops.residual_norm import residual_norm

__all__ = ["attention", "causal_conv1d", "recurrent", "residual_norm"]
