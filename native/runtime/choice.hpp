// The choice of tokens from logits (dso_choice), where it is certain.
#pragma once
#include <cstdint>
#include <utility>
#include <vector>

#include "context.hpp"
#include "dso.h"
#include "kernels.hpp"
#include "mt19937.hpp"

namespace dso {

// Error DSO_EINVAL; `index` is for its message. generator: whether there is one.
void check_choice(const dso_choice& c, int64_t vocab, int32_t index, bool generator);

// The penalties of one sequence, and the tokens that they depend on.
class Penalties {
 public:
  Penalties(const dso_choice& c, int64_t vocab);
  void add(int32_t token);  // a token was chosen
  bool none() const { return distinct_.empty(); }
  // Changes the logits in place; `undo` receives what they were.
  void apply(float* logits, std::vector<std::pair<int32_t, float>>& undo) const;

 private:
  struct Count {
    int32_t recent = 0, text = 0;  // occurrences in the window, and in the text
    bool listed = false;
  };
  void count(int32_t token, bool text);

  const float repetition_, frequency_, presence_;
  const bool active_;
  const size_t window_;            // 0: all
  std::vector<int32_t> tokens_;    // with a window: all so far
  std::vector<Count> counts_;      // by token
  std::vector<int32_t> distinct_;  // the tokens that have occurred
};

// Chooses tokens from rows of `vocab` logits. Keeps its memory from row to row.
class Chooser {
 public:
  Chooser(const Kernels& kernels, int64_t vocab) : kernels_(kernels), vocab_(vocab) {}
  // The token, or DSO_UNDECIDED. Logits are as before when it returns.
  // generator: at a number of the step not after the row's first; where it is afterwards is undefined. May be null.
  int32_t choose(float* logits, const dso_choice& c, const Penalties& penalties, int64_t step, Mt19937* generator);

 private:
  struct Candidate {
    float scaled;  // logit / temperature
    int32_t token;
  };
  static bool before(const Candidate& a, const Candidate& b) {
    return a.scaled != b.scaled ? a.scaled > b.scaled : a.token < b.token;
  }
  int32_t sample(const float* logits, const dso_choice& c, int64_t step, int32_t top, Mt19937* generator);
  int32_t draw_from_all(double u);
  int32_t draw_from_kept(double u) const;
  int32_t race_of_all(const float* noise);
  int32_t race_of_all(const dso_choice& c, int32_t top, Mt19937& generator);
  int32_t race_of_kept() const;
  void draw_variates(const dso_choice& c, const float* noise, Mt19937* generator);  // of the kept candidates
  bool gather(const dso_choice& c);                                                 // the candidates; false: undecided
  bool keep(const dso_choice& c);  // those that pass the filters; false: undecided
  float bound_of_largest(int64_t count);
  void sort_to(size_t count);
  double sum_of_all();

  const Kernels& kernels_;
  const int64_t vocab_;
  std::vector<float> scaled_, weights_, maxima_;
  std::vector<int32_t> found_;
  std::vector<Candidate> candidates_;  // the first sorted_ in order, before all others
  std::vector<double> kept_;           // the weights of the first candidates, which may pass the filters
  size_t certain_ = 0;                 // how many of them pass certainly
  std::vector<double> variates_;       // of these, or of all tokens
  std::vector<std::pair<int32_t, size_t>> order_;
  size_t sorted_ = 0;
  double edge_ = 0;      // candidates not above it may not be candidates in the definition
  double edge_sum_ = 0;  // their weights together
  float top_ = 0;        // the largest of scaled_, whose weight is 1
  std::vector<std::pair<int32_t, float>> undo_;
};

// dso_choose.
int32_t choose(const Context& context, const float* logits, int32_t vocab, const dso_choice& c, int32_t step,
               const dso_mt19937* generator);

}  // namespace dso
