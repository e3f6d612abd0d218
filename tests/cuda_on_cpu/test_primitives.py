"""platform.cuh and twin.h are two implementations of one list."""

import re

from tests.cuda_on_cpu.machine import HERE, KERNELS


def without(text, *patterns):
    for pattern in patterns:
        text = re.sub(pattern, " ", text, flags=re.MULTILINE | re.DOTALL)
    return text


def primitives(path):
    """Declarations of functions, types and macros for kernels: return type, name and parameters, as one line each.

    What a header keeps to itself, in a namespace of its own or in a macro that it undefines, is not in the list, and the
    place of the call, which the twin's functions take too, neither.
    """
    text = without(path.read_text(), r"^namespace twin \{.*?^\} // namespace twin", r"//[^\n]*", r"^\s*#pragma[^\n]*")
    site = r",?\s*GK_SITE(?=\s*\))"
    functions = re.findall(r"^(template <[^>]*> )?GK_DEVICE ([^({]+\([^{;]*\)) \{", without(text, site), re.MULTILINE)
    structs = re.findall(r"^struct [^{]*\{[^}]*\};", text, re.MULTILINE)
    using = re.findall(r"^using [^;]*;", text, re.MULTILINE)
    macros = set(re.findall(r"^#define (GK_\w+)", text, re.MULTILINE)) - {"GK_SITE"}
    clusters = text[text.index("#if !GK_CLUSTERS") :].split("#else")
    before, after = (re.findall(r"^GK_DEVICE [^{]*", without(part, site), re.MULTILINE) for part in clusters[:2])
    found = {
        "functions": [template + function for template, function in functions],
        "structs": structs,
        "using": using,
        "macros": macros - set(re.findall(r"^#undef (\w+)", text, re.MULTILINE)),
        "before sm_90": before,
        "from sm_90 on": after,
    }
    spaces = lambda s: re.sub(r"\s*([(){}<>&*,;=])\s*", r"\1", " ".join(s.split()))
    return {kind: sorted(map(spaces, lines)) for kind, lines in found.items()}


def test_one_list():
    real, twin = primitives(KERNELS / "platform.cuh"), primitives(HERE / "twin.h")
    for kind in real:
        assert set(real[kind]) == set(twin[kind]) and len(real[kind]) == len(twin[kind]), kind
    for line in (
        "void block_sync()",
        "void signal_wait(Signal*s,unsigned parity)",
        "template<int PENDING=0>void copy_wait()",
    ):
        assert line in real["functions"], real
    assert "struct bf16{unsigned short bits;};" in real["structs"] and "GK_UNROLL" in real["macros"]
    assert (
        "GK_DEVICE void cluster_sync()" in real["from sm_90 on"]
        and "GK_DEVICE int cluster_rank()" in real["before sm_90"]
    )


def test_kernels_use_nothing_else():
    """No header, no intrinsic and no assembly outside of platform.cuh, apart from the C functions of math.cuh."""
    for path in KERNELS.glob("*.cuh"):
        text = without(path.read_text(), r"//[^\n]*")
        if path.name != "platform.cuh":
            assert not re.search(r"#include\s*<|\basm\b|__\w+|\b(thread|block|grid)(Idx|Dim)\b", text), path
