"""What may know what: reads every import of the sources and holds the layers; nothing here is executed but the last."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCES = {"occbev": ROOT / "src", "occbev_training": ROOT / "training"}
ROS = {
    "rclpy",
    "launch",
    "launch_ros",
    "message_filters",
    "tf2_ros",
    "tf2_py",
    "sensor_msgs_py",
    "tf_transformations",
    "ament_index_python",
}
LEARNING = {"torch", "torchvision", "timm", "accelerate", "numba"}
RUNTIMES = {"openvino", "onnxruntime", "tensorrt"}
BASE = {"occbev.geometry", "occbev.grid", "occbev.classes", "occbev.config", "occbev.files"}
TORCH_FREE = ("occbev_training.simulator", "occbev_training.sources", "occbev_training.metrics")
SHARED = "occbev_training.workers"
"""What torch-free rooms may use besides: a single module that needs neither torch nor numba."""


@dataclass(frozen=True)
class Import:
    """One import statement: which module of ours names what, and whether it runs on import."""

    importer: str
    imported: str
    at_import: bool
    line: int

    @property
    def top(self) -> str:
        return self.imported.split(".")[0]

    def __str__(self) -> str:
        return f"{self.importer}:{self.line} imports {self.imported}"


def module_name(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def statements(tree: ast.Module) -> Iterator[tuple[ast.stmt, bool]]:
    """Every import statement and whether it is outside functions and TYPE_CHECKING blocks."""

    def walk(node: ast.AST, at_import: bool) -> Iterator[tuple[ast.stmt, bool]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, (ast.Import, ast.ImportFrom)):
                yield child, at_import
            inside = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
            checking = isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test)
            yield from walk(child, at_import and not inside and not checking)

    return walk(tree, True)


def names_of(statement: ast.stmt, importer: str, modules: set[str]) -> list[str]:
    if isinstance(statement, ast.Import):
        return [alias.name for alias in statement.names]
    assert isinstance(statement, ast.ImportFrom)
    assert statement.level == 0, f"{importer}: relative import; the house style is absolute"
    source = statement.module or ""
    inner = [f"{source}.{alias.name}" for alias in statement.names]
    return [name if name in modules else source for name in inner]


def read_imports() -> list[Import]:
    files = {module_name(f, root): f for pkg, root in SOURCES.items() for f in (root / pkg).rglob("*.py")}
    found = []
    for importer, path in sorted(files.items()):
        for statement, at_import in statements(ast.parse(path.read_text())):
            names = dict.fromkeys(names_of(statement, importer, set(files)))
            found += [Import(importer, name, at_import, statement.lineno) for name in names]
    return found


IMPORTS = read_imports()


def is_ros(name: str) -> bool:
    return name in ROS or name.endswith("_msgs")


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(package + ".") for package in packages)


def is_backend(module: str) -> bool:
    return module.startswith("occbev.inference.") and module.endswith("_backend")


def offenders(rule: Callable[[Import], bool]) -> list[str]:
    return [str(entry) for entry in IMPORTS if rule(entry)]


def test_imports_were_found() -> None:
    importers = {entry.importer for entry in IMPORTS}
    assert {
        "occbev.rig",
        "occbev.ros.build_interfaces",
        "occbev_training.sources.recording",
    } <= importers


def test_the_base_knows_only_numpy_yaml_and_the_standard_library() -> None:
    allowed = {"numpy", "yaml", *sys.stdlib_module_names}
    assert not offenders(lambda i: i.importer in BASE and i.top not in allowed and i.imported not in BASE)


def test_the_robot_side_never_needs_torch() -> None:
    torch_side = ("occbev.inference.torch_backend",)
    assert not offenders(
        lambda i: within(i.importer, "occbev") and i.top in LEARNING and not within(i.importer, *torch_side)
    )


def test_the_robot_side_knows_the_training_package_only_in_the_torch_backend_and_inside_commands() -> None:
    def allowed(entry: Import) -> bool:
        inside_command = within(entry.importer, "occbev.cli") and not entry.at_import
        return inside_command or within(entry.importer, "occbev.inference.torch_backend")

    assert not offenders(lambda i: within(i.importer, "occbev") and i.top == "occbev_training" and not allowed(i))


def test_only_ros_knows_ros() -> None:
    assert not offenders(lambda i: is_ros(i.top) and not within(i.importer, "occbev.ros"))


def test_nobody_imports_ros_but_the_commands() -> None:
    allowed = ("occbev.ros", "occbev.cli")
    assert not offenders(lambda i: within(i.imported, "occbev.ros") and not within(i.importer, *allowed))


def test_messages_know_the_base_alone_so_that_training_can_use_them() -> None:
    rooms = ("inference", "streams", "ros", "reports", "benchmarks", "cli")
    above = tuple(f"occbev.{room}" for room in rooms)
    assert not offenders(lambda i: within(i.importer, "occbev.messages") and within(i.imported, *above))


def test_runtimes_are_known_to_their_backends_alone_which_are_loaded_when_chosen() -> None:
    def asks(entry: Import) -> bool:
        return is_backend(entry.importer) or entry.importer == "occbev.cli.info"

    assert not offenders(lambda i: within(i.importer, "occbev") and i.top in RUNTIMES and not asks(i))
    assert not offenders(lambda i: within(i.importer, "occbev") and is_backend(i.imported) and i.at_import)


def test_one_openvino_core_serves_the_process() -> None:
    """Two that overlap leave the thread a freed stack for signals; see `openvino_backend.shared_core`."""
    made = re.compile(r"\bCore\(\)")
    makers = [path.name for root in SOURCES.values() for path in root.rglob("*.py") if made.search(path.read_text())]
    assert makers == ["openvino_backend.py"]


def test_rich_belongs_to_the_commands() -> None:
    commands = ("occbev.cli", "occbev_training.cli")
    assert not offenders(lambda i: i.top in {"rich", "tqdm"} and not within(i.importer, *commands))


def test_torch_free_rooms_use_nothing_that_needs_torch() -> None:
    assert not offenders(
        lambda i: (
            within(i.importer, *TORCH_FREE)
            and i.at_import
            and (i.top in LEARNING or (i.top == "occbev_training" and not within(i.imported, *TORCH_FREE, SHARED)))
        )
    )


@pytest.mark.parametrize("package", ["occbev", "occbev_training"])
def test_the_rooms_are_in_no_circle(package: str) -> None:
    edges: dict[str, set[str]] = {}
    for entry in IMPORTS:
        if within(entry.importer, package) and entry.top == package and entry.at_import:
            source, target = (".".join(m.split(".")[:2]) for m in (entry.importer, entry.imported))
            if source != target and target != package:
                edges.setdefault(source, set()).add(target)
    done: set[str] = set()

    def visit(room: str, path: tuple[str, ...]) -> None:
        assert room not in path, f"circle: {' -> '.join((*path, room))}"
        if room not in done:
            for target in sorted(edges.get(room, ())):
                visit(target, (*path, room))
            done.add(room)

    for room in sorted(edges):
        visit(room, ())


@pytest.mark.parametrize("package", ["occbev", *TORCH_FREE])
def test_it_imports_where_torch_numba_and_ros_are_missing(package: str) -> None:
    program = f"""
import importlib, importlib.abc, pkgutil, sys
class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        top = name.split(".")[0]
        if top in {sorted(LEARNING | RUNTIMES | ROS)!r} or top.endswith("_msgs"):
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
package = importlib.import_module({package!r})
for module in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
    if not module.name.startswith("occbev.ros") and not module.name.endswith(("_backend", "__main__")):
        importlib.import_module(module.name)
"""
    search = [str(root) for root in SOURCES.values()]
    start = f"import sys; sys.path[:0] = {search!r}\n{program}"
    done = subprocess.run([sys.executable, "-c", start], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1500:]


def test_the_demo_needs_nothing_that_only_training_depends_on(repository: Path) -> None:
    """The environment of the robot holds the training package without its dependencies."""
    source = (repository / "src/occbev/cli/demo.py").read_text()
    modules = sorted(set(re.findall(r"from (occbev_training[.\w]*) import", source)))
    project = (repository / "training/pyproject.toml").read_text()
    listed = re.search(r"^dependencies = \[(.*?)^\]", project, re.MULTILINE | re.DOTALL)
    assert listed is not None
    packages = re.findall(r'^    "([\w-]+)', listed[1], re.MULTILINE)
    absent = {name.replace("-", "_") for name in packages} - {"occbev", "numpy"}
    assert {"torch", "safetensors"} <= absent
    assert len(modules) > 3
    program = f"""
import importlib, sys
for name in {sorted(absent)!r}:
    sys.modules[name] = None
for name in {modules!r}:
    importlib.import_module(name)
"""
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True, text=True)


def test_private_parts_of_rclpy_are_reached_in_one_file() -> None:
    files = {path.name: ast.parse(path.read_text()) for path in (ROOT / "src/occbev/ros").glob("*.py")}
    attributes = [(name, n) for name, tree in files.items() for n in ast.walk(tree) if isinstance(n, ast.Attribute)]
    private = [(name, n) for name, n in attributes if re.match("_[a-z]", n.attr)]
    foreign = {name: n.attr for name, n in private if ast.unparse(n.value) not in ("self", "os")}
    assert set(foreign) == {"rclpy_internals.py"}, foreign
