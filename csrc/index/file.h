// The index file: docs/index_format.md has the bytes. Headers, descriptors, locks; append.h writes, read.h reads.
//
//     header | CODE payload sums | GONE payload sums | DONE | CODE payload sums | DONE | ...
//      64 B    64 B                64 B                64 B   `---- next commit -----'
//
// Records are only ever appended. What a DONE record ends counts; what follows the last one does not.
#pragma once

#include <fcntl.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <array>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <thread>
#include <utility>

#include "crc32c.h"

namespace ragsr {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "index files are little-endian and are read here as they lie"
#endif

constexpr uint32_t kVersion = 1;
constexpr int64_t kUnit = 64;              // headers, payloads and tables of checksums begin at multiples of this
constexpr int64_t kSummed = int64_t{1} << 20;  // bytes of payload under one checksum
constexpr char kMagic[8] = {'R', 'A', 'G', 'S', 'R', 'I', 'D', 'X'};

using Tag = std::array<char, 16>;  // of a commit, chosen by the program that makes it; zeros: none

struct FileHeader {
  char magic[8];
  uint32_t version;
  uint32_t width;   // bytes per code
  uint32_t summed;  // kSummed
  uint32_t zero[10];
  uint32_t crc;  // of the 60 bytes before
};

struct RecordHeader {
  char type[4];     // CODE, GONE or DONE
  uint32_t number;  // 0, 1, 2, ... in the file
  int64_t offset;   // of this header in the file
  int64_t first;    // CODE: id of the first code. GONE: 0. DONE: ids given out so far
  int64_t count;    // CODE: codes. GONE: ids. DONE: codes that are not removed
  int64_t bytes;    // of the payload, before it is padded to kUnit
  Tag tag;        // DONE: of this commit. CODE, GONE: zero
  uint32_t sums;  // CRC of the padded table of checksums
  uint32_t crc;   // of the 60 bytes before
};

static_assert(sizeof(FileHeader) == kUnit && sizeof(RecordHeader) == kUnit, "headers fill one unit");

// What went wrong with a file. `code` is an errno, or 0 where the bytes themselves are at fault.
struct FileFault {
  int code;
  std::string what;
};

inline FileFault system_fault(const std::string& what, int code) {
  return {code, what + ": " + std::strerror(code)};
}

inline int64_t round_up(int64_t bytes) { return (bytes + kUnit - 1) / kUnit * kUnit; }
inline int64_t blocks_of(int64_t bytes) { return (round_up(bytes) + kSummed - 1) / kSummed; }
inline int64_t table_bytes(int64_t bytes) { return round_up(4 * blocks_of(bytes)); }

template <class Header>
uint32_t header_crc(const Header& header) {
  return crc32c(0, reinterpret_cast<const uint8_t*>(&header), kUnit - 4);
}

inline bool is_type(const RecordHeader& header, const char* type) { return std::memcmp(header.type, type, 4) == 0; }

// ---------------------------------------------------------------- descriptors, mappings, locks

class Descriptor {
 public:
  explicit Descriptor(int fd = -1) : fd_(fd) {}
  Descriptor(Descriptor&& other) noexcept : fd_(std::exchange(other.fd_, -1)) {}
  Descriptor& operator=(Descriptor&& other) noexcept {
    std::swap(fd_, other.fd_);
    return *this;
  }
  ~Descriptor() {
    if (fd_ < 0) return;
    ::flock(fd_, LOCK_UN);  // closing alone would not: a mapping keeps the open file, and its lock, until it goes
    ::close(fd_);
  }
  int get() const { return fd_; }

 private:
  int fd_;
};

// Bytes [begin, begin + size) of a file, read-only.
class Mapping {
 public:
  Mapping(int fd, int64_t begin, int64_t size, const std::string& path) {
    const int64_t page = ::sysconf(_SC_PAGESIZE);
    const int64_t lead = begin % page;
    length_ = static_cast<size_t>(size + lead);
    base_ = ::mmap(nullptr, length_, PROT_READ, MAP_SHARED, fd, begin - lead);
    if (base_ == MAP_FAILED) throw system_fault("mapping " + path + " into memory failed", errno);
    data_ = static_cast<const uint8_t*>(base_) + lead;
  }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;
  ~Mapping() { ::munmap(base_, length_); }
  const uint8_t* data() const { return data_; }

 private:
  void* base_;
  size_t length_;
  const uint8_t* data_;
};

inline Descriptor open_file(const std::string& path, int flags, const char* hint = "") {
  Descriptor fd(::open(path.c_str(), flags | O_CLOEXEC));
  if (fd.get() < 0) throw system_fault("opening " + path + " failed" + hint, errno);
  return fd;
}

inline int64_t file_size(int fd, const std::string& path) {
  struct stat info;
  if (::fstat(fd, &info) != 0) throw system_fault("reading the size of " + path + " failed", errno);
  return info.st_size;
}

// Writers hold an exclusive flock for as long as they have the file open. It goes with the process.
// A reader that asks whether there is a writer holds a shared one for an instant, so a writer asks more than once.
inline bool lock_for_writing(int fd) {
  for (int attempt = 0; attempt < 10; ++attempt) {
    if (::flock(fd, LOCK_EX | LOCK_NB) == 0) return true;
    std::this_thread::sleep_for(std::chrono::milliseconds(2));
  }
  return false;
}

inline bool has_writer(int fd) {
  if (::flock(fd, LOCK_SH | LOCK_NB) != 0) return true;
  ::flock(fd, LOCK_UN);
  return false;
}

inline FileFault second_writer(const std::string& path) {
  return {EWOULDBLOCK, path +
                           " is open for adding elsewhere, and there is one writer at a time: close that one first "
                           "(or search the file with FlatIndex.load)"};
}

// `path` open for adding, locked. A file that was replaced between opening and locking is opened again.
inline Descriptor open_locked(const std::string& path) {
  for (;;) {
    Descriptor fd = open_file(path, O_RDWR, " (to search it without adding: FlatIndex.load)");
    if (!lock_for_writing(fd.get())) throw second_writer(path);
    struct stat opened, named;
    if (::fstat(fd.get(), &opened) == 0 && ::stat(path.c_str(), &named) == 0 && opened.st_ino == named.st_ino &&
        opened.st_dev == named.st_dev)
      return fd;
  }
}

inline void sync_file(int fd, const std::string& path) {
  if (::fsync(fd) != 0) throw system_fault("writing " + path + " to the disk failed", errno);
}

}  // namespace ragsr
