"""What a source file says, read without importing it."""

import ast
from pathlib import Path


def imports_of(path: Path) -> list[tuple[str, str]]:
    """(module, name) of every import, wherever in the file; `import a.b` is ("a", "b")."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [tuple(alias.name.rpartition(".")[::2]) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} must import by full name"
            found += [(node.module, alias.name) for alias in node.names]
    return found
