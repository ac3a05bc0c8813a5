// Capture trampolines.
//
// A twin (accel.rewriter.twin) calls the trampolines of this file in place of its
// interesting instructions. Each asks the recorder what to do and does it (session.h).
//
// Ownership: unless a comment says otherwise, parameters are borrowed and results
// are new references. Everything needs the GIL.
#include "cpython_compat.h"
#include "islands.h"
#include "session.h"

namespace accel {
namespace {

PyObject* EX = nullptr;
PyObject* EXKW = nullptr;

bool expect(Py_ssize_t got, Py_ssize_t wanted, const char* name) {
  if (got == wanted) return true;
  PyErr_Format(PyExc_SystemError, "trampoline %s got %zd arguments", name, got);
  return false;
}

PyObject* t_call(PyObject*, PyObject* const* args, Py_ssize_t count, PyObject* names) {
  if (count < 1) {
    PyErr_SetString(PyExc_SystemError, "trampoline call got nothing to call");
    return nullptr;
  }
  PyObject* f = args[0];
  PyObject* last = args[count - 1];
  bool ex = !names && count == 3 && last == EX;
  bool exkw = !names && count == 4 && last == EXKW;
  if (!live()) {
    if (ex || exkw) {
      PyObject* positional = PySequence_Tuple(args[1]);
      if (!positional) return nullptr;
      PyObject* result = PyObject_Call(f, positional, exkw ? args[2] : nullptr);
      Py_DECREF(positional);
      return result;
    }
    return PyObject_Vectorcall(f, args + 1, count - 1, names);
  }
  PyObject* positional;
  PyObject* keywords = nullptr;
  if (ex || exkw) {
    // The unpacked containers are read whole, by us.
    for (int i = 1; i <= (exkw ? 2 : 1); i++) {
      PyObject* told = ask(H_consume, &args[i], 1);
      if (!told && PyErr_Occurred()) return nullptr;
      Py_XDECREF(told);
    }
    positional = PySequence_Tuple(args[1]);
    if (exkw && positional) {
      keywords = PyDict_New();
      if (!keywords || PyDict_Update(keywords, args[2]) < 0) Py_CLEAR(positional);
    }
  } else {
    Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
    Py_ssize_t plain = count - 1;  // count never includes the keyword values
    positional = PyTuple_New(plain);
    if (positional) {
      for (Py_ssize_t i = 0; i < plain; i++)
        PyTuple_SET_ITEM(positional, i, Py_NewRef(args[1 + i]));
      if (named) {
        keywords = PyDict_New();
        for (Py_ssize_t i = 0; keywords && i < named; i++) {
          if (PyDict_SetItem(keywords, PyTuple_GET_ITEM(names, i), args[count + i]) < 0)
            Py_CLEAR(keywords);
        }
        if (!keywords) Py_CLEAR(positional);
      }
    }
  }
  if (!positional) {
    Py_XDECREF(keywords);
    return nullptr;
  }
  PyObject* asked[3] = {f, positional, keywords ? keywords : Py_None};
  PyObject* result = nullptr;
  if (act(H_call, asked, 3, &result) == Verdict::plain)
    result = PyObject_Call(f, positional, keywords);
  Py_DECREF(positional);
  Py_XDECREF(keywords);
  return result;
}

PyObject* t_attr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "attr")) return nullptr;
  PyObject* result;
  if (live() && act(H_attr, args, 2, &result) == Verdict::done) return result;
  return PyObject_GetAttr(args[0], args[1]);
}

// Notes that need the running frame's globals as a third argument.
PyObject* t_glob(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "glob")) return nullptr;
  if (live()) {
    PyObject* asked[3] = {args[0], args[1], PyEval_GetGlobals()};
    PyObject* result;
    if (act(H_glob, asked, 3, &result) == Verdict::done) return result;
  }
  return Py_NewRef(args[0]);
}

// Trampolines whose plain result is their first argument.
template <Handler which, Py_ssize_t arity>
PyObject* t_pass(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, arity, HANDLER_NAMES[which])) return nullptr;
  PyObject* result;
  if (live() && act(which, args, arity, &result) == Verdict::done) return result;
  return Py_NewRef(args[0]);
}

// Trampolines whose plain result is None.
template <Handler which, Py_ssize_t arity>
PyObject* t_none(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, arity, HANDLER_NAMES[which])) return nullptr;
  PyObject* result;
  if (live() && act(which, args, arity, &result) == Verdict::done) return result;
  Py_RETURN_NONE;
}

using BinaryFunc = PyObject* (*)(PyObject*, PyObject*);

PyObject* power(PyObject* a, PyObject* b) { return PyNumber_Power(a, b, Py_None); }
PyObject* inplace_power(PyObject* a, PyObject* b) { return PyNumber_InPlacePower(a, b, Py_None); }

// Indexed by the NB_* numbers of CPython's opcode.h (3.11 to 3.13).
const BinaryFunc BINARY[26] = {
    PyNumber_Add,           PyNumber_And,
    PyNumber_FloorDivide,   PyNumber_Lshift,
    PyNumber_MatrixMultiply, PyNumber_Multiply,
    PyNumber_Remainder,     PyNumber_Or,
    power,                  PyNumber_Rshift,
    PyNumber_Subtract,      PyNumber_TrueDivide,
    PyNumber_Xor,           PyNumber_InPlaceAdd,
    PyNumber_InPlaceAnd,    PyNumber_InPlaceFloorDivide,
    PyNumber_InPlaceLshift, PyNumber_InPlaceMatrixMultiply,
    PyNumber_InPlaceMultiply, PyNumber_InPlaceRemainder,
    PyNumber_InPlaceOr,     inplace_power,
    PyNumber_InPlaceRshift, PyNumber_InPlaceSubtract,
    PyNumber_InPlaceTrueDivide, PyNumber_InPlaceXor,
};

PyObject* t_binary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "binary")) return nullptr;
  PyObject* result;
  if (live() && act(H_binary, args, 3, &result) == Verdict::done) return result;
  long op = PyLong_AsLong(args[2]);
  if (op < 0 || op >= 26) {
    PyErr_Format(PyExc_SystemError, "unknown binary operation %ld", op);
    return nullptr;
  }
  return BINARY[op](args[0], args[1]);
}

int compare_op(PyObject* text) {
  const char* s = PyUnicode_AsUTF8(text);
  if (!s) return -1;
  bool equal = s[1] == '=';
  switch (s[0]) {
    case '<': return equal ? Py_LE : Py_LT;
    case '>': return equal ? Py_GE : Py_GT;
    case '=': return Py_EQ;
    case '!': return Py_NE;
  }
  PyErr_Format(PyExc_SystemError, "unknown comparison %R", text);
  return -1;
}

PyObject* t_compare(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "compare")) return nullptr;
  PyObject* result;
  if (live() && act(H_compare, args, 3, &result) == Verdict::done) return result;
  int op = compare_op(args[2]);
  return op < 0 ? nullptr : PyObject_RichCompare(args[0], args[1], op);
}

PyObject* t_contains(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "contains")) return nullptr;
  PyObject* result;
  if (live() && act(H_contains, args, 2, &result) == Verdict::done) return result;
  int found = PySequence_Contains(args[1], args[0]);
  return found < 0 ? nullptr : PyBool_FromLong(found);
}

PyObject* t_is(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "is_")) return nullptr;
  PyObject* result;
  if (live() && act(H_is_, args, 2, &result) == Verdict::done) return result;
  return PyBool_FromLong(args[0] == args[1]);
}

PyObject* t_subscr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "subscr")) return nullptr;
  PyObject* result;
  if (live() && act(H_subscr, args, 2, &result) == Verdict::done) return result;
  return PyObject_GetItem(args[0], args[1]);
}

PyObject* none_or_error(int status) { return status < 0 ? nullptr : Py_NewRef(Py_None); }

PyObject* t_setitem(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "setitem")) return nullptr;
  PyObject* result;
  if (live() && act(H_setitem, args, 3, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetItem(args[0], args[1], args[2]));
}

PyObject* t_delitem(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "delitem")) return nullptr;
  PyObject* result;
  if (live() && act(H_delitem, args, 2, &result) == Verdict::done) return result;
  return none_or_error(PyObject_DelItem(args[0], args[1]));
}

PyObject* t_setattr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "setattr")) return nullptr;
  PyObject* result;
  if (live() && act(H_setattr, args, 3, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetAttr(args[0], args[2], args[1]));
}

PyObject* t_delattr(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "delattr")) return nullptr;
  PyObject* result;
  if (live() && act(H_delattr, args, 2, &result) == Verdict::done) return result;
  return none_or_error(PyObject_SetAttr(args[0], args[1], nullptr));
}

PyObject* t_unary(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "unary")) return nullptr;
  PyObject* result;
  if (live() && act(H_unary, args, 2, &result) == Verdict::done) return result;
  const char* op = PyUnicode_AsUTF8(args[1]);
  if (!op) return nullptr;
  return op[0] == '-'   ? PyNumber_Negative(args[0])
         : op[0] == '+' ? PyNumber_Positive(args[0])
                        : PyNumber_Invert(args[0]);
}

PyObject* t_not(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 1, "not_")) return nullptr;
  PyObject* result;
  if (live() && act(H_not_, args, 1, &result) == Verdict::done) return result;
  int truth = PyObject_IsTrue(args[0]);
  return truth < 0 ? nullptr : PyBool_FromLong(!truth);
}

// A special method as CPython finds it: on the type, bound. New reference; NULL without an
// error when there is none.
PyObject* lookup_special(PyObject* object, const char* name) {
  PyObject* text = PyUnicode_InternFromString(name);
  if (!text) return nullptr;
  PyObject* found = _PyType_Lookup(Py_TYPE(object), text);  // borrowed
  Py_DECREF(text);
  if (!found) return nullptr;
  descrgetfunc bind = Py_TYPE(found)->tp_descr_get;
  return bind ? bind(found, object, (PyObject*)Py_TYPE(object)) : Py_NewRef(found);
}

// with_(manager) -> (result of __enter__, callable for the exit).
PyObject* t_with(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 1, "with_")) return nullptr;
  PyObject* result;
  if (live() && act(H_with_, args, 1, &result) == Verdict::done) {
    Py_XDECREF(result);
    if (!result) return nullptr;
  }
  PyObject* manager = args[0];
  PyObject* enter = lookup_special(manager, "__enter__");
  if (!enter) {
    if (!PyErr_Occurred())
      PyErr_Format(PyExc_TypeError, "'%.200s' object does not support the context manager protocol",
                   Py_TYPE(manager)->tp_name);
    return nullptr;
  }
  PyObject* leave = lookup_special(manager, "__exit__");
  if (!leave) {
    if (!PyErr_Occurred())
      PyErr_Format(PyExc_TypeError,
                   "'%.200s' object does not support the context manager protocol "
                   "(missed __exit__ method)",
                   Py_TYPE(manager)->tp_name);
    Py_DECREF(enter);
    return nullptr;
  }
  PyObject* call[1] = {enter};
  PyObject* value = t_call(nullptr, call, 1, nullptr);
  Py_DECREF(enter);
  if (!value) {
    Py_DECREF(leave);
    return nullptr;
  }
  PyObject* both = PyTuple_Pack(2, value, leave);
  Py_DECREF(value);
  Py_DECREF(leave);
  return both;
}

PyObject* t_format(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 3, "format_")) return nullptr;
  PyObject* result;
  if (live() && act(H_format_, args, 3, &result) == Verdict::done) return result;
  long conversion = PyLong_Check(args[1]) ? PyLong_AsLong(args[1]) : 0;
  PyObject* value;
  switch (conversion) {
    case 1: value = PyObject_Str(args[0]); break;
    case 2: value = PyObject_Repr(args[0]); break;
    case 3: value = PyObject_ASCII(args[0]); break;
    default: value = Py_NewRef(args[0]);
  }
  if (!value) return nullptr;
  PyObject* spec = args[2] == Py_None ? nullptr : args[2];
  PyObject* text = PyUnicode_CheckExact(value) && !spec ? Py_NewRef(value)
                                                        : PyObject_Format(value, spec);
  Py_DECREF(value);
  return text;
}

// ------------------------------------------------------------------------ islands

// Asks the recorder of a root with islands, with the values in the root's frame. NULL: an
// error that is the program's (an interrupt) is set, or none: our own, the run is void.
PyObject* ask_islands(const char* method, PyObject* const* args) {
  Session* s = session;
  Py_ssize_t depth = PyLong_AsSsize_t(args[1]);
  PyObject* values = calling_frame_values(depth);
  if (!values) return nullptr;
  PyObject* answer;
  {
    RecorderScope scope(s);
    answer = PyObject_CallMethod(s->islands, method, "OOl", args[0], values, op_watch_count());
  }
  Py_DECREF(values);
  if (!answer && PyErr_ExceptionMatches(PyExc_KeyboardInterrupt)) {
    void_recording("interrupted", nullptr);
  } else if (!answer) {
    handler_failed();
  }
  return answer;
}

// land(number, depth): Python goes on here; the stretch that is being recorded ends.
PyObject* t_land(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "land")) return nullptr;
  Session* s = session;
  // A stretch that is void by now has left its stand-ins in the frame.
  bool recorded = live();
  if (!s || !s->islands || s->in_recorder || !(recorded || s->displaced)) Py_RETURN_NONE;
  s->displaced = false;
  PyObject* answer = ask_islands("at_landing", args);
  if (recorded) s->suspend(true);
  if (!answer && PyErr_Occurred()) return nullptr;
  bool ok = !answer || set_calling_frame_values(answer);
  Py_XDECREF(answer);
  if (!ok) return nullptr;
  Py_RETURN_NONE;
}

// node(number, depth): a stretch may begin here.
PyObject* t_node(PyObject*, PyObject* const* args, Py_ssize_t count) {
  if (!expect(count, 2, "node")) return nullptr;
  Session* s = session;
  if (!s || !s->islands || s->in_recorder || !(s->dead || s->suspended)) Py_RETURN_NONE;
  PyObject* answer = ask_islands("at_node", args);
  if (!answer && PyErr_Occurred()) return nullptr;
  bool told = answer && PyTuple_CheckExact(answer) && PyTuple_GET_SIZE(answer) == 2;
  if (told && !set_calling_frame_values(PyTuple_GET_ITEM(answer, 1))) {
    Py_DECREF(answer);
    return nullptr;
  }
  PyObject* handlers = told ? PyTuple_GET_ITEM(answer, 0) : nullptr;
  if (handlers && PyTuple_CheckExact(handlers) && PyTuple_GET_SIZE(handlers) == HANDLER_COUNT) {
    s->displaced = PyTuple_GET_SIZE(PyTuple_GET_ITEM(answer, 1)) > 0;
    Py_SETREF(s->handlers, Py_NewRef(handlers));
    s->dead = false;
    s->hold.emplace();
    s->suspend(false);
    op_watch_start();
  }
  Py_XDECREF(answer);
  Py_RETURN_NONE;
}

PyMethodDef TRAMPOLINES[] = {
    {"call", (PyCFunction)(void*)t_call, METH_FASTCALL | METH_KEYWORDS, nullptr},
    {"attr", (PyCFunction)(void*)t_attr, METH_FASTCALL, nullptr},
    {"glob", (PyCFunction)(void*)t_glob, METH_FASTCALL, nullptr},
    {"deref", (PyCFunction)(void*)t_pass<H_deref, 2>, METH_FASTCALL, nullptr},
    {"store_deref", (PyCFunction)(void*)t_pass<H_store_deref, 2>, METH_FASTCALL, nullptr},
    {"store_global", (PyCFunction)(void*)t_pass<H_store_global, 2>, METH_FASTCALL, nullptr},
    {"delete_global", (PyCFunction)(void*)t_none<H_delete_global, 1>, METH_FASTCALL, nullptr},
    {"delete_deref", (PyCFunction)(void*)t_none<H_delete_deref, 1>, METH_FASTCALL, nullptr},
    {"binary", (PyCFunction)(void*)t_binary, METH_FASTCALL, nullptr},
    {"compare", (PyCFunction)(void*)t_compare, METH_FASTCALL, nullptr},
    {"contains", (PyCFunction)(void*)t_contains, METH_FASTCALL, nullptr},
    {"is_", (PyCFunction)(void*)t_is, METH_FASTCALL, nullptr},
    {"subscr", (PyCFunction)(void*)t_subscr, METH_FASTCALL, nullptr},
    {"setitem", (PyCFunction)(void*)t_setitem, METH_FASTCALL, nullptr},
    {"delitem", (PyCFunction)(void*)t_delitem, METH_FASTCALL, nullptr},
    {"setattr", (PyCFunction)(void*)t_setattr, METH_FASTCALL, nullptr},
    {"delattr", (PyCFunction)(void*)t_delattr, METH_FASTCALL, nullptr},
    {"unary", (PyCFunction)(void*)t_unary, METH_FASTCALL, nullptr},
    {"not_", (PyCFunction)(void*)t_not, METH_FASTCALL, nullptr},
    {"test", (PyCFunction)(void*)t_pass<H_test, 1>, METH_FASTCALL, nullptr},
    {"get_iter", (PyCFunction)(void*)t_pass<H_get_iter, 1>, METH_FASTCALL, nullptr},
    {"unpack", (PyCFunction)(void*)t_pass<H_unpack, 2>, METH_FASTCALL, nullptr},
    {"consume", (PyCFunction)(void*)t_pass<H_consume, 1>, METH_FASTCALL, nullptr},
    {"hashed", (PyCFunction)(void*)t_pass<H_hashed, 1>, METH_FASTCALL, nullptr},
    {"caught", (PyCFunction)(void*)t_pass<H_caught, 1>, METH_FASTCALL, nullptr},
    {"grown", (PyCFunction)(void*)t_pass<H_grown, 3>, METH_FASTCALL, nullptr},
    {"with_", (PyCFunction)(void*)t_with, METH_FASTCALL, nullptr},
    {"imported", (PyCFunction)(void*)t_pass<H_imported, 2>, METH_FASTCALL, nullptr},
    {"format_", (PyCFunction)(void*)t_format, METH_FASTCALL, nullptr},
    {"match", (PyCFunction)(void*)t_pass<H_match, 2>, METH_FASTCALL, nullptr},
    {"land", (PyCFunction)(void*)t_land, METH_FASTCALL, nullptr},
    {"node", (PyCFunction)(void*)t_node, METH_FASTCALL, nullptr},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

int init_trampolines(PyObject* module) {
  EX = PyObject_CallNoArgs((PyObject*)&PyBaseObject_Type);
  EXKW = PyObject_CallNoArgs((PyObject*)&PyBaseObject_Type);
  if (!EX || !EXKW) return -1;
  PyObject* table = PyDict_New();
  if (!table) return -1;
  for (PyMethodDef* row = TRAMPOLINES; row->ml_name; row++) {
    PyObject* f = PyCFunction_New(row, nullptr);
    if (!f || PyDict_SetItemString(table, row->ml_name, f) < 0) return -1;
    Py_DECREF(f);
  }
  if (PyDict_SetItemString(table, "ex", EX) < 0 || PyDict_SetItemString(table, "exkw", EXKW) < 0)
    return -1;
  if (PyModule_AddObject(module, "TRAMPOLINES", table) < 0) return -1;
  return 0;
}

}  // namespace accel
