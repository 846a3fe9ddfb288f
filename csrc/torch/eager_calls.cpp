#include "eager_calls.h"

#include <ATen/DeviceAccelerator.h>
#include <ATen/PythonTorchFunctionTLS.h>
#include <torch/csrc/Export.h>

#include "../host/capture.h"
#include "eager.h"

// Of torch's Python library, whose own headers want more of Python than the limited API has.
TORCH_PYTHON_API extern PyObject* THPVariableClass;
TORCH_PYTHON_API PyObject* THPVariable_Wrap(const at::TensorBase& tensor);
namespace torch {
TORCH_PYTHON_API void translate_exception_to_python(const std::exception_ptr& error);
}

namespace fused_lora {
namespace {

// Python's exception is set already.
struct PythonError : std::exception {};

// A new reference, let go at the end.
class Owned {
 public:
  explicit Owned(PyObject* object) : object_(object) {
    if (object == nullptr) throw PythonError();
  }
  ~Owned() { Py_DecRef(object_); }
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  PyObject* get() const { return object_; }

 private:
  PyObject* object_;
};

// Without torch functions of modes and subclasses, which would see how arguments are read.
class WithoutTorchFunctions {
 public:
  WithoutTorchFunctions() : before_(at::impl::PythonTorchFunctionTLS::get_disabled_state()) {
    at::impl::PythonTorchFunctionTLS::set_disabled_state(at::impl::TorchFunctionDisabledState::ALL_DISABLED);
  }
  ~WithoutTorchFunctions() { at::impl::PythonTorchFunctionTLS::set_disabled_state(before_); }

 private:
  at::impl::TorchFunctionDisabledState before_;
};

// Where a torch.Tensor keeps its memory differs between versions; its _cdata says it in all of them.
Tensor tensor_of(PyObject* object) {
  static PyObject* const name = PyUnicode_InternFromString("_cdata");
  if (!PyObject_TypeCheck(object, reinterpret_cast<PyTypeObject*>(THPVariableClass))) {
    PyErr_SetString(PyExc_TypeError, "a tensor was expected");
    throw PythonError();
  }
  const Owned address(PyObject_GetAttr(object, name));
  auto* const memory = static_cast<c10::TensorImpl*>(PyLong_AsVoidPtr(address.get()));
  if (memory == nullptr) throw PythonError();
  return Tensor(c10::intrusive_ptr<c10::TensorImpl, c10::UndefinedTensorImpl>::reclaim_copy(memory));
}

std::optional<Tensor> optional_tensor_of(PyObject* object) {
  return object == Py_None ? std::nullopt : std::optional(tensor_of(object));
}

double double_of(PyObject* object) {
  const double value = PyFloat_AsDouble(object);
  if (value == -1 && PyErr_Occurred()) throw PythonError();
  return value;
}

template <typename Of>
auto list_of(PyObject* sequence, Of of) {
  const Py_ssize_t size = PySequence_Size(sequence);
  if (size < 0) throw PythonError();
  std::vector<decltype(of(sequence))> found(size);
  for (size_t i = 0; i < found.size(); ++i) found[i] = of(Owned(PySequence_GetItem(sequence, static_cast<Py_ssize_t>(i))).get());
  return found;
}

PyObject* python_of(const Tensor& tensor) { return THPVariable_Wrap(tensor); }

PyObject* python_of(const std::vector<Tensor>& tensors) {
  const Owned list(PyList_New(0));
  for (const Tensor& tensor : tensors) {
    if (PyList_Append(list.get(), Owned(python_of(tensor)).get()) != 0) throw PythonError();
  }
  Py_IncRef(list.get());
  return list.get();
}

class WithoutTheLock {
 public:
  WithoutTheLock() : state_(PyEval_SaveThread()) {}
  ~WithoutTheLock() { PyEval_RestoreThread(state_); }

 private:
  PyThreadState* state_;
};

template <typename Function>
auto unlocked(const Function& function) {
  const WithoutTheLock without_the_lock;
  return function();
}

// The result of read()(), None where it has none. read() reads the arguments and gives the call.
template <typename Read>
PyObject* answered(Py_ssize_t given, Py_ssize_t wanted, Read read) {
  if (given != wanted) return PyErr_Format(PyExc_TypeError, "%zd arguments were expected, got %zd", wanted, given);
  try {
    auto call = [&] {
      const WithoutTorchFunctions without;
      return read();
    }();
    const auto result = unlocked(call);
    return result ? python_of(*result) : Py_BuildValue("");
  } catch (const PythonError&) {
    return nullptr;
  } catch (const std::exception&) {
    torch::translate_exception_to_python(std::current_exception());
    return nullptr;
  }
}

PyObject* linear(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return answered(count, 9, [&] {
    const Tensor x = tensor_of(given[0]), weight = tensor_of(given[1]), A = tensor_of(given[2]), B = tensor_of(given[3]);
    const auto bias = optional_tensor_of(given[4]);
    const Tensor scale = tensor_of(given[5]);
    const auto seed = optional_tensor_of(given[6]);
    const double p = double_of(given[7]);
    const auto gain = optional_tensor_of(given[8]);
    return [=] { return lora_linear(x, weight, A, B, bias, scale, seed, p, gain); };
  });
}

PyObject* group(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return answered(count, 4, [&] {
    const Tensor x = tensor_of(given[0]);
    auto parts = unflatten(list_of(given[1], optional_tensor_of));
    const auto seed = optional_tensor_of(given[2]);
    const double p = double_of(given[3]);
    return [=, parts = std::move(parts)] { return lora_group(x, parts, seed, p); };
  });
}

PyObject* mlp(PyObject*, PyObject* const* given, Py_ssize_t count) {
  return answered(count, 7, [&] {
    const Tensor x = tensor_of(given[0]);
    auto parts = unflatten(list_of(given[1], optional_tensor_of));
    const auto seed = optional_tensor_of(given[2]);
    const long long down_seed = PyLong_AsLongLong(given[3]);
    const double p = double_of(given[4]);
    const auto act = list_of(given[5], double_of);
    const int saves_all = PyObject_IsTrue(given[6]);
    if (PyErr_Occurred()) throw PythonError();
    return [=, parts = std::move(parts)] { return lora_mlp(x, parts, seed, down_seed, p, act, saves_all != 0); };
  });
}

template <typename Function>
PyCFunction fast(Function* function) {
  return reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function));
}

}  // namespace

PyMethodDef* eager_calls() {
  static PyMethodDef calls[] = {
      {"lora_linear", fast(linear), METH_FASTCALL,
       "lora_linear(x, weight, A, B, bias, scale, seed, p, gain) with autograd, or None where it is for others. Plain tensors on a GPU."},
      {"lora_group", fast(group), METH_FASTCALL, "lora_group(x, flat parts, seed, p), likewise."},
      {"lora_mlp", fast(mlp), METH_FASTCALL,
       "lora_mlp(x, flat parts of gate, up and down, seed, down_seed, p, act, saves_all), likewise."},
      {nullptr, nullptr, 0, nullptr},
  };
  return calls;
}

void give_up_torchs_memory_when_short() {
  give_up_memory_by([] { at::accelerator::emptyCache(); });
}

}  // namespace fused_lora
