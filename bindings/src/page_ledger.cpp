#include "page_ledger.h"

#include <algorithm>
#include <bit>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <utility>

#include "error.h"

namespace stars {
namespace {

// fail() with numbers in the text.
[[gnu::format(printf, 3, 4)]] int32_t refuse(const char* where, int32_t status, const char* format, ...) {
  char text[224];
  va_list values;
  va_start(values, format);
  std::vsnprintf(text, sizeof text, format, values);
  va_end(values);
  return fail(where, text, status);
}

long long wide(int64_t number) { return number; }

// Room for `more` elements, so that appending them does not throw.
template <class T>
void make_room(std::vector<T>& values, size_t more) {
  if (const size_t needed = values.size() + more; needed > values.capacity())
    values.reserve(std::max(needed, 2 * values.capacity()));
}

}  // namespace

page_ledger::page_ledger(int64_t num_pages, int64_t page_size)
    : page_size_(page_size), pages_(num_pages), tokens_(num_pages * page_size), free_(num_pages),
      buckets_(std::bit_ceil(static_cast<uint64_t>(num_pages + 1)), kNoPage) {
  // Low page numbers are handed out first and reused first: memory that was never written stays untouched.
  for (int64_t page = 0; page < num_pages; ++page) free_[num_pages - 1 - page] = static_cast<int32_t>(page);
  stack_.reserve(num_pages);
}

// -- pages ------------------------------------------------------------------------------------------------------------

int32_t page_ledger::alloc(const char* where, int64_t count, int32_t* pages) {
  if (const int32_t status = lacks(where, count)) return status;
  for (int64_t i = 0; i < count; ++i) pages[i] = take();
  return STARS_OK;
}

int32_t page_ledger::share(const char* where, const int32_t* pages, int64_t count) {
  if (const int32_t status = check_pages(where, pages, count)) return status;
  for (int64_t i = 0; i < count; ++i)
    if (const record& one = pages_[pages[i]]; one.references == 0 && !one.published)
      return refuse(where, STARS_INVALID, "page %d is free and cannot be shared: share pages that "
                    "stars_ledger_match found", pages[i]);
  for (int64_t i = 0; i < count; ++i) refer(pages[i]);
  return STARS_OK;
}

int32_t page_ledger::release(const char* where, const int32_t* pages, int64_t count) {
  if (const int32_t status = check_pages(where, pages, count)) return status;
  int64_t i = count;
  while (i > 0 && pages_[pages[i - 1]].references > pages_[pages[i - 1]].in_tables) --pages_[pages[--i]].references;
  for (int64_t j = i; j < count; ++j) ++pages_[pages[j]].references;
  if (i > 0)
    return refuse(where, STARS_INVALID, "page %d was released more often than it was taken: release each page once",
                  pages[i - 1]);
  // The last page is released first, hence reused first: a prefix shrinks from its end and never loses its root.
  for (i = count; i > 0; --i) release_one(pages[i - 1]);
  return STARS_OK;
}

int64_t page_ledger::match(int64_t key, const int32_t* tokens, int64_t count, int32_t* pages) const {
  int32_t parent = kNoPage;
  int64_t found = 0;
  for (; found < count; ++found) {
    const int32_t* const own = tokens + found * page_size_;
    parent = find(key, parent, own, hash_of(key, parent, own));
    if (parent == kNoPage) break;
    if (pages) pages[found] = parent;
  }
  return found;
}

int32_t page_ledger::publish(const char* where, int64_t key, const int32_t* pages, const int32_t* tokens,
                             int64_t count, int32_t* found) {
  if (const int32_t status = check_pages(where, pages, count)) return status;
  // What continues a page that is new in the index is new too.
  const int64_t known = match(key, tokens, count, nullptr);
  int64_t good = known;
  for (; good < count; ++good) {
    record& one = pages_[pages[good]];
    if (one.references == 0 || one.published) break;
    one.published = true;  // for now: the same page a second time is seen
  }
  for (int64_t i = known; i < good; ++i) pages_[pages[i]].published = false;
  if (good < count)
    return refuse(where, STARS_INVALID, "page %d is free or published for other tokens: publish the tokens the table "
                  "holds", pages[good]);
  int32_t parent = kNoPage;
  for (int64_t i = 0; i < count; ++i) {
    const int32_t* const own = tokens + i * page_size_;
    const uint32_t hash = hash_of(key, parent, own);
    if (i < known) {
      parent = find(key, parent, own, hash);
    } else {
      enter(pages[i], key, parent, own, hash);
      parent = pages[i];
    }
    if (found) found[i] = parent;
  }
  return STARS_OK;
}

int32_t page_ledger::forget(const char* where, const int32_t* pages, int64_t count) {
  if (const int32_t status = check_pages(where, pages, count)) return status;
  for (int64_t i = count; i > 0; --i) {
    const record& one = pages_[pages[i - 1]];
    if (one.references || one.first_child != kNoPage) break;
    withdraw(pages[i - 1]);
  }
  return STARS_OK;
}

int32_t page_ledger::unpublish(const char* where, int32_t page) {
  if (const int32_t status = check_pages(where, &page, 1)) return status;
  withdraw(page);
  return STARS_OK;
}

int64_t page_ledger::cost(const char* where, const int32_t* pages, int64_t count) const {
  if (const int32_t status = check_pages(where, pages, count)) return -status;
  return std::count_if(pages, pages + count, [&](int32_t page) { return pages_[page].references == 0; });
}

int32_t page_ledger::page(const char* where, int32_t page, stars_page* out) const {
  if (const int32_t status = check_pages(where, &page, 1)) return status;
  const record& one = pages_[page];
  out->references = one.references;
  out->published = one.published;
  out->cached = one.published && one.references == 0;
  return STARS_OK;
}

void page_ledger::counts(stars_page_counts* out) const {
  out->free = static_cast<int64_t>(free_.size());
  out->cached = num_cached_;
  out->used = num_pages() - out->free - out->cached;
  out->published = num_published_;
  out->sequences = num_tables();
}

// -- tables -----------------------------------------------------------------------------------------------------------

void page_ledger::add(page_table& table, const int32_t* tokens, int64_t count) {
  const int64_t most = count > 0 ? (count - 1) / page_size_ : 0;  // the last token is always left to run
  make_room(tables_, 1);
  table.pages.resize(match(table.key, tokens, most, nullptr));
  match(table.key, tokens, static_cast<int64_t>(table.pages.size()), table.pages.data());
  for (const int32_t page : table.pages) {
    refer(page);
    ++pages_[page].in_tables;
  }
  table.length = table.shared = static_cast<int64_t>(table.pages.size()) * page_size_;
  table.place = tables_.size();
  tables_.push_back(&table);
}

void page_ledger::fork(const page_table& from, page_table& table) {
  make_room(tables_, 1);
  table.pages = from.pages;
  table.key = from.key;
  table.length = table.shared = from.length;
  for (const int32_t page : table.pages) {
    refer(page);
    ++pages_[page].in_tables;
  }
  table.place = tables_.size();
  tables_.push_back(&table);
}

int32_t page_ledger::extend(const char* where, page_table& table, int64_t tokens, stars_page_copy* copy,
                            int32_t* copies) {
  *copies = 0;
  if (tokens == 0) return STARS_OK;
  const int64_t held = static_cast<int64_t>(table.pages.size());
  const int64_t missing = pages_for(table.length + tokens) - held;
  const int32_t rows = static_cast<int32_t>(table.length % page_size_);
  const int32_t tail = rows ? table.pages.back() : kNoPage;
  const bool shared = rows && pages_[tail].references > 1;
  if (const int32_t status = lacks(where, missing + shared)) return status;
  make_room(table.pages, missing);
  if (shared) {
    // The same order as the engine's: the copy gets the first page that is taken.
    const int32_t fresh = take();
    ++pages_[fresh].in_tables;
    copy->source = tail;
    copy->target = fresh;
    copy->rows = rows;
    *copies = 1;
  }
  for (int64_t i = 0; i < missing; ++i) {
    table.pages.push_back(take());
    ++pages_[table.pages.back()].in_tables;
  }
  if (shared) {
    --pages_[tail].in_tables;
    release_one(tail);
    table.pages[held - 1] = copy->target;
  } else if (rows) {
    withdraw(tail);  // of a rewound table: whoever found it now would share it before it is overwritten
  }
  table.length += tokens;
  return STARS_OK;
}

int32_t page_ledger::rewind(const char* where, page_table& table, int64_t length) {
  if (length < 0 || length > table.length)
    return refuse(where, STARS_INVALID, "a sequence of %lld positions cannot be rewound to %lld: only shorten it",
                  wide(table.length), wide(length));
  give_back(table, pages_for(length));
  table.length = length;
  return STARS_OK;
}

int32_t page_ledger::publish(const char* where, page_table& table, const int32_t* tokens, int64_t count) {
  if (count > table.length)
    return refuse(where, STARS_INVALID, "%lld tokens are more than the %lld positions of the sequence: publish what "
                  "it holds", wide(count), wide(table.length));
  return publish(where, table.key, table.pages.data(), tokens, count / page_size_, nullptr);
}

int32_t page_ledger::remove(const char* where, page_table& table, const int32_t* tokens, int64_t count) {
  if (tokens) {
    if (const int32_t status = publish(where, table, tokens, count)) return status;
    // Pages that another one has published before count as used now, lest a prefix go before what continues it.
    int32_t parent = kNoPage;
    for (int64_t i = 0; i < count / page_size_; ++i) {
      const int32_t* const own = tokens + i * page_size_;
      parent = find(table.key, parent, own, hash_of(table.key, parent, own));
      if (parent == table.pages[i]) continue;
      refer(parent);
      ++pages_[parent].in_tables;
      --pages_[table.pages[i]].in_tables;
      release_one(table.pages[i]);
      table.pages[i] = parent;
    }
  }
  give_back(table, 0);
  tables_[table.place] = tables_.back();
  tables_[table.place]->place = table.place;
  tables_.pop_back();
  return STARS_OK;
}

void page_ledger::give_back(page_table& table, size_t from) {
  while (table.pages.size() > from) {
    const int32_t page = table.pages.back();
    table.pages.pop_back();
    --pages_[page].in_tables;
    release_one(page);
  }
}

// -- internals --------------------------------------------------------------------------------------------------------

uint32_t page_ledger::hash_of(int64_t key, int32_t parent, const int32_t* tokens) const {
  constexpr uint64_t odd = 0x9E3779B97F4A7C15;
  uint64_t hash = (static_cast<uint64_t>(key) + 1) * odd ^ static_cast<uint32_t>(parent);
  for (int64_t i = 0; i < page_size_; ++i) {
    hash = (hash ^ static_cast<uint32_t>(tokens[i])) * odd;
    hash ^= hash >> 32;
  }
  return static_cast<uint32_t>(hash);
}

// The page that is published for these tokens below `parent`: every token is compared, so a hit is exact.
int32_t page_ledger::find(int64_t key, int32_t parent, const int32_t* tokens, uint32_t hash) const {
  int32_t page = buckets_[hash & (buckets_.size() - 1)];
  for (; page != kNoPage; page = pages_[page].next_in_bucket) {
    const record& one = pages_[page];
    if (one.hash == hash && one.parent == parent && one.key == key &&
        std::memcmp(tokens_of(page), tokens, page_size_ * sizeof *tokens) == 0)
      break;
  }
  return page;
}

int32_t page_ledger::check_pages(const char* where, const int32_t* pages, int64_t count) const {
  for (int64_t i = 0; i < count; ++i)
    if (pages[i] < 0 || pages[i] >= num_pages())
      return refuse(where, STARS_INVALID, "there is no page %d: the ledger has %lld, from 0 on", pages[i],
                    wide(num_pages()));
  return STARS_OK;
}

int32_t page_ledger::lacks(const char* where, int64_t count) const {
  if (count <= available()) return STARS_OK;
  return refuse(where, STARS_EXHAUSTED, "%lld pages are needed and %lld are free: release some, or open the ledger "
                "with more", wide(count), wide(available()));
}

// A page for one holder; there must be one.
int32_t page_ledger::take() {
  if (free_.empty()) withdraw(oldest_);
  const int32_t page = free_.back();
  free_.pop_back();
  pages_[page].references = 1;
  return page;
}

void page_ledger::refer(int32_t page) {
  if (pages_[page].references++ == 0) out_of_cached(page);
}

void page_ledger::release_one(int32_t page) {
  if (--pages_[page].references > 0) return;
  if (pages_[page].published)
    into_cached(page);
  else
    free_.push_back(page);
}

void page_ledger::into_cached(int32_t page) {
  pages_[page].older = newest_;
  pages_[page].newer = kNoPage;
  (newest_ == kNoPage ? oldest_ : pages_[newest_].newer) = page;
  newest_ = page;
  ++num_cached_;
}

void page_ledger::out_of_cached(int32_t page) {
  const record& one = pages_[page];
  (one.older == kNoPage ? oldest_ : pages_[one.older].newer) = one.newer;
  (one.newer == kNoPage ? newest_ : pages_[one.newer].older) = one.older;
  --num_cached_;
}

// Lets `page` be found by these tokens below `parent`.
void page_ledger::enter(int32_t page, int64_t key, int32_t parent, const int32_t* tokens, uint32_t hash) {
  record& one = pages_[page];
  one.published = true;
  one.key = key;
  one.hash = hash;
  one.parent = parent;
  one.first_child = one.last_child = one.previous_sibling = one.next_sibling = kNoPage;
  if (parent != kNoPage) {
    record& above = pages_[parent];
    one.previous_sibling = above.last_child;
    (above.last_child == kNoPage ? above.first_child : pages_[above.last_child].next_sibling) = page;
    above.last_child = page;
  }
  int32_t& bucket = buckets_[hash & (buckets_.size() - 1)];
  one.next_in_bucket = bucket;
  bucket = page;
  std::memcpy(tokens_.data() + page * page_size_, tokens, page_size_ * sizeof *tokens);
  ++num_published_;
}

// Removes `page` and every page reached through it from the index; cached ones among them become free. The number of a
// reused page may stand for another prefix later: entries below it would be wrong hits then.
void page_ledger::withdraw(int32_t page) {
  if (!pages_[page].published) return;
  if (const record& one = pages_[page]; one.parent != kNoPage) {
    record& above = pages_[one.parent];
    (one.previous_sibling == kNoPage ? above.first_child : pages_[one.previous_sibling].next_sibling) =
        one.next_sibling;
    (one.next_sibling == kNoPage ? above.last_child : pages_[one.next_sibling].previous_sibling) =
        one.previous_sibling;
  }
  stack_.assign(1, page);
  while (!stack_.empty()) {
    const int32_t lost = stack_.back();
    stack_.pop_back();
    record& one = pages_[lost];
    for (int32_t child = one.first_child; child != kNoPage; child = pages_[child].next_sibling) stack_.push_back(child);
    one.first_child = one.last_child = kNoPage;
    int32_t* link = &buckets_[one.hash & (buckets_.size() - 1)];
    while (*link != lost) link = &pages_[*link].next_in_bucket;
    *link = one.next_in_bucket;
    one.published = false;
    --num_published_;
    if (one.references == 0) {
      out_of_cached(lost);
      free_.push_back(lost);
    }
  }
}

// -- books ------------------------------------------------------------------------------------------------------------

int32_t page_ledger::check(const char* where, const int64_t* holders) const {
  const int64_t count = num_pages(), free = static_cast<int64_t>(free_.size());
  const int64_t used =
      std::count_if(pages_.begin(), pages_.end(), [](const record& one) { return one.references > 0; });
  char counts[128];
  std::snprintf(counts, sizeof counts, "%lld free + %lld cached + %lld in use of %lld pages", wide(free),
                wide(num_cached_), wide(used), wide(count));
  const auto corrupt = [&](const char* what) { return refuse(where, STARS_CORRUPT, "%s: %s", what, counts); };
  const auto inside = [&](int32_t page) { return page >= 0 && page < count; };
  if (free + num_cached_ + used != count) return corrupt("pages were lost or doubled");

  std::vector<char> idle(count);
  const auto stands_alone = [&](int32_t page) {
    return inside(page) && !pages_[page].references && !std::exchange(idle[page], 1);
  };
  for (const int32_t page : free_)
    if (!stands_alone(page) || pages_[page].published) return corrupt("a page is free twice or free and in use");
  int64_t cached = 0;
  int32_t before = kNoPage;
  for (int32_t page = oldest_; page != kNoPage; before = page, page = pages_[page].newer, ++cached)
    if (!stands_alone(page) || !pages_[page].published || pages_[page].older != before)
      return corrupt("a page is kept for sharing that is free, in use or cannot be found");
  if (cached != num_cached_ || before != newest_) return corrupt("pages that are kept for sharing were lost");

  std::vector<int32_t> in_tables(count);
  for (const page_table* table : tables_) {
    if (static_cast<int64_t>(table->pages.size()) != pages_for(table->length))
      return corrupt("a sequence has more or fewer pages than its positions need");
    for (const int32_t page : table->pages) {
      if (!inside(page)) return corrupt("a sequence has a page that there is not");
      ++in_tables[page];
    }
  }
  for (int64_t page = 0; page < count; ++page) {
    const record& one = pages_[page];
    if (one.in_tables != in_tables[page] || one.references < one.in_tables)
      return refuse(where, STARS_CORRUPT, "page %lld has %lld references and %d sequences that hold it: %s",
                    wide(page), wide(one.references), in_tables[page], counts);
    if (holders && one.references - one.in_tables != holders[page])
      return refuse(where, STARS_CORRUPT, "page %lld has %lld references and %lld holders: %s", wide(page),
                    wide(one.references - one.in_tables), wide(holders[page]), counts);
  }

  int64_t entries = 0, linked = 0, below = 0, published = 0;
  for (size_t bucket = 0; bucket < buckets_.size(); ++bucket)
    for (int32_t page = buckets_[bucket]; page != kNoPage; page = pages_[page].next_in_bucket) {
      if (++entries > count || !inside(page)) return corrupt("the prefix index runs in a circle");
      const record& one = pages_[page];
      const bool reached = one.parent == kNoPage || (inside(one.parent) && pages_[one.parent].published &&
                                                     pages_[one.parent].key == one.key);
      if (!one.published || !reached || (one.hash & (buckets_.size() - 1)) != bucket ||
          one.hash != hash_of(one.key, one.parent, tokens_of(page)))
        return refuse(where, STARS_CORRUPT, "the prefix index holds page %d under %d, which does not lead to it: %s",
                      page, one.parent, counts);
      below += one.parent != kNoPage;
    }
  for (int32_t page = 0; page < count; ++page) {
    const record& one = pages_[page];
    if (!one.published) continue;
    ++published;
    int32_t last = kNoPage;
    for (int32_t child = one.first_child; child != kNoPage; last = child, child = pages_[child].next_sibling)
      if (++linked > count || !inside(child) || pages_[child].parent != page || !pages_[child].published ||
          pages_[child].previous_sibling != last)
        return corrupt("a page is linked to one that it does not continue");
    if (last != one.last_child) return corrupt("a page is linked to one that it does not continue");
  }
  if (published != entries || published != num_published_)
    return refuse(where, STARS_CORRUPT, "the prefix index has %lld entries for %lld published pages: %s",
                  wide(entries), wide(published), counts);
  if (linked != below) return corrupt("the prefix index has entries that nothing leads to");
  return STARS_OK;
}

}  // namespace stars
