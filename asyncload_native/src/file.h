#pragma once
#include <sys/stat.h>

#include <cstdint>
#include <memory>
#include <stdexcept>
#include <string>
namespace asyncload {
class ReadError : public std::runtime_error {
  public:
    enum class Kind : std::uint8_t { failed, ended, changed };
    ReadError(const std::string& what, Kind k, int number, std::uint64_t at)
        : std::runtime_error(what), kind(k), error_number(number), offset(at) {}
    bool transient() const;
    Kind kind;
    int error_number;
    std::uint64_t offset;
};
class File {
  public:
    static std::shared_ptr<File> open(const std::string& path);
    ~File();
    std::uint64_t size() const { return static_cast<std::uint64_t>(st_.st_size); }
    int fd() const { return fd_; }
    const std::string& path() const { return path_; }
    void check_unchanged() const;

  private:
    std::string path_;
    int fd_ = -1;
    struct stat st_{};
};
}  // namespace asyncload
