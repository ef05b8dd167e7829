// The ledger of a KV cache's pages: who refers to which page, and which token prefix a page holds. engine/page_pool.py
// has the same, page number for page number; and tables of pages on top of it, as engine/cache.py has them.
//
// All that the ledger itself needs is taken when it is made: only tables grow. What is refused has changed nothing:
// the functions below return a status then, and stars_last_error has the text, which begins with `where`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "stars.h"

namespace stars {

constexpr int32_t kNoPage = -1;

// The pages of one text: position p lies in pages[p / page_size].
struct page_table {
  int64_t key = 0;
  int64_t length = 0;  // positions; there are just as many pages as they need
  int64_t shared = 0;  // positions that were found when it was opened
  std::vector<int32_t> pages;
  size_t place = 0;  // among the ledger's tables
  stars_ledger* ledger = nullptr;
};

class page_ledger {
 public:
  // Throws std::bad_alloc, and nothing below does but where it says so.
  page_ledger(int64_t num_pages, int64_t page_size);

  int64_t page_size() const { return page_size_; }
  int64_t num_pages() const { return static_cast<int64_t>(pages_.size()); }
  int64_t num_tables() const { return static_cast<int64_t>(tables_.size()); }
  int64_t available() const { return static_cast<int64_t>(free_.size()) + num_cached_; }
  int64_t pages_for(int64_t positions) const { return (positions + page_size_ - 1) / page_size_; }

  int32_t alloc(const char* where, int64_t count, int32_t* pages);
  int32_t share(const char* where, const int32_t* pages, int64_t count);
  int32_t release(const char* where, const int32_t* pages, int64_t count);
  int64_t match(int64_t key, const int32_t* tokens, int64_t count, int32_t* pages) const;  // pages: or NULL
  int32_t publish(const char* where, int64_t key, const int32_t* pages, const int32_t* tokens, int64_t count,
                  int32_t* found);  // found: or NULL
  int32_t forget(const char* where, const int32_t* pages, int64_t count);
  int32_t unpublish(const char* where, int32_t page);
  int64_t cost(const char* where, const int32_t* pages, int64_t count) const;  // or a status times -1
  int32_t page(const char* where, int32_t page, stars_page* out) const;
  void counts(stars_page_counts* out) const;
  // STARS_CORRUPT and a text where the books do not balance. `holders`: or NULL. Throws std::bad_alloc.
  int32_t check(const char* where, const int64_t* holders) const;

  // Tables. `add` and `fork` throw std::bad_alloc and have then changed nothing; so does `extend`.
  void add(page_table& table, const int32_t* tokens, int64_t count);
  void fork(const page_table& from, page_table& table);
  int32_t extend(const char* where, page_table& table, int64_t tokens, stars_page_copy* copy, int32_t* copies);
  int32_t rewind(const char* where, page_table& table, int64_t length);
  int32_t publish(const char* where, page_table& table, const int32_t* tokens, int64_t count);
  int32_t remove(const char* where, page_table& table, const int32_t* tokens, int64_t count);  // tokens: or NULL

 private:
  struct record {
    int64_t references = 0;
    int64_t key = 0;
    int32_t in_tables = 0;  // of the references, those of tables: no caller can release them
    uint32_t hash = 0;
    // Of a published page: what it continues; those that continue it, in the order in which they came; its neighbours
    // among these; and the next one of its bucket.
    int32_t parent = kNoPage, first_child = kNoPage, last_child = kNoPage;
    int32_t previous_sibling = kNoPage, next_sibling = kNoPage, next_in_bucket = kNoPage;
    int32_t older = kNoPage, newer = kNoPage;  // of a cached page, one that is published and has no reference
    bool published = false;
  };

  const int32_t* tokens_of(int32_t page) const { return tokens_.data() + page * page_size_; }
  uint32_t hash_of(int64_t key, int32_t parent, const int32_t* tokens) const;
  int32_t find(int64_t key, int32_t parent, const int32_t* tokens, uint32_t hash) const;
  int32_t check_pages(const char* where, const int32_t* pages, int64_t count) const;
  int32_t lacks(const char* where, int64_t count) const;
  int32_t take();
  void refer(int32_t page);
  void release_one(int32_t page);
  void enter(int32_t page, int64_t key, int32_t parent, const int32_t* tokens, uint32_t hash);
  void withdraw(int32_t page);
  void into_cached(int32_t page);
  void out_of_cached(int32_t page);
  void give_back(page_table& table, size_t from);

  int64_t page_size_;
  std::vector<record> pages_;
  std::vector<int32_t> tokens_;  // [pages, page_size], of those that are published
  std::vector<int32_t> free_;    // the next one to be handed out is the last
  std::vector<int32_t> buckets_;
  std::vector<int32_t> stack_;
  int32_t oldest_ = kNoPage, newest_ = kNoPage;
  int64_t num_cached_ = 0, num_published_ = 0;
  std::vector<page_table*> tables_;
};

}  // namespace stars
