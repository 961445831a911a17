// Functions of the module whose arguments come by name, or in order, by CPython's vectorcall: names are told apart by
// where they lie, and nothing is allocated. pybind11's own way makes a string of every name at every call: with a dozen
// of them a third of a small call.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <new>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>

namespace vdcore::cpu {

template <typename... Args>
class Named {
 public:
  static constexpr size_t kCount = sizeof...(Args);
  using Function = void (*)(Args...);
  using Names = std::array<const char*, kCount>;

  static void define(pybind11::module_& m, const char* name, Function function, const Names& names) {
    auto* self = new Named(name, function, names);
    const pybind11::capsule owner(self, [](void* at) { delete static_cast<Named*>(at); });
    m.add_object(name, pybind11::reinterpret_steal<pybind11::object>(PyCFunction_New(&self->method_, owner.ptr())));
  }

 private:
  Function function_;
  std::array<pybind11::str, kCount> names_;
  std::string doc_;
  PyMethodDef method_;

  Named(const char* name, Function function, const Names& names) : function_(function) {
    doc_ = std::string(name) + "(";
    for (size_t i = 0; i < kCount; ++i) {
      names_[i] = pybind11::reinterpret_steal<pybind11::str>(PyUnicode_InternFromString(names[i]));
      doc_ += (i ? ", " : "") + std::string(names[i]);
    }
    doc_ += ")\n--\n\n";
    method_ = {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&Named::call)),
               METH_FASTCALL | METH_KEYWORDS, doc_.c_str()};
  }

  [[noreturn]] void wrong(const std::string& what) const {
    throw pybind11::type_error(std::string(method_.ml_name) + ": " + what);
  }

  // The place of an argument; names mostly come in order.
  size_t place(PyObject* name, size_t expected) const {
    if (expected < kCount && names_[expected].ptr() == name) return expected;
    for (size_t i = 0; i < kCount; ++i)
      if (names_[i].ptr() == name || PyUnicode_Compare(names_[i].ptr(), name) == 0) return i;
    wrong("there is no argument " + pybind11::cast<std::string>(pybind11::handle(name)));
  }

  static PyObject* call(PyObject* owner, PyObject* const* given, Py_ssize_t in_order, PyObject* names) {
    const auto& self = *static_cast<Named*>(PyCapsule_GetPointer(owner, nullptr));
    try {
      std::array<PyObject*, kCount> values{};
      const auto first = static_cast<size_t>(in_order);
      if (first > kCount) self.wrong("too many arguments");
      for (size_t i = 0; i < first; ++i) values[i] = given[i];
      const Py_ssize_t named = names ? PyTuple_GET_SIZE(names) : 0;
      size_t at = first;
      for (Py_ssize_t i = 0; i < named; ++i, ++at) {
        at = self.place(PyTuple_GET_ITEM(names, i), at);
        if (values[at]) self.wrong(self.name(at) + " is given twice");
        values[at] = given[first + static_cast<size_t>(i)];
      }
      for (size_t i = 0; i < kCount; ++i)
        if (!values[i]) self.wrong(self.name(i) + " is missing");
      self.invoke(values, std::index_sequence_for<Args...>());
      Py_RETURN_NONE;
    } catch (pybind11::error_already_set& error) {
      error.restore();
    } catch (const pybind11::builtin_exception& error) {
      error.set_error();
    } catch (const std::invalid_argument& error) {
      PyErr_SetString(PyExc_ValueError, error.what());
    } catch (const std::bad_alloc&) {
      PyErr_NoMemory();
    } catch (const std::exception& error) {
      PyErr_SetString(PyExc_RuntimeError, error.what());
    }
    return nullptr;
  }

  std::string name(size_t i) const { return pybind11::cast<std::string>(names_[i]); }

  template <size_t... I>
  void invoke(const std::array<PyObject*, kCount>& values, std::index_sequence<I...>) const {
    std::tuple<pybind11::detail::make_caster<Args>...> casters;
    const bool fits[] = {std::get<I>(casters).load(values[I], true)...};
    for (size_t i = 0; i < kCount; ++i)
      if (!fits[i]) wrong(name(i) + " has a wrong type, " + Py_TYPE(values[i])->tp_name);
    function_(pybind11::detail::cast_op<Args>(std::move(std::get<I>(casters)))...);
  }
};

// Defines m.name(...) with the names of its arguments, as many as the function has.
template <typename... Args, typename... Names>
void define_named(pybind11::module_& m, const char* name, void (*function)(Args...), Names... names) {
  static_assert(sizeof...(Args) == sizeof...(Names), "an argument has no name, or a name no argument");
  Named<Args...>::define(m, name, function, {names...});
}

}  // namespace vdcore::cpu
