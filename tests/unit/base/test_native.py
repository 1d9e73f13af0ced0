from __future__ import annotations

import ctypes

import pytest

from baton import native

FLAGS = ("-O1",)


@pytest.mark.usefixtures("compiler")
def test_a_source_is_compiled_once_and_again_when_it_changes(tmp_path):
    source, cache = tmp_path / "seven.cpp", tmp_path / "cache"
    source.write_text('extern "C" int seven() { return 7; }')
    built = native.library(source, FLAGS, cache=cache)
    assert ctypes.CDLL(str(built)).seven() == 7
    stamp = built.stat().st_mtime_ns
    assert native.library(source, FLAGS, cache=cache) == built
    assert built.stat().st_mtime_ns == stamp
    (tmp_path / "other.h").write_text("// a header")
    assert native.library(source, FLAGS, cache=cache) != built
    assert not [path for path in cache.iterdir() if path.is_dir()]


@pytest.mark.usefixtures("compiler")
def test_what_the_compiler_says_is_in_the_error(tmp_path):
    source = tmp_path / "wrong.cpp"
    source.write_text("int seven( {")
    with pytest.raises(native.BuildError, match="error: expected"):
        native.library(source, FLAGS, cache=tmp_path / "cache")


@pytest.mark.usefixtures("compiler")
def test_a_missing_compiler_and_a_bad_cache_are_build_errors(tmp_path):
    source = tmp_path / "seven.cpp"
    source.write_text("")
    with pytest.raises(native.BuildError, match="no C\\+\\+ compiler"):
        native.library(source, FLAGS, cache=tmp_path, compilers=("no-such-compiler",))
    (tmp_path / "file").write_text("")
    with pytest.raises(native.BuildError, match="cannot build in"):
        native.library(source, FLAGS, cache=tmp_path / "file" / "cache")
