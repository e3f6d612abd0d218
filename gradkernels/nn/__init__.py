"""Layers shaped like torch.nn's: the same arguments, parameters, errors and results, on gradkernels' own kernels."""

from gradkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from gradkernels.nn.conv import CausalConv1d
from gradkernels.nn.norm import LayerNorm, ResidualBlock
from gradkernels.nn.recurrent import GRU, LSTM, RNN, Recurrent, RNNBase

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "CausalConv1d",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "RNNBase",
    "RNNCell",
    "Recurrent",
    "ResidualBlock",
]
