"""The C++ text: current, free of warnings, and numerically the functions that torch runs."""

import os
import shutil
import subprocess

import pytest
import torch

from gradkernels.cells import CELLS, cell, codegen

# A value type over one double whose functions are found by argument-dependent lookup, as those of a vector type are, and a
# program that runs every function of a cell on rows of numbers. Results start as NaN: what is not written shows.
PROGRAM = """
#include "cells.gen.h"
#include <cmath>
#include <cstdio>
#include <iostream>
#include <limits>

namespace test {
struct Value {
  double v = std::numeric_limits<double>::quiet_NaN();
  Value() = default;
  explicit Value(double d) : v(d) {}
  friend Value operator+(Value a, Value b) { return Value(a.v + b.v); }
  friend Value operator-(Value a, Value b) { return Value(a.v - b.v); }
  friend Value operator*(Value a, Value b) { return Value(a.v * b.v); }
  friend Value operator/(Value a, Value b) { return Value(a.v / b.v); }
  friend Value operator-(Value a) { return Value(-a.v); }
  friend bool operator<(Value a, Value b) { return a.v < b.v; }
  friend bool operator>(Value a, Value b) { return a.v > b.v; }
  friend bool operator<=(Value a, Value b) { return a.v <= b.v; }
  friend bool operator>=(Value a, Value b) { return a.v >= b.v; }
};
inline Value where(bool c, Value a, Value b) { return c ? a : b; }
inline Value min(Value a, Value b) { return b < a ? b : a; }
inline Value max(Value a, Value b) { return b > a ? b : a; }
inline Value pow(Value a, Value b) { return Value(std::pow(a.v, b.v)); }
inline Value sigmoid(Value a) { return Value(1 / (1 + std::exp(-a.v))); }
inline Value relu(Value a) { return Value(a.v > 0 ? a.v : 0); }
inline Value sign(Value a) { return Value((a.v > 0) - (a.v < 0)); }
inline Value softplus(Value a) { return Value(std::fmax(a.v, 0) + std::log1p(std::exp(-std::fabs(a.v)))); }
inline Value abs(Value a) { return Value(std::fabs(a.v)); }
#define GK_TEST(name) inline Value name(Value a) { return Value(std::name(a.v)); }
GK_TEST(tanh) GK_TEST(exp) GK_TEST(expm1) GK_TEST(log) GK_TEST(log1p) GK_TEST(sqrt) GK_TEST(sin) GK_TEST(cos) GK_TEST(erf)
} // namespace test

using test::Value;
template <int N> void read(Value (&values)[N]) { for (auto &u : values) std::cin >> u.v; }
void write(const Value *values, int n) { for (int k = 0; k < n; ++k) std::printf("%.17g ", values[k].v); }

template <class C> void run() {
  std::printf("%d %d %d %d %d %d\\n", C::G, C::S, C::P, C::A, C::Q, int(C::shared));
  int rows = 0;
  for (std::cin >> rows; rows > 0; --rows) {
    Value x[C::G], r[C::G], s[C::S], dt[C::S], dv[1], t[C::S], a[C::A + 1], dx[C::G], dr[C::G], ds[C::S], total[C::S];
    read(x), read(r), read(s), read(dt), read(dv);
    C::forward(x, r, s, t, a);
    write(t, C::S), write(a, C::A);
    if constexpr (C::Q > 0) {
      Value v, again, late[C::Q];
      C::operand(x, r, s, v);
      C::second_adjoint(a, s, t, dt, again, late);
      write(&v, 1), write(&again, 1), write(late, C::Q);
      C::backward(a, s, t, dt, dv[0], dx, dr, ds, total);
    } else {
      C::backward(a, s, t, dt, dx, dr, ds, total);
    }
    write(dx, C::G), write(dr, C::G), write(ds, C::S), write(total, C::S);
    std::printf("\\n");
  }
}

int main(int, char **arguments) {
  try {
    gk::with_cell(arguments[1], [](auto cell) { run<decltype(cell)>(); });
  } catch (const std::invalid_argument &e) {
    std::printf("%s\\n", e.what());
    return 3;
  }
}
"""


def compiler():
    found = next((c for c in (os.environ.get("CXX"), "g++", "clang++", "c++") if c and shutil.which(c)), None)
    if found is None and os.environ.get("GRADKERNELS_REQUIRE_COMPILED") == "1":
        pytest.fail("GRADKERNELS_REQUIRE_COMPILED=1, but there is no C++ compiler")
    return found or pytest.skip("no C++ compiler: the header is compiled where there is one")


def build(cells, folder, header=codegen.header):
    """The program with a header of these cells."""
    (folder / "cells.gen.h").write_text(header(cells), encoding="utf-8")
    (folder / "main.cpp").write_text(PROGRAM)
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror"]
    command = [compiler(), *flags, "main.cpp", "-o", "main"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def flat(*groups):
    return torch.stack([u for group in groups for u in group], 1)


def compare(cell, program, rows=20):
    """Every function of a cell in C++ against the same in torch, on random rows."""
    new = lambda n: list(torch.randn(n, rows, dtype=torch.double))
    x, r, s, dt, (dv,) = new(cell.G), new(cell.G), new(cell.S), new(cell.S), new(1)
    t, a = cell.forward(x, r, s)
    want, after = [t, a], (a, s, t, dt)
    if cell.second:
        again, late = cell.second_adjoint(*after)
        want += [[cell.operand(x, r, s), again], late]
        after += (dv,)
    want += cell.backward(*after)
    numbers = " ".join(repr(u) for u in flat(x, r, s, dt, [dv]).flatten().tolist())
    done = subprocess.run([program, cell.name], input=f"{rows} {numbers}", capture_output=True, text=True, check=True)
    sizes, *lines = done.stdout.splitlines()
    assert sizes == f"{cell.G} {cell.S} 0 {cell.A} {len(cell.second)} {int(not cell.split)}"
    got = torch.tensor([[float(u) for u in line.split()] for line in lines], dtype=torch.double)
    torch.testing.assert_close(got, flat(*want), rtol=1e-12, atol=1e-13)


def test_committed_header_is_current():
    assert codegen.HEADER.read_text(encoding="utf-8") == codegen.header(CELLS.values()), (
        "run python -m gradkernels.cells.codegen"
    )


def test_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(codegen, "HEADER", tmp_path / "cells.gen.h")
    assert codegen.main(["--check"]) == 1 and "is not current" in capsys.readouterr().err
    assert codegen.main([]) == 0 and codegen.main(["--check"]) == 0
    codegen.HEADER.write_text(codegen.HEADER.read_text().replace("tanh", "sinh"))
    assert codegen.main(["--check"]) == 1


def test_registry_in_cpp(tmp_path):
    program = build(CELLS.values(), tmp_path)
    for c in CELLS.values():
        compare(c, program)
    unknown = subprocess.run([program, "mgu"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 3 and unknown.stdout == "no compiled cell 'mgu'\n"


def test_other_cells_in_cpp(zoo, random_cell, tmp_path):
    able = [c for c in zoo.values() if not c.P and "mean(" not in c.source]
    assert [c.name for c in able] == ["slstm", "minimal_gated_unit", "two_products", "leaves", "everything"]
    able += [random_cell(seed, operand=True) for seed in range(6)]
    program = build(able, tmp_path)
    for c in able:
        compare(c, program)


def test_device_structs_in_cpp(tmp_path):
    """What a CUDA kernel includes, one cell to a file, in the place of the host's header."""
    (tmp_path / "math.cuh").write_text("#pragma once\n#define GK_DEVICE inline\n")

    def header(cells):
        for c in cells:
            (tmp_path / f"{c.name}.cuh").write_text(codegen.device_struct(c), encoding="utf-8")
        host = codegen.header(cells)
        includes = "".join(f'#include "{c.name}.cuh"\n' for c in cells)
        before, after = host[: host.index("namespace gk {")], host[host.index("// f(Cell{}) of the cell") :]
        return f"{before}{includes}namespace gk {{\n{after}"

    program = build(list(CELLS.values()), tmp_path, header)
    for c in CELLS.values():
        compare(c, program)


def test_device_struct_includes_only_the_mathematics():
    for c in CELLS.values():
        text = codegen.device_struct(c)
        assert [line for line in text.splitlines() if "#include" in line] == ['#include "math.cuh"']
        functions = text.count("template <class V>")
        assert text.count("GK_DEVICE static void") == functions == (4 if c.second else 2) and "inline" not in text


def test_what_cpp_cannot_do_is_refused(zoo):
    with pytest.raises(NotImplementedError, match="cell 'peephole' has per-unit parameters p"):
        codegen.struct(zoo["peephole"])
    with pytest.raises(NotImplementedError, match="cell 'layer_norm_lstm' has mean, a sum over units"):
        codegen.header([CELLS["lstm"], zoo["layer_norm_lstm"]])
    with pytest.raises(ValueError, match="a C\\+\\+ struct cannot be named after cell '<lambda>'"):
        codegen.struct(cell(lambda x, r, s: x[0] + r[0]))


def test_names_are_ours():
    assert [line for line in codegen.struct(CELLS["gru_reset_before"]).splitlines() if "struct" in line] == [
        "struct GruResetBefore {"
    ]
