// The ledger of pages under random operations, right ones and wrong ones. After each the books must balance; what was
// refused must have changed nothing; and the rows of every sequence must hold its own text, in a cache of numbers.
#include "fuzz.h"

#include <algorithm>

namespace {

constexpr int32_t kMostPages = 40, kMostTexts = 24;
constexpr int32_t kOwnKeys = 2;  // keys of sequences are below, keys of pages that are published by hand are not

// A sequence, and what its positions ought to hold: numbers of the key and all tokens so far.
struct Text {
  stars_sequence* handle;
  int64_t key;
  std::vector<int32_t> tokens;
  std::vector<uint64_t> rows;

  uint64_t row_after(int32_t token) const {
    const uint64_t before = rows.empty() ? static_cast<uint64_t>(key) + 1 : rows.back();
    return (before ^ static_cast<uint32_t>(token)) * 0x9E3779B97F4A7C15 + 1;
  }
};

class Run {
 public:
  explicit Run(fuzz::Bytes& bytes) : bytes_(bytes) { open(); }

  void all() {
    while (bytes_.left()) {
      one();
      ++fuzz::operations;
      check();
      if (fuzz::operations % 16 == 0)
        for (const Text& text : texts_) holds_its_text(text);
    }
    while (!texts_.empty()) close_text(0, true);
    for (int32_t page = 0; page < num_pages_; ++page)
      for (; holders_[page]; --holders_[page]) HOLDS(stars_ledger_release(ledger_, &page, 1) == STARS_OK);
    check();
    HOLDS(counts().used == 0);
    HOLDS(stars_ledger_close(ledger_) == STARS_OK);
    HOLDS(stars_ledger_close(ledger_) == STARS_CLOSED);
  }

 private:
  void open() {
    num_pages_ = bytes_.below(kMostPages + 1);
    page_size_ = 1 + bytes_.below(4);
    const stars_ledger_params params = {sizeof params, num_pages_, page_size_};
    ledger_ = stars_ledger_open(&params);
    HOLDS(ledger_ != nullptr);
    holders_.assign(num_pages_ + 1, 0);
    rows_.assign(num_pages_ * page_size_, 0);
  }

  stars_page_counts counts() const {
    stars_page_counts out = {};
    out.size = sizeof out;
    HOLDS(stars_ledger_counts(ledger_, &out) == STARS_OK);
    HOLDS(out.free + out.cached + out.used == num_pages_);
    HOLDS(out.sequences == static_cast<int64_t>(texts_.size()));
    return out;
  }

  void check() const {
    HOLDS(stars_ledger_check(ledger_, holders_.data()) == STARS_OK);
    counts();
  }

  // Whether a call came through; where it did not, nothing has changed.
  bool came_through(int64_t status, const stars_page_counts& before) {
    if (status == STARS_OK) return true;
    HOLDS(status == STARS_INVALID || status == STARS_EXHAUSTED);
    HOLDS(stars_last_status() == status && std::strlen(stars_last_error()) > 20);
    const stars_page_counts after = counts();
    HOLDS(std::memcmp(&before, &after, sizeof before) == 0);
    ++fuzz::refused;
    return false;
  }

  std::vector<int32_t> some_pages() {
    std::vector<int32_t> pages(bytes_.below(6));
    for (int32_t& page : pages) page = bytes_.below(num_pages_ + bytes_.one_in(32));
    return pages;
  }

  std::vector<int32_t> some_tokens(int64_t count) {
    std::vector<int32_t> tokens(count);
    for (int32_t& token : tokens) token = bytes_.byte() & 1;
    return tokens;
  }

  void one() {
    const stars_page_counts before = counts();
    switch (bytes_.below(20)) {
      case 0: return alloc(before);
      case 1: {
        const std::vector<int32_t> pages = some_pages();
        if (came_through(stars_ledger_share(ledger_, pages.data(), pages.size()), before))
          for (const int32_t page : pages) ++holders_[page];
        return;
      }
      case 2: {
        std::vector<int32_t> pages = some_pages();
        if (bytes_.one_in(2))  // mostly those that are held
          std::erase_if(pages, [&](int32_t page) { return !holders_[page]; });
        if (came_through(stars_ledger_release(ledger_, pages.data(), pages.size()), before))
          for (const int32_t page : pages) HOLDS(--holders_[page] >= 0);
        return;
      }
      case 3: return match();
      case 4: return publish(before);
      case 5: {
        const std::vector<int32_t> pages = some_pages();
        came_through(stars_ledger_forget(ledger_, pages.data(), pages.size()), before);
        return;
      }
      case 6: {
        const int32_t page = bytes_.below(num_pages_ + 1);
        if (came_through(stars_ledger_unpublish(ledger_, page), before)) HOLDS(!state(page).published);
        return;
      }
      case 7: {
        const std::vector<int32_t> pages = some_pages();
        const int64_t cost = stars_ledger_cost(ledger_, pages.data(), pages.size());
        HOLDS(cost <= static_cast<int64_t>(pages.size()));
        if (cost < 0) came_through(-cost, before);
        return;
      }
      case 8: case 9: return open_text();
      case 10: case 11: case 12: return extend(before);
      case 13: return fork();
      case 14: return rewind(before);
      case 15: case 16: return publish_text(before);
      case 17:
        if (!texts_.empty()) close_text(bytes_.below(texts_.size()), bytes_.one_in(2));
        return;
      case 18: return wrong(before);
      default:
        if (bytes_.one_in(16)) close_and_open();
    }
  }

  stars_page state(int32_t page) const {
    stars_page out = {};
    out.size = sizeof out;
    HOLDS(stars_ledger_page(ledger_, page, &out) == STARS_OK);
    return out;
  }

  void alloc(const stars_page_counts& before) {
    const int64_t count = bytes_.below(num_pages_ + 4);
    std::vector<int32_t> pages(count + 1);
    const int32_t status = stars_ledger_alloc(ledger_, count, pages.data());
    HOLDS(status == (count <= before.free + before.cached ? STARS_OK : STARS_EXHAUSTED));
    if (!came_through(status, before)) return;
    for (int64_t i = 0; i < count; ++i) {
      HOLDS(holders_[pages[i]]++ == 0 && state(pages[i]).references == 1 && !state(pages[i]).published);
    }
  }

  void match() {
    const int64_t count = bytes_.below(5), key = bytes_.below(kOwnKeys + 2);
    const std::vector<int32_t> tokens = some_tokens(count * page_size_);
    std::vector<int32_t> pages(count + 1);
    const int64_t found = stars_ledger_match(ledger_, key, tokens.data(), count, pages.data());
    HOLDS(found >= 0 && found <= count);
    HOLDS(stars_ledger_match(ledger_, key, tokens.data(), count, nullptr) == found);
    for (int64_t i = 0; i < found; ++i) HOLDS(state(pages[i]).published);
    const int64_t cost = stars_ledger_cost(ledger_, pages.data(), found);
    const stars_page_counts before = counts();
    if (!bytes_.one_in(2)) return;
    HOLDS(stars_ledger_share(ledger_, pages.data(), found) == STARS_OK);
    for (int64_t i = 0; i < found; ++i) ++holders_[pages[i]];
    HOLDS(before.cached - counts().cached == cost);
  }

  void publish(const stars_page_counts& before) {
    std::vector<int32_t> pages = some_pages(), found(pages.size());
    const int64_t count = pages.size(), key = kOwnKeys + bytes_.below(2);
    const std::vector<int32_t> tokens = some_tokens(count * page_size_);
    if (!came_through(stars_ledger_publish(ledger_, key, pages.data(), tokens.data(), count, found.data()), before))
      return;
    HOLDS(stars_ledger_match(ledger_, key, tokens.data(), count, pages.data()) == count && pages == found);
  }

  // -- sequences --------------------------------------------------------------------------------------------------

  std::vector<int32_t> pages_of(const Text& text) const {
    std::vector<int32_t> pages(stars_sequence_pages(text.handle, nullptr, 0));
    HOLDS(stars_sequence_pages(text.handle, pages.data(), pages.size()) == static_cast<int64_t>(pages.size()));
    return pages;
  }

  void holds_its_text(const Text& text) const {
    const std::vector<int32_t> pages = pages_of(text);
    const int64_t length = text.tokens.size();
    HOLDS(stars_sequence_length(text.handle) == length && stars_sequence_shared(text.handle) >= 0);
    HOLDS(static_cast<int64_t>(pages.size()) == (length + page_size_ - 1) / page_size_);
    for (int64_t i = 0; i < length; ++i)
      HOLDS(rows_[pages[i / page_size_] * page_size_ + i % page_size_] == text.rows[i]);
  }

  void append(Text& text, int32_t token) {
    text.rows.push_back(text.row_after(token));
    text.tokens.push_back(token);
  }

  void open_text() {
    if (texts_.size() >= kMostTexts) return;
    Text text = {nullptr, bytes_.below(kOwnKeys), {}, {}};
    std::vector<int32_t> tokens;
    if (!texts_.empty() && bytes_.one_in(2)) tokens = texts_[bytes_.below(texts_.size())].tokens;
    const std::vector<int32_t> more = some_tokens(bytes_.below(8));
    tokens.insert(tokens.end(), more.begin(), more.end());
    text.handle = stars_sequence_open(ledger_, text.key, tokens.data(), tokens.size());
    HOLDS(text.handle != nullptr);
    const int64_t shared = stars_sequence_shared(text.handle);
    HOLDS(shared % page_size_ == 0 && shared <= std::max<int64_t>(0, static_cast<int64_t>(tokens.size()) - 1));
    for (int64_t i = 0; i < shared; ++i) append(text, tokens[i]);
    holds_its_text(text);
    texts_.push_back(text);
  }

  void extend(const stars_page_counts& before) {
    if (texts_.empty()) return;
    Text& text = texts_[bytes_.below(texts_.size())];
    const int64_t count = bytes_.below(bytes_.one_in(16) ? 200 : 3 * page_size_ + 2);
    const size_t held = text.tokens.size();
    const std::vector<int32_t> old = pages_of(text);
    stars_page_copy copy = {};
    copy.size = sizeof copy;
    const int32_t copies = stars_sequence_extend(text.handle, count, &copy);
    if (copies < 0) {
      HOLDS(copies == -STARS_EXHAUSTED);
      came_through(-copies, before);
      return holds_its_text(text);
    }
    HOLDS(copies <= 1);
    if (copies) {
      HOLDS(copy.source == old.back() && copy.rows == static_cast<int64_t>(held) % page_size_ && copy.rows > 0);
      std::copy_n(rows_.begin() + copy.source * page_size_, copy.rows, rows_.begin() + copy.target * page_size_);
    }
    const std::vector<int32_t> pages = pages_of(text), tokens = some_tokens(count);
    for (const int32_t token : tokens) {
      append(text, token);
      const int64_t place = text.tokens.size() - 1;
      const int32_t page = pages[place / page_size_];
      HOLDS(state(page).references == 1 && !state(page).published);  // nobody else reads what is written
      rows_[page * page_size_ + place % page_size_] = text.rows.back();
    }
    holds_its_text(text);
  }

  void fork() {
    if (texts_.empty() || texts_.size() >= kMostTexts) return;
    Text text = texts_[bytes_.below(texts_.size())];
    text.handle = stars_sequence_fork(text.handle);
    HOLDS(text.handle != nullptr);
    holds_its_text(text);
    texts_.push_back(text);
  }

  void rewind(const stars_page_counts& before) {
    if (texts_.empty()) return;
    Text& text = texts_[bytes_.below(texts_.size())];
    const int64_t length = static_cast<int64_t>(text.tokens.size()) - bytes_.below(12) + bytes_.one_in(16);
    const bool inside = length >= 0 && length <= static_cast<int64_t>(text.tokens.size());
    const int32_t status = stars_sequence_rewind(text.handle, length);
    HOLDS((status == STARS_OK) == inside);
    if (!came_through(status, before)) return;
    text.tokens.resize(length);
    text.rows.resize(length);
  }

  void publish_text(const stars_page_counts& before) {
    if (texts_.empty()) return;
    const Text& text = texts_[bytes_.below(texts_.size())];
    const int64_t count = text.tokens.size();
    // A page of it that was published by hand, under another key, is refused.
    if (came_through(stars_sequence_publish(text.handle, text.tokens.data(), count), before))
      HOLDS(stars_ledger_match(ledger_, text.key, text.tokens.data(), count / page_size_, nullptr) ==
            count / page_size_);
  }

  void close_text(int32_t which, bool plain) {
    const Text text = texts_[which];
    int32_t status = STARS_INVALID;
    if (!plain) {
      status = stars_sequence_close(text.handle, text.tokens.data(), text.tokens.size());
      HOLDS(status == STARS_OK || status == STARS_INVALID);
    }
    if (status != STARS_OK) HOLDS(stars_sequence_close(text.handle, nullptr, 0) == STARS_OK);
    HOLDS(stars_sequence_close(text.handle, nullptr, 0) == STARS_CLOSED);
    gone_ = text.handle;
    texts_.erase(texts_.begin() + which);
  }

  void close_and_open() {
    stars_ledger* const last = ledger_;
    const int32_t status = stars_ledger_close(ledger_);
    HOLDS(status == (texts_.empty() ? STARS_OK : STARS_INVALID));
    if (status != STARS_OK) return;
    open();
    HOLDS(stars_ledger_close(last) == STARS_CLOSED && stars_ledger_check(last, nullptr) == STARS_CLOSED);
  }

  // -- what is always refused -------------------------------------------------------------------------------------

  void wrong(const stars_page_counts& before) {
    stars_page_counts sized = {};
    sized.size = sizeof sized - 8 * (1 + bytes_.below(3));
    stars_page page = {};
    stars_page_copy copy = {};
    copy.size = bytes_.byte() & 15;
    int32_t pages[4] = {0, 0, 0, 0};
    stars_sequence* const text = texts_.empty() ? nullptr : texts_[bytes_.below(texts_.size())].handle;
    const int64_t many = int64_t{1} << (40 + bytes_.below(23));
    int64_t status = 0;
    const int which = bytes_.below(28);
    switch (which) {
      case 0: status = stars_ledger_alloc(nullptr, 1, pages); break;
      case 1: status = stars_ledger_alloc(ledger_, -1 - bytes_.byte(), pages); break;
      case 2: status = stars_ledger_alloc(ledger_, 1, nullptr); break;
      case 3: status = stars_ledger_alloc(ledger_, many, pages); break;
      case 4: status = stars_ledger_share(ledger_, nullptr, 2); break;
      case 5: status = stars_ledger_release(ledger_, pages, -3); break;
      case 6: pages[1] = num_pages_; status = stars_ledger_release(ledger_, pages, 2); break;
      case 7: pages[1] = -1; status = stars_ledger_share(ledger_, pages, 2); break;
      case 8: status = -stars_ledger_match(ledger_, 0, nullptr, 1, pages); break;
      case 9: status = -stars_ledger_match(ledger_, 0, pages, -many, pages); break;
      case 10: status = stars_ledger_publish(ledger_, 0, pages, nullptr, 1, pages); break;
      case 11: status = stars_ledger_publish(ledger_, 0, nullptr, pages, 1, pages); break;
      case 12: status = stars_ledger_unpublish(ledger_, -1 - bytes_.byte()); break;
      case 13: status = stars_ledger_page(ledger_, 0, &page); break;
      case 14: status = stars_ledger_page(ledger_, 0, nullptr); break;
      case 15: status = stars_ledger_counts(ledger_, &sized); break;
      case 16: status = stars_ledger_check(nullptr, nullptr); break;
      case 17: status = -stars_ledger_cost(ledger_, nullptr, 4); break;
      case 18: status = stars_sequence_open(ledger_, 0, nullptr, 5) ? 0 : stars_last_status(); break;
      case 19: status = stars_sequence_open(ledger_, 0, pages, -5) ? 0 : stars_last_status(); break;
      case 20: status = text ? -stars_sequence_extend(text, 1, &copy) : STARS_INVALID; break;
      case 21: status = text ? -stars_sequence_extend(text, 1, nullptr) : STARS_INVALID; break;
      case 22: status = text ? stars_sequence_publish(text, nullptr, 1) : STARS_INVALID; break;
      case 23: status = text ? stars_sequence_publish(text, pages, many) : STARS_INVALID; break;
      case 24: status = -stars_sequence_pages(text, pages, -1); break;
      case 25: status = text ? stars_sequence_close(text, nullptr, 3) : STARS_INVALID; break;
      case 26: {  // another kind's handle, and one that was closed
        HOLDS(!text || stars_ledger_check(reinterpret_cast<stars_ledger*>(text), nullptr) == STARS_CLOSED);
        HOLDS(stars_sequence_length(reinterpret_cast<stars_sequence*>(ledger_)) == -STARS_CLOSED);
        HOLDS(!gone_ || stars_sequence_fork(gone_) == nullptr);
        HOLDS(!gone_ || stars_last_status() == STARS_CLOSED);
        return;
      }
      default: {
        stars_ledger_params params = {sizeof params, 4, 2};
        (bytes_.one_in(2) ? params.size : bytes_.one_in(2) ? params.num_pages : params.page_size) = -many;
        HOLDS(stars_ledger_open(&params) == nullptr && stars_last_status() == STARS_INVALID);
        return;
      }
    }
    HOLDS(status == STARS_INVALID || (which == 3 && status == STARS_EXHAUSTED));
    const stars_page_counts after = counts();
    HOLDS(std::memcmp(&before, &after, sizeof before) == 0);
    ++fuzz::refused;
  }

  fuzz::Bytes& bytes_;
  stars_ledger* ledger_ = nullptr;
  int32_t num_pages_ = 0, page_size_ = 1;
  std::vector<int64_t> holders_;  // by page, what is held by hand
  std::vector<uint64_t> rows_;    // of the cache
  std::vector<Text> texts_;
  stars_sequence* gone_ = nullptr;
};

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  fuzz::Bytes bytes(data, size);
  ++fuzz::inputs;
  Run(bytes).all();
  fuzz::finish("fuzz_ledger");
  return 0;
}
