"""Imports point one way, and `import rr_flex` stays light."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest
from sources import imports_of

ROOT = Path(__file__).parent.parent
PACKAGES = ("mask_mods", "rr_flex")

# A module imports from a line above, or within its own room. A package's name stands for all its modules.
LINES = [
    ["mask_mods"],
    [
        "rr_flex.runtime.private",
        "rr_flex.runtime.fence",
        "rr_flex.runtime.writing",
        "rr_flex.runtime.recording",
        "rr_flex.registry",
        "rr_flex.geometry",
    ],
    ["rr_flex.runtime.mends"],
    ["rr_flex.runtime.tracing", "rr_flex.runtime.compiling", "rr_flex.runtime.is_kept", "rr_flex.profiles"],
    ["rr_flex.kernels.break_even", "rr_flex.checks"],
    ["rr_flex.fields"],
    ["rr_flex.config", "rr_flex.kernels.options", "rr_flex.kernels.dense"],
    ["rr_flex.kernels.deciding"],
    ["rr_flex.sampling", "rr_flex.block_mask", "rr_flex.selection", "rr_flex.runtime.head_slices", "rr_flex.level"],
    ["rr_flex.request", "rr_flex.mandatory", "rr_flex.view.cells"],
    ["rr_flex.view.drawing"],
    ["rr_flex.result"],
    ["rr_flex.kernels.score_mods", "rr_flex.kernels.last_rows"],
    ["rr_flex.mass"],
    ["rr_flex.mass_by_attention"],
    ["rr_flex.estimate"],
    ["rr_flex.state"],
    ["rr_flex.pipeline"],
    ["rr_flex.kernels.flex"],
    ["rr_flex.kernels.flash"],
    ["rr_flex.kernels.choose"],
    ["rr_flex.attention"],
    ["rr_flex.packed", "rr_flex.captured"],
    ["rr_flex"],
    ["rr_flex.models.records"],
    ["rr_flex.models.layer_plan"],
    ["rr_flex.models.switches"],
    ["rr_flex.models.attention_by"],
    ["rr_flex.evaluation"],
    ["rr_flex.calibration"],
    ["rr_flex.models"],
    ["rr_flex.distributed", "rr_flex.serving"],
    ["rr_flex.tasks"],
    ["rr_flex.view.plots", "rr_flex.view.notebook"],
    ["rr_flex.plots", "rr_flex.notebook"],
    ["rr_flex.view.page"],
    ["rr_flex.cli"],
    ["rr_flex.__main__"],
]
LINE_OF = {name: number for number, names in enumerate(LINES) for name in names}
# A room whose modules stand on several lines: its __init__ holds a docstring alone.
ROOMS = ("rr_flex.runtime", "rr_flex.kernels", "rr_flex.view")
LINE_OF |= dict.fromkeys(ROOMS, 0)
MODULES = sorted(path for package in PACKAGES for path in (ROOT / package).rglob("*.py"))


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def line_of(module: str) -> int:
    """The line of the module itself, or of the package that it is in ("rr_flex" is only the facade)."""
    if module in LINE_OF:
        return LINE_OF[module]
    package = ".".join(module.split(".")[:-1])
    assert package and package != "rr_flex", f"{module} has no line in tests/test_imports.py"
    return line_of(package)


def imported_by(path: Path) -> set[str]:
    """Our own modules that the file imports, wherever in the file."""
    # `from rr_flex import demo` imports a module, `from rr_flex import RRConfig` the facade.
    whole = [(module, f"{module}.{name}".strip(".")) for module, name in imports_of(path)]
    names = {name if is_module(name) else module for module, name in whole}
    return {name for name in names if name.split(".")[0] in PACKAGES}


def is_module(name: str) -> bool:
    path = ROOT.joinpath(*name.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def room(module: str) -> str:
    """The entry of LINES that the module belongs to."""
    return module if module in LINE_OF else room(module.rpartition(".")[0])


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_imports_point_one_way(path):
    own = name_of(path)
    above = [name for name in imported_by(path) if line_of(name) < line_of(own) or room(name) == room(own)]
    wrong = sorted(imported_by(path) - set(above))
    assert not wrong, f"{own} must import only from its own room or a line above, got {wrong}"


def test_no_circle_anywhere():
    waiting = {name_of(path): imported_by(path) - {name_of(path)} for path in MODULES}
    while free := [name for name, needs in waiting.items() if not needs & waiting.keys()]:
        for name in free:
            del waiting[name]
    assert not waiting, f"modules must not import each other in a circle, got {sorted(waiting)}"


def test_the_lines_name_modules_that_exist():
    planned = {"rr_flex.distributed", "rr_flex.serving"}
    missing = [name for name in LINE_OF if not is_module(name) and name not in planned]
    assert not missing and not [name for name in ROOMS if "import" in room_text(name)]


def room_text(name: str) -> str:
    return ROOT.joinpath(*name.split("."), "__init__.py").read_text()


def parts_of_torch(path: Path) -> set[str]:
    """Dotted names of torch's that the file imports or reads."""
    read = {ast.unparse(node) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    names = read | {f"{module}.{name}" for module, name in imports_of(path)}
    return {name for name in names if name.startswith("torch.")}


def is_private(name: str) -> bool:
    return any(part == "experimental" or re.match("_[^_]", part) for part in name.split("."))


def test_private_parts_of_torch_are_in_one_module():
    found = {name_of(path): set(filter(is_private, parts_of_torch(path))) for path in MODULES}
    assert found.pop("rr_flex.runtime.private") and not any(found.values()), found


def test_mask_mods_stands_alone():
    wrong = {name_of(path): imported_by(path) for path in MODULES if name_of(path).startswith("mask_mods")}
    assert not [own for own, names in wrong.items() if any(name.startswith("rr_flex") for name in names)]


def test_import_is_light():
    program = (
        "import sys, rr_flex, torch\n"
        "print(torch.cuda.is_initialized(), sorted({'transformers', 'matplotlib', 'gguf'} & set(sys.modules)))"
    )
    printed = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT)
    assert printed.stdout.strip() == "False []"


def test_no_two_modules_have_one_name():
    """Apart from mask_mods, a package of its own, and the former names `rr_flex.plots` and `rr_flex.notebook`."""
    places: dict[str, list[str]] = {}
    for path in [*ROOT.glob("rr_flex/**/*.py"), *ROOT.glob("benchmarks/**/*.py")]:
        if path.stem not in ("__init__", "__main__") and path.parent.name + path.name != "rr_flexnotebook.py":
            places.setdefault(path.stem, []).append(str(path.relative_to(ROOT)))
    assert not {name: found for name, found in places.items() if len(found) > 1}


# What users call names all that it takes; vLLM's interface says what `forward` is given.
LONG_CALLS = (
    *("any_key_visible", "block_visibility", "calibrate", "enable", "forward", "rr_attention", "rr_attention_packed"),
    "select_blocks",
)


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_no_inner_function_has_more_than_six_parameters(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef) and node.name not in LONG_CALLS:
            named = [one.arg for one in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs)]
            assert len([name for name in named if name not in ("self", "cls")]) <= 6, f"{node.name}({', '.join(named)})"
