"""Layers shaped like torch.nn's: the same arguments, parameters, errors and results, on gradkernels' own kernels."""

from gradkernels.nn import weights
from gradkernels.nn.any_cell import Recurrent, SkipRNN
from gradkernels.nn.attention import AttentionBlock, MultiheadAttention
from gradkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from gradkernels.nn.conv import CausalConv1d
from gradkernels.nn.multiscale import MultiScaleRNN
from gradkernels.nn.norm import LayerNorm, ResidualBlock
from gradkernels.nn.readout import AttentionReadout
from gradkernels.nn.recurrent import GRU, LSTM, RNN, RNNBase
from gradkernels.nn.transformer import TransformerDecoderLayer, TransformerEncoderLayer
from gradkernels.nn.wavenet import WaveNet

__all__ = [
    "GRU",
    "LSTM",
    "RNN",
    "AttentionBlock",
    "AttentionReadout",
    "CausalConv1d",
    "GRUCell",
    "LSTMCell",
    "LayerNorm",
    "MultiScaleRNN",
    "MultiheadAttention",
    "RNNBase",
    "RNNCell",
    "Recurrent",
    "ResidualBlock",
    "SkipRNN",
    "TransformerDecoderLayer",
    "TransformerEncoderLayer",
    "WaveNet",
    "weights",
]
