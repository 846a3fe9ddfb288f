// The module that Python imports: what it asks of the kernels, and eager calls where this torch's autograd is known.
#include "guarded.h"

#include "../work/plan.h"
#include "few_rows.h"

#ifndef FUSED_LORA_STABLE_ABI
#include "eager_calls.h"
#endif

#define FUSED_LORA_QUOTE(name) #name
#define FUSED_LORA_STRING(name) FUSED_LORA_QUOTE(name)

namespace fused_lora {
namespace {

PyObject* above(long long r, int most) {
  if (PyErr_Occurred()) return nullptr;
  return r > most ? PyUnicode_FromFormat("r=%lld is above %d", r, most) : PyUnicode_FromString("");
}

PyObject* rank_obstacle(PyObject*, PyObject* r) { return above(PyLong_AsLongLong(r), kMaxRank); }

PyObject* gated_obstacle(PyObject*, PyObject* r) { return above(PyLong_AsLongLong(r), kMaxGatedRank); }

// Of a linear in bfloat16, without dropout.
PyObject* way(PyObject*, PyObject* arguments) {
  long long M, K, N, r;
  int backward;
  if (!PyArg_ParseTuple(arguments, "LLLLp", &M, &K, &N, &r, &backward)) return nullptr;
  return guarded([&] {
    const bool own = !backward && current_card().capability == 90 && sm90::takes_few_rows(M, N, K, r, false);
    return PyUnicode_FromString(own ? "few rows" : are_few_rows(M, K, N, backward != 0) ? "torch" : "tiles");
  });
}

PyObject* tile(PyObject*, PyObject* arguments) {
  long long M, N, r;
  if (!PyArg_ParseTuple(arguments, "LLL", &M, &N, &r)) return nullptr;
  return guarded([&] {
    const Card card = current_card();
    const Kernels* const kernels = kernels_of(card);
    check(kernels != nullptr, "csrc has no kernels for the current device");
    const Tile found = kernels->tile_of({M, false, false, true, false, 1, 1, 0, {{N, N, r, false, false}}}, card);
    return Py_BuildValue("(iii)", found.M, found.N, found.K);
  });
}

PyObject* play(PyObject*, PyObject* capability) {
  const long value = PyLong_AsLong(capability);
  if (PyErr_Occurred()) return nullptr;
  play_as(static_cast<int>(value));
  return Py_BuildValue("");
}

PyMethodDef methods[] = {
    {"rank_obstacle", rank_obstacle, METH_O, "Why the kernels do not take a rank, in words; empty where they do."},
    {"gated_obstacle", gated_obstacle, METH_O, "The same of gated passes."},
    {"way", way, METH_VARARGS,
     "What computes a pass (M, K, N, r, backward) of a linear in bfloat16 on the current device: tiles, few rows or torch."},
    {"tile", tile, METH_VARARGS, "BLOCK_M, BLOCK_N and BLOCK_K of an (M, N) result of rank r on the current device."},
    {"play_as", play, METH_O, "Compute capability 80 or 86: whose kernels later cards run from now on; 0: their own."},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, FUSED_LORA_STRING(FUSED_LORA_MODULE), nullptr, -1, methods, nullptr, nullptr, nullptr, nullptr};

PyObject* make_module() {
  PyObject* const module = PyModule_Create(&definition);
#ifndef FUSED_LORA_STABLE_ABI
  if (module != nullptr && PyModule_AddFunctions(module, eager_calls()) != 0) {
    Py_DecRef(module);
    return nullptr;
  }
  give_up_torchs_memory_when_short();
#endif
  return module;
}

}  // namespace
}  // namespace fused_lora

#define FUSED_LORA_PASTE(prefix, name) prefix##name
#define FUSED_LORA_INIT(name) FUSED_LORA_PASTE(PyInit_, name)

PyMODINIT_FUNC FUSED_LORA_INIT(FUSED_LORA_MODULE)() { return fused_lora::make_module(); }
