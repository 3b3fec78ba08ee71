"""Build tf2_msgs and vision_msgs, which have no wheel, with the code generators that the ROS 2 wheels bring.

`python -m occbev.ros.build_interfaces` needs gcc, g++ and the Python headers, no cmake and no colcon; where the
packages are importable already (a ROS 2 distribution, an earlier build) it does nothing and never shadows them.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.metadata
import importlib.util
import io
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from occbev.messages.bags import INTERFACES

MARKER = "built_by_occbev.json"
"""File in a built package: the hash of what it was built from and the type hashes."""

PACKAGES = ("tf2_msgs", "vision_msgs")
DEPENDENCIES = ("builtin_interfaces", "std_msgs", "geometry_msgs")
TYPE_SUPPORT = "rosidl_typesupport_fastrtps_c"
INTROSPECTION = "rosidl_typesupport_introspection_c"
WHEELS = ("ros-rclpy", "ros-rosidl-generator-py", "ros-rosidl-typesupport-fastrtps-c", "numpy")


DISPATCH = """
#include <stddef.h>
#include <string.h>
#include "rosidl_runtime_c/message_type_support_struct.h"

#define HANDLE(kind) rosidl_typesupport_##kind##__get_message_type_support_handle__MESSAGE

typedef const rosidl_message_type_support_t * Handle;

Handle HANDLE(fastrtps_c)(void);
Handle HANDLE(introspection_c)(void);

static Handle choose(Handle own, const char * wanted)
{
  Handle other = HANDLE(introspection_c)();
  if (strcmp(wanted, own->typesupport_identifier) == 0) return own;
  return strcmp(wanted, other->typesupport_identifier) == 0 ? other : NULL;
}

Handle HANDLE(c)(void)
{
  static rosidl_message_type_support_t handle;
  handle = *HANDLE(fastrtps_c)();
  handle.func = choose;
  return &handle;
}
"""
"""Finds one message's type supports inside the one extension; the generators' own dispatch wants a library each.

Fast DDS asks for introspection as well, and leaves an error behind that is reported later, for another type.
"""


class InterfaceError(RuntimeError):
    """The message packages can neither be found nor built; says what to install."""


@dataclass(frozen=True)
class Build:
    """One message package on its way: sources in `source`, generated files under `work`."""

    package: str
    source: Path
    work: Path
    prefix: Path

    @property
    def idl_tuples(self) -> list[str]:
        """`folder:msg/Type.idl` of each message, as the generators want them."""
        idl = self.work / "idl"
        return [f"{idl}:msg/{path.name}" for path in sorted((idl / "msg").glob("*.idl"))]

    def output(self, generator: str) -> Path:
        """Folder that one generator writes to."""
        return self.work / generator / self.package


def main() -> int:
    """Make sure that both packages import; prints one line for each."""
    try:
        for package in PACKAGES:
            print(f"{package}: {ensure(package)}", flush=True)
    except InterfaceError as error:
        print(f"build_interfaces: {error}", file=sys.stderr)
        return 1
    return 0


def ensure(package: str, target: Path | None = None) -> str:
    """Build one message package into `target` (default: this environment) unless it is there; says what was done.

    Raises:
        InterfaceError: ROS 2, a compiler or a header is missing, or the compiler failed.
    """
    target = target or Path(sysconfig.get_path("platlib"))
    found = _folder_of(package)
    if found is not None and not (found / MARKER).is_file():
        return f"installed in {found}, left alone"
    if (target / package).exists() and not (target / package / MARKER).is_file():
        raise InterfaceError(f"{target / package} is not ours and does not import; remove it first")
    prefix = _ros_prefix(package)
    fingerprint = _fingerprint(package)
    if found == target / package and _marker(found).get("fingerprint") == fingerprint:
        return "up to date"
    _check_compiler()
    with tempfile.TemporaryDirectory(prefix="occbev_interfaces_") as work:
        build = Build(package, INTERFACES / package, Path(work), prefix)
        built = _generate_and_compile(build)
        record = {"fingerprint": fingerprint, "type_hashes": _type_hashes(build)}
        (built / MARKER).write_text(json.dumps(record, indent=1))
        shutil.rmtree(target / package, ignore_errors=True)
        shutil.copytree(built, target / package)
    importlib.invalidate_caches()
    return f"built into {target / package}"


def type_hashes(package: str) -> dict[str, str]:
    """Return type name -> RIHS01 hash of a package that was built here."""
    folder = _folder_of(package)
    if folder is None or not (folder / MARKER).is_file():
        raise InterfaceError(f"{package} was not built by occbev")
    return dict(_marker(folder)["type_hashes"])


def _folder_of(package: str) -> Path | None:
    spec = importlib.util.find_spec(package)
    places = list(spec.submodule_search_locations or []) if spec else []
    return Path(places[0]) if places else None


def _marker(folder: Path) -> dict[str, Any]:
    path = folder / MARKER
    return dict(json.loads(path.read_text())) if path.is_file() else {}


def _ros_prefix(package: str) -> Path:
    """Find the folder with `share/`, `lib/` and `include/` of the ROS 2 wheels."""
    if os.environ.get("AMENT_PREFIX_PATH") and os.environ.get("ROS_DISTRO"):
        apt = f"ros-{os.environ['ROS_DISTRO']}-{package.replace('_', '-')}"
        raise InterfaceError(f"{package} is missing; install it with: sudo apt-get install {apt}")
    prefix = Path(sys.prefix)
    missing = [d for d in DEPENDENCIES if not (prefix / "share" / d / "msg").is_dir()]
    if missing:
        raise InterfaceError(
            f"{missing} are not under {prefix}; install ROS 2 with: "
            "pip install ros-rclpy ros-common-interfaces ros-rmw-fastrtps-cpp"
        )
    return prefix


def _check_compiler() -> None:
    for tool in ("gcc", "g++"):
        if shutil.which(tool) is None:
            raise InterfaceError(f"{tool} is missing; install it with: sudo apt-get install gcc g++")
    include = Path(sysconfig.get_path("include"))
    if not (include / "Python.h").is_file():
        python = f"python{sys.version_info.major}.{sys.version_info.minor}-dev"
        raise InterfaceError(f"no Python.h in {include}; install it with: sudo apt-get install {python}")


def _fingerprint(package: str) -> str:
    """Hash what a build depends on: definitions, this file, the generators' versions, the ABI."""
    digest = hashlib.sha256(Path(__file__).read_bytes())
    for path in sorted((INTERFACES / package).rglob("*.msg")):
        digest.update(path.name.encode() + path.read_bytes())
    for wheel in WHEELS:
        digest.update(f"{wheel} {importlib.metadata.version(wheel)}".encode())
    digest.update(str(sysconfig.get_config_var("EXT_SUFFIX")).encode())
    return digest.hexdigest()[:16]


def _generate_and_compile(build: Build) -> Path:
    """Run the generators, compile everything into one extension, return the package's folder."""
    printed = io.StringIO()  # the generators print each file they write
    try:
        with contextlib.redirect_stdout(printed):
            _generate(build)
    except Exception as error:
        raise InterfaceError(f"{build.package}: a generator failed: {error}\n{printed.getvalue()}") from error
    package = build.output("rosidl_generator_py")
    (package / "__init__.py").touch()
    extension = package / f"{build.package}_s__rosidl_typesupport_c{sysconfig.get_config_var('EXT_SUFFIX')}"
    _compile(build, extension)
    for left_over in [*package.rglob("*.c"), *package.rglob("*.o")]:
        left_over.unlink()
    return package


def _generate(build: Build) -> None:
    """Messages -> IDL -> type descriptions -> C structures, type supports and Python classes."""
    from rosidl_adapter.msg import convert_msg_to_idl
    from rosidl_generator_c import generate_c
    from rosidl_generator_py import generate_py
    from rosidl_generator_type_description import generate_type_hash
    from rosidl_typesupport_fastrtps_c import generate_typesupport_fastrtps_c
    from rosidl_typesupport_introspection_c import generate_c as generate_introspection

    for message in sorted((build.source / "msg").glob("*.msg")):
        relative = message.relative_to(build.source)
        convert_msg_to_idl(build.source, build.package, relative, build.work / "idl" / "msg")
    runs: dict[str, Callable[[str], Any]] = {
        "rosidl_generator_type_description": generate_type_hash,
        "rosidl_generator_c": generate_c,
        "rosidl_typesupport_fastrtps_c": generate_typesupport_fastrtps_c,
        "rosidl_typesupport_introspection_c": generate_introspection,
        "rosidl_generator_py": lambda arguments: generate_py(arguments, ["rosidl_typesupport_c"]),
    }
    for generator, run in runs.items():
        (build.output(generator) / "msg").mkdir(parents=True)
        run(str(_write_arguments(build, generator)))
    for generator in ("rosidl_generator_c", TYPE_SUPPORT, INTROSPECTION):
        _write_visibility_header(build, generator)
    for name in (Path(entry).stem for entry in build.idl_tuples):
        dispatch = DISPATCH.replace("MESSAGE", f"{build.package}__msg__{name}")
        (build.work / f"{name}_dispatch.c").write_text(dispatch)


def _write_arguments(build: Build, generator: str) -> Path:
    """Write the JSON file that tells a generator what to read and where to write."""
    share = build.prefix / "share"
    described = build.output("rosidl_generator_type_description")
    names = [entry.rsplit(":", 1)[1] for entry in build.idl_tuples]
    arguments = {
        "package_name": build.package,
        "idl_tuples": build.idl_tuples,
        "output_dir": str(build.output(generator)),
        "template_dir": str(share / generator / "resource"),
        "include_paths": [f"{name}:{share / name}" for name in DEPENDENCIES],
        "ros_interface_dependencies": [
            f"{name}:{idl}" for name in DEPENDENCIES for idl in sorted((share / name / "msg").glob("*.idl"))
        ],
        "ros_interface_files": [str(path) for path in sorted((build.source / "msg").glob("*.msg"))],
        "type_description_tuples": [f"{name}:{(described / name).with_suffix('.json')}" for name in names],
        "target_dependencies": [],
    }
    path = build.work / f"{generator}.json"
    path.write_text(json.dumps(arguments))
    return path


def _write_visibility_header(build: Build, generator: str) -> None:
    name = f"{generator}__visibility_control.h"
    template = (build.prefix / "share" / generator / "resource" / f"{name}.in").read_text()
    text = template.replace("@PROJECT_NAME@", build.package)
    text = text.replace("@PROJECT_NAME_UPPER@", build.package.upper())
    (build.output(generator) / "msg" / name).write_text(text)


def _compile(build: Build, extension: Path) -> None:
    """Compile every generated source and link the one extension that Python imports."""
    sources = [*build.work.rglob("*.c"), *build.work.rglob("*.cpp")]
    objects = [source.with_suffix(".o") for source in sources]
    flags = ["-O1", "-fPIC", "-w", "-DNDEBUG", *(f"-I{path}" for path in _include_folders(build))]
    commands = [
        [
            *(["gcc"] if source.suffix == ".c" else ["g++", "-std=c++17"]),
            *flags,
            "-c",
            str(source),
            "-o",
            str(out),
        ]
        for source, out in zip(sources, objects, strict=True)
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(_call, commands))
    library = build.prefix / "lib"
    _call(["g++", "-shared", "-o", str(extension), *map(str, objects), *_link_options(library)])


def _include_folders(build: Build) -> list[str]:
    import numpy as np

    generated = [build.work / name for name in ("rosidl_generator_c", TYPE_SUPPORT, INTROSPECTION)]
    root = build.prefix / "include"  # ROS packages have a folder of their own in it, Fast CDR has not
    installed = [path for path in root.iterdir() if path.is_dir()]
    return [
        *map(str, [*generated, *installed, root]),
        sysconfig.get_path("include"),
        np.get_include(),
    ]


def _link_options(library: Path) -> list[str]:
    names = [
        "rosidl_runtime_c",
        "rosidl_typesupport_c",
        TYPE_SUPPORT,
        INTROSPECTION,
        "rosidl_typesupport_fastrtps_cpp",
        "rcutils",
    ]
    kinds = ("rosidl_generator_c", "rosidl_generator_py", TYPE_SUPPORT, INTROSPECTION)
    names += [
        "rmw",
        "fastcdr",
        *(f"{package}__{kind}" for package in DEPENDENCIES for kind in kinds),
    ]
    files: Iterable[Path] = (library / f"lib{name}.so" for name in names)
    return [*(str(path) for path in files if path.is_file()), f"-Wl,-rpath,{library}"]


def _call(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise InterfaceError(f"{' '.join(command[:1])} failed:\n{done.stderr[-2000:]}")


def _type_hashes(build: Build) -> dict[str, str]:
    described = build.output("rosidl_generator_type_description") / "msg"
    records = [json.loads(path.read_text()) for path in sorted(described.glob("*.json"))]
    entries = [record["type_hashes"][0] for record in records]
    return {entry["type_name"]: entry["hash_string"] for entry in entries}


if __name__ == "__main__":
    sys.exit(main())
