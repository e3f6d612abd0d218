# ruff: noqa: F821 - functions of the cell language need no import
"""Layer normalisation inside the step: Ba, Kiros & Hinton (2016), equations 20 to 28 of their supplement.

LN(v) = (v - mean(v)) / sqrt(mean((v - mean(v))^2) + 1e-5), the mean being over all units, and over all gates that a formula
normalises together. Where the paper adds two biases there is one; those of the products, inside the norm, are torch's.

Others differ. Haste's LayerNormLSTM has gains and no biases for the two products, and normalises the cell with both; Keras
has had no cell of this kind since tensorflow_addons, whose LayerNormLSTMCell normalises each gate by itself.
"""

from .derive import cell


def center4(v):
    middle = mean((v[0] + v[1] + v[2] + v[3]) / 4)
    return v[0] - middle, v[1] - middle, v[2] - middle, v[3] - middle


def norm4(v):
    i, f, g, o = center4(v)
    scale = rsqrt(mean((i * i + f * f + g * g + o * o) / 4) + 1e-5)
    return i * scale, f * scale, g * scale, o * scale


def norm2(a, b):
    middle = mean((a + b) / 2)
    u, v = a - middle, b - middle
    scale = rsqrt(mean((u * u + v * v) / 2) + 1e-5)
    return u * scale, v * scale


def norm(v):
    u = v - mean(v)
    return u * rsqrt(mean(u * u) + 1e-5)


@cell(params=[("gain_x", 4, 1.0), ("gain_r", 4, 1.0), ("bias", 4, 0.0), ("gain_c", 1, 1.0), ("bias_c", 1, 0.0)])
def lstm_layer_norm(x, r, s, p):
    """Gates i f g o, normalised together, states h c; the cell is normalised where the output is made.

    i, f, o = sigmoid(u),  g = tanh(u),  u = gain_x * LN(x) + gain_r * LN(r) + bias
    c' = f * c + i * g
    h' = o * tanh(gain_c * LN(c') + bias_c)
    """
    xi, xf, xg, xo = norm4(x)
    ri, rf, rg, ro = norm4(r)
    i = sigmoid(p[0] * xi + p[4] * ri + p[8])
    f = sigmoid(p[1] * xf + p[5] * rf + p[9])
    g = tanh(p[2] * xg + p[6] * rg + p[10])
    o = sigmoid(p[3] * xo + p[7] * ro + p[11])
    c = f * s[1] + i * g
    return o * tanh(p[12] * norm(c) + p[13]), c


@cell(params=[("gain_x", 3, 1.0), ("gain_r", 3, 1.0), ("bias", 3, 0.0)])
def gru_layer_norm(x, r, s, p):
    """Gates reset z n; reset and z are normalised together, n by itself.

    reset, z = sigmoid(gain_x * LN(x) + gain_r * LN(r) + bias)
    n = tanh(gain_x * LN(x_n) + reset * gain_r * LN(r_n) + bias)
    h' = (1 - z) * n + z * h
    """
    xr, xz = norm2(x[0], x[1])
    rr, rz = norm2(r[0], r[1])
    reset = sigmoid(p[0] * xr + p[3] * rr + p[6])
    z = sigmoid(p[1] * xz + p[4] * rz + p[7])
    n = tanh(p[2] * norm(x[2]) + reset * (p[5] * norm(r[2])) + p[8])
    return n + z * (s[0] - n)
