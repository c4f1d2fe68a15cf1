"""Plant bugs in the Metal kernels and their host, one in a copy, and see which check notices.

Works on copies of the tracked files under build/mutants, as many side by side as there are cores. Prints
a line for each bug with the rung that caught it; fails if one was caught by none, or could not be planted.
"""

from __future__ import annotations

import argparse
import os
import queue
import shutil
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
TREES = ROOT / "build" / "mutants"
BARRIER = "threadgroup_barrier(mem_flags::mem_threadgroup);"


@dataclass(frozen=True)
class Bug:
    """A text that is replaced, at its `nth` occurrence in a file."""

    name: str
    file: str
    old: str
    new: str
    nth: int = 0

    def planted(self, text: str) -> str | None:
        """Return the text of the file with the bug in it; None if its place is not found."""
        parts = text.split(self.old)
        if len(parts) < self.nth + 2:
            return None
        before, after = parts[: self.nth + 1], parts[self.nth + 1 :]
        return self.old.join(before) + self.new + self.old.join(after)


BUGS = (
    # What a reader of the sources sees
    Bug("buffer indices exchanged", "metal/quantize.metal", "steps [[buffer(1)]],  // (n_rows)\n                            device uchar* codes [[buffer(2)]]", "steps [[buffer(2)]],  // (n_rows)\n                            device uchar* codes [[buffer(1)]]"),
    Bug("buffer index twice", "metal/sparsify.metal", "device uint* totals [[buffer(1)]]", "device uint* totals [[buffer(0)]]"),
    Bug("parameter without attribute", "metal/sparsify.metal", "uint lane [[thread_index_in_simdgroup]]", "uint lane"),
    Bug("kernel not instantiated for half", "metal/sparsify.metal", "MILPRESS_INSTANTIATE(compact, half)", ""),
    Bug("output bound as constant", "metal/lut_assign.metal", "device uchar* codes [[buffer(2)]]", "constant uchar* codes [[buffer(2)]]"),
    Bug("threadgroup pointer declared as device", "metal/numeric.h", "threadgroup uint* totals", "device uint* totals"),
    Bug("pointer without address space", "metal/quantize.metal", "extremes_of_row(device const int* pieces", "extremes_of_row(const int* pieces"),
    Bug("variable of the program not constant", "metal/kmeans.metal", "constant constexpr uint kTile", "uint kTile"),
    Bug("double", "metal/kmeans.metal", "float distance = 0;", "double distance = 0;"),
    Bug("barrier that orders nothing", "metal/sparsify.metal", "mem_flags::mem_threadgroup", "mem_flags::mem_none"),
    Bug("barrier for the wrong memory", "metal/kmeans.metal", "mem_flags::mem_threadgroup", "mem_flags::mem_device", 1),
    Bug("contraction allowed", "metal/numeric.h", "#pragma METAL fp contract(off)\n", ""),
    Bug("write to an input", "metal/quantize.metal", "codes[i] = uchar(int(code_of", "weights[i] = T(0); codes[i] = uchar(int(code_of"),
    Bug("function of the standard library", "metal/quantize.metal", "return rint(quotient);", "return std::rint(quotient);"),
    # Meeting of threads
    Bug("no barrier after clearing the counters", "metal/sparsify.metal", BARRIER, "", 0),
    Bug("no barrier before reading the counters", "metal/sparsify.metal", BARRIER, "", 1),
    Bug("no barrier before adding up ties", "metal/sparsify.metal", BARRIER, "", 2),
    Bug("no barrier at the end of a round of the scan", "metal/sparsify.metal", BARRIER, "", 3),
    Bug("no barrier in the prefix sum", "metal/numeric.h", "metal::" + BARRIER.replace("(mem", "(metal::mem"), ""),
    Bug("no barrier before the tile is written again", "metal/kmeans.metal", BARRIER, "", 0),
    Bug("no barrier before the tile is read", "metal/kmeans.metal", BARRIER, "", 1),
    Bug("barrier that not all threads reach", "metal/sparsify.metal", "  " + BARRIER + "\n  if (local_i == 0)", "  if (lane == 0) {" + BARRIER + "}\n  if (local_i == 0)"),
    Bug("simdgroup operation that not all lanes reach", "metal/quantize.metal", "low = simd_min(low);", "if (lane < 16) low = simd_min(low);"),
    Bug("counter of a row not atomic", "metal/kmeans.metal", "atomic_fetch_add_explicit(&counts[bin], 1, memory_order_relaxed)", "atomic_store_explicit(&counts[bin], atomic_load_explicit(&counts[bin], memory_order_relaxed) + 1, memory_order_relaxed)"),
    Bug("counter replaced instead of raised", "metal/sparsify.metal", "atomic_fetch_add_explicit(&counts[digit], count", "atomic_store_explicit(&counts[digit], count"),
    Bug("counter of a threadgroup by plain writes", "metal/sparsify.metal", "atomic_fetch_add_explicit(&bins[bits & (kDigits - 1)], 1, memory_order_relaxed)", "((threadgroup uint*)bins)[bits & (kDigits - 1)] += 1"),
    Bug("two threads write the total", "metal/sparsify.metal", "if (local_i == 0) {\n    uint total", "if (local_i <= 1) {\n    uint total"),
    # Ends and indices
    Bug("one thread too many in lut_assign", "metal/lut_assign.metal", "i >= p.n_rows", "i > p.n_rows"),
    Bug("one thread too many in encode_rows", "metal/quantize.metal", "if (i >= p.n_rows * p.n_cols)", "if (i > p.n_rows * p.n_cols)"),
    Bug("eight codes where fewer are left", "metal/pack.metal", "min(8u, p.n_codes - first)", "8u"),
    Bug("one thread too many in count_halves", "metal/kmeans.metal", "i >= p.n_weights ||", "i > p.n_weights ||"),
    Bug("one row too many in fit_rows", "metal/quantize.metal", "if (row >= p.n_rows)", "if (row > p.n_rows)"),
    Bug("one piece too many", "metal/quantize.metal", "piece >= p.n_rows * p.n_pieces", "piece > p.n_rows * p.n_pieces"),
    Bug("last weight of a piece left out", "metal/quantize.metal", "j < end; j += kSimdWidth", "j + 1 < end; j += kSimdWidth"),
    Bug("last chunk left out", "metal/quantize.metal", "min(chunk + kChunk, piece_end)", "min(chunk + kChunk - 1, piece_end)"),
    Bug("last chunk left out of least squares", "metal/quantize.metal", "min(chunk + kChunk, piece_end)", "min(chunk + kChunk - 1, piece_end)", 1),
    Bug("last chunk left out of the final error", "metal/quantize.metal", "min(chunk + kChunk, piece_end)", "min(chunk + kChunk - 1, piece_end)", 2),
    Bug("last entry left out", "metal/kmeans.metal", "entry < p.n_entries", "entry + 1 < p.n_entries"),
    Bug("threadgroup memory too small", "metal/sparsify.metal", "kMaxSimdgroups = 32", "kMaxSimdgroups = 16"),
    Bug("threadgroup memory not cleared", "metal/sparsify.metal", "atomic_store_explicit(&bins[digit], 0, memory_order_relaxed);", ""),
    Bug("threadgroup memory beyond the limit", "metal/kmeans.metal", "kTile = 256", "kTile = 65536"),
    Bug("histograms of all rows in one", "metal/kmeans.metal", "(i / p.n_cols << 16) + weights[i]", "weights[i]"),
    Bug("table of the first row for all", "metal/lut_assign.metal", "thresholds + i / p.n_cols * p.table_size", "thresholds"),
    Bug("bit of the wrong lane", "metal/sparsify.metal", ">> lane & 1", ">> (lane ^ 1) & 1"),
    Bug("shift beyond the width", "metal/sparsify.metal", "if (bits >> kDigitBits == p.prefix)", "if (magnitude_bits(weights[i]) >> (p.shift + kDigitBits) == p.prefix)"),
    # Arithmetic
    Bug("entry above on a tie", "metal/lut_assign.metal", "- 1] < key", "- 1] <= key"),
    Bug("NaN above everything", "metal/lut_assign.metal", "if (magnitude > 0x7c00u)", "if (false)"),
    Bug("zeros that differ", "metal/lut_assign.metal", "int(magnitude) : -int(magnitude)", "int(magnitude) : -1 - int(magnitude)"),
    Bug("later of equals pruned first", "metal/sparsify.metal", "other == mine && j < place", "other == mine && j > place"),
    Bug("one tie too many pruned", "metal/sparsify.metal", "rank >= p.n_ties", "rank > p.n_ties"),
    Bug("zeros kept", "metal/sparsify.metal", "stays = rank >= n_dropped && mine != 0", "stays = rank >= n_dropped"),
    Bug("short run not filled up", "metal/sparsify.metal", "p.n - min(p.n, p.m - length)", "p.n"),
    Bug("ties between codes away from zero", "metal/quantize.metal", "rint(quotient) + float", "round(quotient) + float"),
    Bug("quotient not rounded to half", "metal/quantize.metal", "step.rounds_quotient != 0 ? round_quotient<T>(quotient) : quotient", "quotient"),
    Bug("error added up in half", "metal/quantize.metal", "float part = 0;", "half part = 0;"),
    Bug("fused multiplication", "metal/kmeans.metal", "const float square = difference * difference;\n      distance = distance + square;", "distance = fma(difference, difference, distance);"),
    Bug("first of equal errors not taken", "metal/quantize.metal", "best == kSimdWidth || other < least", "best == kSimdWidth || !(least < other)"),
    Bug("greatest magnitude of one side", "metal/quantize.metal", "const float limit = max(abs(found.low), abs(found.high));", "const float limit = abs(found.high);"),
    Bug("next scale below not tried", "metal/quantize.metal", "next_above<T>(nearest, -1)", "nearest"),
    Bug("next scale below but one", "metal/quantize.metal", "next_above<T>(nearest, -1)", "next_above<T>(nearest, -2)"),
    Bug("scale rounded down", "metal/quantize.metal", "const float nearest = round_to<T>(to_float(width / to_float64(p.code_max - p.code_min)));", "const float nearest = next_above<T>(round_to<T>(to_float(width / to_float64(p.code_max - p.code_min))), -1);"),
    Bug("wider scale not tried", "metal/quantize.metal", "wider,   next_above<T>(wider, 1)", "nearest, next_above<T>(wider, 1)"),
    Bug("next above the wider scale not tried", "metal/quantize.metal", "next_above<T>(wider, 1)", "wider"),
    Bug("last scale not tried", "metal/quantize.metal", "i < 6; ++i", "i < 5; ++i"),
    Bug("offset of a row of zeros in the middle", "metal/quantize.metal", "{1.0f, p.fits_offset != 0 ? clamp_code(0, p) : middle(p), 1}", "{1.0f, middle(p), 1}"),
    Bug("offset of a row of zeros beyond the codes", "metal/quantize.metal", "{1.0f, p.fits_offset != 0 ? clamp_code(0, p) : middle(p), 1}", "{1.0f, p.fits_offset != 0 ? 0 : middle(p), 1}"),
    Bug("range of a constant row not widened", "metal/quantize.metal", "if (is_finite(extremes.low) && is_finite(extremes.high)) {\n    extremes", "if (is_finite(extremes.low) && is_finite(extremes.high) && extremes.low != extremes.high) {\n    extremes"),
    Bug("no search in a constant row", "metal/quantize.metal", "(found.low != 0 || found.high != 0)", "found.low != found.high"),
    Bug("negative scales not tried", "metal/quantize.metal", "(is_positive || (down != up && p.code_min < 0))", "is_positive"),
    Bug("a turn of least squares too few", "metal/quantize.metal", "kTurns = 2", "kTurns = 1"),
    Bug("doubles that round ties up", "metal/float64.h", "rest > 4 || (rest == 4 && (kept & 1) != 0)", "rest >= 4"),
    Bug("doubles that forget what was shifted out", "metal/float64.h", "(smaller << (64 - distance) != 0 ? 1 : 0)", "0"),
    Bug("subnormal floats that become zero", "metal/float64.h", "if (magnitude < 0x800000) {", "if (magnitude < 0x800000) { return Float64{sign};"),
    # The host
    Bug("no commit", "csrc/metal/runtime.cpp", "state_->buffer->commit();", ""),
    Bug("no wait", "csrc/metal/runtime.cpp", "state_->buffer->waitUntilCompleted();", ""),
    Bug("no endEncoding", "csrc/metal/runtime.cpp", "      encoder->endEncoding();", ""),
    Bug("no endEncoding if nothing runs", "csrc/metal/runtime.cpp", "Commands::~Commands() { state_->end(); }", "Commands::~Commands() = default;"),
    Bug("leak of a function", "csrc/metal/runtime.cpp", "NS::TransferPtr(library_->newFunction", "NS::RetainPtr(library_->newFunction"),
    Bug("leak of a pipeline", "csrc/metal/runtime.cpp", "NS::TransferPtr(device()->newComputePipelineState", "NS::RetainPtr(device()->newComputePipelineState"),
    Bug("leak of every buffer", "csrc/metal/runtime.cpp", "static_cast<MTL::Buffer*>(handle)->release();", "(void)handle;"),
    Bug("release of what is not owned", "csrc/metal/runtime.cpp", "NS::RetainPtr(buffer)", "NS::TransferPtr(buffer)"),
    Bug("autorelease without a pool", "csrc/metal/runtime.cpp", "  const Pool pool;\n  MTL::CommandBuffer* const buffer", "  MTL::CommandBuffer* const buffer"),
    Bug("fast math", "csrc/metal/runtime.cpp", "options->setFastMathEnabled(false);", ""),
    Bug("no options for the compiler", "csrc/metal/runtime.cpp", "options.get(), &error", "nullptr, &error"),
    Bug("one buffer not bound", "csrc/metal/runtime.cpp", "for (const Buffer* buffer : buffers) {", "for (const Buffer* buffer : buffers) {\n    if (index == 1) { ++index; continue; }"),
    Bug("parameters bound one too far", "csrc/metal/runtime.cpp", "params.size(), index)", "params.size(), index + 1)"),
    Bug("groups and threads exchanged", "csrc/metal/runtime.cpp", "MTL::Size::Make(grid.n_groups, grid.n_groups_y, 1),\n                                MTL::Size::Make(grid.group_size, 1, 1)", "MTL::Size::Make(grid.group_size, 1, 1),\n                                MTL::Size::Make(grid.n_groups, grid.n_groups_y, 1)"),
    Bug("grid rounded down", "csrc/metal/runtime.cpp", "return {(n_threads + size - 1) / size, size};", "return {std::max<std::size_t>(1, n_threads / size), size};"),
    Bug("memory taken that is no page", "csrc/metal/runtime.cpp", "address % kPageBytes != 0 || ", ""),
    Bug("failure of the GPU not looked at", "csrc/metal/runtime.cpp", "!= MTL::CommandBufferStatusCompleted", "== MTL::CommandBufferStatusNotEnqueued"),
    Bug("width of a simdgroup not looked at", "csrc/metal/runtime.cpp", "pipeline->threadExecutionWidth() != kSimdWidth", "false"),
    Bug("old GPUs taken", "csrc/metal/runtime.cpp", "!device_->supportsFamily(kLeastFamily)", "false"),
    Bug("the compiler's log dropped", "csrc/metal/runtime.cpp", '"the kernels did not compile: " + reason_of(error)', '"the kernels did not compile"'),
    Bug("groups of odd sizes", "csrc/metal/runtime.cpp", "std::min(wanted, most) / kSimdWidth * kSimdWidth", "std::min(wanted, most)"),
    Bug("counters of the digits not cleared", "csrc/metal/sparsify.cpp", "    counts.fill_with_zeros();\n    Commands commands;\n    commands.add(kernel, grid, {&in, &counts}", "    Commands commands;\n    commands.add(kernel, grid, {&in, &counts}"),
    Bug("histograms not cleared", "csrc/metal/kmeans1d.cpp", "    counts.fill_with_zeros();", "", 0),
    Bug("queue without the lock", "csrc/metal/runtime.cpp", "    const std::lock_guard lock(mutex_);\n", "", 0),
    Bug("kernels without the lock", "csrc/metal/runtime.cpp", "    const std::lock_guard lock(mutex_);\n", "", 1),
    Bug("as many rows in the last batch as in the others", "csrc/metal/kmeans1d.cpp", "std::min(at_once, weights.n_rows - first)", "at_once"),
    Bug("weights of the first batch for all", "csrc/metal/kmeans1d.cpp", "std::span<const Half>(weights.row(first)", "std::span<const Half>(weights.row(0)"),
    Bug("mask of the first batch for all", "csrc/metal/kmeans1d.cpp", "importance.row(first).data()", "importance.row(0).data()"),
    Bug("tables of the first batch for all", "csrc/metal/kmeans1d.cpp", "{luts.row(first + row)", "{luts.row(row)"),
    Bug("row of another batch where all importance is 0", "csrc/metal/kmeans1d.cpp", "{weights.row(first + row)", "{weights.row(row)"),
    Bug("counts that a float does not hold", "csrc/metal/kmeans1d.cpp", "kExact = 1U << 24", "kExact = 1U << 25"),
    Bug("counts cut off at 2^24", "csrc/metal/kmeans1d.cpp", "left -= part;", "left = 0;"),
    Bug("inputs exchanged", "csrc/metal/sparsify.cpp", "{&in, &ties, &words}", "{&ties, &in, &words}"),
    Bug("no scan of the totals", "csrc/metal/sparsify.cpp", "  add_scan(commands, kept, grid.n_groups);\n", ""),
    Bug("last word of the bitmask left out", "csrc/metal/sparsify.cpp", "return (n_weights + kSimdWidth - 1) / kSimdWidth;", "return std::max<std::size_t>(1, n_weights / kSimdWidth);"),
    Bug("last digit of floats left out", "csrc/metal/sparsify.cpp", "sizeof(T) == 2 ? 2 : 3", "2"),
    Bug("table not a whole tree", "csrc/metal/lut_assign.cpp", "table_size = 2 * table_size + 1;", "table_size = luts.n_cols - 1;"),
    Bug("offsets not copied back", "csrc/metal/quantize.cpp", "  copy_out(offset_of, offsets);\n", ""),
    Bug("sizes beyond 32 bits taken", "csrc/metal/launch.h", "if (n >= kMaxElements)", "if (false)"),
    Bug("importance taken for a mask", "csrc/metal/kmeans1d.cpp", "share != 0 && share != 1", "share < 0"),
    Bug("parameters of another size", "csrc/metal/sparsify.cpp", "{&in, &words}, params);", "{&in, &words}, params.n);"),
)  # fmt: skip


QUICK = {"MILPRESS_METAL_QUICK": "1", "MILPRESS_NUM_THREADS": "1"}
ASAN = {**QUICK, "ASAN_OPTIONS": "detect_stack_use_after_return=0:detect_leaks=0"}
FAULTS = ("old_gpu", "no_compile", "wide_simd", "small_groups", "gpu_error", "no_commands")


@dataclass(frozen=True)
class Tree:
    """A copy of the tracked files, with a build of its own."""

    path: Path
    compiler: str

    def fill(self) -> None:
        """Copy what has changed since the last time."""
        listed = subprocess.run(
            ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.split()
        for name in listed:
            target = self.path / name
            content = (ROOT / name).read_bytes()
            if not target.exists() or target.read_bytes() != content:
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(ROOT / name, target)

    def run(self, command: list[str], **environment: str) -> bool:
        """Return whether a command succeeds in the tree."""
        done = subprocess.run(
            command,
            cwd=self.path,
            env={**os.environ, **environment},
            capture_output=True,
            check=False,
            timeout=900,
        )
        return done.returncode == 0

    def built(self, target: str) -> bool:
        """Return whether a test compiles."""
        return self.run(["cmake", "--build", "build/metal", "--target", target])

    def rung(self, file: str = "") -> str:
        """Return the first rung that fails; empty if none does. Those that don't see the file are left out."""
        if file.endswith("runtime.cpp"):
            return self.host_rung()
        tests = "build/metal/tests/metal/metal_tests"
        check = [sys.executable, "tests/metal/check_sources.py", "metal"]
        if not self.run([*check, "--compiler", self.compiler]):
            return "sources"
        if not self.built("metal_tests"):
            return "C++ compiler"
        emulated = [tests, "--abort-after=1"]
        if not self.run(emulated, **QUICK) or not self.run(emulated):
            return "emulator"
        if not self.built("metal_tests_asan") or not self.run([f"{tests}_asan"], **ASAN):
            return "address and undefined behaviour sanitizers"
        if not self.built("metal_tests_tsan"):
            return "C++ compiler"
        if not self.run([f"{tests}_tsan"], **QUICK, MILPRESS_EMULATOR_THREADS="64"):
            return "thread sanitizer"
        return self.host_rung()

    def host_rung(self) -> str:
        """Return the first that fails of the rungs that run the host as it ships."""
        host = "build/metal/tests/metal/metal_host_tests"
        if not self.built("metal_host_tests"):
            return "C++ compiler, host"
        if not self.run([host], **ASAN):
            return "fake runtime"
        for fault in FAULTS:
            only = ["--no-skip", "--test-case=what fails is said"]
            if not self.run([host, *only], **ASAN, FAKE_METAL_FAULT=fault):
                return f"fake runtime, {fault}"
        threads = "build/metal/tests/metal/metal_threads_tests"
        if not self.built("metal_threads_tests"):
            return "C++ compiler, host"
        if not self.run([threads, "--source-file=*test_threads.cpp"]):
            return "fake runtime, thread sanitizer"
        return ""

    def rung_of(self, bug: Bug) -> str | None:
        """Plant a bug and return the rung that catches it; None if its place is not found."""
        path = self.path / bug.file
        text = path.read_text()
        planted = bug.planted(text)
        if planted is None:
            return None
        path.write_text(planted)
        try:
            return self.rung(bug.file)
        except subprocess.TimeoutExpired:
            return "time-out"
        finally:
            path.write_text(text)


def main() -> int:
    """Plant each bug."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--metal-cpp")
    parser.add_argument("--compiler", default="clang++-19")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="bugs at a time")
    parser.add_argument("--only", default="", help="bugs whose name holds this")
    parser.add_argument("--first", type=int, default=0, help="how many bugs to pass over")
    parser.add_argument("--places", action="store_true", help="only look for the bugs' places")
    arguments = parser.parse_args()
    lost = [bug.name for bug in BUGS if bug.planted((ROOT / bug.file).read_text()) is None]
    if lost or arguments.places:
        print("\n".join([*lost, f"{len(BUGS)} bugs, the places of {len(lost)} not found"]))
        return 1 if lost else 0
    trees: queue.SimpleQueue[Tree] = queue.SimpleQueue()

    def prepare(i: int) -> str:
        tree = Tree(TREES / str(i), arguments.compiler)
        tree.fill()
        configure = ["cmake", "--preset", "metal", "-DMILPRESS_WERROR=OFF"]
        if not tree.run([*configure, f"-DMILPRESS_METAL_CPP_DIR={arguments.metal_cpp}"]):
            return "configuration"
        trees.put(tree)
        return tree.rung()

    def plant(bug: Bug) -> str | None:
        tree = trees.get()
        started = time.monotonic()
        caught = tree.rung_of(bug)
        trees.put(tree)
        found = "NOT PLANTED" if caught is None else caught or "MISSED"
        print(f"{found:<44} {bug.name} ({time.monotonic() - started:.0f} s)", flush=True)
        return caught

    with ThreadPoolExecutor(arguments.jobs) as pool:
        for failed in pool.map(prepare, range(arguments.jobs)):
            if failed:
                print(f"without a bug, all must pass, got a failure of: {failed}")
                return 1
        bugs = [bug for bug in BUGS[arguments.first :] if arguments.only in bug.name]
        missed = sum(not caught for caught in pool.map(plant, bugs))
    print(f"{len(bugs)} bugs, {missed} missed")
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
