#include "kernels/vector_lloyd.h"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <utility>

#include "core/lanes.h"
#include "core/parallel.h"
#include "core/vectorize.h"
#include "kernels/vector_nearest.h"

namespace milpress {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr std::size_t kEntryLanes = 32;  // entries handled side by side

// Consecutive vectors, and what the comparison with their bounds finds.
struct Stretch {
  std::span<const float> records;  // of each entry: its elements, drift and reach
  std::size_t dim;
  std::size_t stride;
  std::size_t n;
  const float* values;
  const float* shares;
  const std::uint8_t* codes;
  float* distances;
  float* others;
  std::uint32_t* doubtful;  // those that may be nearer to another entry
  std::size_t n_doubtful = 0;
  double error = 0;  // of the others
};

// How many floats a record takes, of two elements as many as are copied at once.
constexpr std::size_t record_size(std::size_t dim) { return dim + 2; }

template <std::size_t kDim>
[[gnu::always_inline]] inline void compare_with_bounds(Stretch& stretch) {
  constexpr float kLeastBound = 0x1p-50F;  // below it squares lose digits
  const std::size_t dim = kDim > 0 ? kDim : stretch.dim;
  const std::size_t size = record_size(dim);
  const std::size_t stride = stretch.stride;
  const float less = 1 - distance_slack(dim);
  const float more = 1 + distance_slack(dim);
  const float* const all_records = stretch.records.data();
  std::size_t n_doubtful = 0;
  double error = 0;
  for (std::size_t i = 0; i < stretch.n; i += kLanes) {
    const std::uint8_t* const codes = stretch.codes + i;
    const float* const values = stretch.values + i;
    std::array<float, kLanes> own;
    std::array<float, kLanes> distance{};
    std::array<float, kLanes> drift;
    std::array<float, kLanes> reach;
    if constexpr (kDim == 2) {
      std::array<float, kLanes * 4> records;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        std::memcpy(&records[lane * 4], all_records + codes[lane] * std::size_t{4},
                    4 * sizeof(float));
      }
      std::array<float, kLanes> second;
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        own[lane] = records[lane * 4];
        second[lane] = records[lane * 4 + 1];
        drift[lane] = records[lane * 4 + 2];
        reach[lane] = records[lane * 4 + 3];
      }
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        const float across = values[lane] - own[lane];
        const float along = values[stride + lane] - second[lane];
        distance[lane] = across * across + along * along;
      }
    } else {
      for (std::size_t d = 0; d < dim; ++d) {
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          own[lane] = all_records[codes[lane] * size + d];
        }
        for (std::size_t lane = 0; lane < kLanes; ++lane) {
          const float difference = values[d * stride + lane] - own[lane];
          distance[lane] += difference * difference;
        }
      }
      for (std::size_t lane = 0; lane < kLanes; ++lane) {
        drift[lane] = all_records[codes[lane] * size + dim];
        reach[lane] = all_records[codes[lane] * size + dim + 1];
      }
    }
    std::array<float, kLanes> bound;
    std::array<float, kLanes> part;
    std::array<std::uint32_t, kLanes> doubt;
    std::copy_n(stretch.others + i, kLanes, bound.begin());
    std::copy_n(stretch.shares + i, kLanes, part.begin());
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      const float near = bound[lane] - drift[lane];
      const float far = reach[lane] - std::sqrt(distance[lane]) * more;
      const float other = (near < far ? near : far) * less;
      bound[lane] = other > kLeastBound ? other : 0.0F;
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      doubt[lane] =
          static_cast<std::uint32_t>(!(distance[lane] < bound[lane] * bound[lane] * less));
    }
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      part[lane] = doubt[lane] == 0 ? part[lane] * distance[lane] : 0.0F;
    }
    std::copy_n(bound.begin(), kLanes, stretch.others + i);
    std::copy_n(distance.begin(), kLanes, stretch.distances + i);
    error += double{sum_lanes(part)};
    for (std::size_t lane = 0; lane < kLanes; ++lane) {
      stretch.doubtful[n_doubtful] = static_cast<std::uint32_t>(i + lane);
      n_doubtful += doubt[lane];
    }
  }
  stretch.n_doubtful = n_doubtful;
  stretch.error = error;
}

MILPRESS_VECTORIZE
void hold_to_bounds(Stretch& stretch) {
  switch (stretch.dim) {
    case 1:
      return compare_with_bounds<1>(stretch);
    case 2:
      return compare_with_bounds<2>(stretch);
    case 3:
      return compare_with_bounds<3>(stretch);
    case 4:
      return compare_with_bounds<4>(stretch);
    default:
      return compare_with_bounds<0>(stretch);
  }
}

// Squared distances of entries side by side from one.
template <std::size_t kDim>
[[gnu::always_inline]] inline void squares_apart(const float* entry, std::size_t dim,
                                                 const float* elements,
                                                 std::array<float, kEntryLanes>& apart) {
  apart.fill(0);
  for (std::size_t d = 0; d < (kDim > 0 ? kDim : dim); ++d) {
    for (std::size_t lane = 0; lane < kEntryLanes; ++lane) {
      const float difference = elements[d * kEntryStride + lane] - entry[d];
      apart[lane] += difference * difference;
    }
  }
}

struct Around {
  const Entries& entries;
  const std::vector<float>& elements;
  std::size_t dim;
  std::span<const float> moved;
  std::span<float> drift;
  std::span<float> reach;
};

// A radius around each entry that leaves out most others: three times as far as the nearest.
template <std::size_t kDim>
[[gnu::always_inline]] inline void find_reach_of(const Around& around) {
  constexpr float kReach = 3;
  const std::size_t dim = kDim > 0 ? kDim : around.dim;
  const std::size_t n_entries = around.reach.size();
  for (std::size_t own = 0; own < n_entries; ++own) {
    std::array<float, kEntryLanes> least;
    least.fill(kInfinity);
    for (std::size_t j = 0; j < n_entries; j += kEntryLanes) {
      std::array<float, kEntryLanes> apart;
      squares_apart<kDim>(&around.entries[own * dim], dim, &around.elements[j], apart);
      if (own - j < kEntryLanes) {
        apart[own - j] = kInfinity;
      }
      for (std::size_t lane = 0; lane < kEntryLanes; ++lane) {
        least[lane] = apart[lane] < least[lane] ? apart[lane] : least[lane];
      }
    }
    around.reach[own] = kReach * std::sqrt(*std::min_element(least.begin(), least.end()));
  }
}

// How far the entries within an entry's reach have moved at most, itself left out.
template <std::size_t kDim>
[[gnu::always_inline]] inline void find_drift_of(const Around& around) {
  const std::size_t dim = kDim > 0 ? kDim : around.dim;
  const std::size_t n_entries = around.reach.size();
  const float more = 1 + distance_slack(dim);
  std::array<float, kEntryStride> moved{};
  std::copy(around.moved.begin(), around.moved.end(), moved.begin());
  for (std::size_t own = 0; own < n_entries; ++own) {
    const float within = around.reach[own] * around.reach[own] * more;
    const float own_move = std::exchange(moved[own], 0.0F);
    std::array<float, kEntryLanes> most{};
    for (std::size_t j = 0; j < n_entries; j += kEntryLanes) {
      std::array<float, kEntryLanes> apart;
      squares_apart<kDim>(&around.entries[own * dim], dim, &around.elements[j], apart);
      for (std::size_t lane = 0; lane < kEntryLanes; ++lane) {
        const float near = apart[lane] < within ? moved[j + lane] : 0.0F;
        most[lane] = near > most[lane] ? near : most[lane];
      }
    }
    around.drift[own] = *std::max_element(most.begin(), most.end());
    moved[own] = own_move;
  }
}

MILPRESS_VECTORIZE
void find_reach(const Around& around) {
  switch (around.dim) {
    case 2:
      return find_reach_of<2>(around);
    case 4:
      return find_reach_of<4>(around);
    default:
      return find_reach_of<0>(around);
  }
}

MILPRESS_VECTORIZE
void find_drift(const Around& around) {
  switch (around.dim) {
    case 2:
      return find_drift_of<2>(around);
    case 4:
      return find_drift_of<4>(around);
    default:
      return find_drift_of<0>(around);
  }
}

// How far entries have moved, rounded up.
std::vector<float> movement(const Entries& before, const Entries& after, std::size_t dim) {
  std::vector<float> moved(after.size() / dim);
  for (std::size_t j = 0; j < moved.size(); ++j) {
    double sum = 0;
    for (std::size_t d = 0; d < dim; ++d) {
      const double difference = double{after[j * dim + d]} - before[j * dim + d];
      sum += difference * difference;
    }
    moved[j] = static_cast<float>(std::sqrt(sum)) * (1 + distance_slack(dim));
  }
  return moved;
}

// Empty clusters take over the vectors that add most to the error.
void move_empty(const Vectors& vectors, std::span<const float> distances,
                std::span<const std::size_t> empty, Entries& entries) {
  std::vector<std::size_t> order(vectors.count);
  std::iota(order.begin(), order.end(), std::size_t{0});
  const auto part = [&](std::size_t i) { return double{distances[i]} * vectors.shares[i]; };
  const std::size_t n_moved = std::min(empty.size(), order.size());
  std::partial_sort(
      order.begin(), order.begin() + static_cast<std::ptrdiff_t>(n_moved), order.end(),
      [&](std::size_t a, std::size_t b) { return part(a) != part(b) ? part(a) > part(b) : a < b; });
  for (std::size_t j = 0; j < n_moved && part(order[j]) > 0; ++j) {
    for (std::size_t d = 0; d < vectors.dim; ++d) {
      entries[empty[j] * vectors.dim + d] = vectors.at(order[j], d);
    }
  }
}

}  // namespace

void Lloyd::Moments::clear(std::size_t n_entries, std::size_t dim) {
  sums.assign(n_entries * dim, 0);
  weights.assign(n_entries, 0);
  n_near.assign(n_entries, 0);
}

// Adds a vector to the entry `code`, or with `sign` -1 takes it away.
void Lloyd::Moments::add(const Vectors& vectors, std::size_t i, std::size_t code, int sign) {
  const double share = sign * double{vectors.shares[i]};
  for (std::size_t d = 0; d < vectors.dim; ++d) {
    sums[code * vectors.dim + d] += share * vectors.at(i, d);
  }
  weights[code] += share;
  n_near[code] += static_cast<std::size_t>(sign);
}

Lloyd::Lloyd(const Vectors& vectors)
    : vectors_(vectors),
      codes_(vectors.stride),
      distances_(vectors.stride),
      others_(vectors.stride),
      pieces_((vectors.stride + kPiece - 1) / kPiece) {
  constexpr float kEven = 0x1p20F;
  const auto end = vectors.shares.begin() + static_cast<std::ptrdiff_t>(vectors.count);
  const auto [least, most] = std::minmax_element(vectors.shares.begin(), end);
  is_even_ = least != end && *most <= kEven * *least;
}

void Lloyd::guess(const Entries& entries, std::vector<std::uint8_t> codes,
                  std::vector<float> others) {
  entries_ = entries;
  codes_ = std::move(codes);
  others_ = std::move(others);
}

void Lloyd::forget() { std::fill(others_.begin(), others_.end(), 0.0F); }

double Lloyd::assign(const Entries& entries) {
  const std::size_t dim = vectors_.dim;
  const std::size_t n_entries = entries.size() / dim;
  std::vector<float> drift(n_entries, kInfinity);
  reach_.resize(n_entries);
  if (!entries_.empty()) {
    const std::vector<float> elements = by_element(entries, dim);
    const std::vector<float> moved = movement(entries_, entries, dim);
    const Around around{entries, elements, dim, moved, drift, reach_};
    constexpr int kTurnsInReach = 4;  // any reach is right, if it suits the entries roughly
    if (n_turns_++ % kTurnsInReach == 0) {
      find_reach(around);
    }
    find_drift(around);
  }
  entries_ = entries;
  const std::size_t size = record_size(dim);
  records_.resize(n_entries * size);
  for (std::size_t j = 0; j < n_entries; ++j) {
    std::copy_n(&entries[j * dim], dim, &records_[j * size]);
    records_[j * size + dim] = drift[j];
    records_[j * size + dim + 1] = reach_[j];
  }
  parallel_for(vectors_.stride, kPiece, [&](std::size_t begin, std::size_t end) {
    assign_piece(begin, end, pieces_[begin / kPiece]);
  });
  total_ = pieces_[0];
  const auto add = [](auto& sum, const auto& piece) {
    std::transform(sum.begin(), sum.end(), piece.begin(), sum.begin(), std::plus<>());
  };
  for (std::size_t p = 1; p < pieces_.size(); ++p) {
    add(total_.sums, pieces_[p].sums);
    add(total_.weights, pieces_[p].weights);
    add(total_.n_near, pieces_[p].n_near);
    total_.error += pieces_[p].error;
  }
  return total_.error;
}

// Only vectors that change entries change the sums; unless some count so much more than others that
// they would leave a rounding error that hides those.
void Lloyd::assign_piece(std::size_t begin, std::size_t end, Moments& piece) {
  std::array<std::uint32_t, kPiece + 1> doubtful;  // one is written beyond the last
  Stretch stretch{.records = records_,
                  .dim = vectors_.dim,
                  .stride = vectors_.stride,
                  .n = end - begin,
                  .values = &vectors_.values[begin],
                  .shares = &vectors_.shares[begin],
                  .codes = &codes_[begin],
                  .distances = &distances_[begin],
                  .others = &others_[begin],
                  .doubtful = doubtful.data()};
  hold_to_bounds(stretch);
  const std::span<std::uint32_t> places(doubtful.data(), stretch.n_doubtful);
  for (std::uint32_t& place : places) {
    place += static_cast<std::uint32_t>(begin);
  }
  piece.error = stretch.error;
  const bool is_anew = piece.sums.empty() || !is_even_;
  compare(places, !is_anew, piece);
  if (is_anew) {
    count_all(begin, end, piece);
  }
}

void Lloyd::compare(std::span<const std::uint32_t> places, bool counts, Moments& piece) {
  const std::size_t dim = vectors_.dim;
  const float less = 1 - distance_slack(dim);
  const NearestTwo nearest(entries_, dim);
  Batch batch(dim);
  double error = 0;
  for (std::size_t first = 0; first < places.size(); first += Batch::kSize) {
    const std::span<const std::uint32_t> some =
        places.subspan(first, std::min(Batch::kSize, places.size() - first));
    for (std::size_t d = 0; d < dim; ++d) {
      for (std::size_t i = 0; i < some.size(); ++i) {
        batch.values[d * Batch::kSize + i] = vectors_.at(some[i], d);
      }
    }
    for (std::size_t i = 0; i < some.size(); ++i) {
      batch.known[i] = distances_[some[i]];
    }
    nearest.find(some.size(), batch);
    for (std::size_t i = 0; i < some.size(); ++i) {
      const std::size_t place = some[i];
      const std::uint8_t code = batch.codes[i];
      error += double{vectors_.shares[place]} * double{batch.distances[i]};
      distances_[place] = batch.distances[i];
      others_[place] = std::sqrt(batch.others[i]) * less;
      if (counts && code != codes_[place] && place < vectors_.count) {
        piece.add(vectors_, place, codes_[place], -1);
        piece.add(vectors_, place, code, 1);
      }
      codes_[place] = code;
    }
  }
  piece.error += error;
}

void Lloyd::count_all(std::size_t begin, std::size_t end, Moments& piece) const {
  const std::size_t dim = vectors_.dim;
  const std::size_t n_entries = entries_.size() / dim;
  const std::size_t size = dim + 2;
  // Neighbours often share an entry: every other one has sums of its own, so that none waits.
  std::vector<double> parts(2 * n_entries * size);
  for (std::size_t i = begin; i < std::min(end, vectors_.count); ++i) {
    double* const part = &parts[(i % 2 * n_entries + codes_[i]) * size];
    const double share = vectors_.shares[i];
    for (std::size_t d = 0; d < dim; ++d) {
      part[d] += share * vectors_.at(i, d);
    }
    part[dim] += share;
    part[dim + 1] += 1;
  }
  piece.clear(n_entries, dim);
  for (std::size_t part = 0; part < 2 * n_entries; ++part) {
    const double* const sums = &parts[part * size];
    const std::size_t code = part % n_entries;
    for (std::size_t d = 0; d < dim; ++d) {
      piece.sums[code * dim + d] += sums[d];
    }
    piece.weights[code] += sums[dim];
    piece.n_near[code] += static_cast<std::size_t>(sums[dim + 1]);
  }
}

std::size_t Lloyd::move(Entries& entries, double stride) const {
  const std::size_t dim = vectors_.dim;
  std::vector<std::size_t> empty;
  for (std::size_t j = 0; j < total_.weights.size(); ++j) {
    if (total_.n_near[j] > 0 && total_.weights[j] > 0) {
      for (std::size_t d = 0; d < dim; ++d) {
        float& element = entries[j * dim + d];
        const double mean = total_.sums[j * dim + d] / total_.weights[j];
        element = static_cast<float>(stride == 1 ? mean : element + stride * (mean - element));
      }
    } else {
      empty.push_back(j);
    }
  }
  if (!empty.empty()) {
    move_empty(vectors_, distances_, empty, entries);
  }
  return empty.size();
}

void Lloyd::reorder(std::span<const std::size_t> places) {
  if (std::is_sorted(places.begin(), places.end())) {
    return;
  }
  const std::size_t dim = vectors_.dim;
  const auto reordered = [&](const auto& values, std::size_t n_each) {
    auto result = values;
    for (std::size_t j = 0; j < places.size() && !values.empty(); ++j) {
      std::copy_n(&values[j * n_each], n_each, &result[places[j] * n_each]);
    }
    return result;
  };
  entries_ = reordered(entries_, dim);
  reach_ = reordered(reach_, 1);
  for (Moments& piece : pieces_) {
    piece.sums = reordered(piece.sums, dim);
    piece.weights = reordered(piece.weights, 1);
    piece.n_near = reordered(piece.n_near, 1);
  }
  std::array<std::uint8_t, kMaxEntries> code_of{};
  std::copy(places.begin(), places.end(), code_of.begin());
  std::transform(codes_.begin(), codes_.end(), codes_.begin(),
                 [&](std::uint8_t code) { return code_of[code]; });
}

}  // namespace milpress
