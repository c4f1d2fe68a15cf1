// A little of Apple's Objective-C runtime, Foundation and Metal: enough for csrc/metal/runtime.cpp,
// which is compiled as it is, with Apple's own metal-cpp. Objects count their references, work
// waits for the command buffer to be waited for, and kernels run on the emulator. It behaves as
// Apple's documentation says, in our reading; a use that the documentation forbids ends the
// process.
//
// FAKE_METAL_FAULT=<word> lets something fail, see `fault`.

#include <objc/message.h>
#include <objc/runtime.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <string_view>
#include <thread>
#include <utility>
#include <vector>

#include "emulator/emulator.h"

#ifndef __x86_64__
#error "messages are sent in the assembly language of x86-64"
#endif

namespace {

constexpr std::size_t kPageBytes = 16'384;
constexpr unsigned long kErrorStatus = 5;
constexpr unsigned long kCompletedStatus = 4;

[[noreturn]] void refuse(const std::string& what) {
  std::fprintf(stderr, "fake Metal: %s\n", what.c_str());
  std::fflush(stderr);
  _exit(97);
}

// no_device, old_gpu, no_compile, no_function, no_pipeline, wide_simd, small_groups, no_buffer,
// no_queue, no_commands, gpu_error
bool fault(std::string_view name) {
  const char* const wanted = std::getenv("FAKE_METAL_FAULT");
  return wanted != nullptr && name == wanted;
}

// ---------------------------------------------------------------------------------------------
// Objects

// What metal-cpp takes for a pointer to an object, and never looks into. One with a class name is
// itself a class.
struct Object {
  const char* kind;
  std::atomic<long> references = 1;
  std::string class_name;  // of a class object

  explicit Object(const char* name) : kind(name) {}
  virtual ~Object() = default;
  virtual void on_death() {}
};

// A lock that the thread sanitizer doesn't see where this file is built without: that threads came
// to the fake one after the other must not pass for an order that the host has made.
class Lock {
 public:
  void lock() {
    while (is_taken_.test_and_set(std::memory_order_acquire)) {
      std::this_thread::yield();
    }
  }
  void unlock() { is_taken_.clear(std::memory_order_release); }

 private:
  std::atomic_flag is_taken_;
};

struct Registry {
  std::set<const Object*> living;
  Lock mutex;
  inline static thread_local std::vector<std::vector<Object*>> pools;  // each thread has its own

  static Registry& instance() {
    static auto* const registry = new Registry;  // outlives what static destructors release
    return *registry;
  }
};

void check_leaks() {
  std::map<std::string, int> counts;
  for (const Object* object : Registry::instance().living) {
    ++counts[object->kind];
  }
  if (!counts.empty()) {
    std::string list;
    for (const auto& [kind, count] : counts) {
      list += " " + kind + " x" + std::to_string(count);
    }
    refuse("leaked" + list);
  }
}

Object* object_of(void* self) { return static_cast<Object*>(self); }

template <typename T, typename... Args>
T* make(Args&&... args) {
  T* const object = new T(std::forward<Args>(args)...);
  Registry& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  registry.living.insert(object);
  return object;
}

void check_living(Object* object, const char* selector) {
  Registry& registry = Registry::instance();
  const std::lock_guard lock(registry.mutex);
  if (object->class_name.empty() && !registry.living.contains(object)) {
    refuse(std::string(selector) + " was sent to a dead object");
  }
}

void retain(Object* object) { ++object->references; }

void release(Object* object) {
  if (--object->references == 0) {
    object->on_death();
    Registry& registry = Registry::instance();
    const std::lock_guard lock(registry.mutex);
    registry.living.erase(object);
    // The memory stays, so that a message to a dead object is seen.
  }
}

template <typename T>
T* autoreleased(T* object) {
  Registry& registry = Registry::instance();
  if (registry.pools.empty()) {
    refuse(std::string(object->kind) + " was autoreleased without a pool");
  }
  registry.pools.back().push_back(object);
  return object;
}

struct PoolObject : Object {
  std::size_t depth;
  PoolObject() : Object("NSAutoreleasePool") {
    Registry& registry = Registry::instance();
    registry.pools.emplace_back();
    depth = registry.pools.size();
  }
  void on_death() override {
    Registry& registry = Registry::instance();
    if (registry.pools.size() != depth) {
      refuse("autorelease pools must be released in the order opposite to that of their making");
    }
    const std::vector<Object*> objects = std::move(registry.pools.back());
    registry.pools.pop_back();
    std::for_each(objects.begin(), objects.end(), release);
  }
};

struct StringObject : Object {
  std::string text;
  explicit StringObject(std::string words) : Object("NSString"), text(std::move(words)) {}
};

struct ErrorObject : Object {
  std::string reason;
  explicit ErrorObject(std::string words) : Object("NSError"), reason(std::move(words)) {}
};

struct OptionsObject : Object {
  bool fast_math = true;
  OptionsObject() : Object("MTLCompileOptions") {}
};

struct DeviceObject : Object {
  DeviceObject() : Object("MTLDevice") {}
};

struct LibraryObject : Object {
  std::string source;
  explicit LibraryObject(std::string text) : Object("MTLLibrary"), source(std::move(text)) {}
};

struct FunctionObject : Object {
  const emulator::Kernel* kernel;
  explicit FunctionObject(const emulator::Kernel* found) : Object("MTLFunction"), kernel(found) {}
};

struct PipelineObject : Object {
  const emulator::Kernel* kernel;
  explicit PipelineObject(const emulator::Kernel* found)
      : Object("MTLComputePipelineState"), kernel(found) {}
};

struct BufferObject : Object {
  std::byte* bytes;
  std::size_t n_bytes;
  bool owns;
  BufferObject(std::byte* memory, std::size_t size, bool owner)
      : Object("MTLBuffer"), bytes(memory), n_bytes(size), owns(owner) {}
  void on_death() override {
    if (owns) {
      std::free(bytes);
    }
  }
};

struct Size3 {
  unsigned long width;
  unsigned long height;
  unsigned long depth;
};

struct Dispatch {
  PipelineObject* pipeline;
  std::map<unsigned long, BufferObject*> buffers;
  std::map<unsigned long, std::vector<std::byte>> bytes;
  Size3 n_groups;
  Size3 group_size;
};

struct CommandBufferObject : Object {
  std::vector<Dispatch> dispatches;
  std::vector<Object*> kept;  // what commands refer to lives until they have run
  bool has_open_encoder = false;
  bool is_committed = false;
  bool is_done = false;
  std::string error;
  CommandBufferObject() : Object("MTLCommandBuffer") {}

  void keep(Object* object) {
    retain(object);
    kept.push_back(object);
  }
  void let_go() {
    std::for_each(kept.begin(), kept.end(), release);
    kept.clear();
  }
  void on_death() override {
    if (is_committed && !is_done) {
      refuse("a command buffer was let go before its work was done");
    }
    let_go();
  }
  void execute();
};

struct EncoderObject : Object {
  CommandBufferObject* commands;
  PipelineObject* pipeline = nullptr;
  std::map<unsigned long, BufferObject*> buffers;
  std::map<unsigned long, std::vector<std::byte>> bytes;
  bool has_ended = false;
  explicit EncoderObject(CommandBufferObject* owner)
      : Object("MTLComputeCommandEncoder"), commands(owner) {
    retain(owner);
  }
  void on_death() override {
    if (!has_ended) {
      refuse("an encoder was let go before endEncoding");
    }
    release(commands);
  }
  void check_open() const {
    if (has_ended) {
      refuse("an encoder was used after endEncoding");
    }
  }
};

struct QueueObject : Object {
  QueueObject() : Object("MTLCommandQueue") {}
};

void CommandBufferObject::execute() {
  static std::mutex one_at_a_time;  // the emulator runs on one thread
  const std::lock_guard lock(one_at_a_time);
  for (const Dispatch& dispatch : dispatches) {
    const emulator::Kernel& kernel = *dispatch.pipeline->kernel;
    std::vector<std::vector<std::byte>> params(kernel.buffers.size());
    emulator::Buffers buffers(kernel.buffers.size());
    for (const auto& [index, buffer] : dispatch.buffers) {
      if (index >= buffers.size()) {
        refuse(kernel.name + " has no buffer " + std::to_string(index));
      }
      buffers[index] = {buffer->bytes, buffer->n_bytes};
    }
    for (const auto& [index, bytes] : dispatch.bytes) {
      if (index >= buffers.size()) {
        refuse(kernel.name + " has no buffer " + std::to_string(index));
      }
      params[index] = bytes;
      buffers[index] = params[index];
    }
    try {
      emulator::run(kernel, buffers,
                    {static_cast<unsigned>(dispatch.n_groups.width),
                     static_cast<unsigned>(dispatch.n_groups.height)},
                    {static_cast<unsigned>(dispatch.group_size.width),
                     static_cast<unsigned>(dispatch.group_size.height)});
    } catch (const emulator::KernelError& problem) {
      refuse(problem.what());
    }
  }
  is_done = true;
  let_go();
}

// ---------------------------------------------------------------------------------------------
// Methods

using Method = void (*)();

template <typename T>
T* as(void* self) {
  return static_cast<T*>(object_of(self));
}

void* ns_retain(void* self, SEL) {
  retain(object_of(self));
  return self;
}
void ns_release(void* self, SEL) { release(object_of(self)); }
void* ns_autorelease(void* self, SEL) { return autoreleased(object_of(self)); }
void* ns_init(void* self, SEL) { return self; }
bool ns_responds(void*, SEL, SEL) { return true; }

void* pool_alloc(void*, SEL) { return make<PoolObject>(); }
void* options_alloc(void*, SEL) { return make<OptionsObject>(); }

void* string_with(void*, SEL, const char* text, unsigned long encoding) {
  constexpr unsigned long kUtf8 = 4;
  if (encoding != kUtf8) {
    refuse("strings must be UTF-8");
  }
  return autoreleased(make<StringObject>(text));
}
const char* string_text(void* self, SEL) { return as<StringObject>(self)->text.c_str(); }

void* error_description(void* self, SEL) {
  return autoreleased(make<StringObject>(as<ErrorObject>(self)->reason));
}

void set_fast_math(void* self, SEL, bool on) { as<OptionsObject>(self)->fast_math = on; }

void* device_name(void*, SEL) { return autoreleased(make<StringObject>("fake M1")); }
bool device_supports(void*, SEL, long family) {
  constexpr long kApple7 = 1007;
  return family <= kApple7 && !fault("old_gpu");
}
void* device_queue(void*, SEL) { return fault("no_queue") ? nullptr : make<QueueObject>(); }

void* failed(void** error, const char* reason) {
  if (error != nullptr) {
    *error = autoreleased(make<ErrorObject>(reason));
  }
  return nullptr;
}

void* device_library(void*, SEL, void* source, void* options, void** error) {
  if (fault("no_compile")) {
    return failed(error, "program_source:7:9: error: unknown type name 'hafl'");
  }
  if (options == nullptr || as<OptionsObject>(options)->fast_math) {
    refuse("fast math must be off");
  }
  return make<LibraryObject>(as<StringObject>(source)->text);
}

// Whether the source has the kernel that the emulator knows by that name.
bool defines(const std::string& source, const std::string& name) {
  if (source.find("[[kernel]] void " + name + "(") != std::string::npos) {
    return true;
  }
  const std::size_t cut = name.rfind('_');
  return cut != std::string::npos &&
         source.find("\nMILPRESS_INSTANTIATE(" + name.substr(0, cut) + ", " + name.substr(cut + 1) +
                     ")") != std::string::npos;
}

void* library_function(void* self, SEL, void* name) {
  const std::string& text = as<StringObject>(name)->text;
  const emulator::Kernel* const kernel = emulator::find(text);
  if (kernel == nullptr || !defines(as<LibraryObject>(self)->source, text) ||
      fault("no_function")) {
    return nullptr;
  }
  return make<FunctionObject>(kernel);
}

void* device_pipeline(void*, SEL, void* function, void** error) {
  if (fault("no_pipeline")) {
    return failed(error, "too many registers");
  }
  return make<PipelineObject>(as<FunctionObject>(function)->kernel);
}

unsigned long pipeline_threads(void*, SEL) {
  return fault("small_groups") ? 16 : emulator::settings().max_threads;
}
unsigned long pipeline_width(void*, SEL) { return fault("wide_simd") ? 64 : 32; }

void* device_buffer(void*, SEL, unsigned long n_bytes, unsigned long options) {
  if (options != 0) {
    refuse("buffers must be shared");
  }
  if (n_bytes == 0 || fault("no_buffer")) {
    return nullptr;
  }
  auto* const bytes = static_cast<std::byte*>(std::malloc(n_bytes));
  std::memset(bytes, 0xfb, n_bytes);
  return make<BufferObject>(bytes, n_bytes, true);
}

void* device_buffer_of(void*, SEL, void* memory, unsigned long n_bytes, unsigned long options,
                       void* deallocator) {
  if (options != 0 || deallocator != nullptr) {
    refuse("memory must be shared and stay its owner's");
  }
  if (reinterpret_cast<std::uintptr_t>(memory) % kPageBytes != 0 || n_bytes % kPageBytes != 0 ||
      n_bytes == 0) {
    return nullptr;
  }
  return make<BufferObject>(static_cast<std::byte*>(memory), n_bytes, false);
}

void* buffer_contents(void* self, SEL) { return as<BufferObject>(self)->bytes; }

void* queue_commands(void*, SEL) {
  return fault("no_commands") ? nullptr : autoreleased(make<CommandBufferObject>());
}

void* commands_encoder(void* self, SEL) {
  auto* const commands = as<CommandBufferObject>(self);
  if (commands->has_open_encoder || commands->is_committed) {
    refuse("a command buffer must have one encoder at a time, and none once it is committed");
  }
  commands->has_open_encoder = true;
  return autoreleased(make<EncoderObject>(commands));
}

void commands_commit(void* self, SEL) {
  auto* const commands = as<CommandBufferObject>(self);
  if (commands->has_open_encoder) {
    refuse("endEncoding must come before commit");
  }
  if (commands->is_committed) {
    refuse("a command buffer must be committed once");
  }
  commands->is_committed = true;
}

void commands_wait(void* self, SEL) {
  auto* const commands = as<CommandBufferObject>(self);
  if (!commands->is_committed) {
    refuse("a command buffer must be committed before it is waited for");
  }
  if (fault("gpu_error")) {
    commands->error = "the GPU was reset";
    commands->is_done = true;
    commands->let_go();
  } else if (!commands->is_done) {
    commands->execute();
  }
}

unsigned long commands_status(void* self, SEL) {
  auto* const commands = as<CommandBufferObject>(self);
  return !commands->error.empty() ? kErrorStatus : commands->is_done ? kCompletedStatus : 2;
}
void* commands_error(void* self, SEL) {
  const std::string& reason = as<CommandBufferObject>(self)->error;
  return reason.empty() ? nullptr : autoreleased(make<ErrorObject>(reason));
}
double commands_time(void*, SEL) { return 0; }

void encoder_pipeline(void* self, SEL, void* pipeline) {
  auto* const encoder = as<EncoderObject>(self);
  encoder->check_open();
  encoder->pipeline = as<PipelineObject>(pipeline);
  encoder->commands->keep(encoder->pipeline);
  // Metal leaves what was bound before. We want each dispatch to bind all that it needs.
  encoder->buffers.clear();
  encoder->bytes.clear();
}

void encoder_buffer(void* self, SEL, void* buffer, unsigned long offset, unsigned long index) {
  auto* const encoder = as<EncoderObject>(self);
  encoder->check_open();
  if (buffer == nullptr || offset != 0) {
    refuse("buffers must be bound from their beginning");
  }
  check_living(object_of(buffer), "setBuffer");
  encoder->buffers[index] = as<BufferObject>(buffer);
  encoder->commands->keep(object_of(buffer));
}

void encoder_bytes(void* self, SEL, const void* bytes, unsigned long length, unsigned long index) {
  constexpr unsigned long kMost = 4096;
  auto* const encoder = as<EncoderObject>(self);
  encoder->check_open();
  if (length == 0 || length > kMost) {
    refuse("setBytes must be given 1 to 4096 bytes");
  }
  const auto* const first = static_cast<const std::byte*>(bytes);
  encoder->bytes[index].assign(first, first + length);
}

// The sizes come on the stack, as structs of this size do.
void encoder_dispatch(void* self, SEL, Size3 n_groups, Size3 group_size) {
  auto* const encoder = as<EncoderObject>(self);
  encoder->check_open();
  if (encoder->pipeline == nullptr) {
    refuse("a pipeline must be set before a dispatch");
  }
  const unsigned long n_threads = group_size.width * group_size.height * group_size.depth;
  if (n_threads == 0 || n_threads > emulator::settings().max_threads || group_size.depth != 1 ||
      n_groups.depth != 1) {
    refuse("threadgroups must have 1 to as many threads as the pipeline allows");
  }
  if (n_groups.width * n_groups.height == 0) {
    refuse("a dispatch must have threadgroups");
  }
  encoder->commands->dispatches.push_back(
      {encoder->pipeline, encoder->buffers, encoder->bytes, n_groups, group_size});
}

void encoder_end(void* self, SEL) {
  auto* const encoder = as<EncoderObject>(self);
  encoder->check_open();
  encoder->has_ended = true;
  encoder->commands->has_open_encoder = false;
}

template <typename Function>
Method method(Function* function) {
  return reinterpret_cast<Method>(function);
}

using Methods = std::map<std::string, Method, std::less<>>;

const std::map<std::string, Methods, std::less<>>& classes() {
  static const auto* const all = new std::map<std::string, Methods, std::less<>>{
      {"+NSAutoreleasePool", {{"alloc", method(pool_alloc)}}},
      {"+MTLCompileOptions", {{"alloc", method(options_alloc)}}},
      {"+NSString", {{"stringWithCString:encoding:", method(string_with)}}},
      {"NSObject",
       {{"retain", method(ns_retain)},
        {"release", method(ns_release)},
        {"autorelease", method(ns_autorelease)},
        {"init", method(ns_init)},
        {"respondsToSelector:", method(ns_responds)}}},
      {"NSString", {{"UTF8String", method(string_text)}}},
      {"NSError", {{"localizedDescription", method(error_description)}}},
      {"MTLCompileOptions", {{"setFastMathEnabled:", method(set_fast_math)}}},
      {"MTLDevice",
       {{"name", method(device_name)},
        {"supportsFamily:", method(device_supports)},
        {"newCommandQueue", method(device_queue)},
        {"newLibraryWithSource:options:error:", method(device_library)},
        {"newComputePipelineStateWithFunction:error:", method(device_pipeline)},
        {"newBufferWithLength:options:", method(device_buffer)},
        {"newBufferWithBytesNoCopy:length:options:deallocator:", method(device_buffer_of)}}},
      {"MTLLibrary", {{"newFunctionWithName:", method(library_function)}}},
      {"MTLFunction", {}},
      {"MTLComputePipelineState",
       {{"maxTotalThreadsPerThreadgroup", method(pipeline_threads)},
        {"threadExecutionWidth", method(pipeline_width)}}},
      {"MTLBuffer", {{"contents", method(buffer_contents)}}},
      {"MTLCommandQueue", {{"commandBuffer", method(queue_commands)}}},
      {"MTLCommandBuffer",
       {{"computeCommandEncoder", method(commands_encoder)},
        {"commit", method(commands_commit)},
        {"waitUntilCompleted", method(commands_wait)},
        {"status", method(commands_status)},
        {"error", method(commands_error)},
        {"GPUStartTime", method(commands_time)},
        {"GPUEndTime", method(commands_time)}}},
      {"MTLComputeCommandEncoder",
       {{"setComputePipelineState:", method(encoder_pipeline)},
        {"setBuffer:offset:atIndex:", method(encoder_buffer)},
        {"setBytes:length:atIndex:", method(encoder_bytes)},
        {"dispatchThreadgroups:threadsPerThreadgroup:", method(encoder_dispatch)},
        {"endEncoding", method(encoder_end)}}},
  };
  return *all;
}

// A message to nil does nothing and returns zero, in both kinds of registers.
asm(R"(
  .text
  .globl fake_nil_method
  .type fake_nil_method, @function
fake_nil_method:
  xorl %eax, %eax
  pxor %xmm0, %xmm0
  ret
  .size fake_nil_method, .-fake_nil_method
)");

}  // namespace

extern "C" {

void fake_nil_method();

// The function for a message; called by objc_msgSend with the message's own registers put aside.
__attribute__((used)) Method fake_method_for(void* self, SEL selector) {
  const char* const name = reinterpret_cast<const char*>(selector);
  if (self == nullptr) {
    return fake_nil_method;
  }
  Object* const object = object_of(self);
  check_living(object, name);
  const std::string kind = object->class_name.empty() ? object->kind : "+" + object->class_name;
  for (const std::string& where : {kind, std::string("NSObject")}) {
    const auto methods = classes().find(where);
    if (methods != classes().end()) {
      const auto found = methods->second.find(name);
      if (found != methods->second.end()) {
        return found->second;
      }
    }
  }
  refuse(kind + " does not respond to " + name);
}

// Finds the method, with all registers that hold arguments kept, and jumps there.
asm(R"(
  .text
  .globl objc_msgSend
  .type objc_msgSend, @function
  .globl objc_msgSend_fpret
  .type objc_msgSend_fpret, @function
objc_msgSend:
objc_msgSend_fpret:
  pushq %rbp
  movq %rsp, %rbp
  subq $176, %rsp
  movq %rdi, (%rsp)
  movq %rsi, 8(%rsp)
  movq %rdx, 16(%rsp)
  movq %rcx, 24(%rsp)
  movq %r8, 32(%rsp)
  movq %r9, 40(%rsp)
  movups %xmm0, 48(%rsp)
  movups %xmm1, 64(%rsp)
  movups %xmm2, 80(%rsp)
  movups %xmm3, 96(%rsp)
  call fake_method_for@PLT
  movq %rax, %r11
  movq (%rsp), %rdi
  movq 8(%rsp), %rsi
  movq 16(%rsp), %rdx
  movq 24(%rsp), %rcx
  movq 32(%rsp), %r8
  movq 40(%rsp), %r9
  movups 48(%rsp), %xmm0
  movups 64(%rsp), %xmm1
  movups 80(%rsp), %xmm2
  movups 96(%rsp), %xmm3
  leave
  jmp *%r11
  .size objc_msgSend, .-objc_msgSend
)");

void objc_msgSend_stret() { refuse("no method of ours returns a large struct"); }

Class objc_lookUpClass(const char* name) {
  static auto* const objects = new std::map<std::string, Object*>;
  static const bool checks_at_exit = std::atexit(check_leaks) == 0;
  if (!checks_at_exit) {
    refuse("leaks can't be checked at the end");
  }
  Object*& object = (*objects)[name];
  if (object == nullptr) {
    object = new Object("Class");
    object->class_name = name;
  }
  return object;
}

Protocol objc_getProtocol(const char*) { return nullptr; }

// Selectors are their names.
SEL sel_registerName(const char* name) {
  static auto* const names = new std::set<std::string>;
  return reinterpret_cast<SEL>(names->insert(name).first->c_str());
}

__attribute__((visibility("default"))) void* MTLCreateSystemDefaultDevice() {
  return fault("no_device") ? nullptr : make<DeviceObject>();
}

// metal-cpp refers to these where it is compiled, and nothing of ours calls them.
void* _NSConcreteStackBlock[32];
void _Block_object_assign(void*, const void*, int) { refuse("blocks are not supported"); }
void _Block_object_dispose(const void*, int) { refuse("blocks are not supported"); }
void* MTLCopyAllDevicesWithObserver() { refuse("observers are not supported"); }
void MTLRemoveDeviceObserver() { refuse("observers are not supported"); }

}  // extern "C"
