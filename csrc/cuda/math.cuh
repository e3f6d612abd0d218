// The functions that a cell's text may name, over float: within a few units in the last place everywhere, relative to
// the result also near 0; NaN and infinity travel. The same text on a GPU and on its twin, but for `reciprocal`
// (platform.cuh) and the compiler's own expf, logf ...
#pragma once
#include "platform.cuh"

namespace gk {

GK_DEVICE float exp(float x) { return ::expf(x); }
GK_DEVICE float expm1(float x) { return ::expm1f(x); }
GK_DEVICE float log(float x) { return ::logf(x); }
GK_DEVICE float log1p(float x) { return ::log1pf(x); }
GK_DEVICE float sqrt(float x) { return ::sqrtf(x); }
GK_DEVICE float sin(float x) { return ::sinf(x); }
GK_DEVICE float cos(float x) { return ::cosf(x); }
GK_DEVICE float erf(float x) { return ::erff(x); }
GK_DEVICE float abs(float x) { return ::fabsf(x); }
GK_DEVICE float pow(float x, float y) { return ::powf(x, y); }

GK_DEVICE float where(bool c, float a, float b) { return c ? a : b; }
GK_DEVICE float relu(float x) { return x <= 0.f ? 0.f : x; }
GK_DEVICE float sign(float x) { return x > 0.f ? 1.f : x < 0.f ? -1.f : 0.f; } // of a NaN 0, as in torch
GK_DEVICE float min(float x, float y) { return x < y || x != x ? x : y; }      // NaN if either is
GK_DEVICE float max(float x, float y) { return x > y || x != x ? x : y; }

// Infinite exponentials have reciprocal 0, so that both ends saturate by themselves.
GK_DEVICE float sigmoid(float x) { return reciprocal(1.f + exp(-x)); }

// Near 0 an odd polynomial, minimax in relative error (3e-9); beyond it the exponential, of which little is left to
// cancel. Both without a branch: lanes of a warp rarely agree.
GK_DEVICE float tanh(float x) {
  const float size = abs(x), y = x * x;
  const float p = (((-0.00589515557f * y + 0.0207959696f) * y - 0.0537838297f) * y + 0.133319241f) * y - 0.33333298f;
  const float near = x * y * p + x, far = 1.f - 2.f * reciprocal(1.f + exp(2.f * size));
  return size < 0.6f ? near : x < 0.f ? -far : far;
}

GK_DEVICE float softplus(float x) { return max(x, 0.f) + log1p(exp(-abs(x))); }

} // namespace gk
