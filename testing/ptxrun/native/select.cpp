// Predicates, comparisons, selection and moves.
#include "lanewise.h"
#include "numbers.h"

namespace {

LANE_OP(And, T, (T a, T b) { return a & b; })
LANE_OP(Or, T, (T a, T b) { return a | b; })
LANE_OP(Xor, T, (T a, T b) { return a ^ b; })

// Of predicates, one bit per lane.
template <class F>
void logic2(Warp& w, const Instruction& in, Mask active) {
  const Mask r = F::of(predicate(w, in.operand[1]), predicate(w, in.operand[2]));
  Mask& d = predicate(w, in.operand[0]);
  d = (d & ~active) | (r & active);
}
template <bool kInvert>
void logic1(Warp& w, const Instruction& in, Mask active) {
  const Mask a = predicate(w, in.operand[1]), r = kInvert ? ~a : a;
  Mask& d = predicate(w, in.operand[0]);
  d = (d & ~active) | (r & active);
}
template <class T>
void select(Warp& w, const Instruction& in, Mask active) {
  const T *a = operand<T>(w, in, 1), *b = operand<T>(w, in, 2);
  const Mask p = predicate(w, in.operand[3]);
  T result[kLanes];
  for (int i = 0; i < kLanes; ++i) result[i] = p >> i & 1 ? a[i] : b[i];
  commit(operand<T>(w, in, 0), result, active);
}

#define COMPARE(name, expression)    \
  struct name {                      \
    template <class T>               \
    static bool of(T a, T b) { return expression; } \
  };
COMPARE(Eq, a == b)
COMPARE(Ne, a < b || a > b)
COMPARE(NeInt, a != b)
COMPARE(Lt, a < b)
COMPARE(Le, a <= b)
COMPARE(Gt, a > b)
COMPARE(Ge, a >= b)
COMPARE(Equ, !(a < b || a > b))
COMPARE(Neu, a != b)
COMPARE(Ltu, !(a >= b))
COMPARE(Leu, !(a > b))
COMPARE(Gtu, !(a <= b))
COMPARE(Geu, !(a < b))
COMPARE(Num, a == a && b == b)
COMPARE(Nan, a != a || b != b)

// setp.cmp{.and|or|xor}: p{|q}, a, b{, c}. `modifier`: 0 none, 1 and, 2 or, 3 xor; `vector`: 2 where there is a q.
template <class F, class T>
void compare(Warp& w, const Instruction& in, Mask active) {
  const int first = in.vector == 2 ? 2 : 1;
  const T *a = operand<T>(w, in, first), *b = operand<T>(w, in, first + 1);
  uint8_t bytes[kLanes];
  for (int i = 0; i < kLanes; ++i) bytes[i] = F::of(a[i], b[i]) ? 0xFF : 0;
  const Mask found = movemask(bytes);
  Mask r = found, q = ~found;
  if (in.modifier) {
    const Mask c = predicate(w, in.operand[first + 2]);
    r = in.modifier == 1 ? r & c : in.modifier == 2 ? r | c : r ^ c;
    q = in.modifier == 1 ? q & c : in.modifier == 2 ? q | c : q ^ c;
  }
  Mask& d = predicate(w, in.operand[0]);
  d = (d & ~active) | (r & active);
  if (in.vector == 2) {
    Mask& e = predicate(w, in.operand[1]);
    e = (e & ~active) | (q & active);
  }
}

// mov between registers; pack and unpack are mov from a vector to a register and back, the lowest part first.
template <class T>
void move(Warp& w, const Instruction& in, Mask active) {
  T result[kLanes];
  std::memcpy(result, operand<T>(w, in, 1), sizeof result);
  commit(operand<T>(w, in, 0), result, active);
}
template <class Part, class Whole>
void pack(Warp& w, const Instruction& in, Mask active) {
  Whole result[kLanes] = {};
  for (int p = 0; p < int(sizeof(Whole) / sizeof(Part)); ++p) {
    const Part* part = operand<Part>(w, in, 1 + p);
    for (int i = 0; i < kLanes; ++i) result[i] |= Whole(part[i]) << (8 * sizeof(Part) * p);
  }
  commit(operand<Whole>(w, in, 0), result, active);
}
template <class Part, class Whole>
void unpack(Warp& w, const Instruction& in, Mask active) {
  constexpr int kParts = sizeof(Whole) / sizeof(Part);
  Whole whole[kLanes];
  std::memcpy(whole, operand<Whole>(w, in, kParts), sizeof whole);
  for (int p = 0; p < kParts; ++p) {
    if (in.operand[p] == kNone) continue;
    Part result[kLanes];
    for (int i = 0; i < kLanes; ++i) result[i] = Part(whole[i] >> (8 * sizeof(Part) * p));
    commit(operand<Part>(w, in, p), result, active);
  }
}

#define SETP_INT(name, F)                                                                    \
  {"setp." name ".s16", compare<F, int16_t>}, {"setp." name ".u16", compare<F, uint16_t>},     \
      {"setp." name ".s32", compare<F, int32_t>}, {"setp." name ".u32", compare<F, uint32_t>}, \
      {"setp." name ".s64", compare<F, int64_t>}, {"setp." name ".u64", compare<F, uint64_t>}, \
      {"setp." name ".b16", compare<F, uint16_t>}, {"setp." name ".b32", compare<F, uint32_t>}, \
      {"setp." name ".b64", compare<F, uint64_t>}
#define SETP_FLOAT(name, F) {"setp." name ".f32", compare<F, float>}, {"setp." name ".f64", compare<F, double>}
#define SELECT(t, T) {"selp." t, select<T>}
#define MOVE(t, T) {"mov." t, move<T>}


const Entry kEntries[] = {
    {"and.pred", logic2<And>}, {"or.pred", logic2<Or>}, {"xor.pred", logic2<Xor>}, {"not.pred", logic1<true>},
    {"mov.pred", logic1<false>},
    SELECT("b16", uint16_t), SELECT("u16", uint16_t), SELECT("s16", uint16_t), SELECT("f16", uint16_t),
    SELECT("b32", uint32_t), SELECT("u32", uint32_t), SELECT("s32", uint32_t), SELECT("f32", uint32_t),
    SELECT("b64", uint64_t), SELECT("u64", uint64_t), SELECT("s64", uint64_t), SELECT("f64", uint64_t),
    MOVE("b16", uint16_t), MOVE("u16", uint16_t), MOVE("s16", uint16_t), MOVE("f16", uint16_t),
    MOVE("b32", uint32_t), MOVE("u32", uint32_t), MOVE("s32", uint32_t), MOVE("f32", uint32_t),
    MOVE("b64", uint64_t), MOVE("u64", uint64_t), MOVE("s64", uint64_t), MOVE("f64", uint64_t),
    {"pack.2.4", pack<uint16_t, uint32_t>}, {"pack.4.8", pack<uint32_t, uint64_t>},
    {"pack.2.8", pack<uint16_t, uint64_t>}, {"unpack.2.4", unpack<uint16_t, uint32_t>},
    {"unpack.4.8", unpack<uint32_t, uint64_t>}, {"unpack.2.8", unpack<uint16_t, uint64_t>},
    SETP_INT("eq", Eq), SETP_INT("ne", NeInt), SETP_INT("lt", Lt), SETP_INT("le", Le), SETP_INT("gt", Gt),
    SETP_INT("ge", Ge), SETP_INT("lo", Lt), SETP_INT("ls", Le), SETP_INT("hi", Gt), SETP_INT("hs", Ge),
    SETP_FLOAT("eq", Eq), SETP_FLOAT("ne", Ne), SETP_FLOAT("lt", Lt), SETP_FLOAT("le", Le), SETP_FLOAT("gt", Gt),
    SETP_FLOAT("ge", Ge), SETP_FLOAT("equ", Equ), SETP_FLOAT("neu", Neu), SETP_FLOAT("ltu", Ltu),
    SETP_FLOAT("leu", Leu), SETP_FLOAT("gtu", Gtu), SETP_FLOAT("geu", Geu), SETP_FLOAT("num", Num),
    SETP_FLOAT("nan", Nan),
};

}  // namespace

Handler find_selection(const std::string& name) { return find_in(kEntries, name); }
