#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <vector>

#include "kernels/vectors.h"

namespace milpress {

/// Lloyd's iteration: assigns vectors to entries and moves entries to their vectors, in turn.
///
/// Codes are those of `nearest_entries`, but few vectors are compared with all entries: one stays
/// with its entry while that is nearer than any other can have come since (Hamerly 2010, "Making
/// k-means even faster").
class Lloyd {
 public:
  /// `vectors` has to live as long as this.
  explicit Lloyd(const Vectors& vectors);

  /// Says for the next `assign`, of `entries`, that no entry but `codes[i]` is nearer to vector i
  /// than `others[i]`.
  void guess(const Entries& entries, std::vector<std::uint8_t> codes, std::vector<float> others);

  /// Lets the next `assign` compare each vector with all entries, which makes `others` exact.
  void forget();

  /// Finds the entry nearest to each vector; returns the error.
  double assign(const Entries& entries);

  /// Moves each entry towards the mean of its vectors, beyond it if `stride` is more than 1, and
  /// those without any to where they help most. Returns how many had none.
  std::size_t move(Entries& entries, double stride = 1) const;

  /// Makes entry j of the last `assign` entry `places[j]`.
  void reorder(std::span<const std::size_t> places);

  /// Of the last `assign`: the code of each vector, the squared distance from its entry, and what
  /// no other entry is nearer than, not squared.
  const std::vector<std::uint8_t>& codes() const { return codes_; }
  const std::vector<float>& distances() const { return distances_; }
  const std::vector<float>& others() const { return others_; }

 private:
  // What a piece of the vectors adds to the entries they are nearest to.
  struct Moments {
    std::vector<double> sums;         // of share * vector
    std::vector<double> weights;      // of shares
    std::vector<std::size_t> n_near;  // vectors
    double error = 0;

    void clear(std::size_t n_entries, std::size_t dim);
    void add(const Vectors& vectors, std::size_t i, std::size_t code, int sign);
  };

  void assign_piece(std::size_t begin, std::size_t end, Moments& piece);
  void compare(std::span<const std::uint32_t> places, bool counts, Moments& piece);
  void count_all(std::size_t begin, std::size_t end, Moments& piece) const;

  const Vectors& vectors_;
  Entries entries_;
  std::vector<float> reach_;    // of each entry; what lies beyond isn't counted in its drift
  std::vector<float> records_;  // of each entry: elements, drift (how far others moved), reach
  std::vector<std::uint8_t> codes_;
  std::vector<float> distances_;
  std::vector<float> others_;
  std::vector<Moments> pieces_;
  Moments total_;
  int n_turns_ = 0;
  bool is_even_ = false;  // no vector counts far more than another
};

}  // namespace milpress
