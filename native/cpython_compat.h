// Every CPython version fact of the C++ side: frames, instance attributes, dict and
// type versions. Versions 3.11 and 3.12; 3.13 compiles, without the dict versions.
//
// Everything here needs the GIL. Parameters are borrowed; a returned PyObject* is
// borrowed unless the comment says "new". Only lookup_special may run Python code.
#pragma once

#include "native.h"

#if PY_VERSION_HEX < 0x030b0000 || PY_VERSION_HEX >= 0x030e0000
#error "accel knows the layouts of CPython 3.11, 3.12 and 3.13 only"
#endif

#ifndef Py_BUILD_CORE
#define Py_BUILD_CORE 1
#define ACCEL_UNDEF_BUILD_CORE
#endif
extern "C" {
#if PY_VERSION_HEX >= 0x030d0000
#undef _PyGC_FINALIZED
#endif
#include "internal/pycore_frame.h"
}
#ifdef ACCEL_UNDEF_BUILD_CORE
#undef Py_BUILD_CORE
#undef ACCEL_UNDEF_BUILD_CORE
#endif

#include <cstdint>
#include <cstring>

#define ACCEL_PY312 (PY_VERSION_HEX >= 0x030c0000)
#define ACCEL_PY313 (PY_VERSION_HEX >= 0x030d0000)

#if ACCEL_PY313
extern "C" void _PyEval_FrameClearAndPop(PyThreadState*, _PyInterpreterFrame*);
extern "C" int _PySet_NextEntry(PyObject*, Py_ssize_t*, PyObject**, Py_hash_t*);
#endif

namespace accel {

// ---- frames -----------------------------------------------------------------------

inline PyCodeObject* frame_code(_PyInterpreterFrame* frame) {
#if ACCEL_PY313
  return reinterpret_cast<PyCodeObject*>(frame->f_executable);
#else
  return frame->f_code;
#endif
}

inline PyObject* frame_function(_PyInterpreterFrame* frame) {
#if ACCEL_PY312
  return frame->f_funcobj;
#else
  return reinterpret_cast<PyObject*>(frame->f_func);
#endif
}

inline bool frame_owned_by_thread(_PyInterpreterFrame* frame) {
  return frame->owner == FRAME_OWNED_BY_THREAD;
}

// The Python frame that is innermost on this thread; NULL without one. A C function called
// from that frame's bytecode sees its direct caller.
inline _PyInterpreterFrame* calling_frame(PyThreadState* thread) {
#if ACCEL_PY313
  _PyInterpreterFrame* frame = thread->current_frame;
#else
  _PyInterpreterFrame* frame = thread->cframe->current_frame;
#endif
#if ACCEL_PY312
  while (frame && frame->owner == FRAME_OWNED_BY_CSTACK) frame = frame->previous;
#endif
  return frame;
}

inline PyObject* calling_function(PyThreadState* thread) {
  _PyInterpreterFrame* frame = calling_frame(thread);
  return frame ? frame_function(frame) : nullptr;
}

// Whether fast local number `index` is a cell of the code's own (source: pycore_code.h).
inline bool is_own_cell(PyCodeObject* code, size_t index) {
  constexpr char OWN_CELL = 0x40;  // CO_FAST_CELL
  return PyBytes_AS_STRING(code->co_localspluskinds)[index] & OWN_CELL;
}

// A running frame's locals, cells included, and behind them its operand stack. While a C
// function called from its bytecode runs, the stack below that call's own slots is in memory
// (the interpreter keeps no slot in a register: ceval.c, 3.11 to 3.13).
inline PyObject** frame_locals(_PyInterpreterFrame* frame) { return frame->localsplus; }
inline size_t frame_local_count(_PyInterpreterFrame* frame) {
  return static_cast<size_t>(frame_code(frame)->co_nlocalsplus);
}

// Gives up a frame that an eval-frame hook answers itself, before it has run. The
// evaluator owns it from 3.12 on (source: clear_thread_frame and _PyThreadState_PopFrame
// of 3.12, not exported); in 3.11 the caller clears it. Such a frame was never linked,
// so no frame object can exist for it.
inline void frame_discard(PyThreadState* thread, _PyInterpreterFrame* frame) {
#if ACCEL_PY313
  _PyEval_FrameClearAndPop(thread, frame);
#elif ACCEL_PY312
  PyObject** locals = frame->localsplus;
  for (int i = 0; i < frame->stacktop; i++) Py_XDECREF(locals[i]);
  Py_XDECREF(reinterpret_cast<PyObject*>(frame->frame_obj));
  Py_XDECREF(frame->f_locals);
  Py_DECREF(frame->f_funcobj);
  Py_DECREF(reinterpret_cast<PyObject*>(frame->f_code));
  PyObject** base = reinterpret_cast<PyObject**>(frame);
  if (base == &thread->datastack_chunk->data[0]) {
    _PyStackChunk* chunk = thread->datastack_chunk;
    _PyStackChunk* previous = chunk->previous;
    thread->datastack_top = &previous->data[previous->top];
    thread->datastack_chunk = previous;
    PyObjectArenaAllocator allocator;
    PyObject_GetArenaAllocator(&allocator);
    allocator.free(allocator.ctx, chunk, chunk->size);
    thread->datastack_limit =
        reinterpret_cast<PyObject**>(reinterpret_cast<char*>(previous) + previous->size);
  } else {
    thread->datastack_top = base;
  }
#else
  (void)thread;
  (void)frame;
#endif
}

// ---- versions -----------------------------------------------------------------------

// Whether a dict carries a number that every change of its contents replaces by one that
// no dict of this interpreter had before (PEP 509; gone in 3.13).
#define ACCEL_DICT_VERSIONS (!ACCEL_PY313)

inline uint64_t dict_version(PyObject* dict) {
#if ACCEL_PY313
  (void)dict;
  return 0;
#else
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  uint64_t tag = reinterpret_cast<PyDictObject*>(dict)->ma_version_tag;
#pragma GCC diagnostic pop
#if ACCEL_PY312
  tag &= ~uint64_t{(1 << 8) - 1};  // the low bits say who watches the dict
#endif
  return tag;
#endif
}

// The version of what a lookup along the type's MRO finds; 0 when it has none now.
inline unsigned type_version(PyTypeObject* type) {
  return type->tp_flags & Py_TPFLAGS_VALID_VERSION_TAG ? type->tp_version_tag : 0;
}

// What functools.lru_cache keeps of a call in a bounded cache, the same from 3.11 to 3.13 (source:
// Modules/_functoolsmodule.c). Links are used again for other calls.
struct MemoLink {
  PyObject_HEAD
  MemoLink* previous;
  MemoLink* next;
  Py_hash_t hash;
  PyObject* key;
  PyObject* result;
};
// NULL when `object` is no such link, or is empty; borrowed.
inline PyObject* memo_result(PyObject* object) {
  if (strcmp(Py_TYPE(object)->tp_name, "functools._lru_list_elem") != 0) return nullptr;
  return reinterpret_cast<MemoLink*>(object)->result;
}

// ---- instance attributes --------------------------------------------------------------

// Inline values, and the keys that instances of a type share: the layouts of 3.11 and
// 3.12 (source: internal/pycore_dict.h, which C++ cannot include in 3.12).
struct InlineValues {
  PyObject* values[1];  // before it: [-1] prefix size, [-2] count, [-3 - i] order of setting
};
struct SharedKeys {
  struct Entry {
    PyObject* key;
    PyObject* value;  // unused here
  };
  Py_ssize_t refcount;
  uint8_t log2_size;
  uint8_t log2_index_bytes;
  uint8_t kind;
  uint32_t version;
  Py_ssize_t usable;
  Py_ssize_t count;
  char indices[];

  Entry* entries() {
    return reinterpret_cast<Entry*>(indices + (static_cast<size_t>(1) << log2_index_bytes));
  }
  static SharedKeys* of(PyTypeObject* type) {
    return reinterpret_cast<SharedKeys*>(
        reinterpret_cast<PyHeapTypeObject*>(type)->ht_cached_keys);
  }
};

// Where the attributes of an object lie: in a dict, or inline beside the object (CPython
// 3.11 and 3.12 make the dict on demand), or nowhere yet. Looking never makes a dict.
struct Attributes {
  bool possible = false;         // the type gives its instances a dict
  PyObject** location = nullptr;  // where the dict's pointer lies; NULL when not a plain word
  PyObject* dict = nullptr;      // the dict, once there is one
  InlineValues* inline_values = nullptr;
};

inline PyObject** unmanaged_dict_location(PyObject* object, PyTypeObject* type) {
  Py_ssize_t offset = type->tp_dictoffset;
  if (offset < 0) {  // counted from the end of a variable-sized object
    Py_ssize_t items = Py_SIZE(object);
    offset += static_cast<Py_ssize_t>(_PyObject_VAR_SIZE(type, items < 0 ? -items : items));
  }
  return reinterpret_cast<PyObject**>(reinterpret_cast<char*>(object) + offset);
}

inline Attributes attributes_of(PyObject* object) {
  Attributes found;
  PyTypeObject* type = Py_TYPE(object);
  if (type->tp_flags & Py_TPFLAGS_MANAGED_DICT) {
    found.possible = true;
#if ACCEL_PY313
    found.dict = PyObject_GenericGetDict(object, nullptr);  // makes it: harmless, but slow
    Py_XDECREF(found.dict);                                 // the object holds it
    if (!found.dict) PyErr_Clear();
#elif ACCEL_PY312
    PyObject** word = reinterpret_cast<PyObject**>(object) - 3;
    uintptr_t bits = reinterpret_cast<uintptr_t>(*word);
    found.location = word;
    if (bits & 1) {
      found.inline_values = reinterpret_cast<InlineValues*>(bits + 1);
    } else {
      found.dict = *word;
    }
#else
    found.location = reinterpret_cast<PyObject**>(object) - 3;
    found.dict = *found.location;
    if (!found.dict) found.inline_values = reinterpret_cast<InlineValues**>(object)[-4];
#endif
  } else if (type->tp_dictoffset != 0) {
    found.possible = true;
    found.location = unmanaged_dict_location(object, type);
    found.dict = *found.location;
    if (type->tp_dictoffset < 0) found.location = nullptr;  // it moves with the size
  }
  return found;
}

#if !ACCEL_PY313
// The position of `name` (a str) among the keys that the type's instances share, or -1.
// A position never changes while the type lives: shared keys only grow at their end.
inline Py_ssize_t inline_position(PyTypeObject* type, PyObject* name) {
  SharedKeys* keys = SharedKeys::of(type);
  if (!keys) return -1;
  SharedKeys::Entry* entries = keys->entries();
  for (Py_ssize_t i = 0; i < keys->count; i++) {
    if (entries[i].key == name) return i;
  }
  for (Py_ssize_t i = 0; i < keys->count; i++) {
    if (entries[i].key && _PyUnicode_EQ(entries[i].key, name)) return i;
  }
  return -1;
}

inline PyObject* inline_key(PyTypeObject* type, Py_ssize_t position) {
  return SharedKeys::of(type)->entries()[position].key;
}

// How many attributes are set, and the position of the i-th in the order of setting.
inline Py_ssize_t inline_count(InlineValues* values) {
  return reinterpret_cast<uint8_t*>(values)[-2];
}
inline Py_ssize_t inline_order(InlineValues* values, Py_ssize_t i) {
  return reinterpret_cast<uint8_t*>(values)[-3 - i];
}
inline PyObject* inline_value(InlineValues* values, Py_ssize_t position) {
  return values->values[position];
}
#else  // attributes_of never finds inline values
inline Py_ssize_t inline_position(PyTypeObject*, PyObject*) { return -1; }
inline PyObject* inline_key(PyTypeObject*, Py_ssize_t) { return nullptr; }
inline Py_ssize_t inline_count(InlineValues*) { return 0; }
inline Py_ssize_t inline_order(InlineValues*, Py_ssize_t) { return 0; }
inline PyObject* inline_value(InlineValues*, Py_ssize_t) { return nullptr; }
#endif

// ---- dicts and references ---------------------------------------------------------------

// The value under a key of known hash; NULL when absent. A failing comparison of keys
// (only keys that are not strings can) counts as absent.
inline PyObject* dict_get(PyObject* dict, PyObject* key, Py_hash_t hash) {
  PyObject* value = _PyDict_GetItem_KnownHash(dict, key, hash);
  if (!value && PyErr_Occurred()) PyErr_Clear();
  return value;
}

// The hash table of a set, as bytes: two tables with equal bytes hold the very same objects
// (an entry is an address and a hash; an empty or deleted one has a fixed pattern).
struct SetTable {
  const void* bytes;
  size_t size_bytes;
};
inline SetTable set_table(PyObject* set) {
  auto* object = reinterpret_cast<PySetObject*>(set);
  return {object->table, (static_cast<size_t>(object->mask) + 1) * sizeof(setentry)};
}

// The special method `name` as the interpreter finds it: on the type, bound to the object.
// New reference; NULL without an error when there is none (source: _PyObject_LookupSpecial).
inline PyObject* lookup_special(PyObject* object, const char* name) {
  PyTypeObject* type = Py_TYPE(object);
  PyObject* interned = PyUnicode_InternFromString(name);
  if (!interned) return nullptr;
  PyObject* found = _PyType_Lookup(type, interned);
  Py_DECREF(interned);
  if (!found) return nullptr;
  descrgetfunc bind = Py_TYPE(found)->tp_descr_get;
  if (!bind) return Py_NewRef(found);
  Py_INCREF(found);
  PyObject* bound = bind(found, object, reinterpret_cast<PyObject*>(type));
  Py_DECREF(found);
  return bound;
}

// The object behind a weak reference, borrowed; NULL when it died.
inline PyObject* weak_target(PyObject* reference) {
  PyObject* target = reinterpret_cast<PyWeakReference*>(reference)->wr_object;
  return target == Py_None || Py_REFCNT(target) <= 0 ? nullptr : target;
}

// ---- numbers ------------------------------------------------------------------------

// A new int of the same value that is no other object, small ones included: such a number
// can be followed by its identity. New reference; NULL with a Python error set.
inline PyObject* uncached_int(PyObject* number) {
  auto* source = reinterpret_cast<PyLongObject*>(number);
#if ACCEL_PY312
  auto size = static_cast<Py_ssize_t>(source->long_value.lv_tag >> 3);
  PyLongObject* copy = _PyLong_New(size);
  if (!copy) return nullptr;
  copy->long_value.lv_tag = source->long_value.lv_tag;
  std::memcpy(copy->long_value.ob_digit, source->long_value.ob_digit,
              static_cast<size_t>(size ? size : 1) * sizeof(digit));
#else
  Py_ssize_t size = Py_ABS(Py_SIZE(source));
  PyLongObject* copy = _PyLong_New(size);
  if (!copy) return nullptr;
  Py_SET_SIZE(copy, Py_SIZE(source));
  std::memcpy(copy->ob_digit, source->ob_digit, static_cast<size_t>(size) * sizeof(digit));
#endif
  return reinterpret_cast<PyObject*>(copy);
}

}  // namespace accel
