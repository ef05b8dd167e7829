// The C interface of the ledger of pages: finds the objects of handles, checks sizes and addresses.
#include <algorithm>
#include <memory>
#include <utility>

#include "error.h"
#include "handles.h"
#include "page_ledger.h"
#include "sizes.h"
#include "stars.h"

namespace {

using stars::fail;
using stars::fits;
using stars::guarded;
using stars::page_ledger;
using stars::page_table;

stars::handle_table<page_ledger, stars_ledger, stars::kLedger> ledgers;
stars::handle_table<page_table, stars_sequence, stars::kSequence> sequences;
using taken_ledger = decltype(ledgers)::taken;

constexpr char kNegative[] = "count must be >= 0, and is too large above 2^46";
constexpr char kNoPages[] = "pages must not be null where count is not 0";
constexpr char kNoTokens[] = "tokens must not be null where count is not 0";
constexpr char kTooManyTokens[] = "count pages of tokens are too many: together they must be at most 2^46";
constexpr char kOtherSize[] = "size must be the sizeof of the struct that this version of stars.h has";

// What is wrong with so many pages; null: nothing.
const char* wrong(const int32_t* pages, int64_t count) {
  if (!fits(count)) return kNegative;
  return count && !pages ? kNoPages : nullptr;
}

template <class T>
const char* wrong_struct(const T* out) {
  if (!out) return "the struct must not be null";
  return out->size == sizeof *out ? nullptr : kOtherSize;
}

// f(ledger) of a handle's ledger; or why there is none.
template <class F>
int32_t with_ledger(stars_ledger* handle, const char* where, F&& f) {
  const taken_ledger held(ledgers, handle, where);
  return held ? f(*held) : held.status;
}

// f(ledger, table) of a handle's sequence; or why there is none.
template <class F>
int32_t with_sequence(stars_sequence* handle, const char* where, F&& f) {
  const decltype(sequences)::taken table(sequences, handle, where);
  if (!table) return table.status;
  return with_ledger(table->ledger, where, [&](page_ledger& ledger) { return f(ledger, *table); });
}

// A handle for a table that `join` puts among those of a ledger, which the caller has; null where it throws.
template <class Join>
stars_sequence* new_sequence(const char* where, stars_ledger* ledger, Join&& join) {
  stars_sequence* made = nullptr;
  const int32_t status = guarded(where, [&] {
    auto table = std::make_unique<page_table>();
    table->ledger = ledger;
    page_table& joined = *table;
    made = sequences.open(std::move(table), where);  // first, as it may find no room
    if (made) join(joined);
  });
  if (status == STARS_OK || !made) return made;
  sequences.close(made, where);
  return nullptr;
}

}  // namespace

stars_ledger* stars_ledger_open(const stars_ledger_params* params) {
  constexpr char where[] = "stars_ledger_open";
  const char* text = wrong_struct(params);
  if (!text && (params->num_pages < 0 || params->num_pages > INT32_MAX))
    text = "num_pages must be >= 0 and below 2^31, as numbers of pages are";
  if (!text && (params->page_size <= 0 || params->page_size > INT32_MAX))
    text = "page_size must be positive and below 2^31";
  if (!text && !fits(params->num_pages, params->page_size)) text = "num_pages * page_size is too large";
  if (text) {
    fail(where, text);
    return nullptr;
  }
  stars_ledger* made = nullptr;
  guarded(where, [&] {
    made = ledgers.open(std::make_unique<page_ledger>(params->num_pages, params->page_size), where);
  });
  return made;
}

int32_t stars_ledger_close(stars_ledger* ledger) {
  constexpr char where[] = "stars_ledger_close";
  return ledgers.close(ledger, where, [=](const page_ledger& held) {
    if (held.num_tables()) return fail(where, "sequences of the ledger are open: close them first");
    return int32_t{STARS_OK};
  });
}

int32_t stars_ledger_alloc(stars_ledger* ledger, int64_t count, int32_t* pages) {
  constexpr char where[] = "stars_ledger_alloc";
  return with_ledger(ledger, where, [=](page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    return held.alloc(where, count, pages);
  });
}

int32_t stars_ledger_share(stars_ledger* ledger, const int32_t* pages, int64_t count) {
  constexpr char where[] = "stars_ledger_share";
  return with_ledger(ledger, where, [=](page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    return held.share(where, pages, count);
  });
}

int32_t stars_ledger_release(stars_ledger* ledger, const int32_t* pages, int64_t count) {
  constexpr char where[] = "stars_ledger_release";
  return with_ledger(ledger, where, [=](page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    return held.release(where, pages, count);
  });
}

int64_t stars_ledger_match(stars_ledger* ledger, int64_t key, const int32_t* tokens, int64_t count, int32_t* pages) {
  constexpr char where[] = "stars_ledger_match";
  int64_t found = 0;
  const int32_t status = with_ledger(ledger, where, [&](const page_ledger& held) {
    if (!fits(count)) return fail(where, kNegative);
    if (!fits(count, held.page_size())) return fail(where, kTooManyTokens);
    if (count && !tokens) return fail(where, kNoTokens);
    found = held.match(key, tokens, count, pages);
    return int32_t{STARS_OK};
  });
  return status == STARS_OK ? found : -status;
}

int32_t stars_ledger_publish(stars_ledger* ledger, int64_t key, const int32_t* pages, const int32_t* tokens,
                             int64_t count, int32_t* found) {
  constexpr char where[] = "stars_ledger_publish";
  return with_ledger(ledger, where, [=](page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    if (!fits(count, held.page_size())) return fail(where, kTooManyTokens);
    if (count && !tokens) return fail(where, kNoTokens);
    return held.publish(where, key, pages, tokens, count, found);
  });
}

int32_t stars_ledger_forget(stars_ledger* ledger, const int32_t* pages, int64_t count) {
  constexpr char where[] = "stars_ledger_forget";
  return with_ledger(ledger, where, [=](page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    return held.forget(where, pages, count);
  });
}

int32_t stars_ledger_unpublish(stars_ledger* ledger, int32_t page) {
  constexpr char where[] = "stars_ledger_unpublish";
  return with_ledger(ledger, where, [=](page_ledger& held) { return held.unpublish(where, page); });
}

int64_t stars_ledger_cost(stars_ledger* ledger, const int32_t* pages, int64_t count) {
  constexpr char where[] = "stars_ledger_cost";
  int64_t cost = 0;
  const int32_t status = with_ledger(ledger, where, [&](const page_ledger& held) {
    if (const char* text = wrong(pages, count)) return fail(where, text);
    cost = held.cost(where, pages, count);
    return cost < 0 ? static_cast<int32_t>(-cost) : int32_t{STARS_OK};
  });
  return status == STARS_OK ? cost : -status;
}

int32_t stars_ledger_page(stars_ledger* ledger, int32_t page, stars_page* out) {
  constexpr char where[] = "stars_ledger_page";
  return with_ledger(ledger, where, [=](const page_ledger& held) {
    if (const char* text = wrong_struct(out)) return fail(where, text);
    return held.page(where, page, out);
  });
}

int32_t stars_ledger_counts(stars_ledger* ledger, stars_page_counts* out) {
  constexpr char where[] = "stars_ledger_counts";
  return with_ledger(ledger, where, [=](const page_ledger& held) {
    if (const char* text = wrong_struct(out)) return fail(where, text);
    held.counts(out);
    return int32_t{STARS_OK};
  });
}

int32_t stars_ledger_check(stars_ledger* ledger, const int64_t* holders) {
  constexpr char where[] = "stars_ledger_check";
  return with_ledger(ledger, where, [=](const page_ledger& held) {
    int32_t found = STARS_OK;
    const int32_t status = guarded(where, [&] { found = held.check(where, holders); });
    return status == STARS_OK ? found : status;
  });
}

stars_sequence* stars_sequence_open(stars_ledger* ledger, int64_t key, const int32_t* tokens, int64_t count) {
  constexpr char where[] = "stars_sequence_open";
  stars_sequence* made = nullptr;
  with_ledger(ledger, where, [&](page_ledger& held) {
    if (!fits(count)) return fail(where, kNegative);
    if (count && !tokens) return fail(where, kNoTokens);
    made = new_sequence(where, ledger, [&](page_table& table) {
      table.key = key;
      held.add(table, tokens, count);
    });
    return int32_t{STARS_OK};
  });
  return made;
}

stars_sequence* stars_sequence_fork(stars_sequence* sequence) {
  constexpr char where[] = "stars_sequence_fork";
  stars_sequence* made = nullptr;
  with_sequence(sequence, where, [&](page_ledger& ledger, const page_table& from) {
    made = new_sequence(where, from.ledger, [&](page_table& table) { ledger.fork(from, table); });
    return int32_t{STARS_OK};
  });
  return made;
}

int32_t stars_sequence_extend(stars_sequence* sequence, int64_t tokens, stars_page_copy* copy) {
  constexpr char where[] = "stars_sequence_extend";
  int32_t copies = 0;
  const int32_t status = with_sequence(sequence, where, [&](page_ledger& ledger, page_table& table) {
    if (const char* text = wrong_struct(copy)) return fail(where, text);
    if (tokens < 0 || !fits(tokens) || !fits(table.length + tokens))
      return fail(where, "tokens must be >= 0, and the sequence's length at most 2^46");
    int32_t found = STARS_OK;
    const int32_t memory = guarded(where, [&] { found = ledger.extend(where, table, tokens, copy, &copies); });
    return memory == STARS_OK ? found : memory;
  });
  return status == STARS_OK ? copies : -status;
}

int32_t stars_sequence_rewind(stars_sequence* sequence, int64_t length) {
  constexpr char where[] = "stars_sequence_rewind";
  return with_sequence(sequence, where, [=](page_ledger& ledger, page_table& table) {
    return ledger.rewind(where, table, length);
  });
}

int32_t stars_sequence_publish(stars_sequence* sequence, const int32_t* tokens, int64_t count) {
  constexpr char where[] = "stars_sequence_publish";
  return with_sequence(sequence, where, [=](page_ledger& ledger, page_table& table) {
    if (!fits(count)) return fail(where, kNegative);
    if (count && !tokens) return fail(where, kNoTokens);
    return ledger.publish(where, table, tokens, count);
  });
}

int32_t stars_sequence_close(stars_sequence* sequence, const int32_t* tokens, int64_t count) {
  constexpr char where[] = "stars_sequence_close";
  if (!fits(count)) return fail(where, kNegative);
  if (count && !tokens) return fail(where, kNoTokens);
  return sequences.close(sequence, where, [=](page_table& table) {
    return with_ledger(table.ledger, where,
                       [&](page_ledger& held) { return held.remove(where, table, tokens, count); });
  });
}

int64_t stars_sequence_pages(stars_sequence* sequence, int32_t* pages, int64_t capacity) {
  constexpr char where[] = "stars_sequence_pages";
  int64_t found = 0;
  const int32_t status = with_sequence(sequence, where, [&](const page_ledger&, const page_table& table) {
    found = static_cast<int64_t>(table.pages.size());
    if (!pages && capacity == 0) return int32_t{STARS_OK};
    if (!pages) return fail(where, "pages must not be null where capacity is not 0");
    if (capacity < found)
      return fail(where, "the sequence has more pages than capacity: pages NULL and capacity 0 ask how many");
    std::copy(table.pages.begin(), table.pages.end(), pages);
    return int32_t{STARS_OK};
  });
  return status == STARS_OK ? found : -status;
}

int64_t stars_sequence_length(stars_sequence* sequence) {
  int64_t length = 0;
  const int32_t status = with_sequence(sequence, "stars_sequence_length",
                                       [&](const page_ledger&, const page_table& table) {
    length = table.length;
    return int32_t{STARS_OK};
  });
  return status == STARS_OK ? length : -status;
}

int64_t stars_sequence_shared(stars_sequence* sequence) {
  int64_t shared = 0;
  const int32_t status = with_sequence(sequence, "stars_sequence_shared",
                                       [&](const page_ledger&, const page_table& table) {
    shared = table.shared;
    return int32_t{STARS_OK};
  });
  return status == STARS_OK ? shared : -status;
}
