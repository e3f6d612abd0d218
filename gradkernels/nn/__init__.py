"""Layers shaped like torch.nn's: the same arguments, parameters, errors and results, on gradkernels' own kernels."""

from gradkernels.nn.cells import GRUCell, LSTMCell, RNNCell
from gradkernels.nn.recurrent import GRU, LSTM, RNN, Recurrent, RNNBase

__all__ = ["GRU", "LSTM", "RNN", "GRUCell", "LSTMCell", "RNNBase", "RNNCell", "Recurrent"]
