// The index file: docs/index_format.md has the bytes. POSIX calls, checksums and locks; nothing here searches.
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

#include <atomic>
#include <cerrno>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "crc32c.h"
#include "parallel.h"
#include "view.h"

namespace ragsr {

#if defined(__BYTE_ORDER__) && __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "index files are little-endian and are read here as they lie"
#endif

constexpr uint32_t kVersion = 1;
constexpr int64_t kUnit = 64;              // headers, payloads and tables of checksums begin at multiples of this
constexpr int64_t kSummed = int64_t{1} << 20;  // bytes of payload under one checksum
constexpr char kMagic[8] = {'R', 'A', 'G', 'S', 'R', 'I', 'D', 'X'};

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
  uint32_t zero[4];
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

// ---------------------------------------------------------------- writing

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
  int64_t record(const char* type, int64_t first, int64_t count, std::vector<Piece> payload) {
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
                             const std::vector<int64_t>& gone) {
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
  out.record("DONE", view.total(), view.live(), {});
  sync_file(fd, path);
  return codes_at;
}

// A file with one commit, under a temporary name until it is whole. A file already there is replaced, unless a writer
// has it open.
inline void write_whole(const std::string& path, const View& view) {
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
    Appender out(fd.get(), path, 0, 0);
    out.file_header(view.width());
    append_commit(out, fd.get(), path, view, 0, view.removed->ids());
    if (::rename(temporary.c_str(), path.c_str()) != 0) throw system_fault("naming " + path + " failed", errno);
  } catch (...) {
    ::unlink(temporary.c_str());
    throw;
  }
  const Descriptor directory(::open(folder.c_str(), O_RDONLY | O_CLOEXEC));
  if (directory.get() >= 0) ::fsync(directory.get());  // the name as well; some file systems cannot, and need not
}

// ---------------------------------------------------------------- reading

inline FileFault damaged(const std::string& path, const std::string& where) {
  return {0, path + " is damaged: " + where + ". Restore the file from a copy"};
}

inline std::string span(int64_t begin, int64_t bytes) {
  return "bytes " + std::to_string(begin) + " to " + std::to_string(begin + bytes - 1);
}

// One record of a mapped file whose header was found whole.
struct Record {
  RecordHeader header;
  const uint8_t* payload;  // padded
  const uint32_t* sums;

  int64_t end() const { return header.offset + kUnit + round_up(header.bytes) + table_bytes(header.bytes); }

  void check_table(const std::string& path) const {
    const int64_t bytes = table_bytes(header.bytes);
    if (crc32c(0, reinterpret_cast<const uint8_t*>(sums), bytes) != header.sums)
      throw damaged(path, "the table of checksums of record " + std::to_string(header.number) + " (" +
                              span(end() - bytes, bytes) + ") does not match its own checksum");
  }

  void check_block(int64_t block, const std::string& path) const {
    const int64_t begin = block * kSummed;
    const int64_t bytes = std::min(kSummed, round_up(header.bytes) - begin);
    if (crc32c(0, payload + begin, bytes) != sums[block])
      throw damaged(path, "block " + std::to_string(block) + " of record " + std::to_string(header.number) + " (" +
                              span(header.offset + kUnit + begin, bytes) + ") does not match its checksum");
  }

  void check_blocks(const std::string& path) const {
    run_parallel(thread_count(), blocks_of(header.bytes), [&](int64_t block) { check_block(block, path); });
  }
};

// The codes of one record, checked by whoever searches them first.
class UncheckedRecord : public Unchecked {
 public:
  UncheckedRecord(std::shared_ptr<const Mapping> keep, Record record, std::string path)
      : keep_(std::move(keep)), record_(record), path_(std::move(path)) {}

  void check() override {
    if (checked_.load(std::memory_order_acquire)) return;
    record_.check_blocks(path_);
    checked_.store(true, std::memory_order_release);
  }

 private:
  std::shared_ptr<const Mapping> keep_;
  Record record_;
  std::string path_;
  std::atomic<bool> checked_{false};
};

// The committed part of a file: every header and table checked, the ids of removed codes read.
struct Contents {
  std::shared_ptr<const Mapping> mapping;
  int64_t width = 0;
  std::vector<Record> codes;
  Removed removed;
  int64_t total = 0;
  int64_t end = 0;       // of the last commit
  uint32_t records = 0;  // up to there
  int64_t left_out = 0;  // bytes behind it
};

class Reader {
 public:
  Reader(int fd, const std::string& path) : path_(path), size_(file_size(fd, path)) {
    if (size_ < kUnit)
      throw FileFault{0, path + " is no index, or was cut off: it has " + std::to_string(size_) +
                             " bytes, and the header alone has " + std::to_string(kUnit)};
    contents_.mapping = std::make_shared<Mapping>(fd, 0, size_, path);
    data_ = contents_.mapping->data();
  }

  Contents read() {
    read_file_header();
    const std::vector<Record> records = committed_records();
    for (const Record& record : records) {
      if (is_type(record.header, "CODE"))
        read_codes(record);
      else if (is_type(record.header, "GONE"))
        read_gone(record);
      else if (record.header.first != contents_.total ||
               record.header.count != contents_.total - contents_.removed.count())
        throw wrong(record, "counts other codes than there are");
    }
    contents_.end = records.back().end();
    contents_.records = static_cast<uint32_t>(records.size());
    contents_.left_out = size_ - contents_.end;
    return std::move(contents_);
  }

 private:
  void read_file_header() {
    FileHeader header;
    std::memcpy(&header, data_, kUnit);
    if (std::memcmp(header.magic, kMagic, 8) != 0)
      throw FileFault{0, path_ + " is no index of ragsr: it does not begin with RAGSRIDX"};
    if (header.crc != header_crc(header))
      throw damaged(path_, "the header of the file (" + span(0, kUnit) + ") does not match its checksum");
    if (header.version != kVersion)
      throw FileFault{0, path_ + " has version " + std::to_string(header.version) +
                             " of the index format, and this ragsr reads version " + std::to_string(kVersion) +
                             ": install a newer ragsr"};
    if (header.width < 1 || header.width > 128 || header.summed != kSummed)
      throw damaged(path_, "its header asks for codes of " + std::to_string(header.width) + " bytes");
    contents_.width = header.width;
  }

  // Whole records up to the last DONE. Behind it may lie the torn end of a commit that was interrupted, or nothing.
  std::vector<Record> committed_records() const {
    std::vector<Record> records;
    size_t committed = 0;
    int64_t offset = kUnit;
    Record record;
    while (next_record(offset, records.size(), record)) {
      records.push_back(record);
      offset = record.end();
      if (is_type(record.header, "DONE")) committed = records.size();
    }
    if (committed < records.size() || offset < size_) refuse_lost_commit(offset, records.size());
    records.resize(committed);
    if (records.empty())
      throw FileFault{0, path_ + " holds no whole commit: it was cut off, or never finished. Restore it from a copy"};
    return records;
  }

  // False where nothing was written, or not to its end.
  bool next_record(int64_t offset, size_t number, Record& record) const {
    static const uint8_t zeros[kUnit] = {};
    if (size_ - offset < kUnit || std::memcmp(data_ + offset, zeros, kUnit) == 0) return false;
    std::memcpy(&record.header, data_ + offset, kUnit);
    const RecordHeader& header = record.header;
    if (header.crc != header_crc(header))
      throw damaged(path_, "the header of record " + std::to_string(number) + " (" + span(offset, kUnit) +
                               ") does not match its checksum");
    if (header.offset != offset || header.number != number || header.bytes < 0) throw wrong(record, "is out of place");
    if (header.bytes > size_ - offset || record.end() > size_) return false;
    record.payload = data_ + offset + kUnit;
    record.sums = reinterpret_cast<const uint32_t*>(record.payload + round_up(header.bytes));
    return true;
  }

  // A commit that lies behind an unreadable place was finished once: the place is damage, not a torn end.
  void refuse_lost_commit(int64_t offset, size_t number) const {
    for (int64_t at = offset + kUnit; at + kUnit <= size_; at += kUnit) {
      RecordHeader header;
      std::memcpy(&header, data_ + at, kUnit);
      if (is_type(header, "DONE") && header.offset == at && header.crc == header_crc(header))
        throw damaged(path_, "record " + std::to_string(number) + " at byte " + std::to_string(offset) +
                                 " is missing, and a commit follows it");
    }
  }

  void read_codes(const Record& record) {
    record.check_table(path_);
    const RecordHeader& header = record.header;
    if (header.first != contents_.total || header.count < 1 || header.bytes % contents_.width != 0 ||
        header.bytes / contents_.width != header.count)
      throw wrong(record, "does not go on where the codes before it end");
    contents_.codes.push_back(record);
    contents_.total += header.count;
  }

  void read_gone(const Record& record) {
    record.check_table(path_);
    record.check_blocks(path_);
    const RecordHeader& header = record.header;
    const auto* ids = reinterpret_cast<const int64_t*>(record.payload);
    if (header.count < 1 || header.bytes % 8 != 0 || header.bytes / 8 != header.count)
      throw wrong(record, "has another length than it says");
    for (int64_t i = 0; i < header.count; ++i)
      if (ids[i] < 0 || ids[i] >= contents_.total || (i > 0 && ids[i] <= ids[i - 1]) || contents_.removed.has(ids[i]))
        throw wrong(record, "removes code " + std::to_string(ids[i]) + ", which cannot be");
    contents_.removed.insert(ids, header.count);
  }

  FileFault wrong(const Record& record, const std::string& what) const {
    return damaged(path_, "record " + std::to_string(record.header.number) + " at byte " +
                              std::to_string(record.header.offset) + " " + what);
  }

  std::string path_;
  int64_t size_;
  const uint8_t* data_ = nullptr;
  Contents contents_;
};

}  // namespace ragsr
