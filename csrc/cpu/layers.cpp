// The drivers without a recurrence for one storage type, GK_STORAGE: a unit of compilation of its own.
#include "attention_backward.h"
#include "attention_forward.h"
#include "causal_conv.h"
#include "dispatch.h"
#include "residual_norm.h"
#include "squares.h"

namespace gk {

template <class T> void Layers<T>::attention_forward(const AttentionForwardArgs &q) {
  with_panels<T>([&](auto p) { AttentionForward<T, decltype(p)>{q}(); });
}
template <class T> void Layers<T>::attention_backward(const AttentionBackwardArgs &q) {
  with_panels<T>([&](auto p) { AttentionBackward<T, decltype(p)>{q}(); });
}
template <class T> void Layers<T>::conv_forward(const ConvForwardArgs &q) {
  with_panels<T>([&](auto p) { CausalConv<T, decltype(p)>::forward(q); });
}
template <class T> void Layers<T>::conv_backward(const ConvBackwardArgs &q) {
  with_panels<T>([&](auto p) { CausalConv<T, decltype(p)>::backward(q); });
}
template <class T> void Layers<T>::norm_forward(const NormForwardArgs &q) { ResidualNorm<T>::forward(q); }
template <class T> void Layers<T>::norm_backward(const NormBackwardArgs &q) { ResidualNorm<T>::backward(q); }
template <class T> void Layers<T>::squares(const SquaresArgs &q) { Squares<T>::run(q); }
template <class T> void Layers<T>::joined(const JoinedArgs &q) { Squares<T>::joined(q); }

template struct Layers<GK_STORAGE>;

} // namespace gk
