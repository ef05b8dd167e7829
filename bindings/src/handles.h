// Handles: what the C interface gives out for an object, and how it is found again.
//
// A handle looks like a pointer and is none: it holds the number of a slot, how often that slot was used before, and the
// kind of object. So a handle that was closed, forged, or made for something else is recognised, whatever has become of
// its slot. A slot's word holds the same number of uses, whether somebody is at work with the object, and whether there
// is one: one compare-and-swap checks the handle and takes the object for the caller. Nothing here locks, so that a fork
// in the midst of another thread's call leaves no lock behind; an object at work then is busy in the child for ever.
#pragma once

#include <atomic>
#include <cstdint>
#include <cstdio>
#include <memory>
#include <new>

#include "error.h"

namespace stars {

// Kinds of objects, as handles hold them.
enum handle_kind : uint64_t { kProgram = 1, kController = 2, kLedger = 3, kSequence = 4 };

// All objects of one kind. `Handle` is the opaque struct of stars.h, of which none exists.
template <class T, class Handle, handle_kind kind>
class handle_table {
  struct slot;

 public:
  // The object of a handle, taken for the caller until the end of the scope; null where it could not be, and then
  // `status` says why and stars_last_error has its text.
  class taken {
   public:
    taken(handle_table& table, const Handle* handle, const char* where) { status = table.take(handle, where, *this); }
    ~taken() {
      if (slot_) slot_->word.store(after_, std::memory_order_release);
    }
    taken(const taken&) = delete;
    taken& operator=(const taken&) = delete;
    explicit operator bool() const { return slot_ != nullptr; }
    T* operator->() const { return slot_->object; }
    T& operator*() const { return *slot_->object; }
    int32_t status = STARS_OK;

   private:
    friend handle_table;
    slot* slot_ = nullptr;
    uint64_t after_ = 0;  // the slot's word once it is given back
  };

  // A handle for `object`; null and a status where there is no room for one more.
  Handle* open(std::unique_ptr<T> object, const char* where) {
    uint64_t index;
    slot* place = pop(index, where);
    if (!place) return nullptr;
    place->object = object.release();
    const uint64_t uses = place->word.load(std::memory_order_relaxed) / kUse;
    place->word.store(uses * kUse, std::memory_order_release);
    return reinterpret_cast<Handle*>(static_cast<uintptr_t>((uses & kMaxUses) << 24 | index << 4 | kind));
  }

  // Ends the object of a handle. `may_close(object)` is asked first, where it is given: a status other than STARS_OK,
  // of which it has told, refuses.
  template <class MayClose>
  int32_t close(Handle* handle, const char* where, MayClose&& may_close) {
    std::unique_ptr<T> object;
    slot* place;
    uint64_t index;
    {
      taken held(*this, handle, where);
      if (!held) return held.status;
      if (const int32_t refusal = may_close(*held); refusal != STARS_OK) return refusal;
      place = held.slot_;
      index = index_of(handle);
      object.reset(place->object);
      place->object = nullptr;
      held.after_ += kUse | kVacant;  // one use more: the handle is of the past once the word is stored
    }
    object.reset();
    push(place, index);
    return STARS_OK;
  }

  int32_t close(Handle* handle, const char* where) {
    return close(handle, where, [](T&) -> int32_t { return STARS_OK; });
  }

 private:
  // The bits of a slot's word. What is vacant is never taken: whoever opens it next has it to himself.
  static constexpr uint64_t kTaken = 1, kVacant = 2, kUse = 4;
  struct slot {
    std::atomic<uint64_t> word{kUse | kVacant};
    T* object = nullptr;
    std::atomic<uint32_t> next{0};  // of the free list: a slot's index + 1, 0 at its end
  };
  static constexpr uint64_t kChunk = 1024, kChunks = 1024;  // as many objects at once as their product
  static constexpr uint64_t kMaxUses = (uint64_t{1} << 40) - 1;

  static uint64_t index_of(const Handle* handle) {
    return reinterpret_cast<uintptr_t>(handle) >> 4 & (kChunk * kChunks - 1);
  }

  slot* find(uint64_t index) {
    slot* chunk = chunks_[index / kChunk].load(std::memory_order_acquire);
    return chunk ? chunk + index % kChunk : nullptr;
  }

  int32_t take(const Handle* handle, const char* where, taken& out) {
    static_assert(sizeof(uintptr_t) == 8, "a handle holds 64 bits");
    const uint64_t value = reinterpret_cast<uintptr_t>(handle);
    if (!value) return fail(where, "the handle must not be null");
    slot* const place = (value & 15) == kind ? find(index_of(handle)) : nullptr;
    if (!place) return fail(where, "this is no handle of such an object", STARS_CLOSED);
    const uint64_t idle = place->word.load(std::memory_order_relaxed) & ~kTaken;
    uint64_t seen = idle;
    if ((idle & kVacant) || (idle / kUse & kMaxUses) != value >> 24 ||
        (!place->word.compare_exchange_strong(seen, idle | kTaken, std::memory_order_acquire,
                                              std::memory_order_relaxed) &&
         seen != (idle | kTaken)))
      return fail(where, "the handle was closed before", STARS_CLOSED);
    if (seen != idle)
      return fail(where, "another thread is at work with the object: it has one caller at a time", STARS_BUSY);
    out.slot_ = place;
    out.after_ = idle;
    return STARS_OK;
  }

  // A free slot, or a new one; null, and an error that is told, where there is no memory, or 2^20 are open.
  slot* pop(uint64_t& index, const char* where) {
    uint64_t head = free_.load(std::memory_order_acquire);
    while (head & 0xffffffff) {  // above it a count of changes, so that a head which came back is not taken for itself
      index = (head & 0xffffffff) - 1;
      slot* const place = chunks_[index / kChunk].load(std::memory_order_acquire) + index % kChunk;
      const uint64_t next = ((head >> 32) + 1) << 32 | place->next.load(std::memory_order_relaxed);
      if (free_.compare_exchange_weak(head, next, std::memory_order_acquire, std::memory_order_acquire)) return place;
    }
    index = used_.load(std::memory_order_relaxed);
    do {
      if (index >= kChunk * kChunks) {
        fail(where, "2^20 objects of the kind are open: close some first", STARS_OUT_OF_MEMORY);
        return nullptr;
      }
      std::atomic<slot*>& chunk = chunks_[index / kChunk];
      if (!chunk.load(std::memory_order_acquire)) {
        slot* fresh = new (std::nothrow) slot[kChunk];
        slot* none = nullptr;
        if (!fresh) {
          fail_for_memory(where);
          return nullptr;
        }
        if (!chunk.compare_exchange_strong(none, fresh, std::memory_order_acq_rel)) delete[] fresh;
      }
    } while (!used_.compare_exchange_weak(index, index + 1, std::memory_order_relaxed));
    return find(index);
  }

  void push(slot* place, uint64_t index) {
    uint64_t head = free_.load(std::memory_order_relaxed), next;
    do {
      place->next.store(static_cast<uint32_t>(head), std::memory_order_relaxed);
      next = ((head >> 32) + 1) << 32 | (index + 1);
    } while (!free_.compare_exchange_weak(head, next, std::memory_order_release, std::memory_order_relaxed));
  }

  // Chunks are never given back: a handle of the past may be shown at any time.
  std::atomic<slot*> chunks_[kChunks] = {};
  std::atomic<uint64_t> free_{0}, used_{0};
};

}  // namespace stars
