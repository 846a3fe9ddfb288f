"""Linking for Linux as of 2018, manylinux_2_28: on any machine, against what its libraries had then.

A newer C library keeps a function's older versions, but a linker takes the newest. So it is given libraries without
content, which have each function in its newest version that was there in 2018. What the C++ library had not yet comes
from its static form, hidden.
"""

import re
from collections import defaultdict
from pathlib import Path

from .commands import output, run

# The last version that manylinux_2_28 has, of each series of versions that the wheel may need.
NEWEST = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (7, 0, 0)}
LIBRARIES = ("libstdc++.so.6", "libm.so.6", "libgcc_s.so.1", "libc.so.6", "ld-linux-x86-64.so.2")
# Where they were apart from the C library, as they are no more.
APART = ("libpthread.so.0", "libdl.so.2", "librt.so.1")
SYMBOL = re.compile(
    r"(FUNC|OBJECT|IFUNC|NOTYPE|TLS)\s+(?:GLOBAL|WEAK|UNIQUE)\s+DEFAULT\s+\d+ (\S+?)@@?(\w+?)_([\d.]+)$", re.MULTILINE
)
# A variable by which newer C++ headers ask whether there is one thread. Without it they take it that there are more.
THREADS = '__attribute__((visibility("hidden"))) char __libc_single_threaded = 0;\n'


def path_of(library: str) -> str:
    return output("gcc", f"-print-file-name={library}")


def symbols(library: str) -> dict[str, tuple[str, str]]:
    """Of each symbol that was there: (kind, version)."""
    found: dict[str, tuple] = {}
    for match in SYMBOL.finditer(output("readelf", "-W", "--dyn-syms", path_of(library))):
        kind, name, series, number = match.groups()
        version = tuple(map(int, number.split(".")))
        if series in NEWEST and version <= NEWEST[series] and name != "__libc_single_threaded":
            found[name] = max(found.get(name, ((), "", "")), (version, kind, f"{series}_{number}"))
    return {name: (kind, version) for name, (_, kind, version) in found.items()}


def hollow(library: str, folder: Path) -> Path:
    """A library of the same name and symbols without content."""
    made = folder / library
    by_version = defaultdict(list)
    source = []
    for name, (kind, version) in sorted(symbols(library).items()):
        by_version[version].append(name)
        elf = {"OBJECT": "object", "TLS": "tls_object"}.get(kind, "function")
        source.append(f".globl {name}\n.type {name}, @{elf}\n.size {name}, 8\n{name}: .quad 0\n")
    (folder / f"{library}.s").write_text(".data\n" + "".join(source) + '.section .note.GNU-stack,"",@progbits\n')
    versions = [
        f"{version} {{ {' '.join(f'{name};' for name in names)} }};\n" for version, names in sorted(by_version.items())
    ]
    (folder / f"{library}.map").write_text("".join(versions))
    flags = ["-nostdlib", f"-Wl,-soname,{library}", f"-Wl,--version-script={folder / library}.map"]
    run("gcc", "-shared", *flags, "-o", str(made), str(folder / f"{library}.s"))
    return made


def link_flags(folder: Path) -> list[str]:
    """What a linker is given behind all objects, instead of this machine's libraries."""
    folder.mkdir(parents=True, exist_ok=True)
    source, threads = folder / "threads.c", folder / "threads.o"
    source.write_text(THREADS)
    run("gcc", "-fPIC", "-c", str(source), "-o", str(threads))
    there = [str(hollow(library, folder)) for library in LIBRARIES]
    parts = [path_of(library) for library in ("libstdc++.a", "libgcc.a", "libc_nonshared.a")]
    apart = ["-Wl,--push-state,--no-as-needed", *(path_of(library) for library in APART), "-Wl,--pop-state"]
    return [str(threads), "-nodefaultlibs", *there, *parts, *there, "-Wl,--exclude-libs,ALL", *apart]
