// Between Python and C++. Python's limited API alone: one build for all its versions.
#pragma once

#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include <exception>
#include <new>

namespace fused_lora {

// What function() returns; or null, with Python's exception set for what it throws.
template <typename Function>
PyObject* guarded(Function function) {
  try {
    return function();
  } catch (const std::bad_alloc&) {
    return PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
    return nullptr;
  }
}

}  // namespace fused_lora
