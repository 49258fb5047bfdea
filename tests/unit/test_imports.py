"""Modules import each other in one direction only: no cycle, not even of imports inside of functions or for types alone."""

from __future__ import annotations

from graphlib import TopologicalSorter

import grimp  # comes with import-linter


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = grimp.build_graph("reelquant", exclude_type_checking_imports=False, cache_dir=None)
    imports = {module: graph.find_modules_directly_imported_by(module) for module in graph.modules}
    assert len(imports) > 200
    TopologicalSorter(imports).prepare()  # raises CycleError, which names the modules
