"""Libraries without content, against which a library is linked that then runs on Linux of 2018."""

import ctypes
import re
import shutil
import subprocess

import pytest

pytest.importorskip("setuptools")
old_linux = pytest.importorskip("release.old_linux")
pytestmark = pytest.mark.skipif(
    not all(map(shutil.which, ("gcc", "g++", "readelf", "objdump"))), reason="needs gcc and binutils"
)

# Uses what has newer versions (pow, dlopen, a thread), what was not there in 2018 (the stream's first constructor, the
# variable of shared pointers), and an exception.
SOURCE = """
#include <dlfcn.h>
#include <cmath>
#include <memory>
#include <sstream>
#include <stdexcept>
#include <thread>
extern "C" double answer(double base, double exponent) {
  std::ostringstream text;
  auto shared = std::make_shared<double>(0);
  std::thread([other = shared, base, exponent] { *other = std::pow(base, exponent); }).join();
  text << *shared << (dlopen(nullptr, RTLD_LAZY) != nullptr);
  try {
    throw std::runtime_error(text.str());
  } catch (const std::exception& error) {
    return std::string(error.what()) == "81" ? *shared : -1;
  }
}
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    folder = tmp_path_factory.mktemp("linked")
    source, made = folder / "answer.cpp", folder / "answer.so"
    source.write_text(SOURCE)
    flags = old_linux.link_flags(folder / "linux")
    subprocess.run(["g++", "-std=c++20", "-O2", "-fPIC", "-shared", str(source), "-o", str(made), *flags], check=True)
    return made


def versions_of(library, series):
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    return {tuple(map(int, number.split("."))) for number in re.findall(rf"\b{series}_([\d.]+)", listed)}


@pytest.mark.parametrize("series", old_linux.NEWEST)
def test_it_needs_nothing_newer(library, series):
    assert max(versions_of(library, series), default=(0,)) <= old_linux.NEWEST[series]


def test_it_works_here(library):
    answer = ctypes.CDLL(str(library)).answer
    answer.restype, answer.argtypes = ctypes.c_double, [ctypes.c_double] * 2
    assert answer(2.0, 3.0) == 8.0


def test_it_shows_nothing_of_the_static_library(library):
    listed = subprocess.run(["objdump", "-T", str(library)], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"\.text\s.*_ZNSt7__cxx1119basic_ostringstream", listed)


def test_the_newest_of_old_versions_is_taken():
    symbols = old_linux.symbols("libc.so.6")
    assert symbols["dlopen"][1] == "GLIBC_2.2.5"  # 2.34 too, where it moved there
    assert symbols["memcpy"][1] == "GLIBC_2.14"  # 2.2.5 too
    assert "arc4random" not in symbols  # of 2.36
    assert "__libc_single_threaded" not in symbols
