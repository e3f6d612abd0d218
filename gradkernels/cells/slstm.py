# ruff: noqa: F821 - functions of the cell language need no import
"""sLSTM: exponential gates, of Beck et al., xLSTM: Extended Long Short-Term Memory (2024)."""


def slstm(x, r, s):
    """Gates i f z o, states h c n m: cell, normaliser, and the stabiliser that keeps exponents below 0. Of a state of zeros
    the first step forgets nothing, as there is nothing.

    log f = log sigmoid(x_f + r_f),  log i = x_i + r_i
    m' = max(log f + m, log i)
    c' = f e^(m - m') c + e^(log i - m') tanh(x_z + r_z)
    n' = f e^(m - m') n + e^(log i - m')
    h' = sigmoid(x_o + r_o) * c' / n'
    """
    log_i, log_f = x[0] + r[0], -softplus(-x[1] - r[1])
    before = log_f + s[3]
    m = where(s[2] > 0, max(before, log_i), log_i)
    i, f = exp(log_i - m), where(s[2] > 0, exp(before - m), 0)
    z, o = tanh(x[2] + r[2]), sigmoid(x[3] + r[3])
    c, n = f * s[1] + i * z, f * s[2] + i
    return o * c / n, c, n, m
