// Writing the index file: records, commits, whole files.
#pragma once

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "view.h"

namespace ragsr {

using Piece = std::pair<const uint8_t*, int64_t>;  // data, bytes

// Checksums of every kSummed bytes of what it is fed.
class BlockSums {
 public:
  void feed(const uint8_t* data, int64_t bytes) {
    while (bytes > 0) {
      if (filled_ == 0) sums_.push_back(0);
      const int64_t part = std::min(bytes, kSummed - filled_);
      sums_.back() = crc32c(sums_.back(), data, part);
      filled_ = (filled_ + part) % kSummed;
      data += part;
      bytes -= part;
    }
  }
  const std::vector<uint32_t>& sums() const { return sums_; }

 private:
  std::vector<uint32_t> sums_;
  int64_t filled_ = 0;
};

// Writes records one behind the other, from `offset` on.
class Appender {
 public:
  Appender(int fd, std::string path, int64_t offset, uint32_t number)
      : fd_(fd), path_(std::move(path)), offset_(offset), number_(number) {}

  int64_t offset() const { return offset_; }
  uint32_t number() const { return number_; }

  void file_header(int64_t width) {
    FileHeader header{};
    std::memcpy(header.magic, kMagic, 8);
    header.version = kVersion;
    header.width = static_cast<uint32_t>(width);
    header.summed = static_cast<uint32_t>(kSummed);
    header.crc = header_crc(header);
    put(&header, kUnit);
  }

  // Returns where the payload lies.
  int64_t record(const char* type, int64_t first, int64_t count, std::vector<Piece> payload, const Tag& tag = {}) {
    static const uint8_t zeros[kUnit] = {};
    int64_t bytes = 0;
    for (const Piece& piece : payload) bytes += piece.second;
    payload.emplace_back(zeros, round_up(bytes) - bytes);
    BlockSums blocks;
    for (const Piece& piece : payload) blocks.feed(piece.first, piece.second);
    std::vector<uint32_t> table = blocks.sums();
    table.resize(static_cast<size_t>(table_bytes(bytes) / 4));

    RecordHeader header{};
    std::memcpy(header.type, type, 4);
    header.number = number_++;
    header.offset = offset_;
    header.first = first;
    header.count = count;
    header.bytes = bytes;
    header.tag = tag;
    header.sums = crc32c(0, reinterpret_cast<const uint8_t*>(table.data()), table_bytes(bytes));
    header.crc = header_crc(header);
    put(&header, kUnit);
    const int64_t at = offset_;
    for (const Piece& piece : payload) put(piece.first, piece.second);
    put(table.data(), table_bytes(bytes));
    return at;
  }

 private:
  void put(const void* data, int64_t bytes) {
    const char* from = static_cast<const char*>(data);
    while (bytes > 0) {
      const ssize_t written = ::pwrite(fd_, from, static_cast<size_t>(bytes), offset_);
      if (written < 0 && errno == EINTR) continue;
      if (written < 0) throw system_fault("writing " + path_ + " failed", errno);
      if (written == 0) throw system_fault("writing " + path_ + " failed", ENOSPC);
      from += written;
      bytes -= written;
      offset_ += written;
    }
  }

  int fd_;
  std::string path_;
  int64_t offset_;
  uint32_t number_;
};

// Appends a commit: the codes of `view` from `first` on and the ids `gone`. Returns where the codes lie.
// The DONE record is written when the rest is known to be on the disk.
inline int64_t append_commit(Appender& out, int fd, const std::string& path, const View& view, int64_t first,
                             const std::vector<int64_t>& gone, const Tag& tag) {
  int64_t codes_at = 0;
  if (view.total() > first) {
    std::vector<Piece> payload;
    view.for_each_piece(first, view.total(), view.total(), [&](const uint8_t* codes, int64_t rows, int64_t) {
      payload.emplace_back(codes, rows * view.width());
    });
    codes_at = out.record("CODE", first, view.total() - first, std::move(payload));
  }
  if (!gone.empty()) {
    const auto count = static_cast<int64_t>(gone.size());
    out.record("GONE", 0, count, {{reinterpret_cast<const uint8_t*>(gone.data()), 8 * count}});
  }
  sync_file(fd, path);
  out.record("DONE", view.total(), view.live(), {}, tag);
  sync_file(fd, path);
  return codes_at;
}

// A file with one commit, under a temporary name until it is whole. A file already there is replaced, its permissions
// stay, unless a writer has it open.
inline void write_whole(const std::string& path, const View& view, const Tag& tag) {
  const Descriptor replaced(::open(path.c_str(), O_RDONLY | O_CLOEXEC));
  if (replaced.get() >= 0 && !lock_for_writing(replaced.get())) throw second_writer(path);
  const size_t slash = path.rfind('/');
  const std::string folder = slash == std::string::npos ? "./" : path.substr(0, slash + 1);
  const std::string name = slash == std::string::npos ? path : path.substr(slash + 1);
  const std::string temporary = folder + "." + name + "." + std::to_string(::getpid()) + "-" +
                                std::to_string(std::chrono::steady_clock::now().time_since_epoch().count());
  const Descriptor fd(::open(temporary.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666));
  if (fd.get() < 0) throw system_fault("making " + path + " failed", errno);
  try {
    struct stat old;
    if (replaced.get() >= 0 && ::fstat(replaced.get(), &old) == 0) ::fchmod(fd.get(), old.st_mode & 07777);
    Appender out(fd.get(), path, 0, 0);
    out.file_header(view.width());
    append_commit(out, fd.get(), path, view, 0, view.removed->ids(), tag);
    if (::rename(temporary.c_str(), path.c_str()) != 0) throw system_fault("naming " + path + " failed", errno);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  const Descriptor directory(::open(folder.c_str(), O_RDONLY | O_CLOEXEC));
  if (directory.get() >= 0) ::fsync(directory.get());  // the name as well; some file systems cannot, and need not
}

}  // namespace ragsr
