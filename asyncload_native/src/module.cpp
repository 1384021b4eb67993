// The only file that knows Python: what the engine gives, as `asyncload_native._native`.
#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/shared_ptr.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <chrono>
#include <future>
#include <limits>
#include <optional>
#include <system_error>
#include <thread>
#include <tuple>
#include <utility>
#include <variant>

#include "admission.h"
#include "build_info.h"
#include "consumer.h"
#include "cuda_device.h"
#include "driver.h"
#include "engine.h"
#include "file.h"
#include "gguf.h"
#include "host_device.h"
#include "layer_feed.h"
#include "race.h"
#include "reader.h"
#include "reader_choice.h"
#include "unmap.h"

namespace nb = nanobind;
using namespace nb::literals;

namespace asyncload {
namespace {

using Words = nb::ndarray<const std::uint64_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Table = nb::ndarray<const std::uint64_t, nb::numpy, nb::shape<-1, 10>, nb::c_contig, nb::device::cpu>;
using Bytes = nb::ndarray<std::uint8_t, nb::numpy, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Unlocked = nb::call_guard<nb::gil_scoped_release>;

// Seconds for which who has another thread call the driver, or open a file, keeps the interpreter lock.
constexpr double default_patience = 1e-3;

// Words that may name a file: a path is any bytes.
nb::str text(const std::string& words) {
    return nb::steal<nb::str>(PyUnicode_DecodeFSDefaultAndSize(words.data(), static_cast<Py_ssize_t>(words.size())));
}

std::vector<TensorWork> read_table(const Table& table) {
    std::vector<TensorWork> tensors;
    tensors.reserve(table.shape(0));
    for (std::size_t row = 0; row < table.shape(0); ++row) {
        const std::uint64_t* const column = &table(row, 0);
        tensors.push_back({
            .file = static_cast<std::uint32_t>(column[0]),
            .offset = column[1],
            .nbytes = column[2],
            .target_nbytes = column[3],
            .decode = static_cast<Decode>(column[4]),
            .block_nbytes = static_cast<std::uint32_t>(column[5]),
            .decoded_block_nbytes = static_cast<std::uint32_t>(column[6]),
            .kernel = {column[7], static_cast<std::uint32_t>(column[8])},
            .skip = column[9] != 0,
        });
    }
    return tensors;
}

std::span<std::byte> bytes(const Bytes& buffer) {
    return {reinterpret_cast<std::byte*>(buffer.data()), buffer.size()};
}

using Pieces = nb::ndarray<const std::uint64_t, nb::numpy, nb::shape<-1, 6>, nb::c_contig, nb::device::cpu>;

LayerFeed::Layer read_pieces(const Pieces& table) {
    LayerFeed::Layer pieces;
    for (std::size_t row = 0; row < table.shape(0); ++row) {
        const std::uint64_t* const column = &table(row, 0);
        pieces.push_back({column[0],
                          column[1],
                          column[2],
                          {column[3], static_cast<std::uint32_t>(column[4])},
                          static_cast<std::int64_t>(column[5])});
    }
    return pieces;
}

std::vector<std::uint64_t> words(const Words& array) {
    return {array.data(), array.data() + array.shape(0)};
}

// What C++ threads hold of Python's is held by shared pointers that C++ made (`nb::new_` on types that know their own:
// `std::enable_shared_from_this`). nanobind's others take the interpreter lock when the last one goes.

// A function without the interpreter lock.
template <typename Function>
auto unlocked(Function function) {
    const nb::gil_scoped_release released;
    return function();
}

// Gives the interpreter lock up until what is returned goes, if there is a reason to.
std::optional<nb::gil_scoped_release> release_if(bool reason) {
    return reason ? std::optional<nb::gil_scoped_release>(std::in_place) : std::nullopt;
}

// What has threads, which are started, and end when it goes, without the interpreter lock, as what they call may ask
// for it. The last reference may be another such thing's, which goes without the lock, too.
template <typename Threaded, typename... Arguments>
std::shared_ptr<Threaded> make_threaded(Arguments&&... arguments) {
    auto* const made = unlocked([&] { return new Threaded(std::forward<Arguments>(arguments)...); });
    return {made, [](Threaded* threaded) {
                if (PyGILState_Check())
                    unlocked([threaded] { delete threaded; });
                else
                    delete threaded;
            }};
}

void bind_errors(nb::module_& module) {
    nb::exception<DriverUnavailableError>(module, "DriverUnavailableError", PyExc_ImportError).doc() =
        "There is no CUDA driver, or it lacks a function that is needed.";

    nb::exception<DeviceError> device_error(module, "DeviceError", PyExc_RuntimeError);
    device_error.doc() = "A device refused, or work on it failed.";
    nb::exception<CudaError> cuda_error(module, "CudaError", device_error.ptr());
    cuda_error.doc() = "A function of the CUDA driver failed; its result by ``code`` and ``name``.";
    cuda_error.attr("function") = "";  // on the type, so that they are in its stub
    cuda_error.attr("code") = 0;
    cuda_error.attr("name") = "";
    nb::register_exception_translator(  // goes before that of nb::exception, which sets the message only
        [](const std::exception_ptr& raised, void* type) {
            try {
                std::rethrow_exception(raised);
            } catch (const CudaError& error) {
                nb::object exception = nb::handle(static_cast<PyObject*>(type))(error.what());
                exception.attr("function") = error.function();
                exception.attr("code") = error.code();
                exception.attr("name") = error.name().c_str();
                PyErr_SetObject(static_cast<PyObject*>(type), exception.ptr());
            }
        },
        cuda_error.ptr());

    nb::exception<ReadError> read_error(module, "ReadError", PyExc_OSError);
    read_error.doc() =
        "The bytes of a file could not be had: reading ``failed``, the file ``ended``, or it is ``changed``.";
    read_error.attr("kind") = "";
    read_error.attr("offset") = 0;  // or None, where there was no read
    read_error.attr("transient") = false;
    nb::register_exception_translator(
        [](const std::exception_ptr& raised, void* type) {
            try {
                std::rethrow_exception(raised);
            } catch (const std::system_error& error) {  // no descriptor, or no thread, is left
                const nb::object exception =
                    nb::handle(static_cast<PyObject*>(type))(error.code().value(), error.what());
                PyErr_SetObject(static_cast<PyObject*>(type), exception.ptr());
            }
        },
        PyExc_OSError);
    nb::register_exception_translator(
        [](const std::exception_ptr& raised, void* type) {
            try {
                std::rethrow_exception(raised);
            } catch (const ReadError& error) {
                constexpr const char* kinds[] = {"failed", "ended", "changed"};
                nb::object exception = nb::handle(static_cast<PyObject*>(type))(error.error_number, text(error.what()));
                exception.attr("kind") = kinds[static_cast<std::size_t>(error.kind)];
                exception.attr("offset") = error.offset;
                exception.attr("transient") = error.transient();
                PyErr_SetObject(static_cast<PyObject*>(type), exception.ptr());
            }
        },
        read_error.ptr());
}

// What comes of a call that another thread makes. The interpreter lock is kept meanwhile, as beside a busy thread it
// comes back after milliseconds only, but given up where the call takes longer than `patience`, in seconds.
template <typename Result>
Result await_answer(std::future<Result> answer, double patience) {
    if (answer.wait_for(std::chrono::duration<double>(patience)) != std::future_status::ready) {
        const nb::gil_scoped_release unlocked;
        answer.wait();
    }
    return answer.get();
}

template <typename Result>
Result await_answer(const CudaDevice& device, CudaDevice::Answer<Result> answer, double patience) {
    auto came = await_answer(std::move(answer), patience);
    if (const auto* const refusal = std::get_if<CudaDevice::Refusal>(&came)) device.raise(*refusal);
    return std::get<Result>(std::move(came));
}

void bind_driver(nb::module_& module) {
    nb::class_<Driver>(module, "Driver", "The CUDA driver's functions, from a library given by name or path.")
        .def(nb::new_([](const char* library) { return std::make_shared<Driver>(library); }),
             "library"_a = Driver::LIBRARY, Unlocked(),
             "Raises DriverUnavailableError where the library, or a function that is needed, is missing.")
        .def_prop_ro(
            "version",
            [](const Driver& driver) {
                int version = 0;
                driver.cuDriverGetVersion(&version);
                return version;
            },
            Unlocked(), "The latest version of CUDA that it knows: 13000 is 13.0.");
}

void bind_devices(nb::module_& module) {
    nb::class_<Event>(module, "Event", "A point in a stream's work.")
        .def("done", &Event::done, "Whether the work before it has ended; raises DeviceError if that failed.")
        .def("synchronize", &Event::synchronize, Unlocked(), "Sleeps until it has; raises DeviceError if it failed.")
        .def("seconds_since", &Event::seconds_since, "earlier"_a, "The time between two that have passed, in seconds.")
        .def_prop_ro("passed_at", &Event::passed_at,
                     "When it passed, in seconds of the host's clock, where that tells.")
        .def_prop_ro("handle", &Event::handle, "What other libraries know it by; 0 on the host.");
    nb::class_<Device>(module, "Device", "A device's operations, as the engine asks for them.")
        .def("adopt_event", &Device::adopt_event, "handle"_a, "Somebody else's event, as long as its owner keeps it.");
    nb::class_<Recipient>(module, "Recipient", "Whoever is told of memory as soon as it is allocated.");
    nb::class_<CudaDevice, Device>(module, "CudaDevice", "A CUDA device, in its primary context.")
        .def(nb::new_([](std::shared_ptr<Driver> driver, int index) {
                 return make_threaded<CudaDevice>(std::move(driver), index);
             }),
             "driver"_a, "index"_a, "Raises CudaError.")
        .def("allocate", &CudaDevice::allocate, "sizes"_a, Unlocked(),
             "The addresses of memory of these sizes, all or none, 0 for none. Raises CudaError.")
        .def("allocate_some", &CudaDevice::allocate_some, "sizes"_a, "recipient"_a, Unlocked(),
             "As many of these as there is memory for, from the first on; each goes to the recipient at once. Raises\n"
             "CudaError where none was tried.")
        .def("free", &CudaDevice::free, "addresses"_a, Unlocked(),
             "Frees what was allocated; a CUresult for each, 0 where it was freed.")
        .def(
            "begin_work",
            [](CudaDevice& device, std::uint64_t stream, std::vector<std::shared_ptr<Event>> after, double patience) {
                const auto [ready, began] = await_answer(device, device.begin_work(stream, std::move(after)), patience);
                return std::make_tuple(ready, began);
            },
            "stream"_a, "after"_a, "patience"_a = default_patience,
            "Has what is enqueued from now on on another library's stream, by its handle, wait for events; the timed\n"
            "events before and behind that. A thread of the device's calls the driver; the interpreter lock is kept\n"
            "meanwhile, for ``patience`` seconds at most. Raises CudaError.")
        .def(
            "end_work",
            [](CudaDevice& device, std::uint64_t stream, double patience) {
                return await_answer(device, device.end_work(stream), patience);
            },
            "stream"_a, "patience"_a = default_patience,
            "A timed event behind what is enqueued on another library's stream by now; the interpreter lock is kept "
            "as\n"
            "by ``begin_work``. Raises CudaError.")
        .def("close", &CudaDevice::close, Unlocked(),
             "Ends the threads that make calls; whoever begins or ends work later makes his calls himself.");
    nb::class_<HostDevice, Device>(module, "HostDevice", "Host memory, with a thread for each stream.")
        .def(nb::new_([] { return std::make_shared<HostDevice>(); }))
        .def(
            "set_pace",
            [](HostDevice& device, double bandwidth, double latency, bool poison) {
                device.set_pace({bandwidth, latency, poison});
            },
            "bandwidth"_a, "latency"_a, "poison"_a,
            "Sets bytes a second of all copies (0: as memory is), seconds before each, and whether what is free is\n"
            "overwritten.")
        .def("fail_copy", &HostDevice::fail_copy, "number"_a, "Has a copy fail, by its number: 1 is the next.")
        .def("uses", &HostDevice::uses, "address"_a, "nbytes"_a,
             "How many pieces of work that were enqueued and have not ended read or write some memory.");
}

// A span as Python has it: what, by its name; the thread's index; the subject's; begin and end, in seconds.
using SpanRow = std::tuple<std::string, std::uint32_t, std::size_t, double, double>;

std::vector<SpanRow> take(Spans& spans) {
    constexpr const char* names[] = {"read", "decode", "enqueue", "await_copies", "await_slot"};
    std::vector<SpanRow> rows;
    for (const auto& [what, thread, subject, begin, end] : spans.take())
        rows.emplace_back(names[static_cast<std::size_t>(what)], thread, subject, begin, end);
    return rows;
}

struct Opened {
    std::shared_ptr<File> file;
    std::string head;
};

// Its error as a value, as that of a call of the driver's.
std::variant<Opened, ReadError> open_with_head(const std::string& path, std::uint64_t head) {
    try {
        Opened opened{File::open(path), {}};
        opened.head.resize(std::min(head, opened.file->size()));
        make_reader(Strategy::pread)
            ->read(*opened.file, 0, {reinterpret_cast<std::byte*>(opened.head.data()), opened.head.size()});
        return opened;
    } catch (const ReadError& error) {
        return error;
    }
}

// On a thread of its own, which nobody waits for to end (a pool's would be missing after a fork); where the system has
// none left, here, with the lock given up.
std::future<std::variant<Opened, ReadError>> open_elsewhere(const std::string& path, std::uint64_t head) {
    auto task = std::make_shared<std::packaged_task<std::variant<Opened, ReadError>()>>(
        [path, head] { return open_with_head(path, head); });
    auto answer = task->get_future();
    try {
        std::thread([task] { (*task)(); }).detach();
    } catch (const std::system_error&) {
        const nb::gil_scoped_release unlocked;
        (*task)();
    }
    return answer;
}

void bind_job(nb::module_& module) {
    nb::class_<File>(module, "File", "A file held open.")
        .def_static("share", &File::share, "path"_a, "descriptor"_a, "By a descriptor of its own, or raises ReadError.")
        .def_static(
            "open",
            [](const nb::bytes& name, std::uint64_t head, double patience) {
                const auto came = await_answer(open_elsewhere({name.c_str(), name.size()}, head), patience);
                if (const auto* const error = std::get_if<ReadError>(&came)) throw ReadError(*error);
                const auto& [file, beginning] = std::get<Opened>(came);
                return nb::make_tuple(file, nb::bytes(beginning.data(), beginning.size()));
            },
            "path"_a, "head"_a, "patience"_a = default_patience,
            "Opens a regular file and reads its first bytes, ``head`` of them or all there are, in one go; or raises\n"
            "ReadError. A thread of its own does that; the interpreter lock is kept meanwhile, for ``patience``\n"
            "seconds at most.",
            nb::sig("def open(path: bytes, head: int, patience: float = ...) -> tuple[File, bytes]"))
        .def(
            "read",
            [](const File& file, std::uint64_t offset, const Bytes& buffer) {
                make_reader(Strategy::pread)->read(file, offset, bytes(buffer));
                file.check_unchanged();
            },
            "offset"_a, "buffer"_a, Unlocked(), "Fills a buffer, or raises ReadError, also if the file has changed.")
        .def_prop_ro(
            "identity",
            [](const File& file) {
                const auto& [device, inode, size, modified] = file.identity();
                return std::make_tuple(device, inode, size, modified);
            },
            "Device, inode, size, and modification time in nanoseconds.")
        .def("fail_read", &File::fail_read, "number"_a, "error_number"_a,
             "For tests: has a read of loads fail, by its number: 1 is the next.");

    nb::enum_<Failure::Kind>(module, "FailureKind", "What failed.")
        .value("READ", Failure::Kind::read)
        .value("ENDED", Failure::Kind::ended)
        .value("CHANGED", Failure::Kind::changed)
        .value("COPY", Failure::Kind::copy)
        .value("DEVICE", Failure::Kind::device);
    nb::class_<Failure>(module, "Failure", "Why a job ended early.")
        .def_ro("kind", &Failure::kind)
        .def_ro("tensor", &Failure::tensor)
        .def_ro("file", &Failure::file)
        .def_ro("offset", &Failure::offset)
        .def_ro("error_number", &Failure::error_number)
        .def_ro("transient", &Failure::transient)
        .def_ro("code", &Failure::code)
        .def_prop_ro("what", [](const Failure& failure) { return text(failure.what); });
    nb::class_<Times>(module, "Times", "Where a job's time went, in seconds and bytes.")
        .def_ro("read", &Times::read)
        .def_ro("decode", &Times::decode)
        .def_ro("upload", &Times::upload)
        .def_ro("read_nbytes", &Times::read_nbytes)
        .def_ro("decoded_nbytes", &Times::decoded_nbytes)
        .def_ro("uploaded_nbytes", &Times::uploaded_nbytes)
        .def_ro("retries", &Times::retries);
    nb::class_<Job::News>(module, "News", "What has happened to a job.")
        .def_ro("landed", &Job::News::landed, "The tensors that have landed since it was last asked, by their index.")
        .def_ro("moved", &Job::News::moved, "The bytes of tensors that have.")
        .def_ro("ended", &Job::News::ended, "Whether nothing of it is under way any more.")
        .def_ro("failure", &Job::News::failure, "Why it ended early, if it did.");
    nb::enum_<Job::Wake>(module, "Wake", "When a job's descriptor becomes readable, beside its end.")
        .value("END", Job::Wake::end)
        .value("TENSOR", Job::Wake::tensor)
        .value("CHUNK", Job::Wake::chunk);
    nb::class_<Job>(module, "Job", "One load.")
        .def(
            nb::new_([](std::vector<std::shared_ptr<File>> files, const Table& tensors, std::uint64_t chunk_size,
                        std::uint32_t rising, Job::Wake wake, bool to_host, bool timed, bool ahead) {
                if (std::ranges::find(files, nullptr) != files.end()) throw nb::type_error("None is no file");
                return std::make_shared<Job>(std::vector<std::shared_ptr<const File>>(files.begin(), files.end()),
                                             read_table(tensors), chunk_size, rising, wake, to_host, timed, ahead);
            }),
            "files"_a, "tensors"_a, "chunk_size"_a, "rising"_a, "wake"_a, "to_host"_a, "timed"_a, "ahead"_a,
            "Cuts tensors, in file order, into chunks, of which the first ``rising`` ones rise in size. A row has:\n"
            "file, offset, bytes there, bytes of the target, where it is decoded (0 nowhere, 1 host, 2 device),\n"
            "bytes of a block, bytes of it decoded, the kernel's handle, blocks for each of its groups, whether it is\n"
            "skipped. ``ahead``: chunks may be read before they are admitted. Raises ValueError if a block does not\n"
            "fit a chunk.")
        .def_prop_ro("descriptor", &Job::descriptor, "An eventfd that is readable when there is news.")
        .def_prop_ro("groups", &Job::groups, "For each tensor, the number of the group that it is moved in.")
        .def("poll", &Job::poll, "What has happened since it was last asked.")
        .def("close", &Job::close, "Closes the descriptor; for who has heard of the end.")
        .def_prop_ro(
            "reading", [](const Job& job) { return text(unlocked([&] { return job.reading(); })); },
            "How its files are read, and why.")
        .def("copies", &Job::copies, "By thread, events before and behind the copies of each chunk, if it is timed.")
        .def("times", &Job::times, "Where its time went, until now.")
        .def(
            "take_spans", [](Job& job) { return take(job.spans()); },
            "What threads did since it was last asked, if it is timed; the subject is the first of a chunk's tensors.");
}

using SegmentRow =
    std::tuple<std::uint32_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t, std::uint64_t>;
using ChunkRow = std::tuple<std::uint32_t, std::uint32_t, std::uint64_t, std::uint64_t, std::vector<SegmentRow>>;

std::vector<ChunkRow> cut_table(const Table& tensors, std::uint64_t chunk_size, std::uint32_t rising) {
    const Cut pieces = cut(read_table(tensors), chunk_size, rising);
    std::vector<ChunkRow> chunks;
    for (const Chunk& chunk : pieces.chunks) {
        std::vector<SegmentRow> segments;
        for (const Segment& each : std::span(pieces.segments).subspan(chunk.first_segment, chunk.n_segments))
            segments.emplace_back(each.tensor, each.source_offset, each.source_nbytes, each.upload_offset,
                                  each.upload_nbytes, each.target_offset, each.target_nbytes);
        chunks.emplace_back(chunk.group, chunk.file, chunk.offset, chunk.nbytes, std::move(segments));
    }
    return chunks;
}

nb::list read_entries(const nb::bytearray& buffer, std::uint64_t position, std::size_t most, std::uint64_t longest) {
    const std::span bytes(static_cast<const std::byte*>(buffer.data()), buffer.size());
    nb::list entries;
    while (entries.size() < most) {
        const auto entry = read_entry(bytes, position, longest);
        if (!entry) break;
        const auto nbytes = static_cast<Py_ssize_t>(entry->name.size());
        const auto name = nb::steal(PyUnicode_DecodeUTF8(entry->name.data(), nbytes, nullptr));
        if (!name) {  // it is no UTF-8
            PyErr_Clear();
            break;
        }
        const auto dimensions = std::span(entry->dimensions).first(entry->n_dimensions);
        nb::list shape;
        for (auto dimension = dimensions.rbegin(); dimension != dimensions.rend(); ++dimension)
            shape.append(*dimension);
        entries.append(nb::make_tuple(name, nb::tuple(shape), entry->type, entry->offset, entry->end));
        position = entry->end;
    }
    return entries;
}

// Loops that are slow in Python; `cut`, `read` and what goes with it are for tests: the engine does that by itself.
void bind_parts(nb::module_& module) {
    module.def(
        "cut", &cut_table, "tensors"_a, "chunk_size"_a, "rising"_a = 0,
        "The chunks of a job: group, file, offset and bytes, and of each tensor's share: the tensor, the offset and\n"
        "bytes of what is read, of what is uploaded, and of the target.");

    module.def(
        "skip_strings",
        [](const nb::bytearray& buffer, std::uint64_t position, std::uint64_t first, std::uint64_t count,
           std::uint64_t every) {
            if (every == 0) throw nb::value_error("every 0th string");
            const auto* const begin = static_cast<const std::byte*>(buffer.data());
            const auto skipped = skip_strings({begin, buffer.size()}, position, first, count, every);
            const nb::bytes marks(skipped.marks.data(), skipped.marks.size() * sizeof(std::uint64_t));
            return std::tuple(skipped.count, skipped.end, skipped.last, marks);
        },
        "buffer"_a, "position"_a, "first"_a, "count"_a, "every"_a,
        "Passes over at most ``count`` strings of a GGUF array, from a position on, as long as their lengths are\n"
        "there; the first has the index ``first``. How many these were, the position behind the last, beyond the\n"
        "buffer if that is not all there, its own, and as 64-bit numbers those of each ``every``-th.");

    module.def(
        "read_entries", &read_entries, "buffer"_a, "position"_a, "most"_a, "longest"_a,
        nb::sig("def read_entries(buffer: bytearray, position: int, most: int, longest: int) -> "
                "list[tuple[str, tuple[int, ...], int, int, int]]"),
        "At most ``most`` tensors' entries of a GGUF header, up to the first that is not all there or has something\n"
        "wrong: name, shape (row-major), type, offset and the position behind. ``longest``: of names, in bytes.");

    module.def("unmap", &unmap, "address"_a, "nbytes"_a, Unlocked(),
               "Gives whole pages back to the system, and makes way for other threads now and then.");

    nb::enum_<Strategy>(module, "Strategy", "A way of reading.")
        .value("PREAD", Strategy::pread)
        .value("DIRECT", Strategy::direct)
        .value("URING", Strategy::uring)
        .value("URING_DIRECT", Strategy::uring_direct);
    module.def("unavailable", &unavailable, "strategy"_a, "file"_a, Unlocked(),
               "Why a file cannot be read like this here, or None.");
    module.def(
        "read",
        [](const File& file, std::uint64_t offset, const Bytes& buffer, Strategy strategy) {
            make_reader(strategy)->read(file, offset, bytes(buffer));
            file.check_unchanged();
        },
        "file"_a, "offset"_a, "buffer"_a, "strategy"_a, Unlocked(), "Fills a buffer, or raises ReadError.");

    module.def(
        "is_transient", [](int number) { return ReadError(ReadError::Kind::failed, "", number).transient(); },
        "error_number"_a, "Whether a read that failed with it may succeed when it is made again.");

    nb::class_<Race>(module, "Race", "Finds out which strategy is the fastest.")
        .def(nb::init<>())
        .def_ro_static("distance", &Race::distance, "Bytes that each strategy reads before one of them wins.")
        .def_ro_static("margin", &Race::margin, "How many times as fast as pread another must be.")
        .def("next", &Race::next, "Whose turn it is.")
        .def("give", &Race::give, "strategy"_a, "nbytes"_a, "It reads these bytes now.")
        .def("report", &Race::report, "strategy"_a, "nbytes"_a, "seconds"_a, "What came of it.")
        .def("drop", &Race::drop, "strategy"_a, "reason"_a, "It cannot be used.")
        .def_prop_ro("winner", &Race::winner, "None before there is one.")
        .def("describe", &Race::describe, "The winner and the figures, in words.");
    nb::class_<ReaderChoice>(module, "ReaderChoice", "Reads the files of a load, as suits them.")
        .def(
            "__init__",
            [](ReaderChoice* choice, std::vector<std::shared_ptr<File>> files) {
                new (choice) ReaderChoice({files.begin(), files.end()});
            },
            "files"_a)
        .def(
            "read",
            [](ReaderChoice& choice, const File& file, std::uint64_t offset, const Bytes& buffer) {
                Readers readers;
                choice.read(readers, file, offset, bytes(buffer));
            },
            "file"_a, "offset"_a, "buffer"_a, Unlocked(), "Fills a buffer, or raises ReadError.")
        .def("choose", &ReaderChoice::choose, "file"_a, "offset"_a, "nbytes"_a, Unlocked(),
             "The strategy for some bytes, or None for pread without a report.")
        .def("report", &ReaderChoice::report, "strategy"_a, "nbytes"_a, "seconds"_a, Unlocked(), "What came of it.")
        .def_prop_ro(
            "reason", [](const ReaderChoice& choice) { return text(unlocked([&] { return choice.reason(); })); },
            "What was chosen until now, and why.");
}

void bind_engine(nb::module_& module) {
    nb::class_<Engine>(module, "Engine", "Threads that read, decode and copy.")
        .def(nb::new_([](std::shared_ptr<Device> device, nb::object ring, std::uint64_t chunk_size,
                         std::uint32_t threads, std::uint32_t buffers, int nice, std::uint32_t retries,
                         double retry_delay) {
                 const Engine::Options options{chunk_size, threads, buffers, nice, retries, retry_delay};
                 const auto address = nb::cast<Address>(ring.attr("address"));
                 auto engine = make_threaded<Engine>(std::move(device), pointer(address), options);
                 Engine* const made = engine.get();  // whose last reference is Python's; then the ring goes, too
                 return std::shared_ptr<Engine>(
                     made, [engine = std::move(engine), ring = std::move(ring)](Engine*) mutable { engine.reset(); });
             }),
             "device"_a, "ring"_a, "chunk_size"_a, "threads"_a, "buffers"_a, "nice"_a, "retries"_a, "retry_delay"_a,
             "Starts the threads, over a ring of staging buffers at ``ring.address``, which is kept as long as they "
             "are.")
        .def(
            "submit",
            [](Engine& engine, std::shared_ptr<Job> job, std::vector<Address> scratch,
               std::vector<std::shared_ptr<Event>> after) {
                const auto released = release_if(engine.contended());
                engine.submit(std::move(job), std::move(scratch), std::move(after));
            },
            "job"_a, "scratch"_a, "after"_a,
            "Has a job moved as far as it is admitted; streams wait for the events ``after`` before, on the device.")
        .def(
            "admit",
            [](Engine& engine, Job& job, std::uint32_t groups, std::size_t first, const Words& targets) {
                const auto addresses = words(targets);
                const auto released = release_if(engine.contended());
                engine.admit(job, groups, first, addresses);
            },
            "job"_a, "groups"_a, "first"_a, "targets"_a,
            "Lets the groups below a number be moved, for which the addresses from tensor ``first`` on are given.")
        .def(
            "cancel",
            [](Engine& engine, Job& job) {
                const auto released = release_if(engine.contended());
                engine.cancel(job);
            },
            "job"_a, "Has a job end as soon as nothing of it is under way.")
        .def_prop_ro(
            "busy",
            [](const Engine& engine) {
                const auto released = release_if(engine.contended());
                return engine.busy();
            },
            "Whether a job uses a staging buffer.")
        .def("close", &Engine::close, Unlocked(), "Ends all jobs and the threads; blocks.");
}

void bind_admission(nb::module_& module) {
    nb::class_<Admission, Recipient>(module, "Admission",
                                     "Has a job's tensors moved as those that are awaited get their memory.")
        .def(
            "__init__",
            [](Admission* admission, std::shared_ptr<Engine> engine, std::shared_ptr<Job> job, const Words& targets,
               std::vector<std::uint32_t> awaited) {
                new (admission) Admission(std::move(engine), std::move(job), words(targets), std::move(awaited));
            },
            "engine"_a, "job"_a, "targets"_a, "awaited"_a,
            "``targets``: of all tensors, whatever for those awaited, which are given by their numbers, in order. The\n"
            "job has been submitted, and nobody else admits anything of it meanwhile.")
        .def(
            "give",
            [](Admission& admission, Address address) {
                const auto released = release_if(admission.engine().contended());
                return admission.give(address);
            },
            "address"_a,
            "The memory of the next one; whether there is one after it, with which there is no hurry, while chunks\n"
            "wait for a thread. Raises IndexError where all have theirs.")
        .def_prop_ro("admitted", &Admission::admitted, "How many tensors the engine knows the targets of.");
}

void bind_layer_feed(nb::module_& module) {
    nb::class_<DeviceError>(module, "FeedFailure", "Why a feeding failed.")
        .def_prop_ro(
            "what", [](const DeviceError& error) { return text(error.what()); }, "What the device said.")
        .def_prop_ro("code", &DeviceError::name, "And its name for it.")
        .def_prop_ro("of_copy", &DeviceError::of_copy, "Whether it was a copy, or work that copies are among.");
    nb::class_<LayerFeed::News>(module, "FeedNews", "What has come of a feeding.")
        .def_ro("number", &LayerFeed::News::number, "Whose.")
        .def_ro("has_arrived", &LayerFeed::News::has_arrived,
                "That its copies have ended, or else that they are enqueued, and what had the slot before has ended.")
        .def_ro("failure", &LayerFeed::News::failure, "Why, if it failed.")
        .def_ro("begun", &LayerFeed::News::begun, "Events before its copies, one for each stream, when it is enqueued.")
        .def_ro("arrived", &LayerFeed::News::arrived, "Events behind them.");
    nb::class_<LayerFeed>(module, "LayerFeed", "Brings layers out of registered host memory into slots.")
        .def(nb::new_([](std::shared_ptr<Device> device, const std::vector<Pieces>& layers, std::uint32_t streams,
                         std::vector<Address> scratch, bool each_arrival, bool trace, int nice) {
                 std::vector<LayerFeed::Layer> pieces;
                 for (const Pieces& layer : layers) pieces.push_back(read_pieces(layer));
                 LayerFeed::Options options{streams, std::move(scratch), each_arrival, trace, nice};
                 return make_threaded<LayerFeed>(std::move(device), std::move(pieces), std::move(options));
             }),
             "device"_a, "layers"_a, "streams"_a, "scratch"_a, "each_arrival"_a, "trace"_a, "nice"_a,
             "A row of a layer has: address, bytes, offset in the slot, and the kernel's handle, blocks for each of "
             "its\n"
             "groups, and blocks, 0 for what is copied as it is.")
        .def("feed", &LayerFeed::feed, "layer"_a, "slot"_a, "after"_a,
             "Has a layer, by its index, enqueued into the slot at an address, behind events that the caller keeps "
             "until\n"
             "he is told; the number by which he is.")
        .def_prop_ro("descriptor", &LayerFeed::descriptor, "An eventfd that is readable when something is to be told.")
        .def("poll", &LayerFeed::poll, "What has come since it was last asked.")
        .def(
            "take_spans", [](LayerFeed& feed) { return take(feed.spans()); },
            "What threads did since it was last asked, if that is noted; the subject is the layer.")
        .def_prop_ro("streams", &LayerFeed::streams, "What other libraries know the streams by; 0 on the host.")
        .def("close", &LayerFeed::close, Unlocked(), "Waits for what is under way, and ends threads and streams.");
    module.def(
        "consume",
        [](LayerFeed& feed, Device& device, const std::vector<Address>& slots, unsigned passes, std::uint64_t kernel,
           std::int64_t amount) {
            return consume(feed, device, slots, passes, {kernel, std::numeric_limits<std::uint32_t>::max()}, amount);
        },
        "feed"_a, "device"_a, "slots"_a, "passes"_a, "kernel"_a, "amount"_a, Unlocked(),
        "Goes through a feed's layers without the interpreter, with a kernel for each, of one group of threads, that "
        "is\n"
        "given the slot's address twice and ``amount``; returns the seconds. For measuring.");
}

}  // namespace
}  // namespace asyncload

NB_MODULE(_native, module) {
    module.doc() = "The data path of asyncload in C++ threads, which never need the interpreter lock.";
    nb::set_leak_warnings(false);  // at the interpreter's end a loader may still be held, by an error's traceback say
    module.attr("version") = asyncload::version();
    module.attr("compiler") = asyncload::compiler();
    asyncload::bind_errors(module);
    asyncload::bind_driver(module);
    asyncload::bind_devices(module);
    asyncload::bind_job(module);
    asyncload::bind_parts(module);
    asyncload::bind_engine(module);
    asyncload::bind_admission(module);
    asyncload::bind_layer_feed(module);
}
