# SPDX-License-Identifier: Apache-2.0
import sys
import textwrap

import pytest

from alphagrpo_ext.registry import Registry, UnknownNameError


@pytest.fixture
def make_package(tmp_path, monkeypatch):
    """Writes importable modules and, on request, installs them as a distribution with entry points."""
    written = []

    def make(module, source, entry_points=None):
        root = tmp_path / module
        root.mkdir()
        (root / f"{module}.py").write_text(textwrap.dedent(source))
        written.append(module)
        if entry_points is not None:
            info = root / f"{module}-1.0.dist-info"
            info.mkdir()
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
            (info / "entry_points.txt").write_text(textwrap.dedent(entry_points))
        monkeypatch.syspath_prepend(root)

    yield make
    for module in written:
        sys.modules.pop(module, None)


def test_register_returns_the_object_and_get_finds_it():
    registry = Registry("thing", "registry_test.things")

    @registry.register("a")
    def thing():
        return 1

    assert thing() == 1
    assert registry.get("a") is thing
    assert registry.names() == ["a"]


def test_duplicate_raises_and_keeps_the_first():
    registry = Registry("thing", "registry_test.things")
    first = registry.register("a")(type("First", (), {}))
    with pytest.raises(ValueError, match="thing 'a' is already registered; .*Second"):
        registry.register("a")(type("Second", (), {}))
    assert registry.get("a") is first


def test_unknown_name_lists_what_exists_and_suggests_the_closest():
    registry = Registry("thing", "registry_test.things", {"lazy": "nowhere:Lazy"})
    registry.register("geometric")(object)
    with pytest.raises(UnknownNameError) as error:
        registry.get("geometrik")
    assert str(error.value) == "unknown thing 'geometrik'. Did you mean 'geometric'? Available: geometric, lazy"
    with pytest.raises(ValueError, match="unknown thing 'zzz'. Available: geometric, lazy"):
        registry.get("zzz")
    with pytest.raises(UnknownNameError, match="Available: none"):
        Registry("thing", "registry_test.things").get("a")


def test_builtin_is_imported_on_first_use(make_package):
    make_package("registry_builtin", "class Thing: pass")
    registry = Registry("thing", "registry_test.things", {"b": "registry_builtin:Thing"})
    assert registry.names() == ["b"]
    assert "registry_builtin" not in sys.modules
    thing = registry.get("b")
    assert thing is sys.modules["registry_builtin"].Thing
    assert registry.get("b") is thing


def test_builtin_may_be_decorated_by_its_own_module_only(make_package):
    make_package("registry_holder", "from alphagrpo_ext.registry import Registry")
    make_package(
        "registry_decorated",
        """
        from registry_holder import registry

        @registry.register("b")
        class Thing: pass
        """,
    )
    import registry_holder

    registry = Registry("thing", "registry_test.things", {"b": "registry_decorated:Thing"})
    registry_holder.registry = registry
    with pytest.raises(ValueError, match="already registered"):
        registry.register("b")(type("Other", (), {}))
    assert registry.get("b") is sys.modules["registry_decorated"].Thing
    assert registry.names() == ["b"]


def test_entry_point_of_another_package_is_found_and_loaded_on_demand(make_package):
    registry = Registry("thing", "registry_test.things")
    make_package(
        "registry_third_party",
        "class Thing: pass",
        """
        [registry_test.things]
        theirs = registry_third_party:Thing

        [registry_test.others]
        not_ours = registry_third_party:Thing
        """,
    )
    assert registry.names() == ["theirs"]
    assert "registry_third_party" not in sys.modules
    assert registry.get("theirs") is sys.modules["registry_third_party"].Thing


def test_name_declared_by_two_packages_is_ambiguous(make_package):
    for package in ("registry_one", "registry_two"):
        make_package(package, "class Thing: pass", f"[registry_test.things]\nshared = {package}:Thing\n")
    registry = Registry("thing", "registry_test.things")
    with pytest.raises(ValueError, match="'shared' is declared more than once: registry_one:Thing, registry_two:Thin"):
        registry.get("shared")


@pytest.mark.parametrize("path", ["no_such_module_anywhere:Thing", "textwrap:NoSuchAttribute"])
def test_broken_path_is_named(path):
    registry = Registry("thing", "registry_test.things", {"b": path})
    with pytest.raises(ImportError, match=f"thing 'b' \\({path}\\) could not be imported"):
        registry.get("b")
