// Reading the index file: what was committed, and what is damaged.
#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "file.h"
#include "parallel.h"
#include "view.h"

namespace ragsr {

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
  Tag tag{};             // of the last commit
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
    contents_.tag = records.back().header.tag;
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
