# ruff: noqa: F821 - functions of the cell language need no import
"""The C++ text: current, free of warnings, and numerically the functions that torch runs."""

import ast
import os
import shutil
import subprocess

import pytest
import torch

from gradkernels.cells import CELLS, cell, codegen, get, rounds

# A value type over one double whose functions are found by argument-dependent lookup, as those of a vector type are, and a
# program that runs every function of a cell on rows of numbers. Results start as NaN: what is not written shows.
PROGRAM = """
#include "cells.gen.h"
#include <cmath>
#include <cstdio>
#include <iostream>
#include <limits>
#include <tuple>

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

// All rounds of a function, of a unit whose row has no other: a mean is what it is taken of. Results may be read by nobody.
template <class C, class F, int k = 0, class Given, class... Out> void call(const Given &given, Value *kept, Value *mean, Out &&...out) {
  if constexpr (k < F::Rounds::count) {
    gk::evaluate<C, F>(gk::Round<k>{}, given, kept, mean, mean + gk::known_of_row<typename F::Rounds>(k));
    if constexpr (F::Rounds::rows[k] > 0) F::call(gk::Row<k>{}, mean);
    call<C, F, k + 1>(given, kept, mean, out...);
  } else
    gk::evaluate<C, F>(gk::Round<k>{}, given, kept, mean, out...);
}

template <class C> void run() {
  using Functions = gk::Functions<C>;
  for (int n : {C::G, C::S, C::P, C::M, C::D, C::A, C::Q, int(C::shared), int(C::recurrent), int(C::means)})
    std::printf("%d ", n);
  std::printf("\\n");
  int rows = 0;
  for (std::cin >> rows; rows > 0; --rows) {
    Value x[C::G], r[C::G], s[C::S], dt[C::S], dv[1], t[C::S], kept[64], mean[64], made[C::A + 1], *const a = made;
    Value dx[C::G], dr[C::G], ds[C::S], total[C::S];
    gk::Extras<C, Value> extra;
    gk::ExtraAdjoints<C, Value> adjoints;
    read(x), read(r), read(s), read(extra.p), read(extra.m), read(extra.d), read(dt), read(dv);
    const auto entering = std::tuple_cat(std::tie(x, r, s), extra.groups());
    const auto after = std::tuple_cat(std::tie(a, s, t), extra.groups(), std::tie(dt));
    call<C, typename Functions::Forward>(entering, kept, mean, t, a);
    write(t, C::S), write(a, C::A);
    const auto results = [&](const auto &given) {
      adjoints.then([&](auto &...extra) {
        call<C, typename Functions::Backward>(given, kept, mean, dx, dr, ds, extra..., total);
      });
    };
    if constexpr (C::Q > 0) {
      Value v, again, late[C::Q];
      call<C, typename Functions::Operand>(entering, kept, mean, v);
      call<C, typename Functions::SecondAdjoint>(after, kept, mean, again, late);
      write(&v, 1), write(&again, 1), write(late, C::Q);
      results(std::tuple_cat(after, std::tie(dv[0])));
    } else
      results(after);
    write(dx, C::G), write(dr, C::G), write(ds, C::S), write(adjoints.p, C::P), write(adjoints.d, C::D);
    write(total, C::S);
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
    flags = ["-std=c++17", "-O1", "-Wall", "-Wextra", "-Werror", f"-I{codegen.HEADER.parent}"]
    command = [compiler(), *flags, "main.cpp", "-o", "main"]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return folder / "main"


def flat(*groups):
    return torch.cat([u for group in groups for u in group], 1)


def compare(cell, program, rows=20):
    """Every function of a cell in C++ against the same in torch, on random rows."""
    new = lambda n: list(torch.randn(n, rows, 1, dtype=torch.double))
    x, r, s, p, m, d, dt, (dv,) = (new(n) for n in (cell.G, cell.G, cell.S, cell.P, cell.M, cell.D, cell.S, 1))
    extra = [group for group in (p, m, d) if group]
    t, a = cell.forward(x, r, s, *extra)
    want, after = [t, a], (a, s, t, *extra, dt)
    if cell.second:
        again, late = cell.second_adjoint(*after)
        want += [[cell.operand(x, r, s, *extra), again], late]
        after += (dv,)
    want += cell.backward(*after)
    one = [torch.zeros(rows, 1, dtype=torch.double)]  # the program reads a number for a group that is not there
    numbers = " ".join(repr(u) for u in flat(x, r, s, p or one, m or one, d or one, dt, [dv]).flatten().tolist())
    done = subprocess.run([program, cell.name], input=f"{rows} {numbers}", capture_output=True, text=True, check=True)
    sizes, *lines = done.stdout.splitlines()
    flags = not cell.split, cell.recurrent, cell.means
    assert sizes.split() == [
        str(int(n)) for n in (cell.G, cell.S, cell.P, cell.M, cell.D, cell.A, len(cell.second), *flags)
    ]
    got = torch.tensor([[float(u) for u in line.split()] for line in lines], dtype=torch.double)
    torch.testing.assert_close(got, flat(*want), rtol=1e-12, atol=1e-13)


def test_committed_header_is_current():
    assert codegen.HEADER.read_text(encoding="utf-8") == codegen.header(map(get, codegen.COMPILED)), (
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
    unknown = subprocess.run([program, "lstn"], capture_output=True, text=True, check=False)
    assert unknown.returncode == 3 and unknown.stdout == "no compiled cell 'lstn'\n"


def test_other_cells_in_cpp(zoo, random_cell, tmp_path):
    able = [*zoo.values(), *(random_cell(seed, operand=seed % 2 == 0) for seed in range(6))]
    program = build(able, tmp_path)
    for c in able:
        compare(c, program)


def test_device_structs_in_cpp(tmp_path):
    """What a CUDA kernel includes, one cell to a file, in the place of the host's header."""
    (tmp_path / "math.cuh").write_text("#pragma once\n#define GK_DEVICE inline\n")

    def header(cells):
        assert codegen.ROUNDS in (codegen.HEADER.parent / "cell.h").read_text(encoding="utf-8")
        for c in cells:
            text = codegen.device_struct(c).replace(codegen.ROUNDS, "")  # the program has them already
            (tmp_path / f"{c.name}.cuh").write_text(text, encoding="utf-8")
        host = codegen.header(cells)
        includes = "".join(f'#include "{c.name}.cuh"\n' for c in cells)
        before, after = host[: host.index("namespace gk {")], host[host.index("// f(Cell{}) of the cell") :]
        return f"{before}{includes}namespace gk {{\n{after}"

    program = build(list(CELLS.values()), tmp_path, header)
    for c in CELLS.values():
        compare(c, program)


def test_device_struct_includes_only_the_mathematics():
    for c in map(get, codegen.COMPILED):
        text = codegen.device_struct(c)
        assert [line for line in text.splitlines() if "#include" in line] == ['#include "math.cuh"']
        functions = text.count("template <class V>")
        assert text.count("GK_DEVICE static void") == functions == (4 if c.second else 2) and "inline" not in text


def test_rounds_share_what_does_not_wait(zoo):
    """A mean is cut away from what needs it; whatever two rounds need is computed in the first."""
    f = next(f for f in ast.walk(ast.parse(zoo["layer_norm_lstm"].source)) if getattr(f, "name", None) == "forward")
    parts = rounds.cut(f)
    texts = ["\n".join(map(ast.unparse, body)) for body in parts.bodies]
    assert parts.means == [1, 1] and len(texts) == 3
    assert not any("mean(" in text for text in texts)
    assert sum(text.count("tanh(") for text in texts) == zoo["layer_norm_lstm"].source.split("def backward")[0].count(
        "tanh("
    )
    assert {f"kept[{k}] = " for k in range(parts.kept)} == {
        line[: line.index("=") + 2] for text in texts for line in text.splitlines() if line.startswith("kept[")
    }


def test_a_name_that_is_none_in_cpp(tmp_path):
    odd = cell(lambda x, r, s: tanh(x[0] - r[0]), name='a "name", $of é')
    text = codegen.struct(odd)
    assert text.startswith("struct ANameOfCell {") and r'name = "a \"name\", $of é";' in text
    compare(odd, build([odd], tmp_path))


def test_names_are_ours():
    assert codegen.struct(CELLS["gru_reset_before"]).splitlines()[0] == "struct GruResetBeforeCell {"
