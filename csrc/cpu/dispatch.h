// What bindings.cpp calls: the drivers, one instance per storage type.
#pragma once
#include "attention_args.h"
#include "causal_conv.h"
#include "entry.h"
#include "residual_norm.h"
#include "squares.h"
#include <string>

namespace gk {

// By the name of a cell; throws std::invalid_argument where there is none.
template <class T> struct Recurrent {
  static Entries entries(const std::string &cell);
};

template <class T> struct Layers {
  static void attention_forward(const AttentionForwardArgs &);
  static void attention_backward(const AttentionBackwardArgs &);
  static void conv_forward(const ConvForwardArgs &);
  static void conv_backward(const ConvBackwardArgs &);
  static void norm_forward(const NormForwardArgs &);
  static void norm_backward(const NormBackwardArgs &);
  static void squares(const SquaresArgs &);
  static void joined(const JoinedArgs &);
};

} // namespace gk
