// What the engine asks of a device: streams, copies, decoding kernels, events. A file for each kind implements it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <memory>
#include <optional>
#include <span>
#include <stdexcept>
#include <string>

namespace asyncload {

// A place in a device's memory; on the host device, and of host memory, an address of this process.
using Address = std::uint64_t;

inline std::byte* pointer(Address address) {
    return reinterpret_cast<std::byte*>(address);
}

// The device refused, or work enqueued on it failed; `name` is the driver's for it, empty where there is none.
class DeviceError : public std::runtime_error {
  public:
    DeviceError(const std::string& what, std::string name, bool of_copy = false)
        : std::runtime_error(what), name_(std::move(name)), of_copy_(of_copy) {}

    const std::string& name() const noexcept { return name_; }
    // Whether it was a copy, or work that copies are among.
    bool of_copy() const noexcept { return of_copy_; }

  private:
    std::string name_;
    bool of_copy_;
};

// Whatever ended work for a device, memory that ran out say, as its failure: no exception may leave a thread.
inline DeviceError of_device(const std::exception& error) {
    if (const auto* const known = dynamic_cast<const DeviceError*>(&error)) return *known;
    return {error.what(), ""};
}

// A kernel that decodes blocks on a device: for CUDA a CUkernel and how many blocks a group of threads decodes, for the
// host a function (see `HostKernel`).
struct Kernel {
    std::uint64_t handle;
    std::uint32_t blocks_per_group;
};

// Decodes `count` blocks; returns 1 for success. A Numba cfunc: it prints an exception and returns 0.
using HostKernel = std::int32_t (*)(std::intptr_t source, std::intptr_t target, std::intptr_t count);

// A copy of host memory to the device.
struct Copy {
    Address target;
    const std::byte* source;
    std::size_t nbytes;
};

// The decoding of blocks, all of it in the device's memory.
struct Decoding {
    Kernel kernel;
    Address source, target;
    std::int64_t n_blocks;
};

// A point in a stream's work. Before it is recorded it counts as passed.
class Event : public std::enable_shared_from_this<Event> {
  public:
    virtual ~Event() = default;
    // Whether the work before it has ended. Raises `DeviceError` if that work failed.
    virtual bool done() = 0;
    // Sleeps until the work before it has ended. Raises `DeviceError` if that work failed.
    virtual void synchronize() = 0;
    // Seconds between two events that have passed and were made with timing. Raises `DeviceError` for any others.
    virtual double seconds_since(Event& earlier) = 0;
    // When it passed, in seconds of the steady clock; nothing before, and where only the device knows.
    virtual std::optional<double> passed_at() const { return std::nullopt; }
    // What other libraries know it by; 0 on the host device.
    virtual std::uint64_t handle() const noexcept = 0;
};

// An ordered queue of work; its methods enqueue. It belongs to one thread at a time, which has attached to the device.
class Stream {
  public:
    virtual ~Stream() = default;  // waits for its work
    // Copies host memory, registered with the device where it has that, which stays as it is until an event behind the
    // copy has passed.
    virtual void upload(const Copy& copy) = 0;
    // Several copies, in no order among them, in one call where the device has such a call. If it throws, some may have
    // been enqueued.
    virtual void upload_all(std::span<const Copy> copies) {
        for (const Copy& copy : copies) upload(copy);
    }
    virtual void decode(const Decoding& decoding) = 0;
    virtual void wait(Event& event) = 0;
    virtual void record(Event& event) = 0;
    // Sleeps until all work has ended. Raises `DeviceError` if some of it failed.
    virtual void synchronize() = 0;
    // The same, whatever became of the work: for who has no event to wait for.
    void drain() noexcept {
        try {
            synchronize();
        } catch (const DeviceError&) {  // then nothing of it moves any more
        }
    }
    virtual std::uint64_t handle() const noexcept = 0;
};

// Whoever is told of memory as soon as it is allocated.
class Recipient {
  public:
    virtual ~Recipient() = default;
    // Takes the address of the next of what was asked for; whether there is one after it, with which there is no hurry.
    virtual bool give(Address address) = 0;
};

// How `Event::synchronize` waits: until the device interrupts the host, which holds up its copies; or by looking again
// and again, the more seldom the longer it takes.
enum class Wait : std::uint8_t { interrupt, poll };

class Device : public std::enable_shared_from_this<Device> {
  public:
    virtual ~Device() = default;
    // Makes it the calling thread's; cheap when it is already.
    virtual void attach() = 0;
    virtual std::unique_ptr<Stream> open_stream() = 0;
    virtual std::shared_ptr<Event> make_event(bool timing, Wait wait) = 0;
    // An event of somebody else's, by its handle, that streams can wait for as long as its owner keeps it.
    virtual std::shared_ptr<Event> adopt_event(std::uint64_t handle) = 0;
    // Whether the device idles less between copies that were enqueued in one call.
    virtual bool combines_copies() const noexcept { return false; }
    // Whether the host writes its memory as its own, and may do so instead of copying there.
    virtual bool in_place() const noexcept = 0;
    // Whether memory is to be overwritten once it is free, so that a late reader shows; for tests.
    virtual bool poisons() const noexcept { return false; }
};

}  // namespace asyncload
