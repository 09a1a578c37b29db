// FlatIndex: codes that are all scanned by every search, exactly, in memory or in a mapped file.
//
// Searches never wait and never make others wait: each takes the present View, which is immutable, and works on that.
// A writer (add, remove and commit take turns by `writing_`) puts new codes behind those of the View, where no search
// looks, and then publishes a new View; what a search sees is therefore always a whole prefix of the adds and removes.
// Codes never move: memory comes in chunks that are appended to until they are full and live as long as a View uses
// them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <stdexcept>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "append.h"
#include "read.h"
#include "view.h"

namespace ragsr {

// Appends copies of codes to the segments of a view. Throws only before it has changed anything.
class Chunks {
 public:
  void append(View& view, const uint8_t* codes, int64_t rows) {
    const int64_t width = view.width();
    const int64_t here = std::min(rows, room_ - used_);
    const int64_t there = rows - here;
    const int64_t room = std::max(there, std::clamp(view.total(), kSmallest / width, kLargest / width));
    const std::shared_ptr<uint8_t> fresh = there > 0 ? allocate(room * width) : nullptr;
    view.segments.reserve(view.segments.size() + 1);
    if (here > 0) copy(view.segments.back(), codes, here, width);
    if (there == 0) return;
    chunk_ = fresh;
    room_ = room;
    used_ = 0;
    view.segments.push_back({chunk_, chunk_.get(), view.total(), 0, nullptr});
    copy(view.segments.back(), codes + here * width, there, width);
  }

  // The next append begins a new chunk.
  void close() { room_ = used_ = 0; }

 private:
  static constexpr int64_t kSmallest = int64_t{1} << 20;  // bytes; those not used cost address space, no memory
  static constexpr int64_t kLargest = int64_t{1} << 28;

  static std::shared_ptr<uint8_t> allocate(int64_t bytes) {
    return {new uint8_t[static_cast<size_t>(bytes)], std::default_delete<uint8_t[]>()};
  }

  void copy(Segment& segment, const uint8_t* codes, int64_t rows, int64_t width) {
    std::memcpy(chunk_.get() + used_ * width, codes, static_cast<size_t>(rows * width));
    used_ += rows;
    segment.rows += rows;
  }

  std::shared_ptr<uint8_t> chunk_;
  int64_t room_ = 0;  // rows
  int64_t used_ = 0;
};

class FlatIndex {
 public:
  explicit FlatIndex(int64_t width) : view_(empty(width)) {}

  // The index a file holds. `map`: codes stay in the file and are checked by the first search; otherwise they are read
  // into memory and checked now.
  static std::shared_ptr<FlatIndex> load(const std::string& path, bool map) {
    const Descriptor fd = open_file(path, O_RDONLY);
    auto index = std::make_shared<FlatIndex>(read(fd.get(), path), path, map);
    if (index->left_out_ > 0 && has_writer(fd.get())) index->left_out_ = 0;  // its next commit, under way
    return index;
  }

  // The same, for adding: `commit` writes to the file. One writer at a time.
  static std::shared_ptr<FlatIndex> open(const std::string& path) {
    Descriptor fd = open_locked(path);
    Contents contents = Reader(fd.get(), path).read();
    const int64_t end = contents.end;
    const uint32_t records = contents.records;
    auto index = std::make_shared<FlatIndex>(std::move(contents), path, true);
    index->file_ = std::make_unique<Open>(Open{std::move(fd), path, end, records, index->view_->total(), {}});
    return index;
  }

  FlatIndex(Contents contents, const std::string& path, bool map) : view_(empty(contents.width)) {
    View& view = *view_;
    for (const Record& record : contents.codes) {
      const RecordHeader& header = record.header;
      if (map && header.bytes >= kWorthMapping) {
        chunks_.close();
        view.segments.push_back({contents.mapping, record.payload, header.first, header.count,
                                 std::make_shared<UncheckedRecord>(contents.mapping, record, path)});
      } else {
        record.check_blocks(path);
        chunks_.append(view, record.payload, header.count);
      }
    }
    view.removed = std::make_shared<Removed>(std::move(contents.removed));
    tag_ = contents.tag;
    left_out_ = contents.left_out;
  }

  std::shared_ptr<const View> view() const {
    const std::lock_guard<std::mutex> lock(publishing_);
    return view_;
  }

  // Of the last commit: its own, or the one it was loaded with.
  Tag tag() const {
    const std::lock_guard<std::mutex> lock(writing_);
    return tag_;
  }

  int64_t left_out() const { return left_out_; }  // bytes of the loaded file behind its last commit

  // Returns the id of the first.
  int64_t add(const uint8_t* codes, int64_t rows) {
    const std::lock_guard<std::mutex> lock(writing_);
    auto next = std::make_shared<View>(*view_);
    const int64_t first = next->total();
    chunks_.append(*next, codes, rows);
    publish(std::move(next));
    return first;
  }

  // All of them or, if one is not there, none: std::invalid_argument.
  void remove(std::vector<int64_t> ids) {
    std::sort(ids.begin(), ids.end());
    const std::lock_guard<std::mutex> lock(writing_);
    for (size_t i = 0; i < ids.size(); ++i) {
      const bool known = ids[i] >= 0 && ids[i] < view_->total();
      const char* problem = !known                            ? "was never given out"
                            : view_->removed->has(ids[i])     ? "was removed before"
                            : i > 0 && ids[i] == ids[i - 1] ? "is named twice"
                                                              : nullptr;
      if (problem)
        throw std::invalid_argument("nothing was removed: id " + std::to_string(ids[i]) + " " + problem +
                                    "; ids are 0 to " + std::to_string(view_->total() - 1) + ", each removed once");
    }
    auto removed = std::make_shared<Removed>(*view_->removed);
    removed->insert(ids.data(), static_cast<int64_t>(ids.size()));
    auto next = std::make_shared<View>(*view_);
    next->removed = std::move(removed);
    if (file_) file_->gone.insert(file_->gone.end(), ids.begin(), ids.end());
    publish(std::move(next));
  }

  void save(const std::string& path, const Tag& tag = {}) const {
    const std::shared_ptr<const View> saved = view();
    saved->check_blocks();  // damage must not get new checksums
    write_whole(path, *saved, tag);
  }

  // Appends what was added and removed since the last commit. After an error the file is as it was and all of it waits
  // in memory for the next try.
  void commit(const Tag& tag = {}) {
    const std::lock_guard<std::mutex> lock(writing_);
    if (!file_)
      throw std::invalid_argument("this index has no file to commit to; FlatIndex.open(path) gives one that has, "
                                  "and save(path) writes a whole new file");
    Open& file = *file_;
    if (view_->total() == file.total && file.gone.empty() && tag == tag_) return;
    std::sort(file.gone.begin(), file.gone.end());
    Appender out(file.fd.get(), file.path, file.end, file.records);
    int64_t codes_at = 0;
    try {
      cut(file);  // the torn end of an interrupted commit
      codes_at = append_commit(out, file.fd.get(), file.path, *view_, file.total, file.gone, tag);
    } catch (const FileFault& fault) {
      const bool whole = ::ftruncate(file.fd.get(), file.end) == 0;
      throw FileFault{fault.code, fault.what + ". " +
                                      (whole ? "The file is as it was before" : "The file must be reopened") +
                                      "; what was added waits in memory: make room and commit() again"};
    }
    const int64_t first = file.total;
    file.end = out.offset();
    file.records = out.number();
    file.total = view_->total();
    file.gone.clear();
    tag_ = tag;
    if ((file.total - first) * view_->width() >= kWorthMapping) map_committed(first, codes_at);
  }

  // Gives the file back to other writers. What was not committed stays in memory only.
  void close() {
    const std::lock_guard<std::mutex> lock(writing_);
    file_.reset();
  }

  std::string describe() const {
    const std::lock_guard<std::mutex> lock(writing_);
    std::string text = "FlatIndex(width=" + std::to_string(view_->width()) + ", len=" + std::to_string(view_->live());
    if (view_->removed->count() > 0) text += ", removed=" + std::to_string(view_->removed->count());
    if (file_) {
      const auto waiting = view_->total() - file_->total + static_cast<int64_t>(file_->gone.size());
      text += ", file='" + file_->path + "'";
      if (waiting > 0) text += ", uncommitted=" + std::to_string(waiting);
    }
    return text + ")";
  }

 private:
  // Smaller records are copied into memory, where neighbours become one segment: many small commits scan like one.
  static constexpr int64_t kWorthMapping = int64_t{1} << 20;

  struct Open {
    Descriptor fd;  // holds the lock
    std::string path;
    int64_t end;                // of the last commit
    uint32_t records;           // up to there
    int64_t total;              // ids up to there
    std::vector<int64_t> gone;  // removed since
  };

  static std::shared_ptr<View> empty(int64_t width) {
    if (width < 1 || width > 128)
      throw std::invalid_argument("width is " + std::to_string(width) +
                                  " bytes; 1 to 128 are allowed (8 to 1024 bits)");
    return std::make_shared<View>(width, choose_kernel().distances);
  }

  // A reader may meet a header that a writer is just putting down: it looks again before it calls that damage.
  static Contents read(int fd, const std::string& path) {
    for (int attempt = 0;; ++attempt) {
      try {
        return Reader(fd, path).read();
      } catch (const FileFault& fault) {
        if (fault.code != 0 || attempt == 20 || !has_writer(fd)) throw;
        std::this_thread::sleep_for(std::chrono::milliseconds(5));
      }
    }
  }

  static void cut(const Open& file) {
    if (::ftruncate(file.fd.get(), file.end) != 0) throw system_fault("writing " + file.path + " failed", errno);
  }

  void publish(std::shared_ptr<View> next) {
    const std::lock_guard<std::mutex> lock(publishing_);
    view_ = std::move(next);
  }

  // Lets the memory of committed codes go: from now on they are searched in the file.
  void map_committed(int64_t first, int64_t codes_at) {
    auto next = std::make_shared<View>(*view_);
    const int64_t rows = next->total() - first;
    const int64_t width = next->width();
    std::shared_ptr<const Mapping> mapping;
    try {
      mapping = std::make_shared<Mapping>(file_->fd.get(), codes_at, rows * width, file_->path);
    } catch (const FileFault&) {
      return;  // the commit stands; its codes stay in memory
    }
    std::vector<Segment>& segments = next->segments;
    while (!segments.empty() && segments.back().first >= first) segments.pop_back();
    if (!segments.empty()) segments.back().rows = std::min(segments.back().rows, first - segments.back().first);
    segments.push_back({mapping, mapping->data(), first, rows, nullptr});
    chunks_.close();
    publish(std::move(next));
  }

  mutable std::mutex writing_;
  mutable std::mutex publishing_;  // held for the copy of one pointer
  std::shared_ptr<View> view_;     // read by writers under writing_, by others through view()
  Chunks chunks_;
  std::unique_ptr<Open> file_;
  Tag tag_{};
  int64_t left_out_ = 0;
};

}  // namespace ragsr
