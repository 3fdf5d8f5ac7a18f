// Sixteen numbers where registers are shorter: halves, or halves of halves, each in a register of its own. Of vectors that
// are wider than its registers the compiler makes arrays in memory.

namespace mosaic {
namespace MOSAIC_ISA {

#define MOSAIC_INLINE static inline __attribute__((always_inline))

template <typename T>
struct Twice {
  T low, high;
};

// What a register holds of some sixteen numbers.
template <typename T>
struct RegisterOf {
  using Type = T;
};

template <typename T>
struct RegisterOf<Twice<T>> : RegisterOf<T> {};

// f of every register.
template <typename F, typename T>
MOSAIC_INLINE auto each(const F& f, T v) {
  return f(v);
}

template <typename F, typename T>
MOSAIC_INLINE auto each(const F& f, Twice<T> v) {
  const auto low = each(f, v.low), high = each(f, v.high);
  return Twice<std::remove_const_t<decltype(low)>>{low, high};
}

// f of every two registers at the same place of both.
template <typename F, typename T, typename U>
MOSAIC_INLINE auto each(const F& f, T a, U b) {
  return f(a, b);
}

template <typename F, typename T, typename U>
MOSAIC_INLINE auto each(const F& f, Twice<T> a, Twice<U> b) {
  const auto low = each(f, a.low, b.low), high = each(f, a.high, b.high);
  return Twice<std::remove_const_t<decltype(low)>>{low, high};
}

// Numbers whose register from the i-th on is f(i).
template <typename T>
struct Build {
  template <typename F>
  static inline __attribute__((always_inline)) T from(const F& f, int i) {
    return f(i);
  }
};

template <typename T>
struct Build<Twice<T>> {
  template <typename F>
  static inline __attribute__((always_inline)) Twice<T> from(const F& f, int i) {
    const T low = Build<T>::from(f, i), high = Build<T>::from(f, i + (int)(sizeof(T) / 4));
    return {low, high};
  }
};

template <typename T, typename F>
MOSAIC_INLINE T build(const F& f) {
  return Build<T>::from(f, 0);
}

// Calls f with every register and the place of its first number.
template <typename F, typename T>
MOSAIC_INLINE void spread(T v, const F& f, int i = 0) {
  f(v, i);
}

template <typename F, typename T>
MOSAIC_INLINE void spread(Twice<T> v, const F& f, int i = 0) {
  spread(v.low, f, i);
  spread(v.high, f, i + (int)(sizeof(T) / 4));
}

// What GCC's own vectors can, elementwise or with one number on the right.
#define MOSAIC_OPERATOR(op)                                                   \
  template <typename T>                                                       \
  MOSAIC_INLINE Twice<T> operator op(Twice<T> a, Twice<T> b) {                \
    const T low = a.low op b.low, high = a.high op b.high;                    \
    return {low, high};                                                       \
  }                                                                           \
  template <typename T, typename N>                                           \
    requires std::is_arithmetic_v<N>                                          \
  MOSAIC_INLINE Twice<T> operator op(Twice<T> a, N b) {                       \
    const T low = a.low op b, high = a.high op b;                             \
    return {low, high};                                                       \
  }                                                                           \
  template <typename T, typename U>                                           \
  MOSAIC_INLINE Twice<T>& operator op##=(Twice<T>& a, const U & b) {          \
    return a = a op b;                                                        \
  }
MOSAIC_OPERATOR(+)
MOSAIC_OPERATOR(-)
MOSAIC_OPERATOR(*)
MOSAIC_OPERATOR(/)
MOSAIC_OPERATOR(&)
MOSAIC_OPERATOR(<<)
MOSAIC_OPERATOR(>>)
#undef MOSAIC_OPERATOR

template <typename T>
MOSAIC_INLINE Twice<T> operator-(Twice<T> v) {
  const T low = -v.low, high = -v.high;
  return {low, high};
}

}  // namespace MOSAIC_ISA
}  // namespace mosaic
