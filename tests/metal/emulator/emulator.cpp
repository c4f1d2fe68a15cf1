#include "emulator/emulator.h"

#include <sys/mman.h>

#include <algorithm>
#include <map>
#include <memory>
#include <random>
#include <sstream>

#ifdef EMULATOR_TSAN
extern "C" {
void* __tsan_get_current_fiber();
void* __tsan_create_fiber(unsigned flags);
void __tsan_destroy_fiber(void* fiber);
void __tsan_switch_to_fiber(void* fiber, unsigned flags);
void __tsan_acquire(void* address);
void __tsan_release(void* address);
}
#endif

#ifndef __x86_64__
#error "the emulator switches between fibers in the assembly language of x86-64"
#endif

// Saves what a call must preserve, and goes on where `to` was left.
asm(R"(
  .text
  .globl emulator_switch
  .type emulator_switch, @function
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
  .size emulator_switch, .-emulator_switch
)");
extern "C" void emulator_switch(void** from, void* to);

namespace emulator {
namespace {

constexpr std::size_t kStackBytes = 256 * 1024;
constexpr std::size_t kGroupBytes = 32 * 1024;  // that Apple's GPUs have for a threadgroup

enum class Wait { kNone, kBarrier, kSimd };

// What the thread sanitizer is to know, and nothing elsewhere. Fibers switch without an order; only
// what is said here orders their accesses.
struct Order {
#ifdef EMULATOR_TSAN
  static void acquire(void* token) { __tsan_acquire(token); }
  static void release(void* token) { __tsan_release(token); }
#else
  static void acquire(void*) {}
  static void release(void*) {}
#endif
};

struct Fiber {
  char* stack = nullptr;
  void* stack_pointer = nullptr;
  Wait wait = Wait::kNone;
  const char* operation = "";
  int line = 0;
  bool is_done = false;
  bool publishes = false;
  void* sanitizer = nullptr;

  Fiber() {
    void* memory = mmap(nullptr, kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) {
      throw std::bad_alloc();
    }
    stack = static_cast<char*>(memory);
  }
  ~Fiber() {
#ifdef EMULATOR_TSAN
    if (sanitizer != nullptr) {
      __tsan_destroy_fiber(sanitizer);
    }
#endif
    munmap(stack, kStackBytes);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
};

// One at a time: the emulator runs on one thread.
struct Machine {
  std::vector<std::unique_ptr<Fiber>> fibers;
  std::map<void*, std::uint64_t> filled;  // threadgroup memory, and for which group
  std::uint64_t group_serial = 0;
  std::size_t n_group_bytes = 0;
  std::mt19937_64 random;

  // Of the run at hand.
  const Kernel* kernel = nullptr;
  Call* call = nullptr;
  unsigned n_threads = 0;
  unsigned current = 0;
  unsigned n_done = 0;
  unsigned n_at_barrier = 0;
  std::vector<unsigned> n_in_exchange;      // by simdgroup
  std::vector<std::array<Lanes, 2>> lanes;  // by simdgroup, of this exchange and the next
  std::vector<unsigned> turn;               // by thread: which of the two
  std::vector<unsigned> runnable;
  std::string error;
  void* main_stack = nullptr;
  void* main_sanitizer = nullptr;
  char start_token = 0;
  char end_token = 0;
  // Two each, taken in turn: a thread that goes on from one barrier must not see what others did
  // before the next.
  std::array<char, 2> barrier_tokens{};
  std::vector<unsigned> n_barriers;  // by thread
  std::vector<std::array<char, 2>> simd_tokens;

  unsigned first_of_simdgroup(unsigned thread) const { return thread / kSimdWidth * kSimdWidth; }
  unsigned end_of_simdgroup(unsigned thread) const {
    return std::min(first_of_simdgroup(thread) + kSimdWidth, n_threads);
  }

  void switch_to_main() {
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(main_sanitizer, 1);
#endif
    emulator_switch(&fibers[current]->stack_pointer, main_stack);
  }

  void switch_to(unsigned thread) {
    current = thread;
#ifdef EMULATOR_TSAN
    __tsan_switch_to_fiber(fibers[thread]->sanitizer, 1);
#endif
    emulator_switch(&main_stack, fibers[thread]->stack_pointer);
  }

  void fail(const std::string& what) {
    if (error.empty()) {
      error = kernel->name + ": " + what;
    }
  }

  std::string where(unsigned thread) const {
    const Fiber& fiber = *fibers[thread];
    std::ostringstream text;
    text << "thread " << thread;
    if (fiber.is_done) {
      text << " has ended";
    } else {
      text << " waits at " << fiber.operation << ", line " << fiber.line;
    }
    return text.str();
  }

  // All of [begin, end) have come to the same place, or it is an error.
  void release(unsigned begin, unsigned end) {
    const Fiber& first = *fibers[begin];
    for (unsigned i = begin; i < end; ++i) {
      Fiber& fiber = *fibers[i];
      if (fiber.line != first.line || std::string_view(fiber.operation) != first.operation) {
        fail("threads must meet at one place, but " + where(begin) + " and " + where(i));
      }
      fiber.wait = Wait::kNone;
      runnable.push_back(i);
    }
  }

  void start(unsigned thread);
  void run_group();
};

Machine machine;

void fiber_main() {
  Order::acquire(&machine.start_token);
  Call call = *machine.call;
  call.local = machine.current;
  machine.kernel->run(call);
  Order::release(&machine.end_token);
  machine.fibers[machine.current]->is_done = true;
  ++machine.n_done;
  machine.switch_to_main();
}

void Machine::start(unsigned thread) {
  Fiber& fiber = *fibers[thread];
  fiber.wait = Wait::kNone;
  fiber.is_done = false;
#ifdef EMULATOR_TSAN
  if (fiber.sanitizer == nullptr) {
    fiber.sanitizer = __tsan_create_fiber(0);
  }
#endif
  // Six registers, the function to return to, and a slot that aligns the stack as a call would.
  void** top = reinterpret_cast<void**>(fiber.stack + kStackBytes) - 8;
  std::fill(top, top + 8, nullptr);
  top[6] = reinterpret_cast<void*>(&fiber_main);
  fiber.stack_pointer = top;
}

void Machine::run_group() {
  ++group_serial;
  n_group_bytes = 0;
  n_done = 0;
  n_at_barrier = 0;
  std::fill(n_in_exchange.begin(), n_in_exchange.end(), 0);
  std::fill(turn.begin(), turn.end(), 0);
  std::fill(n_barriers.begin(), n_barriers.end(), 0);
  runnable.clear();
  for (unsigned i = 0; i < n_threads; ++i) {
    start(i);
    runnable.push_back(i);
  }
  Order::release(&start_token);
  while (!runnable.empty() && error.empty()) {
    std::swap(runnable[random() % runnable.size()], runnable.back());
    const unsigned thread = runnable.back();
    runnable.pop_back();
    switch_to(thread);
  }
  Order::acquire(&end_token);
  if (error.empty() && n_done < n_threads) {
    unsigned waiting = 0;
    while (fibers[waiting]->wait == Wait::kNone) {
      ++waiting;
    }
    unsigned other = 0;
    while (other + 1 < n_threads &&
           (other == waiting ||
            (!fibers[other]->is_done && fibers[other]->line == fibers[waiting]->line))) {
      ++other;
    }
    fail("threads must meet at one place, but " + where(waiting) + " and " + where(other));
  }
}

std::map<std::string, Kernel, std::less<>>& kernels() {
  static std::map<std::string, Kernel, std::less<>> all;
  return all;
}

void wait_at(Wait wait, const char* operation, int line) {
  Fiber& fiber = *machine.fibers[machine.current];
  fiber.wait = wait;
  fiber.operation = operation;
  fiber.line = line;
}

}  // namespace

Registration::Registration(const char* name, std::vector<Declared> buffers,
                           void (*run)(const Call&)) {
  kernels()[name] = Kernel{name, std::move(buffers), run};
}

const Kernel* find(std::string_view name) {
  const auto found = kernels().find(name);
  return found == kernels().end() ? nullptr : &found->second;
}

Settings& settings() {
  static Settings current;
  return current;
}

void run(const Kernel& kernel, const Buffers& buffers, Size n_groups, Size group_size) {
  std::ostringstream problem;
  const unsigned n_threads = group_size.x * group_size.y;
  if (n_threads == 0 || n_threads > settings().max_threads) {
    problem << "a threadgroup must have 1 to " << settings().max_threads << " threads, got "
            << n_threads;
  } else if (buffers.size() != kernel.buffers.size()) {
    problem << "must be given " << kernel.buffers.size() << " buffers, got " << buffers.size();
  }
  for (std::size_t i = 0; i < buffers.size() && problem.str().empty(); ++i) {
    const Declared& declared = kernel.buffers[i];
    if (buffers[i].data() == nullptr) {
      problem << "buffer " << i << " must be bound";
    } else if (declared.n_bytes != 0 && buffers[i].size() != declared.n_bytes) {
      problem << "buffer " << i << " must have " << declared.n_bytes << " bytes, got "
              << buffers[i].size();
    } else if (reinterpret_cast<std::uintptr_t>(buffers[i].data()) % declared.alignment != 0) {
      problem << "buffer " << i << " must be aligned to " << declared.alignment << " bytes";
    }
  }
  if (!problem.str().empty()) {
    throw KernelError(kernel.name + ": " + problem.str());
  }
  Machine& m = machine;
  m.random.seed(settings().seed);
  m.kernel = &kernel;
  m.error.clear();
  m.n_threads = n_threads;
  const std::size_t n_simdgroups = (n_threads + kSimdWidth - 1) / kSimdWidth;
  m.n_in_exchange.assign(n_simdgroups, 0);
  m.lanes.resize(n_simdgroups);
  m.turn.assign(n_threads, 0);
  m.n_barriers.assign(n_threads, 0);
  m.simd_tokens.resize(n_simdgroups);
  while (m.fibers.size() < n_threads) {
    m.fibers.push_back(std::make_unique<Fiber>());
  }
#ifdef EMULATOR_TSAN
  m.main_sanitizer = __tsan_get_current_fiber();
#endif
  std::vector<Size> groups;
  for (unsigned y = 0; y < n_groups.y; ++y) {
    for (unsigned x = 0; x < n_groups.x; ++x) {
      groups.push_back({x, y});
    }
  }
  std::shuffle(groups.begin(), groups.end(), m.random);
  for (const Size group : groups) {
    Call call{buffers, n_groups, group_size, group, 0};
    m.call = &call;
    m.run_group();
    if (!m.error.empty()) {
      throw KernelError(m.error);
    }
  }
}

void threadgroup_barrier(bool publishes, int line) {
  Machine& m = machine;
  char* const token = &m.barrier_tokens[m.n_barriers[m.current]++ % 2];
  if (publishes) {
    Order::release(token);
  }
  wait_at(Wait::kBarrier, "threadgroup_barrier", line);
  if (++m.n_at_barrier == m.n_threads) {
    m.n_at_barrier = 0;
    m.release(0, m.n_threads);
  }
  m.switch_to_main();
  if (publishes) {
    Order::acquire(token);
  }
}

Lanes exchange(std::uint64_t word, const char* operation, int line) {
  Machine& m = machine;
  const unsigned thread = m.current;
  const unsigned simdgroup = thread / kSimdWidth;
  // The next exchange begins when all have come to it, so that this one's words are safe until
  // then.
  const unsigned turn = m.turn[thread]++ % 2;
  m.lanes[simdgroup][turn][thread % kSimdWidth] = word;
  wait_at(Wait::kSimd, operation, line);
  const unsigned first = m.first_of_simdgroup(thread);
  const unsigned end = m.end_of_simdgroup(thread);
  for (unsigned lane = end - first; lane < kSimdWidth; ++lane) {
    m.lanes[simdgroup][turn][lane] = kGarbage;
  }
  if (++m.n_in_exchange[simdgroup] == end - first) {
    m.n_in_exchange[simdgroup] = 0;
    m.release(first, end);
  }
  m.switch_to_main();
  return m.lanes[simdgroup][turn];
}

void simdgroup_barrier(bool publishes, int line) {
  Machine& m = machine;
  // It shares the turns of exchanges, of which it is one.
  char* const token = &m.simd_tokens[m.current / kSimdWidth][m.turn[m.current] % 2];
  if (publishes) {
    Order::release(token);
  }
  exchange(0, "simdgroup_barrier", line);
  if (publishes) {
    Order::acquire(token);
  }
}

void yield() {
  Machine& m = machine;
  if (m.random() % 4 == 0) {
    m.runnable.push_back(m.current);
    m.switch_to_main();
  }
}

unsigned lane() { return machine.current % kSimdWidth; }

// Not an access of a thread, so no sanitizer may see it: this file is built without.
void threadgroup_memory(void* memory, std::size_t n_bytes) {
  std::uint64_t& serial = machine.filled[memory];
  if (serial != machine.group_serial) {
    serial = machine.group_serial;
    machine.n_group_bytes += n_bytes;
    if (machine.n_group_bytes > kGroupBytes) {
      machine.fail("a threadgroup must have at most 32 KB of memory");
    }
    auto* const bytes = static_cast<volatile unsigned char*>(memory);
    for (std::size_t i = 0; i < n_bytes; ++i) {
      bytes[i] = kGarbage & 0xff;
    }
  }
}

}  // namespace emulator
