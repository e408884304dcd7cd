// Tokens are defined by float computations in Python: those of backends/sampling.py in numpy, and those of Transformers'
// warpers and torch.multinomial in torch. Additions, divisions and comparisons are done here in the same way. Exponentials and
// long sums are not: their last bits depend on the version of these libraries and on the CPU. So each comparison that depends
// on them is made with a margin that covers the error of both computations, and what lies within it is left to the caller. A
// margin is relative to the sum of all weights; that of the largest logit is 1.
#include "choice.hpp"

#include <algorithm>
#include <cmath>
#include <limits>

#include "error.hpp"

namespace dso {
namespace {

constexpr float kLowest = std::numeric_limits<float>::lowest();
constexpr int64_t kColumns = 64;        // rows that _draw_unfiltered folds a vocabulary into
constexpr double kMargin = 2e-6;        // numpy's fp32 exp is within 2.52 ulp (3e-7); its sums are fp64
constexpr double kFoldedMargin = 7e-6;  // with column sums of 64 numbers in fp32
// torch's softmax sums in fp32 in as many chains as a register has lanes; cumsum is fp64, rounded to fp32.
double torch_margin(double numbers) { return std::min(3e-5, kMargin + (numbers + 32) * 6e-8); }
constexpr double kRatioMargin = 5e-6;  // of two probabilities, where their common sum does not matter

// In torch: -log(1 - uniform) in fp64, rounded to fp32.
double exponential(double uniform) { return -std::log1p(-uniform); }

double weight_of(float scaled, float top) { return std::exp(double(scaled - top)); }
bool near(double a, double b, double margin) { return std::fabs(a - b) <= margin; }

}  // namespace

void check_choice(const dso_choice& c, int64_t vocab, int32_t index, bool generator) {
  const auto refuse = [&](const char* what) { fail(DSO_EINVAL, "choices[%d].%s", index, what); };
  if (!(c.temperature >= 0) || std::isinf(c.temperature)) refuse("temperature must be finite and at least 0");
  if (c.top_k < 0) refuse("top_k must not be negative");
  if (!(c.top_p >= 0 && c.top_p <= 1)) refuse("top_p must be from 0 to 1");
  if (!(c.min_p >= 0 && c.min_p <= 1)) refuse("min_p must be from 0 to 1");
  if (c.temperature > 0 && (c.numbers ? bool(c.noise) : !c.noise && !generator))
    refuse("numbers, noise or a generator is needed for sampling, and not both of the first");
  if (c.first_variate < 0) refuse("first_variate must not be negative");
  if (c.noise && c.noise_stride < vocab) refuse("noise_stride is less than the vocabulary");
  if (!(c.repetition > 0) || std::isinf(c.repetition)) refuse("repetition must be finite and above 0");
  if (!std::isfinite(c.frequency) || !std::isfinite(c.presence)) refuse("frequency and presence must be finite");
  if (c.window < 0) refuse("window must not be negative");
  if (c.n_tokens < 0 || c.n_prompt < 0 || c.n_prompt > c.n_tokens || (c.n_tokens > 0 && !c.tokens))
    refuse("tokens is NULL, or n_prompt is not from 0 to n_tokens");
  for (int32_t i = 0; i < c.n_tokens; ++i)
    if (c.tokens[i] < 0 || c.tokens[i] >= vocab) refuse("tokens has a token outside the vocabulary");
  if (c.n_barred < 0 || (c.n_barred > 0 && !c.barred)) refuse("barred is NULL, or n_barred is negative");
  for (int32_t i = 0; i < c.n_barred; ++i)
    if (c.barred[i] < 0 || c.barred[i] >= vocab) refuse("barred has a token outside the vocabulary");
}

Penalties::Penalties(const dso_choice& c, int64_t vocab)
    : repetition_(c.repetition),
      frequency_(c.frequency),
      presence_(c.presence),
      active_(c.repetition != 1 || c.frequency != 0 || c.presence != 0),
      window_(size_t(c.window)) {
  if (!active_) return;
  counts_.resize(size_t(vocab));
  for (int32_t i = 0; i < c.n_tokens; ++i) count(c.tokens[i], i >= c.n_prompt);
}

void Penalties::add(int32_t token) {
  if (active_) count(token, true);
}

void Penalties::count(int32_t token, bool text) {
  Count& own = counts_[size_t(token)];
  if (!own.listed) distinct_.push_back(token);
  own.listed = true;
  ++own.recent;
  own.text += text;
  if (window_ == 0) return;
  tokens_.push_back(token);
  if (tokens_.size() > window_) --counts_[size_t(tokens_[tokens_.size() - 1 - window_])].recent;
}

void Penalties::apply(float* logits, std::vector<std::pair<int32_t, float>>& undo) const {
  for (const int32_t token : distinct_) {
    const Count& own = counts_[size_t(token)];
    float& x = logits[token];
    undo.emplace_back(token, x);
    if (repetition_ != 1 && own.recent > 0) x = x < 0 ? x * repetition_ : x / repetition_;
    if ((frequency_ != 0 || presence_ != 0) && own.text > 0) x -= frequency_ * float(own.text) + presence_;
  }
}

int32_t Chooser::choose(float* logits, const dso_choice& c, const Penalties& penalties, int64_t step, Mt19937* generator) {
  int64_t token = kernels_.first_largest(logits, vocab_);
  if (token < 0) return DSO_UNDECIDED;
  undo_.clear();
  if (!penalties.none()) {
    penalties.apply(logits, undo_);
    token = kernels_.first_largest(logits, vocab_);
  }
  if (token >= 0 && step < c.barred_steps && c.n_barred > 0) {
    for (int32_t i = 0; i < c.n_barred; ++i) {
      float& x = logits[c.barred[i]];
      undo_.emplace_back(c.barred[i], x);
      x = -std::numeric_limits<float>::infinity();
    }
    token = kernels_.first_largest(logits, vocab_);
  }
  if (token >= 0 && c.temperature > 0) token = sample(logits, c, step, int32_t(token), generator);
  for (auto change = undo_.rbegin(); change != undo_.rend(); ++change) logits[change->first] = change->second;
  return token < 0 ? DSO_UNDECIDED : int32_t(token);
}

int32_t Chooser::sample(const float* logits, const dso_choice& c, int64_t step, int32_t top, Mt19937* generator) {
  scaled_.resize(size_t(vocab_));
  kernels_.divide(logits, c.temperature, vocab_, scaled_.data());
  top_ = scaled_[size_t(top)];
  if (!std::isfinite(top_)) return DSO_UNDECIDED;
  const float* const noise = c.noise ? c.noise + step * c.noise_stride : nullptr;
  if (noise && !(kernels_.smallest(noise, vocab_) > 0)) return DSO_UNDECIDED;
  if (c.top_k == 0 && c.top_p == 1 && c.min_p == 0)
    return noise ? race_of_all(noise) : c.numbers ? draw_from_all(c.numbers[step]) : race_of_all(c, top, *generator);
  if (!gather(c) || !keep(c)) return DSO_UNDECIDED;
  if (c.numbers) return draw_from_kept(c.numbers[step]);
  draw_variates(c, noise, generator);
  return race_of_kept();
}

// A lower bound of the `count` largest numbers, or the smallest of them.
float Chooser::bound_of_largest(int64_t count) {
  if (count >= vocab_) return kLowest;
  const int64_t columns = vocab_ / kColumns;
  if (count <= columns / 2) {
    maxima_.resize(size_t(columns));
    kernels_.column_maxima(scaled_.data(), kColumns, columns, maxima_.data());
  } else {
    maxima_ = scaled_;
  }
  std::nth_element(maxima_.begin(), maxima_.begin() + (count - 1), maxima_.end(), [](float a, float b) { return a > b; });
  return std::max(kLowest, maxima_[size_t(count - 1)]);
}

// The tokens that may pass the filters.
bool Chooser::gather(const dso_choice& c) {
  float bound = c.top_k > 0 ? bound_of_largest(c.top_k) : kLowest;
  double edge = -std::numeric_limits<double>::infinity();  // below it, tokens pass no filter
  const double slack = c.numbers ? 0 : 1;                  // in Transformers the edge is not part of the definition
  if (c.top_p < 1) edge = double(top_) + std::log((1 - c.top_p) / double(vocab_)) - slack;
  if (c.min_p > 0) edge = std::max(edge, double(top_) + std::log(c.min_p) - 1e-4 - slack);
  const bool edged = std::isfinite(edge) && (c.numbers || c.top_k == 0);  // there, all of top_k count for top_p
  const double margin = 1e-6 * std::max(1.0, std::fabs(edge));
  if (edged) bound = std::max(bound, float(edge - 2 * margin));
  found_.resize(size_t(vocab_));
  const int64_t count = kernels_.at_least_indices(scaled_.data(), bound, vocab_, found_.data());
  candidates_.clear();
  for (int64_t i = 0; i < count; ++i) candidates_.push_back({scaled_[size_t(found_[size_t(i)])], found_[size_t(i)]});
  sorted_ = 0;
  if (c.top_k > 0 && candidates_.size() > size_t(c.top_k)) {
    const auto last = candidates_.begin() + (c.top_k - 1);
    std::nth_element(candidates_.begin(), last, candidates_.end(), before);
    if (!c.numbers) {  // and those that are equal to the last
      const float least = last->scaled;
      candidates_.erase(std::partition(last, candidates_.end(), [=](const Candidate& x) { return x.scaled >= least; }),
                        candidates_.end());
    } else {
      candidates_.resize(size_t(c.top_k));
    }
  }
  edge_ = edged && c.numbers ? edge + 2 * margin : -std::numeric_limits<double>::infinity();
  edge_sum_ = 0;
  for (const Candidate& x : candidates_)
    if (x.scaled <= edge_) edge_sum_ += weight_of(x.scaled, top_);
  return !candidates_.empty();
}

void Chooser::sort_to(size_t count) {
  while (sorted_ < count) {
    const size_t next = std::min(candidates_.size(), std::max<size_t>(64, 2 * sorted_));
    const auto begin = candidates_.begin() + int64_t(sorted_), end = candidates_.begin() + int64_t(next);
    if (end != candidates_.end()) std::nth_element(begin, end, candidates_.end(), before);
    std::sort(begin, end, before);
    sorted_ = next;
  }
}

double Chooser::sum_of_all() {
  weights_.resize(size_t(vocab_));
  kernels_.exp_differences(scaled_.data(), top_, vocab_, weights_.data());
  double sums[4] = {};
  int64_t i = 0;
  for (; i + 4 <= vocab_; i += 4)
    for (int64_t j = 0; j < 4; ++j) sums[j] += weights_[size_t(i + j)];
  for (; i < vocab_; ++i) sums[0] += weights_[size_t(i)];
  return sums[0] + sums[1] + sums[2] + sums[3];
}

// Both filters pass the largest tokens up to some place. From the first comparison within a margin on, they may pass.
bool Chooser::keep(const dso_choice& c) {
  kept_.clear();
  certain_ = 0;
  double total = 0;
  if (c.top_p < 1 && c.top_k > 0)
    for (const Candidate& x : candidates_) total += weight_of(x.scaled, top_);
  else if (c.top_p < 1)
    total = sum_of_all();
  const double numbers = double(c.top_k > 0 ? int64_t(candidates_.size()) : vocab_);
  const double margin = (c.numbers ? kMargin : torch_margin(numbers)) * total + edge_sum_;
  const double least = c.numbers ? double(float(c.min_p)) : c.min_p;
  const double most = c.numbers ? c.top_p * total : (1 - c.top_p) * total;
  double sum = 0;
  bool certain = true;
  for (size_t i = 0; i < candidates_.size(); ++i) {
    sort_to(i + 1);
    const float scaled = candidates_[i].scaled;
    const double weight = weight_of(scaled, top_);
    certain = certain && scaled > edge_;
    if (c.top_p < 1 && i > 0) {
      // Transformers drops the last ones while they sum to at most 1 - top_p; here, those after a sum of top_p are dropped.
      const double rest = total - sum;
      const bool out = c.numbers ? sum >= most + margin : rest < most - margin;
      if (out) return c.numbers || scaled != candidates_[i - 1].scaled;  // in torch, the order of equal ones is not defined
      certain = certain && (c.numbers ? sum <= most - margin : rest > most + margin);
    }
    if (scaled != top_ && c.min_p > 0) {
      if (weight < least * (1 - kRatioMargin)) return true;
      certain = certain && weight > least * (1 + kRatioMargin);
    }
    kept_.push_back(weight);
    certain_ += certain;
    sum += weight;
  }
  return true;
}

int32_t Chooser::draw_from_kept(double u) const {
  double sure = 0, all = 0, sum = 0;
  for (size_t i = 0; i < kept_.size(); ++i) {
    all += kept_[i];
    if (i < certain_) sure = all;
  }
  for (size_t i = 0; i < certain_; ++i) {
    sum += kept_[i];
    if (sum <= u * sure - kMargin * all) continue;
    return sum > u * all + kMargin * all ? candidates_[i].token : DSO_UNDECIDED;
  }
  return DSO_UNDECIDED;
}

void Chooser::draw_variates(const dso_choice& c, const float* noise, Mt19937* generator) {
  variates_.resize(kept_.size());
  if (noise) {
    for (size_t i = 0; i < kept_.size(); ++i) variates_[i] = double(noise[candidates_[i].token]);
    return;
  }
  order_.clear();  // in which they are drawn
  for (size_t i = 0; i < kept_.size(); ++i) order_.emplace_back(candidates_[i].token, i);
  std::sort(order_.begin(), order_.end());
  for (const auto& [token, i] : order_) {
    generator->skip_to(c.first_variate + token);
    variates_[i] = exponential(generator->uniform());
  }
}

int32_t Chooser::race_of_kept() const {
  double best = 0, second = 0;
  size_t place = kept_.size();
  for (size_t i = 0; i < kept_.size(); ++i) {
    const double ratio = kept_[i] / variates_[i];
    if (ratio > best) {
      second = best;
      best = ratio;
      place = i;
    } else {
      second = std::max(second, ratio);
    }
  }
  if (place >= certain_ || second > best * (1 - kRatioMargin) || !std::isfinite(best)) return DSO_UNDECIDED;
  return candidates_[place].token;
}

int32_t Chooser::race_of_all(const float* noise) {
  weights_.resize(size_t(vocab_));
  kernels_.exp_differences(scaled_.data(), top_, vocab_, weights_.data());
  kernels_.quotients(weights_.data(), noise, vocab_, weights_.data());
  const int64_t token = kernels_.first_largest(weights_.data(), vocab_);
  if (token < 0) return DSO_UNDECIDED;
  found_.resize(size_t(vocab_));
  const float bound = float(double(weights_[size_t(token)]) * (1 - kRatioMargin));
  return kernels_.at_least_indices(weights_.data(), bound, vocab_, found_.data()) == 1 ? int32_t(token) : DSO_UNDECIDED;
}

// A variate is at least its uniform number, so most need not be computed.
int32_t Chooser::race_of_all(const dso_choice& c, int32_t top, Mt19937& generator) {
  weights_.resize(size_t(vocab_));
  kernels_.exp_differences(scaled_.data(), top_, vocab_, weights_.data());
  variates_.resize(size_t(vocab_));
  generator.skip_to(c.first_variate);
  for (double& uniform : variates_) uniform = generator.uniform();
  double best = 1 / exponential(variates_[size_t(top)]), second = 0;
  int32_t token = top;
  for (int32_t i = 0; i < int32_t(vocab_); ++i) {
    const double weight = double(weights_[size_t(i)]), uniform = variates_[size_t(i)];
    if (i == top || weight < uniform * best * (1 - 2 * kRatioMargin)) continue;
    const double ratio = weight / exponential(uniform);
    if (ratio > best) {
      second = best;
      best = ratio;
      token = i;
    } else {
      second = std::max(second, ratio);
    }
  }
  return second > best * (1 - kRatioMargin) || !std::isfinite(best) ? DSO_UNDECIDED : token;
}

// As _draw_unfiltered: first a column of the folded vocabulary, then a token of it.
int32_t Chooser::draw_from_all(double u) {
  const int64_t columns = (vocab_ + kColumns - 1) / kColumns;
  weights_.assign(size_t(columns * kColumns), 0);
  kernels_.exp_differences(scaled_.data(), top_, vocab_, weights_.data());
  kept_.assign(size_t(columns), 0);  // the sums of the columns
  for (int64_t row = 0; row < kColumns; ++row)
    for (int64_t c = 0; c < columns; ++c) kept_[size_t(c)] += weights_[size_t(row * columns + c)];
  double total = 0, before = 0;
  for (const double sum : kept_) total += sum;
  const double target = u * total, margin = kFoldedMargin * total;
  int64_t column = 0;
  for (; column < columns && before + kept_[size_t(column)] <= target; ++column) before += kept_[size_t(column)];
  if (column == columns || near(before + kept_[size_t(column)], target, margin)) return DSO_UNDECIDED;
  if (column > 0 && near(before, target, margin)) return DSO_UNDECIDED;
  double sum = before;
  for (int64_t row = 0; row < kColumns; ++row) {
    sum += weights_[size_t(row * columns + column)];
    if (near(sum, target, 2 * margin)) return DSO_UNDECIDED;
    if (sum > target) return int32_t(row * columns + column);
  }
  return DSO_UNDECIDED;
}

int32_t choose(const Context& context, const float* logits, int32_t vocab, const dso_choice& c, int32_t step,
               const dso_mt19937* generator) {
  if (vocab < 1) fail(DSO_EINVAL, "vocab is %d, must be at least 1", vocab);
  if (step < 0) fail(DSO_EINVAL, "step is %d, must not be negative", step);
  check_choice(c, vocab, 0, generator);
  std::vector<float> row(logits, logits + vocab);
  Mt19937 own(generator ? *generator : dso_mt19937{1, 0, {}});
  return Chooser(context.kernels, vocab).choose(row.data(), c, Penalties(c, vocab), step, &own);
}

}  // namespace dso
