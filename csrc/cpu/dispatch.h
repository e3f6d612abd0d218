// What bindings.cpp calls: the drivers by the name of a cell, one instance per storage type.
#pragma once
#include "recurrent.h"
#include <string>

namespace gk {

template <class T> struct Recurrent {
  static void forward(const std::string &cell, const ForwardArgs &);
  static void backward(const std::string &cell, const BackwardArgs &);
};

} // namespace gk
