#include "reader.h"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
namespace asyncload {
bool ReadError::transient() const {
    for (int n : {EAGAIN, EINTR, EIO, ENOMEM, ENOBUFS, ETIMEDOUT, EREMOTEIO})
        if (n == error_number) return kind == Kind::failed;
    return false;
}
std::shared_ptr<File> File::open(const std::string& path) {
    auto f = std::make_shared<File>();
    f->path_ = path;
    f->fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (f->fd_ < 0) throw ReadError(path, ReadError::Kind::failed, errno, 0);
    fstat(f->fd_, &f->st_);
    return f;
}
File::~File() {
    if (fd_ >= 0) ::close(fd_);
}
static bool same(const struct stat& a, const struct stat& b) {
    return a.st_dev == b.st_dev && a.st_ino == b.st_ino && a.st_size == b.st_size &&
           a.st_mtim.tv_nsec == b.st_mtim.tv_nsec && a.st_mtim.tv_sec == b.st_mtim.tv_sec;
}
void File::check_unchanged() const {
    struct stat a{}, b{};
    if (fstat(fd_, &a) || !same(a, st_) || stat(path_.c_str(), &b) || !same(b, st_))
        throw ReadError("changed", ReadError::Kind::changed, 0, 0);
}
class Pread : public Reader {
  public:
    void read(const File& f, std::uint64_t offset, std::span<std::byte> buffer) override {
        std::size_t done = 0;
        while (done < buffer.size()) {
            auto n = ::pread(f.fd(), buffer.data() + done, buffer.size() - done, static_cast<off_t>(offset + done));
            if (n < 0 && errno == EINTR) continue;
            if (n < 0) throw ReadError(std::strerror(errno), ReadError::Kind::failed, errno, offset + done);
            if (n == 0) throw ReadError("ended", ReadError::Kind::ended, 0, offset + done);
            done += static_cast<std::size_t>(n);
        }
    }
};
std::unique_ptr<Reader> make_reader(Strategy) {
    return std::make_unique<Pread>();
}
}  // namespace asyncload
