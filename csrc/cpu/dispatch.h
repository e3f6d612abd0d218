// What bindings.cpp calls: the drivers, one instance per storage type.
#pragma once
#include "attention.h"
#include "causal_conv.h"
#include "recurrent.h"
#include "residual_norm.h"
#include <string>

namespace gk {

// By the name of a cell.
template <class T> struct Recurrent {
  static void forward(const std::string &cell, const ForwardArgs &);
  static void backward(const std::string &cell, const BackwardArgs &);
};

template <class T> struct Layers {
  static void attention_forward(const AttentionForwardArgs &);
  static void attention_backward(const AttentionBackwardArgs &);
  static void conv_forward(const ConvForwardArgs &);
  static void conv_backward(const ConvBackwardArgs &);
  static void norm_forward(const NormForwardArgs &);
  static void norm_backward(const NormBackwardArgs &);
};

// Panels are of the type that sums are made of: the storage type itself where a machine can, else what it is computed
// in.
template <class T, class F> void with_panels(F f) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, bfloat16>)
    if (has_bf16_dots()) return f(bfloat16{});
#endif
  f(Real<T>{});
}

} // namespace gk
